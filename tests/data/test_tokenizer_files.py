"""Loading tokenizers of model directories, the tokens that end answers, and their identity."""

import importlib.machinery
import json
import pathlib
import sys
import types

import pytest
import transformers
from tokenizers import Tokenizer

from drlora_jax.data.tokenizer_files import end_token_ids, load_tokenizer
from drlora_jax.data.tokenizer_identity import added_since, tokenizer_identity
from drlora_jax.errors import UserError
from tests.street.made import directory, tokenizer_json

BUNDLED = pathlib.Path(__file__).parents[2] / "drlora_jax" / "bundled"
CHAT = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"


def _change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def _lower_case(folder):
    """No class brings this normalizer, so the file is loaded without one."""
    _change(folder / "tokenizer.json", normalizer={"type": "Lowercase"})


def test_files_that_are_missing_or_broken_are_named(tmp_path):
    with pytest.raises(UserError, match="has no tokenizer: none of tokenizer.json"):
        load_tokenizer(tmp_path)
    folder = directory(tmp_path, "llama2")
    assert load_tokenizer(folder).eos_token == "</s>"
    (folder / "special_tokens_map.json").write_text("{")
    with pytest.raises(UserError, match="special_tokens_map.json is not JSON"):
        load_tokenizer(folder)
    (folder / "special_tokens_map.json").unlink()
    (folder / "tokenizer.json").write_text(tokenizer_json("llama2")[:2000])
    with pytest.raises(UserError, match="llama2/tokenizer.json does not load: .*; copy it again"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "merges.txt", "additional_chat_templates/a.jinja"]
)
def test_pointers_of_git_lfs_are_named(tmp_path, name):
    folder = directory(tmp_path, "gpt2")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n")
    with pytest.raises(UserError, match=f"{name} is a git-lfs pointer, .*git lfs pull"):
        load_tokenizer(folder)


class Panic(BaseException):
    """As the Rust code of `tokenizers` ends: no Exception."""


@pytest.mark.parametrize("place", ["load", "first text"])
def test_a_class_that_fails_gives_way_to_the_file(tmp_path, monkeypatch, place):
    folder = directory(tmp_path, "gpt2")
    found = transformers.AutoTokenizer.from_pretrained(str(folder))

    def fail(*args, **options):
        raise Panic("called `Option::unwrap()` on a `None` value")

    if place == "first text":
        monkeypatch.setattr(type(found), "__call__", fail)
    by_class = fail if place == "load" else lambda *args, **options: found
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", by_class)
    loaded = load_tokenizer(folder)
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert loaded("Tom has").input_ids == own.encode("Tom has").ids
    assert loaded.eos_token == "<|endoftext|>"

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "from_pretrained", fail)
    with pytest.raises(UserError, match=f"tokenizer of {folder} does not load: Panic: called"):
        load_tokenizer(folder)


def test_interrupts_are_no_broken_files(tmp_path, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", stop)
    with pytest.raises(KeyboardInterrupt):
        load_tokenizer(directory(tmp_path, "gpt2"))


@pytest.mark.parametrize("place", ["settings", "file", "folder", "list"])
@pytest.mark.parametrize("kind", ["gpt2", "unigram"])
def test_what_stands_beside_the_file_is_kept(tmp_path, kind, place):
    """Without a class as with one: templates wherever they are, ends, sides, limits."""
    folder = directory(tmp_path, kind, padding_side="left", model_max_length=77)
    settings = folder / "tokenizer_config.json"
    if place == "settings":
        _change(settings, chat_template=CHAT)
    if place == "list":
        named = [{"name": "default", "template": CHAT}, {"name": "tool_use", "template": "T"}]
        _change(settings, chat_template=named)
    if place in ("file", "folder"):
        (folder / "chat_template.jinja").write_text(CHAT)
    if place == "folder":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    _change(settings, tokenizer_class="Qwen2Tokenizer", additional_special_tokens=["<|user|>"])
    _lower_case(folder)
    loaded = load_tokenizer(folder)
    assert type(loaded) is transformers.PreTrainedTokenizerFast
    assert loaded("TOM").input_ids == loaded("tom").input_ids
    templates = loaded.chat_template
    assert templates == CHAT if isinstance(templates, str) else templates["tool_use"] == "T"
    assert isinstance(templates, str) == (place in ("settings", "file"))
    messages = [{"role": "user", "content": "a"}]
    assert loaded.apply_chat_template(messages, tokenize=False) == "<|user|>a"
    assert (loaded.padding_side, loaded.model_max_length) == ("left", 77)
    assert "<|user|>" in loaded.all_special_tokens
    given = json.loads(settings.read_text())
    for name in ("bos_token", "eos_token", "unk_token"):
        assert getattr(loaded, name) == given[name]


def test_ends_that_only_the_class_names_are_kept_where_the_file_has_them(tmp_path):
    folder = directory(tmp_path, "gpt2")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    _lower_case(folder)
    loaded = load_tokenizer(folder)
    assert loaded.eos_token_id == loaded.convert_tokens_to_ids("<|endoftext|>")
    folder = directory(tmp_path, "wordpiece")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    assert load_tokenizer(folder).eos_token is None  # the file has no <|endoftext|>


@pytest.mark.parametrize("kind, starts", [("llama2", True), ("gpt2", False), ("gpt_neox", False)])
@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "GPTNeoXTokenizer"])
@pytest.mark.parametrize("asked", [True, False])
def test_the_file_says_whether_texts_start_with_bos(tmp_path, kind, starts, tokenizer_class, asked):
    folder = directory(tmp_path, kind, tokenizer_class=tokenizer_class, add_bos_token=asked)
    loaded = load_tokenizer(folder)
    assert (loaded("a").input_ids[0] == loaded.bos_token_id) == starts


