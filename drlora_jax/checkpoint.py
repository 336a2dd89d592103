"""Orbax, and nothing but Orbax, on runs: what is saved, how many are kept, how a run finds its
newest state.

A checkpoint is one pytree of arrays (the train state, or parameters and optimizer state in
pretraining) and one small JSON of host values: ranks' history is in `ranks.jsonl`, positions and
counters are here. Saving is asynchronous; Orbax renames a finished checkpoint into place, so a
killed run leaves the previous one.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from drlora_jax.errors import RunError, UserError

# What Orbax and TensorStore raise when a disk is full or a file can not be written.
WRITE_ERRORS = (OSError, ValueError, RuntimeError)


class Checkpoints:
    """The checkpoints of one run: the newest `keep_last` and the best by eval loss are kept."""

    def __init__(self, directory: pathlib.Path, *, keep_last: int):
        policies = ocp.training.preservation_policies
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics["eval_loss"],
            reverse=True,  # the smallest loss is the best
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        self._directory = directory
        try:
            self._checkpointer = ocp.training.Checkpointer(
                directory.absolute(),
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(keep_last), best]
                ),
                cleanup_tmp_directories=True,
            )
        except WRITE_ERRORS as error:
            message = f"The checkpoints in {directory} can not be looked at: {_reason(error)}"
            raise RunError(message) from error

    def latest_step(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def steps(self) -> list[int]:
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def save(self, step: int, state: Any, host: dict, *, eval_loss: float | None = None) -> None:
        """Copies the state to the host, then writes in the background; surfaces the failure of an
        earlier save.
        """
        if step in self.steps():
            return
        metrics = None if eval_loss is None else {"eval_loss": eval_loss}
        try:
            self._checkpointer.save_async(
                step, _without_empty(state), metrics=metrics, custom_metadata=host, force=True
            )
        except WRITE_ERRORS as error:
            raise RunError(
                f"The checkpoint of step {step} could not be written: {_reason(error)}"
            ) from error

    def restore(self, step: int, abstract: Any, host_names: Sequence[str] = ()) -> tuple[Any, dict]:
        """The state on the shardings of `abstract` (tree of `jax.ShapeDtypeStruct`), and the host
        values, of which `host_names` must be there.
        """
        try:
            metadata = self._checkpointer.metadata(step)
            if metadata.metadata is None:
                raise RunError(_damaged(self._directory, step, "its arrays can not be read"))
            _check_leaves(step, metadata.metadata, _without_empty(abstract))
            host = metadata.custom_metadata or {}
            for name in host_names:
                if name not in host:
                    raise RunError(_damaged(self._directory, step, f"it has no {name!r}"))
            loaded = self._checkpointer.load(step, _without_empty(abstract))
            return _with_empty(loaded, abstract), host
        except RunError:
            raise
        except Exception as error:  # for a file that is not whole, a dozen unrelated kinds
            raise RunError(_damaged(self._directory, step, _reason(error))) from error

    def close(self) -> None:
        """Waits for saves in flight and reports their failure."""
        try:
            self._checkpointer.close()
        except WRITE_ERRORS as error:
            message = f"The last checkpoint could not be written: {_reason(error)}"
            raise RunError(message) from error


# ---------------------------------------------------------------------------------------------
# reading only: nothing is created, cleaned up or locked, so a run that is going on is not disturbed


def saved_steps(directory: pathlib.Path) -> list[int]:
    """Steps with a finished checkpoint, in order."""
    return sorted(int(entry.name) for entry in directory.glob("*") if entry.name.isdigit())


def choose_step(directory: pathlib.Path, which: str) -> int:
    """The step that `latest`, `best` (smallest held-out loss) or a number means."""
    steps = saved_steps(directory)
    if not steps:
        raise UserError(f"{directory} has no finished checkpoint.")
    if which == "latest":
        return steps[-1]
    if which == "best":
        losses = {step: _eval_loss(directory, step) for step in steps}
        measured = [step for step in steps if losses[step] is not None]
        if not measured:
            raise UserError(f"{directory}: no checkpoint has a held-out loss; use --step latest.")
        return min(measured, key=losses.get)
    if which not in map(str, steps):
        raise UserError(
            f"--step {which}: {directory} has {', '.join(map(str, steps))}; or say latest or best."
        )
    return int(which)


def _eval_loss(directory: pathlib.Path, step: int) -> float | None:
    file = directory / str(step) / "metrics" / "metrics"
    if not file.is_file():
        return None
    return json.loads(file.read_text(encoding="utf-8")).get("eval_loss")


def read_arrays(directory: pathlib.Path, step: int, abstract: dict) -> dict:
    """Some of a checkpoint's arrays, on the shardings of `abstract` (a part of its tree)."""
    path, wanted = (directory / str(step)).absolute(), _without_empty(abstract)
    try:
        _check_leaves(step, ocp.metadata(path, checkpointable_name="state").metadata, wanted)
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            loaded = ocp.load(path, wanted, checkpointable_name="state")
    except RunError:
        raise
    except Exception as error:  # for a file that is not whole, a dozen unrelated kinds
        raise RunError(_damaged(directory, step, _reason(error))) from error
    return _with_empty(loaded, abstract)


def _without_empty(tree: Any) -> Any:
    """The tree without arrays of size 0, which Orbax refuses: a dense model has ranks [0, 0]."""
    return jax.tree.map(lambda leaf: leaf if leaf.size else None, tree)


def _with_empty(tree: Any, abstract: Any) -> Any:
    """The inverse of `_without_empty`."""

    def leaf(wanted, found):
        return found if wanted.size else jnp.zeros(wanted.shape, wanted.dtype)

    return jax.tree.map(leaf, abstract, tree)


def _check_leaves(step: int, saved: Any, abstract: Any) -> None:
    """Orbax casts a leaf of another dtype silently, so dtypes and shapes are compared first."""
    leaves = jax.tree_util.tree_leaves_with_path(saved)
    found = {_name(path): (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in leaves}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        expected = (tuple(leaf.shape), str(leaf.dtype))
        if found.get(_name(path)) != expected:
            raise RunError(
                f"Checkpoint {step}: {_name(path)} is {found.get(_name(path))}, this run needs "
                f"{expected}."
            )


def _damaged(directory: pathlib.Path, step: int, reason: str) -> str:
    return (
        f"Checkpoint {step} of {directory} is damaged or not whole: {reason}. Put it back from a "
        f"copy, or delete {directory / str(step)} to go on from the checkpoint before it."
    )


def _reason(error: Exception) -> str:
    """The first line, without the specification that TensorStore puts behind it."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return first.partition(" [tensorstore")[0].rstrip(". ")


def _name(path) -> str:
    """A leaf's path as text, the same for dicts, tuples and named tuples."""
    return "/".join(
        str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part))))
        for part in path
    )
