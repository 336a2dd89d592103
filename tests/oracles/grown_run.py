"""The run that the code before the moves made: how it was trained, and what it came to.

`make_grown_run.py` writes the archive (model, rows, the run stopped after step 6 of 12) and the
results of the same training without a stop.
"""

import json
import pathlib
import platform

import jax

DATA = pathlib.Path(__file__).parent / "data"
ARCHIVE, RESULTS = DATA / "grown_run.tar.gz", DATA / "grown_run.json"
STOPPED_AT = 6  # events are after steps 1, 4 and 7
TRAIN = (
    "--config bundled:tiny model.path=model model.experts=block data.path=train.jsonl "
    "data.eval_path=heldout.jsonl data.template=plain train.steps=12 train.batch_size=4 "
    "train.sequence_length=64 train.learning_rate=1e-2 train.eval_every=12 "
    "train.warmup_ratio=0.1 adapter.targets=up,down,q adapter.dropout=0.1 "
    "allocation.kind=dr_lora allocation.r_init=1 allocation.r_target=3 allocation.r_max=5 "
    "allocation.interval=3 allocation.p_grow=0.5 run.log_every=1 run.checkpoint_every=12 "
    "mesh.data=1"
).split()


def machine() -> dict[str, str]:
    """What decides the last bits: equal bits are expected where all of this is equal."""
    cpu = [line for line in _cpu_info().splitlines() if line.startswith(("model name", "flags"))]
    return {"jax": jax.__version__, "machine": platform.machine(), "cpu": "\n".join(cpu[:2])}


def _cpu_info() -> str:
    file = pathlib.Path("/proc/cpuinfo")
    return file.read_text(encoding="utf-8") if file.is_file() else platform.processor()


def result_of(run: pathlib.Path) -> dict:
    """Losses and norms of all steps, ranks of all events, and the checksums of the last state."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    events = [json.loads(line) for line in (run / "ranks.jsonl").read_text().splitlines()]
    last = max((run / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    seal = json.loads((last / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    return {
        "losses": {row["step"]: row["loss"] for row in rows if "loss" in row},
        "grad_norms": {row["step"]: row["grad_norm"] for row in rows if "loss" in row},
        "eval_loss": rows[-1]["eval_loss"],
        "ranks": {event["step"]: event["ranks"] for event in events},
        "step": seal["step"],
        "tokens": seal["tokens"],
        "arrays": seal["arrays"],
    }
