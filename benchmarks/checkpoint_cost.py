"""Measures what checksums cost a checkpoint: saves and restores in turns, with and without them.

    python benchmarks/checkpoint_cost.py [--pairs 20] [--mib 200]

The state is `--mib` MiB of random float32 arrays of 4 MiB. A save lasts from the call until it is
written; a restore from the call until the arrays are in memory. Prints the ratios of the pairs,
with and without, and the share of a restore that verifying checksums takes.
"""

import argparse
import pathlib
import statistics
import tempfile
import time
from unittest import mock

import jax
import numpy as np

from drlora_jax.runs import checkpoint_read, checksums
from drlora_jax.runs.checkpoint import Checkpoints

LEAF_MIB = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--mib", type=int, default=200)
    args = parser.parse_args()
    state = make_state(args.mib // LEAF_MIB)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state
    )
    saves, restores, shares = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(pathlib.Path(folder), keep_last=1)
        for pair in range(args.pairs + 1):
            order = (True, False) if pair % 2 else (False, True)
            save = {with_them: time_save(checkpoints, state, with_them) for with_them in order}
            checkpoints.save(checkpoints.latest_step() + 1, state, {})
            found = {
                with_them: time_restore(checkpoints, abstract, with_them) for with_them in order
            }
            if pair:  # the first warms up
                saves.append((save[True], save[False]))
                restores.append((found[True][0], found[False][0]))
                shares.append(found[True][1] / found[True][0])
        checkpoints.close()
    print(f"{args.mib} MiB, {args.pairs} pairs, jax {jax.__version__}")
    print(line("save", saves))
    print(line("restore", restores))
    low, middle, high = np.percentile(shares, (5, 50, 95)) * 100
    print(f"verifying takes {middle:.1f} % of a restore (5 to 95 %: {low:.1f} to {high:.1f})")


def make_state(leaves: int) -> dict:
    draw = np.random.default_rng(0)
    shape = (LEAF_MIB << 18,)
    return {
        f"leaf_{i}": jax.numpy.asarray(draw.normal(size=shape).astype(np.float32))
        for i in range(leaves)
    }


def time_save(checkpoints: Checkpoints, state: dict, with_them: bool) -> float:
    step = (checkpoints.latest_step() or 0) + 1
    checkpoints.finish()
    start = time.perf_counter()
    if with_them:
        checkpoints.save(step, state, {})
    else:
        with mock.patch.object(checksums, "hash_arrays", return_value={}):
            checkpoints.save(step, state, {})
    checkpoints.finish()
    return time.perf_counter() - start


def time_restore(checkpoints: Checkpoints, abstract: dict, with_them: bool) -> tuple[float, float]:
    """Returns the seconds of a restore, and of the verification in it."""
    verifying = [0.0]

    def timed(*arguments):
        start = time.perf_counter()
        if with_them:
            check(*arguments)
        verifying[0] = time.perf_counter() - start

    check = checkpoint_read._check_arrays
    start = time.perf_counter()
    with mock.patch.object(checkpoint_read, "_check_arrays", timed):
        jax.block_until_ready(checkpoints.restore(checkpoints.latest_step(), abstract)[0])
    return time.perf_counter() - start, verifying[0]


def line(what: str, pairs: list[tuple[float, float]]) -> str:
    with_them, without = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratios = [one / other for one, other in pairs]
    low, middle, high = np.percentile(ratios, (5, 50, 95))
    return (
        f"{what:8}{with_them:.3f} s with, {without:.3f} s without; ratio {middle:.3f} in the "
        f"median (5 to 95 %: {low:.3f} to {high:.3f}), mean {statistics.mean(ratios):.3f}"
    )


if __name__ == "__main__":
    main()
