"""One decoder for every family: pre-norm blocks in scanned segments, described by a `ModelConfig`.

    model = Decoder(config, DecoderOptions())
    hidden_BTD, stats = model.apply({"params": params}, tokens_BT, segment_ids_BT, positions_BT)
    logits_BTV = logits(config, params, hidden_BTD)

Collections: `params` (the base model), `lora` (what an adapter trains), `rank_mask` (gates of the
active ranks), and in generation `cache` (keys and values).
"""

import functools
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp

from drlora_jax.models.architecture import (
    LayerConfig,
    ModelConfig,
    MoeConfig,
    SegmentConfig,
    layer_name,
    segment_name,
)
from drlora_jax.models.attention import Attention
from drlora_jax.models.ffn import DenseFfn
from drlora_jax.models.layers import RmsNorm, kernel_init
from drlora_jax.models.moe import ExpertStack, Moe
from drlora_jax.models.options import KEPT, DecoderOptions, Remat, keep
from drlora_jax.models.routing import RoutingStats, mean_stats
from drlora_jax.ops import Ops, attend, expert_mlp

CUDNN_FORWARD = "dot_product_attention_fwd"  # jax's primitive, whose statistics have no name


def inside(options: DecoderOptions, name: str) -> DecoderOptions:
    """The options of the module `name` in the one that has these."""
    return replace(options, adapter=options.adapter.below(name))


class Block(nn.Module):
    """Pre-norm attention and FFN of one layer."""

    config: ModelConfig
    options: DecoderOptions
    layer: LayerConfig

    @nn.compact
    def __call__(
        self, x_BTD, segment_ids_BT, positions_BT, stack: ExpertStack | None = None
    ) -> tuple[jax.Array, RoutingStats | None]:
        """The residual stream [B, T, D] behind the layer, and the mean statistics of its routers;
        None where there are none.
        """
        epsilon = self.config.norm_epsilon

        def norm(name):
            return RmsNorm(epsilon, self.options.dtype, name=name)

        options = inside(self.options, "attention")
        attention = Attention(self.layer.attention, options, epsilon, name="attention")
        attended_BTD, routed = attention(
            norm("attention_norm")(x_BTD), segment_ids_BT, positions_BT
        )
        x_BTD = keep(x_BTD + attended_BTD, "moe_in")
        y_BTD, more = self._ffn(norm("ffn_norm")(x_BTD), segment_ids_BT, stack)
        return x_BTD + y_BTD, mean_stats([*routed, *more])

    def _ffn(self, x_BTD, segment_ids_BT, stack) -> tuple[jax.Array, list[RoutingStats]]:
        config = self.layer.ffn
        if isinstance(config, MoeConfig):
            return Moe(config, inside(self.options, "moe"), name="moe")(
                x_BTD, segment_ids_BT, stack
            )
        options = inside(self.options, "mlp")
        ffn = options.adapter.ffn(config, options)
        if ffn is None:
            ffn = DenseFfn(config, options, name="mlp")
        return ffn(x_BTD, segment_ids_BT)


class Unit(nn.Module):
    """The layers that one step of a segment's scan runs."""

    config: ModelConfig
    options: DecoderOptions
    segment: SegmentConfig

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT, positions_BT, stacks, repeat):
        stats = []
        for index, layer in enumerate(self.segment.unit):
            name = layer_name(index)
            block = Block(self.config, inside(self.options, name), layer, name=name)
            stack = ExpertStack(*stacks[name], repeat) if name in stacks else None
            x_BTD, layer_stats = block(x_BTD, segment_ids_BT, positions_BT, stack)
            if layer_stats is not None:
                stats.append(layer_stats)
        return x_BTD, stats


