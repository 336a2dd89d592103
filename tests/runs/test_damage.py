"""Damaged checkpoints: a run resumes to the very end of an undamaged one, and evaluation has the
values that were saved, or says what it uses in their place.
"""

import contextlib
import gc
import inspect
import json
import pathlib
import shutil
import sys
import types
from typing import NamedTuple

import jax
import numpy as np
import pytest

from drlora_jax import cli
from drlora_jax import train as train_lib
from drlora_jax.errors import EXIT_DONE, RunError, UserError
from drlora_jax.inference.model import read_factors
from drlora_jax.parallel import mesh as mesh_lib
from drlora_jax.runs import checkpoint_read
from drlora_jax.runs.checkpoint_read import saved_steps
from drlora_jax.runs.directory import RunDirectory
from drlora_jax.runs.source import find_run
from drlora_jax.training.job import prepare
from drlora_jax.training.state import restore
from tests.support import damage
from tests.support.tiny import tiny_config

FLIPS, FAULTS = 200, 60  # of the slow tests
SETTINGS = {"keep_last": 3}
NOT_LEARNED = {"tokens_per_second", "host_peak_bytes", "mfu"}


@pytest.fixture(autouse=True)
def as_in_a_command(monkeypatch):
    hook = cli.without_closed_loops(sys.unraisablehook)
    monkeypatch.setattr(sys, "unraisablehook", hook)


