"""Model directories: what is read from them, and the message for every kind of broken one."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from drlora_jax.errors import UserError
from drlora_jax.interop.hf_files import fingerprint, read_model_config
from drlora_jax.interop.hf_read import load_params
from drlora_jax.interop.hf_write import write_model
from drlora_jax.models.families import parse_config
from tests.oracles.stored import copy_model
from tests.support.model_files import (
    WEIGHTS,
    abstract,
    assert_bit_equal,
    check,
    load,
    write_shards,
)

DOWN = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
INDEX = f"{WEIGHTS}.index.json"


@pytest.fixture
def model(tmp_path):
    return copy_model("mixtral", "experts", tmp_path / "model")


def change_config(directory, **changes):
    """Fields set, or left out where the value is `...`."""
    file = directory / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def change_weights(directory, changes=(), without=()):
    tensors = load_file(directory / WEIGHTS) | dict(changes)
    tensors = {key: value for key, value in tensors.items() if key not in without}
    save_file(tensors, directory / WEIGHTS)


def reshard(directory):
    """Three shards with an index in the place of the one file."""
    into = directory.parent / "sharded"
    tensors = load_file(directory / WEIGHTS)
    write_shards(into, tensors, (directory / "config.json").read_text(), has_index=True)
    return into


def change_index(directory, **changes):
    file = directory / INDEX
    index = json.loads(file.read_text())
    index["weight_map"] |= {key.replace("__", "."): name for key, name in changes.items()}
    file.write_text(json.dumps(index))


# ---------------------------------------------------------------------------------------- weights


def test_missing_tensor(model):
    change_weights(model, without=[DOWN])
    with pytest.raises(UserError, match=f"lack {DOWN}"):
        check(model)


def test_unmapped_tensor(model):
    change_weights(model, {"model.layers.0.extra.weight": np.zeros(3, np.float32)})
    message = r"does not: model\.layers\.0\.extra\.weight \(in model.safetensors\)"
    with pytest.raises(UserError, match=message):
        check(model)


def test_layer_that_the_config_does_not_have(model):
    change_config(model, num_hidden_layers=1)
    with pytest.raises(UserError, match=r"model\.layers\.1\..* and 19 more"):
        check(model)


def test_wrong_shape(model):
    change_weights(model, {DOWN: np.zeros((28, 36), np.float32)})
    message = f"{DOWN} has shape .28, 36. in model.safetensors, but config.json implies .36, 28"
    with pytest.raises(UserError, match=message):
        check(model)


@pytest.mark.parametrize("dtype", [np.int64, np.float64, ml_dtypes.float8_e4m3fn])
def test_wrong_dtype(model, dtype):
    change_weights(model, {DOWN: np.zeros((36, 28), dtype)})
    with pytest.raises(UserError, match=f"{DOWN} has dtype .*; readable are F32, BF16, F16"):
        check(model)


def test_tensor_in_two_shards(model):
    (model / WEIGHTS).rename(model / "a.safetensors")
    save_file({DOWN: np.zeros((36, 28), np.float32)}, model / "more.safetensors")
    with pytest.raises(UserError, match=f"{DOWN} is in both a.safetensors and more"):
        check(model)


def test_tensor_mapped_by_both_layouts(model):
    fused = {"model.layers.0.mlp.experts.gate_up_proj": np.zeros((5, 56, 36), np.float32)}
    change_weights(model, fused)
    with pytest.raises(UserError, match=r"lack .*mlp\.experts\.down_proj"):
        check(model)


@pytest.mark.parametrize("size", [0, 5, 1000, -1])
def test_truncated_file(model, size):
    file = model / WEIGHTS
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(UserError, match="model.safetensors is not a complete safetensors file"):
        check(model)


def test_missing_shard(model):
    sharded = reshard(model)
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="shard model-00002-of-00003.safetensors .* is missing"):
        check(sharded)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.bin", "..", 7, None]
)
def test_index_with_a_name_that_is_no_file_of_the_directory(model, name):
    sharded = reshard(model)
    save_file({"x": np.zeros(1, np.float32)}, model.parent / "x.safetensors")
    change_index(sharded, lm_head__weight=name)
    with pytest.raises(UserError, match="must be the plain name of a .safetensors file"):
        check(sharded)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("[]", "must hold a JSON object, got list"),
        ("{}", "is not a safetensors index"),
        ('{"weight_map": 3}', "is not a safetensors index"),
        ('{"weight_map": {"a": []}}', "must be the plain name"),
    ],
)
def test_broken_index(model, text, message):
    (model / INDEX).write_text(text)
    with pytest.raises(UserError, match=message):
        check(model)


def test_index_that_disagrees_with_the_shards(model):
    sharded = reshard(model)
    change_index(sharded, model__norm__weight="model-00001-of-00003.safetensors")
    change_index(sharded, lm_head__weight="model-00002-of-00003.safetensors")
    with pytest.raises(UserError, match=r"index has (lm_head|model\.norm)\.weight in model-0000"):
        check(sharded)


def test_empty_index(model):
    (model / INDEX).write_text('{"weight_map": {}}')
    with pytest.raises(UserError, match="has no .safetensors weights"):
        check(model)


def test_pickle_only(model):
    (model / WEIGHTS).rename(model / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin: pickle files are not read"):
        check(model)


def test_no_weights(model):
    (model / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"has no \.safetensors weights\.$"):
        check(model)
    with pytest.raises(UserError, match="has no .safetensors weights"):
        fingerprint(model)


def test_old_rotary_buffers_are_ignored(model):
    params = load(model)[1]
    change_weights(model, {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(5, np.float32)})
    assert_bit_equal(params, load(model)[1])


# ----------------------------------------------------------------------------------------- config


def test_config_json_missing_or_broken(model):
    file = model / "config.json"
    for text, message in [("{", "is not JSON"), ("\x00", "is not JSON"), ("[]", "JSON object")]:
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read_model_config(model)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not JSON"):
        read_model_config(model)
    file.unlink()
    with pytest.raises(UserError, match="has no config.json"):
        read_model_config(model)


@pytest.mark.parametrize(
    "field",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_experts_per_tok",
        "num_local_experts",
    ],
)
@pytest.mark.parametrize("value", [..., None])
def test_missing_field(model, field, value):
    change_config(model, **{field: value})
    with pytest.raises(UserError, match=f"the field '{field}' is missing for model_type 'mixtral'"):
        read_model_config(model)


REFUSED = [
    ({"model_type": "mamba"}, "'mamba' is not supported; supported: llama, mixtral, olmoe"),
    ({"model_type": ...}, r"config.json does not name a model_type.*\(it has architectures"),
    ({"model_type": ["mixtral"]}, "is not supported"),
    ({"quantization_config": {"quant_method": "gptq"}}, r"the weights are quantised \(gptq\)"),
    ({"quantization_config": "gptq"}, "quantization_config must be an object"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope type 'yarn' is not supported"),
    ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta must be a number above 0"),
    ({"rope_parameters": 1e6}, "rope_parameters must be an object"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; only silu"),
    ({"hidden_size": "36"}, "hidden_size must be a whole number above 0, got '36'"),
    ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number above 0, got 0"),
    ({"num_hidden_layers": True}, "num_hidden_layers must be a whole number above 0, got True"),
    ({"vocab_size": 97.5}, "vocab_size must be a whole number"),
    ({"sliding_window": -5}, "sliding_window must be a whole number"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a number above 0"),
    ({"norm_topk_prob": "false"}, "norm_topk_prob must be true or false, got 'false'"),
    ({"num_key_value_heads": 4}, r"num_attention_heads \(6\) must be a multiple .* \(4\)"),
    ({"head_dim": 7}, "head_dim must be even, got 7"),
    ({"head_dim": None, "hidden_size": 37}, r"hidden_size \(37\) must be a multiple"),
    ({"num_experts_per_tok": 6}, r"num_experts_per_tok \(6\) is more than the experts .* \(5\)"),
]


@pytest.mark.parametrize(
    ("changes", "message"), REFUSED, ids=[str(change) for change, _ in REFUSED]
)
def test_refused_config(model, changes, message):
    change_config(model, **changes)
    with pytest.raises(UserError, match=message):
        read_model_config(model)


def test_fields_old_and_new():
    """Names that moved between versions of the format mean the same."""
    values = {
        "model_type": "olmoe",
        "vocab_size": 97,
        "hidden_size": 36,
        "intermediate_size": 28,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_experts_per_tok": 2,
        "num_experts": 5,
    }
    plain = parse_config(values)
    assert parse_config(values | {"rope_theta": 1e4, "rope_scaling": None}) == plain
    assert parse_config(values | {"rope_parameters": {"rope_theta": 1e4}}) == plain
    assert parse_config(values | {"rope_scaling": {"type": "default"}, "clip_qkv": None}) == plain
    assert parse_config(values | {"num_key_value_heads": None, "head_dim": None}) == plain
    assert parse_config(values | {"num_experts": None, "num_local_experts": 5}) == plain
    assert parse_config(values | {"rope_theta": 2e4}) != plain
    nested = values | {"rope_theta": 2e4, "rope_parameters": {"rope_type": "default"}}
    assert parse_config(nested) == parse_config(values | {"rope_theta": 2e4})


# ------------------------------------------------------------------------------------------- tied


def test_tied_head_is_the_embedding(model):
    change_config(model, tie_word_embeddings=True)
    change_weights(model, without=["lm_head.weight"])
    config, params = load(model)
    assert config.tie_embeddings and "head" not in params


def test_tied_config_with_a_head_on_disk_uses_the_head(model):
    params = load(model)[1]
    change_config(model, tie_word_embeddings=True)
    config, again = load(model)
    assert not config.tie_embeddings
    assert_bit_equal(params, again)


def test_untied_config_without_a_head(model):
    change_weights(model, without=["lm_head.weight"])
    with pytest.raises(UserError, match=r"lack lm_head\.weight"):
        check(model)


def test_tied_config_without_weights_is_readable(model):
    change_config(model, tie_word_embeddings=True)
    (model / WEIGHTS).unlink()
    assert read_model_config(model).tie_embeddings


# ---------------------------------------------------------------------------- dtypes and placement


def test_half_precision_files_load_exactly(model):
    tensors = load_file(model / WEIGHTS)
    for dtype in (ml_dtypes.bfloat16, np.float16):
        rounded = {key: value.astype(dtype) for key, value in tensors.items()}
        save_file(rounded, model / WEIGHTS)
        params = load(model)[1]
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
        save_file({key: x.astype(np.float32) for key, x in rounded.items()}, model / WEIGHTS)
        assert_bit_equal(load(model)[1], params)


def test_bfloat16_parameters_are_rounded_to_nearest(model):
    config, params = load(model)
    rounded = load_params(config, model, abstract(config, jnp.bfloat16))
    expected = jax.tree.map(lambda leaf: np.asarray(leaf).astype(ml_dtypes.bfloat16), params)
    assert_bit_equal(jax.tree.map(np.asarray, rounded), expected)


def test_parameters_land_on_the_mesh(model):
    config, params = load(model)
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def place(leaf):
        # Over both axes where the last two sizes allow it; layers are never split.
        spec = [None] * len(leaf.shape)
        for axis, (name, count) in zip((-1, -2), (("x", 2), ("y", 4)), strict=True):
            if len(spec) >= 2 - axis and leaf.shape[axis] % count == 0:
                spec[axis] = name
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    wanted = jax.tree.map(place, abstract(config))
    placed = load_params(config, model, wanted)
    assert_bit_equal(placed, params)
    same = jax.tree.map(
        lambda leaf, want: leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim), placed, wanted
    )
    assert all(jax.tree.leaves(same))
    assert not placed["segment_0"]["layer_0"]["moe"]["gate_up"].sharding.is_fully_replicated


# ------------------------------------------------------------------------------------------ write


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_written_model_reads_back(tmp_path, family):
    source = copy_model(family, "fused", tmp_path / "source")
    config, params = load(source)
    values = json.loads((source / "config.json").read_text()) | {"torch_dtype": "float16"}
    write_model(tmp_path / "out", config, params, values, np.float32)
    again, reread = load(tmp_path / "out")
    assert again == config
    assert_bit_equal(params, reread)
    hub = load_file(copy_model(family, "experts", tmp_path / "hub") / WEIGHTS)
    written = load_file(tmp_path / "out" / WEIGHTS)
    assert hub.keys() == written.keys()
    assert all(np.array_equal(hub[key], written[key]) for key in hub)

    write_model(tmp_path / "half", config, params, values, ml_dtypes.bfloat16)
    written_config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert written_config["dtype"] == "bfloat16" and "torch_dtype" not in written_config
    expected = jax.tree.map(
        lambda leaf: np.asarray(leaf).astype(ml_dtypes.bfloat16).astype(np.float32), params
    )
    assert_bit_equal(jax.tree.map(np.asarray, load(tmp_path / "half")[1]), expected)


def test_write_says_whether_the_head_is_tied(model, tmp_path):
    change_config(model, tie_word_embeddings=True)  # untrue: there is a head on disk
    config, params = load(model)
    values = json.loads((model / "config.json").read_text())
    write_model(tmp_path / "out", config, params, values, np.float32)
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )


def test_write_does_not_mix_models(model):
    sharded = reshard(model)
    config, params = load(model)
    with pytest.raises(UserError, match="has weights of another model"):
        write_model(sharded, config, params, {}, np.float32)


def test_transformers_loads_what_is_written(tmp_path, oracle):
    import torch

    from tests.oracles.stored import make_rows

    source = copy_model("olmoe_normalized", "experts", tmp_path / "source")
    config, params = load(source)
    values = json.loads((source / "config.json").read_text())
    write_model(tmp_path / "out", config, params, values, np.float32)
    rows = make_rows()
    with torch.no_grad():
        models = [oracle.load_model(path) for path in (source, tmp_path / "out")]
        before, after = (oracle.row_logits(model, rows, 0).numpy() for model in models)
    np.testing.assert_array_equal(before, after)


def test_transformers_treats_a_head_beside_a_tied_config_alike(model, oracle):
    import torch

    change_config(model, tie_word_embeddings=True)
    head = oracle.load_model(model).lm_head.weight
    assert torch.equal(head, torch.tensor(load_file(model / WEIGHTS)["lm_head.weight"]))
