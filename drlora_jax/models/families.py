"""Model families as data: how to read a Hugging Face `config.json`, and which tensor on disk goes
where.

A `Slot` says where a tensor is in our parameter tree: the leaf, the index into its leading axes
(repeat, expert), the columns of a fused gate|up matrix, and whether the matrix is transposed (torch
keeps (out, in)). The key table of a model maps every tensor name on disk to its slot, in one of two
layouts: `experts` (a 2-D tensor per expert, as on the hub) and `fused` (a 3-D tensor per layer, as
transformers 5 holds them in memory).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np

from drlora_jax.errors import UserError
from drlora_jax.models.architecture import (
    FFN_ROLES,
    AttentionConfig,
    DenseFfnConfig,
    LayerConfig,
    ModelConfig,
    MoeConfig,
    RopeConfig,
    RoutingConfig,
    SegmentConfig,
)

Layout = Literal["experts", "fused"]


class Slot(NamedTuple):
    path: tuple[str, ...]  # of the leaf in `params`
    index: tuple[int, ...] = ()  # into the leaf's leading axes
    half: int | None = None  # 0: gate columns, 1: up columns of a fused leaf
    transpose: bool = False  # swap the last two axes


@dataclass(frozen=True)
class Family:
    """Names on disk that differ between families; `{e}` is the expert."""

    parse: Callable[[dict], ModelConfig]
    router: str = ""
    experts: dict[str, str] = field(default_factory=dict)  # gate, up, down
    fused_router: str = "mlp.gate.weight"

    def layer_keys(self, layer: LayerConfig, layout: Layout) -> dict[str, Slot]:
        """Names below `model.layers.{l}.` with slots below the layer's path and index."""
        attention = layer.attention
        keys = {
            "input_layernorm.weight": Slot(("attention_norm", "scale")),
            "post_attention_layernorm.weight": Slot(("ffn_norm", "scale")),
        }
        for role in "qkvo":
            keys[f"self_attn.{role}_proj.weight"] = Slot(
                ("attention", role, "kernel"), transpose=True
            )
            if attention.has_output_bias if role == "o" else attention.has_qkv_bias:
                keys[f"self_attn.{role}_proj.bias"] = Slot(("attention", role, "bias"))
        if attention.qk_norm != "none":
            for role in "qk":
                keys[f"self_attn.{role}_norm.weight"] = Slot(("attention", f"{role}_norm", "scale"))
        if isinstance(layer.ffn, MoeConfig):
            return keys | self._moe_keys(layer.ffn, layout)
        return keys | {
            f"mlp.{role}_proj.weight": Slot(("mlp", role, "kernel"), transpose=True)
            for role in FFN_ROLES
        }

    def _moe_keys(self, moe: MoeConfig, layout: Layout) -> dict[str, Slot]:
        if layout == "fused":
            return {
                self.fused_router: Slot(("moe", "router"), transpose=True),
                "mlp.experts.gate_up_proj": Slot(("moe", "gate_up"), transpose=True),
                "mlp.experts.down_proj": Slot(("moe", "down"), transpose=True),
            }
        keys = {self.router: Slot(("moe", "router"), transpose=True)}
        for expert in range(moe.routing.num_experts):
            names = {role: name.format(e=expert) for role, name in self.experts.items()}
            keys[names["gate"]] = Slot(("moe", "gate_up"), (expert,), 0, True)
            keys[names["up"]] = Slot(("moe", "gate_up"), (expert,), 1, True)
            keys[names["down"]] = Slot(("moe", "down"), (expert,), None, True)
        return keys


def key_table(config: ModelConfig, layout: Layout) -> dict[str, Slot]:
    """Every tensor name of a model on disk -> its slot."""
    family = FAMILIES[config.family]
    table = {
        "model.embed_tokens.weight": Slot(("embedding",)),
        "model.norm.weight": Slot(("final_norm", "scale")),
    }
    if not config.tie_embeddings:
        table["lm_head.weight"] = Slot(("head",), transpose=True)
    number = 0
    for segment_index, segment in enumerate(config.segments):
        for repeat in range(segment.repeats):
            for unit_index, layer in enumerate(segment.unit):
                place = (f"segment_{segment_index}", f"layer_{unit_index}")
                for key, slot in family.layer_keys(layer, layout).items():
                    slot = slot._replace(path=(*place, *slot.path), index=(repeat, *slot.index))
                    table[f"model.layers.{number}.{key}"] = slot
                number += 1
    return table


# ---------------------------------------------------------------------------------------------
# config.json


COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "num_experts_per_tok",
)
LARGEST_COUNT = 2**24
LARGEST_HEAD = 2**16
LARGEST_NUMBER = 1e30  # it and its inverse are well inside what a 32-bit float holds
NUMBER_RULE = f"a number above 0 (from {1 / LARGEST_NUMBER:g} to {LARGEST_NUMBER:g})"
NUMBERS = ("rms_norm_eps", "rope_theta", "clip_qkv")
SWITCHES = ("attention_bias", "mlp_bias", "norm_topk_prob", "tie_word_embeddings")
OBJECTS = ("quantization_config", "rope_scaling", "rope_parameters")


def parse_config(values: dict) -> ModelConfig:
    """ModelConfig from the values of a `config.json`; refuses what is not supported, by name."""
    family = values.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(
            f"config.json: model_type {family!r} is not supported; supported: "
            f"{', '.join(sorted(FAMILIES))}."
        )
    _check_types(values)
    if values.get("quantization_config"):
        method = values["quantization_config"].get("quant_method", "unknown")
        raise UserError(
            f"config.json: the weights are quantised ({method}); use an unquantised checkpoint."
        )
    try:
        config = FAMILIES[family].parse(values)
    except KeyError as error:
        raise UserError(
            f"config.json: the field {error} is missing for model_type {family!r}."
        ) from None
    _check_sizes(config)
    return config


def _check_types(values: dict) -> None:
    """Refuses a field that cannot be what its name says; null passes, as an absent field does."""

    def check(names, rule: str, is_right: Callable) -> None:
        for name in names:
            if values.get(name) is not None and not is_right(values[name]):
                raise UserError(f"config.json: {name} must be {rule}, got {values[name]!r}.")

    def is_number(value, kinds=(int, float)):
        return isinstance(value, kinds) and not isinstance(value, bool)

    check(COUNTS, "a whole number above 0", lambda value: is_number(value, int) and value > 0)
    check(COUNTS, f"at most {LARGEST_COUNT}", lambda value: value <= LARGEST_COUNT)
    check(("sliding_window",), "a whole number", lambda value: is_number(value, int) and value >= 0)
    check(NUMBERS, NUMBER_RULE, lambda value: is_number(value) and _is_in_range(value))
    check(SWITCHES, "true or false", lambda value: isinstance(value, bool))
    check(OBJECTS, "an object", lambda value: isinstance(value, dict))


def _is_in_range(value: float) -> bool:
    return 1 / LARGEST_NUMBER <= value <= LARGEST_NUMBER


def _check_sizes(config: ModelConfig) -> None:
    for segment in config.segments:
        for layer in segment.unit:
            attention = layer.attention
            if attention.num_heads % attention.num_kv_heads:
                raise UserError(
                    f"config.json: num_attention_heads ({attention.num_heads}) must be a multiple "
                    f"of num_key_value_heads ({attention.num_kv_heads})."
                )
            if attention.head_dim % 2:
                raise UserError(f"config.json: head_dim must be even, got {attention.head_dim}.")
            if isinstance(layer.ffn, MoeConfig):
                _check_routing(layer.ffn.routing)


def _check_routing(routing: RoutingConfig) -> None:
    if routing.experts_per_token > routing.num_experts:
        raise UserError(
            f"config.json: num_experts_per_tok ({routing.experts_per_token}) is more than the "
            f"experts there are ({routing.num_experts})."
        )


def _required(values: dict, name: str):
    if values.get(name) is None:
        raise KeyError(name)
    return values[name]


def _rope(values: dict, head_dim: int, default_theta: float) -> RopeConfig:
    """Rotary frequencies 1 / theta ** (2i / head_dim), scaled as the config says."""
    if head_dim > LARGEST_HEAD:
        raise UserError(f"config.json: head_dim must be at most {LARGEST_HEAD}, got {head_dim}.")
    parameters = values.get("rope_scaling") or values.get("rope_parameters") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_SCALINGS:
        raise UserError(
            f"config.json: rope type {kind!r} is not supported for {values['model_type']!r}; "
            f"supported: {', '.join(ROPE_SCALINGS)}."
        )
    _check_types({"rope_theta": parameters.get("rope_theta")})
    theta = parameters.get("rope_theta") or values.get("rope_theta") or default_theta
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # The power rounded once, as torch's is nearly always; numpy's in float32 is off in one of six,
    # and an angle is a frequency times a position.
    frequencies = np.float32(1) / (float(theta) ** exponents.astype(np.float64)).astype(np.float32)
    scaled = ROPE_SCALINGS[kind](frequencies, parameters)
    return RopeConfig(tuple(scaled.astype(np.float32).tolist()))


