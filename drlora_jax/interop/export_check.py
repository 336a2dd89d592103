"""Checks an export before it is kept: read back from its files, it must compute what the run
computes, and something different from the base model.

    base      the base model's directory
    adapted   the base model, with LoRA matrices and rank mask applied as in training
    exported  the base model with the adapter's files added, or the merged directory alone
    merged    the base model plus A^T B in f32, and
    rounded   the same rounded to the exported dtype: only if that is not f32

In f32 `exported` must equal `adapted`. Otherwise `merged` must equal `adapted` and `exported` must
equal `rounded`: the export may lose what the dtype loses and nothing else.
"""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from drlora_jax.errors import RunError
from drlora_jax.interop.hf_read import disk_view, leaf_at
from drlora_jax.interop.hf_write import NUMPY_DTYPES
from drlora_jax.interop.layer_reader import LayerReader
from drlora_jax.interop.lora_tables import LayerUpdate, Pair
from drlora_jax.interop.merge import adapted_tensors, column_norms, merge_layer
from drlora_jax.interop.peft_read import PeftFiles
from drlora_jax.interop.verify import (
    Comparison,
    Outputs,
    Variant,
    compare,
    largest_change,
    run_variants,
)
from drlora_jax.models.architecture import Layer, ModelConfig
from drlora_jax.models.placement import Placement

MAX_KL = 1e-5  # nats per token
MIN_CHANGE = 1e-6  # of some logit


class Trained(NamedTuple):
    """A run's model, as host arrays."""

    config: ModelConfig
    adapter: Placement
    lora: dict
    gates: dict  # the collection rank_mask
    updates: list[LayerUpdate]  # the same, in the form for exports


class Measured(NamedTuple):
    exported: Comparison  # `exported` against `rounded`, or `adapted` in f32
    merged: Comparison | None  # `merged` against `adapted`; None in f32
    kl: float  # largest KL(adapted || exported) over all prompts
    adapter_change: float  # largest change of a logit from `base` to `adapted`
    exported_change: float  # largest change of a logit from `base` to `exported`
    prompts: int
    tokens: int
    logits: tuple[np.ndarray, ...] = ()  # of `exported`, by prompt


def measure(
    trained: Trained,
    reader: LayerReader,
    target: pathlib.Path,
    prompts: list[np.ndarray],
    *,
    is_merged: bool,
    dtype: str | None,
) -> Measured:
    """Runs all variants of the export in `target`.

    Args:
      reader: reads the base model.
      dtype: of all exported tensors; None: f32 for adapters, the base model's dtypes for merged.
    """
    variants = {
        "base": Variant(reader.ends, lambda layer: {"params": reader.layer(layer)}),
        "adapted": trained_variant(trained, reader),
        "exported": _exported(trained.config, reader, target, is_merged=is_merged),
    }
    if not _is_exact(trained, reader, is_merged=is_merged, dtype=dtype):
        rounded = _rounded_merge if is_merged else _rounded_pairs
        variants["merged"] = _merged(trained, reader, lambda params, update: update)
        variants["rounded"] = rounded(trained, reader, dtype)
    outputs = run_variants(trained.config, variants, prompts)
    return _measured(outputs, prompts)


def _measured(outputs: dict[str, Outputs], prompts: list[np.ndarray]) -> Measured:
    base, adapted, exported = (outputs[name] for name in ("base", "adapted", "exported"))
    return Measured(
        exported=compare(outputs.get("rounded", adapted), exported),
        merged=compare(adapted, outputs["merged"]) if "merged" in outputs else None,
        kl=compare(adapted, exported).kl_everywhere,
        adapter_change=largest_change(base, adapted),
        exported_change=largest_change(base, exported),
        prompts=len(prompts),
        tokens=sum(map(len, prompts)),
        logits=tuple(exported.logits),
    )


