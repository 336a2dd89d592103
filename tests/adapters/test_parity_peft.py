"""Loss and LoRA gradients against `peft`, for the same factors in the same model.

How peft keeps the factors of all experts of a layer is in `oracles/make_oracles.py`, and so is why
its adapter of gate and up with the gate's B at zero gives the gradients of an adapter of up alone.
"""

import functools

import jax
import numpy as np
import pytest

from drlora_jax.adapters.expert_lora import ExpertLora
from drlora_jax.data.loader import Batch
from drlora_jax.models.options import DecoderOptions
from drlora_jax.models.transformer import Decoder
from drlora_jax.ops import Ops
from drlora_jax.ops.experts.api import expert_mlp
from drlora_jax.training.step import AuxiliaryWeights, batch_loss
from tests.oracles.stored import (
    FAMILIES,
    RANK,
    SCALE,
    copy_model,
    load_arrays,
    lora_cases,
    make_rows,
)
from tests.support.model_files import load

MAX_RELATIVE = 1e-4
LAYER = "segment_0/layer_0"
ATTENTION_ROLES = ("q", "v")


def to_tree(config, roles, arrays: dict[str, np.ndarray]) -> dict:
    """Our `lora` tree from arrays by peft's names (factors or their gradients)."""
    moe = config.moe
    experts, hidden = (moe.routing.num_experts, moe.expert_dim) if moe else (0, 0)

    def stacked(of_layer):
        pairs = [
            of_layer(f"base_model.model.model.layers.{layer}") for layer in range(config.num_layers)
        ]
        a_parts, b_parts = zip(*pairs, strict=True)
        return {"a": np.stack(a_parts), "b": np.stack(b_parts)}

    def plain(module, role, prefix):
        name = f"{prefix}.{module}.{role}_proj.lora"
        return arrays[f"{name}_A.weight"], arrays[f"{name}_B.weight"].T

    def of_experts(role, prefix):
        # The wrapper of down_proj is outside that of gate_up_proj.
        name = f"{prefix}.mlp.experts." + ("lora" if role == "down" else "base_layer.lora")
        a_ERD = arrays[f"{name}_A.weight"].reshape(experts, RANK, -1)
        b_FRE = arrays[f"{name}_B.weight"].reshape(-1, RANK, experts)
        b_ERF = b_FRE.transpose(2, 1, 0)
        return a_ERD, b_ERF[..., hidden:] if role == "up" else b_ERF

    def linear(module, module_roles):
        return {
            role: {"lora": stacked(functools.partial(plain, module, role))} for role in module_roles
        }

    attention = linear("self_attn", ATTENTION_ROLES)
    if moe is None:
        return {"segment_0": {"layer_0": {"attention": attention, "mlp": linear("mlp", roles)}}}
    moe = {f"{role}_lora": stacked(functools.partial(of_experts, role)) for role in roles}
    return {"segment_0": {"layer_0": {"attention": attention, "moe": moe}}}


def loss_and_gradients(config, params, roles, lora: dict, backend: str):
    """Summed NLL over the number of targets, and its gradient with respect to `lora`."""
    paths = {f"{LAYER}/attention/{role}" for role in ATTENTION_ROLES}
    paths |= {f"{LAYER}/{'moe' if config.moe else 'mlp'}/{role}" for role in roles}
    adapter = ExpertLora(frozenset(paths), scale=SCALE, rank=RANK, max_rank=RANK)
    ops = Ops(expert_mlp=functools.partial(expert_mlp, backend=backend))
    model = Decoder(config, DecoderOptions(adapter=adapter, ops=ops))
    rows = make_rows()
    batch = Batch(rows.tokens, rows.targets, rows.segments, rows.positions, rows.target_mask)

    shapes = jax.eval_shape(model.init, jax.random.key(0), rows.tokens, *rows[1:])
    assert jax.tree.map(np.shape, lora) == jax.tree.map(lambda leaf: leaf.shape, shapes["lora"])
    masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes.get("rank_mask", {}))

    # Less work on machine code: the arithmetic is the same, and compiling takes most of the time.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    @jax.value_and_grad
    def run(lora, params, masks, batch):
        variables = {"params": params, "lora": lora, "rank_mask": masks}
        terms, _ = batch_loss(model, variables, batch, AuxiliaryWeights())
        return terms.nll / batch.target_mask_BT.sum()

    return run(lora, params, masks, batch)


def below(arrays: dict, folder: str) -> dict:
    return {
        key.removeprefix(folder): array for key, array in arrays.items() if key.startswith(folder)
    }


@pytest.mark.parametrize(  # every pair of two of these: a case takes seconds to compile
    ("family", "case", "backend"),
    [
        ("mixtral", "up_down", "block"),
        ("mixtral", "gate_up_down", "dense"),
        ("olmoe", "up_down", "dense"),
        ("olmoe", "gate_up_down", "block"),
        ("llama", "ffn", "block"),
    ],
)
def test_gradients_equal_the_stored_ones(tmp_path, family, case, backend):
    config, params = load(copy_model(family, "experts", tmp_path))
    arrays, roles = load_arrays(f"{family}_lora"), lora_cases(family)[case]
    factors = to_tree(config, roles, below(arrays, "factor/"))
    expected = to_tree(config, roles, below(arrays, f"{case}/gradient/"))

    loss, gradients = loss_and_gradients(config, params, roles, factors, backend)
    assert abs(float(loss) - arrays[f"{case}/loss"]) <= 1e-5 * arrays[f"{case}/loss"]
    worst = 0.0
    for (path, want), got in zip(
        jax.tree.leaves_with_path(expected), jax.tree.leaves(gradients), strict=True
    ):
        relative = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert relative <= MAX_RELATIVE, jax.tree_util.keystr(path)
        worst = max(worst, relative)
    print(f"{family} {case} {backend}: loss {float(loss):.6f}, gradients {worst:.1e}")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_stored_gradients_are_what_peft_computes(tmp_path, oracle, family):
    directory = copy_model(family, "experts", tmp_path)
    arrays = load_arrays(f"{family}_lora")
    case, roles = next(iter(lora_cases(family).items()))
    factors = oracle.case_factors(below(arrays, "factor/"), roles)
    loss, gradients = oracle.peft_gradients(directory, factors, make_rows())
    assert abs(loss - arrays[f"{case}/loss"]) <= 1e-9 * loss  # both computed in float64
    expected = below(arrays, f"{case}/gradient/")
    assert gradients.keys() == expected.keys()
    for key, want in expected.items():
        assert np.linalg.norm(gradients[key] - want) <= 1e-6 * np.linalg.norm(want), key
