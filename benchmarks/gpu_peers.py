"""Times training steps of transformers + peft and of ours on the same device, for `gpu.py`.

Both sides: the OLMoE shape, 2 rows of 4,096 tokens (the same ones), LoRA of rank 16 with alpha 32
on the fused gate_up, down, q and v, no dropout, AdamW without weight decay and without clipping,
base model in bfloat16, LoRA matrices in float32. peft runs with `target_parameters` and grouped_mm,
its fastest setting; ours runs with the defaults of training. Each is a separate process, so that
its peak memory is its own: of the device, or of the process if the device is a CPU. With
`--rehearse` ours loads the weights that peft's process wrote; as B starts at zero, both have the
same first loss.
"""

import statistics
import time

import numpy as np
from gpu_setting import GIB, Setting, attempt
from shapes import OLMOE, TINY

from drlora_jax.reporting.progress import peak_memory

RANK, ALPHA, RATE, ROWS = 16, 32, 1e-4, 2
WARMUP = 2


def peers(setting: Setting, case: str):
    """Runs one of the two sides, by name."""
    length = 32 if setting.tiny else 4096
    row = {"rows": ROWS, "length": length, "rank": RANK, "dtype": setting.dtype}
    yield attempt(row, lambda: {"peft": run_peft, "ours": run_ours}[case](setting, length))


def token_ids(vocabulary: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(2, vocabulary, size=(ROWS, length))


def measure(setting: Setting, length: int, step) -> dict:
    """Times `step() -> loss`, waiting for the loss; the first steps compile and are not timed."""
    losses, seconds = [], []
    for _ in range(WARMUP + setting.repeats):
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
    rate = ROWS * length / statistics.median(seconds[WARMUP:])
    return {"tokens_per_second": rate, "first_loss": losses[0], "last_loss": losses[-1]}


def run_peft(setting: Setting, length: int) -> dict:
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    is_cuda = torch.cuda.is_available()
    device = "cuda" if is_cuda else "cpu"
    values = TINY if setting.tiny else OLMOE
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
        **{key: value for key, value in values.items() if key != "model_type"}
    )
    config._experts_implementation = "grouped_mm"
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, setting.dtype)
        )
    if setting.tiny:
        model.save_pretrained(weights_folder(setting))
    lora = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    model = get_peft_model(model, lora)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    batch = torch.from_numpy(token_ids(values["vocab_size"], length)).to(device)
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def step() -> float:
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    found = measure(setting, length, step)
    device_bytes = torch.cuda.max_memory_allocated() if is_cuda else None
    return (
        found
        | {
            "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
            "experts": model.config._experts_implementation,
            "trained": sum(parameter.numel() for parameter in trained),
            "trained_dtype": str(trained[0].dtype),
        }
        | peak(device_bytes)
    )


def run_ours(setting: Setting, length: int) -> dict:
    import jax
    from gpu_setting import device_peak
    from gpu_steps import build, random_params
    from jobs import Step

    from drlora_jax.interop.hf_read import load_params

    config, values = our_config(setting, length), TINY if setting.tiny else OLMOE
    run, folder = build(config, values), weights_folder(setting)
    if folder.is_dir():
        params = load_params(run.job.model_config, folder, run.abstract_params)
    else:
        params = random_params(run.abstract_params)
    step = Step(config, values, params)
    ids = token_ids(values["vocab_size"], length).astype(np.int32)[None]
    mask = np.ones(ids.shape, np.float32)
    mask[:, :, -1] = 0  # the last token has none after it
    arrays = {"tokens_BT": ids, "targets_BT": np.roll(ids, -1, axis=2), "target_mask_BT": mask}
    step.batch = jax.device_put(step.batch._replace(**arrays))
    found = measure(setting, length, lambda: float(step()["loss"]))
    return (
        found
        | {
            "versions": f"jax {jax.__version__}",
            "experts": step.run.backends,
            "trained": sum(leaf.size for leaf in jax.tree.leaves(step.state.lora)),
            "trained_dtype": str(jax.tree.leaves(step.state.lora)[0].dtype),
            "compile_seconds": step.compile_seconds,
        }
        | peak(device_peak())
    )


def our_config(setting: Setting, length: int):
    from drlora_jax.config import (
        AdapterSection,
        AllocationSection,
        ModelSection,
        TrainConfig,
        TrainSection,
    )

    train = TrainSection(
        steps=1000,
        batch_size=ROWS,
        sequence_length=length,
        learning_rate=RATE,
        schedule="constant",
        warmup_ratio=0.0,
        max_grad_norm=None,
    )
    targets = ("gate_up", "down", "q", "v")
    return TrainConfig(
        model=ModelSection(dtype=setting.dtype),
        train=train,
        adapter=AdapterSection(targets=targets, scale=ALPHA / RANK, dropout=0.0),
        allocation=AllocationSection(kind="uniform", r_target=RANK),
    )


def weights_folder(setting: Setting):
    return setting.folder / "weights"


def peak(device_bytes: int | None) -> dict:
    """Returns the peak memory of the device since the step began, or of this process."""
    if device_bytes is not None:
        return {"peak_gib": device_bytes / GIB, "peak_of": "device"}
    return {"peak_gib": peak_memory()["host_peak_bytes"] / GIB, "peak_of": "process"}
