"""Finds duplicates among any number of images, on disk in parts: memory grows with the duplicates, not with the images."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ns.data.fingerprint import Fingerprints
from ns.storage.scratch import explain_scratch_errors

PARTITIONS = 64
"""Files that images are sorted into, one of which is in memory at a time. A power of 2."""
MAX_NEIGHBORS = 5_000
"""Maximum number of images with the same band of the hash that an image is compared with. Only a pool of test patterns has more, and
time grows with the square of their number."""
MAX_MATCHES = 100
"""Maximum number of images with near hashes that an image is compared with by its pixels. Only cameras that do not move have more."""
MATCH_ROUNDS = 8
"""Pictures with equal hashes whose copies are found in time that grows with the copies, and not with their square."""
MIXER = np.uint64(0x9E3779B97F4A7C15)
SAME_DTYPE = np.dtype([("first", np.uint64), ("second", np.uint64), ("image", np.int64)])
HASH_DTYPE = np.dtype([("hash", np.uint64), ("image", np.int64)])

Ints = npt.NDArray[np.int64]

Match = Callable[[Ints, Ints], npt.NDArray[np.bool_]]
"""Pairs of images, by their numbers → bool [N]: whether the two, whose hashes are near, show the same picture."""


class ImagePairs(NamedTuple):
    """Images, by their number, each with an earlier one that it resembles. All columns are [N]."""

    later: Ints
    earlier: Ints
    bits: Ints
    """Bits of 64 in which the perceptual hashes differ."""


class DuplicatePairs(NamedTuple):
    same: ImagePairs
    """Equal bytes: the first image with these bytes, paired with each of the others. Bits are 0."""
    alike: ImagePairs
    """Equal hashes: the first image of each picture with this hash, paired with each of its copies. Most pairs of `same` are here
    too."""
    near: ImagePairs
    """Hashes that differ in a few bits: pairs of images that are the first of their picture and hash."""
    skipped: int
    """Comparisons left out because of MAX_NEIGHBORS or MAX_MATCHES."""


def find_duplicates(shards: Iterable[Fingerprints], scratch_dir: Path, bits: int, match: Match | None = None) -> DuplicatePairs:
    """Finds duplicates among all images, numbered through all shards in their order.

    Hashes are near if they differ in at most `bits` of 64 bits. Two such hashes share at least one of `bits` + 1 bands, so only
    images that share a band are compared. Of images with equal or near hashes, those count that `match` confirms; all of them without
    it. `scratch_dir` is an empty folder. Raises StoreError when it is full.
    """
    with explain_scratch_errors(scratch_dir, "sort fingerprints"):
        bands = np.array_split(np.arange(64), bits + 1)
        start = 0
        for shard in shards:
            images = np.arange(start, start + len(shard.phash))
            start += len(images)
            halves = np.frombuffer(shard.sha256.astype("S32").tobytes(), np.uint64).reshape(-1, 4)
            same = np.empty(len(images), SAME_DTYPE)
            same["first"], same["second"], same["image"] = halves[:, 0], halves[:, 1], images
            _append_partitions(scratch_dir, "same", same, same["first"])
            comparable = np.flatnonzero(shard.comparable)
            hashes = np.empty(len(comparable), HASH_DTYPE)
            hashes["hash"], hashes["image"] = shard.phash[comparable], images[comparable]
            _append_partitions(scratch_dir, "alike", hashes, hashes["hash"])
        same_pairs = [
            _pair_with_first(part, ("first", "second"))[1] for part in _read_partitions(scratch_dir, "same", SAME_DTYPE)
        ]
        alike_pairs = []
        for part in _read_partitions(scratch_dir, "alike", HASH_DTYPE):
            firsts, pairs = _pair_alike(part, match)
            alike_pairs.append(pairs)
            for number, band in enumerate(bands):
                _append_partitions(scratch_dir, f"band-{number}", firsts, _extract_band(firsts["hash"], band))
        near_pairs, skipped = [], 0
        for number in range(len(bands)):
            for part in _read_partitions(scratch_dir, f"band-{number}", HASH_DTYPE):
                pairs, uncompared = _compare_neighbors(part, bands[: number + 1], bits, match)
                near_pairs.append(pairs)
                skipped += uncompared
        return DuplicatePairs(_merge_pairs(same_pairs), _merge_pairs(alike_pairs), _merge_pairs(near_pairs), skipped)


def _extract_band(hashes: npt.NDArray[np.uint64], band: npt.NDArray[np.integer]) -> npt.NDArray[np.uint64]:
    return (hashes >> np.uint64(band[0])) & np.uint64((1 << len(band)) - 1)


def _append_partitions(scratch_dir: Path, name: str, records: npt.NDArray[np.void], keys: npt.NDArray[np.uint64]) -> None:
    # Multiplied, since the upper bits of all hashes or bands may be equal.
    parts = (keys * MIXER) >> np.uint64(64 - PARTITIONS.bit_length() + 1)
    order = np.argsort(parts, kind="stable")
    bounds = np.searchsorted(parts[order], np.arange(PARTITIONS + 1))
    for part in range(PARTITIONS):
        selected = records[order[bounds[part] : bounds[part + 1]]]
        if len(selected):
            with (scratch_dir / f"{name}-{part}").open("ab") as file:
                file.write(selected.tobytes())


def _read_partitions(scratch_dir: Path, name: str, dtype: np.dtype[np.void]) -> Iterator[npt.NDArray[np.void]]:
    for part in range(PARTITIONS):
        path = scratch_dir / f"{name}-{part}"
        if path.exists():
            yield np.frombuffer(path.read_bytes(), dtype)
            path.unlink()


def _pair_with_first(records: npt.NDArray[np.void], by: tuple[str, ...]) -> tuple[npt.NDArray[np.void], ImagePairs]:
    """The first record of each value, and all others paired with it."""
    ordered = np.sort(records, order=(*by, "image"))
    new = mark_changes(*(ordered[name] for name in by))
    firsts, others = ordered[new], ordered["image"][~new]
    earlier = firsts["image"][np.cumsum(new) - 1][~new]
    return firsts, ImagePairs(others, earlier, np.zeros(len(others), np.int64))


def _pair_alike(records: npt.NDArray[np.void], match: Match | None) -> tuple[npt.NDArray[np.void], ImagePairs]:
    """The first record of each picture, and its copies with an equal hash paired with it. Pictures beyond MATCH_ROUNDS of one hash
    are all taken for first ones; they are compared as neighbors are."""
    if match is None:
        return _pair_with_first(records, ("hash",))
    all_firsts, all_pairs = [], []
    for _ in range(MATCH_ROUNDS):
        firsts, pairs = _pair_with_first(records, ("hash",))
        confirmed = match(pairs.later, pairs.earlier)
        all_firsts.append(firsts)
        all_pairs.append(ImagePairs(*(column[confirmed] for column in pairs)))
        records = records[np.isin(records["image"], pairs.later[~confirmed])]
        if not len(records):
            break
    return np.concatenate([*all_firsts, records]), _merge_pairs(all_pairs)


def mark_changes(*columns: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """[N]: whether a row differs from the row before it; the first row always does."""
    changes = np.ones(len(columns[0]), np.bool_)
    changes[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return changes


def _compare_neighbors(
    records: npt.NDArray[np.void], bands: Sequence[npt.NDArray[np.integer]], bits: int, match: Match | None
) -> tuple[ImagePairs, int]:
    """All pairs that share the last of `bands` and none before it, and are near; and the number of pairs that were not compared."""
    keys = _extract_band(records["hash"], bands[-1])
    order = np.lexsort((records["hash"], keys))
    hashes, images, keys = records["hash"][order], records["image"][order], keys[order]
    pairs = []
    skipped = 0
    matches = np.zeros(len(keys), np.int64)
    remaining = np.arange(len(keys))
    for gap in range(1, MAX_NEIGHBORS + 1):
        remaining = remaining[remaining + gap < len(keys)]
        remaining = remaining[keys[remaining] == keys[remaining + gap]]
        if not len(remaining):
            break
        differing = hashes[remaining] ^ hashes[remaining + gap]
        distance = np.bitwise_count(differing)
        hits = distance <= bits
        for band in bands[:-1]:
            hits &= _extract_band(differing, band) != 0
        if match:
            within = matches[remaining] < MAX_MATCHES
            skipped += int((hits & ~within).sum())
            hits &= within
            matches[remaining[hits]] += 1
        first, second = images[remaining[hits]], images[remaining[hits] + gap]
        near = ImagePairs(np.maximum(first, second), np.minimum(first, second), distance[hits].astype(np.int64))
        confirmed = match(near.later, near.earlier) if match else slice(None)
        pairs.append(ImagePairs(*(column[confirmed] for column in near)))
    groups = np.unique(keys, return_counts=True)[1]
    beyond = np.maximum(groups - 1 - MAX_NEIGHBORS, 0)
    return _merge_pairs(pairs), skipped + int((beyond * (beyond + 1) // 2).sum())


def _merge_pairs(pairs: list[ImagePairs]) -> ImagePairs:
    """All pairs once, ordered by the later image, then by the earlier one."""
    if not pairs:
        return ImagePairs(*(np.zeros(0, np.int64) for _ in range(3)))
    table = np.unique(np.stack([np.concatenate(column) for column in zip(*pairs, strict=True)], 1), axis=0)
    return ImagePairs(table[:, 0], table[:, 1], table[:, 2])
