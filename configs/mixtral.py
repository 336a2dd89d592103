"""DR-LoRA on Mixtral-8x7B with the paper's hyper-parameters, experts sharded over eight devices.

    python -m drlora_jax.train --config configs/mixtral.py data.eval_path=heldout.jsonl

Rows, passes, prompts and dtype: as in configs/olmoe.py (one document per row, three passes over
  60,000 rows; the tags of Tulu, for an Instruct model data.template=tokenizer; bfloat16 on every
  device).
Hardware: eight devices with 24 GB or more each (base model 87 GiB in bfloat16, 12 GiB per device
  with mesh.expert=8; rank state 1 GiB per device), for example 8 x H100 or a TPU v5p-16; mesh.fsdp
  shards the base model further. Expected time, estimated from the FLOPs of 92 M tokens and not
  measured: half an hour on 8 x H200 at 40 % of peak with grouped expert kernels. The line `kernels`
  of the output tells whether experts use them; `dense` computes every local expert on every token,
  4 times the expert work: expect 2 hours.
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
        run=RunSection(dir="runs/mixtral", seed=42, checkpoint_every=200),
        model=ModelSection(path="mistralai/Mixtral-8x7B-v0.1", dtype="bfloat16", remat="full"),
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
            micro_batches=3,  # 16 rows at a time, two per device on eight devices
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
        # All devices shard the eight experts; for sixteen devices: mesh.data=2 mesh.expert=8.
        mesh=MeshSection(data=1, expert=-1),
    )
