"""Our models as lm-evaluation-harness asks them: scores, truncation, written answers."""

import json
import shutil

import numpy as np
import pytest

from drlora_jax.config import MeshSection
from drlora_jax.errors import RunError, UserError
from drlora_jax.inference.generation import Sampling
from drlora_jax.inference.model import load_base
from tests.support.harness import (
    TEMPLATE,
    WORDS,
    greedy,
    ids_of,
    log_probabilities,
    make_model,
    one_by_one,
    requests_of,
    with_template,
)


@pytest.fixture(scope="module")
def model(lm_eval, loaded):
    return make_model(loaded)


def test_log_likelihoods_are_those_of_single_passes(model, loaded):
    pairs = [("a cat sat", " on the mat"), ("two  ", "dogs"), ("", "rain in hills"), ("  ", "run")]
    found = model.loglikelihood(requests_of(*pairs))
    start = [loaded.tokenizer.eos_token_id]
    expected = [
        (ids_of(loaded, "a cat sat"), ids_of(loaded, "a cat sat on the mat")[3:]),
        # Spaces at the end of a context belong to the continuation.
        (ids_of(loaded, "two"), ids_of(loaded, "two  dogs")[len(ids_of(loaded, "two")) :]),
        (start, ids_of(loaded, "rain in hills")),
        (start, ids_of(loaded, "  run")),
    ]
    assert len(ids_of(loaded, "a cat sat")) == 3
    for (total, is_greedy), ids in zip(found, expected, strict=True):
        wanted = one_by_one(loaded, *ids)
        assert total == pytest.approx(wanted[0], abs=1e-4)
        assert is_greedy == wanted[1]


def test_a_greedy_continuation_is_known_as_such(model, loaded):
    context = ids_of(loaded, "the old dogs")
    best = int(log_probabilities(loaded, context)[-1].argmax())
    assert [found[1] for found in model._loglikelihood_tokens([(("", ""), context, [best])])] == [
        True
    ]


def test_a_long_context_loses_its_start(model, loaded):
    context = " ".join(WORDS * 12)
    assert len(ids_of(loaded, context)) > 150
    [(total, _)] = model.loglikelihood(requests_of((context, " green hills")))
    whole = ids_of(loaded, context + " green hills")
    cut = len(ids_of(loaded, context))
    assert total == pytest.approx(one_by_one(loaded, whole[:cut], whole[cut:])[0], abs=1e-4)


def test_too_long_answers_and_empty_ones_are_refused(model):
    with pytest.raises(UserError, match=r"An answer has \d+ tokens .* is 96; .*--max-length"):
        model.loglikelihood(requests_of(("a", " ".join(WORDS * 12))))
    with pytest.raises(RunError, match="requests the score of an empty text"):
        model.loglikelihood(requests_of(("a", "")))


def test_rolling_predicts_every_token_once(model, loaded):
    text = " ".join(WORDS * 16)
    found = model.loglikelihood_rolling(requests_of((text,), ("cat",), ("",)))
    ids = [loaded.tokenizer.eos_token_id, *ids_of(loaded, text)]
    assert len(ids) > 2 * 96
    expected, start = 0.0, 1
    while start < len(ids):  # windows of 96; the last one is filled up with context
        end = min(start + 96, len(ids))
        first = max(0, end - 97)
        expected += one_by_one(loaded, ids[first:start], ids[start:end])[0]
        start = end
    assert found[0] == pytest.approx(expected, rel=1e-5)
    single = one_by_one(loaded, ids[:1], ids_of(loaded, "cat"))[0]
    assert found[1:] == [pytest.approx(single, abs=1e-4), 0]


def test_results_do_not_depend_on_the_batch(model, loaded):
    draw = np.random.default_rng(1)
    pairs = [
        (" ".join(draw.choice(WORDS, draw.integers(1, 30))), f" {draw.choice(WORDS)}")
        for _ in range(20)
    ]
    other = make_model(loaded, batch_size=3)
    first, second = (each.loglikelihood(requests_of(*pairs)) for each in (model, other))
    np.testing.assert_allclose([x[0] for x in first], [x[0] for x in second], atol=1e-5)
    options = {"until": [], "max_gen_toks": 5}
    asked = requests_of(*((context[-40:], options) for context, _ in pairs[:9]))
    assert model.generate_until(asked) == other.generate_until(asked)


