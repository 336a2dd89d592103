"""Plain LoRA on your own dense model: one pair of matrices per projection, no experts.

    python -m drlora_jax.train --config configs/dense_lora.py model.path=/models/Llama-2-7b-hf
    python -m drlora_jax.evaluate --run runs/dense_lora --tasks gsm8k=bundled:gsm8k/heldout.jsonl
    python -m drlora_jax.export --run runs/dense_lora --format peft --out adapter/

It works with any model of the llama family: a directory or a hub name. It trains on the 1,000
GSM8K questions in the package; for your own rows set data.path=train.jsonl
data.eval_path=heldout.jsonl, and for an Instruct model data.template=tokenizer, its own prompt
format.

Trained parameters on LLaMA-2-7B: 39,976,960. For DoRA set adapter.dora=true. For LoRA experts with
a router see configs/mixlora.py.

Hardware: one device with 24 GB. Forecast for LLaMA-2-7B (by benchmarks/plan_gpu.py, not measured):
17 GiB, of which the base model is 12.6 GiB in bfloat16, for micro-batches of 8 rows.
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
        run=RunSection(dir="runs/dense_lora", checkpoint_every=50),
        model=ModelSection(path="meta-llama/Llama-2-7b-hf", remat="full"),
        data=DataSection(
            path=("bundled:gsm8k/train.jsonl",), eval_path=("bundled:gsm8k/heldout.jsonl",)
        ),
        train=TrainSection(
            epochs=2,
            batch_size=16,
            micro_batches=2,
            sequence_length=512,
            learning_rate=2e-4,
            warmup_ratio=0.03,
            eval_every=25,
        ),
        adapter=AdapterSection(
            kind="lora",
            targets=("q", "k", "v", "o", "gate", "up", "down"),
            rank=16,
            dropout=0.05,
        ),
        allocation=AllocationSection(kind="uniform", r_target=16),
    )
