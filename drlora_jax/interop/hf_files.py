"""Reads the files of a Hugging Face model directory: finds it, reads `config.json` and the headers
of its `.safetensors`, and computes a fingerprint of all. Nothing is executed.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from drlora_jax.errors import UserError
from drlora_jax.interop.directories import describe
from drlora_jax.models.architecture import ModelConfig
from drlora_jax.models.families import parse_config
from drlora_jax.system.imports import load_package
from drlora_jax.system.paths import (
    ABSENT,
    DIRECTORY,
    FILE,
    check_downloaded,
    given,
    kind_of,
    local_path,
    read_json,
)
from drlora_jax.system.text import did_you_mean

IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)  # buffers of old files, derived from the config
HEAD = "lm_head.weight"
# Values of config.json that tell who wrote it and how to run it, not what the model is.
UNRELATED_VALUES = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")
STRETCHING = ("linear", "dynamic", "yarn")  # rope scalings by a factor of the original length
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Weights next to those of a model, or in directories that are no model.
OTHER_WEIGHTS = {
    "adapter_model": "an adapter of PEFT",
    "optimizer": "the state of an optimizer",
    "consolidated": "the same weights in the format of their makers",
}
WHOLE_BYTES = 64 << 20  # files up to this size enter the fingerprint as a whole
LARGEST_FACTOR = 1e6  # of rope scaling; larger ones and NaN are ignored
SAMPLES, SAMPLE_BYTES = 64, 65536  # for a larger file


class TensorInfo(NamedTuple):
    file: pathlib.Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it


def find_model(
    path: str, *, option: str = "model.path", revision: str | None = None
) -> pathlib.Path:
    """Returns the directory that `model.path` means: a directory, `bundled:NAME`, or a hub name
    (downloaded).

    Args:
      option: the option or field of the path, for messages.
      revision: the commit of a hub name (see `revision_of`); None: the newest.
    """
    shown = given(option, path)
    if path.startswith("bundled:"):
        folder = pathlib.Path(__file__).parents[1] / "bundled"
        known = {f"bundled:{file.parent.name}": file for file in folder.glob("*/config.json")}
        if path not in known:  # looked up, not joined: `..` cannot leave the folder
            raise UserError(
                f"{shown}: the package has no such model; it has {', '.join(sorted(known))}."
            )
        return known[path].parent
    directory = local_path(path, option)
    kind = kind_of(directory)
    if kind == DIRECTORY:
        return directory
    if kind != ABSENT:
        raise UserError(f"{shown} is {kind}; give the directory that contains config.json.")
    names = _names_in(directory.parent)
    hint = did_you_mean(directory.name, names, show=lambda name: directory.parent / name)
    if path.count("/") != 1 or path.startswith((".", "/")):
        raise UserError(f"{shown}: no such directory{f'; {hint}' if hint else '.'}")
    return _download(path, shown, hint, revision)


def revision_of(directory: pathlib.Path) -> str | None:
    """Returns the commit of a hub model that is in the hub's cache; None for other directories."""
    commit, place = directory.name, directory.absolute().parent
    is_cached = place.name == "snapshots" and place.parent.name.startswith("models--")
    return commit if is_cached and re.fullmatch(r"[0-9a-f]{40}", commit) else None


def _names_in(folder: pathlib.Path) -> list[str]:
    try:
        return [entry.name for entry in folder.iterdir()]
    except OSError:
        return []


def _download(name: str, shown: str, hint: str, revision: str | None) -> pathlib.Path:
    huggingface_hub = load_package("huggingface_hub", f"{shown} is not a directory; the hub")
    # Weights, configs and tokenizer files only: nothing that could be executed.
    patterns = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.jinja"]
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns)
        )
    except Exception as error:  # the hub client raises many types; all mean: not available
        raise UserError(
            f"{shown} is not a local directory, and downloading it from the hub failed "
            f"({type(error).__name__}). Give a local directory{f'; {hint}' if hint else '.'}"
        ) from error


def read_config_json(directory: pathlib.Path) -> dict:
    """Reads a model's config.json; refuses a directory that is no model, and says what it is."""
    file = directory / "config.json"
    is_there = kind_of(file) != ABSENT
    values = read_json(file) if is_there else {}
    if values.get("model_type") is not None:
        return values
    described = describe(directory)
    if described is not None:
        raise UserError(
            f"{directory} is {described.what}, not a model directory; {described.as_model}."
        )
    if not is_there:
        raise UserError(f"{directory} has no config.json; give a Hugging Face model directory.")
    raise UserError(
        f"{file} does not name a model_type, so it is not the config of a transformers model"
        f"{_keys_of(values)}; give the directory of one."
    )


