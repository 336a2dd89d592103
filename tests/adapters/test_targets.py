"""Which matrices a config adapts, and the table that says so."""

import dataclasses

import jax
import pytest

from drlora_jax.adapters.registry import PLACEMENTS
from drlora_jax.adapters.targets import (
    coverage,
    coverage_lines,
    linear_inputs,
    resolve_targets,
)
from drlora_jax.errors import UserError
from drlora_jax.models.architecture import (
    DenseFfnConfig,
    LayerConfig,
    ModelConfig,
    SegmentConfig,
)
from drlora_jax.models.families import parse_config
from drlora_jax.models.options import DecoderOptions
from drlora_jax.models.transformer import Decoder, abstract_params
from drlora_jax.training.step import init_lora
from tests.support.tiny import MIXTRAL, OLMOE

LAYER = "segment_0/layer_0"


def mixed_model() -> ModelConfig:
    """A dense first layer, then MoE layers."""
    base = parse_config(MIXTRAL)
    unit = base.segments[0].unit[0]
    dense = SegmentConfig((LayerConfig(unit.attention, DenseFfnConfig(28)),), 1)
    return ModelConfig("mixtral", 64, 24, (dense, *base.segments), 1e-5)


@pytest.mark.parametrize("values", [OLMOE, MIXTRAL])
def test_the_table_counts_every_weight_matrix(values):
    config = parse_config(values)
    shapes = jax.tree.leaves_with_path(abstract_params(Decoder(config, DecoderOptions())))
    vectors = {"scale", "bias"}
    expected = sum(leaf.size for path, leaf in shapes if path[-1].key not in vectors)
    assert sum(matrix.parameters for matrix in config.matrices()) == expected


def test_roles_mean_experts_for_expert_lora_and_dense_ffns_for_lora():
    config = mixed_model()
    assert resolve_targets(config, "expert_lora", ("up", "q")) == {
        "segment_1/layer_0/moe/up",
        "segment_0/layer_0/attention/q",
        "segment_1/layer_0/attention/q",
    }
    assert resolve_targets(config, "lora", ("up",)) == {"segment_0/layer_0/mlp/up"}


def test_what_plain_lora_reads():
    config = mixed_model()
    width, hidden = config.width, 28
    for kind, targets, expected in (
        ("expert_lora", ("up", "down"), 0),
        ("expert_lora", ("up", "down", "q", "v"), 2 * width),
        ("lora", ("q", "down"), width + hidden),  # of the dense layer, which has both
    ):
        adapter = PLACEMENTS[kind](resolve_targets(config, kind, targets))
        assert linear_inputs(config, adapter) == expected
    paths = resolve_targets(config, "lora", ("q", "down"))
    assert linear_inputs(config, PLACEMENTS["mixlora"](paths)) == width
    assert linear_inputs(config, PLACEMENTS["mola"](paths)) == 0


def test_a_regular_expression_selects_paths():
    config = parse_config(OLMOE)
    assert resolve_targets(config, "expert_lora", (r".*/moe/(up|down)", r".*attention/[qv]")) == {
        f"{LAYER}/{name}" for name in ("moe/up", "moe/down", "attention/q", "attention/v")
    }


@pytest.mark.parametrize(
    "targets", [("up", "down"), ("gate", "up", "down"), ("gate_up", "down", "o"), ("down", "q")]
)
@pytest.mark.parametrize("router", [False, True])
def test_trained_counts_are_those_of_the_model(targets, router):
    config = parse_config(OLMOE)
    paths = resolve_targets(config, "expert_lora", targets)
    spec = PLACEMENTS["expert_lora"](paths, rank=3, max_rank=5, train_router=router)
    model = Decoder(config, DecoderOptions(adapter=spec))
    lora = jax.eval_shape(lambda: init_lora(model, jax.random.key(0)))
    expected = sum(leaf.size for leaf in jax.tree.leaves(lora))
    rows = coverage(config, spec, targets)
    assert sum(row.trained for row in rows) == expected
    text = "\n".join(coverage_lines(rows))
    assert f"{LAYER}/moe/router" in text and "frozen: never adapted" in text


@pytest.mark.parametrize(
    "kind, targets, message",
    [
        ("expert_lora", ("w1",), "'w1' matches no weight"),
        ("expert_lora", ("up", ".*/mlp/up"), "matches no weight"),
        ("expert_lora", ("q", "v"), "adapts no expert"),
        ("lora", (".*/moe/up",), "does not adapt experts"),
        ("expert_lora", ("(up",), "not a regular expression"),
        ("expert_lora", ("gate_up", ".*/moe/gate"), "must name either gate_up or gate and up"),
        ("lora", ("up",), "matches no weight.* adapter.kind=expert_lora adapts it"),
    ],
)
def test_mistakes_are_named(kind, targets, message):
    with pytest.raises(UserError, match=message):
        resolve_targets(parse_config(OLMOE), kind, targets)


def test_a_dense_model_is_led_to_the_adapter_of_its_own():
    config = dataclasses.replace(mixed_model(), segments=mixed_model().segments[:1])
    with pytest.raises(UserError, match=r"'up' matches no weight.* adapter.kind=lora adapts it\."):
        resolve_targets(config, "expert_lora", ("up",))
    with pytest.raises(UserError, match=r"'w1' matches .*/q\.$"):
        resolve_targets(config, "expert_lora", ("w1",))


def test_experts_must_be_adapted_alike_in_every_layer():
    base = parse_config(MIXTRAL)
    config = ModelConfig("mixtral", 64, 24, base.segments * 2, 1e-5)
    with pytest.raises(UserError, match="same expert projections in every MoE layer"):
        resolve_targets(config, "expert_lora", ("down", "segment_1/.*/moe/up"))
