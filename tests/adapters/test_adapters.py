"""Adapters and options through whole steps: initial values, roles, dtypes, remat, policies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drlora_jax.adapters.expert_lora import ExpertLora
from drlora_jax.adapters.lora import Lora
from drlora_jax.adapters.rank_trees import masks_tree, over_roles
from drlora_jax.allocation.measurements import ELEMENTWISE, StepView
from drlora_jax.models.families import parse_config
from drlora_jax.models.layers import Projection
from drlora_jax.models.options import DecoderOptions
from drlora_jax.models.transformer import Decoder, logits
from drlora_jax.training.step import init_lora
from tests.support.stepper import Stepper, expert_leaves, leaves
from tests.support.tiny import OLMOE, random_params


def test_a_is_kaiming_uniform_and_b_is_zero():
    """U(+-1/sqrt(d_in)) for all ranks: bounds, spread and mean; layers and experts differ."""
    config = parse_config(OLMOE)
    paths = frozenset(f"segment_0/layer_0/{name}" for name in ("moe/up", "moe/down", "attention/q"))
    spec = ExpertLora(paths, rank=64, max_rank=64)
    model = Decoder(config, DecoderOptions(adapter=spec))
    for path, value in leaves(init_lora(model, jax.random.key(0))).items():
        if path.endswith("['b']"):
            assert not value.any()
            continue
        bound = value.shape[-1] ** -0.5
        assert np.abs(value).max() <= bound and value.max() > 0.98 * bound
        assert np.std(value) == pytest.approx(bound / 3**0.5, rel=0.05)
        flat = np.asarray(value).reshape(value.shape[0], -1)
        assert (flat[0] != flat[1]).mean() > 0.99


def numpy_decoder(params, config, tokens, factors, scale):
    """The adapted OLMoE written as loops over positions and experts, float64."""
    from numpy import exp, sqrt

    layer = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["segment_0"]["layer_0"])
    attention, moe = config.segments[0].unit[0].attention, config.moe
    heads, kv_heads, width = attention.num_heads, attention.num_kv_heads, attention.head_dim

    def norm(x, weight):
        return weight * x / sqrt((x * x).mean(axis=-1, keepdims=True) + config.norm_epsilon)

    def turn(x):
        angles = np.outer(np.arange(len(x)), attention.rope.inverse_frequencies)[:, None]
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate(
            [a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], -1
        )

    def low_rank(x, role, index, *expert):
        if role not in factors:
            return 0.0
        a, b, mask = (np.asarray(part[(index, *expert)], np.float64) for part in factors[role])
        return scale * ((x @ a.T) * mask) @ b

    x = np.asarray(params["embedding"], np.float64)[tokens]
    for index in range(config.num_layers):
        here = jax.tree.map(lambda leaf, index=index: leaf[index], layer)
        y, parts = norm(x, here["attention_norm"]["scale"]), {}
        for role in "qkv":
            z = y @ here["attention"][role]["kernel"] + low_rank(y, role, index)
            if role != "v":
                z = norm(z, here["attention"][f"{role}_norm"]["scale"])
            z = z.reshape(len(z), -1, width)
            parts[role] = z if role == "v" else turn(z)
        out = np.zeros((len(x), heads, width))
        for head in range(heads):
            group = head * kv_heads // heads
            scores = parts["q"][:, head] @ parts["k"][:, group].T * width**-0.5
            scores = np.where(np.tril(np.ones_like(scores)) > 0, scores, -np.inf)
            weights = exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            out[:, head] = weights @ parts["v"][:, group]
        x = x + out.reshape(len(x), -1) @ here["attention"]["o"]["kernel"]
        y = norm(x, here["ffn_norm"]["scale"])
        routed = y @ here["moe"]["router"]
        probability = exp(routed) / exp(routed).sum(axis=-1, keepdims=True)
        for token in range(len(x)):
            chosen = np.argsort(-probability[token], kind="stable")[: moe.routing.experts_per_token]
            for e in chosen:
                row = y[token]
                fused = row @ here["moe"]["gate_up"][e] + low_rank(row, "gate_up", index, e)
                gate, up = np.split(fused, 2)
                gate = gate + low_rank(row, "gate", index, e)
                up = up + low_rank(row, "up", index, e)
                hidden = gate / (1 + exp(-gate)) * up
                result = hidden @ here["moe"]["down"][e] + low_rank(hidden, "down", index, e)
                x[token] += result * probability[token, e] / probability[token, chosen].sum()
    return norm(x, np.asarray(params["final_norm"]["scale"])) @ np.asarray(params["head"])


@pytest.mark.parametrize("targets", [("up", "down", "q"), ("gate", "up", "v"), ("gate_up", "down")])
def test_adapted_logits_against_loops(targets):
    """Every role, unequal ranks from 0 to r_max, non-zero B."""
    config, ranks = parse_config(OLMOE), 5
    params = random_params(config)
    kinds = {role: "attention" if role in "qkv" else "moe" for role in targets}
    paths = frozenset(f"segment_0/layer_0/{kind}/{role}" for role, kind in kinds.items())
    spec = ExpertLora(paths, scale=2.0, rank=3, max_rank=ranks)
    model = Decoder(config, DecoderOptions(adapter=spec))
    draw = np.random.default_rng(0)
    lora = jax.tree.map(
        lambda leaf: jnp.asarray(draw.normal(size=leaf.shape) * 0.1, jnp.float32),
        init_lora(model, jax.random.key(0)),
    )
    active = draw.integers(0, ranks + 1, size=(2, 4))
    mask_LER = (np.arange(ranks) < active[..., None]).astype(np.float32)
    gates = masks_tree(model, jnp.asarray(mask_LER))
    layer, factors = lora["segment_0"]["layer_0"], {}
    for role, kind in kinds.items():
        pair = layer[kind][f"{role}_lora"] if kind == "moe" else layer[kind][role]["lora"]
        mask = mask_LER if kind == "moe" else np.ones((2, 3))
        factors[role] = (pair["a"], pair["b"], mask)
    tokens = draw.integers(0, config.vocab_size, size=24)
    tokens_BT, positions_BT = jnp.asarray(tokens)[None], jnp.arange(24)[None]
    variables = {"params": params, "lora": lora, "rank_mask": gates}
    hidden, _ = model.apply(variables, tokens_BT, jnp.ones_like(tokens_BT), positions_BT)
    expected = numpy_decoder(params, config, tokens, factors, 2.0)
    np.testing.assert_allclose(logits(config, params, hidden)[0], expected, atol=1e-4)


def test_elementwise_importance_against_loops():
    config = parse_config(OLMOE)
    paths = frozenset(f"segment_0/layer_0/moe/{role}" for role in ("up", "down"))
    model = Decoder(config, DecoderOptions(adapter=ExpertLora(paths, max_rank=3)))
    draw = np.random.default_rng(1)
    shapes = init_lora(model, jax.random.key(0))
    lora, grads = (
        jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), jnp.float32), shapes)
        for _ in range(2)
    )

    def each_role(measure):
        return over_roles(
            model, lambda layer, role: measure(layer(lora, role), layer(grads, role), "b")
        )

    got = ELEMENTWISE.measure(StepView(lora, grads, None, each_role, True))
    values, slopes = expert_leaves(lora), expert_leaves(grads)
    for index, role in enumerate(("up", "down")):
        for place in np.ndindex(got.shape[0], *got.shape[2:]):
            sides = [np.abs(values[role, s][place] * slopes[role, s][place]).sum() for s in "ab"]
            layer, *rest = place
            assert got[layer, index, *rest] == pytest.approx(sides[0] * sides[1], rel=1e-4)


OPTIONS = {  # policies and placements: test_policy_matrix.py
    "released": dict(allocation=dict(released=True)),
    "elementwise": dict(allocation=dict(importance="elementwise_product")),
    "squared_counts": dict(allocation=dict(importance="gate_sq", frequency="count")),
    "balanced": dict(
        train=dict(balance_loss=0.01, z_loss=1e-3), adapter=dict(router="after_warmup")
    ),
    "bfloat16": dict(model=dict(dtype="bfloat16")),
    "idle_too": dict(adapter=dict(freeze_idle_experts=False)),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_learns_within_its_budget(tmp_path, name):
    stepper = Stepper(tmp_path, **OPTIONS[name])
    losses = [float(stepper.step()["loss"]) for _ in range(9)]
    assert losses[-1] < losses[0] - 0.1
    ranks_LE, policy = stepper.position.capacity.ranks_LE, stepper.job.policy
    if name == "released":  # module slots: twice the quota, counted once an expert
        assert (ranks_LE.sum(axis=1) >= policy.budget).all()
    else:
        assert (ranks_LE.sum(axis=1) == policy.budget).all()


def test_remat_changes_nothing(tmp_path):
    states = []
    for remat in ("none", "selective", "full"):
        stepper = Stepper(tmp_path, name=remat, model=dict(remat=remat))
        for _ in range(3):
            stepper.step()
        states.append(jax.device_get(stepper.position.state.lora))
    for other in states[1:]:
        jax.tree.map(
            lambda one, two: np.testing.assert_allclose(one, two, atol=1e-5), states[0], other
        )


def test_bfloat16_is_close_to_float32(tmp_path):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        stepper = Stepper(tmp_path, name=dtype, model=dict(dtype=dtype), adapter=dict(dropout=0.0))
        losses[dtype] = [float(stepper.step()["loss"]) for _ in range(6)]
        lora = jax.tree.leaves(stepper.position.state.lora)
        assert {leaf.dtype for leaf in lora} == {jnp.dtype("float32")}
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.02)


def test_probe_is_the_gain_of_one_more_rank(tmp_path):
    """A step with probes takes the same step, and measures what a gradient step on the next rank
    would take off the loss, to first order: (loss(B) - loss(B - e dB)) / e = |dB|^2.
    """
    allocation = dict(importance="probe", r_max=4, interval=4)
    probed = Stepper(tmp_path, name="probed", allocation=allocation, adapter=dict(dropout=0.0))
    plain = Stepper(tmp_path, name="plain", adapter=dict(dropout=0.0))
    for _ in range(2):
        one, two = probed.step(), plain.step()
        assert float(one["loss"]) == float(two["loss"])
        assert float(one["grad_norm"]) == pytest.approx(float(two["grad_norm"]), rel=1e-6)
    for name, leaf in leaves(probed.position.state.lora).items():
        np.testing.assert_allclose(leaf, leaves(plain.position.state.lora)[name], atol=1e-7)

    state, batch = probed.position.state, probed.batch(2)
    micro = jax.tree.map(lambda array: jnp.asarray(array[0]), batch)

    mask = jnp.copy(state.mask_LER)

    def loss(lora):
        nll, targets, _ = probed.run.eval_step(probed.params, lora, jnp.ones_like(mask), micro)
        return nll / targets

    full = jax.grad(loss)(state.lora)  # all ranks let through; rows of B that are zero do nothing
    before = jax.tree.map(jnp.copy, state.stats)
    rank_LE = np.asarray(mask).sum(axis=-1).astype(int)
    state, _ = probed.run.step(probed.params, state, batch)  # without the event that comes here
    decay = probed.job.config.allocation.importance_decay
    after = state.stats.importance_LPER
    got = (after - decay * before.importance_LPER) / (1 - decay)
    for index, role in enumerate(("up", "down")):
        rows = expert_leaves(full)[role, "b"]  # [L, E, R, D]
        for layer, expert in np.ndindex(rank_LE.shape):
            rank = rank_LE[layer, expert]
            expected = np.zeros(rows.shape[2])
            expected[rank] = (np.asarray(rows)[layer, expert, rank] ** 2).sum()
            np.testing.assert_allclose(got[layer, index, expert], expected, rtol=1e-3, atol=1e-10)


def test_lora_dropout_leaves_out_inputs_and_outputs_for_all_tokens():
    """Every unit vector as a token: the update as a matrix, kept entries times 1 / (1 - p)^2."""
    width, features, rate = 40, 30, 0.5
    adapter = Lora(frozenset({"here"}), scale=2.0, rank=3, factor_dropout=rate)
    module = Projection(features, DecoderOptions(adapter=adapter), name="here")
    eye_BTD, ones_BT = jnp.eye(width)[None], jnp.ones((1, width), jnp.int32)
    variables = module.init(jax.random.key(0), eye_BTD, ones_BT)
    pair = variables["lora"]["lora"]
    pair["b"] = jax.random.normal(jax.random.key(1), pair["b"].shape)
    base_DF, whole_DF = variables["params"]["kernel"], 2.0 * pair["a"].T @ pair["b"]

    def share_kept(key):
        rngs = None if key is None else {"dropout": jax.random.key(key)}
        (y_BTF, _) = module.apply(variables, eye_BTD, ones_BT, rngs=rngs)
        return np.asarray((y_BTF[0] - base_DF) / whole_DF)

    np.testing.assert_allclose(share_kept(None), 1.0, rtol=1e-3)  # evaluation leaves nothing out
    drawn = [share_kept(key) for key in range(2)]
    for kept_DF in drawn:
        is_kept_D, is_kept_F = (np.abs(kept_DF).max(axis=axis) > 0.1 for axis in (1, 0))
        expected = np.outer(is_kept_D, is_kept_F) / (1 - rate) ** 2
        np.testing.assert_allclose(kept_DF, expected, rtol=1e-3, atol=1e-3)
        assert 0.2 < is_kept_D.mean() < 0.8 and 0.2 < is_kept_F.mean() < 0.8
    assert (drawn[0] != drawn[1]).any()
