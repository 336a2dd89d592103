"""Turns the user's request into tasks with their items, and these into scores."""

import dataclasses
import functools
import hashlib
import importlib.util
import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from drlora_jax.config import TrainConfig
from drlora_jax.data.sources import BUNDLED, Row
from drlora_jax.data.tokenize import encode_prompt
from drlora_jax.data.wording import CHOICE, Writer
from drlora_jax.errors import UserError
from drlora_jax.evaluation import results, sources
from drlora_jax.evaluation.records import Sample, Score, Settings, text_hash
from drlora_jax.evaluation.sandbox import Sandbox
from drlora_jax.evaluation.tasks import TASKS, Task, Texts, Tools, Work, suggest
from drlora_jax.inference.generation import Generator
from drlora_jax.inference.model import Loaded
from drlora_jax.inference.scoring import score_continuations
from drlora_jax.inference.words import Words
from drlora_jax.parallel import processes
from drlora_jax.parallel.agreement import digest
from drlora_jax.runs.resolved import asked_wording, system_note
from drlora_jax.system.paths import local_path
from drlora_jax.system.text import counted

HARNESS = "lm_eval:"  # prefix of a task of lm-evaluation-harness
MAX_LENGTH = 2048  # tokens of context and answer together


class Request(NamedTuple):
    """Names a task, and its file if the user gave one."""

    name: str
    file: str | None


class Job(NamedTuple):
    """Holds a task with everything that is needed to answer it."""

    task: Task
    label: str  # name of its file of samples
    work: Work
    items: list
    data_fingerprint: str


def parse_requests(tasks: str | None, losses: Sequence[str]) -> tuple[list[Request], list[str]]:
    """Returns requests for our own tasks, and the names that go to lm-evaluation-harness."""
    ours, others = [], []
    for part in filter(None, (part.strip() for part in (tasks or "").split(","))):
        name, _, file = part.partition("=")
        if name in TASKS:
            ours.append(Request(name, file or None))
        else:
            others.append(_harness_task(part))
    return ours + [Request("loss", file) for file in losses], others


def _harness_task(name: str) -> str:
    if importlib.util.find_spec("lm_eval") is None:
        own = name.removeprefix(HARNESS).partition("=")[0]
        raise UserError(
            f"--tasks {name}: this package has no such task ({suggest(own)}). Other names run "
            "lm-evaluation-harness, which is not installed: pip install 'drlora-jax[eval]'."
        )
    return name.removeprefix(HARNESS)


def prepare_jobs(
    requests: Sequence[Request], settings: Settings, config: TrainConfig | None, texts: Texts
) -> list[Job]:
    """Reads all data and writes all prompts: mistakes are found before a model is loaded."""
    jobs = []
    for request in requests:
        if TASKS[request.name].is_code and not settings.allow_code:
            raise UserError(
                f"--tasks {request.name} runs programs that a model wrote; allow this with "
                "--allow-code-execution. They run in a process without network and files."
            )
        if request.name == "loss" and request.file is None:
            jobs += [_job(Request("loss", path), settings, texts) for path in _heldout(config)]
        else:
            jobs.append(_job(request, settings, texts))
    return jobs


def make_texts(
    settings: Settings, config: TrainConfig | None, words: Words, row_format: str | None = None
) -> Texts:
    """Returns how texts are read and written: as by the run, or without a run as by a new config.

    Args:
      config: Config of the run, with data settings overridden.
      row_format: Format of the run's rows, if the run did not record it.
    """
    known = config or TrainConfig()
    length = settings.max_length or known.train.sequence_length
    date = words.resolved.date if words.resolved else None
    section = known.data
    if words.is_run and words.resolved is None and section.special_tokens == "auto":
        section = dataclasses.replace(section, special_tokens="keep")  # as earlier versions did

    @functools.cache  # so that its note is printed once
    def find_own() -> Writer | None:
        writer = own_writer(settings, words, row_format)
        if writer is not None and not writer.wording.is_as_is and settings.system is None:
            _tell(system_note(words.resolved))
        return writer

    return Texts(words.tokenizer, find_own, section, length, date)


def own_writer(settings: Settings, words: Words, row_format: str | None) -> Writer | None:
    """Returns a writer with the wording of the run or of `--template`; None for plain text."""
    if settings.template is None and not words.is_run:
        return None
    like = words.wording(settings.template, row_format)
    wording = asked_wording(settings.template, row_format, words.tokenizer, like)
    if settings.template is None and (wording.is_as_is or wording.format == CHOICE):
        return None
    return Writer(wording, words.tokenizer)


