"""Config files, overrides and ranges; mistakes as users make them are in error_cases/config.py."""

import dataclasses
import json

import pytest

from drlora_jax.config import (
    AdapterSection,
    AllocationSection,
    DataSection,
    ModelSection,
    RunSection,
    TrainConfig,
    TrainSection,
    all_fields,
    apply_overrides,
    field_rows,
    from_dict,
    load_config,
    to_dict,
)
from drlora_jax.errors import UserError

CONFIG_FILE = """
from drlora_jax.config import AllocationSection, TrainConfig, TrainSection

def get_config():
    return TrainConfig(
        train=TrainSection(steps=7, batch_size=4),
        allocation=AllocationSection(r_max=24),
    )
"""


@pytest.fixture
def write(tmp_path):
    """Writes a config file and returns its path."""

    def write(text: str) -> str:
        path = tmp_path / "config.py"
        path.write_text(text)
        return str(path)

    return write


# ------------------------------------------------------------------------------------ config files


def test_load_config(write):
    config = load_config(write(CONFIG_FILE), ["train.batch_size=6", "run.dir=runs/x"])
    assert (config.train.steps, config.train.batch_size, config.run.dir) == (7, 6, "runs/x")
    assert config.allocation.r_max == 24
    assert config.model == ModelSection()


def test_a_section_that_is_refused_as_the_file_is_read(write):
    with pytest.raises(UserError, match="train.steps must be greater than 0, got 0"):
        load_config(write("from drlora_jax.config import *\nsection = TrainSection(steps=0)"))


# --------------------------------------------------------------------------------------- overrides

OVERRIDES = {
    "run.seed=3": 3,
    "run.dir=a b/c=d": "a b/c=d",
    "train.learning_rate=1e-3": 1e-3,
    "train.learning_rate=1": 1.0,
    "train.max_grad_norm=none": None,
    "train.max_grad_norm=0.5": 0.5,
    "train.eval_batches=null": None,
    "train.eval_batches=4": 4,
    "train.schedule=cosine": "cosine",
    "data.pack=false": False,
    "data.shuffle=True": True,
    "data.path=a.jsonl, b.jsonl": ("a.jsonl", "b.jsonl"),
    "data.eval_path=(a.jsonl,)": ("a.jsonl",),
    "data.path=": (),
    "adapter.targets=up,down": ("up", "down"),
    "mesh.data=-1": -1,
    "model.dtype=bfloat16": "bfloat16",
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_overrides(override):
    section, name = override.partition("=")[0].split(".")
    config = apply_overrides(TrainConfig(), [override])
    value = getattr(getattr(config, section), name)
    assert value == OVERRIDES[override] and type(value) is type(OVERRIDES[override])
    changed = dataclasses.replace(getattr(TrainConfig(), section), **{name: value})
    assert config == dataclasses.replace(TrainConfig(), **{section: changed})


def test_later_overrides_win_and_are_checked_together():
    config = apply_overrides(TrainConfig(), ["run.seed=1", "run.seed=2"])
    assert config.run.seed == 2
    ranks = ["allocation.r_init=40", "allocation.r_target=50", "allocation.r_max=60"]
    assert apply_overrides(TrainConfig(), ranks).allocation.r_init == 40
    lora = ["adapter.kind=lora", "allocation.kind=uniform"]
    assert apply_overrides(TrainConfig(), lora).adapter.kind == "lora"


def test_steps_and_epochs_replace_each_other():
    config = apply_overrides(TrainConfig(), ["train.epochs=2"])
    assert (config.train.steps, config.train.epochs) == (None, 2)
    config = apply_overrides(config, ["train.steps=9"])
    assert (config.train.steps, config.train.epochs) == (9, None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("zzzzzz.steps=3", "Unknown config section 'zzzzzz'; known: run, model, data"),
        ("train.r_max=3", r"Unknown config field train.r_max; did you mean \w+\.\w+\?"),
    ],
)
def test_bad_overrides(override, message):
    with pytest.raises(UserError, match=message):
        apply_overrides(TrainConfig(), [override])


# --------------------------------------------------------------------------------- types and ranges

