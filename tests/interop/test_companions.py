"""Files beside exported weights: the known ones, true to the weights, and the others by name."""

import json
import pathlib
import stat

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from drlora_jax.errors import RunError, UserError
from drlora_jax.interop.companions import set_tokenizer, write_companions
from drlora_jax.interop.hf_write import rewrite_model
from tests.street.made import directory
from tests.support.exports import rewrite
from tests.support.tiny import OLMOE, write_tiny_model

END, OTHER_END, UNKNOWN = 0, 550, 7
TEMPLATES = {"default": "{{ messages }}", "tool_use": "tools {{ tools }}"}
# What directories of models hold besides the model.
FOREIGN = [
    "README.md",
    "adapter_config.json",
    "all_results.json",
    "consolidated.json",
    "modeling_own.py",
    "optimizer_args.json",
    "params.json",
    "preprocessor_config.json",
    "pytorch_model.bin.index.json",
    "quantize_config.json",
    "special_tokens_map_x.json",
    "tokenizer.json.bak",
    "tokenizer_checklist.chk",
    "trainer_state.json",
    "._config.json",
    "._tokenizer.json",
    ".gitattributes",
]
FOREIGN_WEIGHTS = ["adapter_model.bin", "optimizer.pt", "pytorch_model.bin", "training_args.bin"]


@pytest.fixture
def base(tmp_path):
    return write_tiny_model(tmp_path / "base")


def edit(file: pathlib.Path, **changes) -> None:
    """Values of a JSON file; `...` removes one."""
    values = (json.loads(file.read_text()) if file.is_file() else {}) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def read(directory: pathlib.Path, name="config.json") -> dict:
    return json.loads((directory / name).read_text())


def names(directory: pathlib.Path) -> set[str]:
    files = (file for file in directory.rglob("*") if file.is_file())
    return {file.relative_to(directory).as_posix() for file in files}


OWN = {"config.json", "generation_config.json", "model.safetensors"}
OWN |= {"tokenizer.json", "tokenizer_config.json"}


# ---------------------------------------------------------------------------------------------
# which files


def test_foreign_files_stay_behind_and_are_named(base):
    for name in [*FOREIGN, *FOREIGN_WEIGHTS]:
        (base / name).write_text("{}")
    for folder in ("checkpoint-10", "onnx", ".git"):
        (base / folder).mkdir()
        (base / folder / "config.json").write_text("{}")
    target, notes = rewrite(base)
    assert names(target) == OWN
    (line,) = [note for note in notes if note.startswith("left out: ")]
    listed = line.removeprefix("left out: ").split(" and ")[0].split(", ")
    every = sorted([*FOREIGN, "checkpoint-10/", "onnx/", ".git/"], key=lambda n: n.rstrip("/"))
    assert listed == every[:12] and f"and {len(every) - 12} more" in line
    assert not any(name in line for name in FOREIGN_WEIGHTS)


def test_all_left_out_are_named_where_they_are_few(base):
    for name in ("trainer_state.json", "README.md", "._config.json"):
        (base / name).write_text("{}")
    _, notes = rewrite(base)
    assert notes == [
        "left out: ._config.json, README.md, trainer_state.json (not part of the model)"
    ]


KNOWN = ["special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt"]
KNOWN += ["tokenizer.model", "tokenizer.model.v3", "spiece.model", "sentencepiece.bpe.model"]
KNOWN += ["tiktoken.model", "tekken.json", "chat_template.jinja", "chat_template.json"]
KNOWN += ["LICENSE", "LICENSE.txt", "LICENCE.md", "license-apache.md", "NOTICE", "Notice.txt"]
KNOWN += ["USE_POLICY.md", "additional_chat_templates/tool_use.jinja"]


def test_known_files_are_copied_byte_for_byte(base):
    (base / "additional_chat_templates").mkdir()
    for number, name in enumerate(KNOWN):
        (base / name).write_bytes(bytes(range(number, 250)))
    target, notes = rewrite(base)
    assert notes == [] and names(target) == OWN | set(KNOWN)
    for name in (*KNOWN, "tokenizer.json", "tokenizer_config.json"):
        assert (target / name).read_bytes() == (base / name).read_bytes()


def test_named_chat_templates_are_kept(base):
    edit(base / "tokenizer_config.json", chat_template=...)
    (base / "chat_template.jinja").write_text(TEMPLATES["default"])
    folder = base / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text(TEMPLATES["tool_use"])
    for junk in ("._tool_use.jinja", "notes.txt"):
        (folder / junk).write_text("x")
    target, notes = rewrite(base)
    assert "additional_chat_templates/notes.txt" in notes[-1]
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    assert tokenizer.chat_template == TEMPLATES


