"""Thousands of seeded mutations: each input is taken or refused by a UserError, nothing else."""

import json
import random
import struct

import pytest
import tokenizers
import transformers

from drlora_jax.config import (
    AllocationSection,
    TrainConfig,
    all_fields,
    apply_overrides,
    from_dict,
    to_dict,
)
from drlora_jax.data.layouts import read_row, read_text
from drlora_jax.data.segments import BadRow
from drlora_jax.data.sources import read_rows
from drlora_jax.data.templates import Style, write, write_prompt
from drlora_jax.errors import UserError
from drlora_jax.interop.hf_files import read_config_json, read_headers
from drlora_jax.interop.hf_read import match_keys
from drlora_jax.models.families import FAMILIES, parse_config
from drlora_jax.models.options import DecoderOptions
from drlora_jax.models.transformer import Decoder, abstract_params
from tests.support.tiny import MIXTRAL, OLMOE, write_tiny_model

ODD_TEXTS = (
    *("", " ", "0", "-1", "1e999", "-inf", "nan", "none", "true", "0x10", "1_0", "1.5", "9" * 5000),
    *(
        "9" * 25,
        "a" * 5000,
        "..",
        "../..",
        "/",
        "a\nb",
        "\x1b[2J",
        "\0",
        "\udcff",
        "[]",
        "(,)",
        "{}",
    ),
    *("$(id)", "'; rm", "%s%n", "é", "\u202e", "٣", "+1", "1 2", "True", "None"),
)
ODD_VALUES = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, 10**400, 0.5, -0.0, 1e-320, 1e308),
    *(float("nan"), float("inf"), "", "a", "1", "\0", "../x", [], [1], ["a"], [[]], {}, {"a": 1}),
    *({"rope_type": "linear"}, {"rope_type": "llama3", "factor": 0}, {"type": []}, [None]),
)


def _is_taken(function) -> bool:
    try:
        function()
    except (UserError, BadRow) as error:
        assert str(error) and len(str(error)) < 20_000
        return False
    return True


def _kinds_with(name: str) -> list[list[str]]:
    """Overrides that choose a policy which has a field, for each policy."""
    section, field = name.split(".")
    owners = AllocationSection.owners(field) if section == "allocation" else []
    return [[f"allocation.kind={owner}"] for owner in owners] or [[]]


def test_every_field_with_every_odd_text():
    taken = sum(
        _is_taken(lambda: apply_overrides(TrainConfig(), [f"{name}={text}", *kind]))  # noqa: B023
        for name, _, _ in all_fields()
        for kind in _kinds_with(name)
        for text in ODD_TEXTS
    )
    assert 0 < taken < len(all_fields()) * len(ODD_TEXTS) / 2


@pytest.mark.parametrize("seed", range(3))
def test_every_misspelt_field_names_a_near_one(seed):
    draw = random.Random(seed)
    known = {name for name, _, _ in all_fields()}
    for name in known:
        section, field = name.split(".")
        place = draw.randrange(len(field))
        swapped = field[:place] + draw.choice("qxz_") + field[place + 1 :]
        typo = draw.choice([field[:place] + field[place + 1 :], swapped, field + "s"])
        if f"{section}.{typo}" not in known and len(typo) > 2:
            with pytest.raises(UserError, match="Unknown config field .*did you mean"):
                apply_overrides(TrainConfig(), [f"{section}.{typo}=1"])


def test_stored_configs_with_odd_values():
    values = to_dict(TrainConfig())
    for section, fields in values.items():
        for odd in ODD_VALUES:
            _is_taken(lambda: from_dict(values | {section: odd}))  # noqa: B023
            for name in fields:
                changed = values | {section: fields | {name: odd}}
                _is_taken(lambda: from_dict(changed))  # noqa: B023


@pytest.mark.parametrize("values", [OLMOE, MIXTRAL], ids=lambda values: values["model_type"])
def test_every_value_of_a_model_config(values):
    names = [*values, "head_dim", "rope_scaling", "rope_parameters", "rope_theta", "clip_qkv"]
    names += ["quantization_config", "hidden_act", "sliding_window", "tie_word_embeddings"]
    names += ["rms_norm_eps", "attention_bias", "num_local_experts", "torch_dtype", "auto_map"]
    for family in FAMILIES:
        for name in names:
            for odd in ODD_VALUES:
                changed = values | {"model_type": family} | {name: odd}
                _is_taken(lambda: parse_config(changed))  # noqa: B023


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("fuzz") / "model")


@pytest.mark.parametrize("seed", range(12))
def test_a_model_config_with_other_sizes_does_not_fit_its_weights(model, seed):
    draw = random.Random(seed)
    names = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_experts", "vocab_size"]
    name = draw.choice([*names, "num_attention_heads", "num_key_value_heads", "head_dim"])
    size = draw.choice([1, 2, 3, 6, 48, 10**4, 2**20, 2**24])
    values = OLMOE | {name: size}

    def check():
        config = parse_config(values)
        match_keys(config, read_headers(model), abstract_params(Decoder(config, DecoderOptions())))

    assert _is_taken(check) == _is_same(values)


