"""Converts MixLoRA adapters of MoE-PEFT and the package `mixlora` to and from the `lora` tree.

Their adapter is a flat dict of f32 tensors under `mixlora.layers.{l}`: one pair per attention
matrix (`self_attn.q_proj.lora_A.weight` [r, in], `lora_B` [out, r]), one pair per expert and FFN
projection (`mlp.up_proj.experts.{i}.lora_A.weight`), and a router (`mlp.moe_gate.weight` [E, in]).
Every pair has the same rank. Here experts may have different ranks: rows behind the active ones are
written as zeros, and zeros at the end are read as inactive ranks.

One table, `locations`, serves both directions. Values are moved unchanged, unless a scale has to be
folded into B (see `alpha_of`).
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from drlora_jax.adapters.mixlora import MixLora
from drlora_jax.config import AdapterSection
from drlora_jax.errors import UserError
from drlora_jax.interop.hf_read import leaf_at
from drlora_jax.models.architecture import ATTENTION_ROLES, FFN_ROLES, ModelConfig
from drlora_jax.models.families import key_table

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model"
NO_DROPOUT = 1e-6  # their loader refuses 0
ROUTINGS = ("mixlora", "mixlora-dynamic")
_ACTIVATIONS = {"swish": "silu"}  # synonyms
ROLES = (*ATTENTION_ROLES, *FFN_ROLES)
_LEGACY_ROLES = {"w1_proj": "gate_proj", "w2_proj": "down_proj", "w3_proj": "up_proj"}
_LEGACY = re.compile(r"(mixlora\.layers\.\d+)\.(?:gate|experts\.(\d+)\.(\w+?))(\..*)")


class Location(NamedTuple):
    """One tensor of a file, and its slice of a leaf of `lora`."""

    key: str
    path: tuple[str, ...]  # of the leaf
    index: tuple[int, ...]  # into its leading axes: repeat, expert
    layer: int
    expert: int | None
    transpose: bool

    @property
    def is_router(self) -> bool:
        return self.path[-1] == "router"


def locations(config: ModelConfig, adapter: MixLora) -> Iterator[Location]:
    """Yields the location of every tensor of an adapter."""
    numbers = {layer.key: layer.number for layer in config.layers()}
    for key, slot in key_table(config, "experts").items():
        *module, leaf = slot.path
        if leaf != "kernel" or "/".join(module) not in adapter.paths:
            continue
        stem = "mixlora" + key.removeprefix("model").removesuffix(".weight")
        layer = numbers[(*module[:2], *slot.index)]
        is_expert = adapter.is_expert("/".join(module))
        path = (*module[:3], f"{module[3]}_lora") if is_expert else (*module, "lora")
        experts = range(adapter.own_routing.num_experts) if is_expert else (None,)
        for expert in experts:
            index = slot.index if expert is None else (*slot.index, expert)
            name = stem if expert is None else f"{stem}.experts.{expert}"
            yield Location(f"{name}.lora_A.weight", (*path, "a"), index, layer, expert, False)
            yield Location(f"{name}.lora_B.weight", (*path, "b"), index, layer, expert, True)
    for layer in config.layers():
        path = (layer.segment, layer.unit, "mlp", "router")
        key = f"mixlora.layers.{layer.number}.mlp.moe_gate.weight"
        yield Location(key, path, (layer.repeat,), layer.number, None, True)


# ---------------------------------------------------------------------------------------------- out


def alpha_of(scale: float, rank: int) -> tuple[int, float]:
    """Returns lora_alpha, a whole number, and what B is multiplied by: 1 if scale * rank is whole,
    as it is for every usual scale.
    """
    alpha = round(scale * rank)
    return (alpha, 1.0) if alpha > 0 and alpha / rank == scale else (rank, scale)


def pack(
    config: ModelConfig, adapter: MixLora, lora: dict, ranks_LE: np.ndarray
) -> tuple[dict[str, np.ndarray], int]:
    """Returns the tensors of a file, f32, and their rank: the largest that any pair needs."""
    if not ranks_LE.all():
        raise UserError(
            f"{int((ranks_LE == 0).sum())} of {ranks_LE.size} experts have rank 0, but this format "
            "needs the same experts in every layer, each with a rank of at least 1."
        )
    has_plain = any("/attention/" in path for path in adapter.paths)
    rank = max(int(ranks_LE.max()), adapter.rank if has_plain else 0)
    _, factor = alpha_of(adapter.scale, rank)
    expert_factor = factor * adapter.of_experts.scale / adapter.scale
    tensors = {}
    for place in locations(config, adapter):
        value = np.asarray(leaf_at(lora, place.path), np.float32)[place.index]
        if not place.is_router:
            if place.expert is not None:
                value = value[: ranks_LE[place.layer, place.expert]]
            value = np.pad(value, ((0, rank - len(value)), (0, 0)))
            if place.path[-1] == "b":
                value = value * np.float32(factor if place.expert is None else expert_factor)
        tensors[place.key] = np.ascontiguousarray(value.T if place.transpose else value)
    return tensors, rank


def describe(
    config: ModelConfig, adapter: MixLora, section: AdapterSection, rank: int, base: str
) -> dict:
    """Returns the values of adapter_config.json."""
    roles = {path.rpartition("/")[2] for path in adapter.paths}
    own = adapter.own_routing  # its numbers may come from adapter.experts_per_layer
    routing = {"routing_strategy": "mixlora", "top_k": own.experts_per_token}
    if section.top_p is not None:
        routing = {"routing_strategy": "mixlora-dynamic", "top_p": section.top_p}
        routing["temperature"] = 0.0
    return {
        "peft_type": "MIXLORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "bias": "none",
        "r": rank,
        "lora_alpha": alpha_of(adapter.scale, rank)[0],
        "lora_dropout": section.dropout or NO_DROPOUT,
        "target_modules": [f"{role}_proj" for role in ROLES if role in roles],
        "num_experts": own.num_experts,
        "act_fn": _activation(config),
        **routing,
    }


def _activation(config: ModelConfig) -> str:
    return config.layers()[0].config.ffn.activation


# ----------------------------------------------------------------------------------------------- in


class Described(NamedTuple):
    """The content of an adapter_config.json."""

    section: AdapterSection  # rank: of attention, as stored
    expert_rank: int  # as stored


def read_description(values: Mapping, *, accept_top_p: bool = False) -> Described:
    """Reads adapter_config.json; raises UserError for settings that cannot be converted."""
    routing = _routing_of(values)
    own = dict(values) | dict(values.get("expert_lora") or {})
    if values.get("use_dora") or own.get("use_dora"):
        raise UserError(
            f"{CONFIG}: use_dora: such adapters are stored without their magnitudes, so the "
            "trained model cannot be restored from the file."
        )
    if routing == "mixlora-dynamic":
        _check_dynamic(values, accept_top_p)
    try:
        rank, expert_rank = values["r"], own["r"]
        scale, expert_scale = (_scale(each) for each in (values, own))
        dropout, expert_dropout = (_dropout(each) for each in (values, own))
        names = values["target_modules"]
        names = [name for name in names if not isinstance(names, Mapping) or names[name]]
        section = AdapterSection(
            kind="mixlora",
            targets=tuple(name.removesuffix("_proj") for name in names),
            scale=scale,
            dropout=dropout,
            expert_scale=expert_scale if expert_scale != scale else None,
            expert_dropout=expert_dropout if expert_dropout != dropout else None,
            rank=rank,
            num_experts=values["num_experts"],
            experts_per_token=min(values.get("top_k", 2), values["num_experts"]),
            top_p=float(values.get("top_p", 0.8)) if routing == "mixlora-dynamic" else None,
        )
    except UserError as error:
        raise UserError(f"{CONFIG}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UserError(
            f"{CONFIG}: not what MoE-PEFT writes: {type(error).__name__}: {error}."
        ) from error
    return Described(section, expert_rank)


def _routing_of(values: Mapping) -> str:
    kind, routing = values.get("peft_type"), values.get("routing_strategy")
    routing = "mixlora" if routing == "mixtral" else routing  # its name until August 2024
    if kind != "MIXLORA" or routing not in ROUTINGS:
        raise UserError(
            f"{CONFIG}: peft_type {kind!r} with routing_strategy {routing!r} cannot be read; "
            f"MIXLORA with {' or '.join(ROUTINGS)} can."
        )
    return routing


def _scale(values: Mapping) -> float:
    return values["lora_alpha"] / values["r"] ** (0.5 if values.get("use_rslora") else 1.0)


def _dropout(values: Mapping) -> float:
    return 0.0 if values["lora_dropout"] <= NO_DROPOUT else float(values["lora_dropout"])


def check_activation(values: Mapping, config: ModelConfig) -> None:
    """Refuses experts whose activation differs from the base model's, the only one that they can
    have here.
    """
    own, name = _activation(config), values.get("act_fn")
    if name is not None and _ACTIVATIONS.get(str(name), name) != own:
        raise UserError(
            f"{CONFIG}: act_fn {name!r}: experts can only have the base model's activation here, "
            f"which is {own}."
        )


def _check_dynamic(values: Mapping, accept_top_p: bool) -> None:
    if values.get("temperature"):
        raise UserError(
            f"{CONFIG}: temperature must be 0, because others are not supported, got "
            f"{values['temperature']}."
        )
    if not accept_top_p:
        raise UserError(
            f"{CONFIG}: top_p routing is renormalised here but not in MoE-PEFT, so outputs differ "
            "by the sum of the chosen probabilities. To convert it anyway, add --accept-top-p."
        )


def modern_key(key: str) -> str:
    """Renames a key of files older than August 2024 to today's name; other keys stay."""
    found = _LEGACY.fullmatch(key)
    if found is None:
        return key
    layer, expert, role, rest = found.groups()
    if expert is None:
        return f"{layer}.mlp.moe_gate{rest}"
    return f"{layer}.mlp.{_LEGACY_ROLES.get(role, role)}.experts.{expert}{rest}"


