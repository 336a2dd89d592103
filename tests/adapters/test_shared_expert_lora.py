"""LoRA for experts that share one matrix of each pair, beside `expert_lora` with the shared matrix
repeated.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drlora_jax.adapters.expert_lora import ExpertLora
from drlora_jax.adapters.rank_trees import masks_tree
from drlora_jax.adapters.shared_expert_lora import SharedExpertLora
from drlora_jax.adapters.targets import coverage, resolve_targets
from drlora_jax.allocation import masks_from_ranks
from drlora_jax.config import AdapterSection, AllocationSection, MeshSection, TrainConfig
from drlora_jax.errors import UserError
from drlora_jax.export import FORMATS
from drlora_jax.interop.export_check import Trained, judge
from drlora_jax.interop.lora_tables import layer_updates
from drlora_jax.models.families import parse_config
from drlora_jax.models.options import DecoderOptions
from drlora_jax.models.transformer import Decoder, logits
from drlora_jax.training.growth import grow
from drlora_jax.training.step import init_lora
from tests.support.exports import Base
from tests.support.stepper import Stepper
from tests.support.tiny import OLMOE, random_params

KIND = "shared_expert_lora"
RANKS, SCALE = 5, 1.5
SHARED = {"gate": "a", "up": "a", "gate_up": "a", "down": "b"}


def adapted(kind: type, targets: tuple[str, ...], config=None) -> Decoder:
    config = config or parse_config(OLMOE)
    paths = resolve_targets(config, kind.kind, targets)
    adapter = kind(paths, max_rank=RANKS, scale=SCALE, rank=2)
    return Decoder(config, DecoderOptions(adapter=adapter))


def experts_of(lora: dict) -> dict:
    return lora["segment_0"]["layer_0"]["moe"]


def drawn(model: Decoder, ranks_LE: np.ndarray, seed=0) -> dict:
    """Random matrices; rows of the own matrices are zero where a rank is inactive."""
    draw = np.random.default_rng(seed)
    lora = jax.eval_shape(lambda: init_lora(model, jax.random.key(0)))
    lora = jax.tree.map(lambda leaf: (0.2 * draw.normal(size=leaf.shape)).astype("f4"), lora)
    mask_LER1 = masks_from_ranks(ranks_LE, RANKS)[..., None]
    for name, pair in experts_of(lora).items():
        own = "b" if SHARED[name.removesuffix("_lora")] == "a" else "a"
        pair[own] *= mask_LER1
    return lora


def repeated(lora: dict, experts: int) -> dict:
    """The tree of `expert_lora` that computes the same."""
    return jax.tree.map(
        lambda leaf: np.repeat(leaf, experts, axis=1) if leaf.shape[1] == 1 else leaf, lora
    )


def loss_of(model: Decoder, params: dict, ranks_LE: np.ndarray):
    gates = masks_tree(model, jnp.asarray(masks_from_ranks(ranks_LE, RANKS)))
    tokens_BT = np.random.default_rng(5).integers(0, 64, (2, 24))
    ones_BT, positions_BT = np.ones_like(tokens_BT), np.tile(np.arange(24), (2, 1))

    def loss(lora):
        variables = {"params": params, "lora": lora, "rank_mask": gates}
        hidden_BTD, _ = model.apply(variables, tokens_BT, ones_BT, positions_BT)
        return jnp.sum(logits(model.config, params, hidden_BTD) ** 2)

    return loss


@pytest.mark.parametrize("targets", [("gate", "up", "down"), ("gate_up", "down", "q"), ("down",)])
def test_equals_expert_lora_with_the_shared_matrix_repeated(targets):
    """Values, and gradients: that of a shared matrix is the sum over the experts."""
    shared, separate = (adapted(kind, targets) for kind in (SharedExpertLora, ExpertLora))
    ranks_LE = np.random.default_rng(1).integers(0, RANKS + 1, (2, 4))
    lora, params = drawn(shared, ranks_LE), random_params(shared.config)
    value, grads = jax.jit(jax.value_and_grad(loss_of(shared, params, ranks_LE)))(lora)
    expected, others = jax.jit(jax.value_and_grad(loss_of(separate, params, ranks_LE)))(
        repeated(lora, 4)
    )
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    for path, grad in jax.tree.leaves_with_path(grads):
        other = others
        for part in path:
            other = other[part.key]
        if grad.shape != other.shape:
            assert grad.shape[1] == 1
            other = np.sum(other, axis=1, keepdims=True)
        np.testing.assert_allclose(grad, other, rtol=1e-3, atol=1e-4 * np.abs(other).max())


def test_each_starts_as_its_base_and_the_shared_matrix_at_random():
    lora = init_lora(adapted(SharedExpertLora, ("up", "down")), jax.random.key(0))
    for name, shared, own in (("up_lora", "a", "b"), ("down_lora", "b", "a")):
        pair = experts_of(lora)[name]
        assert pair[shared].shape[1] == 1 and not np.any(pair[own])
        bound = pair[shared].shape[-1] ** -0.5
        assert 0.9 * bound < np.abs(pair[shared]).max() <= bound


@pytest.mark.parametrize("targets", [("gate", "up", "down"), ("gate_up", "down", "q"), ("up",)])
def test_trained_parameters_are_those_of_the_model(targets):
    model = adapted(SharedExpertLora, targets)
    lora = jax.eval_shape(lambda: init_lora(model, jax.random.key(0)))
    rows = coverage(model.config, model.options.adapter, targets)
    assert sum(row.trained for row in rows) == sum(leaf.size for leaf in jax.tree.leaves(lora))


def test_the_equal_parameter_rank_is_printed():
    """By hand for OLMOE: width 16, hidden 24, 4 experts; all three projections, per rank."""
    model = adapted(SharedExpertLora, ("gate", "up", "down"))
    moe, width = model.config.moe, model.config.width
    experts, hidden = moe.routing.num_experts, moe.expert_dim
    ours = 2 * 3 * RANKS * (width + experts * hidden)
    theirs = 2 * 3 * experts * (width + hidden)
    (line,) = model.options.adapter.notes(model.config)
    assert f"{ours:,} parameters" in line and line.endswith(f"at rank {ours / theirs:.2f}")


@pytest.fixture(scope="module")
def stepper(tmp_path_factory):
    """Ten steps with growth at every second one, everything before and after each kept."""
    stepper = Stepper(
        tmp_path_factory.mktemp("shared"),
        adapter=dict(kind=KIND, targets=("up", "down"), dropout=0.0),
        allocation=dict(r_init=1, r_target=3, r_max=RANKS, interval=2),
    )
    stepper.initial = jax.device_get(stepper.position.state.lora)
    return stepper


def test_growth_changes_nothing_although_the_shared_matrices_are_trained(stepper):
    run, events = stepper.run, 0
    batch = jax.tree.map(lambda array: array[0], stepper.batch(0))
    for index in range(10):
        state, _ = run.step(stepper.params, stepper.position.state, stepper.batch(index))
        stepper.position = stepper.position._replace(state=state)
        if stepper.job.policy.is_event(index + 1):
            before = run.eval_step(stepper.params, state.lora, state.mask_LER, batch)[0]
            stepper.position = grow(run, stepper.position, index + 1)
            state = stepper.position.state
            after = run.eval_step(stepper.params, state.lora, state.mask_LER, batch)[0]
            assert float(before) == float(after)
            events += 1
        check_inactive_rows(stepper)
    assert events > 2 and stepper.position.capacity.ranks_LE.sum(axis=1).tolist() == [12, 12]


def check_inactive_rows(stepper) -> None:
    """Own rows of inactive ranks are zero, shared rows that no expert uses as they were drawn."""
    state = jax.device_get(stepper.position.state)
    is_active_LER1 = state.mask_LER[..., None] > 0
    adam = next(part for part in state.opt_state if hasattr(part, "mu"))
    for name, shared, own in (("up_lora", "a", "b"), ("down_lora", "b", "a")):
        for tree in (state.lora, adam.mu, adam.nu):
            assert not (experts_of(tree)[name][own] * ~is_active_LER1).any()
        is_used = is_active_LER1.any(axis=1, keepdims=True)
        value, first = (experts_of(tree)[name][shared] for tree in (state.lora, stepper.initial))
        assert np.array_equal(value * ~is_used, first * ~is_used)
        if int(state.step) > 1:  # in the first step the experts' own matrices are zero
            assert (value[:, :, 0] != first[:, :, 0]).mean() > 0.9


@pytest.mark.parametrize("layout", FORMATS)
def test_exports_compute_what_was_trained(tmp_path, layout):
    base = Base(tmp_path, "olmoe")
    config = base.config
    ranks_LE = np.random.default_rng(2).integers(0, RANKS + 1, (config.num_layers, 5))
    model = adapted(SharedExpertLora, ("gate", "up", "down", "q"), config)
    lora = drawn(model, ranks_LE)
    gates = jax.device_get(masks_tree(model, jnp.asarray(masks_from_ranks(ranks_LE, RANKS))))
    adapter = model.options.adapter
    updates = layer_updates(config, adapter, lora, ranks_LE)
    trained = Trained(config, adapter, lora, gates, updates)
    judge(base.measure(trained, base.export(trained, layout), layout))


def test_a_mesh_computes_the_same(tmp_path):
    losses = []
    for name, mesh in (("one", MeshSection(data=1)), ("many", MeshSection(1, 2, 2, 2))):
        stepper = Stepper(
            tmp_path,
            name,
            adapter=dict(kind=KIND, targets=("up", "down"), dropout=0.0),
            allocation=dict(r_init=1, r_target=2, r_max=4, interval=2),
            mesh=dataclasses.asdict(mesh),
        )
        losses.append([float(stepper.step()["loss"]) for _ in range(4)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("adapter", "allocation", "message"),
    [
        ({}, dict(kind="adalora", r_init=4, r_target=2, r_max=4), "experts of a layer share these"),
        (dict(freeze_a=True), {}, "adapter.freeze_a=True trains B only, .* it would stay zero"),
    ],
)
def test_what_cannot_be_is_refused(adapter, allocation, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(
            adapter=AdapterSection(kind=KIND, **adapter),
            allocation=AllocationSection(**allocation),
        )