def test_truncation_and_padding_of_the_file_do_not_count(tmp_path):
    folder = directory(tmp_path, "gpt2")
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    _change(folder / "tokenizer.json", truncation=cut, padding=padding)
    plain = Tokenizer.from_str(tokenizer_json("gpt2"))
    for text in ("a", "Tom has 3 apples and more"):
        assert load_tokenizer(folder)(text).input_ids == plain.encode(text).ids


@pytest.mark.parametrize(
    "package, content",
    [
        ("sentencepiece", b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02"),
        ("tiktoken", b"IQ== 0\nIg== 1\n"),
    ],
)
def test_files_that_need_a_package_say_which(tmp_path, monkeypatch, package, content):
    folder = directory(tmp_path, "llama2", tokenizer_class="LlamaTokenizer")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(content)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"pip install {package}.*, or convert it once"):
        load_tokenizer(folder)


class Processor:
    """As `sentencepiece` has it, over a tokenizer of our own."""

    def __init__(self, file: str):
        self.core = Tokenizer.from_str(tokenizer_json("metaspace_always"))

    def encode(self, text: str) -> list[int]:
        return self.core.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("agrees", ["class", "file", "none"])
def test_a_sentencepiece_model_is_read_as_sentencepiece_reads_it(tmp_path, monkeypatch, agrees):
    right = load_tokenizer(directory(tmp_path / "a", "metaspace_always"))
    wrong = load_tokenizer(directory(tmp_path / "b", "metaspace_never"))
    folder = directory(tmp_path, "metaspace_always")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    module = types.ModuleType("sentencepiece")
    module.__spec__ = importlib.machinery.ModuleSpec("sentencepiece", None)
    module.SentencePieceProcessor = Processor
    monkeypatch.setitem(sys.modules, "sentencepiece", module)
    found = {"AutoTokenizer": right if agrees == "class" else wrong}
    found["PreTrainedTokenizerFast"] = right if agrees == "file" else wrong
    for name, made in found.items():
        given = getattr(transformers, name)
        monkeypatch.setattr(given, "from_pretrained", lambda *args, made=made, **options: made)
    if agrees == "none":
        with pytest.raises(
            UserError, match="'a' becomes .*, but .* by the file.*; update transformers"
        ):
            load_tokenizer(folder)
    else:
        assert load_tokenizer(folder) is right


def _ends(folder, config=None, generation=None):
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps({} if value is None else {"eos_token_id": value}))
    return end_token_ids(load_tokenizer(folder), folder, 1000)


def test_end_tokens_of_all_files(tmp_path):
    folder = directory(tmp_path, "llama2")
    assert end_token_ids(load_tokenizer(folder), folder) == (2,)
    assert _ends(folder) == (2,)
    assert _ends(folder, config=7, generation=[5, 2, 9]) == (2, 5, 9, 7)
    assert _ends(folder, config=[7, 5, -1], generation=5) == (2, 5, 7)
    assert _ends(folder, generation=[999, 1000]) == (2, 999)
    for wrong in ("</s>", [2, "</s>"], True, 2.0):
        with pytest.raises(
            UserError, match="config.json: eos_token_id must be a token id or a list"
        ):
            _ends(folder, config=wrong)


def _differing(folder, before):
    after = tokenizer_identity(load_tokenizer(folder), folder)
    assert all(len(digest) == 64 for digest in after.values())
    return {name for name in before if before[name] != after[name]}


