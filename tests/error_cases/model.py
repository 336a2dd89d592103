"""Model directories: not there, incomplete, lying about themselves, or trying to run code."""

import json
import os
import pathlib
import struct

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.error_cases.case import DENIED, HACKED, PAGE, POINTER, Case

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PAYLOAD = b"cos\nsystem\n(S'touch %s'\ntR." % HACKED.encode()  # a pickle that runs a command
HUGE = 10**9


def _path(path: str, message: str, what: str, make=None) -> Case:
    return Case("model.path", what, message, (f"model.path={path}",), make)


def _case(what: str, message: str, make) -> Case:
    varies = r"(?<=complete safetensors file: ).*?(?=; copy)"
    return Case("model directory", what, message, make=make, varies=varies)


def _values(what: str, message: str, **changes) -> Case:
    """A config.json with other values; ... takes one out."""

    def make(folder: pathlib.Path) -> None:
        file = folder / "model" / "config.json"
        values = json.loads(file.read_text()) | changes
        values = {name: value for name, value in values.items() if value is not ...}
        file.write_text(json.dumps(values))

    return Case("config.json of a model", what, message, make=make)


def _text(what: str, message: str, content: bytes, file="config.json", **options) -> Case:
    def make(folder: pathlib.Path) -> None:
        (folder / "model" / file).write_bytes(content)

    return Case("config.json of a model", what, message, make=make, **options)


def _replaced(name: str, how):
    """Another kind of thing in the place of a file of the model."""

    def make(folder: pathlib.Path) -> None:
        file = folder / "model" / name
        file.unlink(missing_ok=True)
        how(file)

    return make


def _tensors(change):
    def make(folder: pathlib.Path) -> None:
        file = folder / "model" / WEIGHTS
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return make


def _bytes(change):
    def make(folder: pathlib.Path) -> None:
        file = folder / "model" / WEIGHTS
        file.write_bytes(change(file.read_bytes()))

    return make


def _header(change):
    """Edits the header of the weights file: a dict, or the text to put in its place."""

    def edit(content: bytes) -> bytes:
        size = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + size])
        text = (change(header) or json.dumps(header)).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + size :]

    return _bytes(edit)


def _sharded(change=None):
    """Two shards with an index, then a change to (folder, index)."""

    def make(folder: pathlib.Path) -> None:
        directory = folder / "model"
        tensors = load_file(directory / WEIGHTS)
        (directory / WEIGHTS).unlink()
        names, weight_map = sorted(tensors), {}
        for number, part in enumerate((names[::2], names[1::2]), start=1):
            shard = f"model-{number:05d}-of-00002.safetensors"
            save_file({name: tensors[name] for name in part}, directory / shard)
            weight_map |= dict.fromkeys(part, shard)
        index = {"metadata": {}, "weight_map": weight_map}
        if change:
            change(directory, index)
        (directory / INDEX).write_text(json.dumps(index))

    return make


def _shard_name(name) -> Case:
    """An index that leads out of the directory."""

    def change(directory: pathlib.Path, index: dict) -> None:
        save_file({"x": np.zeros(1, np.float32)}, directory.parent / "outside.safetensors")
        index["weight_map"]["lm_head.weight"] = name

    message = r"must be the plain name of a .safetensors file of this directory"
    return _case(f"an index that names {name!r}", message, _sharded(change))


def _pickles(*names: str):
    def make(folder: pathlib.Path) -> None:
        (folder / "model" / WEIGHTS).unlink()
        for name in names:
            (folder / "model" / name).write_bytes(PAYLOAD)

    return make


def _drop_shard(directory: pathlib.Path, index: dict) -> None:
    (directory / "model-00002-of-00002.safetensors").unlink()


def _cut_shard(directory: pathlib.Path, index: dict) -> None:
    file = directory / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _in_both(folder: pathlib.Path) -> None:
    model = folder / "model"
    (model / WEIGHTS).rename(model / "b.safetensors")
    save_file({"model.norm.weight": np.ones(24, np.float32)}, model / "a.safetensors")


