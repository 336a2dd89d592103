"""Around the run: packages, devices, disk, permissions, damaged checkpoints, bad numbers.

Some of these end a run that has started (exit code 1). They take steps of a program that computes
nothing, so that no case waits for a compilation; everything else is the real run.
"""

import contextlib
import functools
import os
import pathlib
import resource
import shutil
import sys
from unittest import mock

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from drlora_jax import train
from drlora_jax.runs.directory import RunDirectory
from tests.error_cases.case import Case
from tests.error_cases.run import IN_USE

FULL = "/dev/full"  # every write to it fails as on a full disk


def _refused(what: str, message: str, *overrides: str, **options) -> Case:
    return Case("environment", what, message, overrides, **options)


def _failed(what: str, message: str, around, make=None, *overrides: str, **options) -> Case:
    return Case("run", what, message, overrides, make, around, code=1, **options)


# ------------------------------------------------------------------------------- before a run


def _without(*packages: str):
    return lambda: mock.patch.dict(sys.modules, dict.fromkeys(packages))


def _raising(target: str, error: BaseException):
    return lambda: mock.patch(target, side_effect=error)


def _empty(*names: str):
    def make(folder: pathlib.Path) -> None:
        for name in names:
            (folder / name).write_bytes(b"")

    return make


def _no_access():
    return mock.patch("os.access", return_value=False)


def _no_room():
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    return mock.patch("shutil.disk_usage", return_value=usage)


@functools.cache
def _built():
    """The run of the good folder, once; the current directory is one of its copies."""
    from drlora_jax.config import load_config
    from drlora_jax.training.job import prepare

    return train.build(prepare(load_config("config.py")))


@contextlib.contextmanager
def running(step=None):
    """Runs without compilation: `step` says what the metrics of a step are, or raises."""

    def take(params, state, batch):
        values = {"loss": 1.0, "grad_norm": 1.0, "weight_LE": None, "load_LE": None}
        return state._replace(step=state.step + 1), values | (step() if step else {})

    with contextlib.ExitStack() as stack:
        built = _built()
        patches = {
            "build": lambda job: built._replace(job=job),
            "compile_step": lambda run: (take, 0.0),
            "memory_lines": lambda *values: [],
            "ReportWriter": mock.MagicMock(),  # it would read a device that never ends
        }
        for name, value in patches.items():
            stack.enter_context(mock.patch.object(train, name, value))
        stack.enter_context(_nothing_kept())
        yield


@contextlib.contextmanager
def _nothing_kept():
    """No program goes to the tests' cache of compiled ones: with a full disk it would be half of
    one, and break whoever reads it.
    """
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, float("inf"))
    try:
        yield
    finally:
        jax.config.update(name, before)


# ------------------------------------------------------------------------------- while it runs


def _full_at(name: str):
    """The disk is full when this file of the run directory is written for the first time."""

    @contextlib.contextmanager
    def around():
        cut_back = RunDirectory.cut_back

        def then_fill(self, *args):
            notes = cut_back(self, *args)
            (self.path / name).symlink_to(FULL)
            return notes

        with running(), mock.patch.object(RunDirectory, "cut_back", then_fill):
            yield

    return around


