"""Reads checkpoints without creating, cleaning up, renaming or locking anything, so that a live run
is not disturbed.

Every read verifies the restored arrays against the saved checksums (`checksums.py`), and the step
and run that the checkpoint names against its directory. A checkpoint that fails is `Damaged`, and
the next of the requested steps is used.
"""

import contextlib
import gc
import math
import pathlib
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from drlora_jax.errors import RunError, UserError
from drlora_jax.parallel import processes
from drlora_jax.runs import checksums
from drlora_jax.runs.checksums import leaf_name
from drlora_jax.runs.identity import find_difference, identity_of
from drlora_jax.system.paths import check_downloaded, numbered_folders, read_json
from drlora_jax.system.text import first_line

OLD_NAMES = {"tokens"}  # host values of checkpoints that are older than the checksums


class Damaged(RunError):
    """A checkpoint that differs from what was saved; the message is only the reason."""


class Restored(NamedTuple):
    """The verified content of a checkpoint."""

    step: int
    state: Any
    host: dict


def saved_steps(directory: pathlib.Path) -> list[int]:
    """Returns the steps with a finished checkpoint, in order."""
    return numbered_folders(directory)


def choose_steps(directory: pathlib.Path, which: str | Sequence[int]) -> tuple[int, ...]:
    """Returns the step that `latest`, `best` (smallest held-out loss) or a number means; for the
    first two, the older ones follow as fallbacks. A sequence of steps stays as it is.
    """
    if not isinstance(which, str):
        return tuple(which)
    steps = saved_steps(directory)
    if not steps:
        raise UserError(f"{directory} has no finished checkpoint.")
    if which not in ("latest", "best", *map(str, steps)):
        raise UserError(
            f"--step {which}: {directory} has the steps {', '.join(map(str, steps))}; give one of "
            "them, latest or best."
        )
    if which.isdigit():
        return (int(which),)
    first = steps[-1]
    if which == "best":
        first = best_step(steps, {step: eval_loss(directory, step) for step in steps})
        if first is None:
            raise UserError(f"{directory}: no checkpoint has a held-out loss; use --step latest.")
    return tuple(step for step in reversed(steps) if step <= first)


def best_step(steps: Iterable[int], losses: dict[int, float | None]) -> int | None:
    """Returns the step with the smallest held-out loss; None if none was measured."""
    measured = [step for step in steps if losses.get(step) is not None]
    return min(measured, key=losses.get, default=None)


def read_newest(directory: pathlib.Path, steps: Sequence[int], abstract: dict) -> Restored:
    """Reads some arrays of the first of `steps` that is intact, onto the shardings of `abstract` (a
    part of its tree).
    """
    found, damaged = first_good(
        directory, steps, lambda step: read(directory, step, abstract, is_part=True)
    )
    for step, reason in damaged.items():
        say(
            f"checkpoint {step} of {directory} is damaged ({reason}); using checkpoint {found.step}"
        )
    return found


def first_good(
    directory: pathlib.Path, steps: Sequence[int], read_step: Callable[[int], Restored]
) -> tuple[Restored, dict[int, str]]:
    """Returns the first of `steps` that `read_step` does not find damaged, and what is wrong with
    the steps before it.
    """
    damaged: dict[int, str] = {}
    for step in steps:
        try:
            return read_step(step), damaged
        except Damaged as error:
            damaged[step] = str(error)  # not the error: its traceback would keep the arrays alive
    first, *others = steps
    for file in sorted((directory / str(first)).rglob("*")):
        check_downloaded(file)
    more = f"; so are the older ones ({', '.join(map(str, others))})" if others else ""
    raise RunError(
        f"Checkpoint {first} of {directory} is damaged or incomplete: {damaged[first]}{more}. "
        "Restore it from a copy, or use another step or run."
    )


def read(
    directory: pathlib.Path,
    step: int,
    abstract: Any,
    host_names: Sequence[str] = (),
    *,
    is_part: bool = False,
) -> Restored:
    """Reads a checkpoint and verifies its checksums; raises Damaged on all processes."""
    path, wanted = (directory / str(step)).absolute(), without_empty(abstract)
    context = ocp.Context()
    context.pytree.loading.partial_load = is_part
    # No process waits inside Orbax for one that has met a damaged file.
    context.multiprocessing.active_processes = {jax.process_index()}
    context.multiprocessing.primary_host = jax.process_index()

    def look():
        metadata = ocp.metadata(path, checkpointable_name="state")
        if metadata.metadata is None:
            raise Damaged("its arrays cannot be read")
        _check_leaves(metadata.metadata, wanted)
        host = metadata.custom_metadata or {}
        _check_host(directory, step, host, host_names)
        return host

    with context:
        host = _together(look)
        loaded = _together(lambda: ocp.load(path, wanted, checkpointable_name="state"))
    if checksums.SEAL in host:
        _together(lambda: _check_arrays(loaded, host["arrays"]))
    else:
        say(f"checkpoint {step} of {directory} has no checksums (older version): not verified")
    return Restored(step, _with_empty(loaded, abstract), host)


