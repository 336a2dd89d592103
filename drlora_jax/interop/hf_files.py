"""The files of a Hugging Face model directory: where it is, its `config.json`, the headers of its
`.safetensors`, and a fingerprint of all. Nothing is executed.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from drlora_jax.data.packages import load_package
from drlora_jax.errors import UserError
from drlora_jax.files import ABSENT, DIRECTORY, FILE, expand_user, kind_of, read_json
from drlora_jax.models.architecture import ModelConfig
from drlora_jax.models.families import parse_config

IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)  # buffers of old files, derived from the config
HEAD = "lm_head.weight"
# Of config.json: who wrote it and how it is to be run, not what the model is.
UNRELATED_VALUES = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")
WHOLE_BYTES = 64 << 20  # files up to this size enter the fingerprint as a whole
LARGEST_FACTOR = 1e6  # of rope scaling; more, or NaN, says nothing
SAMPLES, SAMPLE_BYTES = 64, 65536  # of a larger file


class TensorInfo(NamedTuple):
    file: pathlib.Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it


def find_model(path: str) -> pathlib.Path:
    """The directory that `model.path` means: a directory, `bundled:NAME`, or a hub name
    (downloaded).
    """
    if path.startswith("bundled:"):
        folder = pathlib.Path(__file__).parents[1] / "bundled"
        known = {f"bundled:{file.parent.name}": file for file in folder.glob("*/config.json")}
        if path not in known:  # looked up, not joined: `..` cannot leave the folder
            raise UserError(
                f"model.path={path}: the package has no such model; it has "
                f"{', '.join(sorted(known))}."
            )
        return known[path].parent
    directory = expand_user(path)
    kind = kind_of(directory)
    if kind == DIRECTORY:
        return directory
    if kind != ABSENT:
        raise UserError(f"model.path={path} is {kind}; give the directory that has config.json.")
    near = difflib.get_close_matches(directory.name, _names_in(directory.parent), n=1)
    hint = f" Did you mean {directory.parent / near[0]}?" if near else ""
    if path.count("/") != 1 or path.startswith((".", "/")):
        raise UserError(f"model.path={path}: no such directory.{hint}")
    return _download(path, hint)


def _names_in(folder: pathlib.Path) -> list[str]:
    try:
        return [entry.name for entry in folder.iterdir()]
    except OSError:
        return []


def _download(name: str, hint: str) -> pathlib.Path:
    huggingface_hub = load_package("huggingface_hub", f"model.path={name} is no directory; the hub")
    # Weights, configs and tokenizer files only: nothing that could be executed.
    patterns = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.jinja"]
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds; all mean: not to be had
        raise UserError(
            f"model.path={name} is no directory here, and the hub did not give it "
            f"({type(error).__name__}). Give a local directory.{hint}"
        ) from error


def read_config_json(directory: pathlib.Path) -> dict:
    file = directory / "config.json"
    if kind_of(file) == ABSENT:
        raise UserError(f"{directory} has no config.json; is it a Hugging Face model directory?")
    return read_json(file)


def read_model_config(directory: pathlib.Path) -> ModelConfig:
    """The architecture, with `tie_embeddings` as the weights on disk have it, if there are any.

    A config may say tied although the file has a head of its own; then the file is right.
    """
    config = parse_config(read_config_json(directory))
    if config.tie_embeddings and any(directory.glob("*.safetensors")):
        return dataclasses.replace(config, tie_embeddings=HEAD not in read_headers(directory))
    return config


def longest_positions(directory: pathlib.Path) -> int | None:
    """The positions that the model was made for, rope scaling counted; None where its config.json
    does not say.

    `factor` counts from the original context, which most scalings name; where it is not named,
    `max_position_embeddings` is the original.
    """
    values = read_config_json(directory)
    positions = _positive(values.get("max_position_embeddings"))
    scaling = values.get("rope_scaling") or values.get("rope_parameters")
    if positions is None or not isinstance(scaling, dict):
        return positions
    if scaling.get("rope_type", scaling.get("type", "default")) == "default":
        return positions
    original = _positive(scaling.get("original_max_position_embeddings"))
    factor = scaling.get("factor")
    is_number = isinstance(factor, int | float) and not isinstance(factor, bool)
    if not is_number or not 1 <= factor < LARGEST_FACTOR:
        return positions
    return max(positions, int((original or positions) * factor))


def _positive(value) -> int | None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**53
    return value if is_count else None


# ---------------------------------------------------------------------------------------------
# headers


def read_headers(directory: pathlib.Path) -> dict[str, TensorInfo]:
    """Every tensor of the directory; with an index, exactly the tensors and files it lists."""
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
    """Tensor name -> file name, as the index says; None where there is no index."""
    index = directory / "model.safetensors.index.json"
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
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        others = sorted(
            file.name for suffix in ("*.bin", "*.pt", "*.pth") for file in directory.glob(suffix)
        )
        found = (
            f" It has {', '.join(others[:3])}: pickle files are not read, convert them."
            if others
            else ""
        )
        raise UserError(f"{directory} has no .safetensors weights.{found}")
    for file in files:
        kind = kind_of(file)
        if kind != FILE:  # a named pipe would block for ever
            raise UserError(f"{file} must be a file with weights, but it is {kind}.")
    return files


@contextlib.contextmanager
def open_weights(file: pathlib.Path) -> Iterator:
    try:
        with safe_open(file, framework="numpy") as handle:
            yield handle
    except SafetensorError as error:
        raise UserError(
            f"{file} is not a complete safetensors file: {error}; copy it again."
        ) from error
    except OSError as error:
        raise UserError(f"{file} can not be read: {error}.") from error


def fingerprint(directory: pathlib.Path) -> str:
    """sha256 over the values of config.json and the sizes and bytes of the weight files.

    Of a file above 64 MiB only the header (names, shapes, dtypes), the end and evenly spaced
    samples enter, so that hundreds of gigabytes take seconds: enough to tell models apart, not to
    find a flipped bit.
    """
    values = {
        key: value
        for key, value in read_config_json(directory).items()
        if key not in UNRELATED_VALUES
    }
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
