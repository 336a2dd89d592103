"""Model directories: where they are, which files are weights, and what makes them a base."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from drlora_jax.errors import UserError
from drlora_jax.interop import hf_files
from drlora_jax.interop.hf_files import (
    find_model,
    fingerprint,
    legacy_fingerprint,
    read_headers,
    read_model_config,
    revision_of,
    same_base,
)
from tests.oracles.stored import copy_model
from tests.support.tiny import BUNDLED, OLMOE, write_tiny_model

WEIGHTS = "model.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def model(tmp_path):
    return copy_model("mixtral", "experts", tmp_path / "model")


def change_config(directory, **changes):
    """Fields set, or left out where the value is `...`."""
    file = directory / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


# -------------------------------------------------------------------------------------- directory


def test_a_typo_gets_a_hint(model):
    with pytest.raises(UserError, match=f"no such directory; did you mean {model}"):
        find_model(str(model.parent / "modle"))


def test_no_directory():
    with pytest.raises(UserError, match=r"model\.path=/nowhere/at/all: no such directory\.$"):
        find_model("/nowhere/at/all")


def test_a_file_is_no_directory(model):
    with pytest.raises(UserError, match="config.json is a file; give the directory"):
        find_model(str(model / "config.json"))


def test_unknown_bundled_model():
    with pytest.raises(UserError, match="the package has no such model; it has bundled:tiny_moe"):
        find_model("bundled:huge")
    assert (find_model("bundled:tiny_moe") / "config.json").is_file()


def test_hub_name_that_can_not_be_had(tmp_path, monkeypatch):
    import huggingface_hub

    def refuse(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mixtral").mkdir(parents=True)
    with pytest.raises(
        UserError, match=r"downloading it from the hub failed \(OSError\).*mean models/mixtral"
    ):
        find_model("models/mixtrall")


def test_the_option_is_named(tmp_path):
    for option, shown in (("--model", "--model "), ("model.path", "model.path=")):
        with pytest.raises(UserError, match=f"^{shown}{tmp_path}/absent: no such directory"):
            find_model(str(tmp_path / "absent"), option=option)
    assert find_model(tmp_path.as_uri()) == tmp_path


def cached(tmp_path, commit=COMMIT) -> pathlib.Path:
    """A model as the hub's client keeps it."""
    folder = tmp_path / "hub" / "models--owner--name" / "snapshots" / commit
    folder.mkdir(parents=True)
    return folder


