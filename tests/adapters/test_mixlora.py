"""MixLoRA experts on a dense FFN against a loop over tokens and experts, and as a whole run."""

import dataclasses
import importlib.util
import json
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drlora_jax import convert, export, train
from drlora_jax.adapters.mixlora import MixtureFfn
from drlora_jax.adapters.targets import resolve_targets
from drlora_jax.config import AdapterSection, AllocationSection, MeshSection, TrainConfig
from drlora_jax.config.resolve import make_adapter
from drlora_jax.errors import UserError
from drlora_jax.inference.model import load_run
from drlora_jax.models.architecture import DenseFfnConfig, RoutingConfig
from drlora_jax.models.families import parse_config
from drlora_jax.models.options import DecoderOptions
from drlora_jax.models.routing import choose_experts
from drlora_jax.models.transformer import Decoder
from drlora_jax.ops import lora_deltas
from drlora_jax.training.job import prepare
from drlora_jax.training.step import AuxiliaryWeights, batch_loss, init_lora, init_variables
from tests.support.llama import ALL, LLAMA, LLAMA_2_7B, count, largest_error, logged
from tests.support.tiny import OLMOE, TINY_LLAMA, tiny_config, write_rows, write_tiny_model

WIDTH, HIDDEN, EXPERTS, RANK, SCALE = 12, 20, 5, 3, 2.0


def config_with(kind="mixlora", targets=ALL, allocation=None, **adapter) -> TrainConfig:
    section = AdapterSection(kind=kind, targets=targets, **{"dropout": 0.0} | adapter)
    allocation = allocation or AllocationSection(kind="uniform", r_target=16, r_max=16)
    return TrainConfig(adapter=section, allocation=allocation)


def adapted(values: dict, config: TrainConfig) -> Decoder:
    model_config = parse_config(values)
    options = DecoderOptions(adapter=make_adapter(config, model_config))
    return Decoder(model_config, options)


# -------------------------------------------------------------------------------------- one FFN


def make_ffn(roles=("gate", "up", "down"), routing=None):
    """A module, variables with random factors (expert e has e open ranks, at most all; 0 is closed
    for that), inputs."""
    routing = routing or RoutingConfig(EXPERTS, 2, normalize=True)
    adapter = dataclasses.replace(
        make_adapter(config_with(), parse_config(LLAMA)),
        paths=frozenset(roles),
        scale=SCALE,
        max_rank=RANK,
        own_routing=routing,
    )
    module = MixtureFfn(DenseFfnConfig(HIDDEN, "silu"), DecoderOptions(adapter=adapter))
    x_BTD = jax.random.normal(jax.random.key(0), (2, 4, WIDTH))
    segments_BT = jnp.ones((2, 4), jnp.int32).at[1, 3:].set(0)
    variables = module.init(jax.random.key(1), x_BTD, segments_BT)
    open_ER = np.arange(RANK) < np.arange(EXPERTS)[:, None]
    lora = {
        name: jax.random.normal(jax.random.key(2), leaf.shape)
        if name == "router"
        else {
            "a": leaf["a"],
            "b": jax.random.normal(jax.random.key(3), leaf["b"].shape) * open_ER[..., None],
        }
        for name, leaf in variables["lora"].items()
    }
    mask = jax.tree.map(lambda gate: gate * open_ER, variables["rank_mask"])
    params = jax.tree.map(lambda w: 10 * w, variables["params"])
    return module, {"params": params, "lora": lora, "rank_mask": mask}, x_BTD, segments_BT


def best_experts(variables, x_BTD, top_k: int) -> np.ndarray:
    """Of those with a rank: expert 0 has none."""
    logits_TE = np.asarray(x_BTD.reshape(-1, WIDTH)) @ np.asarray(variables["lora"]["router"])
    return 1 + np.argsort(-logits_TE[:, 1:], axis=1, kind="stable")[:, :top_k]


def by_hand(variables, x_BTD, chosen_TK):
    """Every token's experts one at a time, each with merged weights of its own."""
    params, lora, mask = (variables[name] for name in ("params", "lora", "rank_mask"))

    def weight(role, e):
        kernel = params[role]["kernel"]
        if f"{role}_lora" not in lora:
            return kernel
        factors, gate_R = lora[f"{role}_lora"], mask[f"{role}_lora"]["gate"][e]
        return kernel + SCALE * factors["a"][e].T @ (gate_R[:, None] * factors["b"][e])

    rows = []
    for x_D, chosen in zip(x_BTD.reshape(-1, WIDTH), chosen_TK, strict=True):
        p_E = jnp.exp(x_D @ lora["router"])
        total = sum(p_E[e] for e in chosen)
        y_D = 0.0
        for e in map(int, chosen):
            h_F = jax.nn.silu(x_D @ weight("gate", e)) * (x_D @ weight("up", e))
            y_D += p_E[e] / total * (h_F @ weight("down", e))
        rows.append(y_D)
    return jnp.stack(rows).reshape(x_BTD.shape)


