"""MixLoRA on your own dense model: eight LoRA experts on every FFN, with the authors' settings.

    python -m drlora_jax.train --config configs/mixlora.py model.path=/models/Llama-2-7b-hf
    python -m drlora_jax.evaluate --run runs/mixlora --tasks gsm8k=bundled:gsm8k/heldout.jsonl

It works with any model of the llama family: a directory or a hub name. It trains on the 1,000
GSM8K questions in the package; for your own rows set data.path=train.jsonl
data.eval_path=heldout.jsonl, and for an Instruct model data.template=tokenizer, its own prompt
format. `configs/mixlora_smollm2.py` is an example for two CPU cores; docs/methods.md describes the
method and the differences from the published code.

Trained parameters on LLaMA-2-7B: 203,423,744, of which 1,048,576 in routers. For plain LoRA set
adapter.kind=lora adapter.rank=16. `python -m drlora_jax.convert` writes the adapter for MoE-PEFT;
peft has no such format.

Hardware: one device with 24 GB. Forecast for LLaMA-2-7B (by benchmarks/plan_gpu.py, not measured):
20 GiB, of which the base model is 12.6 GiB in bfloat16, for micro-batches of 8 rows.
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
        run=RunSection(dir="runs/mixlora", checkpoint_every=50),
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
            schedule="constant",
            balance_loss=1e-3,
            eval_every=25,
        ),
        adapter=AdapterSection(
            kind="mixlora",
            targets=("q", "k", "v", "o", "gate", "up", "down"),
            rank=16,
            dropout=0.05,
            num_experts=8,
            experts_per_token=2,
        ),
        allocation=AllocationSection(kind="uniform", r_target=16),
    )