class Decoder(nn.Module):
    """Tokens to final hidden states, with the routing statistics of every layer that has a router,
    the base model's or the adapter's ([L, ...], None if there is none).
    """

    config: ModelConfig
    options: DecoderOptions

    @nn.compact
    def __call__(
        self, tokens_BT, segment_ids_BT, positions_BT
    ) -> tuple[jax.Array, RoutingStats | None]:
        config, dtype = self.config, self.options.dtype
        shape_VD = (config.vocab_size, config.width)
        table_VD = self.param("embedding", kernel_init, shape_VD, dtype)
        x_BTD = self.options.ops.embed(table_VD, tokens_BT)
        unit = rematerialised(Unit, self.options.remat)
        per_segment = []
        for index, segment in enumerate(config.segments):
            scanned = nn.scan(
                unit,
                variable_axes={"params": 0, "lora": 0, "rank_mask": 0, "cache": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0),
                length=segment.repeats,
            )
            name = segment_name(index)
            run = scanned(config, inside(self.options, name), segment, name=name)
            inputs = (segment_ids_BT, positions_BT, self._expert_stacks(name))
            x_BTD, stats = run(x_BTD, *inputs, jnp.arange(segment.repeats))
            per_segment.append(stats)
        x_BTD = RmsNorm(config.norm_epsilon, dtype, name="final_norm")(x_BTD)
        if not config.tie_embeddings:
            self.param("head", kernel_init, shape_VD[::-1], dtype)
        return x_BTD, stack_layers(per_segment)

    def _expert_stacks(self, segment: str) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Layer of the unit -> its experts in all repeats, where the operation reads stacks.

        A scan copies each layer's weights out of their stack before anything reads them; where
        memory is slow, as on CPU, that costs as much as some of the products.
        """
        options = self.options
        if not options.ops.reads_stacks or options.base_grad or self.is_initializing():
            return {}
        layers = self.variables["params"][segment].items()
        return {
            name: (layer["moe"]["gate_up"], layer["moe"]["down"])
            for name, layer in layers
            if "moe" in layer
        }


def rematerialised(module: type[nn.Module], remat: Remat) -> type[nn.Module]:
    """The module of a scanned unit with this policy for its backward pass."""
    if remat == "none":
        return module
    policy = _is_kept if remat == "selective" else None
    return nn.remat(module, prevent_cse=False, policy=policy)


def _is_kept(primitive, *args, **params) -> bool:
    by_name = jax.checkpoint_policies.save_only_these_names(*KEPT)
    return primitive.name.startswith(CUDNN_FORWARD) or by_name(primitive, *args, **params)


_PLAIN_OPS = Ops(
    expert_mlp=functools.partial(expert_mlp, backend="dense", platform="cpu"),
    attend=functools.partial(attend, backend="xla", platform="cpu"),
)


def init_variables(model: Decoder, key: jax.Array) -> dict:
    """Fresh collections of a model; what of them is not used is never computed under jit."""
    tokens_BT = jnp.zeros((1, 8), jnp.int32)
    return _anywhere(model).init(key, tokens_BT, tokens_BT, tokens_BT)


def _anywhere(model: Decoder) -> Decoder:
    """Neither tokens, mesh nor device matter for its variables: operations that ask for none."""
    return model.clone(options=replace(model.options, ops=_PLAIN_OPS))


def abstract_params(model: Decoder) -> dict:
    """Shapes and dtypes of `params`, without making them."""
    return _abstract_variables(_anywhere(model))["params"]


def abstract_lora(model: Decoder) -> dict:
    """Shapes and dtypes of `lora`, without making them."""
    return _abstract_variables(_anywhere(model)).get("lora", {})


@functools.lru_cache(maxsize=64)  # tracing takes a second; a start asks several times
def _abstract_variables(model: Decoder) -> dict:
    return jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))


def head_weights(config: ModelConfig, params: dict) -> jax.Array:
    """The output head [D, V]: its own weights, or the embedding transposed when tied."""
    return params["embedding"].T if config.tie_embeddings else params["head"]


def logits(config: ModelConfig, params: dict, hidden_BTD: jax.Array) -> jax.Array:
    """Next-token logits, f32 [B, T, V]."""
    logits_BTV = jnp.matmul(
        hidden_BTD, head_weights(config, params), preferred_element_type=jnp.float32
    )
    if config.logit_soft_cap is not None:
        logits_BTV = config.logit_soft_cap * jnp.tanh(logits_BTV / config.logit_soft_cap)
    return logits_BTV


def stack_layers(per_segment: list[list]):
    """Segment by segment trees with a leading [repeats], in unit order, to one tree with a leading
    [L].
    """
    stacked = [jax.tree.map(_interleave, *units) for units in per_segment if units]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *stacked) if stacked else None


def _interleave(*units):
    """[repeats, ...] of each layer of a unit to [repeats * len(units), ...] in the order of the
    stack.
    """
    both = jnp.stack(units, axis=1)
    return both.reshape(-1, *both.shape[2:])


def split_layers(
    config: ModelConfig, layers: tuple[int, ...], array_L
) -> dict[tuple[str, str], jax.Array]:
    """The inverse of `stack_layers`: (segment, layer) of every layer with experts to its slice
    [repeats, ...].

    Args:
      layers: model layer indices, the L axis; of a layer in a unit all repeats or none.
    """
    numbers = {layer.number: layer.place for layer in config.layers()}
    places = list(dict.fromkeys(numbers[layer] for layer in layers))
    slices, start = {}, 0
    for index, segment in enumerate(config.segments):
        name = segment_name(index)
        own = [place for place in places if place.startswith(f"{name}/")]
        size = segment.repeats * len(own)
        part = array_L[start : start + size].reshape(segment.repeats, len(own), *array_L.shape[1:])
        slices |= {(name, place.partition("/")[2]): part[:, i] for i, place in enumerate(own)}
        start += size
    return slices


def unroll(model: Decoder, variables: dict) -> tuple[Decoder, dict]:
    """The same model with every layer a segment of its own, and its variables cut accordingly.

    A scanned layer's weights are copied out of their stack at every use. That is nothing beside a
    long row's arithmetic, but twice the memory traffic of a single token.
    """
    config, segments, places = model.config, [], []
    for index, segment in enumerate(config.segments):
        for repeat in range(segment.repeats):
            places.append((index, repeat))
            segments.append(replace(segment, repeats=1))

    def cut(tree: dict) -> dict:
        segments = {segment_name(index) for index, _ in enumerate(config.segments)}
        apart = {name: leaf for name, leaf in tree.items() if name not in segments}
        for new, (index, repeat) in enumerate(places):
            if (layers := tree.get(segment_name(index))) is not None:
                part = jax.tree.map(lambda leaf, at=repeat: leaf[at : at + 1], layers)
                apart[segment_name(new)] = part
        return apart

    def moved(path: str) -> list[str]:
        old, _, rest = path.partition("/")
        return [
            f"{segment_name(new)}/{rest}"
            for new, (index, _) in enumerate(places)
            if old == segment_name(index)
        ]

    adapter = model.options.adapter
    paths = frozenset(place for path in adapter.paths for place in moved(path))
    options = replace(model.options, adapter=replace(adapter, paths=paths))
    unrolled = Decoder(replace(config, segments=tuple(segments)), options)
    return unrolled, {name: cut(tree) for name, tree in variables.items()}