REFUSED = {
    # Types.
    "run.seed must be int, got '3'": (RunSection, {"seed": "3"}),
    "run.seed must be int, got True": (RunSection, {"seed": True}),
    "train.learning_rate must be float, got True": (TrainSection, {"learning_rate": True}),
    "data.path must be a,b,..., got 'a'": (DataSection, {"path": "a"}),
    "data.path must be a,b,..., got 1": (DataSection, {"path": (1,)}),
    "data.pack must be bool, got 1": (DataSection, {"pack": 1}),
    "model.remat must be none | selective | full, got None": (ModelSection, {"remat": None}),
    "adapter.rank must be int | none, got 2.0": (AdapterSection, {"rank": 2.0}),
    # Ranges.
    "run.seed must be 0 or more and below 2**32, got -1": (RunSection, {"seed": -1}),
    "run.log_every must be greater than 0, got 0": (RunSection, {"log_every": 0}),
    "run.checkpoint_every must be greater than 0, got 0": (RunSection, {"checkpoint_every": 0}),
    "run.keep_last must be greater than 0, got -2": (RunSection, {"keep_last": -2}),
    "train.epochs must be greater than 0, got -1": (TrainSection, {"steps": None, "epochs": -1}),
    "train.batch_size must be greater than 0, got 0": (TrainSection, {"batch_size": 0}),
    "train.micro_batches must be greater than 0, got 0": (TrainSection, {"micro_batches": 0}),
    "train.sequence_length must be greater than 0, got 0": (TrainSection, {"sequence_length": 0}),
    "train.eval_every must be greater than 0, got 0": (TrainSection, {"eval_every": 0}),
    "train.eval_batches must be greater than 0, got 0": (TrainSection, {"eval_batches": 0}),
    "train.epsilon must be greater than 0, got 0.0": (TrainSection, {"epsilon": 0.0}),
    "train.warmup_ratio must be in [0, 1), got 1": (TrainSection, {"warmup_ratio": 1}),
    "train.beta1 must be in [0, 1), got -0.1": (TrainSection, {"beta1": -0.1}),
    "train.weight_decay must be 0 or more, got -1": (TrainSection, {"weight_decay": -1}),
    "train.balance_loss must be 0 or more, got -1": (TrainSection, {"balance_loss": -1}),
    "train.z_loss must be 0 or more, got -1": (TrainSection, {"z_loss": -1}),
    "train.max_grad_norm must be greater than 0 or None, got 0": (
        TrainSection,
        {"max_grad_norm": 0},
    ),
    "adapter.scale must be greater than 0, got 0": (AdapterSection, {"scale": 0}),
    "adapter.dropout must be in [0, 1), got 1.0": (AdapterSection, {"dropout": 1.0}),
    "adapter.router_learning_rate must be greater than 0, got 0": (
        AdapterSection,
        {"router_learning_rate": 0},
    ),
    "allocation needs 0 <= r_init <= r_target <= r_max, got 8, 16, 12": (
        AllocationSection,
        {"r_max": 12},
    ),
    "allocation needs 0 <= r_init <= r_target <= r_max, got 0, 0, 0": (
        AllocationSection,
        {"r_init": 0, "r_target": 0, "r_max": 0},
    ),
    "allocation.interval must be greater than 0, got 0": (AllocationSection, {"interval": 0}),
    "allocation.gamma must be 0 or more, got -1": (AllocationSection, {"gamma": -1}),
    "allocation.frequency_decay must be in [0, 1), got 1": (
        AllocationSection,
        {"frequency_decay": 1},
    ),
    "allocation.importance_decay must be in [0, 1), got 1": (
        AllocationSection,
        {"importance_decay": 1},
    ),
    "allocation.warmup_ratio must be in [0, 1), got 1": (AllocationSection, {"warmup_ratio": 1}),
    "allocation.last_event must be greater than 0, got 0": (AllocationSection, {"last_event": 0}),
    "allocation.released=True fixes importance=gate_abs and saliency=product, got gate_sq and": (
        AllocationSection,
        {"released": True, "importance": "gate_sq"},
    ),
    "allocation.released=True is for kind=dr_lora, got kind=random; leave it out": (
        AllocationSection,
        {"released": True, "kind": "random"},
    ),
    "allocation.share must be in (0, 1], got 0": (
        AllocationSection,
        {"kind": "moe_sieve", "share": 0.0},
    ),
    "allocation.profile_rows must be greater than 0, got 0": (
        AllocationSection,
        {"kind": "moe_sieve", "profile_rows": 0},
    ),
    "allocation.kind=pattern needs allocation.pattern=FILE": (
        AllocationSection,
        {"kind": "pattern"},
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    section, fields = REFUSED[message]
    fields = ({"steps": 5} if section is TrainSection else {}) | fields
    with pytest.raises(UserError) as caught:
        section(**fields)
    assert message in str(caught.value)


def kind_with(name: str) -> list[str]:
    """The override that chooses a policy which has a field."""
    section, field = name.split(".")
    kinds = {"allocation": AllocationSection, "adapter": AdapterSection}.get(section)
    owners = kinds.owners(field) if kinds else []
    return [f"{section}.kind={owner}" for owner in owners[:1]]


@pytest.mark.parametrize("value", ["inf", "nan", "-inf"])
def test_every_float_is_finite(value):
    for name, kind, _ in all_fields():
        if "float" in kind.split(" | "):
            with pytest.raises(UserError, match=f"{name} must be .*float"):
                apply_overrides(TrainConfig(), [f"{name}={value}", *kind_with(name)])


def test_sections_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().run.seed = 3


# -------------------------------------------------------------------------- fields of another kind

FILE = """
from drlora_jax.config import *

def get_config():
    return TrainConfig(allocation=AllocationSection({fields}))
"""


def test_a_field_of_another_kind_is_refused_with_the_kinds_that_have_it(write):
    message = "allocation.interval=50 is for kind=dr_lora, random or adalora, got kind=uniform; le"
    with pytest.raises(UserError, match=message):
        AllocationSection(kind="uniform", interval=50)
    with pytest.raises(UserError, match=message):
        load_config(write(FILE.format(fields="kind='uniform', interval=50")))
    for value in (50, 200):  # given is given, also where it is the default
        with pytest.raises(UserError, match=message.replace("50", str(value))):
            texts = ["allocation.kind=uniform", f"allocation.interval={value}"]
            load_config(write(CONFIG_FILE), texts)
    plain = write(FILE.format(fields="kind='uniform'"))
    with pytest.raises(UserError, match=message):
        load_config(plain, ["allocation.interval=50"])
    assert load_config(plain).allocation == AllocationSection(kind="uniform")


def test_what_a_file_set_for_its_own_kind_is_dropped_with_a_line(write, capsys):
    fields = "kind='dr_lora', r_init=4, r_target=8, gamma=2.0"
    file = write(FILE.format(fields=fields))
    assert load_config(file, ["allocation.kind=dr_lora"]).allocation.gamma == 2.0
    assert capsys.readouterr().out == ""
    config = load_config(file, ["allocation.kind=prilora", "allocation.r_target=6"])
    assert config.allocation == AllocationSection(kind="prilora", r_init=4, r_target=6)
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "note: allocation.kind=prilora does not use gamma=2.0 of the config file"


def test_a_file_that_names_no_kind_may_set_a_field_for_the_command_line(write, capsys):
    file = write(FILE.format(fields="share=0.5"))
    assert load_config(file, ["allocation.kind=moe_sieve"]).allocation.share == 0.5
    assert capsys.readouterr().out == ""
    for more in ([], ["allocation.gamma=1.0"]):
        with pytest.raises(UserError, match="share=0.5 is for kind=moe_sieve, got kind=dr_lora"):
            load_config(file, more)


def test_fields_of_another_kind_in_a_stored_config_are_ignored():
    values = to_dict(TrainConfig(allocation=AllocationSection(kind="uniform")))
    values["allocation"] |= {"interval": 10, "gamma": "odd", "pattern": None}
    assert from_dict(values).allocation == AllocationSection(kind="uniform")
    with pytest.raises(UserError, match="Unknown config field allocation.intervall"):
        from_dict(values | {"allocation": {"kind": "uniform", "intervall": 1}})
    with pytest.raises(UserError, match="allocation.kind must be uniform | dr_lora.*got 'odd'"):
        from_dict(values | {"allocation": {"kind": "odd", "interval": 1}})


def test_a_config_keeps_every_field_of_every_kind():
    """What config.json holds does not depend on the kind."""
    for kind in ("uniform", "moe_sieve"):
        section = to_dict(TrainConfig(allocation=AllocationSection(kind=kind)))["allocation"]
        assert list(section) == list(to_dict(TrainConfig())["allocation"])
        assert section["interval"] == 200 and section["share"] == 0.25


def test_every_field_says_what_it_means():
    rows = {row.name: row for row in field_rows()}
    assert all(meaning for row in rows.values() for meaning, _ in row.meanings)
    assert rows["train.steps"].meanings[0][1] == ()
    assert [kinds for _, kinds in rows["allocation.share"].meanings] == [("moe_sieve",)]
    assert len(rows["allocation.r_init"].meanings) > 1  # a kind may mean something of its own


# ------------------------------------------------------------------------------------ data and back


def test_round_trip_through_json():
    overrides = ["data.path=a,b", "train.epochs=2", "train.max_grad_norm=none", "run.seed=5"]
    for config in (TrainConfig(), apply_overrides(TrainConfig(), overrides)):
        assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_from_dict_refuses():
    values = to_dict(TrainConfig())
    with pytest.raises(UserError, match="Unknown config section 'trian'; did you mean train?"):
        from_dict(values | {"trian": {}})
    with pytest.raises(UserError, match="Unknown config field run.sed; did you mean run.seed?"):
        from_dict(values | {"run": {"sed": 1}})
    with pytest.raises(UserError, match="run.seed must be int, got 'x'"):
        from_dict(values | {"run": {"seed": "x"}})
    with pytest.raises(UserError, match="train.steps must be greater than 0"):
        from_dict(values | {"train": {"steps": 0}})


NEEDED = {  # of a kind that its defaults do not suit
    "adalora": ["allocation.r_init=20"],
    "pattern": ["allocation.pattern=ranks.json"],
    "lora": ["allocation.kind=uniform"],
}


def test_all_fields_are_what_overrides_accept():
    rows = all_fields()
    names = [name for name, _, _ in rows]
    assert len(set(names)) == len(names) and {"train.steps", "mesh.data"} <= set(names)
    kinds = {name: (kind, default) for name, kind, default in rows}
    assert kinds["train.steps"] == ("int | none", 100)
    assert kinds["model.dtype"] == ("auto | float32 | bfloat16", "auto")
    assert kinds["data.path"] == ("a,b,...", ())
    chosen = [("allocation", kind) for kind in AllocationSection.kinds]
    for section, kind in chosen + [("adapter", kind) for kind in AdapterSection.kinds]:
        overrides = NEEDED.get(kind, []) + [f"{section}.kind={kind}"]
        check_fields_of(section, kind, overrides, rows)


def check_fields_of(section: str, kind: str, overrides: list[str], rows) -> None:
    """A kind takes the defaults of its own fields, and refuses every other one by name."""
    config, of = apply_overrides(TrainConfig(), overrides), type(getattr(TrainConfig(), section))
    for name, _, default in rows:
        own, field = name.split(".")
        text = ",".join(default) if isinstance(default, tuple) else default
        if own == section and not of.has(kind, field):
            with pytest.raises(UserError, match=f"{name}=.* is for kind=.*, got kind={kind}; "):
                apply_overrides(TrainConfig(), [*overrides, f"{name}={text}"])
        elif own == section and field != "kind" and not any(name in text for text in overrides):
            assert apply_overrides(config, [f"{name}={text}"]) == config


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("a,b", ("a", "b")),
        ("a, b.jsonl", ("a", "b.jsonl")),
        ("'a, b.jsonl',c", ("a, b.jsonl", "c")),
        ('"a, b.jsonl"', ("a, b.jsonl",)),
        ("('a, b.jsonl', 'it.jsonl')", ("a, b.jsonl", "it.jsonl")),
        ("it's.jsonl,x", ("it's.jsonl", "x")),
        ("d/[ab].jsonl", ("d/[ab].jsonl",)),
        ("here, too.jsonl", ("here, too.jsonl",)),
        ("here, too.jsonl,x", ("here", "too.jsonl", "x")),
        (f"{'x' * 200},{'y' * 200}", ("x" * 200, "y" * 200)),
        ("", ()),
    ],
)
def test_paths_with_commas(tmp_path, monkeypatch, text, paths):
    """In quotes, or where a file of the whole name is there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here, too.jsonl").write_text("")
    assert apply_overrides(TrainConfig(), [f"data.path={text}"]).data.path == paths
