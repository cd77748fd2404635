"""The rows that score highest, found in bounded memory."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappush, heappushpop
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass
class TopRows(Generic[T]):
    """The `size` highest-scoring rows seen so far, as (shard, row), each with a payload."""

    size: int
    heap: list[tuple[float, int, int, T]] = field(default_factory=list)

    def add_row(self, score: float, shard: int, row: int, payload: T) -> None:
        # On ties the earlier image stays, so that the same labels always show the same pictures.
        item = (score, -shard, -row, payload)
        if len(self.heap) < self.size:
            heappush(self.heap, item)
        elif self.size:
            heappushpop(self.heap, item)

    def __iter__(self) -> Iterator[tuple[int, int, T]]:
        """Highest first: shard, row, payload."""
        return iter([(-shard, -row, payload) for _, shard, row, payload in sorted(self.heap, reverse=True)])
