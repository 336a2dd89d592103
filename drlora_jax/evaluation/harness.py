"""Runs tasks of lm-evaluation-harness in this process on our models.

    prepared = prepare(["arc_easy"], Settings(limit=100))
    for samples, scores in run(prepared, loaded): ...

The harness writes the prompts and computes the metrics; `JaxLM` answers the requests, and the
results are scores and samples like those of every other task here. Definitions in the user's folder
(`--task-path`) whose data are local need no network. A definition may name Python functions, which
are executed: use only folders that you trust. Tasks that run programs written by a model are
refused, since the harness does not isolate them.

No process is forked, which would deadlock under JAX: standard errors are therefore computed here
and not by the harness.
"""

import dataclasses
import importlib.metadata
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from drlora_jax.data.wording import Writer
from drlora_jax.errors import UserError
from drlora_jax.evaluation import harness_scores, results
from drlora_jax.evaluation.records import Sample, Score, Settings, text_hash
from drlora_jax.evaluation.tasks import chosen
from drlora_jax.inference.model import Loaded
from drlora_jax.system.imports import load_package
from drlora_jax.system.paths import local_path
from drlora_jax.system.text import did_you_mean, first_line

INSTALL = "'drlora-jax[eval]'"
PREFIX = "lm_eval:"  # prefix of a task's name in scores: our own arc_easy is a different task
SHOT_SEED = 1234  # the harness's own seed for drawing examples; --seed is added


class Prepared(NamedTuple):
    """Holds checked tasks with their data; no model is needed yet."""

    found: Mapping[str, Any]  # tasks and groups, as loaded by the harness
    settings: Settings
    writer: Writer | None = None  # writer of chats; None: plain prompts


def prepare(
    names: Sequence[str],
    settings: Settings,
    *,
    writer: Writer | None = None,
    shots: int | None = None,
    task_path: str | None = None,
) -> Prepared:
    """Finds tasks, groups and tags by name, and reads their data.

    Args:
      writer: Writer of chats, for `settings.chat`.
      shots: Examples before each question; None: each task's own number.
      task_path: A folder of task definitions (.yaml), which is searched first.
    """
    load_package("lm_eval", f"--tasks {','.join(names)}", install=INSTALL)
    for name in ("system", "template"):
        if getattr(settings, name) is not None and writer is None:
            raise UserError(f"--{name}: harness tasks use no template by default; add --chat.")
    manager = _manager(names, task_path)
    for name in names:
        _check_name(name, manager, task_path)
    found = _load(manager, names)
    for name, task in found["tasks"].items():
        _check_task(name, task)
        _set_up(task, settings, shots)
    return Prepared(found, settings, writer)


def run(
    prepared: Prepared, loaded: Loaded, *, adapter_fingerprint: str | None = None
) -> list[tuple[list[Sample], list[Score]]]:
    """Returns samples and scores of every task, followed by groups, which have no samples."""
    from lm_eval.evaluator import evaluate

    from drlora_jax.evaluation.harness_model import JaxLM

    settings = prepared.settings
    model = JaxLM(
        loaded,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        seed=settings.seed,
        writer=prepared.writer,
        has_system=settings.system is not None,
    )
    output = evaluate(
        lm=model,
        task_dict=prepared.found,
        samples=_parts(prepared),
        bootstrap_iters=0,
        system_instruction=settings.system,
        apply_chat_template=bool(settings.chat),
        fewshot_as_multiturn=bool(settings.chat),
    )
    answered = {}
    for name, task in prepared.found["tasks"].items():
        entries = output["samples"][name]
        common = _common(name, task, entries, settings, loaded)
        common["adapter_fingerprint"] = adapter_fingerprint
        values = harness_scores.values_of(task, entries, output["results"][name])
        scores = [Score(**value._asdict(), **common) for value in values]
        answered[name] = harness_scores.samples_of(task, entries), scores
    return [*answered.values(), *_groups(prepared, output, answered)]


# ---------------------------------------------------------------------------------------- prepare


def _manager(names: Sequence[str], task_path: str | None):
    """Returns the index of task definitions, only of the user's folder if it has all of them."""
    from lm_eval.tasks import TaskManager

    if task_path is not None:
        folder = local_path(task_path, "--task-path")
        if not folder.is_dir():
            raise UserError(f"--task-path {task_path} is not a directory; give a folder of tasks.")
        manager = TaskManager(include_path=folder, include_defaults=False)
        if all(name in manager.task_index for name in names):
            return manager
        task_path = folder
    # This reads about ten thousand files.
    print("reading the task definitions of lm-evaluation-harness ...", file=sys.stderr, flush=True)
    return TaskManager(include_path=task_path)


