"""Batches made while the device computes."""

import collections
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
DEPTH = 2  # made ahead of the one in use


def made_ahead(make: Callable[[int], Item], indices: Iterable[int]) -> Iterator[Item]:
    """make(index) for every index, in order, made by one thread up to DEPTH ahead.

    What `make` raises is raised where its item would have come. Close the iterator to end early: it
    waits for what is being made.
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
