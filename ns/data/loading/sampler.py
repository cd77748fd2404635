"""The order of training images: an endless shuffle as a pure function of (seed, position).

An epoch contains every image as often as it has copies. It is cut into as many passes as the largest number of copies. An image
is part of as many passes as it has copies, and they are spread evenly over the epoch: no pass holds an image twice, and each has
about the epoch's mix of images. (If the first pass held all images, rare classes, whose images have more copies, would come last.)

A window of shards is read at a time. If all shards fit into one window, a pass takes its images from all of them in random order.
Larger datasets are read in rounds, of which each goes through all shards in windows and holds about as many images as the dataset
has: several passes where some images have more copies than most. A window makes the passes of its round one after another. So the
number of times that a shard is opened depends on the mean number of copies, not on the largest.

Memory depends on the images in a window, not on their copies.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ns.core.errors import DataError

WINDOW_SHARDS = 128
"""Largest number of shards that are open together. Each holds a file, its index and its targets in every loader process."""

BLOCK_IMAGES = 1 << 14
"""Small passes are made several at a time, since each takes a tenth of a millisecond by itself."""

_OFFSETS, _SHARDS, _ROWS, _IMAGES = range(4)
"""What a generator draws: part of its seed, so that no two generators are equal."""


class _Round(NamedTuple):
    windows: list[npt.NDArray[np.int64]]
    """The shards of each window."""
    starts: list[int]
    """[windows + 1] first position of each window in the round, and the end."""


class _Groups(NamedTuple):
    """The images of a shard that have the same number of copies are a group."""

    sizes: npt.NDArray[np.int64]
    """[shards, groups] number of images."""
    visits: npt.NDArray[np.int64]
    """[shards, groups] number of visits in an epoch: images times copies."""
    offsets: npt.NDArray[np.int64]
    """[shards, groups] in [0, passes). They spread the rounding: without them all single images would be in one pass."""

    def select_shards(self, shards: npt.NDArray[np.int64]) -> "_Groups":
        return _Groups(self.sizes[shards], self.visits[shards], self.offsets[shards])


class _Window(NamedTuple):
    shards: npt.NDArray[np.int64]
    groups: _Groups
    """Those of the shards."""
    images: npt.NDArray[np.int32]
    """The kept images as index in `shards` and row, see `ShardShuffle._row_bits`; group after group, each in random order."""
    block_passes: list[int]
    """[blocks + 1] first pass of each block, and the end."""
    starts: list[int]
    """[blocks + 1] first position of each block in the window, and the end."""


class _Location(NamedTuple):
    epoch: int
    round_number: int
    window: int
    offset: int
    """Position in the window."""


class ShardShuffle:
    """Position in an endless stream → (shard, row) of the image."""

    def __init__(
        self, copies: Sequence[npt.NDArray[np.integer]], seed: Sequence[int], window_shards: int = WINDOW_SHARDS
    ) -> None:
        """`copies`: per shard int [rows], the number of times that each row occurs in an epoch.

        Raises DataError if all are 0.
        """
        self._copies = copies
        self._seed = list(seed)
        group_copies, self._group_sizes = _count_groups(copies)
        if len(group_copies) == 0:
            raise DataError("no images to train on: every shard is empty or everything was left out by the selection")
        self._group_visits = self._group_sizes * group_copies
        self.epoch_size = int(self._group_visits.sum())
        """Number of images in an epoch, including copies."""
        self._passes = int(group_copies[-1])
        self._kept_shards = np.flatnonzero(self._group_sizes.any(1))
        self._windows = -(-len(self._kept_shards) // window_shards)
        rounds = round(self.epoch_size / int(self._group_sizes.sum())) if self._windows > 1 else 1
        self._round_passes = [number * self._passes // rounds for number in range(rounds + 1)]
        """[rounds + 1] first pass of each round, and the end."""
        self._row_bits = max(map(len, copies)).bit_length()
        # Two, since the window after that of a position may belong to the next round or epoch.
        self._groups = lru_cache(maxsize=2)(self._make_groups)
        self._round_starts = lru_cache(maxsize=2)(self._count_round_starts)
        self._round = lru_cache(maxsize=2)(self._make_round)
        self._window = lru_cache(maxsize=1)(self._make_window)
        self._block = lru_cache(maxsize=1)(self._make_block)

    def positions(self, start: int, count: int) -> list[tuple[int, int]]:
        """(shard, row) of the positions [start, start + count) of the stream."""
        locations: list[tuple[int, int]] = []
        while len(locations) < count:
            epoch, round_number, number, offset = self._locate_window(start + len(locations))
            window = self._window(epoch, round_number, number)
            block = bisect_right(window.starts, offset) - 1
            first = offset - window.starts[block]
            images = self._block(epoch, round_number, number, block)[first : first + count - len(locations)]
            shards, rows = window.shards[images >> self._row_bits], images & ((1 << self._row_bits) - 1)
            locations += zip(shards.tolist(), rows.tolist(), strict=True)
        return locations

    def prefetch(self, position: int) -> list[int]:
        """The shards of the window of `position`, which are needed now, and of the window after it, which are needed next."""
        epoch, round_number, number, _ = self._locate_window(position)
        shards: list[int] = self._round(epoch, round_number).windows[number].tolist()
        if self._windows == 1:
            return shards
        following = number + 1
        if following == self._windows:
            following, round_number = 0, round_number + 1
        if round_number == len(self._round_passes) - 1:
            round_number, epoch = 0, epoch + 1
        return list(dict.fromkeys([*shards, *self._round(epoch, round_number).windows[following].tolist()]))

    def _locate_window(self, position: int) -> _Location:
        epoch, offset = divmod(position, self.epoch_size)
        round_starts = self._round_starts(epoch)
        round_number = bisect_right(round_starts, offset) - 1
        offset -= round_starts[round_number]
        window_starts = self._round(epoch, round_number).starts
        window = bisect_right(window_starts, offset) - 1
        return _Location(epoch, round_number, window, offset - window_starts[window])

    def _make_rng(self, epoch: int, *what: int) -> np.random.Generator:
        return np.random.default_rng([*self._seed, epoch, *what])

    def _make_groups(self, epoch: int) -> _Groups:
        offsets = self._make_rng(epoch, _OFFSETS).integers(0, self._passes, self._group_sizes.shape)
        return _Groups(self._group_sizes, self._group_visits, offsets)

    def _count_visits(self, groups: _Groups, pass_number: int) -> npt.NDArray[np.int64]:
        """int64 [shards, groups] number of visits of each group in an epoch before a pass."""
        visits: npt.NDArray[np.int64] = (pass_number * groups.visits + groups.offsets) // self._passes
        return visits

    def _count_round_starts(self, epoch: int) -> list[int]:
        return [int(self._count_visits(self._groups(epoch), number).sum()) for number in self._round_passes]

    def _make_round(self, epoch: int, round_number: int) -> _Round:
        # Neighbors in the order of shards often hold the same classes, so each window takes one shard of each neighborhood.
        shards = self._kept_shards
        neighborhoods = np.full((-(-len(shards) // self._windows), self._windows), -1)
        neighborhoods.flat[: len(shards)] = shards
        drawn = self._make_rng(epoch, _SHARDS, round_number).permuted(neighborhoods, axis=1)
        windows = [window[window >= 0] for window in drawn.T]
        groups = self._groups(epoch)
        first, stop = (self._count_visits(groups, number) for number in self._round_passes[round_number : round_number + 2])
        sizes = (stop - first).sum(1)
        return _Round(windows, [0, *accumulate(int(sizes[window].sum()) for window in windows)])

    def _make_window(self, epoch: int, round_number: int, number: int) -> _Window:
        shards = self._round(epoch, round_number).windows[number]
        images = np.concatenate(
            [self._list_rows(epoch, shard) | (index << self._row_bits) for index, shard in enumerate(shards.tolist())],
            dtype=np.int32,
            casting="same_kind",
        )
        groups = self._groups(epoch).select_shards(shards)
        first, stop = self._round_passes[round_number : round_number + 2]
        pass_images = int(groups.visits.sum()) // self._passes
        together = max(BLOCK_IMAGES // max(pass_images, groups.sizes.size), 1)
        block_passes = [*range(first, stop, together), stop]
        visits = [int(self._count_visits(groups, pass_number).sum()) for pass_number in block_passes]
        return _Window(shards, groups, images, block_passes, [count - visits[0] for count in visits])

    def _list_rows(self, epoch: int, shard: int) -> npt.NDArray[np.int64]:
        """The kept rows of a shard, group after group, each in the random order in which the passes of an epoch visit it."""
        copies = self._copies[shard]
        rows = np.flatnonzero(copies)
        if self._group_sizes.shape[1] > 1:  # Otherwise every pass visits all rows.
            self._make_rng(epoch, _ROWS, shard).shuffle(rows)
            rows = rows[np.argsort(copies[rows], kind="stable")]
        return rows

    def _make_block(self, epoch: int, round_number: int, number: int, block: int) -> npt.NDArray[np.int32]:
        """int32 [n] the images of a block's passes in a window, pass after pass, each shuffled."""
        window = self._window(epoch, round_number, number)
        passes = range(window.block_passes[block], window.block_passes[block + 1] + 1)
        visits = np.stack([self._count_visits(window.groups, pass_number).ravel() for pass_number in passes])
        counts = np.diff(visits, axis=0)
        # Shuffled as int64, of which NumPy shuffles twice as many per second as of int32.
        indices = _list_visits(window.groups.sizes.ravel(), visits[:-1], counts)
        rng = self._make_rng(epoch, _IMAGES, passes[0], number)
        for start, stop in pairwise([0, *accumulate(counts.sum(1).tolist())]):
            rng.shuffle(indices[start:stop])
        shuffled: npt.NDArray[np.int32] = window.images[indices]
        return shuffled


