"""Duplicates among any number of images, found on disk a part at a time: memory grows with what is found, not with the images."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ns.data.fingerprint import Fingerprints
from ns.data.scratch import writing

PARTS = 64
"""Files that images are sorted into; one is in memory at a time."""
NEIGHBOURS = 5_000
"""An image is compared with so many others that share a quarter of its hash. More is a pool of test patterns, and would take
the square of their number."""
MIXER = np.uint64(0x9E3779B97F4A7C15)
SAME = np.dtype([("first", np.uint64), ("second", np.uint64), ("image", np.int64)])
HASH = np.dtype([("hash", np.uint64), ("image", np.int64)])

Ints = npt.NDArray[np.int64]


class Pairs(NamedTuple):
    """Images, by their number, with an earlier one each that they resemble."""

    later: Ints
    earlier: Ints
    bits: Ints
    """Of 64, in which the perceptual hashes differ."""


class Found(NamedTuple):
    same: Pairs
    """Equal bytes: each image but the first of its kind, with the first. Bits are 0."""
    alike: Pairs
    """Equal hashes: each image but the first, with the first. Holds most of `same` too."""
    near: Pairs
    """Hashes that differ in a few bits, between images that are the first with their hash."""
    skipped: int
    """Comparisons left out at NEIGHBOURS."""


def find(shards: Iterable[Fingerprints], scratch: Path, bits: int) -> Found:
    """Finds duplicates among all images, numbered through all shards in their order.

    `bits`: hashes that differ in at most so many of 64 bits are near. Two such hashes have at least one of `bits` + 1 bands in
    common, so that only those that share a band are compared. `scratch` is an empty folder; raises StoreError when it is full.
    """
    with writing(scratch, "sort fingerprints"):
        return _find(shards, scratch, bits)


def _find(shards: Iterable[Fingerprints], scratch: Path, bits: int) -> Found:
    bands = np.array_split(np.arange(64), bits + 1)
    start = 0
    for shard in shards:
        images = np.arange(start, start + len(shard.phash))
        start += len(images)
        halves = np.frombuffer(shard.sha256.astype("S32").tobytes(), np.uint64).reshape(-1, 4)
        same = np.empty(len(images), SAME)
        same["first"], same["second"], same["image"] = halves[:, 0], halves[:, 1], images
        _sort_into(scratch, "same", same, same["first"])
        wanted = np.flatnonzero(shard.comparable)
        hashes = np.empty(len(wanted), HASH)
        hashes["hash"], hashes["image"] = shard.phash[wanted], images[wanted]
        _sort_into(scratch, "alike", hashes, hashes["hash"])
    same_pairs = [_firsts(part, ("first", "second"))[1] for part in _parts(scratch, "same", SAME)]
    alike_pairs = []
    for part in _parts(scratch, "alike", HASH):
        firsts, pairs = _firsts(part, ("hash",))
        alike_pairs.append(pairs)
        for number, band in enumerate(bands):
            _sort_into(scratch, f"band-{number}", firsts, _band(firsts["hash"], band))
    near_pairs, skipped = [], 0
    for number, band in enumerate(bands):
        for part in _parts(scratch, f"band-{number}", HASH):
            pairs, left = _compare(part, _band(part["hash"], band), bits)
            near_pairs.append(pairs)
            skipped += left
    return Found(_joined(same_pairs), _joined(alike_pairs), _joined(near_pairs), skipped)


def _band(hashes: npt.NDArray[np.uint64], band: npt.NDArray[np.integer]) -> npt.NDArray[np.uint64]:
    return (hashes >> np.uint64(band[0])) & np.uint64((1 << len(band)) - 1)


def _sort_into(scratch: Path, name: str, records: npt.NDArray[np.void], keys: npt.NDArray[np.uint64]) -> None:
    # Multiplied, as the upper bits of a hash or a band may all be alike.
    parts = (keys * MIXER) >> np.uint64(64 - PARTS.bit_length() + 1)
    order = np.argsort(parts, kind="stable")
    bounds = np.searchsorted(parts[order], np.arange(PARTS + 1))
    for part in range(PARTS):
        chosen = records[order[bounds[part] : bounds[part + 1]]]
        if len(chosen):
            with (scratch / f"{name}-{part}").open("ab") as file:
                file.write(chosen.tobytes())


def _parts(scratch: Path, name: str, kind: np.dtype[np.void]) -> Iterator[npt.NDArray[np.void]]:
    for part in range(PARTS):
        file = scratch / f"{name}-{part}"
        if file.exists():
            yield np.frombuffer(file.read_bytes(), kind)
            file.unlink()


def _firsts(records: npt.NDArray[np.void], by: tuple[str, ...]) -> tuple[npt.NDArray[np.void], Pairs]:
    """The first image of each kind, and all others paired with it."""
    ordered = np.sort(records, order=(*by, "image"))
    new = np.ones(len(ordered), np.bool_)
    new[1:] = np.any([ordered[name][1:] != ordered[name][:-1] for name in by], axis=0)
    firsts = ordered[new]
    others = ~new
    earlier = firsts["image"][np.cumsum(new) - 1][others]
    return firsts, Pairs(ordered["image"][others], earlier, np.zeros(int(others.sum()), np.int64))


def _compare(records: npt.NDArray[np.void], keys: npt.NDArray[np.uint64], bits: int) -> tuple[Pairs, int]:
    """All pairs that share a key and are near, and how many were not compared."""
    order = np.lexsort((records["hash"], keys))
    hashes, images, keys = records["hash"][order], records["image"][order], keys[order]
    found = []
    left = np.arange(len(keys))
    for step in range(1, NEIGHBOURS + 1):
        left = left[left + step < len(keys)]
        left = left[keys[left] == keys[left + step]]
        if not len(left):
            break
        distance = np.bitwise_count(hashes[left] ^ hashes[left + step])
        hits = distance <= bits
        one, other = images[left[hits]], images[left[hits] + step]
        found.append(Pairs(np.maximum(one, other), np.minimum(one, other), distance[hits].astype(np.int64)))
    groups = np.unique(keys, return_counts=True)[1]
    beyond = np.maximum(groups - 1 - NEIGHBOURS, 0)
    return _joined(found), int((beyond * (beyond + 1) // 2).sum())


def _joined(pairs: list[Pairs]) -> Pairs:
    """Without repetitions, by the number of the later image, then that of the earlier."""
    if not pairs:
        return Pairs(*(np.zeros(0, np.int64) for _ in range(3)))
    table = np.unique(np.stack([np.concatenate(column) for column in zip(*pairs, strict=True)], 1), axis=0)
    return Pairs(table[:, 0], table[:, 1], table[:, 2])