def _keys_of(values: dict) -> str:
    return f" (it has {', '.join(list(values)[:3])})" if values else " (it is empty)"


def read_model_config(directory: pathlib.Path) -> ModelConfig:
    """Returns the architecture; `tie_embeddings` is set by the weights on disk, if there are any.

    A config may say tied although the file has a head of its own; then the file is right.
    """
    config = parse_config(read_config_json(directory))
    if config.tie_embeddings and any(visible_weights(directory)):
        return dataclasses.replace(config, tie_embeddings=HEAD not in read_headers(directory))
    return config


def longest_positions(directory: pathlib.Path) -> int | None:
    """Returns the number of positions that the model was trained for, rope scaling included; None
    if its config.json does not say.

    With linear, dynamic and yarn scaling `max_position_embeddings` may be the length before or
    behind the scaling; with the other kinds it is the one behind it.
    """
    values = read_config_json(directory)
    values = values.get("text_config") or values
    positions = _positive(values.get("max_position_embeddings"))
    scaling = values.get("rope_scaling") or values.get("rope_parameters")
    if positions is None or not isinstance(scaling, dict):
        return positions
    scaling = scaling.get("full_attention") or scaling  # one entry for each kind of layer
    factor = scaling.get("factor")
    is_number = isinstance(factor, int | float) and not isinstance(factor, bool)
    is_stretched = scaling.get("rope_type", scaling.get("type")) in STRETCHING
    if not (is_stretched and is_number and 1 <= factor < LARGEST_FACTOR):
        return positions
    name = "original_max_position_embeddings"
    original = _positive(values.get(name)) or _positive(scaling.get(name)) or positions
    return max(positions, int(original * factor))


def _positive(value) -> int | None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**53
    return value if is_count else None


# ------------------------------------------------------------------------------------------ headers


def read_headers(directory: pathlib.Path) -> dict[str, TensorInfo]:
    """Reads every tensor of the directory; with an index, exactly the tensors that it lists."""
    tensors: dict[str, TensorInfo] = {}
    weight_map = _read_index(directory)
    for file in _weight_files(directory, weight_map):
        with open_weights(file) as handle:
            for key in handle.keys():
                if key in tensors:
                    raise UserError(
                        f"{key} is in both {tensors[key].file.name} and {file.name} of {directory}."
                    )
                part = handle.get_slice(key)
                tensors[key] = TensorInfo(file, tuple(part.get_shape()), part.get_dtype())
    if weight_map is not None:
        _check_index(directory, weight_map, tensors)
    return tensors


def _read_index(directory: pathlib.Path) -> dict[str, str] | None:
    """Returns the index, tensor name -> file name; None if there is no index."""
    index = directory / INDEX
    if kind_of(index) == ABSENT:
        return None
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(
            f"{index} is not a safetensors index: it needs an object weight_map (tensor: file)."
        )
    for key, name in sorted(weight_map.items()):
        # PureWindowsPath knows both slashes and drive letters.
        is_plain = isinstance(name, str) and pathlib.PureWindowsPath(name).name == name
        if not is_plain or not name.endswith(".safetensors"):
            raise UserError(
                f"{index}: {name!r} (of {key}) must be the plain name of a .safetensors file of "
                "this directory."
            )
    for name in sorted(set(weight_map.values())):
        kind = kind_of(directory / name)
        if kind != FILE:
            found = "missing" if kind == ABSENT else kind
            raise UserError(f"{directory}: the shard {name} that the index names is {found}.")
    return weight_map


