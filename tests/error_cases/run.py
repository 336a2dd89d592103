"""Run directories: something else, damaged, of another run, or in use."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys

from tests.error_cases.case import Case

DIGEST = r"\b[0-9a-f]{12}\b"


def _case(what: str, message: str, make, *overrides: str, **options) -> Case:
    return Case("run directory", what, message, overrides, make, **options)


def _written(name: str, content: str):
    def make(folder: pathlib.Path) -> None:
        (folder / "run").mkdir(exist_ok=True)
        (folder / "run" / name).write_text(content)

    return make


def _begun(**changes):
    """A run of this folder's config, model and rows, as its first checkpoint leaves it."""

    def make(folder: pathlib.Path) -> None:
        from drlora_jax.config import load_config
        from drlora_jax.training.job import prepare

        with contextlib.chdir(folder):
            job = prepare(load_config("config.py"))
            job.run_dir.create(job.config, job.origin, job.schedule_steps)
        (folder / "run" / "checkpoints" / "5").mkdir(parents=True)
        file = folder / "run" / "config.json"
        values = json.loads(file.read_text()) | changes
        values = {name: value for name, value in values.items() if value is not ...}
        file.write_text(json.dumps(values))

    return make


def _then(first, second):
    def make(folder: pathlib.Path) -> None:
        first(folder)
        second(folder)

    return make


def _flip_weight(folder: pathlib.Path) -> None:
    file = folder / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))


def _other_rows(folder: pathlib.Path) -> None:
    file = folder / "rows.jsonl"
    file.write_text(file.read_text().replace("plus", "minus"))


def _others(folder: pathlib.Path) -> None:
    text = (folder / "rows.jsonl").read_text()
    (folder / "others.jsonl").write_text(text.replace("plus", "minus"))


def _bad_row(folder: pathlib.Path) -> None:
    (folder / "rows.jsonl").write_text("{")


def _remains(folder: pathlib.Path) -> None:
    """Of a run whose config.json is lost, among files that may stay."""
    (folder / "run" / "checkpoints" / "5").mkdir(parents=True)
    for name in ("metrics.jsonl", "report.html", "eval.json", "train.log", ".DS_Store"):
        (folder / "run" / name).write_text("")


def _file_as_checkpoints(folder: pathlib.Path) -> None:
    (folder / "run" / "checkpoints" / "5").rmdir()
    (folder / "run" / "checkpoints").rmdir()
    (folder / "run" / "checkpoints").write_text("")


@contextlib.contextmanager
def locked_by_another_process():
    """The lock of ./run, held by a process of this host."""
    hold = "import sys; from drlora_jax.runs.lock import hold_lock; import pathlib\n"
    hold += "with hold_lock(pathlib.Path('run')): print('held', flush=True); sys.stdin.read()\n"
    root = pathlib.Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", hold],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    try:
        assert process.stdout.readline() == b"held\n"
        yield process
    finally:
        process.communicate()


CASES = (
    _case("a file", "run.dir=rows.jsonl is a file", None, "run.dir=rows.jsonl"),
    _case(
        "below a file",
        "run.dir=rows.jsonl/run cannot be written: rows.jsonl is a file",
        None,
        "run.dir=rows.jsonl/run",
    ),
    _case("a bucket", "run.dir=gs://b/run is a URL, but buckets", None, "run.dir=gs://b/run"),
    _case(
        "a file of elsewhere",
        "run.dir=file://a/b is not a URL of a local file",
        None,
        "run.dir=file://a/b",
    ),
    _case("a link to nothing", "is a link to nothing", lambda d: (d / "run").symlink_to("gone/x")),
    _case("a named pipe", "is a named pipe", lambda d: os.mkfifo(d / "run")),
    _case("a name too long", "name too long", None, f"run.dir={'x' * 300}"),
    _case(
        "what a run would write over",
        "run.dir=run has metrics.jsonl, checkpoints, report.html and 1 more, but no config.json",
        _remains,
    ),
    _case(
        "what a run would write over, and a bad row",
        "run.dir=run has metrics.jsonl, checkpoints",
        _then(_remains, _bad_row),
    ),
    _case("a model directory", "is not a run directory", None, "run.dir=model"),
    _case(
        "a config.json that is cut off",
        "config.json is not JSON.*new run.dir",
        _written("config.json", "{"),
    ),
    _case(
        "a config.json that is a list",
        "must hold a JSON object, got list",
        _written("config.json", "[]"),
    ),
    _case(
        "a config.json without its parts", "is not a run directory", _written("config.json", "{}")
    ),
    _case("a config that is text", "is not a run directory", _begun(config="x")),
    _case("a section that is a number", "is not a run directory", _begun(config={"run": 3})),
    _case("a schedule of no steps", "is not a run directory", _begun(schedule_steps=0)),
    _case("a schedule that is text", "is not a run directory", _begun(schedule_steps="12")),
    _case("a fingerprint that is null", "is not a run directory", _begun(base_fingerprint=None)),
    _case("no fingerprint", "is not a run directory", _begun(data_fingerprint=...)),
    _case(
        "a file as checkpoints",
        "checkpoints must be a directory",
        _then(_begun(), _file_as_checkpoints),
    ),
    _case(
        "another learning rate",
        "was created with train.learning_rate=0.01, got 0.5",
        _begun(),
        "train.learning_rate=0.5",
    ),
    _case(
        "several other values",
        r"with train.beta1=0.9, got 0.5, and with adapter.targets=up,down,q, got up,down, and with "
        r"allocation.last_event=none, got 7 \(and 1 more\)",
        _begun(),
        "allocation.gamma=2",
        "train.beta1=0.5",
        "adapter.targets=up,down",
        "allocation.last_event=7",
    ),
    _case(
        "another seed",
        "was created with run.seed=0, got 1; undo the change",
        _begun(),
        "run.seed=1",
    ),
    _case(
        "another setting, and a bad row",
        "was created with train.learning_rate=0.01, got 0.5",
        _then(_begun(), _bad_row),
        "train.learning_rate=0.5",
    ),
    _case(
        "fewer steps than the growth schedule needs",
        "train.steps=6 ends before the last event",
        _begun(),
        "train.steps=6",
    ),
    _case(
        "another base",
        r"a base model different from model.path=model \(base_fingerprint",
        _then(_begun(), _flip_weight),
        varies=DIGEST,
    ),
    _case(
        "other rows",
        "was created with data different from data.path=rows.jsonl now: the training tokens differ",
        _then(_begun(), _other_rows),
        varies=DIGEST,
    ),
    _case(
        "other rows in another file",
        "was created with data.path=rows.jsonl, got others.jsonl: the training tokens differ",
        _then(_begun(), _others),
        "data.path=others.jsonl",
        varies=DIGEST,
    ),
    _case(
        "the same rows read otherwise",
        "was created with data.loss_on=response, got all: the training tokens differ",
        _begun(),
        "data.loss_on=all",
        varies=DIGEST,
    ),
)
IN_USE = _case(
    "in use by another process",
    "run.dir=run is in use by process",
    None,
    around=locked_by_another_process,
    varies=r"process \d+ on \S+(?=;)",
)
