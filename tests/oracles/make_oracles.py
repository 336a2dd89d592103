"""Makes the oracles under `tests/oracles/data/` with torch, transformers and peft (Python 3.11):

    pip install -e '.[oracle]' && python tests/oracles/make_oracles.py [FAMILY ...]

Tiny random models in which every branch acts: all 1-D tensors are random, the window is shorter
than the text, the clip cuts, epsilon and rope theta differ from the defaults. The generator asserts
that each of these changes the logits, and that no token's choice of experts is a near-tie, which
two correct programs may decide differently.

The tests call the functions of this file too, where torch is installed, so stored results and
library can not drift apart unseen.
"""

import json
import pathlib
import shutil
import sys
import tempfile

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, OlmoeConfig

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from tests.oracles.stored import (  # noqa: E402  (the path is set above)
    DATA,
    DENSE_FAMILIES,
    FAMILIES,
    RANK,
    SCALE,
    VARIANTS,
    VOCABULARY,
    Rows,
    copy_model,
    lora_cases,
    make_rows,
    stored_positions,
)

MIN_MARGIN = 3e-4  # between the router logits of the last chosen and the first rejected expert
MIN_EFFECT = 0.05  # on some logit, of every option that a variant is there for

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 36,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 0.01,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CONFIGS = {
    "mixtral": lambda: MixtralConfig(
        **COMMON,
        head_dim=10,
        num_local_experts=5,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 2e4},
    ),
    "olmoe": lambda: OlmoeConfig(
        **COMMON,
        num_experts=5,
        num_experts_per_tok=2,
        clip_qkv=0.5,
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 5e3},
    ),
    "llama": lambda: LlamaConfig(
        **COMMON,
        head_dim=10,
        attention_bias=True,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 2e4},
    ),
}
# Options that must act: the logits change when they are put to these values.
OPTIONS = {
    "mixtral": {"rms_norm_eps": 1e-5, "rope_theta": 1e6},
    "mixtral_window": {"sliding_window": None},
    "olmoe": {"rms_norm_eps": 1e-5, "rope_theta": 1e4, "clip_qkv": None},
    "olmoe_normalized": {"norm_topk_prob": False},
    "llama": {"rms_norm_eps": 1e-5, "rope_theta": 1e4},
    "llama3": {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}},
}


def load_model(directory: pathlib.Path, dtype=torch.float32):
    """The model, with the plain implementations of attention and experts."""
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=dtype,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    return model.eval()


def row_logits(model, rows: Rows, index: int) -> torch.Tensor:
    """Logits [T, V] of one row; documents of a packed row are told apart by their positions."""
    tokens, segments, positions = (torch.tensor(array[index : index + 1]).long() for array in rows)
    # A mask of ones would join the documents of a packed row, so only a padded row gets one.
    mask = segments if bool((segments == 0).any()) else None
    return model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits[0]


@torch.no_grad()
def all_logits(model, rows: Rows) -> np.ndarray:
    """Logits [3, T, V]."""
    return np.stack([row_logits(model, rows, index).float().numpy() for index in range(3)])


