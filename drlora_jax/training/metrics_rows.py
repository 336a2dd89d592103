"""Writes the rows of metrics.jsonl.

A row covers the steps since the previous row. Reading a step's metrics waits for the step, so on
devices that compute asynchronously a row is held until the next step has been dispatched, and is
written while that one runs. Its time still ends with its own step: nothing that is read or computed
for a row is queued behind the next step on the device.
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
    """Returns the rate after `step` steps, for logs. It is computed on the CPU where possible: on
    an accelerator it would wait for all queued steps.
    """
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names only the accelerator
        host = None
    with jax.default_device(host):
        return float(schedule(step))


class RowWriter:
    """Writes the rows of a run, each as soon as its step has ended, at the latest in `finish`."""

    def __init__(self, run, params: dict, meter: Throughput, progress: Progress):
        self._run = run
        self._params = params
        self._meter = meter
        self._progress = progress
        self._kept = None

    def add(self, step: int, tokens: int, metrics: dict, more: dict) -> None:
        """Schedules the row of a step; the entries of `more` are added to it unchanged."""
        self._kept = functools.partial(self._write, step, tokens, metrics, more)
        if _is_ready(metrics["loss"]):
            self.finish()

    def finish(self) -> None:
        """Writes the pending row, if there is one, after waiting for its step."""
        write, self._kept = self._kept, None
        if write is not None:
            write()

    def _write(self, step: int, tokens: int, metrics: dict, more: dict) -> None:
        config = self._run.job.config
        require_finite(config, step, metrics, self._params)
        speed = self._meter.take()  # immediately, since the step has ended
        row = {
            "step": step,
            "loss": float(metrics["loss"]),
            "tokens": tokens,
            "learning_rate": rate_at(self._run.schedule, step - 1),
            "grad_norm": float(metrics["grad_norm"]),
        }
        if config.train.balance_loss or config.train.z_loss:
            row["auxiliary_loss"] = float(metrics["auxiliary_loss"])
        if not self._run.job.eval_batches:  # otherwise it is logged with each evaluation
            row |= routing(metrics)
        row |= speed | peak_memory() | more
        self._run.job.run_dir.log_metrics(row)
        self._progress.show(row)


def routing(metrics: dict) -> dict:
    """Returns, per layer and expert, the share of this step's routing choices (which sums to 1 over
    a layer) and the mean combine weight; empty for a dense model.
    """
    names = {"routing_load": "load_LE", "routing_weight": "weight_LE"}
    found = {name: metrics[key] for name, key in names.items() if metrics[key] is not None}
    return {name: np.asarray(value, np.float64).round(5).tolist() for name, value in found.items()}


def _is_ready(value) -> bool:
    """Returns whether a value can be read without waiting for the device."""
    return not hasattr(value, "is_ready") or value.is_ready()


def require_finite(config: TrainConfig, step: int, metrics: dict, params: dict) -> None:
    """Raises RunError when the loss or the gradient is not finite. Called before anything is
    decided or saved, so that a checkpoint never holds a diverged state.
    """
    rate = config.train.learning_rate
    for name in ("loss", "grad_norm"):
        value = float(metrics[name])
        if not np.isfinite(value):
            require_finite_base(params)
            raise RunError(
                f"{name} is {value} at step {step}; lower train.learning_rate ({rate}) in a new "
                "run.dir, or inspect the data of that step. Earlier checkpoints are intact."
            )


def require_finite_base(params: dict) -> None:
    """Raises RunError when the base model's weights are not finite. Called only after a failure, so
    that intact weights are not read twice.
    """
    for path, leaf in jax.tree.leaves_with_path(params):
        if not bool(jnp.isfinite(leaf).all()):
            name = "/".join(str(part.key) for part in path)
            raise RunError(
                f"The base model's weights {name} contain NaN or infinity; its files are damaged "
                "or were written that way. Download them again."
            )
