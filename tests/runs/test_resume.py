"""What may change when a run goes on is decided by what it learns; the rest is refused or said."""

import json
import os
import shutil

import pytest

from drlora_jax.config import TrainConfig, TrainSection, all_fields, apply_overrides, to_dict
from drlora_jax.errors import UserError
from drlora_jax.runs import resume
from drlora_jax.training.job import prepare
from drlora_jax.training.optimizer import make_schedule
from tests.support.tiny import tiny_config, write_rows

# Every setting that may change, as an override.
FREE = {
    "run.dir": "elsewhere",
    "run.log_every": "3",
    "run.checkpoint_every": "7",
    "run.keep_last": "5",
    "run.tensorboard": "true",
    "run.heartbeat_timeout": "61",
    "run.stall_timeout": "61",
    "model.path": "moved",
    "train.steps": "200",
    "train.epochs": "2",
    "train.eval_every": "3",
}
HELDOUT = {"data.eval_path": "h.jsonl", "data.eval_split": "test", "train.eval_batches": "3"}
ROUNDING = {
    "train.micro_batches": "2",
    "model.remat": "full",
    "model.attention": "xla",
    "model.experts": "dense",
    "mesh.data": "1",
    "mesh.fsdp": "2",
    "mesh.expert": "2",
    "mesh.tensor": "2",
    "mesh.exchange": "padded",
}
# Decided by the training tokens, which the settings of `data` give.
BY_TOKENS = {
    "data.path": "moved.jsonl",
    "data.split": "other",
    "data.format": "prompt_response",
    "data.prompt_field": "q",
    "data.response_field": "a",
    "data.messages_field": "m",
    "data.text_field": "t",
    "data.template": "plain",
    "data.loss_on": "all",
    "data.bad_rows": "skip",
    "data.too_long": "skip",
    "data.max_rows": "99",
}


def stored_of(config=None, **more) -> dict:
    values = {"config": json.loads(json.dumps(to_dict(config or TrainConfig())))}
    return values | {"base_fingerprint": "b", "data_fingerprint": "d"} | more


def origin(**changes) -> dict:
    return {"base_fingerprint": "b", "data_fingerprint": "d", "heldout_fingerprint": "h"} | changes


@pytest.mark.parametrize("name", [*FREE, *HELDOUT, *ROUNDING, *BY_TOKENS])
def test_what_is_not_learned_may_change(name):
    text = (FREE | HELDOUT | ROUNDING | BY_TOKENS)[name]
    config = apply_overrides(TrainConfig(), [f"{name}={text}"])
    assert config != TrainConfig()
    resume.check_settings("run", stored_of(), config)
    resume.check_content("run", stored_of(), config, origin())
    lines = resume.changed_lines(stored_of(heldout_fingerprint="h"), config, origin())
    if name in ROUNDING and not name.startswith("mesh.") or name == "mesh.exchange":
        (line,) = lines
        assert f"{name}={text} (was " in line and "not bit for bit" in line
    else:
        assert lines == []


def other_value(name, kind, value):
    """Another value of a field, as text; None where a case of its own is needed."""
    choices = [choice for choice in kind.split(" | ") if choice != str(value)]
    if kind.startswith(("bool", "int", "float")):
        return {"bool": str(not value), "int": f"{(value or 7) + 1}"}.get(
            kind.split(" | ")[0], f"{(value or 0.25) / 2}"
        )
    return {"str": "other", "a,b,...": "up"}.get(choices[0], choices[0])


def test_everything_else_is_refused_and_named():
    """A field that is added later is learned until somebody says that it is not; of `run` and
    `data` it is the other way round: these say where and how, and the tokens are compared.
    """
    known = {*FREE, *HELDOUT, *ROUNDING, *resume.RANK_FILES}
    refused = []
    for name, kind, value in all_fields():
        is_free = name.startswith(("run.", "data.")) and name not in ("run.seed", *resume.ORDER)
        if name in known or is_free:
            continue
        text = other_value(name, kind, value)
        try:
            config = apply_overrides(TrainConfig(), [f"{name}={text}"])
        except UserError:  # it needs another setting as well
            continue
        if config == TrainConfig():
            continue
        with pytest.raises(
            UserError, match=f"run.dir=run was created with {name}=.*, got .*undo the change"
        ):
            resume.check_settings("run", stored_of(), config)
        refused.append(name)
    assert {"run.seed", "train.batch_size", "train.learning_rate", "data.pack"} <= set(refused)
    assert {"data.shuffle", "model.dtype", "adapter.rank", "allocation.gamma"} <= set(refused)


