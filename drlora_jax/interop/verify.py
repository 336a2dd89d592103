"""Compares models on text, layer by layer, to verify an export before it is kept.

A `Variant` is a model given by two functions that return its weights, one layer at a time, in f32.
All variants pass through the stack together, so memory holds one layer of each, whatever the
model's size. Prompts on which two variants choose different experts are counted separately: between
equal models that is a tie broken by rounding, and its logits say nothing.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from drlora_jax.models.architecture import Layer, LayerConfig, ModelConfig
from drlora_jax.models.layers import rms_norm
from drlora_jax.models.options import DecoderOptions
from drlora_jax.models.placement import NO_ADAPTER, Placement
from drlora_jax.models.transformer import Block, logits

TEXTS = (
    "Once upon a time there was a small fox who lived at the edge of a wide green forest.",
    "Question: A baker sells 12 loaves in the morning and 17 in the afternoon. At 3 dollars each, "
    "how much money does she make?\nAnswer: She sells 12 + 17 = 29 loaves, so she makes",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n",
    "The committee met on Tuesday, 14 March, and agreed to raise the budget by 4.5 %.",
    "In chemistry, a catalyst is a substance that increases the rate of a reaction without",
    "SELECT name, COUNT(*) FROM orders WHERE total > 100 GROUP BY name;",
    '"Where have you been?" she asked. He put down his bag, and for a while he said nothing.',
    "Let f(x) = 2x + 1. Then f(f(3)) = 2 * 7 + 1 = 15. If f(x) = 9, what is x?",
)
LENGTH = 64  # largest number of tokens of a prompt


class Variant(NamedTuple):
    ends: Callable[[], dict]  # embedding, final norm, head
    layer: Callable[[Layer], dict]  # the variables of a block: params, perhaps lora and rank_mask
    adapter: Placement = NO_ADAPTER


class Outputs(NamedTuple):
    """The outputs of one variant, by prompt."""

    logits: list[np.ndarray]  # f32 [T, V]
    choices: list[np.ndarray]  # [L, E], assignments per expert; [0] for a dense model


class Comparison(NamedTuple):
    kl: float  # largest KL(reference || candidate) of a token, nats, over the prompts that count
    kl_everywhere: float  # over all prompts
    counted: int  # prompts with the same choice of experts in every layer


def make_prompts(tokenizer, vocabulary: int) -> list[np.ndarray]:
    """Returns the token ids of the texts, at most LENGTH each."""
    every = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    return [np.array([i for i in ids if i < vocabulary][:LENGTH], np.int32) for ids in every]


def run_variants(
    config: ModelConfig, variants: dict[str, Variant], prompts: list[np.ndarray]
) -> dict[str, Outputs]:
    """Computes logits and expert choices of every variant on every prompt, in f32 at full
    precision.
    """
    with jax.default_matmul_precision("highest"):
        hidden, choices = {}, {name: [[] for _ in prompts] for name in variants}
        for name, variant in variants.items():
            embedding = variant.ends()["embedding"]
            hidden[name] = [jnp.asarray(_padded(embedding[ids])[None]) for ids in prompts]
        for layer in config.layers():
            for name, variant in variants.items():
                adapter = variant.adapter.below(layer.segment).below(layer.unit)
                run = _block(config, layer.config, adapter)
                variables = jax.device_put(variant.layer(layer))
                for index, ids in enumerate(prompts):
                    hidden[name][index], count_E = run(
                        variables, hidden[name][index], _padded(np.ones_like(ids))[None]
                    )
                    if count_E is not None:
                        choices[name][index].append(np.asarray(count_E))
        return {
            name: Outputs(
                _logits(config, variant.ends(), hidden[name], prompts),
                [np.array(per_layer) for per_layer in choices[name]],
            )
            for name, variant in variants.items()
        }


@functools.lru_cache(maxsize=8)
def _block(config: ModelConfig, layer: LayerConfig, adapter: Placement):
    block = Block(config, DecoderOptions(adapter=adapter), layer)

    @jax.jit
    def run(variables, x_BTD, segment_ids_BT):
        positions_BT = jnp.arange(x_BTD.shape[1])[None]
        y_BTD, stats = block.apply(variables, x_BTD, segment_ids_BT, positions_BT)
        return y_BTD, None if stats is None else stats.count_E

    return run


def _padded(rows: np.ndarray) -> np.ndarray:
    """Pads with zeros up to LENGTH, so that a block is compiled once."""
    return np.pad(rows, [(0, LENGTH - len(rows)), *[(0, 0)] * (rows.ndim - 1)])


def _logits(config: ModelConfig, ends: dict, hidden: list, prompts: list) -> list[np.ndarray]:
    ends = jax.device_put(ends)
    found = []
    for x_BTD, ids in zip(hidden, prompts, strict=True):
        x_BTD = rms_norm(x_BTD[:, : len(ids)], ends["final_norm"]["scale"], config.norm_epsilon)
        found.append(np.asarray(logits(config, ends, x_BTD))[0])
    return found


# ---------------------------------------------------------------------------------------- comparing


def compare(reference: Outputs, candidate: Outputs) -> Comparison:
    kls = [
        float(token_kl(ours, theirs).max())
        for ours, theirs in zip(reference.logits, candidate.logits, strict=True)
    ]
    is_same = [
        np.array_equal(ours, theirs)
        for ours, theirs in zip(reference.choices, candidate.choices, strict=True)
    ]
    counted = [kl for kl, same in zip(kls, is_same, strict=True) if same]
    return Comparison(float(np.max(counted, initial=0.0)), float(np.max(kls)), len(counted))


def token_kl(logits_TV: np.ndarray, others_TV: np.ndarray) -> np.ndarray:
    """Computes KL(p || q) of every token in nats, in f64, from the logits of p and q."""
    log_p, log_q = (_log_softmax(array.astype(np.float64)) for array in (logits_TV, others_TV))
    return np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)


def _log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    shifted = logits_TV - logits_TV.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def largest_change(one: Outputs, other: Outputs) -> float:
    """Returns the largest difference of a logit."""
    pairs = zip(one.logits, other.logits, strict=True)
    return max(float(np.abs(a - b).max()) for a, b in pairs)
