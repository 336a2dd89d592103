"""MixLoRA on SmolLM2-135M-Instruct: eight LoRA experts on every FFN, fine-tuned on ARC-Easy.

    python -m drlora_jax.train --config configs/mixlora_smollm2.py
    python -m drlora_jax.evaluate --run runs/mixlora_smollm2 --tasks arc_easy --limit 300
    python -m drlora_jax.evaluate --run runs/mixlora_smollm2 --tasks arc_easy --limit 300 --base
    python -m drlora_jax.evaluation.compare runs/mixlora_smollm2/eval/arc_easy*

Model and data come from the hub (`pip install datasets`). For local files set model.path=DIR
data.path=arc_easy=FILE.jsonl data.eval_path= (or arc_easy=FILE), and --data-dir for evaluate;
docs/evaluation.md describes the layouts of rows. The model is trained on the prompt that `arc_easy`
is scored with, with the full answer; `arc_easy:mixlora=...` trains on the authors' prompts.

Trained parameters: 13,224,960, of which 138,240 in routers. For plain LoRA with as many
(13,127,040) set adapter.kind=lora adapter.rank=43. Without the balance loss: train.balance_loss=0.

One epoch is 72,538 tokens: 8 to 9 minutes on two CPU cores, and 1 to 2 for each evaluation; 3.2
GiB, float32. Measured with train.epochs=1 train.sequence_length=128 (docs/methods.md): accuracy on
300 questions from 0.547 to 0.677; plain LoRA with as many parameters 0.693, no difference shown.

Five tasks at once with the authors' sizes, on one GPU of 24 GB or more (not measured):

    python -m drlora_jax.train --config configs/mixlora_smollm2.py run.dir=runs/mixlora_multi \\
        data.path=arc_easy=allenai/ai2_arc:ARC-Easy,arc_challenge=allenai/ai2_arc:ARC-Challenge,\\
boolq=google/boolq,openbookqa=allenai/openbookqa:main,piqa=baber/piqa data.eval_path= \\
        data.too_long=skip train.batch_size=16 train.sequence_length=512 \\
        train.learning_rate=2e-4 train.schedule=constant allocation.r_target=16
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
        run=RunSection(dir="runs/mixlora_smollm2", checkpoint_every=20),
        model=ModelSection(path="HuggingFaceTB/SmolLM2-135M-Instruct"),
        data=DataSection(
            path=("arc_easy=allenai/ai2_arc:ARC-Easy",),
            eval_path=("arc_easy=allenai/ai2_arc:ARC-Easy",),
            format="choice",
        ),
        train=TrainSection(
            epochs=2,
            batch_size=8,
            sequence_length=256,
            learning_rate=1e-3,
            warmup_ratio=0.1,
            balance_loss=1e-3,
            eval_every=20,
        ),
        adapter=AdapterSection(
            kind="mixlora",
            targets=("q", "k", "v", "o", "gate", "up", "down"),
            dropout=0.05,
            num_experts=8,
            experts_per_token=2,
        ),
        allocation=AllocationSection(kind="uniform", r_target=8),
    )