@pytest.mark.parametrize("name", BY_TOKENS)
def test_other_tokens_are_refused_with_the_setting_that_gives_them(name):
    config = apply_overrides(TrainConfig(), [f"{name}={BY_TOKENS[name]}"])
    message = f"was created with {name}=.*, got .*{BY_TOKENS[name]}: the training tokens differ"
    with pytest.raises(UserError, match=message) as error:
        resume.check_content("run", stored_of(), config, origin(data_fingerprint="e"))
    assert "base" not in str(error.value) and not set("('[") & set(
        str(error.value).replace("(data_fingerprint d, got e)", "")
    )


def test_a_pretraining_has_no_digest_of_its_tokens():
    config = apply_overrides(TrainConfig(), ["data.path=other.jsonl"])
    with pytest.raises(UserError, match=r"created with data.path=, got other.jsonl"):
        resume.check_settings("run", stored_of(data_fingerprint=""), config)


def test_another_held_out_set_is_said():
    config = TrainConfig()
    before = stored_of(heldout_fingerprint="h")
    (line,) = resume.changed_lines(before, config, origin(heldout_fingerprint="i"))
    assert "eval_loss is not comparable with earlier values" in line
    (line,) = resume.changed_lines(before, config, origin(heldout_fingerprint=""))
    assert "no held-out loss" in line
    assert resume.changed_lines(before, config, origin()) == []
    (line,) = resume.changed_lines(stored_of(heldout_fingerprint=""), config, origin())
    assert "is measured from now on; the run started without" in line
    # A run from before the held-out set had a digest: its settings say what may be.
    config = apply_overrides(config, ["data.eval_path=other.jsonl"])
    (line,) = resume.changed_lines(stored_of(), config, origin())
    assert "held-out set" in line
    assert resume.changed_lines(stored_of(), TrainConfig(), origin()) == []


def test_other_devices_are_said():
    before = stored_of(heldout_fingerprint="h", devices={"kind": "cpu", "mesh": {"data": 1}})
    now = {"kind": "cpu", "mesh": {"data": 1, "fsdp": 1}}
    assert resume.changed_lines(before, TrainConfig(), origin(), now) == []
    now = {"kind": "TPU v5", "mesh": {"data": 4}}
    (line,) = resume.changed_lines(before, TrainConfig(), origin(), now)
    assert "devices=TPU v5 (was cpu), mesh.data=4 (was 1)" in line and "rounding" in line
    for edited in (3, None, [], {"mesh": 3}, {"kind": "TPU v5", "mesh": [4]}):
        before = stored_of(heldout_fingerprint="h", devices=edited)
        resume.changed_lines(before, TrainConfig(), origin(), now)


def test_stored_fields_of_another_kind_are_no_change():
    """An older version kept what a config file had set for its own kind."""
    config = apply_overrides(TrainConfig(), ["allocation.kind=uniform"])
    before = stored_of(config)
    before["config"]["allocation"] |= {"r_init": 4, "interval": 10}
    resume.check_settings("run", before, config)
    before["config"]["allocation"]["r_target"] = 8
    with pytest.raises(
        UserError, match="created with allocation.r_target=8, got 16; undo the change"
    ):
        resume.check_settings("run", before, config)