def _check_name(name: str, manager, task_path: str | None) -> None:
    index = manager.task_index
    if name not in index:
        hint = did_you_mean(name, index, count=3) or "see its list of tasks."
        where = f" or in --task-path {task_path}" if task_path else ""
        raise UserError(f"--tasks {name}: no such task in lm-evaluation-harness{where}; {hint}")
    # Checked before loading, which may already download and run code.
    for config in _definitions(name, index):
        if config.get("unsafe_code"):
            raise _unsafe(config.get("task", name))


def _definitions(name: str, index: Mapping) -> Iterator[Mapping]:
    """Yields the definitions that a task, group or tag consists of, with functions unresolved."""
    entry = index.get(name)
    if entry is None:
        return
    config = entry.cfg or {}
    members = config.get("task", []) if "group" in config else sorted(entry.tags)
    if "group" not in config and config:
        yield config
        return
    for member in [members] if isinstance(members, str) else members:
        if isinstance(member, str):
            yield from _definitions(member, index)
        else:
            yield member


def _unsafe(name: str) -> UserError:
    return UserError(
        f"--tasks {name}: the harness would run programs that the model wrote without isolating "
        "them. This package runs humaneval and mbpp in isolation: --tasks humaneval "
        "--allow-code-execution."
    )


def _load(manager, names: Sequence[str]) -> Mapping:
    # Otherwise `datasets` reports every load to the hub, even of local files.
    load_package("datasets.config", "Reading a task").HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        return manager.load(list(names))
    except Exception as error:  # definitions contain third-party code and name arbitrary data
        reason = first_line(error)
        raise UserError(
            f"--tasks {','.join(names)}: the task cannot be loaded: {type(error).__name__}: "
            f"{reason} Its definition names the data; without a network, use one with local files "
            "in --task-path DIR."
        ) from error


def _check_task(name: str, task) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise _unsafe(name)
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"--tasks {name} contains images or sound; only text is supported.")


def _set_up(task, settings: Settings, shots: int | None) -> None:
    """Sets the number of examples, their seed and the length of answers."""
    # As in the harness: a task that sets 0 itself has no examples to give.
    if shots is not None and task.config.num_fewshot != 0:
        task.set_config(key="num_fewshot", value=shots)
    elif task.config.num_fewshot is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=SHOT_SEED + settings.seed)
    if settings.max_new_tokens and task.OUTPUT_TYPE == "generate_until":
        value = {"max_gen_toks": settings.max_new_tokens}
        task.set_config(key="generation_kwargs", value=value, update=True)


# -------------------------------------------------------------------------------------------- run


def _parts(prepared: Prepared) -> dict[str, list[int]]:
    """Returns the sampled documents of tasks with more than --limit, drawn as for our tasks."""
    sizes = {name: len(task.eval_docs) for name, task in prepared.found["tasks"].items()}
    limit = prepared.settings.limit
    return {
        name: chosen(range(size), prepared.settings)
        for name, size in sizes.items()
        if limit is not None and limit < size
    }


def _common(name: str, task, entries, settings: Settings, loaded: Loaded) -> dict:
    """Returns the fields that all scores of a task share."""
    names = ("limit", "chat", "template", "system", "max_new_tokens", "max_length")
    stored = settings.stored(names) | {
        "shots": task.config.num_fewshot,
        "lm_eval": importlib.metadata.version("lm_eval"),
        "definition": text_hash([_json(task.dump_config())]),
    }
    label = f"{PREFIX}{name}"
    return results.about(loaded, settings.seed, stored, label=label) | {
        "task": label,
        "version": str(task.VERSION),
        "prompt_hash": text_hash(harness_scores.asked_texts(entries)),
        "data": _data_name(task),
        "data_fingerprint": text_hash(_json(document) for document in task.eval_docs),
    }


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _data_name(task) -> str:
    """Returns the name of a task's data in its definition."""
    config = task.config
    files = (config.dataset_kwargs or {}).get("data_files")
    if files:
        return files if isinstance(files, str) else _json(files)
    return ":".join(filter(None, (config.dataset_path, config.dataset_name)))


def _groups(prepared: Prepared, output: Mapping, answered: Mapping) -> Iterator[tuple]:
    for name, row in output.get("groups", {}).items():
        group = prepared.found["groups"][name]
        parts = [score for task in group.get_all_tasks() for score in answered[task.task_name][1]]
        common = dataclasses.asdict(parts[0]) | {
            "task": f"{PREFIX}{name}",
            "version": str(group.version),
            "samples": None,
        }
        for field in ("prompt_hash", "data", "data_fingerprint"):  # over all tasks of the group
            common[field] = text_hash(getattr(part, field) for part in parts)
        values = harness_scores.group_values(group, row, parts)
        yield [], [Score(**common | value._asdict()) for value in values]
