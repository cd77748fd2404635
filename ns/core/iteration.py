"""Iterators that start work before its result is needed."""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def iter_ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """The same items in the same order, but taken from `items` up to `count` earlier: taking one submits a task, say."""
    remaining = iter(items)
    pending = deque(islice(remaining, count))
    while pending:
        item = pending.popleft()
        pending.extend(islice(remaining, 1))
        yield item