def value_and_grads(function):
    return jax.jit(jax.value_and_grad(function, (0, 1, 2), has_aux=True))


@pytest.mark.parametrize("sorted_from", [0, 1000], ids=["sorted", "side_by_side"])
@pytest.mark.parametrize("roles", [("gate", "up", "down"), ("up",), ("gate", "down")])
def test_equals_a_loop_over_tokens_and_experts(monkeypatch, roles, sorted_from):
    monkeypatch.setattr(lora_deltas, "SORTED_FROM", sorted_from)
    module, variables, x_BTD, segments_BT = make_ffn(roles)
    weights_BTD = jax.random.normal(jax.random.key(5), x_BTD.shape)

    def ours(lora, mask, x_BTD):
        all_ = variables | {"lora": lora, "rank_mask": mask}
        y_BTD, _ = module.apply(all_, x_BTD, segments_BT)
        return jnp.sum(y_BTD * weights_BTD), y_BTD

    def loop(lora, mask, x_BTD):
        y_BTD = by_hand(variables | {"lora": lora, "rank_mask": mask}, x_BTD, chosen_TK)
        return jnp.sum(y_BTD * weights_BTD), y_BTD

    args = (variables["lora"], variables["rank_mask"], x_BTD)
    chosen_TK = best_experts(variables, x_BTD, 2)
    (_, y), grads = jax.jit(jax.value_and_grad(ours, (0, 1, 2), has_aux=True))(*args)
    (_, y_loop), grads_loop = jax.jit(jax.value_and_grad(loop, (0, 1, 2), has_aux=True))(*args)
    assert largest_error(y, y_loop) <= 1e-5
    assert largest_error(grads, grads_loop) <= 1e-5


def test_statistics_leave_padding_out():
    module, variables, x_BTD, segments_BT = make_ffn()
    _, (stats,) = module.apply(variables, x_BTD, segments_BT)
    valid = int(np.sum(np.asarray(segments_BT)))
    assert float(stats.count_E.sum()) == 2 * valid
    np.testing.assert_allclose(float(stats.weight_E.sum()), valid, rtol=1e-6)


@pytest.mark.parametrize("normalize", (True, False))
def test_top_p_keeps_up_to_the_expert_that_passes_it(normalize):
    logits_TE = np.random.default_rng(0).normal(size=(40, EXPERTS)) * 2
    routing = RoutingConfig(EXPERTS, 2, normalize=normalize, top_p=0.8)
    expert_TK, weight_TK = map(np.asarray, choose_experts(jnp.asarray(logits_TE), routing))
    sizes = set()
    for logits_E, experts, weights in zip(logits_TE, expert_TK, weight_TK, strict=True):
        p_E = np.exp(logits_E) / np.exp(logits_E).sum()
        kept, total = [], 0.0
        for e in np.argsort(-p_E):
            kept.append(e)
            total += p_E[e]
            if total > 0.8:
                break
        sizes.add(len(kept))
        assert list(experts) == kept + [EXPERTS] * (EXPERTS - len(kept))
        expected = p_E[kept] / (total if normalize else 1.0)
        np.testing.assert_allclose(weights[: len(kept)], expected, rtol=1e-5)
        assert not weights[len(kept) :].any()
    assert len(sizes) > 2


def test_top_p_of_one_combines_all_experts():
    routing = RoutingConfig(EXPERTS, 2, normalize=True, top_p=1.0)
    module, variables, x_BTD, segments_BT = make_ffn(routing=routing)
    y_BTD, _ = module.apply(variables, x_BTD, segments_BT)
    every_TE = best_experts(variables, x_BTD, EXPERTS - 1)
    assert largest_error(y_BTD, by_hand(variables, x_BTD, every_TE)) <= 1e-5


# ------------------------------------------------------------------------------------ whole models


@pytest.mark.parametrize("kind", ["mixlora", "expert_lora"])
def test_own_scale_and_dropout_of_experts(kind):
    """As if everything had them, as long as nothing but experts is adapted."""
    values = TINY_LLAMA if kind == "mixlora" else OLMOE
    tokens_BT = jnp.arange(12).reshape(2, 6) % values["vocab_size"]
    positions_BT = jnp.broadcast_to(jnp.arange(6), (2, 6))

    def model_with(**adapter):
        own = {"num_experts": 4} if kind == "mixlora" else {}
        return adapted(values, config_with(kind, ("up", "down"), **own, **adapter))

    variables = init_variables(model_with(), jax.random.key(0))
    variables["lora"] = jax.tree.map(lambda leaf: leaf + 0.1, variables["lora"])
    ones_BT, key = jnp.ones_like(tokens_BT), {"dropout": jax.random.key(1)}

    def hidden(**adapter):
        apply = jax.jit(model_with(**adapter).apply)
        return apply(variables, tokens_BT, ones_BT, positions_BT, rngs=key)[0]

    expected = hidden(scale=3.0, dropout=0.5)
    assert jnp.array_equal(hidden(expert_scale=3.0, expert_dropout=0.5), expected)
    assert jnp.array_equal(hidden(scale=3.0, dropout=0.9, expert_dropout=0.5), expected)
    assert not jnp.allclose(hidden(scale=3.0, dropout=0.5, expert_dropout=0.0), expected)
    assert not jnp.allclose(hidden(scale=2.0, dropout=0.5), expected)


