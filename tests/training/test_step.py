"""Properties of one step: who moves, who is exactly zero, what growth does to the function."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from drlora_jax import train as train_lib
from drlora_jax.adapters.rank_trees import gates_tree
from drlora_jax.data.loader import split_micro_batches
from drlora_jax.interop.hf_read import load_params
from drlora_jax.models.options import DecoderOptions
from drlora_jax.models.routing import RoutingStats
from drlora_jax.models.transformer import Decoder
from drlora_jax.training.growth import grow
from drlora_jax.training.job import prepare
from drlora_jax.training.step import (
    AuxiliaryWeights,
    auxiliary_loss,
    batch_loss,
    make_pretrain_step,
)
from tests.support.stepper import Stepper, expert_leaves, leaves
from tests.support.tiny import OLMOE, tiny_config, write_tiny_model


def moved(before, after):
    return {key for key in before if (np.asarray(before[key]) != np.asarray(after[key])).any()}


@pytest.mark.parametrize(
    ("router", "freeze_a"), [("frozen", False), ("after_warmup", False), ("frozen", True)]
)
def test_exactly_the_intended_leaves_move(tmp_path, router, freeze_a):
    stepper = Stepper(
        tmp_path,
        adapter=dict(router=router, freeze_a=freeze_a),
        train=dict(warmup_ratio=0.1),
        allocation=dict(interval=5),
    )
    before = jax.device_get(leaves(stepper.position.state.lora))
    params = jax.device_get(leaves(stepper.params))
    for _ in range(3):
        stepper.step()
    after = jax.device_get(leaves(stepper.position.state.lora))
    layer = "['segment_0']['layer_0']"
    expected = {
        f"{layer}['moe']['{role}_lora']['{side}']" for role in ("up", "down") for side in "ab"
    }
    expected |= {f"{layer}['attention']['q']['lora']['{side}']" for side in "ab"}
    if router == "after_warmup":
        expected.add(f"{layer}['moe']['router_delta']")
    assert set(before) == expected
    assert moved(before, after) == {key for key in expected if not (freeze_a and "'a'" in key)}
    assert moved(params, jax.device_get(leaves(stepper.params))) == set()


def test_a_trained_router_waits_for_warmup(tmp_path):
    stepper = Stepper(tmp_path, adapter=dict(router="after_warmup"), train=dict(warmup_ratio=0.25))
    deltas = []
    for _ in range(5):
        stepper.step()
        lora = stepper.position.state.lora
        deltas.append(float(jnp.abs(lora["segment_0"]["layer_0"]["moe"]["router_delta"]).max()))
    assert deltas[:3] == [0.0, 0.0, 0.0] and min(deltas[3:]) > 0


def test_pretraining_moves_every_leaf(tmp_path):
    job = prepare(tiny_config(tmp_path))
    model = Decoder(job.model_config, DecoderOptions(base_grad=True))
    run = train_lib.build(job)
    params = load_params(job.model_config, job.directory, run.abstract_params)
    tx = optax.adam(1e-2)
    step = jax.jit(make_pretrain_step(model, tx, AuxiliaryWeights(0.01, 1e-3)))
    opt_state, before = tx.init(params), jax.device_get(leaves(params))
    for index in range(3):
        batch = split_micro_batches(job.loader.batch(index * 8), 2)
        params, opt_state, _ = step(params, opt_state, batch)
    assert moved(before, jax.device_get(leaves(params))) == set(before)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_inactive_ranks_stay_exactly_as_they_were(tmp_path, micro_batches):
    stepper = Stepper(
        tmp_path,
        train=dict(weight_decay=0.1, micro_batches=micro_batches),
        adapter=dict(dropout=0.0),
    )
    initial = expert_leaves(stepper.position.state.lora)
    for _ in range(9):
        stepper.step()
        state = jax.device_get(stepper.position.state)
        is_active = state.mask_LER[..., None] > 0
        adam = next(part for part in state.opt_state if hasattr(part, "mu"))
        for key, value in expert_leaves(state.lora).items():
            rest = np.where(is_active, 0, value - initial[key])
            assert not rest.any(), key
            assert np.array_equal(
                np.where(is_active, 0, value), np.where(is_active, 0, initial[key])
            )
            for moment in (adam.mu, adam.nu):
                assert not np.where(is_active, 0, expert_leaves(moment)[key]).any(), key
    assert stepper.position.capacity.ranks_LE.sum(axis=1).tolist() == [8, 8]


def test_idle_experts_keep_factors_and_moments(tmp_path):
    """Sixteen experts and one short document a step: some expert gets no token."""
    values = OLMOE | {"num_experts": 16, "num_experts_per_tok": 1}
    model = write_tiny_model(tmp_path / "many_experts", values)
    stepper = Stepper(
        tmp_path,
        model=dict(path=str(model)),
        train=dict(batch_size=1, sequence_length=32),
        data=dict(pack=False),
        allocation=dict(interval=1),
    )
    seen_idle = 0
    for _ in range(10):
        before = jax.device_get(stepper.position.state)
        weights = np.asarray(stepper.step()["weight_LE"])
        after = jax.device_get(stepper.position.state)
        idle = weights == 0
        seen_idle += idle.sum()
        for tree in (lambda state: state.lora, lambda state: state.opt_state[1].mu):
            for key, value in expert_leaves(tree(after)).items():
                assert np.array_equal(value[idle], expert_leaves(tree(before))[key][idle]), key
    assert seen_idle > 0


def test_growth_does_not_change_the_function(tmp_path):
    stepper = Stepper(tmp_path)
    for _ in range(2):
        stepper.step()
    state, _ = stepper.run.step(stepper.params, stepper.position.state, stepper.batch(2))
    position = stepper.position._replace(state=jax.tree.map(jnp.copy, state))
    before = train_lib.evaluate(stepper.run, stepper.params, position.state)
    grown = grow(stepper.run, position, 3)
    assert grown.capacity.ranks_LE.sum() > position.capacity.ranks_LE.sum()
    assert train_lib.evaluate(stepper.run, stepper.params, grown.state) == before


def test_importance_is_the_gate_gradient(tmp_path):
    """|sum_j A dA| = |sum_i B dB| = |dL/dgate| of every rank, on a trained state."""
    stepper = Stepper(tmp_path, adapter=dict(dropout=0.0), allocation=dict(r_init=2, r_target=2))
    for _ in range(3):
        stepper.step()
    state, run = stepper.position.state, stepper.run
    roles = stepper.job.adapter.expert_roles()
    batch = jax.tree.map(lambda array: array[0], stepper.batch(3))

    def loss(lora, gate_LPER):
        gates = gates_tree(run.model, gate_LPER * state.mask_LER[:, None])
        variables = {"params": stepper.params, "lora": lora, "rank_mask": gates}
        return batch_loss(run.model, variables, batch, AuxiliaryWeights())[0].nll

    ones = jnp.ones((2, len(roles), *state.mask_LER.shape[1:]))
    grads, gate_grad = jax.jit(jax.grad(loss, argnums=(0, 1)))(state.lora, ones)
    factors, grads = expert_leaves(state.lora), expert_leaves(grads)
    for index, role in enumerate(roles):
        for side in "ab":
            product = (factors[role, side] * grads[role, side]).sum(axis=-1)
            np.testing.assert_allclose(product, gate_grad[:, index], rtol=1e-3, atol=1e-4)
    assert not np.asarray(gate_grad)[
        np.broadcast_to(state.mask_LER[:, None] == 0, ones.shape)
    ].any()


def test_micro_batches_add_up_to_the_batch(tmp_path):
    """Loss, factors, importance and frequency are those of one micro-batch, up to rounding."""
    results = []
    for count in (1, 4):
        stepper = Stepper(
            tmp_path, name=f"run{count}", train=dict(micro_batches=count), adapter=dict(dropout=0.0)
        )
        losses = [float(stepper.step()["loss"]) for _ in range(5)]
        results.append((losses, stepper.position.capacity, jax.device_get(stepper.position.state)))
    (losses, capacity, state), (losses_4, capacity_4, state_4) = results
    np.testing.assert_allclose(losses_4, losses, rtol=1e-5)
    np.testing.assert_array_equal(capacity_4.ranks_LE, capacity.ranks_LE)
    chex.assert_trees_all_close(state_4.stats, state.stats, rtol=2e-3, atol=1e-6)


def test_the_loss_is_a_sum_over_the_whole_batch(tmp_path):
    """Sum of NLL / number of targets, although micro-batches have unequal numbers of targets."""
    stepper = Stepper(tmp_path, train=dict(micro_batches=2), adapter=dict(dropout=0.0))
    batch = stepper.batch(0)
    nll = [
        stepper.run.eval_step(
            stepper.params,
            stepper.position.state.lora,
            stepper.position.state.mask_LER,
            jax.tree.map(lambda array, index=index: array[index], batch),
        )[0]
        for index in range(2)
    ]
    expected = float(sum(nll)) / batch.target_mask_BT.sum()
    assert float(stepper.step()["loss"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("form", ["pooled", "per_layer", "switch"])
def test_auxiliary_loss(form):
    """Against the formula written out: E * sum_e mean(choices) * mean(probability)."""
    draw = np.random.default_rng(0)
    layers, experts, tokens, chosen = 3, 4, 50, 2
    probability = draw.dirichlet(np.ones(experts), size=(layers, tokens))
    picks = np.argsort(-probability, axis=-1)[..., :chosen]
    one_hot = np.eye(experts)[picks].sum(axis=2)
    first = np.eye(experts)[probability.argmax(axis=-1)]
    stats = RoutingStats(
        jnp.asarray(one_hot.sum(axis=1), jnp.float32),
        jnp.zeros((layers, experts)),
        jnp.asarray(probability.sum(axis=1), jnp.float32),
        jnp.full(layers, 7.0),
        jnp.asarray(first.sum(axis=1), jnp.float32),
        jnp.full(layers, float(experts)),
    )
    if form == "pooled":
        rows = one_hot.reshape(-1, experts), probability.reshape(-1, experts)
        balance = experts * (rows[0].mean(axis=0) * rows[1].mean(axis=0)).sum()
    else:
        chosen_LTE = first if form == "switch" else one_hot
        pairs = zip(chosen_LTE, probability, strict=True)
        balance = np.mean([experts * (a.mean(axis=0) * b.mean(axis=0)).sum() for a, b in pairs])
    expected = 0.5 * balance + 0.1 * 3 * 7.0 / (layers * tokens)
    got = auxiliary_loss(stats, jnp.float32(tokens), AuxiliaryWeights(0.5, 0.1, form))
    assert float(got) == pytest.approx(expected, rel=1e-5)