def judge(measured: Measured) -> None:
    """Raises RunError if the export is not what was trained, or changes nothing."""
    if not measured.adapter_change > MIN_CHANGE:
        raise RunError(
            f"the adapter changes nothing: no logit differs from the base model's by more than "
            f"{MIN_CHANGE:g} on {measured.prompts} prompts. Export a later --step, or train longer."
        )
    if not measured.exported_change > MIN_CHANGE:
        raise RunError(
            "the exported model computes the same as the base model, although the adapter changes "
            f"logits by up to {measured.adapter_change:.3g}: rounding loses the update. Give "
            "--dtype float32."
        )
    for comparison in (measured.merged, measured.exported):
        if comparison is None:
            continue
        if 2 * comparison.counted < measured.prompts:
            raise RunError(
                "the export does not compute what was trained: different experts are chosen in "
                f"{measured.prompts - comparison.counted} of {measured.prompts} prompts."
            )
        if not comparison.kl <= MAX_KL:  # a NaN is refused too
            raise RunError(
                f"the export does not compute what was trained: KL {comparison.kl:.3g} nats per "
                f"token, at most {MAX_KL:g} is allowed."
            )


# ----------------------------------------------------------------------------------------- variants


def trained_variant(trained: Trained, reader: LayerReader) -> Variant:
    """Returns the model of the run: the base model with LoRA matrices and rank mask beside its
    weights.
    """
    collections = {"lora": trained.lora, "rank_mask": trained.gates}

    def variables(layer: Layer) -> dict:
        return {"params": reader.layer(layer)} | {
            name: jax.tree.map(lambda leaf: leaf[layer.repeat], layer.below(tree))
            for name, tree in collections.items()
        }

    return Variant(reader.ends, variables, trained.adapter)


def _exported(config: ModelConfig, reader: LayerReader, target, *, is_merged: bool) -> Variant:
    if is_merged:
        own = LayerReader(config, target)
        return Variant(own.ends, lambda layer: {"params": own.layer(layer)})
    files = PeftFiles(config, target)
    return Variant(reader.ends, lambda p: {"params": files.apply(reader.layer(p), p)})


Change = Callable[[dict, LayerUpdate], LayerUpdate]


def _merged(trained: Trained, reader: LayerReader, change: Change) -> Variant:
    def variables(layer: Layer) -> dict:
        params = reader.layer(layer)
        update = change(params, trained.updates[layer.number])
        return {"params": merge_layer(params, update)}

    return Variant(reader.ends, variables)


def _is_exact(trained: Trained, reader: LayerReader, *, is_merged: bool, dtype) -> bool:
    if dtype is not None or not is_merged:
        return dtype in (None, "float32")
    changed = adapted_tensors(reader.table, trained.updates)
    return all(reader.dtype(key) == "F32" for key in changed)


def _round(array: np.ndarray, dtype) -> np.ndarray:
    return array.astype(dtype).astype(np.float32)


def _rounded_pairs(trained: Trained, reader: LayerReader, dtype: str) -> Variant:
    def change(params: dict, update: LayerUpdate) -> LayerUpdate:
        plain, experts = (
            {name: Pair(*(_round(part, dtype) for part in pair)) for name, pair in pairs.items()}
            for pairs in (update.plain, update.experts)
        )
        router_DE = update.router_DE
        if router_DE is not None:
            base_DE = params["moe"]["router"]
            router_DE = _round(base_DE + router_DE, dtype) - base_DE
        magnitudes = {}
        for path, growth_F in update.magnitudes.items():
            norms_F = column_norms(leaf_at(params, (*path.split("/"), "kernel")))
            magnitudes[path] = _round(norms_F + growth_F, dtype) - norms_F
        return LayerUpdate(update.layer, update.matrices, plain, experts, router_DE, magnitudes)

    return _merged(trained, reader, change)


def _rounded_merge(trained: Trained, reader: LayerReader, dtype: str | None) -> Variant:
    def on_disk(key: str):
        return np.dtype(dtype) if dtype else NUMPY_DTYPES[reader.dtype(key)]

    def variables(layer: Layer) -> dict:
        merged = merge_layer(reader.layer(layer), trained.updates[layer.number])
        params = jax.tree.map(np.copy, merged)
        for key, slot in reader.keys(layer).items():
            view = disk_view(leaf_at(params, slot.path), slot, skip=1)
            view[...] = _round(view, on_disk(key))
        return {"params": params}

    def ends() -> dict:
        found = reader.ends()
        return found if dtype is None else jax.tree.map(lambda leaf: _round(leaf, dtype), found)

    return Variant(ends, variables)