def test_starts_as_its_base():
    model = adapted(LLAMA, config_with())
    tokens_BT = jax.random.randint(jax.random.key(1), (2, 11), 0, 64)
    ones_BT, positions_BT = jnp.ones_like(tokens_BT), jnp.tile(jnp.arange(11), (2, 1))
    inputs = (tokens_BT, ones_BT, positions_BT)
    variables = jax.jit(model.init)(jax.random.key(0), *inputs)
    y, stats = jax.jit(model.apply)(variables, *inputs)
    base = Decoder(parse_config(LLAMA), DecoderOptions())
    expected, _ = jax.jit(base.apply)({"params": variables["params"]}, *inputs)
    assert stats.count_E.shape == (3, 8)
    assert float(jnp.abs(y - expected).max()) <= 1e-6


def test_parameters_of_llama_2_7b():
    """202,375,168 without the routers, as published; 203,423,744 with them."""
    lora = jax.eval_shape(lambda: init_lora(adapted(LLAMA_2_7B, config_with()), jax.random.key(0)))
    routers = [leaf for path, leaf in jax.tree.leaves_with_path(lora) if path[-1].key == "router"]
    assert count(lora) == 203_423_744
    assert count(lora) - count(routers) == 202_375_168


def test_what_can_not_be():
    config = parse_config(LLAMA)
    with pytest.raises(UserError, match="adapts no FFN"):
        resolve_targets(config, "mixlora", ("q", "v"))
    with pytest.raises(UserError, match="has experts of its own"):
        resolve_targets(parse_config(OLMOE), "mixlora", ("up",))
    with pytest.raises(UserError, match="experts_per_token must be from 1 to"):
        config_with(num_experts=2, experts_per_token=3)
    with pytest.raises(UserError, match="needs a trained router"):
        config_with(allocation=AllocationSection(kind="moe_sieve"))
    with pytest.raises(
        UserError, match="router=after_warmup is for kind=expert_lora .*, got kind=mixlora"
    ):
        config_with(router="after_warmup")


# ------------------------------------------------------------------------------------- whole runs

MIXTURE = dict(kind="mixlora", targets=ALL, rank=2, num_experts=4, dropout=0.05)


