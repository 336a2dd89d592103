"""Rows of metrics.jsonl: when they are written, and what they hold.

A row is about the steps since the row before it. Reading a step's figures waits for the step, so on
devices that compute in the background a row is kept until the next step is on its way, and written
while that one runs. Its time ends where its own step does, all the same: nothing that is read or
computed for a row stands behind the next step in the device's queue.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from drlora_jax.config import TrainConfig
from drlora_jax.errors import RunError
from drlora_jax.reporting.progress import Progress, Throughput, peak_memory


def rate_at(schedule: optax.Schedule, step: int) -> float:
    """The rate after `step` steps, for people. Not computed on an accelerator if it can be helped:
    there it would wait for all steps that are queued.
    """
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names the accelerator alone
        host = None
    with jax.default_device(host):
        return float(schedule(step))


class RowWriter:
    """Writes the rows of a run, each as soon as its step is over or, at the latest, in `finish`."""

    def __init__(self, run, params: dict, meter: Throughput, progress: Progress):
        self._run = run
        self._params = params
        self._meter = meter
        self._progress = progress
        self._kept = None

    def add(self, step: int, tokens: int, metrics: dict, more: dict) -> None:
        """The row of a step; `more` is added to it as it stands."""
        self._kept = functools.partial(self._write, step, tokens, metrics, more)
        if _is_ready(metrics["loss"]):
            self.finish()

    def finish(self) -> None:
        """Writes the row that is kept, if there is one: waits for its step."""
        write, self._kept = self._kept, None
        if write is not None:
            write()

    def _write(self, step: int, tokens: int, metrics: dict, more: dict) -> None:
        config = self._run.job.config
        require_finite(config, step, metrics, self._params)
        speed = self._meter.take()  # at once: the step is over
        row = {
            "step": step,
            "loss": float(metrics["loss"]),
            "tokens": tokens,
            "learning_rate": rate_at(self._run.schedule, step - 1),
            "grad_norm": float(metrics["grad_norm"]),
        }
        if config.train.balance_loss or config.train.z_loss:
            row["auxiliary_loss"] = float(metrics["auxiliary_loss"])
        if not self._run.job.eval_batches:  # else it is logged with each evaluation
            row |= routing(metrics)
        row |= speed | peak_memory() | more
        self._run.job.run_dir.log_metrics(row)
        self._progress.show(row)


def routing(metrics: dict) -> dict:
    """By layer and expert, of this step's tokens: share of the choices (a layer sums to 1) and mean
    combine weight. Nothing for a dense model.
    """
    names = {"routing_load": "load_LE", "routing_weight": "weight_LE"}
    found = {name: metrics[key] for name, key in names.items() if metrics[key] is not None}
    return {name: np.asarray(value, np.float64).round(5).tolist() for name, value in found.items()}


def _is_ready(value) -> bool:
    """Whether reading a device's value waits for nothing."""
    return not hasattr(value, "is_ready") or value.is_ready()


def require_finite(config: TrainConfig, step: int, metrics: dict, params: dict) -> None:
    """Before anything is decided or saved: a checkpoint never holds a diverged state."""
    rate = config.train.learning_rate
    for name in ("loss", "grad_norm"):
        value = float(metrics[name])
        if not np.isfinite(value):
            require_finite_base(params)
            raise RunError(
                f"{name} is {value} at step {step}; lower train.learning_rate ({rate}) in a new "
                "run.dir, or look at the data of that step. Earlier checkpoints are good."
            )


def require_finite_base(params: dict) -> None:
    """Looked at only when something is wrong: a good base is not read twice."""
    for path, leaf in jax.tree.leaves_with_path(params):
        if not bool(jnp.isfinite(leaf).all()):
            name = "/".join(str(part.key) for part in path)
            raise RunError(
                f"The base model's weights {name} hold NaN or infinity; its files are damaged, or "
                "were written so: get them again."
            )
