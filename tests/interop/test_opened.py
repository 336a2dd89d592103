"""Exports are opened by transformers and peft where they are, and what cannot be opened is said."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from drlora_jax.data.tokenize import load_tokenizer
from drlora_jax.errors import RunError
from drlora_jax.export import FORMATS, MERGED
from drlora_jax.interop import open_export, opened
from drlora_jax.interop.exported_files import text_ids
from drlora_jax.interop.opened import Export, check_opened, judge_answer, make_request, why_not
from tests.support.exports import export, rewrite
from tests.support.tiny import OLMOE, write_tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning"),
]


@pytest.fixture(scope="module")
def torch():
    for name in ("torch", "peft"):
        pytest.importorskip(name, reason="only peft itself can say what it loads")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("opened")
    base, prompts, logits = export(folder, "olmoe", ("gate", "down", "q"))
    ids = text_ids(load_tokenizer(base))

    def make(layout: str, directory: pathlib.Path | None = None) -> Export:
        return Export(layout, base, directory or folder / layout, prompts, logits, ids, (0,))

    return make


@pytest.fixture
def copied(written, tmp_path):
    """A copy of an export to break."""

    def make(layout: str) -> Export:
        shutil.copytree(written(layout).directory, tmp_path / layout)
        return written(layout, tmp_path / layout)

    return make


def open_here(made: Export, folder: pathlib.Path) -> list[str]:
    """What the process of its own does, in this one."""
    answer = open_export.answer_to(make_request(made), str(folder / "logits.npz"))
    if "failed" in answer:
        return judge_answer(made, answer, [])
    with np.load(folder / "logits.npz") as arrays:
        return judge_answer(made, answer, [arrays[name] for name in arrays.files])


# ---------------------------------------------------------------------------------------------
# with torch


def test_an_export_is_opened_by_another_process(torch, written):
    (line,) = check_opened(written(MERGED))
    assert line.startswith("opened   with torch ") and "3 prompts, KL " in line


@pytest.mark.parametrize("layout", FORMATS)
def test_good_exports(torch, written, tmp_path, layout):
    (line,) = open_here(written(layout), tmp_path)
    assert ("peft" in line) == (layout != MERGED)


def edit(made: Export, name: str, **changes) -> None:
    file = made.directory / name
    values = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(values | changes))


def edit_tensors(made: Export, change) -> None:
    (file,) = made.directory.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def scale_one(tensors: dict) -> None:
    key = next(key for key in tensors if "down" in key or "lora_B" in key)
    tensors[key] *= 1.5


def without_head(tensors: dict) -> None:
    del tensors["lm_head.weight"]


def without_a_layer(tensors: dict) -> None:
    for key in [key for key in tensors if ".layers.1." in key]:
        del tensors[key]


def other_ids(made: Export) -> None:
    file = made.directory / "tokenizer.json"
    values = json.loads(file.read_text())
    values["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(values))


MISTAKES = {
    "an adapter beside the model": (
        MERGED,
        lambda made: edit(made, "adapter_config.json", peft_type="LORA"),
        "cannot be opened with torch",
    ),
    "other weights": (MERGED, lambda made: edit_tensors(made, scale_one), "computes something"),
    "other settings": (
        MERGED,
        lambda made: edit(made, "config.json", num_experts_per_tok=1),
        "computes something different",
    ),
    "no head": (MERGED, lambda made: edit_tensors(made, without_head), "missing keys .* lm_head"),
    "no layer": (MERGED, lambda made: edit_tensors(made, without_a_layer), r"missing keys.*layers"),
    "no tokenizer": (
        MERGED,
        lambda made: (made.directory / "tokenizer.json").unlink(),
        "a different tokenizer from the export than from the base model",
    ),
    "another tokenizer": (MERGED, other_ids, "a different tokenizer .* becomes"),
    "no end": (
        MERGED,
        lambda made: edit(made, "generation_config.json", eos_token_id=[5]),
        r"stops at \[5\], but the run's texts end at \(0,\)",
    ),
    "other factors": ("peft", lambda made: edit_tensors(made, scale_one), "computes something"),
    "another scale": (
        "peft-2d",
        lambda made: edit(made, "adapter_config.json", lora_alpha=1),
        "computes something different",
    ),
    "fewer factors": ("peft", lambda made: edit_tensors(made, without_a_layer), "computes some"),
    "an unknown target": (
        "peft",
        lambda made: edit(made, "adapter_config.json", target_modules=["w"], target_parameters=[]),
        "cannot be opened with torch .* peft .*",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_others_would_read_wrongly_is_refused(torch, copied, tmp_path, mistake):
    layout, break_it, message = MISTAKES[mistake]
    made = copied(layout)
    break_it(made)
    with pytest.raises(RunError, match=message):
        open_here(made, tmp_path)


def test_a_tokenizer_that_transformers_reads_otherwise_is_said(torch, written, tmp_path):
    """Its class decides there, tokenizer.json here; the export has the files of the base model."""
    ids = [[1, *row] for row in written(MERGED).ids]
    lines = open_here(written(MERGED)._replace(ids=ids), tmp_path)
    assert "AutoTokenizer does not give the token ids of the run" in lines[1]


def test_a_tied_model(torch, tmp_path):
    base = write_tiny_model(tmp_path / "base", OLMOE | {"tie_word_embeddings": True})
    target, _ = rewrite(base)
    _, found = open_export.open_model(
        {"layout": MERGED, "base": str(base), "export": str(target), "texts": ["a"], "ids": [[66]]}
    )
    assert found["is_tied"] and not found["wrong_keys"]


# ---------------------------------------------------------------------------------------------
# without


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("missing", ["torch", "transformers", "peft"])
def test_a_library_that_is_not_there(written, monkeypatch, layout, missing):
    monkeypatch.setattr(
        opened.importlib.util, "find_spec", lambda name: None if name == missing else name
    )
    monkeypatch.setattr(opened.importlib.metadata, "version", lambda name: "0.21.2")
    monkeypatch.setattr(opened, "_ask", lambda made: ({"unavailable": "asked"}, []))
    (line,) = check_opened(written(layout))
    if missing == "peft" and layout == MERGED:
        assert line.endswith("not opened: asked")
    else:
        assert f"not opened: {missing} is not installed, so transformers" in line


def test_a_model_that_does_not_fit_is_not_opened(written, monkeypatch):
    monkeypatch.setattr(opened.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(opened, "available_memory", lambda: 1 << 30)
    reason = why_not(written(MERGED))
    assert reason == "the model needs 1.0 GiB in float32, but 1.0 GiB of memory are free"
    monkeypatch.setattr(opened, "available_memory", lambda: 2 << 30)
    assert why_not(written(MERGED)) is None


def test_memory_is_that_of_the_machine_or_less():
    found = opened.available_memory()
    assert found is None or 1 << 20 < found < 1 << 50


@pytest.mark.parametrize(("version", "is_old"), [("0.19.1", True), ("0.20.0", False)])
def test_versions_of_peft(written, monkeypatch, version, is_old):
    monkeypatch.setattr(opened.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(opened.importlib.metadata, "version", lambda name: version)
    reason = why_not(written("peft"))
    assert (reason is not None) == is_old and (not is_old or "use 0.20 or newer" in reason)


PROGRAMS = {
    "killed": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "signal 9"),
    "broken": ("raise SystemExit('no such thing')", "ended with 1: no such thing"),
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_a_process_that_ends_without_an_answer(written, monkeypatch, tmp_path, kind):
    program, message = PROGRAMS[kind]
    (tmp_path / "program.py").write_text(program)
    monkeypatch.setattr(open_export, "__file__", str(tmp_path / "program.py"))
    monkeypatch.setattr(opened, "why_not", lambda made: None)
    (line,) = check_opened(written(MERGED))
    assert "not opened: the process" in line and message in line


def test_libraries_that_do_not_work(written, monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(opened, "why_not", lambda made: None)
    (line,) = check_opened(written(MERGED))
    assert line.endswith("not opened: OSError: libcudart.so.13: cannot open")
