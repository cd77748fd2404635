"""The leak guard: which images of a pool are also in an evaluation set, and what else is there twice.

FOLDER/check.json             counts; written last
FOLDER/duplicates.parquet     each image that resembles an earlier one: evaluation sets come first, then labelled data, then the pool
FOLDER/left_out.parquet       images of the pool that resemble one of an evaluation set: no pseudo-label is made of them
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ns.data import duplicates, fingerprint
from ns.data.dataset import Dataset, Role
from ns.data.index import ShardIndex
from ns.data.loading.decode import Encoded
from ns.data.loading.shard_reader import ImageSource
from ns.data.scratch import scratch
from ns.storage import Store
from ns.storage.documents import Document, Identified
from ns.storage.parquet import read_table

MANIFEST = "check.json"
DUPLICATES = "duplicates.parquet"
LEFT_OUT = "left_out.parquet"
BITS = 4
"""Of 64 in which perceptual hashes of the same picture may differ. On CIFAR-10's images (32 px, the hardest case): JPEG at quality
70 changes no more in 100 %, at 40 in 99 %, resizing to 24 or 64 px and brightness × 0.8 or 1.1 in 99 to 100 %, a shift by a
pixel in 9 %. Of two different images, 3 in 10 million pairs are taken for one, some of which CIFAR-10 really has twice."""
ALIKE = 0.9
"""Cosine of a model's features from which two near images are taken for one, where there is a model."""

SCHEMA = pa.schema(
    [
        ("dataset", pa.string()),
        ("shard", pa.string()),
        ("row", pa.int64()),
        ("key", pa.string()),
        ("like", pa.string()),
        ("like_key", pa.string()),
        ("same_bytes", pa.bool_()),
        ("bits", pa.int64()),
    ]
)
ROWS = 10_000
"""Of a list, in memory at a time."""

Features = Callable[[Sequence[Encoded | bytes]], npt.NDArray[np.float32]]
"""Encoded images → float32 [N, D]."""


class Checked(NamedTuple):
    """A dataset and what to call it."""

    name: str
    folder: Store
    data: Dataset
    used_as: Role | None = None
    """Where that is not what it was imported as: a pool may have labels."""

    @property
    def role(self) -> Role:
        return self.used_as or self.data.role


class Overlap(Document):
    """Images of one dataset that resemble an image of another, or an earlier one of the same."""

    of: str
    within: str
    same: int
    """Equal bytes."""
    near: int
    """Not equal, but alike in what they show."""


class CheckReport(Identified):
    format: Literal[1] = 1
    datasets: dict[str, str]
    """Name → digest."""
    images: dict[str, int]
    classes: dict[str, dict[str, int]]
    """Labelled dataset → class → images."""
    overlaps: tuple[Overlap, ...]
    left_out: int
    """Images of pools that resemble one of an evaluation set."""
    bits: int
    skipped: int
    """Comparisons of perceptual hashes left out, since too many were too much alike."""

    def between(self, of: str, within: str) -> Overlap:
        return next(overlap for overlap in self.overlaps if (overlap.of, overlap.within) == (of, within))


def check(
    datasets: Sequence[Checked], folder: Store, kept: Store, *, bits: int = BITS, features: Features | None = None
) -> CheckReport:
    """Compares all images of all datasets with each other, and writes what it finds into `folder`.

    `kept` holds fingerprints between checks. With `features`, near images must also be near in a model's eyes.
    """
    order: dict[Role, int] = {"evaluation": 0, "labelled": 1, "unlabelled": 2}
    datasets = sorted(datasets, key=lambda one: order[one.role])
    for one in datasets:
        fingerprint.take(one.folder, one.data, kept)
    shards = (fingerprint.read(kept, one.data, number) for one in datasets for number in range(len(one.data.shards)))
    with scratch("check") as place:
        found = duplicates.find(shards, place, bits)
    if features:
        found = found._replace(near=_confirmed(found.near, datasets, features))
    table = _resembling(found, datasets)
    leaks = table.leaks
    report = _report(table, found, datasets, bits, left_out=len(leaks.image))
    _write(folder, DUPLICATES, table, datasets)
    _write(folder, LEFT_OUT, leaks, datasets)
    report.write(folder, MANIFEST)
    return report