def _together(work: Callable[[], Any]) -> Any:
    """Returns the result of `work`; raises Damaged on all processes if it fails on one."""
    result, reason = None, ""
    with _quietly(), _kept_young():
        try:
            result = work()
        except Exception as error:  # an incomplete file raises one of a dozen unrelated types
            if _is_of_the_machine(error):
                raise
            reason = reason_of(error)
        if reason:
            gc.collect(0)  # frees what Orbax has left, while warnings are silenced
            _close_abandoned()
    reasons = [each for each in processes.all_texts(reason) if each]
    if reasons:
        raise Damaged(reasons[0])
    return result


def _close_abandoned() -> None:
    """Closes coroutines that Orbax created and, after a failed read, did not finish. Otherwise
    whatever holds their traceback, such as a log record, would free them later, each with a
    warning. Nothing is saved during a read, so none of them will continue.
    """
    for generation in (0, 1):
        for each in gc.get_objects(generation):
            if type(each) is types.CoroutineType and "orbax" in each.cr_code.co_filename:
                with contextlib.suppress(Exception):  # the coroutine's own, or it is running
                    each.close()


@contextlib.contextmanager
def _kept_young() -> Iterator[None]:
    """Pauses garbage collection, so that new objects stay in the youngest generation: searching the
    others takes seconds in a process that has compiled much.
    """
    is_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_on:
            gc.enable()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silences warnings about the coroutines that Orbax abandons when a read fails."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        sys.unraisablehook = hook


def _is_of_the_machine(error: Exception) -> bool:
    """Returns whether an error says nothing about the files: no device memory, or a lost peer."""
    is_full = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    return is_full or processes.is_lost_peer(error)


def _check_host(directory, step: int, host: dict, host_names: Sequence[str]) -> None:
    for name in host_names:
        if name not in host:
            raise Damaged(f"it has no {name!r}")
    own = identity_of(directory.parent)
    if checksums.SEAL not in host:
        if own.get("run_id") or set(host) - OLD_NAMES:
            raise Damaged("it has no checksums")
        return
    if not checksums.is_sealed(host):
        raise Damaged("the checksum of its host values does not match")
    if host["step"] != step:
        raise Damaged(f"it holds step {host['step']}")
    difference = find_difference(directory.parent, host)
    if difference:
        raise Damaged(difference)


def _check_arrays(state: Any, saved: dict) -> None:
    wrong = checksums.find_mismatch(state, saved)
    if wrong is not None:
        raise Damaged(f"the checksum of {wrong} does not match")


def say(text: str) -> None:
    if processes.is_main():
        print(text, file=sys.stderr, flush=True)


def eval_loss(directory: pathlib.Path, step: int) -> float | None:
    """Returns the held-out loss stored with a checkpoint; None if there is none."""
    place = directory / str(step)
    try:
        values = read_json(place / "_CHECKPOINT_METADATA")["custom_metadata"]
        if checksums.SEAL not in values:  # written by an older version
            values = read_json(place / "metrics" / "metrics")
        loss = values["eval_loss"]
    except (UserError, KeyError, TypeError):
        return None
    return loss if isinstance(loss, int | float) and math.isfinite(loss) else None


def without_empty(tree: Any) -> Any:
    """Returns the tree without arrays of size 0, which Orbax refuses: a dense model has ranks [0,
    0].
    """
    return jax.tree.map(lambda leaf: leaf if leaf.size else None, tree)


def _with_empty(tree: Any, abstract: Any) -> Any:
    """Inverts `without_empty`."""

    def leaf(wanted, found):
        return found if wanted.size else jnp.zeros(wanted.shape, wanted.dtype)

    return jax.tree.map(leaf, abstract, tree)


def _check_leaves(saved: Any, abstract: Any) -> None:
    """Compares dtypes and shapes before loading, because Orbax silently casts a leaf of another
    dtype.
    """
    leaves = jax.tree.leaves_with_path(saved)
    found = {leaf_name(path): (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in leaves}
    for path, leaf in jax.tree.leaves_with_path(abstract):
        name, expected = leaf_name(path), (tuple(leaf.shape), str(leaf.dtype))
        if found.get(name) != expected:
            raise Damaged(f"{name} is {found.get(name)}, but this run needs {expected}")


def reason_of(error: Exception) -> str:
    """Returns the first line of an error, without the specification that TensorStore appends."""
    first = first_line(error)
    for more in (" [tensorstore", " See full TensorStore"):
        first = first.partition(more)[0]
    return first.rstrip(". ")
