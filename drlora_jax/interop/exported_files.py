"""Checks the files of an export without opening it with other libraries.

    merged   every tensor has its dtype, `config.json` describes the base model's architecture, its
             tie flag matches the tensors, and the tokenizer gives the same ids
    adapter  every pair has the rank that adapter_config.json names, and every target is present

Names and shapes of the model are checked when the export is read back.
"""

import pathlib

from drlora_jax.data.tokenize import load_tokenizer
from drlora_jax.errors import RunError
from drlora_jax.interop.hf_files import (
    HEAD,
    open_weights,
    read_config_json,
    read_headers,
    read_model_config,
)
from drlora_jax.interop.peft_read import CONFIG, PREFIX, SUFFIXES, WEIGHTS, WRAPPER
from drlora_jax.interop.verify import TEXTS
from drlora_jax.models.families import parse_config
from drlora_jax.system.paths import read_json

SAFETENSORS_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def text_ids(tokenizer) -> list[list[int]]:
    """Returns the token ids of the texts that exports are compared on."""
    return [list(tokenizer(text, add_special_tokens=False).input_ids) for text in TEXTS]


def check_merged(
    base: pathlib.Path, target: pathlib.Path, ids: list[list[int]], dtype: str | None
) -> None:
    before, after = read_headers(base), read_headers(target)
    for key, info in before.items():
        wanted = (SAFETENSORS_NAMES[dtype] if dtype else info.dtype, info.shape)
        found = (after[key].dtype, after[key].shape) if key in after else None
        if found != wanted:
            raise RunError(f"the export has {key} as {found}, expected {wanted}.")
    if read_model_config(target) != read_model_config(base):
        raise RunError("config.json of the export does not describe the base model.")
    if parse_config(read_config_json(target)).tie_embeddings == (HEAD in after):
        raise RunError("tie_word_embeddings of the export does not match its tensors.")
    if text_ids(load_tokenizer(target)) != ids:
        raise RunError("the tokenizer of the export does not give the token ids of the run.")


def adapter_shapes(target: pathlib.Path) -> dict[str, tuple[int, ...]]:
    with open_weights(target / WEIGHTS) as handle:
        return {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}


def check_adapter(target: pathlib.Path) -> None:
    values = read_json(target / CONFIG)
    rank, tensors = values["r"], adapter_shapes(target)
    modules = set()
    for key, shape in tensors.items():
        name = key.removeprefix(PREFIX)
        side = next((side for side in SUFFIXES if name.endswith(side)), None)
        module = name.removesuffix(side) if side else name.rpartition(".")[0]
        modules.add(module.removesuffix(WRAPPER))
        if side is None:
            continue
        partner = key.removesuffix(side) + SUFFIXES[1 - SUFFIXES.index(side)]
        size = shape[SUFFIXES.index(side)]
        if partner not in tensors or size % rank:
            raise RunError(
                f"{key} of the export has no partner, or its {size} rows are not of rank {rank}."
            )
    for kind in ("target_modules", "target_parameters", "modules_to_save"):
        for wanted in values[kind] or []:
            module = wanted.rpartition(".")[0] if kind == "target_parameters" else wanted
            if not any(f".{name}".endswith(f".{module}") for name in modules):
                raise RunError(f"{kind} of the export names {wanted}, which has no tensors.")