@contextlib.contextmanager
def _files_of_4_kib():
    """No file may grow beyond 4 KiB once the run is set up: too little for a checkpoint."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    cut_back = RunDirectory.cut_back

    def then_limit(self, *args):
        notes = cut_back(self, *args)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        return notes

    try:
        with running(), mock.patch.object(RunDirectory, "cut_back", then_limit):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _full_config(folder: pathlib.Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "config.json.tmp").symlink_to(FULL)


def _nan_base(folder: pathlib.Path) -> None:
    file = folder / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.o_proj.weight"][3, 5] = np.nan
    save_file(tensors, file)


def _diverging():
    return running(lambda: {"loss": float("nan")})


def _out_of_memory():
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.")
    return running(mock.Mock(side_effect=error))


def _damaged(what: str, message: str, damage, **options) -> Case:
    """A finished run that is to go on, of whose checkpoints, each of them, something is gone."""

    def make(folder: pathlib.Path) -> None:
        from tests.error_cases.case import run_command

        outcome = run_command(folder, ["--config", "config.py"], running)
        assert outcome.code == 0, outcome
        for step in ("10", "12"):
            damage(folder / "run" / "checkpoints" / step)

    message = f"Checkpoint 12 of run/checkpoints is damaged or incomplete: .*{message}"
    return _failed(what, message, running, make, "train.steps=20", **options)


def _unlink(name: str):
    def damage(checkpoint: pathlib.Path) -> None:
        path = checkpoint / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def _emptied(checkpoint: pathlib.Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def _junk(name: str):
    return lambda checkpoint: (checkpoint / name).write_text("{")


CASES = (
    _refused(
        "no package transformers",
        "Loading a tokenizer needs the package transformers .*pip install transformers",
        around=_without("transformers"),
    ),
    _refused(
        "no package datasets, for a name on the hub",
        "owner/name is not a file.*pip install datasets",
        "data.path=owner/name",
        around=_without("datasets"),
        varies=r"\(import.*?\)",
    ),
    _refused(
        "no package pyarrow, for Parquet",
        "Reading x.parquet needs the package pyarrow",
        "data.path=x.parquet",
        make=_empty("x.parquet"),
        around=_without("pyarrow", "pyarrow.parquet"),
    ),
    _refused(
        "no package huggingface_hub, for a name on the hub",
        "pip install huggingface_hub",
        "model.path=owner/name",
        around=_without("huggingface_hub"),
    ),
    _refused(
        "no network, for a model on the hub",
        r"model.path=owner/name is not a local directory, and downloading it from the hub failed",
        "model.path=owner/name",
        around=_raising("huggingface_hub.snapshot_download", ConnectionError("no route")),
    ),
    _refused(
        "no network, for rows on the hub",
        "as a `datasets` name .split train. it does not load: ConnectionError: no route",
        "data.path=owner/name:main",
        around=_raising("datasets.load_dataset", ConnectionError("no route")),
    ),
    _refused(
        "no device",
        "jax finds no device .Unable to initialize backend 'cuda'.; check JAX_PLATFORMS",
        around=_raising("jax.device_count", RuntimeError("Unable to initialize backend 'cuda'")),
    ),
    _refused("no permission at run.dir", "cannot be written: no permission", around=_no_access),
    _refused(
        "no room for the checkpoints", "1000 B of free space, but the run needs", around=_no_room
    ),
    _refused(
        "a full disk as the run is created",
        "run.dir=run cannot be written: No space left on device",
        make=_full_config,
        around=running,
    ),
    _refused(
        "a run directory that can be read only",
        "run.dir=run cannot be written: Read-only file system",
        around=lambda: _read_only(),
    ),
    IN_USE,
    _failed(
        "a full disk at metrics.jsonl",
        "run/metrics.jsonl cannot be written: No space left on device",
        _full_at("metrics.jsonl"),
    ),
    _failed(
        "a full disk at ranks.jsonl",
        "run/ranks.jsonl cannot be written: No space left on device",
        _full_at("ranks.jsonl"),
    ),
    _failed(
        "no room for a checkpoint",
        "checkpoint.* could not be written: .*File too large",
        _files_of_4_kib,
        varies="(?<=could not be written: ).*?(?=File too large)",
    ),
    _failed("NaN in the base", "attention/o/kernel contain NaN or infinity", _diverging, _nan_base),
    _failed("a loss that is NaN", "loss is nan at step 1; lower train.learning_rate", _diverging),
    _failed(
        "devices without memory",
        "out of memory; with more train.micro_batches",
        _out_of_memory,
    ),
    _failed(
        "a host without memory",
        "out of memory; with more train.micro_batches",
        lambda: running(mock.Mock(side_effect=MemoryError())),
    ),
    _damaged(
        "a checkpoint without arrays",
        "PyTree",
        _unlink("state"),
        varies=r"(?<=whole: ).*?(?=; so are)",
    ),
    _damaged(
        "a checkpoint without host values", "it has no 'tokens'", _unlink("_CHECKPOINT_METADATA")
    ),
    _damaged(
        "a checkpoint with broken host values", "it has no 'tokens'", _junk("_CHECKPOINT_METADATA")
    ),
    _damaged("a checkpoint with broken metadata", "cannot be read", _junk("state/_METADATA")),
    _damaged("an empty checkpoint", "PyTree", _emptied, varies=r"(?<=whole: ).*?(?=; so are)"),
)


def _read_only():
    """Reports every file that is opened for writing as one of a read-only file system."""
    error, really_open = OSError(30, os.strerror(30)), os.open

    def open_(path, flags, *options, **more):
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise error
        return really_open(path, flags, *options, **more)

    stack = contextlib.ExitStack()
    stack.enter_context(running())
    stack.enter_context(mock.patch("os.open", open_))
    return stack
