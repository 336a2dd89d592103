"""Pretrains the small OLMoE of the package (bundled:tiny_moe), all weights from scratch.

    python tools/build_corpus.py --source DIR && python tools/train_tokenizer.py
    python -m drlora_jax.pretrain --config configs/pretrain_tiny.py

Four domains contribute equal parts of every batch: stories, books, Python source, mathematics.
`model.path` gives architecture and tokenizer only. It takes about an hour on two quiet CPU cores
for 14.7 M tokens; the result is <run.dir>/model, a Hugging Face directory in bfloat16. Its losses
are in drlora_jax/bundled/tiny_moe/README.md.
"""

from drlora_jax.config import DataSection, ModelSection, RunSection, TrainConfig, TrainSection

DOMAINS = ("stories", "books", "code", "maths")


def get_config() -> TrainConfig:
    return TrainConfig(
        run=RunSection(dir="runs/pretrain_tiny", log_every=20, checkpoint_every=500, keep_last=1),
        model=ModelSection(path="bundled:tiny_moe"),
        data=DataSection(
            path=tuple(f"build/corpus/train/{domain}.jsonl" for domain in DOMAINS),
            eval_path=tuple(f"build/corpus/heldout/{domain}.jsonl" for domain in DOMAINS),
            format="text",
            too_long="split",
            loss_on="all",
        ),
        train=TrainSection(
            steps=3600,
            batch_size=16,
            sequence_length=256,
            learning_rate=2e-3,
            schedule="cosine",
            warmup_ratio=0.02,
            weight_decay=0.05,
            beta2=0.98,
            balance_loss=0.01,
            balance_form="per_layer",
            z_loss=1e-4,
            eval_every=500,
        ),
    )
