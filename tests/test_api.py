"""The public API: its names and signatures, and each of them beside another way to the result."""

import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import drlora_jax as dj
from drlora_jax import export as export_command
from drlora_jax import generate as generate_command
from drlora_jax import train as train_command
from drlora_jax.config import AdapterSection, AllocationSection, TrainConfig
from drlora_jax.errors import UserError
from drlora_jax.inference.model import load_run as load_for_evaluation
from drlora_jax.inference.scoring import Scorer
from tests.oracles.stored import copy_model, load_arrays, make_rows, stored_positions
from tests.support.tiny import tiny_config, write_tiny_model

BATCH = "tokens_BT, segment_ids_BT=None, positions_BT=None"
SIGNATURES = {
    "CapacityShapes": "(layers, projections, experts, max_rank)",
    "CapacityState": "(ranks_LE)",
    "Event": "(saliency_LE, order_LER=None)",
    "TrainedModel.export": "(self, out, format='peft', *, dtype=None)",
    "TrainedModel.generate": "(self, prompts, *, max_new_tokens=256, temperature=0.0, top_k=None, "
    "top_p=None, stop=(), system=None, seed=0)",
    "TrainedModel.logits": f"(self, {BATCH})",
    "attach": "(model, adapter, allocation, *, key=None)",
    "load_config": "(path, overrides=())",
    "load_model": "(path, dtype=None, mesh=None)",
    "load_run": "(run_dir, step='latest', *, model_path=None, dtype=None, mesh=None)",
    "logits": f"(model, params, {BATCH}, *, adapter=None)",
    "prepare": "(config)",
    "train": "(job)",
}
# Their fields are more than a caller needs: what is promised of them.
FIELDS = {
    "Job": {"config", "lines", "policy", "total_steps"},
    "Placement": {"delta", "ffn", "expert_matrices", "router_delta", "paths", "max_rank"},
    "Policy": {"name", "init", "init_stats", "accumulate", "is_event", "update", "budget"},
    "TrainedModel": {"export", "generate", "logits"},
}


def signature(name: str) -> str:
    value = dj
    for part in name.split("."):
        value = getattr(value, part)
    found = inspect.signature(value)
    plain = [each.replace(annotation=each.empty) for each in found.parameters.values()]
    return str(found.replace(parameters=plain, return_annotation=found.empty))


def test_the_names_are_those_that_are_promised():
    names = {name.partition(".")[0] for name in SIGNATURES} | set(FIELDS)
    assert set(dj.__all__) == names <= set(dir(dj))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dj.nothing  # noqa: B018


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_signature_is_the_promised_one(name):
    assert signature(name) == SIGNATURES[name]


@pytest.mark.parametrize("name", FIELDS)
def test_promised_fields_are_there(name):
    assert FIELDS[name] <= set(dir(getattr(dj, name)))


def test_every_name_has_a_docstring():
    for name in SIGNATURES:
        value = getattr(dj, name, None) or getattr(dj.TrainedModel, name.partition(".")[2])
        assert (value.train_job if name == "train" else value).__doc__.strip()


def test_importing_the_package_is_cheap():
    heavy = "{'jax', 'numpy', 'flax', 'transformers', 'typing'}"
    code = f"import drlora_jax, sys; print(sorted({heavy} & set(sys.modules)), dir(drlora_jax))"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("[] ") and "'load_run'" in done.stdout, done.stderr


def test_train_is_callable_whatever_was_imported_before():
    assert dj.train is train_command and callable(dj.train)


# ---------------------------------------------------------------------------------------------
# base models


@pytest.mark.parametrize("mesh", [None, {"data": 3}])
def test_logits_are_those_of_transformers(tmp_path, mesh):
    model, params = dj.load_model(str(copy_model("olmoe", "experts", tmp_path)), mesh=mesh)
    rows, at = make_rows(), stored_positions()
    got = np.asarray(dj.logits(model, params, rows.tokens, rows.segments, rows.positions))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got[at], load_arrays("olmoe")["logits"], atol=1e-4)


