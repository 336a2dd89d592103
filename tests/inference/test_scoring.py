"""Log-likelihoods of packed pairs against one full pass a pair, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drlora_jax.config import MeshSection
from drlora_jax.inference.model import load_base
from drlora_jax.inference.scoring import Scorer, score_continuations
from drlora_jax.models.transformer import logits
from tests.support.tiny import MIXTRAL, write_tiny_model

LONGEST = 512  # tokens of a pair


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    directory = write_tiny_model(tmp_path_factory.mktemp("model"), MIXTRAL | {"sliding_window": 30})
    return load_base(str(directory), mesh=MeshSection(data=1))


@pytest.fixture(scope="module")
def scorer(loaded):
    return Scorer(loaded, batch_size=2)


@pytest.fixture(scope="module")
def pairs():
    draw = np.random.default_rng(0)
    sizes = [(1, 1), (3, 7), (40, 2), (200, 90), (5, 5), (300, 4), (2, 60)]
    return [
        (draw.integers(2, 4000, context).tolist(), draw.integers(2, 4000, continuation).tolist())
        for context, continuation in sizes
    ]


@pytest.fixture(scope="module")
def loop_score(loaded):
    """(sum of log-probabilities, whether each is the largest) by one pass over one pair alone."""

    @jax.jit
    def passes(tokens_BT, segments_BT):
        positions_BT = jnp.arange(tokens_BT.shape[1])[None]
        hidden_BTD, _ = loaded.model.apply(loaded.variables, tokens_BT, segments_BT, positions_BT)
        return logits(loaded.model.config, loaded.variables["params"], hidden_BTD)[0]

    def score(context, continuation):
        count = len(context) + len(continuation)
        tokens_BT, segments_BT = np.zeros((2, 1, LONGEST), np.int32)
        tokens_BT[0, :count], segments_BT[0, :count] = [*context, *continuation], 1
        logits_TV = np.asarray(passes(tokens_BT, segments_BT), np.float64)
        logits_TV = logits_TV[len(context) - 1 : count - 1]
        top = logits_TV.max(axis=1, keepdims=True)
        log_p_TV = logits_TV - top - np.log(np.exp(logits_TV - top).sum(axis=1, keepdims=True))
        is_top = logits_TV.argmax(axis=1) == continuation
        return log_p_TV[np.arange(len(continuation)), continuation].sum(), bool(is_top.all())

    return score


def test_packed_pairs_score_as_alone(scorer, loop_score, pairs):
    results = scorer(pairs)
    for (context, continuation), result in zip(pairs, results, strict=True):
        total, is_greedy = loop_score(context, continuation)
        assert result.total == pytest.approx(total, abs=1e-4)
        assert (result.is_greedy, result.tokens) == (is_greedy, len(continuation))


def test_the_likeliest_continuation_is_greedy(scorer, loop_score):
    context, tokens = [9, 200, 31], list(range(2, 60))
    likely = max(tokens, key=lambda token: loop_score(context, [token])[0])
    results = scorer([(context, [token]) for token in tokens])
    assert max(range(len(tokens)), key=lambda i: results[i].total) == tokens.index(likely)
    greedy = [loop_score(context, [token])[1] for token in tokens]
    assert [result.is_greedy for result in results] == greedy


def test_order_changes_nothing(scorer, pairs):
    forward, backward = scorer(pairs), scorer(pairs[::-1])[::-1]
    np.testing.assert_allclose([r.total for r in forward], [r.total for r in backward], atol=1e-4)


def test_a_context_too_long_loses_its_start(loaded, loop_score):
    draw = np.random.default_rng(1)
    context, continuation = draw.integers(2, 4000, 90).tolist(), [7, 8, 9]
    [result] = score_continuations(loaded, [(context, continuation)], max_length=20)
    # The model sees 20 tokens: 18 of the context and all of the continuation but its last token.
    total, _ = loop_score(context[-18:], continuation)
    assert result.total == pytest.approx(total, abs=1e-4)


def test_a_mesh_of_eight_scores_the_same(loaded, scorer, pairs):
    mesh = MeshSection(data=2, expert=4)
    spread = load_base(str(loaded.directory), mesh=mesh)
    one, many = scorer(pairs), score_continuations(spread, pairs)
    np.testing.assert_allclose([r.total for r in one], [r.total for r in many], atol=1e-4)


def test_empty_parts_and_long_continuations_are_errors(loaded):
    for pair, message in [(([], [1]), "at least one"), (([1], [2] * 9), "max_length is 8")]:
        with pytest.raises(ValueError, match=message):
            score_continuations(loaded, [pair], max_length=8)
