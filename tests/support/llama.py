"""Dense models for adapters that bring experts of their own, and what is asked of both kinds."""

import json

import jax
import jax.numpy as jnp

LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
LLAMA_2_7B = LLAMA | {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "tie_word_embeddings": False,
}
ALL = ("q", "k", "v", "o", "gate", "up", "down")


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def largest_error(got, expected) -> float:
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return max(float(jnp.abs(g - e).max() / jnp.abs(e).max()) for g, e in pairs)


def logged(run_dir, name):
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [row[name] for row in rows if name in row]
