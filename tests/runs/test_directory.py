"""Run directories: what may be there already, and what is read of a run that goes on."""

import json
import os

import pytest

from drlora_jax import train
from drlora_jax.errors import UserError
from drlora_jax.runs.directory import WRITTEN, RunDirectory

STRAY = ("train.log", "slurm-123.out", ".DS_Store", ".nfs0001", "notes.txt", "run.lock", "a.jsonl")
STRAY += ("config.json.tmp", "metrics.jsonl.tmp", "model.safetensors")


def test_files_that_a_run_does_not_touch_may_be_there(tmp_path):
    for name in STRAY:
        (tmp_path / name).write_text("")
    (tmp_path / "lost+found").mkdir(mode=0)
    (tmp_path / "checkpoints").mkdir()  # a run that was killed before it wrote its config
    directory = RunDirectory(str(tmp_path))
    assert directory.stored() is None
    directory.check_place()


@pytest.mark.parametrize("name", WRITTEN)
def test_what_a_run_would_write_over_is_named(tmp_path, name):
    for stray in STRAY:
        (tmp_path / stray).write_text("")
    if "." in name:
        (tmp_path / name).write_text("")
    else:
        (tmp_path / name / "5").mkdir(parents=True)
    message = f"run.dir={tmp_path} has {name}, but no config.json"
    with pytest.raises(UserError, match=message):
        RunDirectory(str(tmp_path)).stored()


def test_up_to_three_are_named(tmp_path):
    for name in ("metrics.jsonl", "ranks.jsonl", "report.html", "eval.json"):
        (tmp_path / name).write_text("")
    with pytest.raises(
        UserError, match="metrics.jsonl, ranks.jsonl, report.html and 1 more, but no config.json"
    ):
        RunDirectory(str(tmp_path)).stored()


def test_the_place_of_a_new_directory_is_looked_at_before_anything_else(tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("the model was looked for")

    monkeypatch.setattr("drlora_jax.training.job.find_model", never)
    (tmp_path / "file").write_text("")
    for name, message in (("file", "is a file"), ("file/run", "file is a file; give another")):
        with pytest.raises(UserError, match=message):
            train.main(["--config", "bundled:tiny", f"run.dir={tmp_path / name}"])


def test_steps_of_checkpoints(tmp_path):
    directory = RunDirectory(str(tmp_path))
    assert directory.newest_step() == 0 and not directory.has_checkpoint()
    for name in ("5", "10", "9", "12.orbax-checkpoint-tmp", "damaged-40", "x", "²"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert directory.newest_step() == 10 and directory.has_checkpoint()


def test_the_last_logged_rate(tmp_path):
    directory = RunDirectory(str(tmp_path))
    assert directory.last_rate(9) is None
    rows = [{"step": step, "learning_rate": step / 10} for step in (1, 5, 9)]
    rows += [{"step": 10, "eval_loss": 1.0}, {"step": 11, "learning_rate": 2.0}]
    lines = [json.dumps(row) for row in rows]
    directory.metrics_file.write_text("\n".join([*lines, '{"step": 1']))
    assert directory.last_rate(10) == (9, 0.9)
    assert directory.last_rate(8) == (5, 0.5) and directory.last_rate(0) is None
    edited = ('{"step": 9, "learning_rate": "x"}', '{"step": 9, "learning_rate": null}', "[9]")
    directory.metrics_file.write_text("\n".join([*lines, *edited, '{"step": true}']))
    assert directory.last_rate(10) == (9, 0.9)
    directory.metrics_file.unlink()
    os.mkfifo(directory.metrics_file)
    assert directory.last_rate(10) is None


def test_lost_lines_of_the_logs_are_told(tmp_path):
    directory = RunDirectory(str(tmp_path))
    file, whole = directory.metrics_file, '{"step": 1}\n{"step": 2}\n'
    file.write_text(whole + '{"step": 3}\n')
    assert directory.cut_back(2, 1) == [] and directory.cut_back(3, 2) == []
    file.write_bytes(b'{"step": 1}\n\xff\x00\n[]\n{"step": 2}\n')
    directory.ranks_file.write_text('{"step": 1}\n{"st')
    assert directory.cut_back(2, 1) == [
        f"{file}: 2 lines that cannot be read are dropped",
        f"{directory.ranks_file}: 1 unreadable line is dropped",
    ]
    assert file.read_text() == whole
    assert directory.cut_back(3, 1) == [f"{file} has no row of step 3"]
    file.unlink()
    assert directory.cut_back(9, 5) == [f"{file} has no row of steps 1 to 9"]
    assert directory.cut_back(9, 10) == []  # none was due
    file.write_text("{")
    directory.ranks_file.unlink()
    assert directory.cut_back(0, 1) == []
    file.write_text('{"step": 0}\n' + whole)  # somebody has removed the checkpoints
    assert directory.cut_back(0, 1) == [
        f"{tmp_path} has no checkpoint: its log up to step 2 is dropped"
    ]
    assert file.read_text() == ""
