"""What is said about tensors whose names a wrapper changed; the names are those that it makes."""

import re

import pytest
from safetensors.numpy import load_file, save_file

from drlora_jax import cli, inspect
from drlora_jax.errors import UserError
from drlora_jax.interop.name_hints import explain_names
from tests.support.model_files import WEIGHTS, check
from tests.support.tiny import OLMOE, write_tiny_model

LLAMA = {key: value for key, value in OLMOE.items() if "expert" not in key} | {
    "model_type": "llama"
}
HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("names") / "model", LLAMA)


def renamed(base, folder, rename):
    """The model with every name changed; None leaves the tensor out."""
    tensors = {rename(name): value for name, value in load_file(base / WEIGHTS).items()}
    tensors.pop(None, None)
    folder.mkdir()
    for file in base.iterdir():
        if file.name != WEIGHTS:
            (folder / file.name).write_bytes(file.read_bytes())
    save_file(tensors, folder / WEIGHTS)
    return folder


WRAPPED = {
    "module.": (lambda name: f"module.{name}", "begin with 'module.': DataParallel or DDP"),
    "compiled": (lambda name: f"_orig_mod.{name}", "begin with '_orig_mod.': torch.compile"),
    "both": (lambda name: f"_orig_mod.module.{name}", "'_orig_mod.'.*contain 'module.'"),
    "peft": (
        lambda name: f"base_model.model.{name}".replace("_proj.", "_proj.base_layer."),
        "begin with 'base_model.model.': PEFT .*save model.merge_and_unload",
    ),
    "base_layer": (
        lambda name: name.replace("q_proj.", "q_proj.base_layer."),
        "contain 'base_layer.': PEFT",
    ),
    "fsdp": (
        lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
        "contain '_fsdp_wrapped_module.': FSDP",
    ),
    "text part": (
        lambda name: f"language_model.{name}",
        "begin with 'language_model.': a model of",
    ),
    "newer text part": (
        lambda name: name.replace("model.", "model.language_model.", 1),
        "contain 'language_model.'",
    ),
    "value head": (
        lambda name: f"pretrained_model.{name}",
        "begin with 'pretrained_model.': a value head of TRL .* save model.pretrained_model, or",
    ),
    "part of another module": (
        lambda name: f"net.{name}",
        "begin with 'net.', probably because the model was saved as a part of another module",
    ),
    "part that is called as ours": (
        lambda name: f"model.{name}",
        "begin with 'model.', probably because the model was saved as a part of another module",
    ),
    "no prefix": (
        lambda name: name.removeprefix("model."),
        "do not begin with 'model.'.*AutoModelForCausalLM",
    ),
    "no prefix, no head": (
        lambda name: None if name == HEAD else name.removeprefix("model."),
        "do not begin with 'model.'.*Only lm_head.weight is missing",
    ),
    "another prefix": (
        lambda name: name.replace("model.", "transformer.", 1),
        "begin with 'transformer.'",
    ),
    "no head": (
        lambda name: None if name == HEAD else name,
        "Only lm_head.weight is missing: set tie_word_embeddings to true",
    ),
}


@pytest.mark.parametrize("what", WRAPPED)
def test_loading_and_looking_say_the_same(base, tmp_path, what, capsys):
    rename, message = WRAPPED[what]
    model = renamed(base, tmp_path / "model", rename)
    with pytest.raises(UserError, match=message) as caught:
        check(model)
    with pytest.raises(SystemExit) as end:
        cli.run_and_exit(lambda: inspect.main([str(model)]))
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {caught.value}\n"


def test_a_tensor_that_is_missing_has_no_wrapper(base, tmp_path):
    norm = "model.norm.weight"
    model = renamed(base, tmp_path / "model", lambda name: None if name == norm else name)
    with pytest.raises(UserError, match=r"lack model\.norm\.weight \(llama, layout experts\)\.$"):
        check(model)


def test_files_that_were_not_read_are_named(base, tmp_path):
    norm = "model.norm.weight"
    model = renamed(base, tmp_path / "model", lambda name: None if name == norm else name)
    save_file({norm: load_file(base / WEIGHTS)[norm]}, model / "rest.safetensors")
    with pytest.raises(UserError, match="Only model.safetensors was read; rest.safetensors"):
        check(model)


def test_names_of_another_model_are_not_explained():
    names = [f"model.layers.{i}.x" for i in range(9)] + ["model.embed_tokens.weight"]
    assert explain_names(names, [f"blk.{i}.ffn" for i in range(9)]) == ""
    assert explain_names(names, []) == ""


def test_a_good_model_is_described(base, capsys):
    assert inspect.main([str(base)]) == 0
    assert re.search(r"weights +\d+ tensors of F32 in 1 file", capsys.readouterr().out)
    (base / WEIGHTS).rename(base / "kept")
    try:
        assert inspect.main([str(base)]) == 0
        assert "weights     none here" in capsys.readouterr().out
    finally:
        (base / "kept").rename(base / WEIGHTS)
