"""Measures how time and memory of a training step grow with tokens, experts and layers.

    python benchmarks/scaling.py                    # small on a CPU, OLMoE-1B-7B elsewhere
    python benchmarks/scaling.py --size tiny --axes rows,layers --rounds 2

Whole steps of DR-LoRA run on random weights, on one device. Along each axis one size changes and
the others keep their middle value; the number of experts changes at a constant number of experts
per token. The sizes of an axis take turns, with a bare matrix product and a copy in every round, so
that ratios are valid on a machine that others use too. The table has, for each size:

    time       relative to the first size: mean of the rounds' ratios with a 95 % interval
    products   floating-point operations (4 N + attention) relative to the first size: linear in
               rows and layers, almost constant in experts
    + reading  the same plus one read of the base weights forward and one backward: the time of the
               operations at the product's rate and of the bytes at the copy's
    rate       those operations per second, relative to the bare product in the same round
    step adds  memory of the compiled step besides its inputs
    forecast   forecast bytes relative to the bytes of the compiled step

A size that fails, for example because it does not fit, is listed with its error.
"""

import argparse
import os
from typing import NamedTuple

import jax
import numpy as np
from jobs import Step
from shapes import OLMOE, SMALL, TINY
from timing import copy_bound, first_line, in_turns, matmul_bound, ratio

from drlora_jax.config import (
    AdapterSection,
    AllocationSection,
    MeshSection,
    ModelSection,
    TrainConfig,
    TrainSection,
)
from drlora_jax.training.costs import flops_per_token
from drlora_jax.training.memory import bytes_on_one_device, compiled_bytes, predicted_step_bytes
from drlora_jax.training.program import memory_layout

RANK = 16
MATMUL, COPY = "matmul", "copy"
HEADER = (
    "axis|size|tokens|time|products|+ reading|tokens/s|rate|step adds, MiB|of the first|forecast"
).split("|")


class Point(NamedTuple):
    """Sizes of a step."""

    rows: int
    length: int  # tokens per row
    experts: int
    layers: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length


class Size(NamedTuple):
    """A model's shape, and the points along each axis through a middle one."""

    values: dict
    middle: Point
    axes: dict[str, tuple[int, ...]]
    side: int  # of the bare product's matrices


SIZES = {
    "tiny": Size(
        TINY,
        Point(2, 32, 8, 2),
        dict(rows=(1, 2), length=(32, 64), experts=(4, 8), layers=(1, 2)),
        64,
    ),
    "small": Size(
        SMALL,
        Point(4, 256, 16, 4),
        dict(rows=(2, 4, 8), length=(256, 512, 1024), experts=(8, 16, 32), layers=(2, 4, 8)),
        1024,
    ),
    "full": Size(
        OLMOE,
        Point(4, 4096, 64, 16),
        dict(rows=(1, 2, 4, 8), length=(1024, 2048, 4096), experts=(16, 32, 64), layers=(4, 8, 16)),
        8192,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, help="default: small on a CPU, full elsewhere")
    parser.add_argument("--axes", default="rows,length,experts,layers", help="with commas")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    device = jax.devices()[0]
    size = SIZES[args.size or ("small" if device.platform == "cpu" else "full")]
    unknown = sorted(set(args.axes.split(",")) - set(size.axes))
    if unknown:
        parser.error(f"unknown axis {unknown[0]}; known: {', '.join(size.axes)}")
    print(
        f"{device.device_kind}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}, "
        f"jax {jax.__version__}, {args.rounds} rounds\n"
    )
    print(f"{_row(HEADER)}\n{_row(['--:'] * len(HEADER))}", flush=True)
    for axis in args.axes.split(","):
        for line in measure_axis(size, axis, args.rounds):
            print(line, flush=True)


def measure_axis(size: Size, axis: str, rounds: int):
    """Yields rows of the table, one per size along an axis."""
    steps = {}
    for value in size.axes[axis]:
        try:
            step = make_step(size.values, size.middle._replace(**{axis: value}))
            jax.block_until_ready(step())
            steps[value] = step
        except Exception as error:  # whatever a device raises is a finding
            yield _row([axis, value, first_line(error), *[""] * (len(HEADER) - 3)])
    if steps:
        dtype = device_dtype()
        product, operations = matmul_bound(size.side, dtype)
        copy, moved = copy_bound(4 * size.side, dtype)
        seconds = in_turns(steps | {MATMUL: product, COPY: copy}, rounds)
        yield from table(axis, steps, seconds, operations / seconds[MATMUL], moved / seconds[COPY])


def device_dtype() -> str:
    return "float32" if jax.devices()[0].platform == "cpu" else "bfloat16"


def make_step(values: dict, point: Point) -> Step:
    values = values | {"num_hidden_layers": point.layers, "num_experts": point.experts}
    config = TrainConfig(
        model=ModelSection(dtype=device_dtype()),
        train=TrainSection(steps=1000, batch_size=point.rows, sequence_length=point.length),
        adapter=AdapterSection(targets=("gate", "up", "down", "q", "v"), dropout=0.0),
        allocation=AllocationSection(r_init=8, r_target=RANK, r_max=2 * RANK, interval=100),
        mesh=MeshSection(data=1),
    )
    return Step(config, values)


def table(axis: str, steps: dict[int, Step], seconds: dict, matmul_N, copy_N):
    """Formats the rows of an axis's steps.

    Args:
      matmul_N: operations a second of the bare product, by round. copy_N: bytes of the copy.
    """
    first, base = None, next(iter(steps))
    for value, step in steps.items():
        section = step.run.job.config.train
        tokens = section.batch_size * section.sequence_length
        operations = tokens * flops_per_token(step.run.job.model_config, section.sequence_length)
        reading = 2 * bytes_on_one_device(step.run.abstract_params)
        bound = np.median(operations / matmul_N + reading / copy_N)
        first = first or (operations, bound, step.added_bytes)
        times = ratio(seconds[value], seconds[base])
        yield _row(
            [
                axis,
                value,
                f"{tokens:,}",
                f"{times.mean:.2f} ({times.low:.2f} to {times.high:.2f})" if value != base else "1",
                f"{operations / first[0]:.2f}",
                f"{bound / first[1]:.2f}",
                f"{tokens / np.median(seconds[value]):,.0f}",
                f"{np.median(operations / seconds[value] / matmul_N):.3f}",
                f"{step.added_bytes / 2**20:,.1f}",
                f"{step.added_bytes / first[2]:.2f}",
                f"{forecast_bytes(step) / compiled_bytes(step.compiled).total:.2f}",
            ]
        )


def forecast_bytes(step: Step) -> int:
    """Returns the total bytes that are forecast before compiling."""
    run = step.run
    experts = run.model.options.ops.expert_mlp.keywords["backend"]
    layout = memory_layout(run.job, run.mesh, experts)
    lora = bytes_on_one_device(run.abstract_state.lora)
    remat = run.job.config.model.remat
    added = predicted_step_bytes(run.job.model_config, layout, lora, remat)
    return bytes_on_one_device((run.abstract_params, run.abstract_state)) + added


def _row(cells) -> str:
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
