"""What is wrong in the files of an export is found without torch."""

import json
import pathlib
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from drlora_jax.data.tokenize import load_tokenizer
from drlora_jax.errors import RunError
from drlora_jax.interop.exported_files import check_adapter, check_merged, text_ids
from drlora_jax.interop.hf_write import rewrite_model
from tests.support.exports import export


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    for family, router in (("olmoe", True), ("llama", False)):
        (folder / family).mkdir()
        export(folder / family, family, ("gate", "down", "q"), has_router=router)
    return folder


def edit(file: pathlib.Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(file: pathlib.Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize("family", ["olmoe", "llama"])
@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_good_exports(folder, tmp_path, family, dtype):
    base = folder / family / "base"
    ids = text_ids(load_tokenizer(base))
    check_merged(base, folder / family / "merged", ids, None)
    rewrite_model(base, tmp_path, (), lambda key, value: value, dtype=dtype)
    check_merged(base, tmp_path, ids, dtype)
    for layout in ("peft", "peft-2d"):
        check_adapter(folder / family / layout)


def drop(tensors: dict) -> None:
    del tensors["model.layers.1.self_attn.q_proj.weight"]


def halve(tensors: dict) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype("float16")


def add_head_shape(tensors: dict) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]


def lower_case(target: pathlib.Path) -> None:
    edit(target / "tokenizer.json", normalizer={"type": "Lowercase"})


MERGED = [
    (lambda t: edit_tensors(t / "model.safetensors", drop), "q_proj.weight as None"),
    (lambda t: edit_tensors(t / "model.safetensors", halve), "norm.weight as .'F16'"),
    (lambda t: edit_tensors(t / "model.safetensors", add_head_shape), r"4095, 24.*4096, 24"),
    (lambda t: edit(t / "config.json", num_experts_per_tok=1), "does not describe the base"),
    (lambda t: edit(t / "config.json", tie_word_embeddings=True), "does not match its tensors"),
    (lower_case, "does not give the token ids"),
]


@pytest.mark.parametrize(("break_it", "message"), MERGED, ids=[m for _, m in MERGED])
def test_wrong_merged_directories(folder, tmp_path, break_it, message):
    base = folder / "olmoe" / "base"
    shutil.copytree(folder / "olmoe" / "merged", tmp_path / "out")
    break_it(tmp_path / "out")
    with pytest.raises(RunError, match=message):
        check_merged(base, tmp_path / "out", text_ids(load_tokenizer(base)), None)


def cut(tensors: dict) -> None:
    key = next(key for key in tensors if "q_proj.lora_A" in key)
    tensors[key] = tensors[key][:-1]


def alone(tensors: dict) -> None:
    del tensors[next(key for key in tensors if "q_proj.lora_B" in key)]


ADAPTERS = [
    (lambda t: edit_tensors(t / "adapter_model.safetensors", cut), "rows are not of rank"),
    (lambda t: edit_tensors(t / "adapter_model.safetensors", alone), "has no partner, or"),
    (lambda t: edit(t / "adapter_config.json", target_modules=["q_proj", "w"]), "names w, which"),
    (lambda t: edit(t / "adapter_config.json", modules_to_save=["proj"]), "names proj, which"),
    (
        lambda t: edit(t / "adapter_config.json", target_parameters=["mlp.other.down_proj"]),
        "names mlp.other.down_proj",
    ),
]


@pytest.mark.parametrize(("break_it", "message"), ADAPTERS, ids=[m for _, m in ADAPTERS])
def test_wrong_adapters(folder, tmp_path, break_it, message):
    shutil.copytree(folder / "olmoe" / "peft", tmp_path / "out")
    break_it(tmp_path / "out")
    with pytest.raises(RunError, match=message):
        check_adapter(tmp_path / "out")
