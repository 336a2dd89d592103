"""DR-LoRA on the MoE and the data that the package carries: the first thing to run.

    python -m drlora_jax.train --config configs/tiny.py

A 6.9 M parameter OLMoE (bundled:tiny_moe) learns to answer grade-school mathematics problems
(GSM8K, 1,000 rows); 200 other rows are held out.
"""

from drlora_jax.config import (
    AdapterSection,
    AllocationSection,
    DataSection,
    ModelSection,
    RunSection,
    TrainConfig,
    TrainSection,
)


def get_config() -> TrainConfig:
    return TrainConfig(
        run=RunSection(dir="runs/tiny"),
        model=ModelSection(path="bundled:tiny_moe"),
        data=DataSection(
            path=("bundled:gsm8k/train.jsonl",), eval_path=("bundled:gsm8k/heldout.jsonl",)
        ),
        train=TrainSection(
            steps=200,
            batch_size=8,
            sequence_length=512,
            learning_rate=2e-3,
            warmup_ratio=0.05,
            eval_every=50,
        ),
        adapter=AdapterSection(targets=("up", "down"), dropout=0.05),
        allocation=AllocationSection(r_init=4, r_target=8, r_max=16, interval=10, p_grow=0.1),
    )