def test_one_text_needs_neither_segments_nor_positions(tmp_path):
    model, params = dj.load_model(str(copy_model("olmoe", "experts", tmp_path)))
    rows = make_rows()
    given = dj.logits(model, params, rows.tokens[:1], rows.segments[:1], rows.positions[:1])
    np.testing.assert_array_equal(dj.logits(model, params, rows.tokens[:1].tolist()), given)


def test_the_bundled_model_loads_in_the_dtype_that_is_named():
    model, params = dj.load_model("bundled:tiny_moe", dtype="bfloat16")
    assert params["embedding"].dtype == jnp.bfloat16
    assert dj.logits(model, params, [[5, 6, 7]]).shape == (1, 3, model.config.vocab_size)


@pytest.mark.parametrize(
    "batch", [([5, 6],), ([[5.0, 6.0]],), ([[5, 6]], [[1]]), ([[5, 6]], None, [[0, 1, 2]])]
)
def test_arrays_of_another_kind_are_refused(batch):
    model, params = dj.load_model("bundled:tiny_moe")
    with pytest.raises(AssertionError):
        dj.logits(model, params, *batch)


# ---------------------------------------------------------------------------------------------
# adapters


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return dj.load_model(str(write_tiny_model(tmp_path_factory.mktemp("model"))))


TOKENS_BT = np.random.default_rng(0).integers(2, 4000, (2, 12))


def test_attaching_does_not_change_the_function(base):
    adapted, adapter = dj.attach(base[0], {"targets": ("up", "down", "q")}, {"r_target": 8})
    after = dj.logits(adapted, base[1], TOKENS_BT, adapter=adapter)
    np.testing.assert_array_equal(dj.logits(*base, TOKENS_BT), after)


def test_an_attached_adapter_is_what_its_product_adds_to_the_weights(base):
    model, params = base
    section = AdapterSection(kind="lora", targets=("q",), rank=4, scale=0.5)
    adapted, adapter = dj.attach(model, section, AllocationSection(kind="uniform"))
    draw = np.random.default_rng(1)
    lora = jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), leaf.dtype) * 0.1,
                        adapter["lora"])  # fmt: skip
    merged = jax.tree.map(lambda leaf: leaf, params)
    for name, layer in merged["segment_0"].items():
        pair = lora["segment_0"][name]["attention"]["q"]["lora"]
        kernel = layer["attention"]["q"]["kernel"]
        product = 0.5 * np.einsum("nrd,nrf->ndf", pair["a"], pair["b"])
        layer["attention"]["q"]["kernel"] = kernel + jnp.asarray(product)
    got = dj.logits(adapted, params, TOKENS_BT, adapter=adapter | {"lora": lora})
    np.testing.assert_allclose(got, dj.logits(model, merged, TOKENS_BT), atol=1e-4)


def test_a_step_of_an_attached_adapter(base):
    """The loss falls, and ranks that are inactive have no gradient."""
    allocation = {"r_init": 2, "r_target": 3, "r_max": 4}
    adapted, adapter = dj.attach(base[0], {"targets": ("down",)}, allocation)

    def loss(lora):
        inputs = adapter | {"lora": lora}
        logits_BTV = dj.logits(adapted, base[1], TOKENS_BT, adapter=inputs)[:, :-1]
        log_p_BTV = jax.nn.log_softmax(logits_BTV)
        return -jnp.take_along_axis(log_p_BTV, TOKENS_BT[:, 1:, None], axis=-1).mean()

    value, gradients = jax.value_and_grad(loss)(adapter["lora"])
    for path, gradient in jax.tree.leaves_with_path(gradients):
        if path[-1].key.startswith("b"):  # [layers, E, R, F]
            assert np.any(gradient[..., :2, :]) and not np.any(gradient[..., 2:, :])
    moved = jax.tree.map(lambda leaf, slope: leaf - 0.1 * slope, adapter["lora"], gradients)
    assert loss(moved) < value