def test_written_answers(model, loaded):
    asked = [
        ("two old dogs", {"until": [], "max_gen_toks": 8}),
        ("the cat", {"until": "zzz", "max_gen_toks": 3, "do_sample": False}),
        ("two old dogs", {"until": [], "max_new_tokens": 8, "temperature": 0.0}),
        # 96 - 8 tokens of the context are left: the end of it.
        (" ".join(WORDS * 12), {"until": ["zzz"], "max_gen_toks": 8}),
    ]
    found = model.generate_until(requests_of(*asked))
    assert found[0] == found[2] == greedy(loaded, ids_of(loaded, "two old dogs"), 8)
    assert found[1] == greedy(loaded, ids_of(loaded, "the cat"), 3)
    assert found[3] == greedy(loaded, ids_of(loaded, asked[3][0])[-88:], 8)
    # The answer ends before the first of the stop strings.
    middle = found[0][2:4]
    [cut] = model.generate_until(
        requests_of(("two old dogs", {"until": ["@@", middle], "max_gen_toks": 8}))
    )
    assert cut == found[0][: found[0].index(middle)]


def test_a_special_token_can_end_an_answer(lm_eval, tmp_path, directory):
    """As a stop string, and as an end token of generation_config.json."""
    shutil.copytree(directory, tmp_path / "m")
    free = make_model(load_base(str(tmp_path / "m"), mesh=MeshSection(data=1)))
    prompt, options = "two old dogs", {"until": [], "max_gen_toks": 8}
    ids = ids_of(free._loaded, prompt)
    [answer] = free._generator.generate([ids], max_new_tokens=8)
    token = answer.tokens[4]
    assert token not in answer.tokens[:4]
    text = free.tokenizer.decode(ids + answer.tokens[:4])[len(free.tokenizer.decode(ids)) :]
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, token]}))
    ending = make_model(load_base(str(tmp_path / "m"), mesh=MeshSection(data=1)))
    assert ending.generate_until(requests_of((prompt, options))) == [text]

    special = free.tokenizer.convert_ids_to_tokens(token)
    free.tokenizer.add_special_tokens({"additional_special_tokens": [special]})
    asked = requests_of((prompt, options | {"until": ["zzz", special]}))
    assert free.generate_until(asked) == [text]


def test_room_for_the_answer_is_needed(model):
    with pytest.raises(UserError, match="requests 96 new tokens, .* at most 96;"):
        model.generate_until(requests_of(("a", {"until": [], "max_gen_toks": 96})))


def test_generation_settings(lm_eval):
    from drlora_jax.evaluation.harness_model import read_options

    assert read_options({"until": "x"})[:2] == (("x",), 256)
    options = read_options(
        {"until": ["a", ""], "max_tokens": 5, "do_sample": True, "top_p": 0.9, "top_k": 0}
    )
    assert options == (("a",), 5, Sampling(1.0, None, 0.9))
    assert read_options({"temperature": 0.7}).sampling == Sampling(0.7)
    assert read_options({"temperature": 0.7, "do_sample": False, "num_beams": 1}).sampling == (
        Sampling()
    )
    with pytest.raises(UserError, match="settings repetition_penalty, which are not supported"):
        read_options({"repetition_penalty": 2})
    with pytest.raises(UserError, match="beam search"):
        read_options({"num_beams": 4})


def test_chat_template_and_context_length(lm_eval, loaded, directory):
    from drlora_jax.evaluation.harness_model import context_length

    assert context_length(loaded) == 96
    model = make_model(loaded, max_length=20)
    assert model.max_length == 20
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    with with_template(loaded.tokenizer, TEMPLATE):
        assert model.apply_chat_template(turns) == "<system>s\n<user>q\n<assistant>"
        assert model.chat_template(True) == TEMPLATE
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    with with_template(loaded.tokenizer, refusing + TEMPLATE):
        assert model.apply_chat_template(turns) == "<user>q\n<assistant>"
