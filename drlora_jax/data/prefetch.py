"""Prepares batches while the device computes."""

import collections
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
DEPTH = 2  # batches prepared ahead of the one in use


def made_ahead(make: Callable[[int], Item], indices: Iterable[int]) -> Iterator[Item]:
    """Yields make(index) for every index, in order, computed by one thread up to DEPTH ahead.

    An exception of `make` is raised in the place of its item. Close the iterator to end early: it
    waits for the item in progress.
    """
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        waiting: collections.deque = collections.deque()
        try:
            for index in indices:
                waiting.append(pool.submit(make, index))
                if len(waiting) > DEPTH:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for each in waiting:
                each.cancel()