def _check_index(directory, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    found = {key: info.file.name for key, info in tensors.items()}
    for key in sorted(found.keys() | weight_map.keys()):
        if key.endswith(IGNORED_SUFFIXES) or found.get(key) == weight_map.get(key):
            continue
        raise UserError(
            f"{directory}: the index has {key} in {weight_map.get(key, 'no file')}, but it is in "
            f"{found.get(key, 'no file')}."
        )


def _weight_files(directory: pathlib.Path, weight_map: dict[str, str] | None) -> list[pathlib.Path]:
    if weight_map is not None:
        files = [directory / name for name in sorted(set(weight_map.values()))]
    else:
        files = visible_weights(directory)
        alone = [file for file in files if file.name == SINGLE]
        files = alone or [file for file in files if _other_kind(file) is None]
    if not files:
        raise UserError(_no_weights(directory))
    for file in files:
        kind = kind_of(file)
        if kind != FILE:  # a named pipe would block forever
            raise UserError(f"{file} must be a file with weights, but it is {kind}.")
    return files


def _no_weights(directory: pathlib.Path) -> str:
    """Describes what a directory has instead of a model's weights."""
    for file in visible_weights(directory):
        if kind := _other_kind(file):
            return (
                f"{directory} has no weights of a model: {file.name} is {kind}. Give a directory "
                f"with {SINGLE}, or shards with their index."
            )
    pickles = (directory.glob(suffix) for suffix in ("*.bin", "*.pt", "*.pth"))
    names = sorted(file.name for files in pickles for file in files)
    found = f" It has {', '.join(names[:3])}: pickle files are not read, convert them."
    return f"{directory} has no .safetensors weights.{found if names else ''}"


def visible_weights(directory: pathlib.Path) -> list[pathlib.Path]:
    """Returns all .safetensors files except hidden ones (._model.safetensors), which macOS and
    others leave.
    """
    return sorted(file for file in directory.glob("*.safetensors") if file.name[0] != ".")


def has_weights(directory: pathlib.Path) -> bool:
    """Returns whether there are weight files, or an index that names them."""
    is_indexed = kind_of(directory / INDEX) != ABSENT
    return is_indexed or any(_other_kind(file) is None for file in visible_weights(directory))


def _other_kind(file: pathlib.Path) -> str | None:
    return next((what for stem, what in OTHER_WEIGHTS.items() if file.name.startswith(stem)), None)


@contextlib.contextmanager
def open_weights(file: pathlib.Path) -> Iterator:
    check_downloaded(file)
    try:
        with safe_open(file, framework="numpy") as handle:
            yield handle
    except SafetensorError as error:
        raise UserError(
            f"{file} is not a complete safetensors file: {error}; copy it again."
        ) from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error}.") from error


# ----------------------------------------------------------------------------------------- identity


def fingerprint(directory: pathlib.Path) -> str:
    """Returns a sha256 over the meaning of config.json and the sizes and bytes of the weight files.

    Files above 64 MiB contribute only the header (names, shapes, dtypes), the end and evenly spaced
    samples, so that hundreds of gigabytes take seconds: enough to distinguish models, not to find a
    flipped bit.
    """
    return _digest(directory, _meaning(read_model_config(directory)))


def legacy_fingerprint(directory: pathlib.Path) -> str:
    """Returns the older kind of fingerprint, over the values of config.json regardless of their
    layout.
    """
    values = {
        key: value
        for key, value in read_config_json(directory).items()
        if key not in UNRELATED_VALUES
    }
    return _digest(directory, values)


def same_base(stored: dict, directory: pathlib.Path) -> bool:
    """Returns whether a directory has the base of a run; `stored` is the run's config.json.

    Runs without `resolved` may have the fingerprint of either kind.
    """
    wanted = stored["base_fingerprint"]
    if wanted == fingerprint(directory):
        return True
    return "resolved" not in stored and wanted == legacy_fingerprint(directory)


def _meaning(value):
    """Returns a config as JSON that stays the same when fields are added to its classes: fields
    that equal their defaults are left out, and equal numbers have one form, even if libraries round
    the last digit differently.
    """
    if dataclasses.is_dataclass(value):
        return {
            field.name: _meaning(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if getattr(value, field.name) != field.default
        }
    if isinstance(value, tuple):
        return [_meaning(each) for each in value]
    if isinstance(value, float):
        return int(value) if value.is_integer() else float(f"{value:.9g}")
    return value


def _digest(directory: pathlib.Path, values: dict) -> str:
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for file in _weight_files(directory, _read_index(directory)):
        size = file.stat().st_size
        digest.update(f"{size}\n".encode())
        with file.open("rb") as handle:
            if size <= WHOLE_BYTES:
                digest.update(handle.read())
                continue
            header_size = handle.read(8)  # the format: u64 length, header, data
            digest.update(handle.read(min(int.from_bytes(header_size, "little"), size)))
            for start in (*range(0, size, size // SAMPLES), size - SAMPLE_BYTES):
                handle.seek(start)
                digest.update(handle.read(SAMPLE_BYTES))
    return digest.hexdigest()