def _only(name: str):
    """Other weights in the place of the model's."""

    def make(folder: pathlib.Path) -> None:
        (folder / "model" / WEIGHTS).rename(folder / "model" / name)

    return make


def _prefixed(prefix: str):
    def change(tensors: dict) -> None:
        whole = {f"{prefix}{name}": value for name, value in tensors.items()}
        tensors.clear()
        tensors.update(whole)

    return _tensors(change)


def _json(path: str, values: dict):
    def make(folder: pathlib.Path) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(values))

    return make


def _wrong_shard(directory: pathlib.Path, index: dict) -> None:
    names = index["weight_map"]
    other = {1: 2, 2: 1}[int(names["lm_head.weight"][10])]
    names["lm_head.weight"] = f"model-{other:05d}-of-00002.safetensors"


def _directory_shard(directory: pathlib.Path, index: dict) -> None:
    _drop_shard(directory, index)
    (directory / "model-00002-of-00002.safetensors").mkdir()


def _swap(tensors: dict) -> None:
    key = "model.layers.0.self_attn.k_proj.weight"
    tensors[key] = np.ascontiguousarray(tensors[key].T)


PATHS = (
    _path("/no/such/model", "no such directory", "a directory that is not there"),
    _path(
        "modle",
        "downloading it from the hub failed|no such directory; did you mean model",
        "a typo",
    ),
    _path("model/config.json", "is a file; give the directory", "a file"),
    _path("pipe", "is a named pipe", "a named pipe", lambda folder: os.mkfifo(folder / "pipe")),
    _path("x" * 300, "name too long", "a name too long for a directory"),
    _path("~nobody-of-that-name/a/b", "no such directory", "the home of nobody"),
    _path("https://h/m", "model.path=https://h/m is a URL", "a web address"),
    _path("s3://b/m", "model.path=s3://b/m is a URL, but buckets", "a bucket"),
    _path("empty", "is an empty directory", "nothing in it", lambda d: (d / "empty").mkdir()),
    _path(
        "owner/name",
        "remove it to have the hub's model of this name",
        "an empty folder of a hub name",
        lambda folder: (folder / "owner" / "name").mkdir(parents=True),
    ),
    _path(
        "adapter",
        "is a PEFT adapter of the base model owner/base, .* give that base model",
        "an adapter",
        _json("adapter/adapter_config.json", {"base_model_name_or_path": "owner/base"}),
    ),
    _path(
        "old",
        "is a run directory, .* use it with --run; its base model is owner/base",
        "a run",
        _json("old/config.json", {"config": {"model": {"path": "owner/base"}}}),
    ),
    _path("gguf", "GGUF is not read", "GGUF weights", _json("gguf/model-Q4.gguf", {})),
    _path(".", "a folder of models .model., .* such as model", "the folder of a model"),
    _path("bundled:huge", "no such model; it has bundled:tiny_moe", "an unknown bundled model"),
    _path("bundled:../bundled/tiny_moe", "the package has no such model", "a path behind bundled:"),
)
CONFIGS = (
    _case("no config.json", "has no config.json", lambda d: (d / "model" / "config.json").unlink()),
    _text("nothing in it", "is not JSON", b""),
    _text("cut off", "is not JSON.*cut off", b'{"model_type": "olm'),
    _text("a list", "must hold a JSON object, got list", b"[]"),
    _text("not UTF-8", "byte 0 is not UTF-8", b"\xff\xfe{}"),
    _text(
        "nested without end",
        "nested too deeply|is not JSON",
        b"[" * 200_000,
        varies="(?<=is not JSON).*",
    ),
    _text(
        "a number of 5000 digits",
        "is not JSON",
        b'{"vocab_size": ' + b"9" * 5000 + b"}",
        varies="(?<=is not JSON:).*",
    ),
    _text(
        "a name given twice",
        "has the name 'num_experts' twice",
        b'{"model_type": "olmoe", "num_experts": 4, "num_experts": 8}',
    ),
    _case("a directory in its place", "it is a dir", _replaced("config.json", pathlib.Path.mkdir)),
    _case("a named pipe in its place", "it is a named pipe", _replaced("config.json", os.mkfifo)),
    _values("an unknown model_type", "model_type 'mamba' is not supported", model_type="mamba"),
    _values("no model_type", "config.json does not name a model_type", model_type=...),
    _text("a pointer of git-lfs", "config.json is a git-lfs pointer", POINTER),
    _text("a web page", "config.json is a web page .HTML., not the file itself: download", PAGE),
    _text(
        "an error of the hub",
        "config.json is the error message of a server .*Repository not found.*, not the file",
        b'{"error":"Repository not found"}',
    ),
    _values("a list as model_type", "is not supported", model_type=["olmoe"]),
    _values("a path as model_type", "is not supported", model_type="../../etc/passwd"),
    _values(
        "a quantised model", r"quantised \(gptq\)", quantization_config={"quant_method": "gptq"}
    ),
    _values("no hidden_size", "the field 'hidden_size' is missing", hidden_size=...),
    _values("text as a number", "hidden_size must be a whole number above 0", hidden_size="24"),
    _values("a negative number", "num_hidden_layers must be a whole number", num_hidden_layers=-1),
    _values("NaN", "rms_norm_eps must be a number above 0 .*got nan", rms_norm_eps=float("nan")),
    _values("infinity", "rope_theta must be a number above 0", rope_theta=float("inf")),
    _values("a billion layers", "num_hidden_layers must be at most", num_hidden_layers=HUGE),
    _values("a million layers", "1000000 layers, but the weights", num_hidden_layers=10**6),
    _values("a million experts", "1000000 experts, but the weights", num_experts=10**6),
    _values("a head of a million", "head_dim must be at most 65536", head_dim=10**6),
    _values(
        "a width of 10^18",
        "hidden_size",
        hidden_size=10**18,
        num_attention_heads=1,
        num_key_value_heads=1,
    ),
    _values("another width than the weights", r"has shape \[.*config.json implies", hidden_size=48),
    _values("more layers than the weights", "The weights lack model.layers.2", num_hidden_layers=3),
    _values(
        "fewer layers than the weights", "have tensors that olmoe models lack", num_hidden_layers=1
    ),
    _values(
        "an activation that is not there", "hidden_act 'gelu' is not supported", hidden_act="gelu"
    ),
    _values("more experts a token than experts", "more than the experts", num_experts_per_tok=9),
    _values(
        "an unknown rope type",
        "rope type 'yarn' is not supported",
        rope_scaling={"rope_type": "yarn"},
    ),
    _values("a list as rope type", "is not supported", rope_scaling={"rope_type": ["yarn"]}),
)
WEIGHT_FILES = (
    _case("no weights", "has no .safetensors weights", _pickles()),
    _case("pickle only", "pickle files are not read", _pickles("pytorch_model.bin", "model.pt")),
    _case("an empty file", "not a complete safetensors file", _bytes(lambda content: b"")),
    _case("a truncated file", "not a complete safetensors file", _bytes(lambda x: x[:-1000])),
    _case(
        "bytes behind the end", "not a complete safetensors file", _bytes(lambda x: x + b"x" * 9)
    ),
    _case("a pickle by the name of weights", "not a complete", _bytes(lambda x: PAYLOAD)),
    _case(
        "a header that claims 2^60 bytes",
        "not a complete safetensors file",
        _bytes(lambda content: struct.pack("<Q", 2**60) + content[8:]),
    ),
    _case(
        "a header that is no JSON", "not a complete safetensors", _header(lambda header: "{oops")
    ),
    _case("a header that is a list", "not a complete safetensors", _header(lambda header: "[]")),
    _case(
        "a tensor said to lie beyond the end",
        "not a complete safetensors file",
        _header(lambda header: header["lm_head.weight"].update(data_offsets=[0, 2**50])),
    ),
    _case(
        "a tensor said to end before it starts",
        "not a complete safetensors file",
        _header(lambda header: header["lm_head.weight"].update(data_offsets=[400, 0])),
    ),
    _case(
        "a shape that does not fit its bytes",
        "not a complete safetensors file",
        _header(lambda header: header["lm_head.weight"].update(shape=[2**40, 2**40])),
    ),
    _case(
        "an unknown dtype",
        "not a complete safetensors file",
        _header(lambda header: header["lm_head.weight"].update(dtype="Q4")),
    ),
    _case(
        "integers as weights",
        "lm_head.weight has dtype I32; readable are",
        _tensors(lambda t: t.update({"lm_head.weight": t["lm_head.weight"].astype(np.int32)})),
    ),
    _case(
        "a missing tensor",
        "The weights lack model.norm",
        _tensors(lambda t: t.pop("model.norm.weight")),
    ),
    _case(
        "a tensor too many",
        "have tensors that olmoe models lack: lora.weight",
        _tensors(lambda t: t.update({"lora.weight": np.zeros(3, np.float32)})),
    ),
    _case(
        "a pointer of git-lfs",
        "model.safetensors is a git-lfs pointer",
        _bytes(lambda content: POINTER),
    ),
    _case("a web page", "model.safetensors is a web page", _bytes(lambda content: PAGE)),
    _case(
        "an error of a bucket",
        "model.safetensors is the error message of a server .*AccessDenied.*: download it again",
        _bytes(lambda content: DENIED),
    ),
    _case(
        "an adapter's weights alone",
        "adapter_model.safetensors is an adapter of PEFT",
        _only("adapter_model.safetensors"),
    ),
    _case("DataParallel's names", "begin with 'module.'.*save model.module", _prefixed("module.")),
    _case(
        "the names of PEFT",
        "begin with 'base_model.model.': PEFT .*merge_and_unload",
        _prefixed("base_model.model."),
    ),
    _case("a transposed tensor", r"k_proj.weight has shape \[24, 12\]", _tensors(_swap)),
    _case(
        "a tensor name with terminal codes",
        r"olmoe does not: \\x1b\[2Jx",
        _tensors(lambda t: t.update({"\x1b[2Jx": np.zeros(3, np.float32)})),
    ),
    _case("a directory as weights", "it is a directory", _replaced(WEIGHTS, pathlib.Path.mkdir)),
    _case("a named pipe as weights", "it is a named pipe", _replaced(WEIGHTS, os.mkfifo)),
    _case(
        "a link to nothing as weights",
        "it is a link to nothing",
        _replaced(WEIGHTS, lambda file: file.symlink_to("/nowhere/at/all")),
    ),
    _case(
        "an endless device as weights",
        "it is a device",
        _replaced(WEIGHTS, lambda file: file.symlink_to("/dev/zero")),
    ),
)
INDEXES = (
    _case("a missing shard", "shard model-00002.* is missing", _sharded(_drop_shard)),
    _case("a directory as shard", "model-00002.* is a directory", _sharded(_directory_shard)),
    _case("a truncated shard", "model-00001.* is not a complete", _sharded(_cut_shard)),
    _case(
        "a tensor in another shard than said",
        "the index has lm_head.weight in",
        _sharded(_wrong_shard),
    ),
    _case(
        "a tensor in two shards",
        "model.norm.weight is in both a.safetensors and b.safetensors",
        _in_both,
    ),
    _text("an index that is no JSON", "is not JSON", b"{", INDEX),
    _text("an index that is a list", "must hold a JSON object", b"[]", INDEX),
    _text("an index without a map", "is not a safetensors index", b"{}", INDEX),
    _text("an index of nothing", "no .safetensors weights", b'{"weight_map": {}}', INDEX),
    _text(
        "a name twice in an index",
        "has the name 'a' twice",
        b'{"weight_map": {"a": "b", "a": "c"}}',
        INDEX,
    ),
    *(
        _shard_name(name)
        for name in (
            "../outside.safetensors",
            "/etc/outside.safetensors",
            "..\\outside.safetensors",
            "C:outside.safetensors",
            "shards/x.safetensors",
            "x.safetensors\0",
            "..",
            "",
            "pytorch_model.bin",
            None,
            ["x.safetensors"],
        )
    ),
)
CASES = (*PATHS, *CONFIGS, *WEIGHT_FILES, *INDEXES)
