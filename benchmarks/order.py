"""How well and how fast the order of training mixes a pool, against the plain order: windows of eight shards with all their copies.

    python -m benchmarks.order [--quick] [--json FILE] [--keep]

Pools of 8, 50 and 400 shards of generated copies: no image is read. Either all images have 1, 13 or 100 copies, or half of the classes
have so many, and as many fewer images. Positions are taken as a training takes them, in steps of 512.

    seen_share               share of the kept images seen after three times as many positions; least case (a random draw: 0.95)
    mix_error                largest relative deviation of a class's share in 50 steps from that in the selection; greatest case, of
                             classes that are spread over the shards and of shards that hold one class each
    mib_per_worker           MiB that the order takes in each loader process beside the copies; greatest case
    order_throughput_ratio   positions per second of CPU time ÷ those of the plain order; least case
"""

import time
import tracemalloc
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from rich.table import Table

from benchmarks.measure import measure_rates, parse_arguments, record_ratio, write_benchmark
from ns.data.loading.sampler import ShardShuffle

SHARD_ROWS = 10_000
STEP = 512
MIX_POSITIONS = 50 * STEP
CLASSES = 10
PLAIN_SHARDS = 8
SHARD_NUMBERS = (8, 50, 400)
COPIES = ((1,), (13,), (100,), (1, 13), (1, 100))
"""Copies of an image, by class: class i of a pool has the i-th number, and again from the first."""


class Pool(NamedTuple):
    copies: list[npt.NDArray[np.uint8]]
    class_ids: list[npt.NDArray[np.int64]]

    @property
    def kept(self) -> int:
        return sum(int(np.count_nonzero(shard)) for shard in self.copies)


class PlainShuffle:
    """The images of eight shards with all their copies in random order, then those of the next eight."""

    def __init__(self, copies: Sequence[npt.NDArray[np.uint8]]) -> None:
        self._copies = copies
        windows = [copies[first : first + PLAIN_SHARDS] for first in range(0, len(copies), PLAIN_SHARDS)]
        self.starts = [0, *accumulate(sum(int(shard.sum()) for shard in window) for window in windows)]
        self._window_rows = lru_cache(maxsize=2)(self._make_window)

    def positions(self, start: int, count: int) -> list[tuple[int, int]]:
        locations: list[tuple[int, int]] = []
        while len(locations) < count:
            epoch, offset = divmod(start + len(locations), self.starts[-1])
            window = bisect_right(self.starts, offset) - 1
            first = offset - self.starts[window]
            locations += map(tuple, self._window_rows(epoch, window)[first : first + count - len(locations)].tolist())
        return locations

    def _make_window(self, epoch: int, window: int) -> npt.NDArray[np.int64]:
        shards = range(window * PLAIN_SHARDS, min((window + 1) * PLAIN_SHARDS, len(self._copies)))
        by_shard = [np.repeat(np.arange(len(self._copies[shard])), self._copies[shard]) for shard in shards]
        rows = np.stack([np.repeat(shards, list(map(len, by_shard))), np.concatenate(by_shard)], 1)
        return np.random.default_rng([epoch, window]).permutation(rows)


