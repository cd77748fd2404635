"""Duplicates among any number of images, found on disk a part at a time: memory grows with what is found, not with the images."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ns.data.fingerprint import Fingerprints
from ns.data.scratch import explain_scratch_errors

PARTITIONS = 64
"""Files that images are sorted into; one is in memory at a time."""
MAX_NEIGHBORS = 5_000
"""An image is compared with so many others that share a quarter of its hash. More is a pool of test patterns, and would take
the square of their number."""
MIXER = np.uint64(0x9E3779B97F4A7C15)
SAME_DTYPE = np.dtype([("first", np.uint64), ("second", np.uint64), ("image", np.int64)])
HASH_DTYPE = np.dtype([("hash", np.uint64), ("image", np.int64)])

Ints = npt.NDArray[np.int64]


class ImagePairs(NamedTuple):
    """Images, by their number, with an earlier one each that they resemble."""

    later: Ints
    earlier: Ints
    bits: Ints
    """Of 64, in which the perceptual hashes differ."""


class DuplicatePairs(NamedTuple):
    same: ImagePairs
    """Equal bytes: each image but the first of its kind, with the first. Bits are 0."""
    alike: ImagePairs
    """Equal hashes: each image but the first, with the first. Holds most of `same` too."""
    near: ImagePairs
    """Hashes that differ in a few bits, between images that are the first with their hash."""
    skipped: int
    """Comparisons left out at NEIGHBORS."""


def find_duplicates(shards: Iterable[Fingerprints], scratch_dir: Path, bits: int) -> DuplicatePairs:
    """Finds duplicates among all images, numbered through all shards in their order.

    `bits`: hashes that differ in at most so many of 64 bits are near. Two such hashes have at least one of `bits` + 1 bands in
    common, so that only those that share a band are compared. `scratch` is an empty folder; raises StoreError when it is full.
    """
    with explain_scratch_errors(scratch_dir, "sort fingerprints"):
        return _find_pairs(shards, scratch_dir, bits)


def _find_pairs(shards: Iterable[Fingerprints], scratch_dir: Path, bits: int) -> DuplicatePairs:
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
    same_pairs = [_pair_with_first(part, ("first", "second"))[1] for part in _read_partitions(scratch_dir, "same", SAME_DTYPE)]
    alike_pairs = []
    for part in _read_partitions(scratch_dir, "alike", HASH_DTYPE):
        firsts, pairs = _pair_with_first(part, ("hash",))
        alike_pairs.append(pairs)
        for number, band in enumerate(bands):
            _append_partitions(scratch_dir, f"band-{number}", firsts, _extract_band(firsts["hash"], band))
    near_pairs, skipped = [], 0
    for number, band in enumerate(bands):
        for part in _read_partitions(scratch_dir, f"band-{number}", HASH_DTYPE):
            pairs, uncompared = _compare_neighbors(part, _extract_band(part["hash"], band), bits)
            near_pairs.append(pairs)
            skipped += uncompared
    return DuplicatePairs(_merge_pairs(same_pairs), _merge_pairs(alike_pairs), _merge_pairs(near_pairs), skipped)


def _extract_band(hashes: npt.NDArray[np.uint64], band: npt.NDArray[np.integer]) -> npt.NDArray[np.uint64]:
    return (hashes >> np.uint64(band[0])) & np.uint64((1 << len(band)) - 1)


def _append_partitions(scratch_dir: Path, name: str, records: npt.NDArray[np.void], keys: npt.NDArray[np.uint64]) -> None:
    # Multiplied, as the upper bits of a hash or a band may all be alike.
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
    """The first image of each kind, and all others paired with it."""
    ordered = np.sort(records, order=(*by, "image"))
    new = np.ones(len(ordered), np.bool_)
    new[1:] = np.any([ordered[name][1:] != ordered[name][:-1] for name in by], axis=0)
    firsts = ordered[new]
    others = ~new
    earlier = firsts["image"][np.cumsum(new) - 1][others]
    return firsts, ImagePairs(ordered["image"][others], earlier, np.zeros(int(others.sum()), np.int64))


def _compare_neighbors(records: npt.NDArray[np.void], keys: npt.NDArray[np.uint64], bits: int) -> tuple[ImagePairs, int]:
    """All pairs that share a key and are near, and how many were not compared."""
    order = np.lexsort((records["hash"], keys))
    hashes, images, keys = records["hash"][order], records["image"][order], keys[order]
    pairs = []
    remaining = np.arange(len(keys))
    for gap in range(1, MAX_NEIGHBORS + 1):
        remaining = remaining[remaining + gap < len(keys)]
        remaining = remaining[keys[remaining] == keys[remaining + gap]]
        if not len(remaining):
            break
        distance = np.bitwise_count(hashes[remaining] ^ hashes[remaining + gap])
        hits = distance <= bits
        first, second = images[remaining[hits]], images[remaining[hits] + gap]
        pairs.append(ImagePairs(np.maximum(first, second), np.minimum(first, second), distance[hits].astype(np.int64)))
    groups = np.unique(keys, return_counts=True)[1]
    beyond = np.maximum(groups - 1 - MAX_NEIGHBORS, 0)
    return _merge_pairs(pairs), int((beyond * (beyond + 1) // 2).sum())


def _merge_pairs(pairs: list[ImagePairs]) -> ImagePairs:
    """Without repetitions, by the number of the later image, then that of the earlier."""
    if not pairs:
        return ImagePairs(*(np.zeros(0, np.int64) for _ in range(3)))
    table = np.unique(np.stack([np.concatenate(column) for column in zip(*pairs, strict=True)], 1), axis=0)
    return ImagePairs(table[:, 0], table[:, 1], table[:, 2])
