"""Answers of models and tokenizers as users bring them: where they end, and what their text is.

Expected tokens are those of `transformers.generate` (stored by oracles/make_generations.py),
expected texts those of the tokenizer file's own `decode(prompt + answer)`.
"""

import importlib.util
import json
import random
import shutil

import numpy as np
import pytest
from tokenizers import Tokenizer

from drlora_jax.config import MeshSection
from drlora_jax.data.sources import Row
from drlora_jax.data.tokenize import encode_prompt, end_token_ids, load_tokenizer
from drlora_jax.errors import UserError
from drlora_jax.evaluation import code_tasks
from drlora_jax.evaluation.jobs import make_tools
from drlora_jax.evaluation.records import Settings
from drlora_jax.evaluation.sandbox import Limits, Sandbox
from drlora_jax.inference.answer_text import AnswerText
from drlora_jax.inference.generation import Generator
from drlora_jax.inference.model import load_base
from tests.oracles import generations
from tests.oracles.generations import CASES, NEW_TOKENS, NO_ROW
from tests.street import made
from tests.support.isolation import isolated
from tests.support.tiny import OLMOE, write_tiny_model

ONE = MeshSection(data=1)

# -------------------------------------------------------------------------------------- end tokens


@pytest.fixture(scope="module")
def stored():
    return generations.load()


def load_case(folder, name):
    return load_base(str(generations.write_case(folder, CASES[name])), dtype="float32", mesh=ONE)


def generator_of(loaded, batch_size, programs={}):  # noqa: B006  (kept between calls)
    """Cases of equal end tokens share what is compiled."""
    generator = Generator(loaded, batch_size=batch_size)
    generator._programs = programs.setdefault((loaded.end_token_ids, batch_size), {})
    return generator


@pytest.mark.parametrize(
    ("name", "batch_size"),
    [
        ("generation_config_list", 6),
        ("config_list", 6),
        ("everywhere", 6),
        ("generation_config_number", 1),
        ("config_number", 1),
    ],
)
def test_answers_end_where_those_of_transformers_end(name, batch_size, stored, tmp_path):
    loaded, prompts = load_case(tmp_path, name), stored["prompts"]
    generator = generator_of(loaded, batch_size)
    answers = generator.generate(prompts, max_new_tokens=NEW_TOKENS)
    assert [answer.tokens for answer in answers] == stored["answers"][name]
    for prompt, answer in zip(prompts, answers, strict=True):
        is_ended = answer.tokens[-1] in CASES[name].ends
        assert answer.finish == ("eos" if is_ended else "length")
        visible = answer.tokens[:-1] if is_ended else answer.tokens
        assert answer.text == added_text(loaded.tokenizer.backend_tokenizer, prompt, visible)
    assert min(len(answer.tokens) for answer in answers) <= 5  # some do end early
    [alone] = generator.generate(prompts[:1], max_new_tokens=NEW_TOKENS)
    assert alone == answers[0]


@pytest.mark.parametrize("name", CASES)
def test_every_place_that_names_end_tokens_is_read(name, tmp_path):
    folder = generations.write_case(tmp_path, CASES[name])
    found = end_token_ids(load_tokenizer(folder), folder, 4096)
    assert found == CASES[name].ends and NO_ROW not in found


def test_stored_answers_are_those_of_the_library(stored, tmp_path):
    if importlib.util.find_spec("torch") is None:
        pytest.skip("stored results are compared above")
    from tests.oracles.make_generations import generate

    case = CASES["generation_config_list"]
    found = generate(generations.write_case(tmp_path, case), case, stored["prompts"][:2])
    assert found == stored["answers"]["generation_config_list"][:2]


@pytest.mark.parametrize(
    ("values", "ends"),
    [
        ({}, (0,)),
        ({"eos_token_id": None}, (0,)),
        ({"eos_token_id": []}, (0,)),
        ({"eos_token_id": -1}, (0,)),  # none, as some write it
        ({"eos_token_id": [7, 0, 7, 99]}, (0, 7)),
        ({"eos_token_id": "2"}, "config.json: eos_token_id must be"),
        ({"eos_token_id": [2, True]}, r"got \[2, True\]"),
        ({"eos_token_id": {"a": 1}}, "eos_token_id must be"),
    ],
)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_end_tokens_of_a_file(file, values, ends, tmp_path):
    class tokenizer:
        eos_token_id = 0

    (tmp_path / file).write_text(json.dumps(values))
    if isinstance(ends, str):
        with pytest.raises(UserError, match=ends):
            end_token_ids(tokenizer, tmp_path, 99)
    else:
        assert end_token_ids(tokenizer, tmp_path, 99) == ends


# -------------------------------------------------------------------------------------------- texts

TEXTS = (
    " 3 apples and 12 pears.",
    "    return x + 1\n",
    "Tom has  two, doesn't he?\n\n é 中文 😀 done",
    " do n't , he 's . ! ?",
    "def f(x):\n    y = 1\n    return y\n",
)


def added_text(file: Tokenizer, prompt, new) -> str:
    whole, before = file.decode(list(prompt) + list(new)), file.decode(list(prompt))
    assert whole.startswith(before)
    return whole[len(before) :]