def config_of(folder):
    return tiny_config(folder, adapter=MIXTURE, train=dict(balance_loss=1e-3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run that grows the ranks of its experts twice."""
    folder = tmp_path_factory.mktemp("mixlora")
    (folder / "model").mkdir()
    write_tiny_model(folder / "model", TINY_LLAMA)
    write_rows(folder / "train.jsonl", 60)
    write_rows(folder / "heldout.jsonl", 12, seed=1)
    assert train.train(train.build(prepare(config_of(folder)))) == 0
    return folder


def test_growth_holds_its_budget(folder):
    loaded = load_run(str(folder / "run"))
    assert loaded.ranks_LE.shape == (3, 4)
    assert loaded.ranks_LE.sum(axis=1).tolist() == [4 * 2] * 3
    assert len(set(loaded.ranks_LE.ravel())) > 1
    losses = logged(folder / "run", "eval_loss")
    assert losses[-1] < losses[0] - 0.05
    factors = loaded.variables["lora"]["segment_0"]["layer_0"]["mlp"]
    inactive_LER = np.arange(4) >= loaded.ranks_LE[..., None]
    assert not np.asarray(factors["up_lora"]["b"])[inactive_LER].any()
    first = jax.jit(partial(init_lora, loaded.model))(jax.random.key(0))["segment_0"]["layer_0"][
        "mlp"
    ]["router"]
    assert float(jnp.abs(factors["router"] - first).max()) > 1e-3  # it trained


def test_the_loaded_model_gives_the_logged_loss_and_its_base(folder):
    run, loaded = train.build(prepare(config_of(folder))), load_run(str(folder / "run"))
    batch, *_ = run.job.eval_batches
    inputs = (batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT)
    adapted, _ = jax.jit(loaded.model.apply)(loaded.variables, *inputs)
    base = loaded.base()
    plain, _ = jax.jit(base.model.apply)(base.variables, *inputs)
    untouched = load_run(str(folder / "run"), base_only=True)
    expected, _ = jax.jit(untouched.model.apply)(untouched.variables, *inputs)
    np.testing.assert_array_equal(plain, expected)
    assert float(jnp.abs(adapted - plain).max()) > 1e-3
    loss = jax.jit(lambda v, b: batch_loss(loaded.model, v, b, AuxiliaryWeights())[0].nll)
    nll = sum(float(loss(loaded.variables, each)) for each in run.job.eval_batches)
    targets = sum(float(np.sum(each.target_mask_BT)) for each in run.job.eval_batches)
    assert nll / targets == pytest.approx(logged(folder / "run", "eval_loss")[-1], rel=1e-5)


def test_two_devices_compute_the_same(folder):
    batch, *_ = train.build(prepare(config_of(folder))).job.eval_batches
    losses = []
    for data in (1, 2):
        loaded = load_run(str(folder / "run"), mesh=MeshSection(data=data))
        loss = jax.jit(lambda v, b, m=loaded.model: batch_loss(m, v, b, AuxiliaryWeights())[0].nll)
        losses.append(float(loss(loaded.variables, batch)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def load_tool(name):
    file = pathlib.Path(__file__).parents[2] / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("weights", ["safetensors", "bin"])
def test_out_to_the_files_of_moe_peft_and_in_again(folder, tmp_path, weights):
    """The run has grown ranks; factors, ranks and scale come back bit for bit."""
    if weights == "bin":
        pytest.importorskip("torch")
    run, again = str(folder / "run"), str(tmp_path / "again")
    model, files = str(folder / "model"), tmp_path / "files"
    assert convert.main(["export", "--run", run, "--out", str(files), "--weights", weights]) == 0
    assert {file.name for file in files.iterdir()} == {
        "adapter_config.json",
        f"adapter_model.{weights}",
    }
    command = ["import", "--adapter", str(files), "--model", model, "--out", again]
    assert convert.main(command) == 0
    before, after = load_run(run), load_run(again)
    np.testing.assert_array_equal(after.ranks_LE, before.ranks_LE)
    assert after.model.options.adapter.scale == before.model.options.adapter.scale
    assert after.config.adapter == dataclasses.replace(before.config.adapter, targets=ALL)
    assert after.config.allocation.kind == "pattern"

    def compare(path, got, expected):
        got, expected = np.asarray(got), np.asarray(expected)
        if "mlp" in str(path) and "router" not in str(path):
            is_active = np.arange(expected.shape[-2]) < before.ranks_LE[..., None]
            expected = np.where(is_active[..., None], expected, 0)[:, :, : got.shape[-2]]
        np.testing.assert_array_equal(got, expected)

    jax.tree.map_with_path(compare, after.variables["lora"], before.variables["lora"])
    with pytest.raises(UserError, match="not empty"):
        convert.main(command)


def test_the_load_of_experts(folder, tmp_path, capsys):
    tool, out = load_tool("expert_load"), tmp_path / "shares.json"
    data = str(folder / "heldout.jsonl")
    assert tool.main(["--run", str(folder / "run"), "--data", data, "--out", str(out)]) == 0
    shares_LE = np.array(json.loads(out.read_text())["shares"])
    assert shares_LE.shape == (3, 4) and (shares_LE <= 0.5).all()  # two experts a token
    np.testing.assert_allclose(shares_LE.sum(axis=1), 1, atol=1e-4)
    *_, mean, unused = capsys.readouterr().out.splitlines()
    expected = [shares_LE.min(axis=1).mean(), shares_LE.max(axis=1).mean()]
    np.testing.assert_allclose([float(word) for word in mean.split()[1:3]], expected, atol=2e-3)
    assert unused == f"unused {(shares_LE == 0).sum()} of 12 experts"
    closed = [np.nan] * 2
    rows_LE = np.array([[0.25] * 4, [0.5, 0.5, 0, 0], [1, 0, 0, 0], [0.5, 0.5, *closed]])
    np.testing.assert_allclose(tool.relative_entropy(rows_LE), [1, 0.5, 0, 1], atol=1e-12)
    *_, mean, unused = tool.lines([0, 1], np.array([[0.5, 0.5, *closed], [1, np.nan, *closed]]))
    assert mean.split() == ["mean", "0.750", "0.750", "1.000"] and unused == "unused 0 of 3 experts"


def test_export_says_why_not(folder, capsys):
    out = str(folder / "out")
    way = f"For MoE-PEFT: python -m drlora_jax.convert export --run {folder / 'run'} --out DIR"
    with pytest.raises(UserError, match=f"lose the routing. {way}"):
        export.main(["--run", str(folder / "run"), "--out", out, "--format", "merged"])
