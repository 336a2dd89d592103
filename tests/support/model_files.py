"""Model directories in every layout, read by the public path."""

import functools
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
from safetensors.numpy import save_file

from drlora_jax.interop.hf_files import find_model, read_headers, read_model_config
from drlora_jax.interop.hf_read import load_params, match_keys
from drlora_jax.models.options import DecoderOptions
from drlora_jax.models.transformer import Decoder, abstract_params

WEIGHTS = "model.safetensors"


@functools.cache
def abstract_on_one_device(config, dtype="float32"):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract_params(Decoder(config, DecoderOptions(dtype=jnp.dtype(dtype)))),
    )


def load(path, dtype="float32"):
    """Configuration and parameters by the public path."""
    directory = find_model(str(path))
    config = read_model_config(directory)
    return config, load_params(config, directory, abstract_on_one_device(config, dtype))


def assert_bit_equal(params, others):
    chex.assert_trees_all_equal(params, others, strict=True)


def write_shards(folder, tensors, config: str, has_index: bool):
    """Three shards with the tensors dealt round, so the experts of one layer lie in all of them."""
    folder.mkdir()
    (folder / "config.json").write_text(config)
    weight_map = {
        key: f"model-{1 + number % 3:05}-of-00003.safetensors"
        for number, key in enumerate(sorted(tensors))
    }
    for name in set(weight_map.values()):
        save_file({key: tensors[key] for key in tensors if weight_map[key] == name}, folder / name)
    if has_index:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


@functools.cache
def abstract(config, dtype=jnp.float32):
    return abstract_params(Decoder(config, DecoderOptions(dtype=dtype)))


def check(directory: pathlib.Path):
    """What is checked before any weight is read."""
    config = read_model_config(directory)
    return match_keys(config, read_headers(directory), abstract(config))
