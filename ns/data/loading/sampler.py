"""The order of training images: an endless shuffle as a pure function of (seed, position).

An epoch contains every image as often as it has copies. Shards are shuffled first, then the images within a window of shards
that are open together: reads are sequential, and the shuffle spans tens of thousands of images.
"""

from collections.abc import Sequence
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from ns.core.errors import DataError

WINDOW_SHARDS = 8
"""Number of shards that are open together."""


class ShardShuffle:
    """Position in an endless stream → (shard, row) of the image.

    `copies`: per shard int [rows], the number of times that each row occurs in an epoch. Raises DataError if all are 0.
    """

    def __init__(self, copies: Sequence[npt.NDArray[np.integer]], seed: Sequence[int]) -> None:
        self._copies = copies
        self._seed = list(seed)
        self._sizes = np.array([int(shard.sum()) for shard in copies], np.int64)
        if self.epoch_size == 0:
            raise DataError("no images to train on: every shard is empty or everything was left out by the selection")
        self._window_rows = lru_cache(maxsize=2)(self._make_window)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    @cached_property
    def epoch_size(self) -> int:
        """Number of images in an epoch, including copies."""
        return int(self._sizes.sum())

    def positions(self, start: int, count: int) -> list[tuple[int, int]]:
        """(shard, row) of the positions [start, start + count) of the stream."""
        rows_taken: list[tuple[int, int]] = []
        while len(rows_taken) < count:
            epoch, offset = divmod(start + len(rows_taken), self.epoch_size)
            _, bounds = self._epoch(epoch)
            window = int(np.searchsorted(bounds, offset, side="right")) - 1
            rows = self._window_rows(epoch, window)
            first = offset - int(bounds[window])
            rows_taken += map(tuple, rows[first : first + count - len(rows_taken)].tolist())
        return rows_taken

    def prefetch(self, position: int) -> list[int]:
        """The shards of the window after that of `position`, which are needed next."""
        epoch, offset = divmod(position, self.epoch_size)
        shards, bounds = self._epoch(epoch)
        window = int(np.searchsorted(bounds, offset, side="right"))
        if window >= len(bounds) - 1:
            shards, window = self._epoch(epoch + 1)[0], 0
        return [int(shard) for shard in shards[window * WINDOW_SHARDS : (window + 1) * WINDOW_SHARDS]]

    def _make_epoch(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """int64 [shards] order of this epoch, and int64 [windows + 1] first position of each window, and the end."""
        shards = np.random.default_rng([*self._seed, epoch]).permutation(len(self._copies))
        ends = np.cumsum(self._sizes[shards])
        bounds = np.concatenate([[0], ends[WINDOW_SHARDS - 1 :: WINDOW_SHARDS]])
        if bounds[-1] != ends[-1]:
            bounds = np.append(bounds, ends[-1])
        return shards, bounds

    def _make_window(self, epoch: int, window: int) -> npt.NDArray[np.int64]:
        """int64 [n, 2] shard and row of each image in a window, shuffled."""
        shards, _ = self._epoch(epoch)
        members = shards[window * WINDOW_SHARDS : (window + 1) * WINDOW_SHARDS]
        rows = np.concatenate(
            [
                np.stack(
                    [np.full(self._sizes[shard], shard), np.repeat(np.arange(len(self._copies[shard])), self._copies[shard])], 1
                )
                for shard in members
            ]
        )
        return np.random.default_rng([*self._seed, epoch, window]).permutation(rows)
