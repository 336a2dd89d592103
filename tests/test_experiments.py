"""The plan of a study, its figures, and that docs/results.md says what the data say."""

import json
import pathlib

import numpy as np
import pytest
from scipy import stats

from drlora_jax.allocation import CapacityShapes
from drlora_jax.config import apply_overrides, from_dict, to_dict
from drlora_jax.config.resolve import make_policy
from experiments import analyse, report
from experiments import run as run_lib
from experiments.results import RESULTS, differences, finished_losses, read_results
from experiments.study import (
    Cell,
    count_cells,
    known_cells,
    load_study,
    overrides_of,
    ready_cells,
    source_of_ranks,
    tuned_rate,
)
from tests.support.tiny import tiny_config

ROOT = pathlib.Path(__file__).parents[1]
STUDY = load_study(ROOT / "experiments" / "growth.py")
OUT = pathlib.Path("/out")


def finish(study, loss=lambda cell: 2.0):
    """Does whatever is ready, wave by wave; returns the waves and the losses."""
    done, waves = {}, []
    while wave := ready_cells(study, done):
        waves.append(wave)
        done |= {cell: loss(cell) for cell in wave}
    return waves, done


def test_every_cell_is_run_once_and_after_what_it_needs():
    def best(cell):
        is_grown = "dr_lora" in (cell.arm, STUDY.arm(cell.arm).rate_of)
        return STUDY.task(cell.task).learning_rates[2 if is_grown else 1]

    def loss(cell):
        return abs(cell.learning_rate - best(cell))

    waves, done = finish(STUDY, loss)
    cells = [cell for wave in waves for cell in wave]
    assert len(cells) == len(set(cells)) == count_cells(STUDY) == len(known_cells(STUDY, done))
    wave_of = {cell: index for index, wave in enumerate(waves) for cell in wave}
    for cell in cells:
        assert cell.is_tuning == (cell.seed == STUDY.tuning_seed)
        if not cell.is_tuning:
            assert cell.learning_rate == best(cell)
            tuned = cell.task, STUDY.arm(cell.arm).rate_of or cell.arm
            tuning = [c for c in cells if c[:2] == tuned and c.is_tuning]
            assert len(tuning) == 3
            assert max(wave_of[c] for c in tuning) < wave_of[cell]
        if cell.arm == "frozen_final":
            source = source_of_ranks(STUDY, cell, done)
            assert source[:1] + source[3:] == cell[:1] + cell[3:] and source.learning_rate == best(
                source
            )
            assert wave_of[source] < wave_of[cell]


def test_no_rate_before_all_are_measured():
    cells = [cell for cell in known_cells(STUDY, {}) if cell.arm == "dr_lora"]
    done = {cell: 1.0 for cell in cells[:2]}
    assert tuned_rate(STUDY, cells[0].task, "dr_lora", done) is None


def test_configs_of_arms_differ_only_in_what_the_arm_means():
    _, done = finish(STUDY)
    shapes = CapacityShapes(layers=4, projections=3, experts=8, max_rank=64)
    for cell in done:
        if cell.arm == "frozen_final":
            continue  # its table is a file of another run
        arm = STUDY.arm(cell.arm)
        config = apply_overrides(STUDY.base, overrides_of(STUDY, cell, OUT, done))
        meant = {change.split("=")[0] for change in arm.overrides}
        changed = set(differences(to_dict(config), STUDY.base)) - {"train.learning_rate"}
        assert changed <= meant
        budget = make_policy(config, shapes, config.train.steps).budget
        assert budget == (256 if cell.arm == "lora_r32" else 128)


def test_rows_of_a_task_are_disjoint():
    for task in STUDY.tasks:
        sets = []
        for path in (task.train_rows, task.tune_rows, task.test_rows):
            name = path.removeprefix("bundled:")
            file = ROOT / (path if name == path else f"drlora_jax/bundled/{name}")
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            sets.append({row["prompt"] for row in rows})
            assert len(sets[-1]) >= 0.99 * len(rows)
        assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])


