"""Batches by global row index: coverage, restarts, borders of epochs, slices."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drlora_jax.data.loader import (
    Loader,
    count_targets,
    count_tokens,
    eval_batches,
    sharded_batch,
    split_micro_batches,
)
from drlora_jax.data.tokenize import Document
from drlora_jax.errors import UserError
from drlora_jax.parallel.mesh import make_mesh, rows

LENGTH = 16


def _documents(count: int = 30) -> list[Document]:
    """Document i consists of tokens i + 1, so that a batch tells which documents it holds."""
    lengths = np.random.default_rng(count).integers(2, LENGTH + 1, count)
    return [
        Document(np.full(length, i + 1, np.int32), np.arange(length) > 0)
        for i, length in enumerate(lengths)
    ]


def _loader(documents=None, **options) -> Loader:
    defaults = {"sequence_length": LENGTH, "batch_size": 4, "seed": 3, "pad_id": 0}
    return Loader(documents or _documents(), **(defaults | options))


def _plan(loader: Loader, epoch: int) -> list[list[int]]:
    return [row.tolist() for row in loader.epoch_rows(epoch)]


def _equal(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 60), seed=st.integers(0, 5), pack=st.booleans(), shuffle=st.booleans())
def test_every_document_once_an_epoch(count, seed, pack, shuffle):
    documents = _documents(count)
    loader = _loader(documents, batch_size=1, seed=seed, pack=pack, shuffle=shuffle)
    tokens = np.concatenate([each.tokens for each in documents])
    for epoch in range(3):
        rows = range(loader.total_rows(epoch), loader.total_rows(epoch + 1))
        seen = np.concatenate([loader.batch(row).tokens_BT.ravel() for row in rows])
        np.testing.assert_array_equal(np.sort(seen[seen > 0]), np.sort(tokens))


def test_plan_is_a_function_of_seed_and_epoch():
    assert _plan(_loader(), 1) == _plan(_loader(), 1)
    assert _plan(_loader(), 1) != _plan(_loader(), 2)
    assert _plan(_loader(), 1) != _plan(_loader(seed=4), 1)
    still = _loader(shuffle=False)
    assert _plan(still, 0) == _plan(still, 5)
    assert _plan(_loader(pack=False, shuffle=False), 0) == [[i] for i in range(30)]


@pytest.mark.parametrize("pack", [True, False])
def test_restart_at_any_row(pack):
    loader = _loader(pack=pack)
    for row in range(0, loader.total_rows(4)):
        assert _equal(loader.batch(row), _loader(pack=pack).batch(row))
    assert _equal(loader.batch(0), _loader(pack=pack).batch(0))  # back, past the cached plans


def test_batch_over_the_border_of_an_epoch():
    loader = _loader()
    end = loader.total_rows(1)
    single = _loader(batch_size=1)
    batch = loader.batch(end - 2)
    rows = [single.batch(row) for row in range(end - 2, end + 2)]
    assert _equal(batch, [np.concatenate(arrays) for arrays in zip(*rows, strict=True)])
    first = loader.epoch_rows(1)[0]
    assert set(batch.tokens_BT[2]) - {0} == set(first + 1)


def test_batch_longer_than_an_epoch():
    batch = _loader(_documents(2), batch_size=16, pack=False).batch(0)
    assert batch.tokens_BT.shape == (16, LENGTH)
    assert np.bincount(batch.tokens_BT[:, 0]).tolist() == [0, 8, 8]


def test_targets_never_cross_documents():
    batch = _loader(batch_size=32).batch(5)
    is_target = batch.target_mask_BT > 0
    assert is_target.any()
    np.testing.assert_array_equal(batch.targets_BT[is_target], batch.tokens_BT[is_target])
    assert (batch.segment_ids_BT[is_target] > 0).all()
    starts = batch.positions_BT == 0
    changes = np.diff(batch.segment_ids_BT, axis=1, prepend=0) != 0
    np.testing.assert_array_equal(
        starts & (batch.segment_ids_BT > 0), changes & (batch.tokens_BT > 0)
    )


def test_counts():
    documents = _documents()
    batches = list(eval_batches(documents, sequence_length=LENGTH, batch_size=4, pad_id=0))
    lengths = [len(each.tokens) for each in documents]
    assert sum(map(count_tokens, batches)) == sum(lengths)
    assert sum(map(count_targets, batches)) == sum(lengths) - len(lengths)


def test_eval_batches_are_in_order_and_filled_up():
    options = {"sequence_length": LENGTH, "batch_size": 4, "pad_id": 0}
    batches = list(eval_batches(_documents(6), pack=False, **options))
    assert [batch.tokens_BT.shape for batch in batches] == [(4, LENGTH)] * 2
    firsts = np.concatenate([batch.tokens_BT[:, 0] for batch in batches])
    assert firsts.tolist() == [1, 2, 3, 4, 5, 6, 0, 0]
    assert not batches[1].segment_ids_BT[2:].any() and not batches[1].target_mask_BT[2:].any()
    assert len(list(eval_batches(_documents(6), pack=False, limit=1, **options))) == 1
    assert list(eval_batches([], **options)) == []


@pytest.mark.parametrize("count", [1, 2, 4])
def test_micro_batches_hold_consecutive_rows(count):
    batch = _loader().batch(0)
    micro = split_micro_batches(batch, count)
    assert micro.tokens_BT.shape == (count, 4 // count, LENGTH)
    assert _equal(batch, [np.concatenate(array) for array in micro])


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_batch_on_a_mesh_makes_each_row_once(micro_batches, monkeypatch):
    loader = _loader(batch_size=8)
    sharding = rows(make_mesh((4, 1, 1, 1)), leading=1)
    whole = split_micro_batches(loader.batch(8), micro_batches)
    for one, other in zip(sharded_batch(loader, 8, micro_batches, sharding), whole, strict=True):
        assert one.sharding == sharding
        np.testing.assert_array_equal(one, other)
    made, row = [], loader.row
    monkeypatch.setattr(loader, "row", lambda index: made.append(index) or row(index))
    sharded_batch(loader, 8, micro_batches, sharding)
    assert sorted(made) == list(range(8, 16))
    assert loader.token_count(8) == int((np.asarray(whole.segment_ids_BT) > 0).sum())


def test_refused():
    batch = _loader().batch(0)
    with pytest.raises(UserError, match=r"\(4\) must be a multiple of train.micro_batches \(3\)"):
        split_micro_batches(batch, 3)
    with pytest.raises(UserError, match="no document to train on"):
        Loader([], sequence_length=4, batch_size=1, seed=0, pad_id=0)
    with pytest.raises(ValueError, match="0 or more, got -1"):
        _loader().batch(-1)