class Runs(NamedTuple):
    folder: pathlib.Path
    run: train_lib.Run
    compiled: tuple

    def train(self, name: str) -> int:
        config = tiny_config(self.folder, name, run=SETTINGS)
        directory = RunDirectory(config.run.dir)
        is_new = directory.stored() is None
        job = self.run.job._replace(config=config, run_dir=directory, is_new=is_new)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_lib, "compile_step", lambda run: self.compiled)
            patch.setattr(train_lib, "memory_lines", lambda *_: [])
            return train_lib.train(self.run._replace(job=job))

    def state(self, name: str, step: int):
        checkpoints = train_lib.Checkpoints(self.folder / name / "checkpoints", keep_last=3)
        position = restore(self.run, checkpoints, step)
        checkpoints.close()
        return jax.device_get(position)

    def logs(self, name: str) -> list[dict]:
        files = (self.folder / name / file for file in ("metrics.jsonl", "ranks.jsonl"))
        rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        return [{key: row[key] for key in row if key not in NOT_LEARNED} for row in rows]

    def factors(self, name: str, which="latest"):
        """What evaluation reads, and the step that it says it is of."""
        source = find_run(str(self.folder / name), step=which)
        mesh = mesh_lib.make_mesh(mesh_lib.resolve_sizes(self.run.job.config.mesh, 1))
        lora, ranks_LE, used = read_factors(source, mesh)
        return jax.device_get(lora), ranks_LE, used.step


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run with checkpoints 6, 10 and 12, and one that differs in its id alone."""
    folder = tmp_path_factory.mktemp("damage")
    run = train_lib.build(prepare(tiny_config(folder, "whole", run=SETTINGS)))
    made = Runs(folder, run, train_lib.compile_step(run))
    for name in ("whole", "foreign"):
        assert made.train(name) == EXIT_DONE
    assert saved_steps(folder / "whole" / "checkpoints") == [6, 10, damage.NEWEST]
    return made


@pytest.fixture(scope="module")
def expected(runs):
    """Logs, the last state, and factors by step, of the undamaged run."""
    steps = saved_steps(runs.folder / "whole" / "checkpoints")
    factors = {step: runs.factors("whole", str(step))[:2] for step in steps}
    return runs.logs("whole"), runs.state("whole", damage.NEWEST), factors


def equal(one, other) -> bool:
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))


def outcome(runs, expected, fault, seed: int) -> str:
    """What becomes of a copy of the run with a fault: "" if all is as it must be."""
    logs, last, factors = expected
    folder = runs.folder / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(runs.folder / "whole", folder)
    place = folder / "checkpoints" / str(damage.NEWEST)
    said = fault(place, np.random.default_rng(seed)) or fault.__name__
    try:
        *found, step = runs.factors("damaged")
        if not equal(tuple(found), factors[step]):
            return f"{said}: evaluation has other values"
        code = runs.train("damaged")
    except RunError as error:
        return f"{said}: {error}"
    if code != EXIT_DONE or not equal(runs.state("damaged", damage.NEWEST), last):
        return f"{said}: the resumed run ends elsewhere"
    return "" if runs.logs("damaged") == logs else f"{said}: the logs differ"


def wrong(runs, expected, cases) -> list[str]:
    found = [outcome(runs, expected, fault, seed) for seed, fault in enumerate(cases)]
    return [each for each in found if each]


def test_flipped_bits_are_never_learned_from(runs, expected, capfd):
    assert wrong(runs, expected, [damage.flip_a_bit] * 3) == []


def test_files_that_are_not_what_they_were(runs, expected, capfd):
    some = (damage.truncate, damage.stray_directory, damage.an_older_one, damage.a_foreign_one)
    assert wrong(runs, expected, [*some, damage.broken_metrics]) == []


@pytest.mark.slow
def test_two_hundred_flipped_bits(runs, expected, capfd):
    assert wrong(runs, expected, [damage.flip_a_bit] * FLIPS) == []


@pytest.mark.slow
def test_sixty_faults_of_files(runs, expected, capfd):
    cases = [damage.FAULTS[each % len(damage.FAULTS)] for each in range(FAULTS)]
    assert wrong(runs, expected, cases) == []


def largest_file(runs, name: str, step: int) -> pathlib.Path:
    files = (runs.folder / name / "checkpoints" / str(step)).rglob("*")
    return max((file for file in files if file.is_file()), key=lambda file: file.stat().st_size)


def flip_arrays(runs, name: str, step: int) -> None:
    """Bits all over the largest file, which is the arrays."""
    file = largest_file(runs, name, step)
    content = bytearray(file.read_bytes())
    content[::97] = bytes(value ^ 1 for value in content[::97])
    file.write_bytes(bytes(content))


def test_without_checksums_they_would_be_learned_from(runs, expected, copied, monkeypatch):
    """Orbax alone does not notice a bit in the arrays; these tests would."""
    monkeypatch.setattr(checkpoint_read, "_check_arrays", lambda *_: None)
    file = largest_file(runs, copied, 12)
    content, unnoticed = file.read_bytes(), 0
    for place in np.linspace(0.1, 0.9, 8) * len(content):
        changed = bytearray(content)
        changed[int(place)] ^= 1
        file.write_bytes(bytes(changed))
        with contextlib.suppress(RunError):
            unnoticed += not equal(runs.state(copied, 12), expected[1])
    assert unnoticed > 0


@pytest.fixture
def copied(runs, request):
    name = request.node.name
    shutil.copytree(runs.folder / "whole", runs.folder / name)
    return name


def test_a_training_sets_the_damaged_one_aside(runs, copied, capsys):
    flip_arrays(runs, copied, 12)
    assert runs.train(copied) == EXIT_DONE
    said = capsys.readouterr()
    (line,) = [line for line in said.err.splitlines() if "checkpoint 12" in line]
    assert "renamed to damaged-12; the run resumes from checkpoint 10" in line
    folder = runs.folder / copied / "checkpoints"
    assert (folder / "damaged-12").is_dir() and saved_steps(folder) == [6, 10, 12]
    assert "resuming at step 10" in said.out
    flip_arrays(runs, copied, 12)  # once more: the first one stays
    assert runs.train(copied) == EXIT_DONE
    assert (folder / "damaged-12-2").is_dir()


def test_a_reader_says_it_and_changes_nothing(runs, copied, capsys):
    flip_arrays(runs, copied, 12)
    before = sorted(runs.folder.joinpath(copied).rglob("*"))
    assert runs.factors(copied)[-1] == 10
    assert "checkpoint 12 of" in (line := capsys.readouterr().err) and "using checkpoint 10" in line
    assert sorted(runs.folder.joinpath(copied).rglob("*")) == before
    with pytest.raises(RunError, match="Checkpoint 12 of .* damaged or incomplete.*another step"):
        runs.factors(copied, "12")  # the one that was asked for, or none


def test_best_is_what_was_saved(runs, copied):
    assert runs.factors(copied, "best")[-1] == 12
    flip_arrays(runs, copied, 12)
    assert runs.factors(copied, "best")[-1] == 10


def test_without_a_good_one_nothing_is_renamed(runs, copied):
    for step in (6, 10, 12):
        flip_arrays(runs, copied, step)
    with pytest.raises(RunError, match=r"Checkpoint 12 .*; so are the older ones \(10, 6\)"):
        runs.train(copied)
    assert saved_steps(runs.folder / copied / "checkpoints") == [6, 10, 12]
    with pytest.raises(RunError, match=r"so are the older ones \(10, 6\)"):
        runs.factors(copied)


def test_nothing_that_orbax_has_not_begun_is_left(runs, copied):
    """What is left would warn when it is freed: here the log records of the test hold it."""
    file = runs.folder / copied / "checkpoints" / "12" / "state" / "_METADATA"
    file.write_text("jax/Array".join(file.read_text().rsplit("jax.Array", 1)))  # of one of many
    with pytest.raises(RunError, match="its arrays cannot be read"):
        runs.factors(copied, "12")
    made = [each for each in gc.get_objects() if type(each) is types.CoroutineType]
    states = map(inspect.getcoroutinestate, made)
    assert inspect.CORO_CREATED not in states


def test_pointers_of_git_lfs_are_named(runs, copied):
    for file in (runs.folder / copied / "checkpoints").rglob("*"):
        if file.is_file():
            file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n")
    with pytest.raises(UserError, match=r"/12/.* is a git-lfs pointer, .*git lfs pull"):
        runs.factors(copied)


def test_another_config_than_it_was_saved_under(runs, copied):
    """A flipped digit in config.json would be evaluated as it stands."""
    file = runs.folder / copied / "config.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps(stored | {"new": 1}, indent=1))  # how it is written is no matter
    assert runs.factors(copied)[-1] == 12
    stored["config"]["adapter"]["scale"] = 1.25
    file.write_text(json.dumps(stored))
    with pytest.raises(RunError, match="saved with a config different from"):
        runs.factors(copied)


def rewrite_as_old(runs, name: str) -> None:
    """The run as versions without checksums and ids have left it."""
    folder = runs.folder / name
    stored = json.loads((folder / "config.json").read_text())
    del stored["run_id"]
    (folder / "config.json").write_text(json.dumps(stored))
    for step in saved_steps(folder / "checkpoints"):
        place = folder / "checkpoints" / str(step)
        values = json.loads((place / "_CHECKPOINT_METADATA").read_text())
        custom = values["custom_metadata"]
        values["custom_metadata"] = {"tokens": custom["tokens"]}
        (place / "_CHECKPOINT_METADATA").write_text(json.dumps(values))
        if custom["eval_loss"] is not None:
            (place / "metrics").mkdir()
            (place / "metrics" / "metrics").write_text(json.dumps({"eval_loss": 1 + 1 / step}))


def test_an_old_run_loads_and_says_so_once(runs, expected, copied, capsys):
    rewrite_as_old(runs, copied)
    assert equal(tuple(runs.factors(copied, "best")[:2]), expected[2][12])
    assert capsys.readouterr().err.count("has no checksums") == 1
    (runs.folder / copied / "checkpoints" / "12").rename(runs.folder / f"{copied}-12")
    assert runs.train(copied) == EXIT_DONE
    assert capsys.readouterr().err.count("has no checksums") == 1
    assert runs.logs(copied) == expected[0]
    assert runs.train(copied) == EXIT_DONE  # and its newest has checksums now
    assert "has no checksums" not in capsys.readouterr().err


def test_an_old_state_of_another_step_is_found(runs, copied, capsys):
    rewrite_as_old(runs, copied)
    damage.an_older_one(runs.folder / copied / "checkpoints" / "12", None)
    assert runs.train(copied) == EXIT_DONE
    assert "checkpoint 12 of" in (said := capsys.readouterr().err) and "it holds step 10" in said


def test_a_checkpoint_whose_checksums_are_gone_is_damaged(runs, copied, capsys):
    file = runs.folder / copied / "checkpoints" / "12" / "_CHECKPOINT_METADATA"
    file.write_text(file.read_text().replace("custom_metadata", "custom_metadatb"))
    assert runs.factors(copied)[-1] == 10
    file.unlink()
    assert runs.factors(copied)[-1] == 10
