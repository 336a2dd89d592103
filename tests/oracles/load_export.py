"""Loads an export with `transformers` and `peft` alone and compares logits with stored ones:

    python load_export.py BASE EXPORT FORMAT REFERENCE.npz

FORMAT is peft, peft-2d or merged. REFERENCE.npz has tokens_0, logits_0, tokens_1, ... of prompts.
Prints the largest KL of a token for the loaded model, and for an adapter also after
`merge_and_unload`; exit code 1 if one is above 1e-5. Needs neither jax nor drlora_jax, so that it
can run where only the libraries that will use the export are installed.
"""

import pathlib
import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM

MAX_KL = 1e-5


def load_model(directory: pathlib.Path):
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    return model.eval()


def load_models(base: pathlib.Path, export: pathlib.Path, layout: str):
    """(how it was loaded, model) for every way to load the export."""
    if layout == "merged":
        yield "merged", load_model(export)
        return
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_model(base), export).eval()
    yield layout, model
    yield f"{layout}, merge_and_unload", model.merge_and_unload()


@torch.no_grad()
def largest_kl(model, prompts: list[np.ndarray], references: list[np.ndarray]) -> float:
    """KL(reference || model) of a token in nats, the largest over all prompts."""
    worst = 0.0
    for tokens, reference in zip(prompts, references, strict=True):
        logits = model(torch.tensor(tokens[None]).long(), use_cache=False).logits[0]
        log_q = torch.log_softmax(logits.double(), dim=-1)
        log_p = torch.log_softmax(torch.tensor(reference).double(), dim=-1)
        worst = max(worst, float((log_p.exp() * (log_p - log_q)).sum(dim=-1).max()))
    return worst


def main(base: str, export: str, layout: str, reference: str) -> int:
    arrays = np.load(reference)
    count = len(arrays.files) // 2
    prompts, logits = ([arrays[f"{n}_{i}"] for i in range(count)] for n in ("tokens", "logits"))
    worst = 0.0
    for name, model in load_models(pathlib.Path(base), pathlib.Path(export), layout):
        kl = largest_kl(model, prompts, logits)
        print(f"{name}: KL {kl:.1e}")
        worst = max(worst, kl)
    return 0 if worst <= MAX_KL else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