def main() -> None:
    options = parse_arguments(__doc__ or "")
    rows, rounds = (5_000, 3) if options.quick else (SHARD_ROWS, 5)
    # A quick run leaves out what is between the ends.
    every = 2 if options.quick else 1
    figures: dict[str, float] = {}
    quality = Table("shards", "copies", "seen", "mix error", "one class per shard", "MiB")
    speed = Table("shards", "copies", "figure", "positions/s", "plain", "median", "range")
    worst: dict[str, list[float]] = {"seen_share": [], "mix_error": [], "mib_per_worker": []}
    for shards in SHARD_NUMBERS[::every]:
        for times in COPIES[::every]:
            pool, copies = make_pool(shards, rows, times), "+".join(map(str, times))
            seen, mib = measure_seen_share(pool), measure_mib(pool)
            mixed = measure_mix_error(pool)
            sorted_by_class = measure_mix_error(sort_by_class(pool)) if len(times) == 1 else None
            worst["seen_share"].append(seen)
            worst["mib_per_worker"].append(mib)
            worst["mix_error"].append(max(mixed, sorted_by_class or 0))
            topics = "" if sorted_by_class is None else f"{sorted_by_class:.3f}"
            quality.add_row(str(shards), copies, f"{seen:.3f}", f"{mixed:.3f}", topics, f"{mib:.2f}")
            ours, plain = ShardShuffle(pool.copies, (0, 0)), PlainShuffle(pool.copies)
            # Whole windows: most of a plain one's time goes into its beginning.
            positions = max(plain.starts[1], 1_000_000)
            readers = {"ours": make_reader(ours, positions), "plain": make_reader(plain, positions)}
            measured = measure_rates(readers, rounds, time.process_time)
            record_ratio(figures, speed, "order_throughput_ratio", measured, ("ours", "plain"), (str(shards), copies))
    figures |= {
        "seen_share": round(min(worst["seen_share"]), 4),
        "mix_error": round(max(worst["mix_error"]), 4),
        "mib_per_worker": round(max(worst["mib_per_worker"]), 2),
    }
    write_benchmark("order", figures, options, quality, speed)


def make_pool(shards: int, rows: int, times: Sequence[int]) -> Pool:
    """Of ten classes that are spread over the shards, class i has times[i % len(times)] copies of as many fewer images.

    All classes are equally frequent in an epoch.
    """
    rng = np.random.default_rng(0)
    by_class = np.array([times[class_id % len(times)] for class_id in range(CLASSES)])
    frequency = 1 / by_class
    class_ids = [rng.choice(CLASSES, rows, p=frequency / frequency.sum()) for _ in range(shards)]
    return Pool([by_class[shard].astype(np.uint8) for shard in class_ids], class_ids)


def sort_by_class(pool: Pool) -> Pool:
    """The same copies, but each shard holds one class: the order of an archive whose folders are classes."""
    shards = len(pool.copies)
    return Pool(pool.copies, [np.full(len(copies), shard * CLASSES // shards) for shard, copies in enumerate(pool.copies)])


def measure_seen_share(pool: Pool) -> float:
    shuffle = ShardShuffle(pool.copies, (0, 0))
    seen = np.zeros((len(pool.copies), len(pool.copies[0])), np.bool_)
    for start in range(0, 3 * pool.kept, MIX_POSITIONS):
        shards, rows = zip(*shuffle.positions(start, min(MIX_POSITIONS, 3 * pool.kept - start)), strict=True)
        seen[list(shards), list(rows)] = True
    return int(seen.sum()) / pool.kept


def measure_mix_error(pool: Pool) -> float:
    shuffle = ShardShuffle(pool.copies, (0, 0))
    pairs = zip(pool.class_ids, pool.copies, strict=True)
    selected = np.sum([np.bincount(class_ids, copies, CLASSES) for class_ids, copies in pairs], 0)
    present = selected > 0
    errors = []
    # Spread over two epochs.
    for start in np.linspace(0, 2 * shuffle.epoch_size, 40, dtype=np.int64).tolist():
        locations = shuffle.positions(start, MIX_POSITIONS)
        shares = np.bincount([pool.class_ids[shard][row] for shard, row in locations], minlength=CLASSES) / len(locations)
        errors.append(float(np.abs(shares[present] / (selected[present] / selected.sum()) - 1).max()))
    return max(errors)


def measure_mib(pool: Pool) -> float:
    """Memory that a process holds at most at a few positions of an epoch, without the copies."""
    held = []
    tracemalloc.start()
    shuffle = ShardShuffle(pool.copies, (0, 0))
    for position in np.linspace(0, shuffle.epoch_size, 4, dtype=np.int64).tolist():
        shuffle.positions(position, STEP)
        held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    return max(held) / (1 << 20)


def make_reader(shuffle: ShardShuffle | PlainShuffle, positions: int) -> Callable[[], int]:
    at = 0

    def read_steps() -> int:
        nonlocal at
        for start in range(at, at + positions, STEP):
            shuffle.positions(start, STEP)
        at += positions
        return positions

    return read_steps


if __name__ == "__main__":
    main()
