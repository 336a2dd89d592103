"""README and site: their Python and shell blocks work, and the generated reference is current.

A Python block runs as it stands. A shell block runs too, its commands in this process with settings
that make them cheap, unless a comment in front of it says what is checked instead:

    <!-- check: dry-run -->   the training is prepared, with a tiny model for each of /models
    <!-- check: syntax -->    bash parses it, its configs load and the files it names are there
"""

import importlib.util
import pathlib
import re
import shlex
import shutil
import subprocess

import pytest

from drlora_jax import export, train
from drlora_jax.config import load_config
from drlora_jax.training.job import prepare
from tests.support.tiny import OLMOE, TINY_LLAMA, write_rows, write_tiny_model

ROOT = pathlib.Path(__file__).parents[1]
GENERATED = {"docs/errors.md", "docs/reference/config.md", "docs/reference/cli.md"}
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = {str(file.relative_to(ROOT)): file for file in FILES}
PAGES = {name: NAMES[name].read_text(encoding="utf-8") for name in NAMES.keys() - GENERATED}
PAGES = dict(sorted(PAGES.items()))
BLOCK = re.compile(r"(?:^<!-- check: (\S+) -->\n)?^```(sh|bash|python)\n(.*?)^```$", re.M | re.S)
MARKS = {
    "README.md": ["syntax", "syntax", "dry-run"],
    "docs/evaluation.md": ["syntax"] * 2,
    "docs/getting-started.md": ["syntax", "dry-run"],
    "docs/guides/alphalora.md": ["syntax"],
    "docs/guides/export-and-serving.md": ["syntax"],
    "docs/guides/mixlora.md": ["dry-run", "syntax", "dry-run", "dry-run", "syntax"],
    "docs/guides/out-of-memory.md": ["syntax"],
    "docs/guides/own-data-and-model.md": ["dry-run"] * 2,
    "docs/methods.md": ["syntax"],
    "docs/results.md": ["syntax"],
    "docs/scaling.md": ["syntax"],
}
SMALL = ["model.path=olmoe", "data.path=train.jsonl", "data.eval_path=heldout.jsonl"]
SMALL += ["train.steps=6", "train.sequence_length=64", "train.eval_every=6"]
FEW_TOKENS = ["--max-new-tokens=4"]
RAN: set[tuple[str, ...]] = set()
CHEAPER = {"evaluate": ["--limit=2", *FEW_TOKENS], "generate": FEW_TOKENS}


def blocks(page: str) -> list[tuple[str, str, str]]:
    """(mark, language, text) of every block; the mark is empty for one that runs."""
    return BLOCK.findall(PAGES[page])


def commands(text: str) -> list[list[str]]:
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def module_of(words: list[str]) -> str:
    assert words[:2] == ["python", "-m"] and words[2].startswith("drlora_jax."), words
    return words[2].removeprefix("drlora_jax.")


def test_marks_are_those_that_are_listed():
    found = {page: [mark for mark, _, _ in blocks(page) if mark] for page in PAGES}
    assert {page: marks for page, marks in found.items() if marks} == MARKS


@pytest.mark.parametrize("page", PAGES)
def test_no_block_hides_from_the_tests(page):
    fences = re.findall(r"^ *(```\w*)$", PAGES[page], re.M)
    shown = [fence for fence in fences if fence not in ("```", "```text")]
    assert len(shown) == len(blocks(page))
    assert PAGES[page].count("<!-- check:") == len([mark for mark, *_ in blocks(page) if mark])


# ---------------------------------------------------------------------------------------------
# what runs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A clone as a reader has it, with runs/tiny, data of the reader's own, and tiny models."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("configs", "drlora_jax"):
        (folder / name).symlink_to(ROOT / name)
    write_tiny_model(folder / "olmoe", OLMOE)
    write_tiny_model(folder / "llama", TINY_LLAMA | {"num_hidden_layers": 4})
    for name in ("train.jsonl", "heldout.jsonl"):
        write_rows(folder / name, 30)
        text = (folder / name).read_text()
        (folder / f"asked-{name}").write_text(
            text.replace('"prompt"', '"question"').replace('"response"', '"answer"')
        )
    return folder


