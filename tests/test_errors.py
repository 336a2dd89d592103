"""Every mistake of the catalogue ends with one clear message, the right exit code, and no trace."""

import json
import pathlib
import pickle
import re
import shutil
import socket
import subprocess
import sys

import pytest

from drlora_jax import cli
from drlora_jax.config import load_config
from drlora_jax.training.job import prepare
from tests.error_cases import CASES
from tests.error_cases.case import CONFIG, HACKED, make_world, run_case, run_command, watching
from tests.error_cases.document import row
from tests.error_cases.environment import running
from tests.error_cases.model import PAYLOAD

DOCUMENT = pathlib.Path(__file__).parents[1] / "docs" / "errors.md"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("case", CASES, ids=[f"{case.kind}: {case.what}" for case in CASES])
def test_one_message_and_nothing_else(case, world, tmp_path):
    outcome = run_case(case, world, tmp_path / "here")
    assert outcome.code == case.code, outcome.errors
    assert len(outcome.errors) == 1, outcome.errors
    assert outcome.errors[0].startswith("error: " if case.code == 2 else "failed: ")
    assert re.search(case.message, outcome.errors[0])
    assert outcome.events == [] and not list(tmp_path.rglob(HACKED))
    if case.code == 2:
        assert outcome.written == set() and outcome.arrays == 0
    line = row(case, outcome, tmp_path / "here")
    assert line in DOCUMENT.read_text().splitlines(), f"run tools/write_errors_doc.py for {line}"


def test_the_good_folder_is_good(world, monkeypatch):
    """Without the mistake there is nothing to refuse."""
    monkeypatch.chdir(world)
    assert prepare(load_config("config.py")).total_steps == 12
    assert CONFIG == pathlib.Path("config.py").read_text()


def test_the_document_has_every_case_and_no_other():
    lines = DOCUMENT.read_text().splitlines()
    rows = [line for line in lines if re.match(r"\| .* \| [12] \| (error|failed): ", line)]
    assert len(rows) == len(CASES) and len(set(rows)) == len(rows)


def test_every_case_has_a_name_of_its_own():
    assert len({(case.kind, case.what) for case in CASES}) == len(CASES) > 150


def test_code_in_a_model_directory_is_never_run(world, tmp_path):
    """Beside good weights: it is not read, so it does not even have to be refused."""
    folder = tmp_path / "here"
    shutil.copytree(world, folder)
    evil = f"open({HACKED!r}, 'w')\nclass Evil: pass\n"
    classes = {"AutoTokenizer": ["evil.Evil", None], "AutoModelForCausalLM": "evil.Evil"}
    for name in ("evil.py", "modeling_olmoe.py", "tokenization_evil.py", "setup.py"):
        (folder / "model" / name).write_text(evil)
    for name in ("config.json", "tokenizer_config.json"):
        file = folder / "model" / name
        values = json.loads(file.read_text())
        values |= {"auto_map": classes, "tokenizer_class": "Evil", "trust_remote_code": True}
        file.write_text(json.dumps(values | {"_attn_implementation_internal": "evil/kernel"}))
    for name in ("pytorch_model.bin", "training_args.bin", "rng_state.pth", "vocab.npy"):
        (folder / "model" / name).write_bytes(PAYLOAD)
    outcome = run_command(folder, ["--config", "config.py"], running)
    assert outcome.code == 0, outcome.errors
    assert outcome.events == [] and not list(tmp_path.rglob(HACKED))


def test_what_is_watched_is_noticed():
    """The watch of the tests above sees a process, a socket and a pickle."""
    with watching() as events:
        subprocess.run([sys.executable, "-c", ""], check=True)
        with pytest.raises(OSError), socket.socket() as client:
            client.connect(("127.0.0.1", 1))
        pickle.loads(pickle.dumps(pathlib.PurePath))
    assert {"subprocess.Popen", "socket.connect", "pickle.find_class"} <= set(events)


def test_a_message_is_one_printable_line():
    assert cli.printable("a\n b\x1b[31m\x00 \u202e") == "a b\\x1b[31m\\x00 \\u202e"
    assert len(cli.printable("x" * 9999)) < 2100
