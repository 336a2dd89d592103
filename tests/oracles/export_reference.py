"""Stores a run's logits on a few texts, for `load_export.py` to compare an export with:

python export_reference.py RUN REFERENCE.npz
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from drlora_jax.inference.model import load_run
from drlora_jax.interop.verify import make_prompts
from drlora_jax.models.transformer import logits


def main(run: str, file: str) -> None:
    loaded = load_run(run, dtype="float32")
    config, arrays = loaded.model.config, {}
    for index, ids in enumerate(make_prompts(loaded.tokenizer, config.vocab_size)):
        tokens_BT, positions_BT = jnp.asarray(ids)[None], jnp.arange(ids.size)[None]
        with jax.default_matmul_precision("highest"):
            hidden_BTD, _ = loaded.model.apply(
                loaded.variables, tokens_BT, jnp.ones_like(tokens_BT), positions_BT
            )
            arrays[f"logits_{index}"] = logits(config, loaded.variables["params"], hidden_BTD)[0]
        arrays[f"tokens_{index}"] = ids
    np.savez(file, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
