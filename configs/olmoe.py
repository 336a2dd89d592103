"""DR-LoRA on OLMoE-1B-7B with the paper's hyper-parameters: MetaMathQA for GSM8K.

    python -m drlora_jax.train --config configs/olmoe.py data.eval_path=heldout.jsonl

Rows: 3,750 steps of 48 are 180,000 rows. With data.pack=False a row is one document and padding, so
  they are three passes over max_rows=60,000 and at most 92 M tokens. A packed row has several
  documents, so the same steps would be that many times the passes: with data.pack=True set
  train.epochs instead. The run prints at the start how it reads its data.
Prompts: the tags of Tulu (data.template), as for a base model; for an Instruct model set
  data.template=tokenizer.
Hardware: one device with 80 GB (base model 13 GiB in bfloat16, rank state 3 GiB), or any number
  with mesh.data=-1. model.dtype=bfloat16 also works on a CPU, where model.dtype=auto is float32
  with compiled kernels. Expected time, estimated from the FLOPs of 92 M tokens and not measured: 22
  minutes on one H200 at 40 % of peak with grouped expert kernels. The line `kernels` of the output
  tells whether experts use them; `dense` computes every expert on every token, 8 times the expert
  work: expect 2 to 3 hours.
Reported by the authors (three runs, arXiv 2601.04823v5): GSM8K 28.4 with 8 shots.
"""

from drlora_jax.config import (
    AdapterSection,
    AllocationSection,
    DataSection,
    MeshSection,
    ModelSection,
    RunSection,
    TrainConfig,
    TrainSection,
)


def get_config() -> TrainConfig:
    return TrainConfig(
        run=RunSection(dir="runs/olmoe_metamath", seed=42, checkpoint_every=200),
        model=ModelSection(path="allenai/OLMoE-1B-7B-0924", dtype="bfloat16", remat="full"),
        data=DataSection(
            path=("meta-math/MetaMathQA",),
            format="prompt_response",
            prompt_field="query",
            response_field="response",
            template="tulu",
            max_rows=60_000,
            bad_rows="skip",
            pack=False,
        ),
        train=TrainSection(
            steps=3750,
            batch_size=48,
            micro_batches=4,
            sequence_length=512,
            learning_rate=2e-5,
            schedule="linear",
            warmup_ratio=0.03,
            max_grad_norm=1.0,
            eval_every=250,
        ),
        adapter=AdapterSection(
            targets=("up", "down"), scale=2.0, dropout=0.1, router="after_warmup"
        ),
        allocation=AllocationSection(
            kind="dr_lora", r_init=8, r_target=16, r_max=32, interval=200, p_grow=0.1, gamma=1.2
        ),
        mesh=MeshSection(data=-1),
    )
