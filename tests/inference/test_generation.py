"""Generation against repeated full passes, and what batching, caches and stop strings may not
change.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drlora_jax import generate as generate_entry
from drlora_jax import train
from drlora_jax.config import MeshSection
from drlora_jax.data.tokenize import load_tokenizer
from drlora_jax.errors import UserError
from drlora_jax.inference.generation import (
    GREEDY,
    Generator,
    RowState,
    Sampling,
    make_decode_step,
    restrict,
)
from drlora_jax.inference.model import load_base, load_run
from drlora_jax.models.options import DecoderOptions
from drlora_jax.models.transformer import logits
from drlora_jax.training.job import prepare
from tests.support.tiny import MIXTRAL, OLMOE, tiny_config, write_tiny_model

LLAMA = OLMOE | {"model_type": "llama", "tie_word_embeddings": True, "num_hidden_layers": 3}
MODELS = {
    "olmoe": OLMOE,
    "mixtral_window": MIXTRAL | {"sliding_window": 7},
    "llama": LLAMA,
}
ONE = MeshSection(data=1)
PROMPTS = [[5, 9, 31], [77] * 40, [8], list(range(100, 121))]


@pytest.fixture(scope="module", params=MODELS)
def loaded(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    return load_base(str(write_tiny_model(directory, MODELS[request.param])), mesh=ONE)


@pytest.fixture(scope="module")
def generator(loaded):
    """Compiled once for most tests: programs are what takes time here."""
    return Generator(loaded, batch_size=4)


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory):
    return load_base(str(write_tiny_model(tmp_path_factory.mktemp("model"), OLMOE)), mesh=ONE)


@pytest.fixture(scope="module")
def adapted(run):
    return load_run(run, mesh=ONE)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with grown ranks."""
    tmp_path = tmp_path_factory.mktemp("run")
    assert train.train(train.build(prepare(tiny_config(tmp_path)))) == 0
    return str(tmp_path / "run")


def full_pass_logits(loaded, tokens):
    """Logits [V] behind the last token, without any cache."""
    padded = np.zeros((1, 128), np.int32)
    padded[0, : len(tokens)] = tokens
    segments = (np.arange(128) < len(tokens)).astype(np.int32)[None]
    return np.asarray(full_pass(loaded)(padded, segments))[0, len(tokens) - 1]


_PASSES = {}


def full_pass(loaded):
    if id(loaded) not in _PASSES:

        @jax.jit
        def passes(tokens_BT, segments_BT):
            positions_BT = jnp.arange(tokens_BT.shape[1])[None]
            hidden_BTD, _ = loaded.model.apply(
                loaded.variables, tokens_BT, segments_BT, positions_BT
            )
            return logits(loaded.model.config, loaded.variables["params"], hidden_BTD)

        _PASSES[id(loaded)] = passes, loaded  # kept, so that the id is not given out again
    return _PASSES[id(loaded)][0]


def loop_greedy(loaded, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(full_pass_logits(loaded, tokens).argmax()))
        if tokens[-1] == loaded.tokenizer.eos_token_id:
            break
    return tokens[len(prompt) :]


def test_greedy_tokens_are_those_of_full_passes(loaded, generator):
    answers = generator.generate(PROMPTS, max_new_tokens=20)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer.tokens == loop_greedy(loaded, prompt, 20)


def test_an_adapted_run_answers_as_its_full_passes_do(adapted):
    assert adapted.ranks_LE.max() > adapted.ranks_LE.min()
    [answer] = Generator(adapted).generate([PROMPTS[3]], max_new_tokens=16)
    assert answer.tokens == loop_greedy(adapted, PROMPTS[3], 16)
    assert answer.tokens != loop_greedy(adapted.base(), PROMPTS[3], 16)


def test_cached_logits_equal_those_of_a_full_pass(loaded):
    """Teacher forcing: the step's logits at every position, through the sampled row's key."""
    tokens = np.random.default_rng(0).integers(2, 4000, 40).tolist()
    model = loaded.model.clone(options=DecoderOptions(cache_length=64))
    shapes = jnp.zeros((1, 1), jnp.int32)
    _, made = model.apply(loaded.variables, shapes, shapes, shapes, mutable=["cache"])
    cache, worst = made["cache"], 0.0

    @jax.jit
    def step(cache, token_BT, position_BT):
        (hidden_BTD, _), changed = model.apply(
            loaded.variables | {"cache": cache},
            token_BT,
            jnp.ones_like(token_BT),
            position_BT,
            mutable=["cache"],
        )
        found = logits(model.config, loaded.variables["params"], hidden_BTD)[0, 0]
        return found, changed["cache"]

    for position, token in enumerate(tokens):
        got_V, cache = step(cache, jnp.array([[token]]), jnp.array([[position]]))
        worst = max(worst, np.abs(got_V - full_pass_logits(loaded, tokens[: position + 1])).max())
    assert worst <= 1e-5 * 10  # logits of these weights are of size 10


