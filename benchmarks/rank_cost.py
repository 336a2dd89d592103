"""Measures what dynamic ranks cost: whole training steps in turns, one of each variant per round.

    python benchmarks/rank_cost.py [--rounds 40] [--r-max 32,64,128]
    python benchmarks/rank_cost.py --operation    the expert operation alone

It uses the bundled model's shape with random weights. `uniform` is plain LoRA with 16 allocated
ranks; the others are DR-LoRA with 16 active ranks in every expert and more allocated: the same
active parameters, plus importance, statistics, masks and inactive rows. Prints each variant's time
relative to `uniform`, the mean of the rounds' ratios with a 95 % interval, and the time of a growth
event in steps. `--operation` times one layer's experts (64 of 256, 8 active, width 512, 2,048
tokens), forward and gradient, with ranks from 8 to 24 around 16 in every expert, and prints what
LoRA adds to the operation without it, by allocated rank.
"""

import argparse
import json
import pathlib
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jobs import Step
from timing import in_turns, ratio

import drlora_jax
from drlora_jax.allocation import CapacityState, masks_from_ranks
from drlora_jax.config import (
    AdapterSection,
    AllocationSection,
    MeshSection,
    ModelSection,
    TrainConfig,
    TrainSection,
)
from drlora_jax.ops.experts.api import expert_mlp
from drlora_jax.ops.experts.shared import ExpertSpec, RoleLora

RANK, ROWS, LENGTH = 16, 4, 512
MODEL = pathlib.Path(drlora_jax.__file__).parent / "bundled" / "tiny_moe" / "config.json"


class Variant(Step):
    """With `RANK` active ranks in every expert."""

    def __init__(self, values: dict, allocation: AllocationSection, params=None):
        config = TrainConfig(
            model=ModelSection(dtype="float32"),
            train=TrainSection(steps=1000, batch_size=ROWS, sequence_length=LENGTH),
            adapter=AdapterSection(targets=("gate", "up", "down"), dropout=0.0),
            allocation=allocation,
            mesh=MeshSection(data=1),
        )
        super().__init__(config, values, params)
        state = self.state
        ranks_LE = np.full(state.mask_LER.shape[:2], RANK, np.int32)
        mask_LER = masks_from_ranks(ranks_LE, state.mask_LER.shape[2])
        self.state = state._replace(mask_LER=jax.device_put(mask_LER, state.mask_LER.sharding))

    def event(self) -> float:
        """Runs an event: statistics to the host, a decision, new mask values back."""
        start = time.perf_counter()
        policy, state = self.run.job.policy, self.state
        ranks_LE = np.full(state.mask_LER.shape[:2], RANK, np.int32)
        stats = jax.device_get(state.stats)
        _, stats, _ = policy.update(CapacityState(ranks_LE), stats, 200)
        mask_LER = masks_from_ranks(ranks_LE, state.mask_LER.shape[2])
        stats = jax.device_put(stats, jax.tree.map(lambda leaf: leaf.sharding, state.stats))
        mask_LER = jax.device_put(mask_LER, state.mask_LER.sharding)
        self.state = jax.block_until_ready(state._replace(mask_LER=mask_LER, stats=stats))
        return time.perf_counter() - start


def operation(rounds: int, r_maxes: list[int]) -> None:
    draw = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(draw.normal(size=shape) * 0.05, jnp.float32)

    tokens, experts, width, hidden = 2048, 64, 512, 256
    base = (normal(experts, width, 2 * hidden), normal(experts, hidden, width))
    x_TD = normal(tokens, width)
    chosen = np.argsort(draw.random((tokens, experts)), axis=1)[:, :8]
    expert_TK = jnp.asarray(chosen, jnp.int32)
    weight_TK = jnp.asarray(draw.random((tokens, 8)), jnp.float32)
    ranks_E = draw.permutation(np.linspace(8, 24, experts).round().astype(int))

    def factors(r_max: int) -> dict[str, RoleLora]:
        gate_ER = jnp.asarray(np.arange(r_max) < ranks_E[:, None], jnp.float32)
        shapes = {"gate_up": (width, 2 * hidden), "down": (hidden, width)}
        return {
            role: RoleLora(
                normal(experts, r_max, d_in),
                normal(experts, r_max, d_out) * gate_ER[..., None],
                gate_ER,
            )
            for role, (d_in, d_out) in shapes.items()
        }

    @jax.jit
    def gradients(x_TD, lora, base):
        def loss(x_TD, lora):
            spec = ExpertSpec(scale=2.0)
            return jnp.sum(expert_mlp(x_TD, expert_TK, weight_TK, *base, lora, spec) ** 2)

        return jax.value_and_grad(loss, argnums=(0, 1))(x_TD, lora)

    variants = {"none": {}} | {f"r_max {r_max}": factors(r_max) for r_max in r_maxes}
    calls = {name: partial(gradients, x_TD, lora, base) for name, lora in variants.items()}
    least = {name: 1000 * taken.min() for name, taken in in_turns(calls, rounds).items()}
    for name in list(variants)[1:]:
        print(f"{name}: {least[name]:.1f} ms, of it factors {least[name] - least['none']:.1f} ms")
    print(f"without factors {least['none']:.1f} ms (least of {rounds} interleaved rounds)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--r-max", default="32,64,128", help="allocated ranks, with commas")
    parser.add_argument("--operation", action="store_true", help="one layer's experts alone")
    args = parser.parse_args()
    if args.operation:
        return operation(args.rounds, [int(r_max) for r_max in args.r_max.split(",")])
    values = json.loads(MODEL.read_text())
    plain = Variant(values, AllocationSection(kind="uniform", r_target=RANK))
    variants = {"uniform": plain}
    for r_max in map(int, args.r_max.split(",")):
        section = AllocationSection(r_init=8, r_target=RANK, r_max=r_max, interval=20)
        variants[f"dr_lora, r_max {r_max}"] = Variant(values, section, plain.params)
    seconds = in_turns(variants, args.rounds)
    for name in list(variants)[1:]:
        times = ratio(seconds[name], seconds["uniform"])
        event = statistics.median(variants[name].event() for _ in range(10))
        print(
            f"{name}: {times.mean:.3f} of uniform ({times.low:.3f} to "
            f"{times.high:.3f}, median {times.median:.3f}, {times.rounds} rounds), "
            f"event {event / statistics.median(seconds[name]):.3f} steps"
        )
    rate = ROWS * LENGTH / statistics.median(seconds["uniform"])
    print(f"uniform: {rate:,.0f} tokens/s; jax {jax.__version__} on {jax.devices()[0].device_kind}")


if __name__ == "__main__":
    main()
