"""The command `export`: what it says, what it refuses, and what is left when it fails."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from drlora_jax import export
from drlora_jax.errors import RunError, UserError
from tests.support.tiny import write_tiny_model
from tests.support.trained_models import MODELS, STEP, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


def arguments(run: str, out: pathlib.Path, layout="peft", **more) -> list[str]:
    options = [f"--{key.replace('_', '-')}={value}" for key, value in more.items()]
    return [f"--run={run}", f"--format={layout}", f"--out={out}", *options]


@pytest.fixture
def not_opened(monkeypatch):
    """Importing torch takes seconds; test_opened.py is about that."""
    monkeypatch.setattr(export, "check_opened", lambda made: [])


def test_command(run, tmp_path, capsys):
    assert export.main(arguments(run, tmp_path / "new" / "adapter")) == 0
    text = capsys.readouterr().out
    assert "\nopened   with torch" in text or "; not opened: " in text
    assert f"step {STEP}" in text and "KL" in text and "note     only" in text
    assert sorted(file.name for file in (tmp_path / "new").rglob("*")) == [
        "adapter",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "new" / "adapter" / "adapter_config.json").read_text())
    assert pathlib.Path(config["base_model_name_or_path"]).samefile(
        pathlib.Path(run).parent / "model"
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt, RunError, OSError])
def test_nothing_is_left_of_a_failed_export(run, tmp_path, monkeypatch, error):
    def fail(measured):
        raise error("stopped")

    monkeypatch.setattr(export, "judge", fail)
    with pytest.raises(RunError if error is OSError else error, match="stopped"):
        export.main(arguments(run, tmp_path / "out", "merged"))
    assert list(tmp_path.iterdir()) == []


MISTAKES = [
    (dict(out="file"), "is a file"),
    (dict(out="full"), "is not empty: it has notes"),
    (dict(out="file/out"), "file is a file"),
    (dict(max_shard_size="5GB"), "applies to --format merged"),
    (dict(layout="merged", max_shard_size="five"), "must look like 5GB"),
    (dict(layout="merged", max_shard_size="0GB"), "must look like 5GB"),
    (dict(step="3"), f"has the steps {STEP}; give one of them, latest"),
    (dict(model_path="other"), "is not the base model of"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_mistakes(run, tmp_path, change, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    if "model_path" in change:
        write_tiny_model(tmp_path / "other", MODELS["mixtral"])
        change = {"model_path": tmp_path / "other"}
    change = dict(change)
    out = tmp_path / change.pop("out", "out")
    with pytest.raises(UserError, match=message):
        export.main(arguments(run, out, **change))
    assert not (tmp_path / "out").exists() and (tmp_path / "full" / "notes").read_text() == "mine"


def test_files_can_be_read_by_others(run, tmp_path, not_opened):
    export.main(arguments(run, tmp_path / "out", "peft-2d"))
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}
    (tmp_path / "plain").write_text("")
    assert modes == {(tmp_path / "plain").stat().st_mode & 0o777}


@pytest.mark.parametrize("layout", export.FORMATS)
def test_a_link_gets_the_files(run, tmp_path, monkeypatch, layout, not_opened):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert export.main(arguments(run, tmp_path / "link", layout)) == 0
    monkeypatch.chdir(tmp_path / "real")
    found = sorted(file.name for file in pathlib.Path().iterdir())
    assert len(found) >= 2 and not [name for name in found if "partial" in name]
    for file in pathlib.Path().iterdir():
        file.unlink()
    assert export.main(arguments(run, pathlib.Path("."), layout)) == 0
    assert sorted(file.name for file in pathlib.Path().iterdir()) == found
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("layout", export.FORMATS)
def test_a_full_disk_is_said_before_anything_is_written(run, tmp_path, monkeypatch, layout):
    usage = shutil._ntuple_diskusage(1 << 40, 1 << 40, 1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    if layout == "merged":  # nothing is read either
        monkeypatch.setattr(export, "read_trained", None)
    with pytest.raises(UserError, match="needs .* GiB, but .* has .* GiB free"):
        export.main(arguments(run, tmp_path / "out", layout))
    assert list(tmp_path.iterdir()) == []


def test_the_end_token_is_written(run, tmp_path, not_opened, capsys):
    export.main(arguments(run, tmp_path / "out", "merged"))
    values = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert values == {"pad_token_id": 1, "eos_token_id": 0}
    assert "left out" not in capsys.readouterr().out


def test_an_overflow_of_float16_is_named(tmp_path, not_opened):
    run = write_run(tmp_path, size=1e6)
    for layout, name in (("merged", "model.layers"), ("peft", "base_model.model")):
        with pytest.raises(RunError, match=f"{name}.* has a value of .*, but float16 ends at"):
            export.main(arguments(run, tmp_path / "out", layout, dtype="float16"))
    assert not (tmp_path / "out").exists()


def test_an_export_that_others_read_wrongly_is_not_kept(run, tmp_path, monkeypatch):
    def refuse(made):
        assert made.layout == "merged" and made.ends == (0,) and made.directory.is_dir()
        assert all(np.isfinite(array).all() for array in made.logits)
        raise RunError("transformers reads something else")

    monkeypatch.setattr(export, "check_opened", refuse)
    with pytest.raises(RunError, match="reads something else"):
        export.main(arguments(run, tmp_path / "out", "merged"))
    assert list(tmp_path.iterdir()) == []
