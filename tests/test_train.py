"""Whole runs on a tiny random MoE: determinism, stopping and resuming, run directories."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest

from drlora_jax import train as train_lib
from drlora_jax.errors import EXIT_DONE, EXIT_RESUMABLE, RunError, UserError
from drlora_jax.runs.directory import RunDirectory
from drlora_jax.training.job import prepare
from drlora_jax.training.optimizer import make_schedule
from drlora_jax.training.state import restore, restore_newest, start
from tests.support.tiny import tiny_config, write_rows

NOT_LEARNED = {"tokens_per_second", "host_peak_bytes"}  # in the log, but of the machine
STOP_AFTER = 5  # between the growth events after steps 3 and 7; 12 steps in all


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """One compiled run; each test gives it a run directory of its own."""
    folder = tmp_path_factory.mktemp("train")
    run = train_lib.build(prepare(tiny_config(folder)))
    return run, train_lib.compile_step(run), folder


@pytest.fixture
def start_run(built, monkeypatch):
    """Takes a run in the named directory; with `stop_after`, SIGTERM arrives during that step."""
    run, (compiled, seconds), folder = built

    def start(name, stop_after=None):
        config = dataclasses.replace(run.job.config, run=tiny_config(folder, name).run)
        directory = RunDirectory(str(folder / name))
        is_new = directory.stored() is None
        job = run.job._replace(config=config, run_dir=directory, is_new=is_new)

        def step(params, state, batch):
            if stop_after is not None and int(state.step) == stop_after - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return compiled(params, state, batch)

        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        with monkeypatch.context() as patch:
            patch.setattr(train_lib, "compile_step", lambda run: (step, seconds))
            patch.setattr(train_lib, "memory_lines", lambda *_: [])
            try:
                return train_lib.train(run._replace(job=job))
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    return start


def read_log(folder, name, file):
    rows = [json.loads(line) for line in (folder / name / file).read_text().splitlines()]
    return [{key: row[key] for key in row if key not in NOT_LEARNED} for row in rows]


def read_all(folder, name):
    """Losses, norms, tokens and ranks of a run: everything but how fast and large it was."""
    return read_log(folder, name, "metrics.jsonl"), read_log(folder, name, "ranks.jsonl")


def final_state(run, folder, name):
    job = run.job._replace(run_dir=RunDirectory(str(folder / name)))
    checkpoints = train_lib.Checkpoints(job.run_dir.checkpoints, keep_last=2)
    position = restore(run._replace(job=job), checkpoints, job.total_steps)
    checkpoints.close()
    return jax.device_get(position)


@pytest.fixture(scope="module")
def reference(built):
    """The uninterrupted run that others are compared with."""
    run, compiled, folder = built
    directory = RunDirectory(str(folder / "reference"))
    job = run.job._replace(config=tiny_config(folder, "reference"), run_dir=directory)
    handlers = [(n, signal.getsignal(n)) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_lib, "compile_step", lambda run: compiled)
        assert train_lib.train(run._replace(job=job)) == EXIT_DONE
    for number, handler in handlers:
        signal.signal(number, handler)
    return read_all(folder, "reference"), final_state(run, folder, "reference")


def test_a_second_run_is_identical(built, start_run, reference):
    run, _, folder = built
    assert start_run("second") == EXIT_DONE
    assert read_all(folder, "second") == reference[0]
    jax.tree.map(np.testing.assert_array_equal, final_state(run, folder, "second"), reference[1])


def test_the_report_shows_the_ranks_of_the_last_checkpoint(built, reference):
    _, _, folder = built
    page = (folder / "reference" / "report.html").read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    ranks_LE = reference[1].capacity.ranks_LE
    assert data["maps"][0]["frames"][-1][1] == ranks_LE.tolist()
    assert [step for step, _ in data["maps"][0]["frames"]] == [0, 3, 7]
    assert f"{ranks_LE.mean():.2f}" in page


def test_a_run_records_its_routing_and_what_it_was_made_with(built, reference):
    run, _, folder = built
    (metrics, events), _ = reference
    routing = run.job.model_config.moe.routing
    for row in [*events, *(row for row in metrics if "eval_loss" in row and row["step"])]:
        np.testing.assert_allclose(np.sum(row["routing_load"], axis=1), 1, atol=1e-4)
        assert np.max(row["routing_load"]) <= 1 / routing.experts_per_token + 1e-4
        np.testing.assert_allclose(np.sum(row["routing_weight"], axis=1), 1, atol=1e-4)
    stored = json.loads((folder / "reference" / "config.json").read_text())
    assert stored["versions"]["jax"] == jax.__version__
    assert stored["devices"]["mesh"]["data"] == 1 and stored["devices"]["count"] == 1
    assert stored["initial_ranks"] == run.job.policy.init().ranks_LE.tolist()


def test_training_lowers_the_loss_and_keeps_the_budget(built, reference):
    run, _, _ = built
    (metrics, ranks), position = reference
    evals = [row["eval_loss"] for row in metrics if "eval_loss" in row]
    assert evals[-1] < evals[0] - 0.5
    assert [row["step"] for row in ranks] == [3, 7]
    sums = np.array([row["ranks"] for row in ranks]).sum(axis=-1)
    assert (sums[0] < run.job.policy.budget).all() and (sums[1] == run.job.policy.budget).all()
    assert np.ptp(position.capacity.ranks_LE) > 0


@pytest.mark.parametrize("stop_after", [2, 3, 4, STOP_AFTER, 7, 11])
def test_a_stopped_run_resumes_bit_for_bit(built, start_run, reference, stop_after):
    run, _, folder = built
    name = f"stopped_{stop_after}"
    assert start_run(name, stop_after) == EXIT_RESUMABLE
    assert read_log(folder, name, "metrics.jsonl")[-1]["step"] == stop_after
    assert start_run(name) == EXIT_DONE
    assert read_all(folder, name) == reference[0]
    jax.tree.map(np.testing.assert_array_equal, final_state(run, folder, name), reference[1])


def _reset(position, fresh, piece):
    """The restored position with one saved piece as it was before step 1."""
    state, stats = position.state, position.state.stats
    adam = next(part for part in state.opt_state if hasattr(part, "mu"))
    fresh_adam = next(part for part in fresh.state.opt_state if hasattr(part, "mu"))

    def with_adam(**changes):
        new = adam._replace(**changes)
        opt_state = tuple(new if part is adam else part for part in state.opt_state)
        return position._replace(state=state._replace(opt_state=opt_state))

    if piece in ("mu", "nu", "count"):
        return with_adam(**{piece: getattr(fresh_adam, piece)})
    if piece == "schedule":
        opt_state = tuple(
            new if part is not adam else part
            for part, new in zip(state.opt_state, fresh.state.opt_state, strict=True)
        )
        return position._replace(state=state._replace(opt_state=opt_state))
    if piece in ("frequency_LE", "importance_LPER", "updates_LE"):
        stats = stats._replace(**{piece: getattr(fresh.state.stats, piece)})
        return position._replace(state=state._replace(stats=stats))
    if piece == "ranks":
        mask = fresh.state.mask_LER
        return position._replace(capacity=fresh.capacity, state=state._replace(mask_LER=mask))
    if piece == "tokens":
        return position._replace(tokens=0)
    return position._replace(state=state._replace(**{piece: getattr(fresh.state, piece)}))


PIECES = (
    "step lora mu nu count schedule frequency_LE importance_LPER updates_LE ranks tokens".split()
)


@pytest.mark.parametrize("piece", PIECES)
def test_every_saved_piece_is_needed(built, start_run, reference, monkeypatch, piece):
    run, _, folder = built
    name = f"without_{piece}"
    # Equal numbers of updates cancel in the saliency, so their loss shows in the state at the end.
    stop_after = 9 if piece == "updates_LE" else STOP_AFTER
    assert start_run(name, stop_after) == EXIT_RESUMABLE

    def restore_without(run, checkpoints):
        position, step = restore_newest(run, checkpoints)
        return _reset(position, start(run), piece), step

    monkeypatch.setattr(train_lib, "restore_newest", restore_without)
    start_run(name)
    same_state = jax.tree.map(np.array_equal, final_state(run, folder, name), reference[1])
    assert not all(jax.tree.leaves(same_state)) or read_all(folder, name) != reference[0]


def test_a_finished_run_says_so(built, start_run, reference, capsys):
    start_run("finished")
    capsys.readouterr()
    assert start_run("finished") == EXIT_DONE
    assert "already complete" in capsys.readouterr().out


def test_a_run_that_is_asked_for_fewer_steps_than_it_has_says_so(built):
    job = built[0].job
    assert train_lib._complete_line(job, 12).endswith(f"{job.run_dir.path} is at step 12 of 12")
    assert train_lib._complete_line(job, 51).endswith(
        "is at step 51, train.steps=12 requests fewer"
    )
    section = dataclasses.replace(job.config.train, steps=None, epochs=2)
    job = job._replace(config=dataclasses.replace(job.config, train=section))
    line = train_lib._complete_line(job, 51)
    assert line.endswith("is at step 51, train.epochs=2 (12 steps) requests fewer")


def test_a_prolonged_run_says_where_its_rate_goes(built, start_run):
    run, _, folder = built
    start_run("prolonged", 9)
    directory = RunDirectory(str(folder / "prolonged"))
    job = run.job._replace(run_dir=directory, is_new=False)
    assert train_lib._rate_line(run._replace(job=job)) is None
    job = job._replace(total_steps=48)
    schedule = make_schedule(job.config.train, 48, 1e-2, first_total=12)
    line = train_lib._rate_line(run._replace(job=job, schedule=schedule))
    # Of 12 steps 3 are warm-up; 5 of the 9 that follow were taken, and 6 of 45 now.
    assert "from 4.44e-03 at step 9 back to 8.67e-03 at step 10 (train.steps 12 -> 48)" in line


def test_lines_after_the_restored_step_are_cut(tmp_path):
    directory = RunDirectory(str(tmp_path))
    directory.metrics_file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    assert directory.cut_back(2, 1)
    assert directory.metrics_file.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(train=dict(learning_rate=0.5)), r"created with train.learning_rate=0.01, got 0.5"),
        (dict(allocation=dict(gamma=2.0)), r"created with allocation.gamma=1.2, got 2.0"),
        (dict(data=dict(loss_on="all")), r"created with data.loss_on=response, got all"),
    ],
)
def test_another_config_is_refused_on_resume(built, start_run, changes, message):
    _, _, folder = built
    if not (folder / "stopped").exists():
        start_run("stopped", 2)
    with pytest.raises(UserError, match=message):
        prepare(tiny_config(folder, "stopped", **changes))


def test_a_run_from_before_a_setting_existed_goes_on(built, start_run):
    _, _, folder = built
    start_run("older", 2)
    file = folder / "older" / "config.json"
    stored = json.loads(file.read_text())
    del stored["config"]["allocation"]["spectral_start"]
    file.write_text(json.dumps(stored))
    assert prepare(tiny_config(folder, "older")).is_new is False
    with pytest.raises(UserError, match="created with allocation.spectral_start=False, got True"):
        prepare(tiny_config(folder, "older", allocation=dict(spectral_start=True)))


def test_more_steps_keep_the_growth_schedule(built, start_run):
    run, _, folder = built
    start_run("longer", 2)
    job = prepare(tiny_config(folder, "longer", train=dict(steps=40)))
    assert job.total_steps == 40 and job.policy.describe == run.job.policy.describe


def test_another_base_is_refused_on_resume(built, start_run, tmp_path):
    _, _, folder = built
    start_run("based", 2)
    other = tmp_path / "other"
    tiny_config(other.parent)  # writes the same model elsewhere
    weights = tmp_path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(UserError, match="a base model different"):
        prepare(tiny_config(folder, "based", model=dict(path=str(tmp_path / "model"))))


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_diverged_run_ends_before_it_is_saved(built, start_run, monkeypatch, name):
    """NaN at step 3, a growth event: an error, no checkpoint and no event of it."""
    run, (compiled, seconds), folder = built

    def diverging(params, state, batch):
        state, metrics = compiled(params, state, batch)
        return state, metrics | ({name: np.float32("nan")} if int(state.step) == 3 else {})

    directory = RunDirectory(str(folder / f"diverged_{name}"))
    job = run.job._replace(config=tiny_config(folder, directory.path.name), run_dir=directory)
    monkeypatch.setattr(train_lib, "compile_step", lambda run: (diverging, seconds))
    monkeypatch.setattr(train_lib, "memory_lines", lambda *_: [])
    with pytest.raises(RunError, match=f"{name} is nan at step 3"):
        train_lib.train(run._replace(job=job))
    assert not directory.has_checkpoint() and not directory.ranks_file.exists()


def test_fewer_steps_than_the_schedule_needs_are_refused(built, start_run):
    _, _, folder = built
    start_run("shorter", 2)
    with pytest.raises(UserError, match="before the last event of this run .step 7"):
        prepare(tiny_config(folder, "shorter", train=dict(steps=6)))


def test_other_rows_are_refused_on_resume(built, start_run):
    _, _, folder = built
    start_run("rows", 2)
    write_rows(folder / "other.jsonl", 60, seed=5)
    original = (folder / "train.jsonl").read_text()
    (folder / "train.jsonl").write_text((folder / "other.jsonl").read_text())
    try:
        with pytest.raises(UserError, match="data_fingerprint"):
            prepare(tiny_config(folder, "rows"))
    finally:
        (folder / "train.jsonl").write_text(original)


def test_a_run_without_a_checkpoint_starts_anew(tmp_path):
    """Ended before its first checkpoint, a run may be corrected and started again."""
    job = prepare(tiny_config(tmp_path))
    job.run_dir.create(job.config, job.origin, job.schedule_steps)
    assert prepare(tiny_config(tmp_path, train=dict(learning_rate=0.5))).is_new


def test_a_foreign_directory_is_refused(tmp_path):
    config = tiny_config(tmp_path)
    with pytest.raises(UserError, match="is not a run directory"):
        prepare(tiny_config(tmp_path, run=dict(dir=config.model.path)))


def test_the_step_can_not_recompile(built):
    """The compiled step takes one set of shapes, dtypes and shardings, and refuses any other."""
    run, (compiled, _), _ = built
    state = run.abstract_state
    wrong = state._replace(mask_LER=jax.ShapeDtypeStruct(state.mask_LER.shape, bool))
    with pytest.raises(TypeError):
        compiled(run.abstract_params, wrong, None)