@pytest.mark.parametrize("allocation", [{"kind": "moe_sieve", "r_max": 64}, {"kind": "alphalora"}])
def test_ranks_that_are_measured_cannot_be_attached(base, allocation):
    with pytest.raises(UserError, match="use prepare"):
        dj.attach(base[0], {"targets": ("down",)}, allocation)


# ---------------------------------------------------------------------------------------------
# runs


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run(tmp):
    assert dj.train(dj.prepare(tiny_config(tmp))) == 0
    return tmp / "run"


def test_a_job_is_the_commands_training(tmp, run, capsys):
    config = tiny_config(tmp, "command")
    file = tmp / "config.py"
    file.write_text(f"from drlora_jax.config import *\ndef get_config():\n    return {config!r}\n")
    assert dj.load_config(str(file)) == config
    assert train_command.main(["--config", str(file)]) == 0
    ranks = [(folder / "ranks.jsonl").read_bytes() for folder in (run, tmp / "command")]
    assert ranks[0] == ranks[1]
    assert dj.train(dj.prepare(config)) == 0
    assert "already complete" in capsys.readouterr().out


def test_overrides_reach_the_config():
    config = dj.load_config("bundled:tiny", ["train.steps=7"])
    assert isinstance(config, TrainConfig) and config.train.steps == 7


@pytest.fixture(scope="module")
def trained(run):
    return dj.load_run(run)


def test_the_logits_of_a_run_are_those_that_evaluation_scores(run, trained):
    ids = trained.tokenizer("What is 2 plus 3? It is 5.").input_ids
    [score] = Scorer(load_for_evaluation(str(run)))([(ids[:6], ids[6:])])
    log_p_TV = jax.nn.log_softmax(trained.logits([ids])[0])
    chosen = log_p_TV[np.arange(5, len(ids) - 1), np.array(ids[6:])]
    assert float(chosen.sum()) == pytest.approx(score.total, abs=1e-4)
    base = dj.logits(dj.load_model(trained.config.model.path)[0], trained.params, [ids])
    assert np.abs(base - trained.logits([ids])).max() > 1e-3


def test_a_run_is_the_same_on_a_mesh(run, trained):
    spread = dj.load_run(run, step=12, mesh={"data": 2, "expert": 2})
    tokens_BT = TOKENS_BT[:1]
    np.testing.assert_allclose(spread.logits(tokens_BT), trained.logits(tokens_BT), atol=1e-4)
    assert spread.ranks_LE.tolist() == trained.ranks_LE.tolist() and spread.step == 12


def test_generating_is_the_commands_answer(run, trained, capsys):
    question = "What is 2 plus 3?"
    generate_command.main([f"--run={run}", "--prompt", question, "--max-new-tokens=5"])
    answer = trained.generate(question, max_new_tokens=5)
    assert answer in capsys.readouterr().out and answer
    assert trained.generate([question], max_new_tokens=5) == [answer]


def test_exporting_is_the_commands_adapter(run, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(export_command, "check_opened", lambda made: [])  # torch takes seconds
    trained.export(tmp_path / "face")
    export_command.main([f"--run={run}", "--format=peft", f"--out={tmp_path / 'command'}"])
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors")
                  for name in ("face", "command"))  # fmt: skip
    assert one.keys() == other.keys() and one
    assert all(np.array_equal(one[key], other[key]) for key in one)
    with pytest.raises(UserError, match="format must be one of"):
        trained.export(tmp_path / "none", "gguf")


def test_another_policy_is_handed_to_a_job(tmp):
    """Ranks that a policy of the caller's sets are those of the checkpoint."""
    job = dj.prepare(tiny_config(tmp, "own", allocation=dict(interval=3)))
    ranks_LE = np.array([[4, 1, 2, 1], [1, 4, 1, 2]], np.int32)
    policy = job.policy._replace(
        is_event=lambda step: step == 3,
        update=lambda state, stats, step: (
            dj.CapacityState(ranks_LE),
            stats,
            dj.Event(np.zeros(ranks_LE.shape, np.float32)),
        ),
    )
    assert dj.train(job._replace(policy=policy)) == 0
    assert dj.load_run(tmp / "own").ranks_LE.tolist() == ranks_LE.tolist()
