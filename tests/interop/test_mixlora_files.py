"""Adapters in the files of MoE-PEFT: stored logits of the authors' package, keys, refusals."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from drlora_jax import convert
from drlora_jax.config import AllocationSection, TrainConfig
from drlora_jax.config.resolve import make_adapter
from drlora_jax.errors import UserError
from drlora_jax.interop import mixlora
from drlora_jax.interop.hf_files import read_model_config
from drlora_jax.interop.hf_read import load_params
from drlora_jax.models.options import DecoderOptions
from drlora_jax.models.transformer import Decoder, abstract_params, logits
from drlora_jax.training.step import init_variables
from tests.oracles.stored import DATA, load_arrays


@pytest.fixture(scope="module")
def oracle():
    arrays = load_arrays("mixlora")
    tensors = {
        key.removeprefix("tensor/"): value
        for key, value in arrays.items()
        if key.startswith("tensor/")
    }
    return json.loads(str(arrays["config"])), tensors, arrays["tokens"], arrays["logits"]


def model_of(values, tensors):
    """The stored base with an adapter of theirs: a decoder and its variables."""
    described = mixlora.read_description(values)
    rank = described.expert_rank
    allocation = AllocationSection(kind="uniform", r_target=rank, r_max=rank)
    run = TrainConfig(adapter=described.section, allocation=allocation)
    config = read_model_config(DATA / "llama")
    adapter = make_adapter(run, config)
    model = Decoder(config, DecoderOptions(adapter=adapter))
    abstract = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
    tensors = mixlora.check_tensors(tensors, config, adapter)
    lora = mixlora.unpack(tensors, config, adapter, abstract["lora"])
    gates = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), abstract["rank_mask"])
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    plain = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract_params(Decoder(config, DecoderOptions())),
    )
    params = load_params(config, DATA / "llama", plain)
    return model, {"params": params, "lora": lora, "rank_mask": gates}


def our_logits(model, variables, tokens_BT):
    @jax.jit
    def run(variables, tokens_BT):
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        ones_BT = jnp.ones_like(tokens_BT)
        hidden_BTD, _ = model.apply(variables, tokens_BT, ones_BT, positions_BT)
        return logits(model.config, variables["params"], hidden_BTD)

    return np.asarray(run(variables, tokens_BT))


def test_logits_are_those_of_the_authors_package(oracle):
    values, tensors, tokens_BT, expected_BTV = oracle
    got_BTV = our_logits(*model_of(values, tensors), tokens_BT)
    size = np.abs(expected_BTV).max()
    assert size > 1
    assert np.abs(got_BTV - expected_BTV).max() / size <= 1e-5


def test_own_rank_scale_and_dropout_of_experts(oracle):
    """The same function, said otherwise: experts of one rank more (zeros), four times the scale and
    a fourth of B. Out again it is as it was.
    """
    values, tensors, tokens_BT, _ = oracle
    changed = {}
    for key, value in tensors.items():
        if ".experts." in key:
            is_b = "lora_B" in key
            value = np.pad(value, ((0, 0), (0, 1)) if is_b else ((0, 1), (0, 0)))
            value = value / 4 if is_b else value
        changed[key] = value
    model, variables = model_of(values, tensors)
    own = {"r": 4, "lora_alpha": 32, "lora_dropout": 0.25}
    other, others = model_of(values | {"expert_lora": own}, changed)
    adapter = other.options.adapter
    assert adapter.scale == model.options.adapter.of_experts.scale == 2
    assert adapter.dropout == values["lora_dropout"]
    assert (adapter.of_experts.scale, adapter.of_experts.dropout) == (8, 0.25)
    got_BTV, expected_BTV = (
        our_logits(*each, tokens_BT) for each in ((other, others), (model, variables))
    )
    # Logits of up to 23 in float32; sums over three and over four ranks differ in last digits.
    assert np.abs(got_BTV - expected_BTV).max() <= 1e-6 * np.abs(expected_BTV).max()
    packed, _ = mixlora.pack(other.config, adapter, others["lora"], np.full((2, 5), 3))
    jax.tree.map(np.testing.assert_array_equal, packed, tensors)


def test_keys_of_older_files(oracle):
    values, tensors, *_ = oracle
    _, variables = model_of(values, tensors)
    names = {"gate_proj": "w1_proj", "down_proj": "w2_proj", "up_proj": "w3_proj"}
    older = {}
    for key, value in tensors.items():
        if ".experts." in key:
            stem, role, _, expert, *rest = key.rsplit(".", 5)
            stem = stem.removesuffix(".mlp")
            key = ".".join([stem, "experts", expert, names[role], *rest])
        older[key.replace("mlp.moe_gate", "gate")] = value
    assert older.keys() != tensors.keys() and len(older) == len(tensors)
    _, others = model_of(values | {"routing_strategy": "mixtral"}, older)
    jax.tree.map(np.testing.assert_array_equal, others["lora"], variables["lora"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "MOLA"}, "peft_type 'MOLA'"),
        ({"routing_strategy": "mixlora-switch"}, "mixlora-switch"),
        ({"use_dora": True}, "without their magnitudes"),
        ({"routing_strategy": "mixlora-dynamic", "top_p": 0.8}, "--accept-top-p"),
        ({"routing_strategy": "mixlora-dynamic", "temperature": 0.5}, "temperature 0.5"),
        ({"r": None}, "not what MoE-PEFT writes"),
        ({"num_experts": 0}, "adapter_config.json: adapter.num_experts must be .*, got 0[.]$"),
        ({"target_modules": ["fc1"]}, "matches no weight"),
        ({"target_modules": ["q_proj", "up_proj"]}, "also has mixlora.layers.0.mlp.down_proj"),
    ],
)
def test_refusals(oracle, changes, message):
    values, tensors, *_ = oracle
    with pytest.raises(UserError, match=message):
        model_of(values | changes, tensors)


def test_a_missing_tensor_and_a_wrong_shape(oracle):
    values, tensors, *_ = oracle
    gate = "mixlora.layers.1.mlp.moe_gate.weight"
    with pytest.raises(UserError, match=f"lacks {gate}"):
        model_of(values, {key: value for key, value in tensors.items() if key != gate})
    with pytest.raises(UserError, match=r"moe_gate.weight is \[5, 35\]"):
        model_of(values, tensors | {gate: tensors[gate][:, 1:]})


def test_zeros_at_the_end_are_inactive_ranks_and_come_back(oracle):
    """Out of a tree with unequal ranks and in again: the same active rows, the same ranks."""
    values, tensors, *_ = oracle
    model, variables = model_of(values, tensors)
    config, adapter = model.config, model.options.adapter
    ranks_LE = np.array([[3, 1, 2, 1, 3], [1, 1, 3, 2, 2]], np.int32)
    packed, rank = mixlora.pack(config, adapter, variables["lora"], ranks_LE)
    assert rank == 3 and packed.keys() == tensors.keys()
    plain, found_LE = mixlora.used_ranks(packed, config, adapter)
    assert plain == 3
    np.testing.assert_array_equal(found_LE, ranks_LE)
    abstract = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))["lora"]
    lora = mixlora.unpack(packed, config, adapter, abstract)
    active_LER = np.arange(3) < ranks_LE[..., None]
    for name in ("gate_lora", "up_lora", "down_lora"):
        for part in "ab":
            before, after = (
                tree["segment_0"]["layer_0"]["mlp"][name][part]
                for tree in (variables["lora"], lora)
            )
            np.testing.assert_array_equal(after, np.where(active_LER[..., None], before, 0))
    equal = [("attention", role, "lora") for role in "qkvo"] + [("mlp", "router")]
    for path in equal:
        before, after = (
            mixlora.leaf_at(tree["segment_0"]["layer_0"], path)
            for tree in (variables["lora"], lora)
        )
        jax.tree.map(np.testing.assert_array_equal, after, before)


def test_experts_without_a_rank(oracle):
    values, tensors, *_ = oracle
    closed = {key: value * (".experts.2.lora" not in key) for key, value in tensors.items()}
    model, variables = model_of(values, closed)
    config, adapter = model.config, model.options.adapter
    _, ranks_LE = mixlora.used_ranks(closed, config, adapter)
    assert ranks_LE.tolist() == [[3, 3, 1, 3, 3]] * 2
    ranks_LE[1, 2] = 0
    with pytest.raises(UserError, match="1 of 10 experts have rank 0"):
        mixlora.pack(config, adapter, variables["lora"], ranks_LE)


def test_alpha_is_whole_and_the_scale_survives():
    for scale, rank in ((2.0, 8), (0.5, 6), (0.3, 10), (1.7, 10)):
        alpha, factor = mixlora.alpha_of(scale, rank)
        assert isinstance(alpha, int) and factor == 1 and alpha / rank == scale
    assert mixlora.alpha_of(0.35, 8) == (8, 0.35)


def _write(folder, values, tensors):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(values))
    save_file(tensors, folder / "adapter_model.safetensors")


def _import(folder):
    command = ["import", "--adapter", str(folder), "--model", str(DATA / "llama")]
    return convert.main([*command, "--out", str(folder.parent / "run")])


def test_experts_with_another_activation(oracle, tmp_path):
    values, tensors, *_ = oracle
    _write(tmp_path / "other", values | {"act_fn": "gelu"}, tensors)
    with pytest.raises(
        UserError, match="act_fn 'gelu': .* base model's activation here, which is silu"
    ):
        _import(tmp_path / "other")
    _write(tmp_path / "same", values | {"act_fn": "swish"}, tensors)
    assert _import(tmp_path / "same") == 0


def test_weights_that_are_not_finite(oracle, tmp_path):
    values, tensors, *_ = oracle
    gate = "mixlora.layers.1.mlp.moe_gate.weight"
    _write(tmp_path / "nan", values, tensors | {gate: np.full_like(tensors[gate], np.nan)})
    with pytest.raises(UserError, match=f"{gate} has values that are not finite"):
        _import(tmp_path / "nan")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_weights_that_can_not_be_read(oracle, tmp_path, suffix):
    values, tensors, *_ = oracle
    folder = tmp_path / "adapter"
    _write(folder, values, tensors)
    file = folder / "adapter_model.safetensors"
    contents = {b"": "complete", file.read_bytes()[:999]: "complete"}
    if suffix == "bin":
        torch = pytest.importorskip("torch")
        torch.save([1], others := io.BytesIO())
        file.unlink()
        file = file.with_suffix(".bin")
        text = "truncated, damaged or contains more than tensors"
        contents = {b"": text, b"hello world": text, b"\x80\x02}q\x00X\x01\x00\x00\x00\xf8": text}
        contents[others.getvalue()] = "must be a dict of tensors by name"
    contents[b"version https://git-lfs.github.com/spec/v1\n"] = "git-lfs pointer"
    for content, message in contents.items():
        file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            _import(folder)