@pytest.fixture(autouse=True)
def in_the_clone(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr("jax.device_count", lambda: 1)  # as on the machine of a reader
    monkeypatch.setattr(export, "check_opened", lambda made: [])  # torch takes seconds


@pytest.fixture(scope="module")
def trained(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr("jax.device_count", lambda: 1)
        run(["python", "-m", "drlora_jax.train", "--config", "configs/tiny.py"])


def run(words: list[str]) -> None:
    """Runs a command in this process, cheaply, and once for all pages that have it."""
    name = module_of(words)
    if tuple(words) in RAN:
        return
    RAN.add(tuple(words))
    arguments = words[3:] + CHEAPER.get(name, [])
    if name == "train":
        arguments += SMALL
        is_growing = not any(word.startswith("allocation.kind=") for word in words)
        arguments += ["allocation.interval=1"] if is_growing else []
    folders = [word.rstrip("/") for word in arguments if re.fullmatch(r"\w+/", word)]
    for folder in folders:  # exports want a new directory, and pages name the same
        shutil.rmtree(folder, ignore_errors=True)
    assert importlib.import_module(words[2]).main(arguments) == 0, words


@pytest.mark.parametrize("page", [page for page in PAGES if any(not m for m, *_ in blocks(page))])
def test_blocks_run(page, trained, capsys):
    for mark, language, text in blocks(page):
        if mark:
            continue
        if language == "python":
            exec(compile(text, page, "exec"), {"__name__": "example"})
        else:
            for words in commands(text):
                run(words)


# ---------------------------------------------------------------------------------------------
# what is checked otherwise


def marked(mark: str) -> list:
    return [
        pytest.param(text, id=f"{page}-{number}")
        for page in PAGES
        for number, (found, _, text) in enumerate(blocks(page))
        if found == mark
    ]


@pytest.mark.parametrize("text", marked("dry-run"))
def test_a_training_of_the_readers_own_is_prepared(text, capsys):
    for words in commands(text):
        assert module_of(words) == "train"
        overrides = [
            local(word, "data.prompt_field=question" in words) for word in words if "=" in word
        ]
        job = prepare(load_config(words[words.index("--config") + 1], overrides))
        train.build(job)
        assert job.lines and job.is_new


def local(word: str, is_asked: bool) -> str:
    """The override with what this machine has: a tiny model of the family, rows with the fields."""
    word = re.sub(r"=/models/OLMoE\S*", "=bundled:tiny_moe", word)
    word = re.sub(r"=/models/\S*", "=llama", word)
    return re.sub(r"=(train|heldout)\.jsonl", r"=asked-\1.jsonl", word) if is_asked else word


@pytest.mark.parametrize("text", marked("syntax"))
def test_what_does_not_run_is_well_formed(text):
    parsed = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert parsed.returncode == 0 and not parsed.stderr
    for words in commands(re.sub(r"<<'(\w+)'\n.*?\n\1\n", "\n", text, flags=re.S)):
        if "drlora_jax.train" in words:
            overrides = [word for word in words if re.match(r"[a-z]+\.\w+=", word)]
            load_config(str(ROOT / words[words.index("--config") + 1]), overrides)
        for before, word in zip(["", *words], words, strict=False):
            if before == "-m" and word.startswith(("drlora_jax", "experiments")):
                assert importlib.util.find_spec(word), word
            if re.match(r"(launch|benchmarks|configs|experiments|tools)/", word):
                assert (ROOT / word).exists(), word


# ---------------------------------------------------------------------------------------------
# the reference


def test_the_reference_of_commands_is_up_to_date():
    file = ROOT / "tools" / "write_cli_doc.py"
    spec = importlib.util.spec_from_file_location("cli_doc", file)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    page = (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8")
    assert page == tool.page(), "run tools/write_cli_doc.py"
