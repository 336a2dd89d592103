"""Tests whether growing ranks helps at equal budget: DR-LoRA against its baselines.

    python -m experiments.run --study experiments/growth.py --out build/growth --jobs 2

All arms except the upper one end with the same number of active ranks in every layer (8 experts *
16) and see the same tokens in the same order for a seed; the router is frozen in all of them.
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
from experiments.study import Arm, Study, Task

TASKS = (
    Task(
        "maths",
        "bundled:gsm8k/train.jsonl",
        "experiments/data/maths_tune.jsonl",
        "experiments/data/maths_test.jsonl",
        learning_rates=(1.5e-3, 3e-3, 6e-3),
    ),
    Task(
        "code",
        "experiments/data/code_train.jsonl",
        "experiments/data/code_tune.jsonl",
        "experiments/data/code_test.jsonl",
        learning_rates=(3e-3, 6e-3, 1.2e-2),
    ),
)

ARMS = (
    Arm("lora_r16", "uniform rank 16: the same budget", ("allocation.kind=uniform",)),
    Arm(
        "lora_r32",
        "uniform rank 32: twice the budget",
        ("allocation.kind=uniform", "allocation.r_target=32"),
    ),
    Arm("dr_lora", "DR-LoRA, 8 to a mean of 16, at most 32", ()),
    Arm("random", "its schedule, experts chosen at random", ("allocation.kind=random",)),
    Arm(
        "moe_sieve",
        "rank 64 on the quarter of experts used most",
        ("allocation.kind=moe_sieve", "allocation.r_max=64"),
    ),
    Arm(
        "frozen_final",
        "the final ranks of dr_lora from step 1",
        ("allocation.kind=pattern",),
        ranks_of="dr_lora",
    ),
    # Possible obstacles to growth, each removed alone.
    Arm(
        "early_end",
        "dr_lora, growth ends after a quarter",
        ("allocation.last_event=50",),
        rate_of="dr_lora",
    ),
    Arm(
        "rank_adam",
        "dr_lora, Adam counts the steps of every rank",
        ("train.bias_correction=per_rank",),
        rate_of="dr_lora",
    ),
    Arm(
        "probe",
        "dr_lora, importance of the next rank instead of the present ones",
        ("allocation.importance=probe",),
        rate_of="dr_lora",
    ),
)


def get_config() -> TrainConfig:
    return TrainConfig(
        run=RunSection(log_every=10, checkpoint_every=100, keep_last=1),
        model=ModelSection(path="bundled:tiny_moe", dtype="float32", remat="none"),
        data=DataSection(template="tokenizer"),
        train=TrainSection(
            steps=200, batch_size=4, sequence_length=256, warmup_ratio=0.05, eval_every=25
        ),
        adapter=AdapterSection(targets=("gate", "up", "down")),
        allocation=AllocationSection(r_init=8, r_target=16, r_max=32, interval=10),
    )


def get_study() -> Study:
    return Study(
        name="growth",
        base=get_config(),
        tasks=TASKS,
        arms=ARMS,
        seeds=(1, 2, 3, 4, 5),
        tuning_seed=0,
        reference="lora_r16",
    )