def _count_groups(copies: Sequence[npt.NDArray[np.integer]]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Returns int64 [groups] the numbers of copies above 0 that occur, ascending, and int64 [shards, groups] how many images have them."""
    counts = [np.bincount(shard) for shard in copies]
    occurs = np.zeros(max(map(len, counts), default=0), np.bool_)
    for shard_counts in counts:
        occurs[: len(shard_counts)] |= shard_counts > 0
    occurs[:1] = False
    group_copies = np.flatnonzero(occurs)
    sizes = np.zeros((len(copies), len(group_copies)), np.int64)
    for shard, shard_counts in enumerate(counts):
        occurring = group_copies[: np.searchsorted(group_copies, len(shard_counts))]
        sizes[shard, : len(occurring)] = shard_counts[occurring]
    return group_copies, sizes


def _list_visits(
    sizes: npt.NDArray[np.int64], first: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Indices of the images that passes visit, pass after pass, where groups of `sizes` images [groups] follow one another.

    A group's visits go through its images round and round: a pass makes `counts` [passes, groups] of them, at most one per image,
    from the visit numbered `first` [passes, groups] on.
    """
    starts = np.cumsum(sizes) - sizes
    begins = first % np.maximum(sizes, 1)
    until_end = np.minimum(counts, sizes - begins)
    # Two ranges per group: until its end, and from its start on.
    lengths = np.concatenate([until_end, counts - until_end], axis=1).ravel()
    range_starts = np.concatenate([starts + begins, np.broadcast_to(starts, first.shape)], axis=1).ravel()
    indices: npt.NDArray[np.int64] = np.repeat(range_starts - (np.cumsum(lengths) - lengths), lengths)
    indices += np.arange(len(indices))
    return indices
