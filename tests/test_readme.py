"""The Python examples of the README run as they stand, and its commands name what there is."""

import importlib.util
import pathlib
import re
import shlex

import numpy as np
import pytest

from drlora_jax import train
from drlora_jax.allocation import CapacityShapes
from drlora_jax.training.state import start
from tests.support.stepper import Stepper

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("number", [0, 1])
def test_an_example_runs(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jax.device_count", lambda: 1)  # as on the machine of a reader
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_policy_example_is_a_policy():
    names = {}
    exec(compile(BLOCKS[2], "README policy", "exec"), names)
    policy = names["halfway"](CapacityShapes(2, 2, 4, 8), low=2, high=6, step=10)
    frequency_LE = np.array([[1, 4, 3, 2], [4, 3, 2, 1]], np.float32)
    state, _, _ = policy.update(policy.init(), frequency_LE, 10)
    assert state.ranks_LE.tolist() == [[2, 6, 6, 2], [6, 6, 2, 2]]
    assert (state.ranks_LE.sum(axis=1) == policy.budget).all()


def test_the_policy_example_runs(tmp_path):
    names = {}
    exec(compile(BLOCKS[2], "README policy", "exec"), names)
    stepper = Stepper(tmp_path)
    shapes = CapacityShapes(2, 2, 4, 4)
    job = stepper.job._replace(policy=names["halfway"](shapes, low=1, high=3, step=2))
    stepper.run, stepper.job = train.build(job), job
    stepper.position = start(stepper.run)
    for _ in range(3):
        stepper.step()
    assert sorted(stepper.position.capacity.ranks_LE[0].tolist()) == [1, 1, 3, 3]


def test_examples_are_short():
    assert max(len(block.strip().splitlines()) for block in BLOCKS) <= 20


def test_quick_start_has_two_shell_blocks():
    section = README.split("## Quick start")[1].split("\n## ")[0]
    assert len(re.findall(r"```sh\n", section)) == 2


# ---------------------------------------------------------------------------------------------
# files that are named

FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("*/README.md"))]
CONFIGS = sorted(ROOT.glob("configs/*.py"))
# What a reader has, or what a command writes.
READERS_OWN = re.compile(
    r"/.*|runs/.*|(train|heldout|rows)\.jsonl|(alpha|comparison)\.\w+|adapter/"
)
FILE = re.compile(r"[\w./-]*\w\.[a-z]{2,12}")


def commands(document: pathlib.Path) -> list[list[str]]:
    """Words of every command: of shell blocks, or of a config's docstring."""
    text = document.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.S)
    if document.suffix == ".py":
        blocks = re.findall(r"^    (python .*(?:\\\\\n.*)*)$", text, re.M)
    lines = "\n".join(blocks).replace("\\\\\n", "\\\n").replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def missing(words: list[str]) -> list[str]:
    """What a command names and is neither here nor the reader's own."""
    found = []
    for option, word in zip(["", *words], words, strict=False):
        for name in re.split(r"[=,]", re.sub(r"^\w+\.\w+=", "", word)):  # section.field=value
            is_path = name.split("/")[0] in FOLDERS or FILE.fullmatch(name)
            if option == "-m":
                is_there = importlib.util.find_spec(name) is not None
            elif name.startswith("bundled:"):
                is_there = is_bundled(name.removeprefix("bundled:"))
            elif is_path and not READERS_OWN.fullmatch(name):
                is_there = any(ROOT.glob(name.rstrip("/")))
            else:
                is_there = option != "--config"
            found += [] if is_there else [name]
    return found


def is_bundled(name: str) -> bool:
    return (ROOT / "drlora_jax/bundled" / name).exists() or (ROOT / f"configs/{name}.py").exists()


NAMES_NOTHING = (
    "python -m drlora_jax.no --config my_config.py tools/no.py bundled:no data.path=a.csv"
)


def test_a_missing_file_would_be_found():
    wrong = ["drlora_jax.no", "my_config.py", "tools/no.py", "bundled:no", "a.csv"]
    assert missing(shlex.split(NAMES_NOTHING)) == wrong


@pytest.mark.parametrize("document", [ROOT / "README.md", *CONFIGS], ids=lambda path: path.name)
def test_commands_name_files_that_are_there(document):
    found = commands(document)
    assert found
    assert [name for words in found for name in missing(words)] == []


@pytest.mark.parametrize("document", [*DOCUMENTS, *CONFIGS], ids=lambda path: path.stem)
def test_texts_name_files_of_the_repository_that_are_there(document):
    text = document.read_text(encoding="utf-8")
    names = re.findall(r"`([\w.-]+/[\w./-]*\w)`|\]\(([\w./-]+)[#)]", text)
    paths = [name or link for name, link in names]
    here = [path for path in paths if path.split("/")[0] in FOLDERS or path.endswith(".md")]
    bases = (ROOT, document.parent)
    assert [path for path in here if not any((base / path).exists() for base in bases)] == []