def _tell(note: str | None) -> None:
    if note and processes.is_main():
        print(f"note: {note}", file=sys.stderr)


def _heldout(config: TrainConfig | None) -> tuple[str, ...]:
    if config is None or not config.data.eval_path:
        raise UserError("--tasks loss: the run has no data.eval_path; give a file as loss=FILE.")
    return config.data.eval_path


def _job(request: Request, settings: Settings, texts: Texts) -> Job:
    task = TASKS[request.name]
    if task.shots is None:
        settings = settings._replace(shots=0)
    if task.reads_itself:
        data = sources.Data(request.file, [], _file_digest(request.file))
    else:
        data = sources.read_source(task.name, task.source, request.file, settings.data_dir)
    work = Work(data.name, data.rows, _shots(task, data, settings), settings, texts)
    items = task.items(work)
    if not items:
        raise UserError(f"{data.name}: no item of {task.name} remains; give another file.")
    label = task.name
    if request.file:  # names and digests distinguish the samples of several files of one task
        stem = pathlib.PurePath(request.file.partition(":")[2] or request.file).name.split(".")[0]
        label = f"{task.name}-{stem}-{data.fingerprint[:6]}"
    return Job(task, label, work, items, data.fingerprint)


def _shots(task: Task, data: sources.Data, settings: Settings) -> list[Row]:
    """Returns the first rows of the task's file of examples."""
    if not settings.shots:
        return []
    found = sources.read_source(task.name, task.shots, None, settings.data_dir)
    if found.fingerprint == data.fingerprint:
        raise UserError(
            f"--shots {settings.shots}: the examples of {task.name} come from the evaluated file, "
            f"{data.name}; evaluate other rows."
        )
    if len(found.rows) < settings.shots:
        raise UserError(
            f"--shots {settings.shots}: {found.name} has {counted(len(found.rows), 'row')}."
        )
    return found.rows[: settings.shots]


def _file_digest(path: str) -> str:
    file = BUNDLED / path.removeprefix("bundled:") if path.startswith("bundled:") else path
    try:
        return hashlib.sha256(local_path(str(file)).read_bytes()).hexdigest()[:16]
    except OSError:
        return text_hash([path])  # a `datasets` name, or a path whose error reading will report


# -------------------------------------------------------------------------------------------- run


def make_tools(loaded: Loaded, settings: Settings, sandbox: Sandbox | None) -> Tools:
    length = settings.max_length or MAX_LENGTH
    generator = Generator(loaded, batch_size=settings.batch_size)

    def score(pairs):
        longest = max((len(continuation) for _, continuation in pairs), default=0)
        if longest > length:
            raise UserError(f"An answer has {longest} tokens; raise --max-length ({length}).")
        return score_continuations(loaded, pairs, batch_size=settings.batch_size, max_length=length)

    def generate(texts, stop, tokens):
        prompts = [
            encode_prompt(text, loaded.tokenizer) if isinstance(text, str) else text
            for text in texts
        ]
        return generator.generate(prompts, max_new_tokens=tokens, stop=stop)

    return Tools(loaded, score, generate, sandbox.run if sandbox else None)


def run_job(
    job: Job, tools: Tools, adapter_fingerprint: str | None
) -> tuple[list[Sample], list[Score]]:
    """Answers the items of a task; returns samples, and scores with all that reproduces them."""
    samples = job.task.answer(job.items, job.work, tools)
    loaded, settings = tools.loaded, job.work.settings
    stored = settings.stored(job.task.options)
    common = results.about(loaded, settings.seed, stored, label=job.label) | {
        "task": job.task.name,
        "version": job.task.version,
        "prompt_hash": text_hash(text for item in job.items for text in job.task.strings(item)),
        "data": job.work.path,
        "data_fingerprint": job.data_fingerprint,
        "adapter_fingerprint": adapter_fingerprint,
    }
    if job.task.chance is not None:
        common["chance"] = float(np.mean([job.task.chance(item) for item in job.items]))
    return samples, results.scores_of(samples, job.task.metrics, common)


def adapter_digest(loaded: Loaded) -> str | None:
    """Returns a digest of adapter weights and ranks, equal on any mesh; None for a base model."""
    if not loaded.is_adapted:
        return None
    leaves = map(processes.to_host, jax.tree.leaves(loaded.variables["lora"]))
    return digest(*leaves, loaded.ranks_LE)[:16]
