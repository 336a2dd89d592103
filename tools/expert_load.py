"""Measures how evenly a run uses its experts: share of the choices per layer, on given rows.

    python tools/expert_load.py --run runs/mine --data arc_easy=FILE.jsonl [--limit 8]

Prints for every layer the smallest and the largest share of an expert (1 / experts if all are used
equally) and the entropy of the shares relative to its maximum. An adapter's own experts without a
rank are inactive and not counted. --data is read with the settings of the run (format, template,
row length); rows that cannot be used are left out; dropout is off.
"""

import argparse
import dataclasses
import json
import pathlib

import jax
import numpy as np

from drlora_jax import cli
from drlora_jax.data.documents import load_documents
from drlora_jax.data.loader import eval_batches
from drlora_jax.data.tokenize import pad_token
from drlora_jax.errors import EXIT_DONE, UserError
from drlora_jax.inference.model import Loaded, load_run
from drlora_jax.parallel import mesh as mesh_lib


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, metavar="DIR")
    parser.add_argument("--step", default="latest", help="latest (default), best, or a number")
    parser.add_argument("--model-path", metavar="PATH", help="where the base is, if it has moved")
    parser.add_argument("--data", required=True, metavar="PATH", help="as in data.eval_path")
    parser.add_argument("--limit", type=int, metavar="N", help="batches at most; default: all")
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="the shares as JSON")
    args = parser.parse_args(argv)
    loaded = load_run(args.run, step=args.step, model_path=args.model_path)
    layers = loaded.model.options.adapter.expert_layers(loaded.model.config)
    if not layers:
        raise UserError(f"{args.run} has no experts, so no expert has a load.")
    shares_LE = expert_shares(loaded, args.data, args.limit)
    print("\n".join(lines(layers, shares_LE)))
    if args.out:
        rows = [[None if np.isnan(x) else round(x, 5) for x in row] for row in shares_LE.tolist()]
        args.out.write_text(json.dumps({"shares": rows}) + "\n")
    return EXIT_DONE


def expert_shares(loaded: Loaded, path: str, limit: int | None) -> np.ndarray:
    """Returns the share of all choices, [L, E]; a layer sums to 1, inactive experts have nan."""
    section, size = loaded.config.data, loaded.config.train
    section = dataclasses.replace(section, eval_path=(path,), bad_rows="skip")
    length, pad_id = size.sequence_length, pad_token(loaded.tokenizer)
    documents = load_documents(section, loaded.tokenizer, length, evaluation=True).documents
    rows = mesh_lib.whole_shards(loaded.mesh, size.batch_size)
    options = {"sequence_length": length, "batch_size": rows, "pad_id": pad_id, "limit": limit}

    @jax.jit
    def count(variables, batch):
        inputs = (batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT)
        return loaded.model.apply(variables, *inputs)[1].count_E

    total_LE = 0.0
    for batch in eval_batches(documents, **options):
        placed = jax.device_put(batch, mesh_lib.rows(loaded.mesh))
        total_LE = total_LE + np.asarray(count(loaded.variables, placed), np.float64)
    shares_LE = total_LE / total_LE.sum(axis=1, keepdims=True)
    is_inactive_LE = loaded.config.adapter.makes_experts & (loaded.ranks_LE == 0)
    return np.where(is_inactive_LE, np.nan, shares_LE)


def relative_entropy(shares_LE: np.ndarray) -> np.ndarray:
    """Returns the entropy of every layer's shares over the logarithm of its number of experts; 1 if
    all are used equally.
    """
    logs_LE = np.log(np.where(shares_LE > 0, shares_LE, 1.0))
    active_L = np.sum(~np.isnan(shares_LE), axis=1)
    entropy_L = -np.nansum(shares_LE * logs_LE, axis=1)
    return np.where(active_L > 1, entropy_L / np.log(np.maximum(active_L, 2)), 1.0)


def lines(layers, shares_LE: np.ndarray) -> list[str]:
    """Returns the table as text, with means over layers."""
    least_L, most_L = np.nanmin(shares_LE, axis=1), np.nanmax(shares_LE, axis=1)
    columns = np.stack([least_L, most_L, relative_entropy(shares_LE)], axis=1)
    text = ["layer    least     most  entropy"]
    for name, row in zip([*layers, "mean"], [*columns, columns.mean(axis=0)], strict=True):
        text.append(f"{name!s:>5} " + " ".join(f"{value:8.3f}" for value in row))
    unused = int((shares_LE == 0).sum())
    text.append(f"unused {unused} of {np.sum(~np.isnan(shares_LE))} experts")
    return text


if __name__ == "__main__":
    cli.run_and_exit(main)
