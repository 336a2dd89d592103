"""Packing plans and the arrays of a row."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drlora_jax.data.loader import fill_row
from drlora_jax.data.packing import OPEN_ROWS, one_a_row, pack
from drlora_jax.data.tokenize import Document

LIMIT = 16
LENGTHS = st.lists(st.integers(1, LIMIT), min_size=1, max_size=200)


def make_documents(lengths, seed: int = 0) -> list[Document]:
    rng = np.random.default_rng(seed)
    documents = []
    for length in lengths:
        is_target = rng.random(length) < 0.5
        is_target[0] = False
        documents.append(Document(rng.integers(1, 99, length).astype(np.int32), is_target))
    return documents


@given(lengths=LENGTHS, seed=st.integers(0, 9))
def test_every_document_once_and_no_row_too_long(lengths, seed):
    lengths = np.array(lengths)
    order = np.random.default_rng(seed).permutation(len(lengths))
    rows = pack(lengths, LIMIT, order)
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(lengths)))
    assert all(lengths[row].sum() <= LIMIT for row in rows)
    again = pack(lengths, LIMIT, order)
    assert [row.tolist() for row in rows] == [row.tolist() for row in again]
    assert [row.tolist() for row in one_a_row(order)] == [[index] for index in order]


def test_first_row_with_room():
    rows = pack(np.array([10, 9, 5, 7, 1]), LIMIT, np.arange(5))
    assert [row.tolist() for row in rows] == [[0, 2, 4], [1, 3]]


def test_packing_is_tight():
    lengths = np.random.default_rng(0).integers(10, 400, 5000)
    rows = pack(lengths, 512, np.arange(5000))
    assert lengths.sum() / (512 * len(rows)) > 0.95


def test_rows_left_open_are_bounded():
    lengths = np.array([LIMIT - 1] * (OPEN_ROWS + 1) + [1] * (OPEN_ROWS + 1))
    rows = pack(lengths, LIMIT, np.arange(len(lengths)))
    assert len(rows) == OPEN_ROWS + 2  # one row had been closed with room for one more token


def test_document_longer_than_a_row():
    with pytest.raises(ValueError, match="Document 1 has 17 tokens, but a row 16"):
        pack(np.array([3, 17]), LIMIT, np.arange(2))


@given(lengths=st.lists(st.integers(1, 5), max_size=3), seed=st.integers(0, 99))
def test_arrays_of_a_row(lengths, seed):
    documents = make_documents(lengths, seed)
    row = fill_row(documents, range(len(documents)), LIMIT, pad_id=100)
    # The same, said token by token.
    expected = []
    for segment, (tokens, is_target) in enumerate(documents, start=1):
        for i, token in enumerate(tokens):
            has_next = i + 1 < len(tokens)
            target = tokens[i + 1] if has_next else 100
            expected.append((token, target, segment, i, float(has_next and is_target[i + 1])))
    expected += [(100, 100, 0, 0, 0.0)] * (LIMIT - len(expected))
    assert list(zip(*(array.tolist() for array in row), strict=True)) == expected
    assert [array.dtype for array in row] == [np.int32] * 4 + [np.float32]


@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_every_target_of_a_document_is_a_target_of_its_row(lengths):
    documents = make_documents(lengths)
    row = fill_row(documents, range(len(documents)), LIMIT, pad_id=0)
    assert row.target_mask.sum() == sum(each.is_target.sum() for each in documents)