def left_out(folder: Store) -> dict[str, dict[int, str]]:
    """sha256 of a pool's shard → row → what is said of it, for the images that resemble one of an evaluation set."""
    table = read_table(folder.get(LEFT_OUT))
    rows: dict[str, dict[int, str]] = {}
    for shard, row, dataset, key in zip(
        *(table[name].to_pylist() for name in ("shard", "row", "like", "like_key")), strict=True
    ):
        rows.setdefault(shard, {})[row] = f"also in {dataset}: {key}"
    return rows


class _Table(NamedTuple):
    """One row for each image and each dataset in which it has an earlier duplicate: the nearest one."""

    image: npt.NDArray[np.int64]
    other: npt.NDArray[np.int64]
    bits: npt.NDArray[np.int64]
    """-1: equal bytes."""
    image_set: npt.NDArray[np.int64]
    """Place of its dataset in the list."""
    other_set: npt.NDArray[np.int64]
    leaking: npt.NDArray[np.bool_]
    """Whether the image is of a pool and the other one of an evaluation set."""

    @property
    def leaks(self) -> "_Table":
        # One line for each image, the nearest of all evaluation sets.
        chosen = np.flatnonzero(self.leaking)
        chosen = chosen[np.lexsort((self.other[chosen], self.bits[chosen], self.image[chosen]))]
        first = np.ones(len(chosen), np.bool_)
        first[1:] = self.image[chosen][1:] != self.image[chosen][:-1]
        rows = chosen[first]
        return _Table(
            self.image[rows], self.other[rows], self.bits[rows], self.image_set[rows], self.other_set[rows], self.leaking[rows]
        )


def _starts(datasets: Sequence[Checked]) -> npt.NDArray[np.int64]:
    """Number of the first image of each dataset, and of all."""
    return np.cumsum([0, *(one.data.samples for one in datasets)])


def _resembling(found: duplicates.Found, datasets: Sequence[Checked]) -> _Table:
    starts = _starts(datasets)
    # An image whose hash others have too has the neighbours of the first of them.
    like_first = found.alike
    near = found.near
    begin, end = (np.searchsorted(near.later, like_first.earlier, side) for side in ("left", "right"))
    counts = end - begin
    inherited = np.repeat(begin, counts) + _counted(counts)
    image = np.concatenate([found.same.later, like_first.later, near.later, np.repeat(like_first.later, counts)])
    other = np.concatenate([found.same.earlier, like_first.earlier, near.earlier, near.earlier[inherited]])
    bits = np.concatenate([found.same.bits - 1, like_first.bits, near.bits, near.bits[inherited]])
    image_set, other_set = (np.searchsorted(starts, numbers, "right") - 1 for numbers in (image, other))
    best = np.lexsort((other, bits, other_set, image))
    first = np.ones(len(best), np.bool_)
    first[1:] = (image[best][1:] != image[best][:-1]) | (other_set[best][1:] != other_set[best][:-1])
    best = best[first]
    roles = np.array([one.role for one in datasets])
    leaking = (roles[image_set] == "unlabelled") & (roles[other_set] == "evaluation")
    return _Table(image[best], other[best], bits[best], image_set[best], other_set[best], leaking[best])


def _counted(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """[2, 0, 3] → [0, 1, 0, 1, 2]."""
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)