def test_a_hub_name_keeps_its_revision(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def give(name, *, revision, allow_patterns):
        asked.append((name, revision))
        return str(tmp_path / "hub" / "models--owner--name" / "snapshots" / (revision or COMMIT))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", give)
    monkeypatch.chdir(tmp_path)
    commit = revision_of(find_model("owner/name"))
    assert commit == COMMIT and revision_of(find_model("owner/name", revision=commit)) == COMMIT
    assert asked == [("owner/name", None), ("owner/name", COMMIT)]


def test_revisions_are_those_of_the_hubs_cache(tmp_path, model, monkeypatch):
    folder = cached(tmp_path)
    assert revision_of(folder) == COMMIT
    monkeypatch.chdir(folder.parent)
    assert revision_of(pathlib.Path(COMMIT)) == COMMIT
    assert revision_of(model) is None and revision_of(folder.parent) is None
    assert revision_of(cached(tmp_path, "main")) is None


# ----------------------------------------------------------------------------------------- weights


def headers_of(directory) -> set[str]:
    return {info.file.name for info in read_headers(directory).values()}


HIDDEN = ("._model.safetensors", ".model.safetensors.partial", ".x.safetensors")
BESIDE = ("adapter_model", "optimizer", "consolidated", "consolidated.00", "x")


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_files_are_passed_over(model, name):
    before = (fingerprint(model), legacy_fingerprint(model))
    (model / name).write_bytes(b"\0\5\26\7 of a Mac")
    assert headers_of(model) == {WEIGHTS}
    assert (fingerprint(model), legacy_fingerprint(model)) == before


@pytest.mark.parametrize("name", BESIDE)
def test_the_model_is_read_alone(model, name):
    """As transformers does where there is no index."""
    before = fingerprint(model)
    save_file({"some.weight": np.zeros(3, np.float32)}, model / f"{name}.safetensors")
    assert headers_of(model) == {WEIGHTS} and fingerprint(model) == before
    (model / WEIGHTS).rename(model / "part.safetensors")
    odd = {f"{name}.safetensors"} if name == "x" else set()
    assert headers_of(model) == {"part.safetensors"} | odd
    (model / "part.safetensors").unlink()
    if not odd:
        with pytest.raises(UserError, match=f"weights of a model: {name}.safetensors is (an|the) "):
            read_headers(model)


def test_a_pointer_of_git_lfs_is_named(model):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0f1e\nsize 1234\n"
    (model / WEIGHTS).write_text(pointer)
    with pytest.raises(UserError, match=f"{WEIGHTS} is a git-lfs pointer"):
        read_headers(model)


# ------------------------------------------------------------------------------------ fingerprint


def test_every_byte_of_a_small_file_counts(model):
    file, prints = model / WEIGHTS, set()
    content = bytearray(file.read_bytes())
    prints.add(fingerprint(model))
    places = (8, 20_000, 70_001, 131_072, len(content) - 1)
    for place in places:
        changed = content.copy()
        changed[place] ^= 1
        file.write_bytes(changed)
        prints.add(fingerprint(model))
    assert len(prints) == 1 + len(places)
    file.write_bytes(content)
    assert fingerprint(model) in prints


def test_header_and_ends_of_a_large_file_count(model, monkeypatch):
    monkeypatch.setattr(hf_files, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(hf_files, "SAMPLE_BYTES", 16)
    file, prints = model / WEIGHTS, {fingerprint(model)}
    content = bytearray(file.read_bytes())
    header = int.from_bytes(content[:8], "little")
    places = (8, header // 2, header + 7, len(content) // 64 * 10, len(content) - 1)
    for place in places:
        changed = content.copy()
        changed[place] ^= 1
        file.write_bytes(changed)
        prints.add(fingerprint(model))
    assert len(prints) == 1 + len(places)


def values_of(directory) -> dict:
    return json.loads((directory / "config.json").read_text())


SAME = {
    "keys in another order": lambda values: dict(reversed(values.items())),
    "keys that mean nothing here": lambda values: values | {"auto_map": {}, "new_key": [1]},
    "an older name of the dtype": lambda values: values | {"torch_dtype": "bfloat16"},
    "the newer name of the dtype": lambda values: values | {"dtype": "float32"},
    "rope_theta": lambda values: values | {"rope_theta": 10000.0},
    "rope_theta as a whole number": lambda values: values | {"rope_theta": 10000},
    "rope_parameters": lambda values: (
        values | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    ),
    "a default that is written out": lambda values: values | {"attention_bias": False},
    "no clipping": lambda values: values | {"clip_qkv": None},
}
OTHER = {
    "rope_theta": {"rope_theta": 5e5},
    "scaled positions": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "experts a token": {"num_experts_per_tok": 1},
    "normalised weights": {"norm_topk_prob": False},
    "the epsilon of norms": {"rms_norm_eps": 1e-6},
    "clipping": {"clip_qkv": 8},
    "another family": {"model_type": "mixtral", "num_local_experts": 4},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("base") / "model", OLMOE)


@pytest.fixture
def base(plain, tmp_path):
    return pathlib.Path(shutil.copytree(plain, tmp_path / "base"))


@pytest.mark.parametrize("what", SAME)
def test_another_layout_is_the_same_base(base, what):
    before = fingerprint(base)
    changed = SAME[what](values_of(base))
    (base / "config.json").write_text(json.dumps(changed, indent=4))
    assert changed != OLMOE and fingerprint(base) == before


@pytest.mark.parametrize("what", OTHER)
def test_another_meaning_is_another_base(base, what):
    before = fingerprint(base)
    change_config(base, **OTHER[what])
    assert fingerprint(base) != before


def test_another_weight_is_another_base(base):
    before = fingerprint(base)
    tensors = load_file(base / WEIGHTS)
    tensors["model.norm.weight"] = -tensors["model.norm.weight"]
    save_file(tensors, base / WEIGHTS)
    assert fingerprint(base) != before


def test_a_tie_flag_counts_as_the_weights_have_it(base):
    """A head of its own in the file: the flag says nothing then."""
    before = fingerprint(base)
    change_config(base, tie_word_embeddings=True)
    assert fingerprint(base) == before


def test_numbers_of_other_libraries_are_the_same(base):
    config = read_model_config(base)
    attention = config.segments[0].unit[0].attention
    scale = np.nextafter(attention.scale, 1)
    assert scale != attention.scale
    assert hf_files._meaning(scale) == hf_files._meaning(attention.scale)
    assert hf_files._meaning(8.0) == 8 and hf_files._meaning((True, None, "x")) == [True, None, "x"]


def test_older_fingerprints_stay_as_they_were():
    directory = BUNDLED / "tiny_moe"
    older = "cc431043df7dc31999154795b939929426afe971c76bef16faaefe54796157be"
    assert legacy_fingerprint(directory) == older != fingerprint(directory)


def test_runs_of_both_kinds_know_their_base(base):
    old, new = legacy_fingerprint(base), fingerprint(base)
    assert same_base({"base_fingerprint": old}, base)
    assert same_base({"base_fingerprint": new}, base)
    assert same_base({"base_fingerprint": new, "resolved": {}}, base)
    assert not same_base({"base_fingerprint": old, "resolved": {}}, base)
    assert not same_base({"base_fingerprint": "0" * 64}, base)
