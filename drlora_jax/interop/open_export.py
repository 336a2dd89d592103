"""Opens an export with `transformers`, and an adapter with `peft`, as users would:

    python open_export.py REQUEST.json ANSWER.json LOGITS.npz

`opened.py` starts it as a separate program: torch and jax bring libraries with the same names for
accelerators, and a model that does not fit into memory ends this process only. It needs neither
jax nor drlora_jax. The request has layout, base, export, prompts (lists of token ids), texts and
ids; the answer has the findings, or `unavailable` (the libraries do not work here), or `failed`
(they cannot open the export).
"""

import json
import sys

import numpy as np

MERGED = "merged"


def main(request_file: str, answer_file: str, logits_file: str) -> None:
    with open(request_file, encoding="utf-8") as handle:
        request = json.load(handle)
    answer = answer_to(request, logits_file)
    with open(answer_file, "w", encoding="utf-8") as handle:
        json.dump(answer, handle)


def answer_to(request: dict, logits_file: str) -> dict:
    names = ["torch", "transformers", *(["peft"] if request["layout"] != MERGED else [])]
    try:
        versions = {name: __import__(name).__version__ for name in names}
    except Exception as error:  # incompatible versions of libraries can raise anything
        return {"unavailable": describe(error)}
    try:
        model, found = open_model(request)
        np.savez(logits_file, *logits_of(model, request["prompts"]))
    except MemoryError as error:
        return {"unavailable": describe(error)}
    except Exception as error:
        kind = "unavailable" if "can't allocate memory" in str(error) else "failed"
        return {kind: describe(error), "versions": versions}
    return found | {"versions": versions}


def open_model(request: dict):
    """Opens the export; returns the model, and what transformers read from its directory."""
    if request["layout"] != MERGED:
        from peft import PeftModel

        base, _ = load(request["base"])
        return PeftModel.from_pretrained(base, request["export"]).eval(), {}
    model, info = load(request["export"])
    names = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = {name: sorted(map(str, info[name])) for name in names if info[name]}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tokenizers = {"tokenizer": tokenize(request["export"], request["texts"])}
    if tokenizers["tokenizer"] != request["ids"]:
        tokenizers["base_tokenizer"] = tokenize(request["base"], request["texts"])
    return model, tokenizers | {
        "wrong_keys": wrong,
        "is_tied": head.weight.data_ptr() == embedding.weight.data_ptr(),
        "ends": model.generation_config.eos_token_id,
    }


def load(directory: str):
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    return model.eval(), info


def tokenize(directory: str, texts: list[str]):
    """Returns the token ids of every text, or the reason why there are none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        return [list(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    except Exception as error:
        return describe(error)


def logits_of(model, prompts: list[list[int]]) -> list[np.ndarray]:
    import torch

    with torch.no_grad():
        return [
            model(torch.tensor([ids]), use_cache=False).logits[0].float().numpy() for ids in prompts
        ]


def describe(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}"


if __name__ == "__main__":
    main(*sys.argv[1:])
