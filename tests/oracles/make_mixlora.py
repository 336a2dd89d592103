"""Makes `data/mixlora.npz`: what the authors' package computes with a random MixLoRA adapter.

    pip install -e '.[oracle]' && pip install --no-deps mixlora==0.2.3
    python tests/oracles/make_mixlora.py

The base is the stored model `data/llama`. The package's loader downloads and checks versions; here
its config object and its injection are called directly. `model.eval()` does not reach the experts,
which it keeps in plain dicts, so their dropout is switched off one by one, and the script asserts
that two passes are equal bit for bit. It also asserts that experts, router and attention factors
act, and that no token's choice of experts is a near-tie.
"""

import json
import pathlib
import sys

import mixlora
import numpy as np
import torch
from mixlora.config import MixLoraConfig
from mixlora.model import inject_adapter_in_model
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from tests.oracles.stored import DATA, VOCABULARY  # noqa: E402  (the path is set above)

RANK, EXPERTS, LAYERS, LENGTH = 3, 5, 2, 30
MIN_MARGIN, MIN_EFFECT = 3e-4, 0.05
SHAPES = {"q": (36, 60), "k": (36, 20), "v": (36, 20), "o": (60, 36)}  # in, out
FFN = {"gate": (36, 28), "up": (36, 28), "down": (28, 36)}
CONFIG = {
    "bias": "none",
    "peft_type": "MIXLORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "llama",
    "r": RANK,
    "lora_alpha": 6,
    "lora_dropout": 0.05,
    "target_modules": [f"{role}_proj" for role in (*SHAPES, *FFN)],
    "routing_strategy": "mixlora",
    "num_experts": EXPERTS,
    "act_fn": "silu",
    "top_k": 2,
}


def random_adapter(seed: int) -> dict[str, np.ndarray]:
    """Factors with B not zero, and of a size that moves the logits."""
    draw = np.random.default_rng(seed)
    tensors = {}

    def pair(stem, inner, outer):
        tensors[f"{stem}.lora_A.weight"] = 0.2 * draw.standard_normal((RANK, inner))
        tensors[f"{stem}.lora_B.weight"] = 0.2 * draw.standard_normal((outer, RANK))

    for layer in range(LAYERS):
        stem = f"mixlora.layers.{layer}"
        tensors[f"{stem}.mlp.moe_gate.weight"] = 0.5 * draw.standard_normal((EXPERTS, 36))
        for role, shape in SHAPES.items():
            pair(f"{stem}.self_attn.{role}_proj", *shape)
        for role, shape in FFN.items():
            for expert in range(EXPERTS):
                pair(f"{stem}.mlp.{role}_proj.experts.{expert}", *shape)
    return {key: value.astype(np.float32) for key, value in tensors.items()}


def adapted(tensors: dict[str, np.ndarray]):
    """The base with the adapter injected, everything in evaluation mode."""
    model = AutoModelForCausalLM.from_pretrained(
        DATA / "llama", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    config = MixLoraConfig.from_config(CONFIG)
    config.adapter_name_, config.dtype_ = "default", torch.float32
    weights = {key: torch.from_numpy(value) for key, value in tensors.items()}
    inject_adapter_in_model(model, config.check(), weights)
    for layer in model.model.layers:
        for expert in layer.mlp.mixlora_moes["default"].experts_.values():
            expert.eval()
    return model.eval()


@torch.no_grad()
def logits(tensors: dict[str, np.ndarray], tokens_BT: np.ndarray) -> tuple[np.ndarray, float]:
    """Logits [B, T, V], and the smallest distance of router logits at the cut of the best two."""
    model, margins = adapted(tensors), []
    for layer in model.model.layers:
        gate = layer.mlp.mixlora_moes["default"].gate_

        def measure(_, inputs, gate=gate):
            ordered = (inputs[0] @ gate.T).sort(dim=-1, descending=True).values
            margins.append(float((ordered[..., 1] - ordered[..., 2]).min()))

        layer.mlp.register_forward_pre_hook(measure)
    found = [model(torch.tensor(tokens_BT).long(), use_cache=False).logits for _ in range(2)]
    assert torch.equal(*found), "dropout is on"
    return found[0].numpy(), min(margins)


def main() -> None:
    torch.set_num_threads(1)
    tokens_BT = np.random.default_rng(1).integers(0, VOCABULARY, (2, LENGTH), dtype=np.int32)
    for seed in range(100):
        tensors = random_adapter(seed)
        logits_BTV, margin = logits(tensors, tokens_BT)
        if margin > MIN_MARGIN:
            break
    else:
        raise RuntimeError("every seed has a near-tie")
    for part in ("moe_gate", "self_attn", "gate_proj", "up_proj", "down_proj"):
        without = {
            key: np.zeros_like(value) if part in key else value for key, value in tensors.items()
        }
        change = float(np.abs(logits(without, tokens_BT)[0] - logits_BTV).max())
        print(f"{part} changes logits by {change:.2f}")
        assert change > MIN_EFFECT
    arrays = {f"tensor/{key}": value for key, value in tensors.items()}
    file = DATA / "mixlora.npz"
    np.savez_compressed(
        file, tokens=tokens_BT, logits=logits_BTV, config=json.dumps(CONFIG), **arrays
    )
    print(f"{file}: {file.stat().st_size:,} bytes, seed {seed}, margin {margin:.1e}")
    print(f"with {mixlora.__name__} and torch {torch.__version__}")


if __name__ == "__main__":
    main()