def test_paired_interval_is_students():
    draw = np.random.default_rng(0)
    one, other = draw.normal(size=(2, 5))
    found = analyse.paired(one, other)
    expected = stats.ttest_rel(other, one).confidence_interval(0.95)
    np.testing.assert_allclose([found.low, found.high], expected, rtol=1e-12)
    assert found.mean == pytest.approx((other - one).mean()) and not found.is_shown
    assert analyse.paired([1, 2, 3], [2, 3.1, 3.9]).is_shown


def test_relation_is_pearsons_within_layers():
    draw = np.random.default_rng(1)
    ranks, use = draw.normal(size=(2, 3, 4, 8))
    found = analyse.relation(ranks, use)
    rows = [[np.corrcoef(ranks[r, x], use[r, x])[0, 1] for r in range(3)] for x in range(4)]
    np.testing.assert_allclose(found.layers, np.mean(rows, axis=1), atol=1e-12)
    assert analyse.relation(np.ones((1, 1, 8)), use[:1, :1]).correlation == 0
    ranks_LE, load_LE = np.array([[4, 0], [1, 3]]), np.array([[3, 1], [0, 5]])
    assert analyse.effective_rank(ranks_LE, load_LE) == pytest.approx((3 + 3) / 2)


def test_fill_replaces_named_blocks_only():
    page = "a\n<!-- one -->\nold\n<!-- end -->\nb\n<!-- two -->\nkept\n<!-- end -->\n"
    filled = report.fill(page, {"one": "new \\1\n", "absent": "x"})
    assert filled == page.replace("old", "new \\1")


@pytest.mark.parametrize("name", sorted(file.stem for file in RESULTS.glob("*.json")))
def test_results_page_says_what_the_data_say(name):
    """The tables of docs/results.md are those of the stored results, which are all of the study."""
    study, results = load_study(ROOT / "experiments" / f"{name}.py"), read_results(name)
    assert len(results["cells"]) == count_cells(study)
    # What was run is what the file says now; fields that came later are at their defaults.
    stored = from_dict(results["base"])
    assert stored == study.base
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    blocks = report.tables(study, results)
    assert report.fill(page, blocks) == page
    assert all(f"<!-- {block} -->" in page for block in blocks)


STUDY_FILE = """
import json, pathlib
from drlora_jax.config import from_dict
from experiments.study import Arm, Study, Task

HERE = pathlib.Path(__file__).parent

def get_config():
    return from_dict(json.loads((HERE / "base.json").read_text()))

def get_study():
    rows = [str(HERE / name) for name in ("train.jsonl", "heldout.jsonl", "heldout.jsonl")]
    task = Task("sums", *rows, learning_rates=(1e-2,))
    arm = Arm("uniform", "plain", ("allocation.kind=uniform",))
    return Study("tiny", get_config(), (task,), (arm,), (1,), 0, "uniform")
"""


def test_a_study_runs_to_its_end_and_repeats(tmp_path, monkeypatch, capsys):
    train = dict(steps=2, eval_every=2)
    config = tiny_config(tmp_path, train=train, model=dict(dtype="float32"))
    (tmp_path / "base.json").write_text(json.dumps(to_dict(config)))
    file, out = tmp_path / "tiny.py", tmp_path / "out"
    file.write_text(STUDY_FILE)
    monkeypatch.setattr("experiments.results.RESULTS", tmp_path)
    study = load_study(file)
    assert run_lib.run_all(study, file, out, jobs=1, arms=["uniform"])
    cells = json.loads((tmp_path / "tiny.json").read_text())["cells"]
    assert [cell["is_tuning"] for cell in cells] == [True, False]
    assert cells[1]["changes"].keys() == {"allocation.kind"}
    test = Cell("sums", "uniform", 1e-2, 1, False)
    assert finished_losses(study, out)[test] == cells[1]["test_loss"] < 9
    assert run_lib.again(study, file, out, "sums/uniform/1") == 0
    assert "the same number" in capsys.readouterr().out
