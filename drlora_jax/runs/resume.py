"""Decides what may change when a run is resumed: everything that does not change what is learned.

Paths, checkpointing, reports, evaluation, micro-batches, rematerialisation, kernels and the mesh
may change; a line reports those that change rounding. Instead of the settings of `data`, the
resulting training tokens are compared: equal tokens are the same data, wherever and however they
are read. Pure functions.
"""

import math
import os.path
from collections.abc import Callable, Sequence
from typing import NamedTuple

from drlora_jax import config as config_lib
from drlora_jax.config import TrainConfig, own_fields, to_dict
from drlora_jax.errors import UserError

# Paths, reports, and the length of the run.
FREE = ("train.steps", "train.epochs", "model.path", "train.eval_every")
HELDOUT = ("data.eval_path", "data.eval_split", "train.eval_batches")
# Ways to compute the same numbers: the result differs by rounding.
ROUNDING = ("train.micro_batches", "model.remat", "model.experts", "model.attention")
# Files of policies: the resulting ranks are compared.
RANK_FILES = tuple(name for name in config_lib.PLACES if name.startswith("allocation."))
# Of `data`: the order of documents and their rows, which the training tokens do not show.
ORDER = ("data.shuffle", "data.pack")
NAMED = 3  # refused changes that a message names


class Change(NamedTuple):
    name: str
    before: object
    now: object


def check_settings(where, stored: dict, config: TrainConfig) -> None:
    """Refuses settings that would make it another run; reads no data.

    Args:
      where: the run directory, for messages.
      stored: the content of its config.json.
    """
    has_tokens = bool(stored["data_fingerprint"])  # pretraining stores no digest of tokens
    refused = [
        change
        for change in _changes(stored, config)
        if not _may_change(change, stored, config)
        and not (has_tokens and _is_shown_by_tokens(change.name))
    ]
    if refused:
        raise UserError(
            f"run.dir={where} was created with {_listed(refused)}; undo the change or give a new "
            "run.dir. On resume, train.steps, paths, evaluation, train.micro_batches, model.remat, "
            "kernels and the mesh may change."
        )


def check_content(where, stored: dict, config: TrainConfig, origin: dict[str, str]) -> None:
    """Refuses a different base model or different training tokens."""
    before, now = stored["base_fingerprint"], origin["base_fingerprint"]
    if before != now:
        raise UserError(
            f"run.dir={where} was created with a base model different from model.path="
            f"{config.model.path} (base_fingerprint {before[:12]}, got {now[:12]}): the weights or "
            "the values of config.json differ; give the same base model or a new run.dir."
        )
    before, now = stored["data_fingerprint"], origin["data_fingerprint"]
    if before != now:
        changed = [each for each in _changes(stored, config) if _is_shown_by_tokens(each.name)]
        path = _shown(config.data.path)
        what = _listed(changed) if changed else f"data different from data.path={path} now"
        raise UserError(
            f"run.dir={where} was created with {what}: the training tokens differ "
            f"(data_fingerprint {before[:12]}, got {now[:12]}) because rows, tokenizer or the "
            "reading of rows have changed; restore them or give a new run.dir."
        )


def check_first_ranks(where, stored: dict, config: TrainConfig, ranks: list) -> None:
    """Refuses a different file of ranks or exponents if it gives other initial ranks."""
    changed = [each for each in _changes(stored, config) if each.name in RANK_FILES]
    if changed and stored.get("initial_ranks", ranks) != ranks:
        raise UserError(
            f"run.dir={where} was created with {_listed(changed)}, which gives different ranks; "
            "give the same file or a new run.dir."
        )


def changed_lines(
    stored: dict, config: TrainConfig, origin: dict[str, str], devices: dict | None = None
) -> list[str]:
    """Returns the lines to print about changes that are allowed.

    Args:
      devices: `kind` and `mesh` (axis: size) of this start; None: do not compare them.
    """
    changes = _changes(stored, config)
    rounding = [each for each in changes if each.name in ROUNDING or each.name == "mesh.exchange"]
    if devices is not None and "devices" in stored:
        rounding += _device_changes(stored["devices"], devices)
    lines = []
    if rounding:
        listed = ", ".join(f"{c.name}={_shown(c.now)} (was {_shown(c.before)})" for c in rounding)
        lines.append(f"resume      {listed}: equal up to rounding, not bit for bit")
    line = _heldout_line(stored, origin, changes)
    return [*lines, line] if line else lines