def test_links_and_read_only_files_become_plain_files(base, tmp_path):
    """As the hub's cache holds them."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for file in list(base.iterdir()):
        file.rename(blobs / file.name)
        (blobs / file.name).chmod(0o444)
        file.symlink_to(blobs / file.name)
    target, _ = rewrite(base)
    assert names(target) == OWN
    for file in target.iterdir():
        assert not file.is_symlink() and file.stat().st_mode & stat.S_IWUSR


def test_a_folder_with_the_name_of_a_file_is_left_out(base):
    (base / "chat_template.jinja").mkdir()
    target, notes = rewrite(base)
    assert names(target) == OWN and "chat_template.jinja/" in notes[0]


# ---------------------------------------------------------------------------------------------
# config.json


@pytest.mark.parametrize(
    ("stored", "dtype", "expected"),
    [
        ({"dtype": "float32"}, None, "float32"),
        ({"torch_dtype": "float32"}, None, "float32"),
        ({"dtype": "float32"}, "bfloat16", "bfloat16"),
        ({"torch_dtype": "float32"}, "bfloat16", "bfloat16"),
        ({"dtype": "float32", "torch_dtype": "float16"}, "float16", "float16"),
        ({}, "bfloat16", "bfloat16"),
        ({}, None, None),
    ],
)
def test_both_names_of_the_dtype_agree(base, stored, dtype, expected):
    edit(base / "config.json", **({"dtype": ..., "torch_dtype": ...} | stored))
    target, notes = rewrite(base, dtype=dtype)
    values = read(target)
    assert notes == [] and values.get("dtype") == values.get("torch_dtype") == expected
    kinds = {str(value.dtype) for value in load_file(target / "model.safetensors").values()}
    assert kinds == {expected or "float32"}
    loaded = transformers.AutoConfig.from_pretrained(target)
    assert str(loaded.dtype).removeprefix("torch.") == str(expected)


def test_a_nested_config_follows(base):
    nested = {"dtype": "float32", "tie_word_embeddings": True, "hidden_size": 24}
    edit(base / "config.json", text_config=nested)
    target, _ = rewrite(base, dtype="bfloat16")
    expected = {"dtype": "bfloat16", "torch_dtype": "bfloat16", "tie_word_embeddings": False}
    assert read(target)["text_config"] == nested | expected


def test_nothing_else_of_the_config_changes(base):
    edit(base / "config.json", rope_theta=1e4, own_field={"a": [1, "ü"]}, torch_dtype="float32")
    target, notes = rewrite(base)
    assert notes == [] and read(target) == read(base)
    assert list(read(target)) == list(read(base))


@pytest.mark.parametrize("written", [True, False, ...])
def test_an_own_head_is_not_tied(base, written):
    edit(base / "config.json", tie_word_embeddings=written)
    target, notes = rewrite(base)
    said = ["config.json: tie_word_embeddings=false, because the model has its own output head "]
    assert [note.split("(")[0] for note in notes] == (said if written is True else [])
    assert read(target).get("tie_word_embeddings", False) is False
    assert "lm_head.weight" in load_file(target / "model.safetensors")


def test_no_head_is_tied(tmp_path):
    base = write_tiny_model(tmp_path / "base", OLMOE | {"tie_word_embeddings": True})
    target, notes = rewrite(base)
    assert notes == [] and read(target)["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(target / "model.safetensors")


def test_code_that_is_not_exported_is_not_named(base):
    edit(base / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"})
    target, notes = rewrite(base)
    assert "auto_map" not in read(target) and "auto_map is left out" in notes[0]


# ---------------------------------------------------------------------------------------------
# end tokens


@pytest.mark.parametrize(
    ("stored", "ends", "expected"),
    [
        (END, (END,), END),
        (END, (), END),
        (UNKNOWN, (END,), [UNKNOWN, END]),
        (END, (END, OTHER_END), [END, OTHER_END]),
        ([END, UNKNOWN], (END, OTHER_END), [END, UNKNOWN, OTHER_END]),
        ([UNKNOWN], (UNKNOWN,), [UNKNOWN]),
        (None, (END,), END),
        (None, (END, OTHER_END), [END, OTHER_END]),
        (..., (END,), END),
        (END, (np.int32(OTHER_END), OTHER_END), [END, OTHER_END]),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_end_tokens_are_complete(base, name, stored, ends, expected):
    edit(base / "generation_config.json", eos_token_id=END, temperature=0.6, do_sample=True)
    edit(base / name, eos_token_id=stored)
    target, notes = rewrite(base, end_token_ids=ends)
    assert read(target, name)["eos_token_id"] == expected
    assert read(target, name).keys() - {"torch_dtype"} == read(base, name).keys() | {"eos_token_id"}
    is_changed = expected != stored
    assert any(note.startswith(f"{name}: eos_token_id=") for note in notes) == is_changed
    if name == "generation_config.json" and not is_changed:
        assert (target / name).read_bytes() == (base / name).read_bytes()
    generation = transformers.GenerationConfig.from_pretrained(target)
    assert generation.temperature == 0.6
    if name == "generation_config.json":
        assert generation.eos_token_id == expected


def test_a_missing_generation_config_is_written(base):
    edit(base / "config.json", bos_token_id=None, eos_token_id=UNKNOWN, temperature=0.7)
    target, notes = rewrite(base, end_token_ids=(END, OTHER_END))
    expected = {"eos_token_id": [UNKNOWN, END, OTHER_END], "pad_token_id": 1, "temperature": 0.7}
    assert read(target, "generation_config.json") == expected
    assert len(notes) == 1 and notes[0].startswith("config.json: eos_token_id=")
    generation = transformers.GenerationConfig.from_pretrained(target)
    assert generation.eos_token_id == expected["eos_token_id"] and generation.pad_token_id == 1


def test_a_generation_config_that_transformers_would_not_save_is_kept(base):
    strange = {"do_sample": False, "temperature": 0.2, "eos_token_id": END, "own": "value"}
    edit(base / "generation_config.json", **strange)
    target, _ = rewrite(base, end_token_ids=(END, OTHER_END))
    expected = strange | {"eos_token_id": [END, OTHER_END]}
    assert read(target, "generation_config.json") == expected


def test_a_damaged_generation_config_is_refused_before_weights_are_written(base):
    (base / "generation_config.json").write_text('{"eos_token_id": ')
    (base.parent / "out").mkdir()
    with pytest.raises(UserError, match="generation_config.json is not JSON"):
        rewrite_model(base, base.parent / "out", (), lambda key, value: value)
    assert not (base.parent / "out" / "model.safetensors").exists()


# ---------------------------------------------------------------------------------------------
# the weights' files


def split(base: pathlib.Path, files: list[str], *, index: bool) -> None:
    """The base's tensors in several files."""
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    keys, weight_map = list(tensors), {}
    for number, name in enumerate(files):
        part = {key: tensors[key] for key in keys[number :: len(files)]}
        save_file(part, base / name)
        weight_map |= dict.fromkeys(part, name)
    if index:
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (base / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize(
    ("files", "index", "expected"),
    [
        (["model.safetensors"], False, ["model.safetensors"]),
        (["weights.safetensors"], False, ["weights.safetensors"]),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], True, None),
        (["a.safetensors", "b.safetensors"], False, None),
        (
            ["model.safetensors", "more.safetensors"],
            True,
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ),
    ],
)
def test_weights_have_names_that_transformers_finds(base, files, index, expected):
    """model.safetensors alone, or files that an index names and no model.safetensors."""
    before = load_file(base / "model.safetensors")
    split(base, files, index=index)
    target, _ = rewrite(base)
    found = sorted(file.name for file in target.glob("*.safetensors"))
    assert found == (expected or files)
    after = {k: v for name in found for k, v in load_file(target / name).items()}
    assert {k: v.tobytes() for k, v in before.items()} == {k: v.tobytes() for k, v in after.items()}
    if found != ["model.safetensors"]:
        weight_map = read(target, "model.safetensors.index.json")["weight_map"]
        assert {n: sorted(load_file(target / n)) for n in found} == {
            n: sorted(key for key, name in weight_map.items() if name == n) for n in found
        }


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        ("float16", 7e4, r"lm_head.weight has a value of 7e\+04, but float16 ends at 6.55e\+04"),
        ("bfloat16", 3.4e38, r"lm_head.weight has a value of 3.4e\+38, but bfloat16 ends at"),
    ],
)
def test_a_value_that_a_dtype_cannot_hold_is_named(base, dtype, value, message):
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"][3, 5] = -value
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(RunError, match=message):
        rewrite(base, dtype=dtype)
    target, _ = rewrite(base, "same")
    assert load_file(target / "model.safetensors")["lm_head.weight"][3, 5] == np.float32(-value)


def test_the_tokenizer_of_the_training_is_written(tmp_path):
    """Where the base has another chat template or end token by now, the run's own are exported."""
    base = directory(tmp_path, "smollm2", "new {{ messages[0].content }}")
    (base / "chat_template.jinja").write_text("newer")
    (base / "config.json").write_text("{}")
    target = tmp_path / "out"
    target.mkdir()
    write_companions(base, target, has_head=True)
    old = {"chat_template": "old {{ messages[0].content }}", "eos_token": "<|im_end|>"}
    set_tokenizer(target, old)
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    asked = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(asked, tokenize=False) == "old Hi"
    assert tokenizer.eos_token == "<|im_end|>"
    named = {"default": "one", "tool_use": "two"}
    set_tokenizer(target, {"chat_template": named})
    assert transformers.AutoTokenizer.from_pretrained(target).chat_template == named
    set_tokenizer(target, {"chat_template": None})
    assert transformers.AutoTokenizer.from_pretrained(target).chat_template is None