def test_a_file_of_ranks_is_the_same_file_by_another_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = ["allocation.kind=pattern", "allocation.pattern=ranks.json"]
    config = apply_overrides(TrainConfig(), overrides)
    moved = apply_overrides(config, [f"allocation.pattern={tmp_path / 'ranks.json'}"])
    resume.check_settings("run", stored_of(config), moved)
    moved = apply_overrides(config, ["allocation.pattern=new.json"])
    with pytest.raises(UserError, match="created with allocation.pattern=ranks.json, got new.json"):
        resume.check_settings("run", stored_of(config), moved)
    before = stored_of(config, initial_ranks=[[1, 2]])
    resume.check_settings("run", before, moved)
    resume.check_first_ranks("run", before, moved, [[1, 2]])
    with pytest.raises(UserError, match="got new.json, which gives different ranks"):
        resume.check_first_ranks("run", before, moved, [[2, 1]])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_rate_that_does_not_go_on_is_said(schedule):
    section = TrainSection(steps=20, schedule=schedule, warmup_ratio=0.2, learning_rate=1e-3)
    before = make_schedule(section, 20, 1e-3)
    logged = (20, float(before(19)))
    same = resume.rate_line(logged, before, done=19, first_total=20, total=20)
    assert same is None
    longer = make_schedule(section, 40, 1e-3, first_total=20)
    line = resume.rate_line(logged, longer, done=20, first_total=20, total=40)
    rates = f"{logged[1]:.2e} at step 20 to {float(longer(20)):.2e} at step 21"
    assert f"the learning rate rises from {rates}" in line
    assert "train.steps 20 -> 40" in line and "warm-up is not repeated" in line
    # Already prolonged: it goes on as it did.
    logged = (30, float(longer(29)))
    assert resume.rate_line(logged, longer, done=30, first_total=20, total=40) is None
    assert resume.rate_line(None, longer, done=20, first_total=20, total=40) is None


# ---------------------------------------------------------------------------------------------
# with files


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of tiny_config as its first checkpoint leaves it."""
    folder = tmp_path_factory.mktemp("resume")
    job = prepare(tiny_config(folder))
    job.run_dir.create(job.config, job.origin, job.schedule_steps)
    (folder / "run" / "checkpoints" / "5").mkdir(parents=True)
    return folder


def test_rows_may_move(begun, monkeypatch):
    """To an absolute path, to a relative one, to another file of the same rows."""
    monkeypatch.chdir(begun)
    shutil.copy("train.jsonl", "moved.jsonl")
    shutil.copy("heldout.jsonl", "held.jsonl")
    for path, heldout in (
        ("train.jsonl", "heldout.jsonl"),
        (os.path.abspath("moved.jsonl"), "held.jsonl"),
    ):
        data = dict(path=(path,), eval_path=(heldout,))
        job = prepare(tiny_config(begun, data=data))
        assert not job.is_new
        assert not [line for line in job.lines if line.startswith("resume")]


def test_another_batch_split_is_the_same_held_out_set(begun):
    job = prepare(tiny_config(begun, train=dict(micro_batches=2), model=dict(remat="full")))
    said = [line for line in job.lines if line.startswith("resume")]
    assert said == [
        "resume      model.remat=full (was selective), train.micro_batches=2 (was 1): equal up to "
        "rounding, not bit for bit"
    ]


def test_another_held_out_file_is_said_before_work(begun):
    write_rows(begun / "others.jsonl", 9, seed=7)
    job = prepare(tiny_config(begun, data=dict(eval_path=(str(begun / "others.jsonl"),))))
    assert any("eval_loss is not comparable" in line for line in job.lines)
    job = prepare(tiny_config(begun, train=dict(eval_batches=1, micro_batches=8)))
    assert any("eval_loss is not comparable" in line for line in job.lines)


def test_settings_are_compared_before_rows_are_read(begun, monkeypatch):
    def never(*_, **__):
        raise AssertionError("rows were read")

    monkeypatch.setattr("drlora_jax.training.job.load_documents", never)
    with pytest.raises(UserError, match="created with allocation.gamma=1.2, got 2.0"):
        prepare(tiny_config(begun, allocation=dict(gamma=2.0)))
    with pytest.raises(UserError, match="no growth event fits"):
        prepare(tiny_config(begun, "new", allocation=dict(interval=11)))
