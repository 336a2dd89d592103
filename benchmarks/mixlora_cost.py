"""Measures what routed LoRA experts cost compared with plain LoRA: whole training steps in turns.

    python benchmarks/mixlora_cost.py [--kind mixlora] [--rounds 10] [--layers 6]
    python benchmarks/mixlora_cost.py --ways 8,16,32,64

The shape is SmolLM2-135M with fewer layers, random weights, 4 rows of 512 tokens. MixLoRA with 8
experts of rank 16, 2 per token, on the FFN and plain LoRA of rank 16 on attention is compared with
plain LoRA of rank 86 on all seven projections, which has as many trained parameters; or with
`--kind mola` 8 experts of rank 8 on all seven with plain LoRA of rank 64, which has LoRA matrices
of the same size. Prints the ratio of their times with a 95 % interval, and of the memory that the
compiled steps need besides their inputs.
"""

import argparse
import sys

import jax
from jobs import Step
from timing import in_turns, ratio

from drlora_jax.config import (
    AdapterSection,
    AllocationSection,
    MeshSection,
    ModelSection,
    TrainConfig,
    TrainSection,
)
from drlora_jax.ops import lora_deltas

SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
TARGETS, ROWS, LENGTH = ("q", "k", "v", "o", "gate", "up", "down"), 4, 512
EXPERTS = 8
RANKS = {"mixlora": (16, 86), "mola": (8, 64)}  # of an expert, and of the plain LoRA beside it


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=RANKS, default="mixlora")
    parser.add_argument("--ways", metavar="EXPERTS,...", help="compare its two ways instead")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--layers", type=int, default=6)
    args = parser.parse_args()
    values = SMOLLM2 | {"num_hidden_layers": args.layers}
    if args.ways:
        compare_ways(values, list(map(int, args.ways.split(","))), args.rounds)
        return
    rank, plain_rank = RANKS[args.kind]
    plain = AdapterSection(kind="lora", targets=TARGETS, rank=plain_rank, dropout=0.0)
    experts = AdapterSection(
        kind=args.kind, targets=TARGETS, rank=rank, num_experts=EXPERTS, dropout=0.0
    )
    lora = make_step(values, plain, rank)
    variants = {"lora": lora, args.kind: make_step(values, experts, rank, lora.params)}
    for name, step in variants.items():
        count = sum(leaf.size for leaf in jax.tree.leaves(step.state.lora))
        memory = step.added_bytes / 2**20
        print(f"{name}: {count:,} trained parameters, the step adds {memory:.0f} MiB", flush=True)
    report(variants, args.kind, "lora", args.rounds)


def compare_ways(values: dict, experts: list[int], rounds: int) -> None:
    """Compares MixLoRA sorted with MixLoRA side by side (ops/lora_deltas.py), by number of
    experts.
    """
    params = None
    for number in experts:
        adapter = AdapterSection(
            kind="mixlora", targets=TARGETS, rank=16, num_experts=number, dropout=0.0
        )
        variants = {}
        for name, limit in (("side by side", sys.maxsize), ("sorted", 0)):
            lora_deltas.SORTED_FROM = limit
            variants[name] = make_step(values, adapter, 16, params)
            params = variants[name].params
        print(f"{number} experts of rank 16: ", end="")
        report(variants, "sorted", "side by side", rounds)


def make_step(values: dict, adapter: AdapterSection, rank: int, params=None) -> Step:
    config = TrainConfig(
        model=ModelSection(dtype="float32"),
        train=TrainSection(
            steps=1000,
            batch_size=ROWS,
            sequence_length=LENGTH,
            balance_loss=1e-3 if adapter.makes_experts else 0.0,
        ),
        adapter=adapter,
        allocation=AllocationSection(kind="uniform", r_target=rank, r_max=rank),
        mesh=MeshSection(data=1),
    )
    return Step(config, values, params)


def report(variants: dict[str, Step], name: str, base: str, rounds: int) -> None:
    seconds = in_turns(variants, rounds)
    times = ratio(seconds[name], seconds[base])
    memory = variants[name].added_bytes / variants[base].added_bytes
    print(
        f"{name} {times.mean:.3f} of the time of {base} ({times.low:.3f} to {times.high:.3f}, "
        f"{times.rounds} rounds), {memory:.2f} of its memory; jax {jax.__version__} on "
        f"{jax.devices()[0].device_kind}",
        flush=True,
    )


if __name__ == "__main__":
    main()