def test_answers_do_not_depend_on_batching(olmoe):
    sampling = Sampling(0.9, 50, 0.95)
    ways = [Generator(olmoe, batch_size=size) for size in (1, 3)]
    answers = [way.generate(PROMPTS, max_new_tokens=12, sampling=sampling, seed=4) for way in ways]
    assert answers[0] == answers[1]


def test_a_mesh_of_eight_gives_the_same_answers(run, adapted):
    alone = Generator(adapted).generate(PROMPTS, max_new_tokens=10)
    spread = load_run(run, mesh=MeshSection(data=2, expert=4))
    generator = Generator(spread, batch_size=3)
    assert generator.batch_size == 8
    assert generator.generate(PROMPTS, max_new_tokens=10) == alone


def test_one_step_program_serves_all_lengths(generator):
    for length in (1, 30, 90):
        generator.generate([[7] * length, [9]], max_new_tokens=30)
    [(_, step)] = generator._programs.values()
    assert step._cache_size() == 1


def test_live_transformers_writes_the_same_tokens(loaded, generator):
    torch = pytest.importorskip("torch", reason="compared with full passes of ours above")
    from transformers import AutoModelForCausalLM

    peer = AutoModelForCausalLM.from_pretrained(loaded.directory, dtype=torch.float32).eval()
    answers = generator.generate(PROMPTS, max_new_tokens=20)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            out = peer.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=20,
                do_sample=False,
                eos_token_id=loaded.tokenizer.eos_token_id,
                pad_token_id=loaded.tokenizer.pad_token_id,
            )
        assert out[0, len(prompt) :].tolist() == answer.tokens


def test_a_row_that_has_ended_stays_where_it_is(olmoe):
    model = olmoe.model.clone(options=DecoderOptions(cache_length=128))
    zeros = jnp.zeros((2, 1), jnp.int32)
    _, made = model.apply(olmoe.variables, zeros, zeros, zeros, mutable=["cache"])
    keys_B = jax.random.split(jax.random.key(0), 2)
    state = RowState(jnp.array([9, 9]), jnp.array([3, 3]), jnp.array([True, False]), keys_B)
    after, _ = make_decode_step(model, GREEDY, ())(olmoe.variables, made["cache"], state)
    assert after.positions_B.tolist() == [4, 3]
    assert after.tokens_B[1] == 9 and not after.is_active_B[1]


# ---------------------------------------------------------------------------------------- sampling


def loop_restrict(logits_V, top_k, top_p):
    """float64; the tokens that may be drawn."""
    order = np.argsort(-logits_V, kind="stable")
    if top_k is not None:
        order = order[:top_k]
    kept, total = [], 0.0
    shares = np.exp(logits_V[order] - logits_V[order].max())
    shares /= shares.sum()
    for token, share in zip(order, shares, strict=True):
        if top_p is not None and total >= top_p:
            break
        kept.append(int(token))
        total += share
    return set(kept)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    top_k=st.none() | st.integers(1, 20),
    top_p=st.none() | st.floats(0.05, 0.95),
)
def test_top_k_and_top_p_keep_what_a_loop_keeps(seed, top_k, top_p):
    draw = np.random.default_rng(seed)
    logits_V = draw.permutation(np.linspace(-3, 3, 20) + draw.normal(size=20) * 0.01)
    kept = np.asarray(restrict(jnp.asarray(logits_V[None], jnp.float32), Sampling(1, top_k, top_p)))
    assert set(np.flatnonzero(np.isfinite(kept[0])).tolist()) == loop_restrict(
        logits_V, top_k, top_p
    )


def test_draws_have_the_shares_of_the_softmax(olmoe):
    """Three tokens by top-k, at the first position of many rows."""
    sampling, count = Sampling(0.7, 3), 600
    answers = Generator(olmoe, batch_size=200).generate(
        [PROMPTS[0]] * count, max_new_tokens=1, sampling=sampling, seed=1
    )
    drawn = np.bincount([answer.tokens[0] for answer in answers], minlength=4096) / count
    scaled_V = full_pass_logits(olmoe, PROMPTS[0]).astype(np.float64) / 0.7
    top = np.argsort(-scaled_V)[:3]
    shares = np.exp(scaled_V[top] - scaled_V[top].max())
    shares /= shares.sum()
    assert drawn[top].sum() == pytest.approx(1)
    np.testing.assert_allclose(drawn[top], shares, atol=0.08)


# ----------------------------------------------------------------------------------- command line