def _rope_number(parameters: dict, name: str) -> float:
    value = parameters.get(name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not _is_in_range(value):
        raise UserError(f"config.json: rope_scaling.{name} must be {NUMBER_RULE}, got {value!r}.")
    return float(value)


def _scale_linear(frequencies: np.ndarray, parameters: dict) -> np.ndarray:
    return frequencies / np.float32(_rope_number(parameters, "factor"))


def _scale_llama3(frequencies: np.ndarray, parameters: dict) -> np.ndarray:
    """Long waves are divided by `factor`, short ones stay, between them a linear blend.

    A wave is long when fewer than low_freq_factor of it fit into the original context.
    """
    factor, low, high, context = (
        _rope_number(parameters, name)
        for name in (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
    )
    if high <= low:
        raise UserError(
            f"config.json: rope_scaling.high_freq_factor ({high}) must be above low_freq_factor "
            f"({low})."
        )
    waves_in_context = context * frequencies / (2 * np.pi)
    kept = np.clip((waves_in_context - low) / (high - low), 0, 1)
    return (1 - kept) * frequencies / factor + kept * frequencies


ROPE_SCALINGS = {
    "default": lambda frequencies, _: frequencies,
    "linear": _scale_linear,
    "llama3": _scale_llama3,
}


def _attention(values: dict, default_theta: float) -> AttentionConfig:
    heads, width = _required(values, "num_attention_heads"), _required(values, "hidden_size")
    head_dim = values.get("head_dim")
    if head_dim is None:
        if width % heads:
            raise UserError(
                f"config.json: hidden_size ({width}) must be a multiple of num_attention_heads "
                f"({heads}) where there is no head_dim."
            )
        head_dim = width // heads
    has_bias = bool(values.get("attention_bias", False))
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=_rope(values, head_dim, default_theta),
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
    )


def _experts(values: dict) -> int:
    """The number of experts goes by three names."""
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if values.get(name) is not None:
            return values[name]
    raise KeyError("num_local_experts")


def _require_silu(values: dict) -> None:
    if values.get("hidden_act", "silu") != "silu":
        raise UserError(
            f"config.json: hidden_act {values['hidden_act']!r} is not supported; only silu is."
        )


def _uniform_stack(values: dict, layer: LayerConfig, *, norm_epsilon: float = 1e-5) -> ModelConfig:
    """A model of equal layers: one segment.

    Args:
      norm_epsilon: the family's own, where config.json says nothing.
    """
    return ModelConfig(
        family=values["model_type"],
        vocab_size=_required(values, "vocab_size"),
        width=_required(values, "hidden_size"),
        segments=(SegmentConfig((layer,), _required(values, "num_hidden_layers")),),
        norm_epsilon=values.get("rms_norm_eps") or norm_epsilon,
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
    )


def _parse_llama(values: dict) -> ModelConfig:
    _require_silu(values)
    if values.get("mlp_bias"):
        raise UserError("config.json: mlp_bias=true is not supported for 'llama'.")
    ffn = DenseFfnConfig(_required(values, "intermediate_size"))
    return _uniform_stack(values, LayerConfig(_attention(values, 1e4), ffn), norm_epsilon=1e-6)


def _parse_mixtral(values: dict) -> ModelConfig:
    _require_silu(values)
    attention = replace(_attention(values, 1e6), window=values.get("sliding_window") or None)
    # Mixtral always divides the chosen weights by their sum.
    routing = RoutingConfig(
        _experts(values), _required(values, "num_experts_per_tok"), normalize=True
    )
    return _uniform_stack(
        values, LayerConfig(attention, MoeConfig(_required(values, "intermediate_size"), routing))
    )


def _parse_olmoe(values: dict) -> ModelConfig:
    _require_silu(values)
    attention = replace(_attention(values, 1e4), qk_norm="full", clip_qkv=values.get("clip_qkv"))
    normalize = bool(values.get("norm_topk_prob", False))
    routing = RoutingConfig(
        _experts(values), _required(values, "num_experts_per_tok"), normalize=normalize
    )
    return _uniform_stack(
        values, LayerConfig(attention, MoeConfig(_required(values, "intermediate_size"), routing))
    )


FAMILIES: dict[str, Family] = {
    "llama": Family(parse=_parse_llama),
    "mixtral": Family(
        parse=_parse_mixtral,
        router="block_sparse_moe.gate.weight",
        experts={
            "gate": "block_sparse_moe.experts.{e}.w1.weight",
            "up": "block_sparse_moe.experts.{e}.w3.weight",
            "down": "block_sparse_moe.experts.{e}.w2.weight",
        },
    ),
    "olmoe": Family(
        parse=_parse_olmoe,
        router="mlp.gate.weight",
        experts={role: f"mlp.experts.{{e}}.{role}_proj.weight" for role in FFN_ROLES},
    ),
}
