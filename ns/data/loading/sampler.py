"""The order of training images: an endless shuffle as a pure function of (seed, position).

An epoch contains every image as often as it has copies. It is cut into as many passes as the largest number of copies, and an
image's copies are spread over them: every pass has the epoch's mix of images. Of a pass, a window of shards is open at a time,
from which images are drawn in random order. Memory depends on the images of a window, not on their copies.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ns.core.errors import DataError

WINDOW_IMAGES = 100_000
"""A window has at least so many images, if the pass has as many and `MAX_WINDOW_SHARDS` suffice."""
MIN_WINDOW_SHARDS = 8
MAX_WINDOW_SHARDS = 64
"""Largest number of shards that are open together."""

_OFFSETS, _ROWS, _SHARDS, _WINDOW = range(4)
"""What a generator draws: part of its seed, so that no two generators are equal."""


class _Groups(NamedTuple):
    """The images of a shard that have the same number of copies are a group; groups are ordered by shard, then by copies."""

    shards: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    """Number of images of each group."""
    visits: npt.NDArray[np.int64]
    """The same, including copies."""
    starts: npt.NDArray[np.int64]
    """[shards + 1] first group of each shard, and the end."""


class _Epoch(NamedTuple):
    offsets: npt.NDArray[np.int64]
    """[groups] in [0, passes). They spread the rounding: without them, all groups of one image would be in the same pass."""
    starts: npt.NDArray[np.int64]
    """[passes + 1] first position of each pass in the epoch, and the end."""


class _Pass(NamedTuple):
    shards: npt.NDArray[np.int64]
    """Shards with images in this pass, in its order."""
    cuts: list[int]
    """[windows + 1] index of each window's first shard in `shards`, and the end."""
    starts: npt.NDArray[np.int64]
    """[windows + 1] first position of each window in the pass, and the end."""


class _Location(NamedTuple):
    epoch: int
    pass_number: int
    window: int
    offset: int
    """Position in the window."""