def _confirmed(near: duplicates.Pairs, datasets: Sequence[Checked], features: Features) -> duplicates.Pairs:
    """The pairs that a model finds alike too."""
    sources = [ImageSource(one.folder, one.data) for one in datasets]
    places = _Places(datasets)
    kept = np.zeros(len(near.later), np.bool_)
    for start in range(0, len(kept), 256):
        part = slice(start, start + 256)
        one, other = (
            features(
                [
                    next(sources[place].encoded(shard, row, row + 1))
                    for place, shard, row in map(places.find, images[part].tolist())
                ]
            )
            for images in (near.later, near.earlier)
        )
        norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        kept[part] = (one * other).sum(1) >= ALIKE * np.maximum(norms, 1e-12)
    return duplicates.Pairs(*(column[kept] for column in near))


class _Places:
    """Number of an image → its dataset's place in the list, shard, row."""

    def __init__(self, datasets: Sequence[Checked]) -> None:
        self._shards = [(place, number) for place, one in enumerate(datasets) for number in range(len(one.data.shards))]
        sizes = [shard.samples for one in datasets for shard in one.data.shards]
        self._starts = np.cumsum([0, *sizes])

    def find(self, image: int) -> tuple[int, int, int]:
        at = int(np.searchsorted(self._starts, image, "right")) - 1
        return *self._shards[at], image - int(self._starts[at])


def _report(table: _Table, found: duplicates.Found, datasets: Sequence[Checked], bits: int, *, left_out: int) -> CheckReport:
    overlaps = []
    for of, one in enumerate(datasets):
        for within, other in enumerate(datasets[: of + 1]):
            chosen = (table.image_set == of) & (table.other_set == within)
            same = int((table.bits[chosen] < 0).sum())
            overlaps.append(Overlap(of=one.name, within=other.name, same=same, near=int(chosen.sum()) - same))
    return CheckReport(
        datasets={one.name: one.data.digest for one in datasets},
        images={one.name: one.data.samples for one in datasets},
        classes={
            one.name: class_counts(one.folder, one.data) for one in datasets if one.data.classes and one.role != "unlabelled"
        },
        overlaps=tuple(overlaps),
        left_out=left_out,
        bits=bits,
        skipped=found.skipped,
    )


def class_counts(folder: Store, data: Dataset) -> dict[str, int]:
    """Class → images, of a labelled dataset."""
    counts = np.zeros(len(data.classes), np.int64)
    source = ImageSource(folder, data, held=2)
    for number in range(len(data.shards)):
        counts += np.bincount(source.labels(number, len(counts)), minlength=len(counts))
    return dict(zip(data.classes, counts.tolist(), strict=True))


def _write(folder: Store, name: str, table: _Table, datasets: Sequence[Checked]) -> None:
    """Writes a part of the rows at a time: a pool may be full of duplicates."""
    places = _Places(datasets)
    # A few at a time: neighbours in the table are neighbours in a shard.
    keys = lru_cache(maxsize=16)(lambda place, shard: _keys(datasets[place], shard))
    with scratch("check") as space:
        path = space / name
        with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
            for start in range(0, len(table.image), ROWS):
                writer.write_table(_described(table, slice(start, start + ROWS), datasets, places, keys))
        folder.put_file(name, path)


def _keys(one: Checked, shard: int) -> list[str]:
    return ShardIndex.read(one.folder, one.data.shards[shard]).keys


def _described(
    table: _Table, part: slice, datasets: Sequence[Checked], places: _Places, keys: Callable[[int, int], list[str]]
) -> pa.Table:
    columns: dict[str, list[object]] = {name: [] for name in SCHEMA.names}
    for image, other, bits in zip(*(column[part].tolist() for column in (table.image, table.other, table.bits)), strict=True):
        own, like = places.find(image), places.find(other)
        values = (
            datasets[own[0]].name, datasets[own[0]].data.shards[own[1]].sha256, own[2], keys(*own[:2])[own[2]],
            datasets[like[0]].name, keys(*like[:2])[like[2]], bits < 0, max(bits, 0),
        )  # fmt: skip
        for name, value in zip(SCHEMA.names, values, strict=True):
            columns[name].append(value)
    return pa.table(columns, schema=SCHEMA)