class _Float64(TorchFunctionMode):
    """Inside, what asks for float32 gets float64.

    A model in float64 still has its softmax, its norms and its rotary angles in float32. Not only
    is their rounding that of the processor: the mask of such a model is the smallest float64, which
    in float32 is minus infinity, and a padding token whose window holds nothing but padding takes
    the softmax of infinities alone. Its NaN reaches every token in the next layer (0 * NaN).
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def widened(value):
            return torch.float64 if value is torch.float32 else value

        if function is torch.Tensor.float:
            function = torch.Tensor.double
        kwargs = {name: widened(value) for name, value in (kwargs or {}).items()}
        return function(*map(widened, args), **kwargs)


@torch.no_grad()
def exact_logits(directory: pathlib.Path, rows: Rows) -> np.ndarray:
    """Logits f64 [3, T, V], the same on every processor far beyond float32."""
    with _Float64():
        model = load_model(directory, torch.float64)
        return np.stack([row_logits(model, rows, index).numpy() for index in range(3)])


def bfloat16_kl(directory: pathlib.Path, rows: Rows) -> np.ndarray:
    """KL of the model in bfloat16 from itself in f32, f32 [valid tokens] in nats."""
    exact, half = (
        torch.tensor(all_logits(load_model(directory, dtype), rows)[rows.segments > 0]).double()
        for dtype in (torch.float32, torch.bfloat16)
    )
    exact, half = exact.log_softmax(-1), half.log_softmax(-1)
    return (exact.exp() * (exact - half)).sum(-1).numpy().astype(np.float32)


@torch.no_grad()
def router_margin(model, rows: Rows) -> float:
    """Smallest distance of router logits at the cut, over layers and valid tokens; infinite where
    nothing is routed.
    """
    if not hasattr(model.model.layers[0].mlp, "gate"):
        return float("inf")
    margins, hooks = [], []
    valid = {"tokens": None}

    def measure(module, inputs):
        logits = inputs[0].reshape(-1, inputs[0].shape[-1]) @ module.weight.T
        chosen = model.config.num_experts_per_tok
        ordered = logits.sort(dim=-1, descending=True).values[valid["tokens"]]
        margins.append(float((ordered[:, chosen - 1] - ordered[:, chosen]).min()))

    for layer in model.model.layers:
        hooks.append(layer.mlp.gate.register_forward_pre_hook(measure))
    for index in range(3):
        valid["tokens"] = torch.tensor(rows.segments[index] > 0)
        row_logits(model, rows, index)
    for hook in hooks:
        hook.remove()
    return min(margins)


def peft_name(key: str) -> str:
    return key.replace(".default.", ".")  # the adapter's name is in the module tree, not in files


def peft_model(
    directory: pathlib.Path,
    factors: dict[str, np.ndarray] | None = None,
    dtype: torch.dtype = torch.float32,
):
    """The model with LoRA on q and v, and on both expert matrices or on the dense FFN.

    An expert matrix is one 3-D parameter to peft. Of A [E * r, in] the experts' rows follow each
    other; of B [out, r * E] the expert is the fastest index. The factors of gate_up_proj lie at
    `experts.base_layer`, wrapped by those of down_proj at `experts`.
    """
    from peft import LoraConfig, get_peft_model

    model = load_model(directory, dtype)
    is_dense = model.config.model_type in DENSE_FAMILIES
    ffn = ["gate_proj", "up_proj", "down_proj"] if is_dense else []
    fused = [] if is_dense else ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(
        r=RANK,
        lora_alpha=RANK * SCALE,
        target_modules=["q_proj", "v_proj", *ffn],
        target_parameters=fused or None,
    )
    model = get_peft_model(model, config).eval()
    trained = {
        peft_name(key): value for key, value in model.named_parameters() if value.requires_grad
    }
    assert all("lora_" in key for key in trained)
    if factors is not None:
        assert trained.keys() == factors.keys()
        with torch.no_grad():
            for key, value in trained.items():
                assert value.shape == factors[key].shape
                value.copy_(torch.tensor(factors[key]))
    return model, trained


def random_factors(directory: pathlib.Path, seed: int) -> dict[str, np.ndarray]:
    """Factors with B not zero, and of a size that moves the logits."""
    generator = np.random.default_rng(seed)
    _, trained = peft_model(directory)
    return {
        key: (generator.standard_normal(value.shape) * (0.1 if "lora_B" in key else 0.2)).astype(
            np.float32
        )
        for key, value in trained.items()
    }


def case_factors(factors: dict[str, np.ndarray], roles: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The factors of a case, which adapts these roles of the FFN.

    peft can not adapt one half of a fused matrix. With B's gate rows at zero the product is that of
    an adapter of `up` alone, and so is A's gradient: dA = B^T dW = B_gate^T dW_gate + B_up^T dW_up,
    of which the first term is zero. The gradient of B's up rows is dW_up A^T in both.
    """
    if "up" not in roles or "gate" in roles:
        return factors
    changed = dict(factors)
    for key, value in factors.items():
        if key.endswith("experts.base_layer.lora_B.weight"):
            changed[key] = value.copy()
            changed[key][: len(value) // 2] = 0
    return changed


def peft_gradients(directory: pathlib.Path, factors: dict, rows: Rows):
    """(loss, gradients f64 by key): summed NLL over the number of targets of all rows."""
    with _Float64():
        model, trained = peft_model(directory, factors, torch.float64)
        loss = mean_nll(model, rows)
        loss.backward()
    return loss.item(), {key: value.grad.numpy() for key, value in trained.items()}


def mean_nll(model, rows: Rows) -> torch.Tensor:
    total = torch.zeros(())
    for index in range(3):
        nll = torch.nn.functional.cross_entropy(
            row_logits(model, rows, index),
            torch.tensor(rows.targets[index]).long(),
            reduction="none",
        )
        total = total + (nll * torch.tensor(rows.target_mask[index])).sum()
    return total / float(rows.target_mask.sum())


# ------------------------------------------------------------------------------------- generation


def random_model(family: str, seed: int):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        CONFIGS[family](), attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_(std=0.3)
            elif value.ndim == 1:
                value.uniform_(0.5, 1.5)
            else:
                gain = 3.0 if "mlp.gate" in name else 1.5
                value.normal_(std=1.0 if "embed" in name else gain * value.shape[-1] ** -0.5)
    return model.eval()


def effect(variant: str, option: str, value, folder: pathlib.Path, rows: Rows) -> float:
    """Largest change of a valid logit when an option takes another value."""
    directory = copy_model(variant, "experts", folder / f"{variant}_{option}")
    before = all_logits(load_model(directory), rows)
    values = json.loads((directory / "config.json").read_text())
    if option == "rope_theta":
        values["rope_parameters"][option] = value
    else:
        values[option] = value
    (directory / "config.json").write_text(json.dumps(values))
    after = all_logits(load_model(directory), rows)
    return float(np.abs(before - after)[rows.segments > 0].max())


def write_weights(family: str, rows: Rows, folder: pathlib.Path) -> None:
    """Both layouts of the first seed without a near-tie in any variant."""
    for seed in range(100):
        model = random_model(family, seed)
        layouts = [("experts", family), ("fused", f"{family}_fused")]
        for layout, name in layouts[: 1 if family in DENSE_FAMILIES else 2]:
            shutil.rmtree(DATA / name, ignore_errors=True)
            model.save_pretrained(DATA / name, save_original_format=layout == "experts")
            (DATA / name / "generation_config.json").unlink(missing_ok=True)
            (DATA / name / "model.safetensors").chmod(0o644)
        variants = [name for name, variant in VARIANTS.items() if variant.family == family]
        margins = [
            router_margin(load_model(copy_model(name, "experts", folder / name)), rows)
            for name in variants
        ]
        if min(margins) > MIN_MARGIN:
            print(f"{family}: seed {seed}, margins {dict(zip(variants, margins, strict=True))}")
            return
    raise RuntimeError(f"{family}: every seed has a near-tie")


def write_lora(family: str, rows: Rows, folder: pathlib.Path) -> None:
    """Factors of the first seed without a near-tie in any case, with losses and gradients."""
    directory = copy_model(family, "experts", folder / f"{family}_lora")
    for seed in range(100):
        factors = random_factors(directory, seed)
        cases = {case: case_factors(factors, roles) for case, roles in lora_cases(family).items()}
        models = [peft_model(directory, in_case)[0] for in_case in cases.values()]
        margin = min(router_margin(model.base_model.model, rows) for model in models)
        if margin > MIN_MARGIN:
            break
    else:
        raise RuntimeError(f"{family}: every seed of the factors has a near-tie")
    arrays = {f"factor/{key}": value for key, value in factors.items()}
    for case, in_case in cases.items():
        loss, gradients = peft_gradients(directory, in_case, rows)
        print(f"{family} {case}: loss {loss:.6f}, seed {seed}, margin {margin:.1e}")
        arrays[f"{case}/loss"] = np.float64(loss)
        arrays |= {
            f"{case}/gradient/{key}": value.astype(np.float32) for key, value in gradients.items()
        }
    np.savez_compressed(DATA / f"{family}_lora.npz", **arrays)


def main() -> None:
    torch.set_num_threads(1)
    rows, positions = make_rows(), stored_positions()
    DATA.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        families = sys.argv[1:] or FAMILIES
        for family in families:
            write_weights(family, rows, folder)
            write_lora(family, rows, folder)
        for variant in (name for name, value in VARIANTS.items() if value.family in families):
            for option, value in OPTIONS[variant].items():
                change = effect(variant, option, value, folder, rows)
                print(f"{variant}: {option} changes logits by {change:.2f}")
                assert change > MIN_EFFECT
            directory = copy_model(variant, "experts", folder / variant)
            np.savez_compressed(
                DATA / f"{variant}.npz",
                logits=exact_logits(directory, rows)[positions].astype(np.float32),
                bfloat16_kl=bfloat16_kl(directory, rows),
            )
    print(f"{sum(file.stat().st_size for file in DATA.rglob('*.*')):,} bytes")


if __name__ == "__main__":
    main()