def check_tensors(
    tensors: Mapping[str, np.ndarray], config: ModelConfig, adapter: MixLora
) -> dict[str, np.ndarray]:
    """Returns the tensors by today's names in f32, after checking that none is missing or
    unknown.
    """
    tensors = {modern_key(key): np.asarray(value, np.float32) for key, value in tensors.items()}
    wanted = {place.key for place in locations(config, adapter)}
    for what, keys in (("lacks", wanted - tensors.keys()), ("also has", tensors.keys() - wanted)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise UserError(f"the adapter {what} {min(keys)}{more}: it is for another base model.")
    return tensors


def used_ranks(
    tensors: Mapping[str, np.ndarray], config: ModelConfig, adapter: MixLora
) -> tuple[int, np.ndarray]:
    """Returns ranks up to the last nonzero row: one for all plain pairs, and i32 [L, E], at least
    1, because tokens also choose an expert of zeros and get the base model's FFN.
    """
    ranks_LE = np.ones((config.num_layers, adapter.own_routing.num_experts), np.int32)
    plain = 0
    for place in locations(config, adapter):
        if place.is_router:
            continue
        value = tensors[place.key].T if place.transpose else tensors[place.key]
        used = int(np.flatnonzero(value.any(axis=-1)).max(initial=-1)) + 1
        if place.expert is None:
            plain = max(plain, used)
        else:
            at = place.layer, place.expert
            ranks_LE[at] = max(ranks_LE[at], used)
    return plain, ranks_LE


def unpack(
    tensors: Mapping[str, np.ndarray],
    config: ModelConfig,
    adapter: MixLora,
    abstract: dict,
) -> dict:
    """Builds the `lora` tree of host arrays; `abstract` has its shapes, and may have fewer rank
    rows than the file, where those left out are zero.
    """
    lora = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract)
    for place in locations(config, adapter):
        value = tensors[place.key].T if place.transpose else tensors[place.key]
        target = leaf_at(lora, place.path)[place.index]
        is_right = value.shape[1:] == target.shape[1:]
        if place.is_router:
            is_right = value.shape == target.shape
        if not is_right:
            got = list(tensors[place.key].shape)
            raise UserError(
                f"the adapter's {place.key} has shape {got}: it is for another base model."
            )
        rows = min(len(value), len(target))
        target[:rows] = value[:rows]
    return lora