class ShardShuffle:
    """Position in an endless stream → (shard, row) of the image.

    No image occurs twice in a pass, and none of a shard's images with as many copies occurs again before all of them have
    occurred. `copies`: per shard int [rows], the number of times that each row occurs in an epoch. Raises DataError if all are 0.
    """

    def __init__(self, copies: Sequence[npt.NDArray[np.integer]], seed: Sequence[int]) -> None:
        self._copies = copies
        self._seed = list(seed)
        self._passes = max((int(shard.max(initial=0)) for shard in copies), default=0)
        if self._passes == 0:
            raise DataError("no images to train on: every shard is empty or everything was left out by the selection")
        self._groups = _make_groups(copies)
        self.epoch_size = int(self._groups.visits.sum())
        """Number of images in an epoch, including copies."""
        # The current one and the next.
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._pass = lru_cache(maxsize=2)(self._make_pass)
        self._window_rows = lru_cache(maxsize=2)(self._make_window)
        self._permuted_rows = lru_cache(maxsize=MAX_WINDOW_SHARDS)(self._permute_rows)

    def positions(self, start: int, count: int) -> list[tuple[int, int]]:
        """(shard, row) of the positions [start, start + count) of the stream."""
        rows_taken: list[tuple[int, int]] = []
        while len(rows_taken) < count:
            *window, offset = self._locate_position(start + len(rows_taken))
            rows = self._window_rows(*window)[:, offset : offset + count - len(rows_taken)]
            rows_taken += zip(*rows.tolist(), strict=True)
        return rows_taken

    def prefetch(self, position: int) -> list[int]:
        """The shards of the window after that of `position`, which are needed next."""
        epoch, pass_number, window, _ = self._locate_position(position)
        window += 1
        if window == len(self._pass(epoch, pass_number).cuts) - 1:
            pass_number, window = pass_number + 1, 0
            if pass_number == self._passes:
                epoch, pass_number = epoch + 1, 0
        return self._list_window_shards(epoch, pass_number, window)

    def _locate_position(self, position: int) -> _Location:
        epoch, offset = divmod(position, self.epoch_size)
        pass_starts = self._epoch(epoch).starts
        pass_number = int(np.searchsorted(pass_starts, offset, side="right")) - 1
        offset -= int(pass_starts[pass_number])
        window_starts = self._pass(epoch, pass_number).starts
        window = int(np.searchsorted(window_starts, offset, side="right")) - 1
        return _Location(epoch, pass_number, window, offset - int(window_starts[window]))

    def _list_window_shards(self, epoch: int, pass_number: int, window: int) -> list[int]:
        shards, cuts, _ = self._pass(epoch, pass_number)
        listed: list[int] = shards[cuts[window] : cuts[window + 1]].tolist()
        return listed

    def _make_rng(self, epoch: int, *what: int) -> np.random.Generator:
        return np.random.default_rng([*self._seed, epoch, *what])

    def _make_epoch(self, epoch: int) -> _Epoch:
        offsets = self._make_rng(epoch, _OFFSETS).integers(0, self._passes, len(self._groups.visits))
        starts = [int(self._count_visits(offsets, number).sum()) for number in range(self._passes + 1)]
        return _Epoch(offsets, np.array(starts, np.int64))

    def _count_visits(
        self, offsets: npt.NDArray[np.int64], pass_number: int, groups: slice = slice(None)
    ) -> npt.NDArray[np.int64]:
        """Of each group, the number of images of an epoch before a pass, including copies."""
        return (pass_number * self._groups.visits[groups] + offsets[groups]) // self._passes

    def _make_pass(self, epoch: int, pass_number: int) -> _Pass:
        offsets = self._epoch(epoch).offsets
        counts = self._count_visits(offsets, pass_number + 1) - self._count_visits(offsets, pass_number)
        # Sums of integers below 2⁵³ are exact in float64.
        sizes = np.bincount(self._groups.shards, counts, len(self._copies)).astype(np.int64)
        shards = self._make_rng(epoch, _SHARDS, pass_number).permutation(np.flatnonzero(sizes))
        cuts = cut_windows(sizes[shards])
        return _Pass(shards, cuts, np.concatenate([[0], np.cumsum(sizes[shards])])[cuts])

    def _make_window(self, epoch: int, pass_number: int, window: int) -> npt.NDArray[np.int32]:
        """int32 [2, n] shard and row of each image in a window, shuffled."""
        shards = self._list_window_shards(epoch, pass_number, window)
        by_shard = [self._take_rows(epoch, pass_number, shard) for shard in shards]
        rows = np.stack([np.repeat(shards, list(map(len, by_shard))), np.concatenate(by_shard)]).astype(np.int32)
        shuffled: npt.NDArray[np.int32] = rows[
            :, self._make_rng(epoch, _WINDOW, pass_number, window).permutation(rows.shape[1])
        ]
        return shuffled

    def _take_rows(self, epoch: int, pass_number: int, shard: int) -> npt.NDArray[np.integer]:
        """The rows of a shard that a pass visits: from the permutation of each group those after the last pass's, round and round."""
        groups = slice(int(self._groups.starts[shard]), int(self._groups.starts[shard + 1]))
        offsets, sizes = self._epoch(epoch).offsets, self._groups.rows[groups]
        first = self._count_visits(offsets, pass_number, groups)
        counts = self._count_visits(offsets, pass_number + 1, groups) - first
        if np.array_equal(counts, sizes):
            return np.flatnonzero(self._copies[shard])
        visits = np.arange(counts.sum()) + np.repeat(first - (np.cumsum(counts) - counts), counts)
        group_starts = np.repeat(np.cumsum(sizes) - sizes, counts)
        taken: npt.NDArray[np.integer] = self._permuted_rows(epoch, shard)[group_starts + visits % np.repeat(sizes, counts)]
        return taken

    def _permute_rows(self, epoch: int, shard: int) -> npt.NDArray[np.integer]:
        """The kept rows of a shard, group after group, each in random order."""
        copies = self._copies[shard]
        # A permutation of all images, sorted by copies, is a permutation of each group.
        kept = self._make_rng(epoch, _ROWS, shard).permutation(np.flatnonzero(copies).astype(np.int32))
        permuted: npt.NDArray[np.integer] = kept[np.argsort(copies[kept], kind="stable")]
        return permuted


def cut_windows(sizes: npt.NDArray[np.int64]) -> list[int]:
    """Cuts shards, of `sizes` images each, into windows of about equal numbers of images.

    Returns [windows + 1] the first shard of each window, and the end.
    """
    shards, ends = len(sizes), np.cumsum(sizes)
    total, largest = int(ends[-1]), int(sizes.max())
    # A cut is at most half a shard from where it would be without shards.
    count = max(total // (WINDOW_IMAGES + largest), -(-shards // MAX_WINDOW_SHARDS))
    count = min(count, max(shards // MIN_WINDOW_SHARDS, 1))
    even_cuts = np.searchsorted(ends - sizes / 2, np.arange(1, count) * total / count).tolist()
    cuts = [0]
    for left, cut in zip(range(count - 1, 0, -1), even_cuts, strict=True):
        # The windows that are left need shards too, and cannot take any number.
        least = max(cuts[-1] + MIN_WINDOW_SHARDS, shards - left * MAX_WINDOW_SHARDS)
        most = min(cuts[-1] + MAX_WINDOW_SHARDS, shards - left * MIN_WINDOW_SHARDS)
        cuts.append(min(max(cut, least), most))
    return [*cuts, shards]


def _make_groups(copies: Sequence[npt.NDArray[np.integer]]) -> _Groups:
    shards, values, rows = [], [], []
    for shard, shard_copies in enumerate(copies):
        counts = np.bincount(shard_copies)
        counts[:1] = 0
        present = np.flatnonzero(counts)
        shards.append(np.full(len(present), shard))
        values.append(present)
        rows.append(counts[present])
    shards_of_groups, sizes = np.concatenate(shards), np.concatenate(rows)
    starts = np.searchsorted(shards_of_groups, np.arange(len(copies) + 1))
    return _Groups(shards_of_groups, sizes, sizes * np.concatenate(values), starts)
