"""How well and how fast the order of training mixes a pool, against a plain permutation of windows of eight shards.

    python -m benchmarks.order [--quick] [--json FILE] [--keep]

Pools of 8, 50 and 400 shards of generated copies: no image is read. Positions are taken as a training takes them, in steps of 512.

    seen_share               share of the kept images seen after three times as many positions, with equal and with unequal
                             copies; least case (a random draw of images with equal copies: 0.95)
    mix_error                largest relative deviation of a class's share in 50 steps from that in the selection; greatest case
    mib_per_worker           MiB that the order takes in each loader process beside the copies; greatest case
    order_throughput_ratio   positions per second ÷ those of a plain permutation, in which a window holds all copies; least case
"""

import tracemalloc
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from rich.table import Table

from benchmarks.measure import measure_rates, parse_arguments, record_ratio, write_benchmark
from ns.data.loading.sampler import ShardShuffle

SHARD_ROWS = 10_000
STEP = 512
STEPS = 50
CLASSES = 10
PLAIN_SHARDS = 8


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
        self._starts = np.concatenate([[0], np.cumsum([shard.sum() for shard in copies])[PLAIN_SHARDS - 1 :: PLAIN_SHARDS]])
        self._window_rows = lru_cache(maxsize=2)(self._make_window)

    def positions(self, start: int, count: int) -> list[tuple[int, int]]:
        rows_taken: list[tuple[int, int]] = []
        while len(rows_taken) < count:
            epoch, offset = divmod(start + len(rows_taken), int(self._starts[-1]))
            window = int(np.searchsorted(self._starts, offset, side="right")) - 1
            first = offset - int(self._starts[window])
            rows_taken += map(tuple, self._window_rows(epoch, window)[first : first + count - len(rows_taken)].tolist())
        return rows_taken

    def _make_window(self, epoch: int, window: int) -> npt.NDArray[np.int64]:
        members = range(window * PLAIN_SHARDS, (window + 1) * PLAIN_SHARDS)
        by_shard = [np.repeat(np.arange(len(self._copies[shard])), self._copies[shard]) for shard in members]
        rows = np.stack([np.repeat(members, list(map(len, by_shard))), np.concatenate(by_shard)], 1)
        return np.random.default_rng([epoch, window]).permutation(rows)


def main() -> None:
    options = parse_arguments(__doc__ or "")
    shards, rows = ((8, 48), 2000) if options.quick else ((8, 48, 400), SHARD_ROWS)
    rounds = 3 if options.quick else 5
    figures: dict[str, float] = {}
    quality = Table("shards", "copies", "seen", "mix error", "MiB")
    speed = Table("shards", "copies", "figure", "positions/s", "plain", "median", "range")
    worst: dict[str, list[float]] = {"seen_share": [], "mix_error": [], "mib_per_worker": []}
    for count in shards:
        for times in (1, 13, 100):
            uniform = make_pool(count, rows, (times,))
            mixed = make_pool(count, rows, (1, times))
            seen = min(measure_seen_share(uniform), measure_seen_share(mixed))
            worst["seen_share"].append(seen)
            mix, mib = measure_mix_error(mixed, 10 if options.quick else 40), measure_mib(mixed)
            worst["mix_error"].append(mix)
            worst["mib_per_worker"].append(mib)
            quality.add_row(str(count), f"1 and {times}", f"{seen:.3f}", f"{mix:.3f}", f"{mib:.2f}")
            ours, plain = ShardShuffle(mixed.copies, (0, 0)), PlainShuffle(mixed.copies)
            positions = min(int(plain._starts[-1]), 1_000_000)
            measured = measure_rates({"ours": make_reader(ours, positions), "plain": make_reader(plain, positions)}, rounds)
            record_ratio(figures, speed, "order_throughput_ratio", measured, ("ours", "plain"), (str(count), str(times)))
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


def measure_seen_share(pool: Pool) -> float:
    shuffle = ShardShuffle(pool.copies, (0, 0))
    seen = [np.zeros(len(shard), np.bool_) for shard in pool.copies]
    for start in range(0, 3 * pool.kept, STEP):
        for shard, row in shuffle.positions(start, min(STEP, 3 * pool.kept - start)):
            seen[shard][row] = True
    return sum(int(shard.sum()) for shard in seen) / pool.kept


def measure_mix_error(pool: Pool, stretches: int) -> float:
    shuffle = ShardShuffle(pool.copies, (0, 0))
    pairs = zip(pool.class_ids, pool.copies, strict=True)
    selected = np.sum([np.bincount(class_ids, copies, CLASSES) for class_ids, copies in pairs], 0)
    expected = selected / selected.sum()
    errors = []
    for start in range(0, min(shuffle.epoch_size, stretches * STEPS * STEP), STEPS * STEP):
        locations = shuffle.positions(start, STEPS * STEP)
        shares = np.bincount([pool.class_ids[shard][row] for shard, row in locations], minlength=CLASSES) / len(locations)
        errors.append(float(np.abs(shares / expected - 1).max()))
    return max(errors)


def measure_mib(pool: Pool) -> float:
    """Memory that a process holds after it went through three windows, without the copies."""
    tracemalloc.start()
    shuffle = ShardShuffle(pool.copies, (0, 0))
    position = 0
    for _ in range(3):
        *window, _ = shuffle._locate_position(position)
        position += shuffle._window_rows(*window).shape[1]
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return held / (1 << 20)


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