@pytest.mark.parametrize("kind", made.KINDS)
def test_texts_are_those_of_the_tokenizer_file(kind, tmp_path):
    folder = made.directory(tmp_path, kind, clean_up_tokenization_spaces=True)
    tokenizer, file = load_tokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    draw, compared = random.Random(0), 0
    for prompt in TEXTS:
        for answer in TEXTS:
            ids = file.encode(prompt + answer * draw.choice((1, 9)), add_special_tokens=False).ids
            cut = len(file.encode(prompt, add_special_tokens=False).ids)
            compared += check_text(tokenizer, file, ids[:cut], ids[cut:])
    size = file.get_vocab_size()
    for _ in range(30):
        tokens = [draw.randrange(size) for _ in range(200)]
        compared += check_text(tokenizer, file, tokens[:20], tokens[20:])
    assert compared >= 30


def check_text(tokenizer, file: Tokenizer, prompt, new) -> bool:
    """Compares the text, and what is certain on the way; False where the file's own decoding takes
    something of the prompt's text back.
    """
    text, certain = AnswerText(tokenizer, prompt), ""
    for token in new:
        text.add(token)
        assert text.text.startswith(certain)
        certain = text.text[: text.certain]
    if not file.decode(prompt + new).startswith(file.decode(prompt)):
        return False
    assert text.text == added_text(file, prompt, new)
    return True


@pytest.mark.parametrize("kind", ["metaspace_first", "metaspace_always", "llama2", "wordpiece"])
def test_an_answer_behind_special_tokens_alone_is_a_text_of_its_own(kind, tmp_path):
    folder = made.directory(tmp_path, kind)
    tokenizer, file = load_tokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    new = file.encode("two apples", add_special_tokens=False).ids
    for prompt in ([1], [1, 2] * 9):
        text = AnswerText(tokenizer, prompt)
        for token in new:
            text.add(token)
        assert text.text == file.decode(new) == "two apples"


# ------------------------------------------------------------------------- the whole way, scripted


@pytest.fixture(scope="module", params=["metaspace_first", "metaspace_always", "llama2", "gpt2"])
def loaded(request, tmp_path_factory):
    """A tiny random model with such a tokenizer."""
    folder = write_tiny_model(tmp_path_factory.mktemp("model"), OLMOE)
    for file in made.directory(tmp_path_factory.mktemp("made"), request.param).iterdir():
        shutil.copy(file, folder)
    return load_base(str(folder), mesh=ONE)


def script(monkeypatch, loaded, *texts):
    """Lets the model write these texts behind their prompts, and then an end token."""
    file = Tokenizer.from_file(str(loaded.directory / "tokenizer.json"))
    end = loaded.end_token_ids[0]

    def steps(self, indices, prompts, sampling, seed, limit):
        written = []
        for index, prompt in zip(indices, prompts, strict=True):
            bare = [token for token in prompt if token != loaded.tokenizer.bos_token_id]
            ids = file.encode(file.decode(bare) + texts[index], add_special_tokens=False).ids
            assert ids[: len(bare)] == bare  # nothing is glued across the border
            written.append([*ids[len(bare) :], end])
        for step in range(limit):
            rows = [row[min(step, len(row) - 1)] for row in written]
            yield np.array(rows + [end] * (self.batch_size - len(rows)))

    monkeypatch.setattr(Generator, "_steps", steps)


def test_a_streamed_answer_keeps_its_first_blank(loaded, monkeypatch):
    prompts, answers = ["Tom has", "def f(x):\n"], [" 3 apples.", "    y = x\n    return y"]
    script(monkeypatch, loaded, *answers)
    told = {0: "", 1: ""}

    def tell(index, text):
        told[index] += text

    found = Generator(loaded, batch_size=2).generate(
        [encode_prompt(text, loaded.tokenizer) for text in prompts],
        max_new_tokens=100,
        on_text=tell,
    )
    file = Tokenizer.from_file(str(loaded.directory / "tokenizer.json"))
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        own = file.decode(file.encode(prompt + answer, add_special_tokens=False).ids)
        assert prompt + found[index].text == own
        assert told[index] == found[index].text and found[index].finish == "eos"


def test_the_harness_is_given_the_first_blank(loaded, monkeypatch):
    pytest.importorskip("lm_eval")
    from types import SimpleNamespace

    from drlora_jax.evaluation.harness_model import JaxLM

    script(monkeypatch, loaded, " 3 apples.\n\nTom", " 3 apples")
    options = {"until": ["\n\n"], "max_gen_toks": 60}
    asked = [SimpleNamespace(args=("Tom has", options), task_name="t")] * 2
    first, second = JaxLM(loaded).generate_until(asked)
    assert first.startswith(" 3 apples") and second == " 3 apples"


HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def add(x):\n    """Adds one."""\n',
    "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate(2) == 3 and candidate(0) == 0",
}
BODY = "    y = x + 1\n    return y if x > 1 else 0\n"


@isolated
def test_a_program_of_two_lines_passes(loaded, monkeypatch):
    script(monkeypatch, loaded, BODY + "\nprint(add(1))\n", BODY.replace("+ 1", "+ 2"))
    sandbox = Sandbox(Limits(memory_bytes=256 << 20))
    tools = make_tools(loaded, Settings(), sandbox)
    item = code_tasks.humaneval_item(Row("r:1", HUMANEVAL))
    samples = code_tasks.answer_code(
        [item] * 2, tools.generate, code_tasks.HUMANEVAL_STOPS, 120, tools.run_program
    )
    assert samples[0].fields["text"] == BODY
    assert [sample.fields["predicted"] for sample in samples] == ["passed", "failed"]
    assert "AssertionError" in samples[1].fields["detail"]
