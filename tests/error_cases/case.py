"""What a case is, the folder it runs in, and how it is run and watched."""

import contextlib
import functools
import io
import pathlib
import shutil
import sys
import warnings
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import jax

from drlora_jax import cli, train
from drlora_jax.models.transformer import abstract_params
from drlora_jax.ops.native import library
from drlora_jax.training import job
from tests.support.tiny import OLMOE, write_rows, write_tiny_model

CONFIG = """
from drlora_jax.config import *

def get_config():
    return TrainConfig(
        run=RunSection(dir="run", log_every=1, checkpoint_every=5),
        model=ModelSection(path="model"),
        data=DataSection(path=("rows.jsonl",)),
        train=TrainSection(
            steps=12, batch_size=8, sequence_length=64, learning_rate=1e-2, warmup_ratio=0.25
        ),
        adapter=AdapterSection(targets=("up", "down", "q"), rank=3),
        allocation=AllocationSection(r_init=1, r_target=2, r_max=4, interval=4, p_grow=0.5),
        mesh=MeshSection(data=1),
    )
"""
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0f1e2d\nsize 1234\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"
DENIED = b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code></Error>'
HACKED = "hacked"  # the file that hostile content tries to make
# Python's own names of what code from a model or a data set could do.
HOSTILE_EVENTS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen")
HOSTILE_EVENTS += ("socket.connect", "pickle.find_class", "marshal.loads")
_watched: list[str] | None = None


class Case(NamedTuple):
    kind: str
    what: str  # is wrong, in words: unique in its kind
    message: str  # regular expression
    overrides: tuple[str, ...] = ()
    make: Callable[[pathlib.Path], None] | None = None  # breaks something in the folder
    around: Callable[[], contextlib.AbstractContextManager] | None = None  # while it runs
    config: str | None = "config.py"
    code: int = 2
    varies: str = ""  # the part of the message that other versions of a library word otherwise


class Outcome(NamedTuple):
    code: int
    errors: list[str]  # lines of standard error
    written: set[str]  # files that are new or changed
    arrays: int  # more on devices than before
    events: list[str]  # what hostile code would do


def make_world(folder: pathlib.Path) -> pathlib.Path:
    """The good folder that each case gets a copy of."""
    write_tiny_model(folder / "model", OLMOE)
    write_rows(folder / "rows.jsonl", 40)
    (folder / "config.py").write_text(CONFIG)
    return folder


def run_case(case: Case, world: pathlib.Path, folder: pathlib.Path) -> Outcome:
    """Breaks a copy of the good folder and runs the command line in it."""
    shutil.copytree(world, folder)
    if case.make:
        case.make(folder)
    return run_command(folder, arguments(case), case.around)


def arguments(case: Case) -> list[str]:
    return [*(["--config", case.config] if case.config else []), *case.overrides]


def run_command(folder: pathlib.Path, argv: list[str], around=None) -> Outcome:
    """`python -m drlora_jax.train` in this process, its end and what it did."""
    library.why_not()  # the compiler is not run by what a case brings
    before, arrays = _state_of(folder), len(jax.live_arrays())
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(folder))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        compilation = mock.Mock(side_effect=AssertionError("the mistake was not refused"))
        stack.enter_context(mock.patch.object(train, "compile_step", compilation))
        stack.enter_context(mock.patch.object(job, "abstract_params", _abstract_params))
        if around:
            stack.enter_context(around())
        events = stack.enter_context(watching())
        try:
            cli.run_and_exit(lambda: train.main(argv), memory_advice=cli.TRAINING_ADVICE)
        except SystemExit as end:
            code = end.code
    changed = {name for name, state in _state_of(folder).items() if before.get(name) != state}
    arrays = len(jax.live_arrays()) - arrays
    return Outcome(code, err.getvalue().splitlines(), changed, arrays, events)


# Nearly all cases have the same model; the trace that this takes is most of their time.
_abstract_params = functools.cache(abstract_params)


def _state_of(folder: pathlib.Path) -> dict[str, tuple]:
    files = (file for file in folder.rglob("*") if "__pycache__" not in file.parts)
    return {
        file.relative_to(folder).as_posix(): (file.lstat().st_mtime_ns, file.lstat().st_size)
        for file in files
        if not file.is_dir()
    }


@contextlib.contextmanager
def watching():
    """Yields a list that gets the name of every hostile event in it."""
    global _watched
    _start_audit()
    _watched = []
    try:
        yield _watched
    finally:
        _watched = None


def _start_audit(done: list = []) -> None:  # noqa: B006  (once a process: a hook stays for good)
    if not done:
        done.append(True)
        sys.addaudithook(_note)


def _note(event: str, values) -> None:
    if _watched is not None and event in HOSTILE_EVENTS and not _is_own(event):
        _watched.append(event)


def _is_own(event: str) -> bool:
    """Python reads compiled modules with marshal as it imports them."""
    return event == "marshal.loads" and sys._getframe(2).f_code.co_filename.startswith("<frozen")
