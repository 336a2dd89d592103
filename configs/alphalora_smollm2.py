"""AlphaLoRA on SmolLM2-135M-Instruct: LoRA experts on every matrix, more of them in layers whose
weights have lighter tails; fine-tuned on ARC-Easy.

    python -m drlora_jax.alpha HuggingFaceTB/SmolLM2-135M-Instruct --experts 150 \\
        --out build/alpha_smollm2.json
    python -m drlora_jax.train --config configs/alphalora_smollm2.py
    python -m drlora_jax.evaluate --run runs/alphalora_smollm2 --tasks arc_easy --limit 300

150 experts are five per layer; MoLA's uniform placement of as many is
adapter.experts_per_layer=5555. `--estimator median` depends less on single matrices
(docs/design.md). Without the first command,
adapter.experts_per_layer=none allocation.kind=alphalora allocation.experts=150
computes exponents when the run is prepared;
adapter.num_experts=20 is then what the largest layer needs. Trained parameters: 12,960,000 wherever
the 150 experts are, of which 748,800 in routers. For local files, prompts, and plain LoRA with
about as many parameters see configs/mixlora_smollm2.py. The authors use no balance loss. Measured
with train.epochs=1 train.sequence_length=128 (docs/methods.md): accuracy on 300 ARC-Easy questions
from 0.547 to 0.690; plain LoRA with as many parameters 0.693.
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
        run=RunSection(dir="runs/alphalora_smollm2", checkpoint_every=20),
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
            eval_every=20,
        ),
        adapter=AdapterSection(
            kind="mola",
            targets=("q", "k", "v", "o", "gate", "up", "down"),
            dropout=0.05,
            experts_per_layer="build/alpha_smollm2.json",
            experts_per_token=2,
        ),
        allocation=AllocationSection(kind="uniform", r_target=8),
    )
