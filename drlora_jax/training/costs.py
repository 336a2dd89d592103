"""Estimates the cost of a run before it starts: the kernels it uses, its memory by part, and the
FLOPs that MFU is measured against.
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
    """Returns the number of weights that one token is multiplied with: of experts only the chosen
    ones, and no input embedding.
    """
    return sum(each.active * each.in_features * each.out_features for each in config.matrices())


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Returns 4 N_active + 3.5 A: the forward pass and input gradients of a frozen base model, and
    causal attention A = 4 * heads * width * the average number of keys that a token attends to.
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
    """Returns the average number of keys per token in a row that holds one document: half the row,
    or less with a window.
    """
    seen = min(length, window or length)
    return seen - seen**2 / (2 * length)


def attention_backends(config: ModelConfig, length: int, dtype, platform: str, wanted: str):
    """Returns the backends that the layers' attention uses, sorted; raises UserError when the
    wanted backend cannot compute it.
    """
    chosen = set()
    for section in {layer.config.attention for layer in config.layers()}:
        widths = (section.head_dim, section.head_dim)
        call = Call(length, *widths, dtype, section.soft_cap, section.has_sinks)
        reason = None if wanted == "auto" else cannot(wanted, platform, call)
        if reason:
            raise UserError(f"model.attention={wanted} cannot be used here: {reason}.")
        chosen.add(choose_backend(platform, call) if wanted == "auto" else wanted)
    return sorted(chosen)


def checked_expert_backend(config: ModelConfig, dtype, device, wanted: Experts) -> Experts:
    """Returns the backend that computes experts on such a device; raises UserError when the wanted
    backend is not available there.
    """
    call = _expert_call(config, dtype, device)
    if wanted == "auto":
        return backends.choose_backend(call)
    reason = backends.cannot(wanted, call)
    if config.moe is None:
        reason = "the model has no experts of its own"
    if reason:
        raise UserError(f"model.experts={wanted} cannot be used here: {reason}.")
    return wanted


def _expert_call(config: ModelConfig, dtype, device) -> backends.Call:
    widths = (config.width, config.moe.expert_dim) if config.moe else ()
    return backends.Call(device.platform, dtype, widths, device)


def backend_line(config: ModelConfig, attention: list[str], experts: Experts, device, dtype) -> str:
    """Returns the log line that names the implementation of each operation."""
    platform = device.platform
    parts, why_dense = [f"attention={','.join(attention)}"], ""
    if config.moe is not None:
        parts.insert(0, f"experts={experts}")
        why_dense = _why_dense(config, experts, device, dtype)
    line = f"kernels     {' '.join(parts)} ({platform}){why_dense}"
    if platform == "cpu" and dtype == jnp.float32 and (reason := library.why_not()):
        line += f"; no compiled kernels: {reason}"
    return line


def _why_dense(config: ModelConfig, experts: Experts, device, dtype) -> str:
    """Says why a GPU computes every expert on every token, for the end of the log line."""
    if experts != "dense" or device.platform != "gpu":
        return ""
    reason = backends.cannot("mosaic", _expert_call(config, dtype, device))
    why = f"mosaic cannot be used: {reason}" if reason else "as configured"
    return f"; every expert is computed on every token: {why}"


def experts_line(config: ModelConfig, experts: Experts, device, dtype) -> str:
    """Returns `backend_line` for inference, where attention is chosen for each length of rows."""
    return backend_line(config, ["by-length"], experts, device, dtype)


def memory_forecast(config: ModelConfig, layout: Layout, params, state, remat: str) -> str:
    """Returns the log line that forecasts the memory of a step on each device, before compiling,
    with this and the other remat policies.
    """
    lora = bytes_on_one_device(state.lora)
    resident = bytes_on_one_device((params, state))
    total = {
        name: format_bytes(resident + predicted_step_bytes(config, layout, lora, name))
        for name in POLICIES
    }
    others = ", ".join(f"{total[name]} with {name}" for name in POLICIES if name != remat)
    return f"forecast    {total[remat]} on each device with model.remat={remat} ({others})"


def memory_lines(params, state, compiled) -> list[str]:
    """Returns log lines with the bytes on one device: base model, adapter, optimizer moments, and
    what the compiled step needs in addition.
    """
    base, lora, moments, rest = (
        format_bytes(bytes_on_one_device(tree))
        for tree in (params, state.lora, state.opt_state, (state.mask_LER, state.stats))
    )
    lines = [
        f"memory      base {base}, adapter {lora}, moments {moments}, masks and statistics {rest}"
    ]
    found = compiled_bytes(compiled)
    if found is not None:
        lines.append(
            f"            the compiled step adds {format_bytes(found.total - found.inputs)}, "
            f"{format_bytes(found.total)} in total on each device"
        )
    return lines


def checkpoint_bytes(state) -> int:
    """Returns the size of a checkpoint: trained weights, moments and the policy's statistics."""
    leaves = jax.tree.leaves((state.lora, state.opt_state, state.stats))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