def test_the_command_answers_every_prompt(run, capsys):
    arguments = ["--run", run, "--prompt", "What is 1 plus 2?", "--prompt", "Hello"]
    assert generate_entry.main([*arguments, "--max-new-tokens", "5"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("> What is 1 plus 2?\n") and "\n> Hello\n" in printed


def test_prompts_are_read_from_a_pipe_and_written_as_in_training(run, adapted, capsys, monkeypatch):
    lines = iter(["What is 1 plus 2?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert generate_entry.main(["--run", run, "--max-new-tokens", "6"]) == 0
    tokens = adapted.tokenizer("What is 1 plus 2?\n").input_ids  # the template `plain`
    [answer] = Generator(adapted).generate([tokens], max_new_tokens=6)
    assert capsys.readouterr().out == answer.text + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "--temperature must be 0 or more"),
        (["--top-p", "1.5"], "--top-p must be above 0"),
        (["--top-k", "0"], "--top-k must be 1 or more"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be 1 or more"),
        (["--template", "chatmll"], "Did you mean chatml"),
        (["--step", "9999"], "--step 9999"),
        (["--model-path", "/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_refused(run, arguments, message):
    with pytest.raises(UserError, match=message):
        generate_entry.main(["--run", run, "--prompt", "x", *arguments])


def test_prompts_without_tokens_and_empty_stops_are_refused(olmoe):
    with pytest.raises(UserError, match="Prompt 2 has no token"):
        Generator(olmoe).generate([[5], []], max_new_tokens=3)
    with pytest.raises(UserError, match="stop string is empty"):
        Generator(olmoe).generate([[5]], max_new_tokens=3, stop=("x", ""))


# -------------------------------------------------------------------------------------- end tokens


def test_rows_end_at_any_end_token_and_at_different_steps(olmoe, generator_of):
    free = generator_of(()).generate(PROMPTS, max_new_tokens=12)
    assert [answer.finish for answer in free] == ["length"] * len(PROMPTS)
    # An end token that is the first of one row, and one that is the fourth of another.
    ends = (free[0].tokens[0], free[2].tokens[3])
    found = generator_of(ends).generate(PROMPTS, max_new_tokens=12)
    decode, sizes = olmoe.tokenizer.decode, set()
    for prompt, before, after in zip(PROMPTS, free, found, strict=True):
        size = next((at for at, token in enumerate(before.tokens) if token in ends), 12)
        assert after.tokens == before.tokens[: size + 1]
        assert after.text == decode(prompt + before.tokens[:size]).removeprefix(decode(prompt))
        assert after.finish == ("eos" if size < 12 else "length")
        sizes.add(size)
    assert {0, 3, 12} <= sizes


def test_one_new_token_may_be_the_end(generator_of):
    free = generator_of(()).generate(PROMPTS, max_new_tokens=1)
    assert [(len(answer.tokens), answer.finish) for answer in free] == [(1, "length")] * 4
    [first, *_] = generator_of((free[0].tokens[0],)).generate(PROMPTS, max_new_tokens=1)
    assert first == ("", free[0].tokens, "eos")


@pytest.fixture(scope="module")
def generator_of(olmoe):
    kept = {}

    def make(ends):
        if ends not in kept:
            kept[ends] = Generator(olmoe._replace(end_token_ids=ends), batch_size=4)
        return kept[ends]

    return make


def test_a_special_token_as_stop_string_ends_the_answer(olmoe, generator_of):
    """Decoded text does not show it."""
    free = generator_of(()).generate(PROMPTS, max_new_tokens=12)
    special = free[3].tokens[5]
    text = olmoe.tokenizer.convert_ids_to_tokens(special)
    assert special not in free[3].tokens[:5]
    tokenizer = load_tokenizer(olmoe.directory)
    tokenizer.add_special_tokens({"additional_special_tokens": [text]})
    generator = Generator(olmoe._replace(tokenizer=tokenizer, end_token_ids=()), batch_size=4)
    assert text not in tokenizer.decode([special], skip_special_tokens=True)
    [answer] = generator.generate([PROMPTS[3]], max_new_tokens=12, stop=(text,))
    assert (answer.finish, answer.tokens) == ("stop", free[3].tokens[:6])
    assert answer.text == tokenizer.decode(free[3].tokens[:5])


# --------------------------------------------------------------------------------------- positions


def test_what_runs_beyond_the_positions_is_said_once(tmp_path, capsys):
    directory = write_tiny_model(tmp_path, OLMOE | {"max_position_embeddings": 40})
    generator = Generator(load_base(str(directory), mesh=ONE), batch_size=1)
    generator.generate([[7] * 32], max_new_tokens=8)
    assert "warning" not in capsys.readouterr().err
    for _ in range(2):
        generator.generate([[7] * 5, [7] * 33], max_new_tokens=8)
    [line] = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert line.startswith("warning: a prompt of 33 and 8 new tokens: 41 tokens, more than the")
    assert "model's 40 positions (" in line