def rate_line(
    logged: tuple[int, float] | None,
    schedule: Callable[[int], float],
    *,
    done: int,
    first_total: int,
    total: int,
    name: str = "train.steps",
) -> str | None:
    """Returns the line to print if the learning rate does not continue smoothly.

    Args:
      logged: the newest logged step and its rate.
      schedule: the current schedule, from completed steps to the rate.
      done: completed steps.
      first_total: total steps of the run when it was created.
      total: total steps now.
      name: the field that sets the steps.
    """
    if logged is None or done >= total:
        return None
    step, before = logged
    if math.isclose(schedule(step - 1), before, rel_tol=1e-4, abs_tol=1e-12):
        return None
    now = schedule(done)
    direction = "rises" if now > before else "drops"
    return (
        f"resume      the learning rate {direction} from {before:.2e} at step {step} to "
        f"{now:.2e} at step {done + 1} ({name} {first_total} -> {total}); warm-up is not "
        "repeated"
    )


def _heldout_line(stored: dict, origin: dict[str, str], changes: Sequence[Change]) -> str | None:
    before, now = stored.get("heldout_fingerprint"), origin.get("heldout_fingerprint", "")
    if before is None:  # an older run: only its settings can be compared
        is_another = any(change.name in HELDOUT for change in changes)
    else:
        is_another = before != now
    if not is_another:
        return None
    if not now:
        return "resume      no held-out loss is measured from now on"
    if before == "":
        return "resume      held-out loss is measured from now on; the run started without it"
    return (
        "resume      the held-out set has changed: eval_loss is not comparable with earlier "
        "values, and the best checkpoint is chosen among both"
    )


def _device_changes(before: dict, now: dict) -> list[Change]:
    if not isinstance(before, dict):  # edited by hand: it is only a record
        return []
    found = []
    if before.get("kind") != now["kind"]:
        found.append(Change("devices", before.get("kind"), now["kind"]))
    sizes = before.get("mesh")
    sizes = sizes if isinstance(sizes, dict) else {}
    return found + [
        Change(f"mesh.{axis}", sizes[axis], size)
        for axis, size in now["mesh"].items()
        if axis in sizes and sizes[axis] != size
    ]


def _changes(stored: dict, config: TrainConfig) -> list[Change]:
    # Fields that are newer than the run had their defaults.
    known = {name: own_fields(name, fields) for name, fields in stored["config"].items()}
    before = _flat(to_dict(TrainConfig())) | _flat(known)
    now = _flat(to_dict(config))
    return [Change(name, before[name], now[name]) for name in now if before[name] != now[name]]


def _may_change(change: Change, stored: dict, config: TrainConfig) -> bool:
    section = change.name.partition(".")[0]
    if section == "mesh" or (section == "run" and change.name != "run.seed"):
        return True
    if change.name in RANK_FILES:
        is_shown = "initial_ranks" in stored and config.allocation.own.first_ranks_show_files()
        return is_shown or _is_same_file(change)
    return change.name in (*FREE, *HELDOUT, *ROUNDING)


def free_names() -> list[str]:
    """Returns the fields that may change when a run is resumed, at least in some cases."""
    return sorted(
        name
        for name in _flat(to_dict(TrainConfig()))
        if (name.startswith(("mesh.", "run.")) and name != "run.seed")
        or name in (*FREE, *HELDOUT, *ROUNDING, *RANK_FILES)
        or _is_shown_by_tokens(name)
    )


def _is_same_file(change: Change) -> bool:
    paths = (change.before, change.now)
    return None not in paths and len({os.path.realpath(path) for path in paths}) == 1


def _is_shown_by_tokens(name: str) -> bool:
    return name.startswith("data.") and name not in (*HELDOUT, *ORDER)


def _flat(config: dict) -> dict:
    flat = {f"{s}.{name}": value for s, fields in config.items() for name, value in fields.items()}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in flat.items()}


def _listed(changes: Sequence[Change]) -> str:
    """Lists the changes, each as `name=before, got now`."""
    named = [f"{c.name}={_shown(c.before)}, got {_shown(c.now)}" for c in changes[:NAMED]]
    more = len(changes) - len(named)
    return ", and with ".join(named) + (f" (and {more} more)" if more else "")


def _shown(value) -> str:
    """Returns a value as it is written on the command line."""
    if value is None:
        return "none"
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
