"""Items come in order, ahead of their use, and end cleanly."""

import threading

import pytest

from drlora_jax.data.prefetch import DEPTH, made_ahead


def test_order_and_depth():
    made, enough = [], threading.Event()

    def make(index):
        made.append(index)
        if index == DEPTH:
            enough.set()
        return index * index

    items = made_ahead(make, range(10))
    assert next(items) == 0
    assert enough.wait(10)  # made although nobody asked for it
    assert max(made) <= DEPTH
    assert list(items) == [index * index for index in range(1, 10)] and made == list(range(10))
    assert list(made_ahead(make, range(1))) == [0] and list(made_ahead(make, ())) == []


def test_a_failure_comes_where_its_item_would():
    def make(index):
        if index == 3:
            raise ValueError("row 3")
        return index

    items = made_ahead(make, range(9))
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="row 3"):
        next(items)


def test_closing_ends_the_thread():
    before = threading.active_count()
    items = made_ahead(lambda index: index, range(1000))
    next(items)
    items.close()
    assert threading.active_count() == before
