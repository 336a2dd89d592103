"""Orbax, and nothing but Orbax, on runs: what is saved, how many are kept, how a run finds its
newest state.

A checkpoint is one pytree of arrays (the train state, or parameters and optimizer state in
pretraining) and one small JSON of host values: ranks' history is in `ranks.jsonl`, positions and
counters are here. Saving is asynchronous; Orbax renames a finished checkpoint into place, so a
killed run leaves the previous one.
"""

import pathlib
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from drlora_jax.errors import RunError

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
        self._checkpointer = ocp.training.Checkpointer(
            directory.absolute(),
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep_last), best]),
            cleanup_tmp_directories=True,
        )

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
                step, state, metrics=metrics, custom_metadata=host, force=True
            )
        except WRITE_ERRORS as error:
            raise RunError(
                f"The checkpoint of step {step} could not be written: {error}"
            ) from error

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict]:
        """The state on the shardings of `abstract` (tree of `jax.ShapeDtypeStruct`), and the host
        values.

        Orbax casts a leaf of another dtype silently, so dtypes and shapes are compared first.
        """
        metadata = self._checkpointer.metadata(step)
        saved = jax.tree_util.tree_leaves_with_path(metadata.metadata)
        wanted = jax.tree_util.tree_leaves_with_path(abstract)
        found = {_name(path): (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in saved}
        for path, leaf in wanted:
            expected = (tuple(leaf.shape), str(leaf.dtype))
            if found.get(_name(path)) != expected:
                raise RunError(
                    f"Checkpoint {step}: {_name(path)} is {found.get(_name(path))}, this run needs "
                    f"{expected}."
                )
        return self._checkpointer.load(step, abstract), metadata.custom_metadata

    def close(self) -> None:
        """Waits for saves in flight and reports their failure."""
        try:
            self._checkpointer.close()
        except WRITE_ERRORS as error:
            raise RunError(f"The last checkpoint could not be written: {error}") from error


def _name(path) -> str:
    """A leaf's path as text, the same for dicts, tuples and named tuples."""
    return "/".join(
        str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part))))
        for part in path
    )