def test_identity_is_of_what_a_tokenizer_means(tmp_path):
    folder = directory(tmp_path, "gpt_neox", chat_template=CHAT)
    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    original = file.read_text()
    first = tokenizer_identity(load_tokenizer(folder), folder)
    assert set(first) == {"vocabulary", "normalizer", "probe", "template", "ends"}
    values = json.loads(original)
    file.write_text(json.dumps(values, indent=1, ensure_ascii=True, sort_keys=True))
    settings.write_text(json.dumps(json.loads(settings.read_text()), indent=7))
    assert _differing(folder, first) == set()
    values["model"]["merges"] = [" ".join(merge) for merge in values["model"]["merges"]]
    file.write_text(json.dumps(values))
    assert _differing(folder, first) == set()
    load_tokenizer(folder).save_pretrained(folder)  # a class writes another post-processor
    assert _differing(folder, first) <= {"normalizer"}
    file.write_text(original)
    settings.unlink()
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    folder = directory(tmp_path, "gpt_neox", chat_template=CHAT)
    _change(settings, chat_template=CHAT + " ")
    assert _differing(folder, first) == {"template"}
    _change(settings, chat_template=CHAT, eos_token="<|padding|>")
    assert _differing(folder, first) == {"ends"}
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 5]}')
    _change(settings, eos_token="<|endoftext|>")
    assert _differing(folder, first) == {"ends"}


def test_identity_of_changed_files(tmp_path):
    folder = directory(tmp_path, "gpt_neox")
    file = folder / "tokenizer.json"
    original = file.read_text()
    first = tokenizer_identity(load_tokenizer(folder), folder)
    values = json.loads(original)
    words = values["model"]["vocab"]
    a, b = words["Ġthe"], words["Ġand"]
    words["Ġthe"], words["Ġand"] = b, a
    file.write_text(json.dumps(values))
    assert "vocabulary" in _differing(folder, first)
    file.write_text(original)
    _lower_case(folder)
    assert _differing(folder, first) == {"normalizer", "probe"}
    file.write_text(original)
    _change(file, post_processor=None)  # which trims spans and does nothing else
    assert _differing(folder, first) == {"normalizer"}
    file.write_text(original)
    _change(folder / "tokenizer_config.json", pad_token="[PAD]")
    assert {"vocabulary", "ends"} <= _differing(folder, first)


def _added(*contents, special=True):
    """Changes tokenizer.json: tokens behind all others."""

    def change(folder):
        file = folder / "tokenizer.json"
        values = json.loads(file.read_text())
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        last = max(Tokenizer.from_file(str(file)).get_vocab().values())
        for index, content in enumerate(contents, start=last + 1):
            token = {"id": index, "content": content, "special": special}
            values["added_tokens"].append(token | flags)
        file.write_text(json.dumps(values))

    return change


def _swapped(folder):
    values = json.loads((folder / "tokenizer.json").read_text())
    words = values["model"]["vocab"]
    words["Ġthe"], words["Ġand"] = words["Ġand"], words["Ġthe"]
    (folder / "tokenizer.json").write_text(json.dumps(values))


def _settings(**changes):
    return lambda folder: _change(folder / "tokenizer_config.json", **changes)


@pytest.mark.parametrize(
    ("changes", "tokens", "ends_are_same"),
    [
        ([_added("[P]")], ["[P]"], True),
        ([_added("[P]", "[Q]"), _settings(pad_token="[Q]")], ["[P]", "[Q]"], True),
        ([_settings(pad_token="[P]")], ["[P]"], True),
        ([_added("[P]"), _settings(pad_token="[P]", eos_token="<|padding|>")], ["[P]"], False),
        ([_added("[P]", special=False)], None, None),
        ([_added("[P]"), _swapped], None, None),
        ([_added("[P]"), _lower_case], None, None),
        ([_added(" has")], None, None),  # which the probe has
        ([_swapped], None, None),
    ],
)
def test_control_tokens_that_came_on_top(tmp_path, changes, tokens, ends_are_same):
    folder = directory(tmp_path, "gpt_neox")
    loaded = load_tokenizer(folder)
    before = tokenizer_identity(loaded, folder)
    for change in changes:
        change(folder)
    found = added_since(load_tokenizer(folder), folder, before)
    if tokens is None:
        assert found is None
        return
    assert list(found.tokens.values()) == tokens and min(found.tokens) == len(loaded)
    assert found.ends_are_same == ends_are_same
    assert found.pad_token == (loaded.pad_token if ends_are_same else None)


def test_identity_of_a_tokenizer_without_a_file(tmp_path, monkeypatch):
    loaded = load_tokenizer(BUNDLED / "tiny_moe")
    first = tokenizer_identity(loaded, tmp_path)
    assert tokenizer_identity(load_tokenizer(BUNDLED / "tiny_moe"), tmp_path) == first
    monkeypatch.setattr(type(loaded), "is_fast", False)
    slow = tokenizer_identity(loaded, tmp_path)
    assert slow["probe"] == first["probe"] and slow["vocabulary"] != first["vocabulary"]
    loaded.add_tokens(["<new>"])
    assert tokenizer_identity(loaded, tmp_path)["vocabulary"] != slow["vocabulary"]
