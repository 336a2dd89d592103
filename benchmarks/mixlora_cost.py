"""What routed LoRA experts cost beside plain LoRA: whole training steps in turns.

    python benchmarks/mixlora_cost.py [--kind mixlora] [--rounds 10] [--layers 6]

Shape of SmolLM2-135M with fewer layers, random weights, 4 rows of 512. MixLoRA with 8 experts of
rank 16, 2 a token, on the FFN and plain LoRA of rank 16 on attention, against plain LoRA of rank 86
on all seven projections, which has as many trained parameters; or with `--kind mola` 8 experts of
rank 8 on all seven against plain LoRA of rank 64, which has the same factors. Prints the ratio of
their times with a 95 % interval, and of what the compiled steps take besides their inputs.
"""

import argparse
import time

import jax
import numpy as np
from jobs import abstract_job
from rank_cost import random_batch

from drlora_jax import train
from drlora_jax.config import (
    AdapterSection,
    AllocationSection,
    MeshSection,
    ModelSection,
    TrainConfig,
    TrainSection,
)
from drlora_jax.models.transformer import init_variables

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
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--layers", type=int, default=6)
    args = parser.parse_args()
    values = SMOLLM2 | {"num_hidden_layers": args.layers}
    batch = random_batch(values["vocab_size"])
    kind, (rank, plain_rank) = args.kind, RANKS[args.kind]
    adapters = {
        "lora": (AdapterSection(kind="lora", targets=TARGETS, rank=plain_rank, dropout=0.0), 0),
        kind: (
            AdapterSection(kind=kind, targets=TARGETS, rank=rank, num_experts=EXPERTS, dropout=0.0),
            1e-3,
        ),
    }
    variants, sizes, params = {}, {}, None
    for name, (adapter, balance) in adapters.items():
        config = TrainConfig(
            model=ModelSection(dtype="float32"),
            train=TrainSection(
                steps=1000, batch_size=ROWS, sequence_length=LENGTH, balance_loss=balance
            ),
            adapter=adapter,
            allocation=AllocationSection(kind="uniform", r_target=rank, r_max=rank),
            mesh=MeshSection(data=1),
        )
        run = train.build(abstract_job(config, values, 1), jax.devices()[:1])
        compiled, _ = train.compile_step(run)
        if params is None:
            make = jax.jit(lambda key, model=run.model: init_variables(model, key)["params"])
            params = make(jax.random.key(0))
        state = train.start(run).state
        count = sum(leaf.size for leaf in jax.tree.leaves(state.lora))
        memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
        print(f"{name}: {count:,} trained parameters, the step adds {memory:.0f} MiB", flush=True)
        variants[name], sizes[name] = [compiled, state], memory
    seconds = {name: [] for name in variants}
    draw = np.random.default_rng(0)
    for index in range(args.rounds + 2):
        for name in draw.permutation(list(variants)):
            compiled, state = variants[name]
            start = time.perf_counter()
            state, metrics = compiled(params, state, batch)
            jax.block_until_ready(metrics["loss"])
            variants[name][1] = state
            if index >= 2:
                seconds[name].append(time.perf_counter() - start)
    ratios = np.array(seconds[kind]) / np.array(seconds["lora"])
    half = 1.96 * ratios.std(ddof=1) / len(ratios) ** 0.5
    print(
        f"{kind} {ratios.mean():.3f} of lora's time ({ratios.mean() - half:.3f} to "
        f"{ratios.mean() + half:.3f}, {len(ratios)} rounds), "
        f"{sizes[kind] / sizes['lora']:.2f} of its memory; jax {jax.__version__} on "
        f"{jax.devices()[0].device_kind}"
    )


if __name__ == "__main__":
    main()