def _is_same(values) -> bool:
    """Whether the changed value is the one that the weights were made with."""
    try:
        return parse_config(values) == parse_config(OLMOE)
    except UserError:
        return False


@pytest.mark.parametrize("seed", range(4))
def test_headers_of_weight_files(model, tmp_path, seed):
    draw, file = random.Random(seed), tmp_path / "model.safetensors"
    content = (model / "model.safetensors").read_bytes()
    taken = 0
    for _ in range(120):
        file.write_bytes(_mutated(content, draw))
        taken += _is_taken(lambda: read_headers(tmp_path))
    assert taken < 100


def _mutated(content: bytes, draw: random.Random) -> bytes:
    """One change to the header's length, its bytes, or its JSON."""
    size = struct.unpack("<Q", content[:8])[0]
    header, data = content[8 : 8 + size], content[8 + size :]
    how = draw.randrange(5)
    if how == 0:
        return (
            struct.pack("<Q", draw.choice([0, 1, size - 1, size + 1, 2**32, 2**63])) + content[8:]
        )
    if how == 1:
        place = draw.randrange(size)
        header = header[:place] + bytes([draw.randrange(256)]) + header[place + 1 :]
    elif how == 2:
        values = json.loads(header)
        tensor = values[draw.choice([name for name in values if name != "__metadata__"])]
        tensor[draw.choice(list(tensor))] = draw.choice(ODD_VALUES)
        header = json.dumps(values).encode()
    elif how == 3:
        values = json.loads(header)
        name = draw.choice(list(values))
        values[draw.choice(["", "a/../b", "x" * 5000, "\x1b"])] = values.pop(name)
        header = json.dumps(values).encode()
    else:
        return content[: draw.randrange(len(content))]
    return struct.pack("<Q", len(header)) + header + data


@pytest.mark.parametrize("seed", range(3))
def test_bytes_of_json_files(tmp_path, seed):
    draw = random.Random(seed)
    config = json.dumps(OLMOE).encode()
    line = b'{"prompt": "a \\u00e9", "response": "b", "n": [1, {"x": null}]}\n'
    for _ in range(200):
        for name, content in (("config.json", config), ("x.jsonl", line), ("x.json", b"[" + line)):
            changed = bytearray(content)
            for _ in range(draw.randrange(1, 4)):
                changed[draw.randrange(len(changed))] = draw.choice(b'\0\xff\xc3{}[]",:\\ \n9eN-')
            (tmp_path / name).write_bytes(bytes(changed))
        _is_taken(lambda: parse_config(read_config_json(tmp_path)))
        _is_taken(lambda: list(read_rows(str(tmp_path / "x.jsonl"))))
        _is_taken(lambda: list(read_rows(str(tmp_path / "x.json"))))


ROW_FIELDS = (
    *("prompt", "response", "completion", "instruction", "input", "output", "text", "messages"),
    *("conversations", "system", "history", "tools"),
)
TURN_KEYS = (
    *("role", "content", "from", "value", "weight", "train", "tool_calls", "function_call", "name"),
    *("reasoning_content", "tool_call_id"),
)
DEEP = json.loads("[" * 400 + "]" * 400)


@pytest.fixture(scope="module")
def tokenizer():
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0}, unk_token="</s>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token="</s>",
        chat_template="{{ tools }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{{ m.tool_calls }}{{ m.reasoning_content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
    )


@pytest.mark.parametrize("template", ["chatml", "tokenizer", "alpaca"])
@pytest.mark.parametrize("row_format", ["prompt_response", "alpaca", "chat", "text"])
def test_rows_of_odd_values(row_format, template, tokenizer):
    def use(row):
        if row_format == "text":
            return read_text(row)
        asked = read_row(row, row_format, needs_answer=False)
        write_prompt(asked, Style(template), tokenizer)
        return write(read_row(row, row_format), Style(template), tokenizer)

    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    good = {name: "a" for name in ROW_FIELDS[:7]} | {"messages": [user, answer]}
    odd_values = (*ODD_VALUES, DEEP, "\ud800", "\ufdd0", "<|im_end|>", "</s>", "a" * 10_000)
    odd_values += ('[{"role": 1}]', {"role": ["user"], "content": 3}, [[1, 2]], [{"name": "f"}])
    rows = [good | {name: odd} for name in ROW_FIELDS for odd in odd_values]
    if row_format == "chat":
        odds = [{key: odd} for key in TURN_KEYS for odd in odd_values]
        rows += [{"messages": [user, answer | odd]} for odd in odds]
        rows += [{"messages": [user | odd, answer]} for odd in odds]
    taken = [_is_taken(lambda: use(row)) for row in rows]  # noqa: B023
    assert any(taken) or (row_format, template) == ("chat", "alpaca")
