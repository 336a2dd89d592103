"""What a run will cost, before it starts: memory by part, and the FLOPs that MFU is measured
against.
"""

import jax
import jax.numpy as jnp

from drlora_jax.errors import UserError
from drlora_jax.models.architecture import ModelConfig
from drlora_jax.ops.attention.api import Call, cannot, choose_backend
from drlora_jax.ops.experts import backends
from drlora_jax.ops.experts.backends import Experts
from drlora_jax.ops.native import library
from drlora_jax.system.text import format_bytes
from drlora_jax.training.memory import (
    POLICIES,
    Layout,
    bytes_on_one_device,
    compiled_bytes,
    predicted_step_bytes,
)


def active_parameters(config: ModelConfig) -> int:
    """Weights that one token is multiplied with: chosen experts only, no input embedding."""
    return sum(each.active * each.in_features * each.out_features for each in config.matrices())


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """4 N_active + 3.5 A: forward and input gradients of a frozen base, and causal attention A = 4
    heads width times the keys that a token sees on average.
    """
    attention = sum(
        4
        * _mean_keys(sequence_length, layer.config.attention.window)
        * layer.config.attention.num_heads
        * layer.config.attention.head_dim
        for layer in config.layers()
    )
    return 4.0 * active_parameters(config) + 3.5 * attention


def _mean_keys(length: int, window: int | None) -> float:
    """Of the tokens of a row that is one document: half of it, or less with a window."""
    seen = min(length, window or length)
    return seen - seen**2 / (2 * length)


def attention_backends(config: ModelConfig, length: int, dtype, platform: str, wanted: str):
    """The backends that the layers' attention takes; a wanted one that can not do it is refused."""
    chosen = set()
    for section in {layer.config.attention for layer in config.layers()}:
        widths = (section.head_dim, section.head_dim)
        call = Call(length, *widths, dtype, section.soft_cap, section.has_sinks)
        reason = None if wanted == "auto" else cannot(wanted, platform, call)
        if reason:
            raise UserError(f"model.attention={wanted} can not be used here: {reason}.")
        chosen.add(choose_backend(platform, call) if wanted == "auto" else wanted)
    return sorted(chosen)


def checked_expert_backend(config: ModelConfig, dtype, device, wanted: Experts) -> Experts:
    """How experts are computed on such a device; a wanted way that it does not have is refused."""
    call = _expert_call(config, dtype, device)
    if wanted == "auto":
        return backends.choose_backend(call)
    reason = backends.cannot(wanted, call)
    if config.moe is None:
        reason = "the model has no experts of its own"
    if reason:
        raise UserError(f"model.experts={wanted} can not be used here: {reason}.")
    return wanted


def _expert_call(config: ModelConfig, dtype, device) -> backends.Call:
    widths = (config.width, config.moe.expert_dim) if config.moe else ()
    return backends.Call(device.platform, dtype, widths, device)


def backend_line(config: ModelConfig, attention: list[str], experts: Experts, device, dtype) -> str:
    """Which implementations of the operations a run takes."""
    platform = device.platform
    parts = [f"attention {', '.join(attention)}"]
    if config.moe is not None:
        parts.insert(0, f"experts {experts}{_why_dense(config, experts, device, dtype)}")
    line = f"computed    {'; '.join(parts)} on {platform}"
    if platform == "cpu" and dtype == jnp.float32 and (reason := library.why_not()):
        line += f" (no compiled kernels: {reason})"
    return line


def _why_dense(config: ModelConfig, experts: Experts, device, dtype) -> str:
    """What keeps a GPU from grouped products."""
    if experts != "dense" or device.platform != "gpu":
        return ""
    reason = backends.cannot("mosaic", _expert_call(config, dtype, device))
    why = f"mosaic can not be used: {reason}" if reason else "as configured"
    return f" (every expert on every token; {why})"


def experts_line(config: ModelConfig, experts: Experts, device, dtype) -> str:
    """The same of programs for many lengths of rows, whose attention is chosen for each."""
    return backend_line(config, ["by length"], experts, device, dtype)


def memory_forecast(config: ModelConfig, layout: Layout, params, state, remat: str) -> str:
    """What a step will take on each device, with this and the other policies, before compiling."""
    lora = bytes_on_one_device(state.lora)
    resident = bytes_on_one_device((params, state))
    total = {
        name: format_bytes(resident + predicted_step_bytes(config, layout, lora, name))
        for name in POLICIES
    }
    others = ", ".join(f"{total[name]} with {name}" for name in POLICIES if name != remat)
    return f"forecast    {total[remat]} on each device with model.remat={remat} ({others})"


def memory_lines(params, state, compiled) -> list[str]:
    """Bytes on one device: base, adapters, moments, and what the compiled step needs besides."""
    base, lora, moments, rest = (
        format_bytes(bytes_on_one_device(tree))
        for tree in (params, state.lora, state.opt_state, (state.mask_LER, state.stats))
    )
    lines = [
        f"memory      base {base}, factors {lora}, moments {moments}, masks and statistics {rest}"
    ]
    found = compiled_bytes(compiled)
    if found is not None:
        lines.append(
            f"            the compiled step adds {format_bytes(found.total - found.inputs)}; "
            f"{format_bytes(found.total)} in all on each device"
        )
    return lines


def checkpoint_bytes(state) -> int:
    """Of one checkpoint: what is trained, its moments and the policy's statistics."""
    leaves = jax.tree.leaves((state.lora, state.opt_state, state.stats))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
