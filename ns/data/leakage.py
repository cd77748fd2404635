"""The leak guard: finds images of a pool that are also in an evaluation set, and all other duplicates.

FOLDER/check.json             counts; written last
FOLDER/duplicates.parquet     each image that resembles an earlier one, in the order evaluation sets, labeled data, pool
FOLDER/left_out.parquet       images of the pool that resemble one of an evaluation set: they get no pseudo-label
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import lru_cache
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ns.data import duplicates, fingerprint
from ns.data.dataset import Dataset, DatasetRole
from ns.data.index import ShardIndex
from ns.data.loading.decode import EncodedJpeg
from ns.data.loading.shard_reader import ImageSource
from ns.data.picture_match import PictureMatcher
from ns.storage import Store
from ns.storage.documents import HashedDocument, JsonDocument
from ns.storage.parquet import parse_table
from ns.storage.scratch import make_scratch_dir

DUPLICATES = "duplicates.parquet"
LEFT_OUT = "left_out.parquet"
MAX_NEAR_BITS = 4
"""Bits of 64 in which perceptual hashes of the same picture may differ; such pictures are then compared by their pixels. On
CIFAR-10's images (32 px, the hardest case) this finds 100 % of the copies saved as JPEG at quality 70, 97 % at quality 40, 99 to
100 % of those resized to 24 or 64 px or of brightness × 0.8 or 1.1, and 3 % of those shifted by a pixel."""
MIN_COSINE = 0.9
"""Smallest cosine of a model's features of two near images that count as the same picture."""

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
WRITE_ROWS = 10_000
"""Rows of a list in memory at a time."""

Features = Callable[[Sequence[EncodedJpeg | bytes]], npt.NDArray[np.float32]]
"""Encoded images → float32 [N, D]."""


class NamedDataset(NamedTuple):
    """A dataset, its store and its name in a report."""

    name: str
    store: Store
    dataset: Dataset
    used_as: DatasetRole | None = None
    """The role it is used in, if that is not the one it was imported with: a pool may have labels."""

    @property
    def role(self) -> DatasetRole:
        return self.used_as or self.dataset.role


class Overlap(JsonDocument):
    """Images of one dataset that resemble an image of another, or an earlier one of the same."""

    of: str
    within: str
    same: int
    """Equal bytes."""
    near: int
    """Different bytes, but nearly the same picture."""
    resembled: int = 0
    """Images of the other dataset that they resemble."""


class LeakageReport(HashedDocument):
    filename: ClassVar[str] = "check.json"

    format: Literal[1] = 1
    datasets: dict[str, str]
    """Name → digest."""
    images: dict[str, int]
    classes: dict[str, dict[str, int]]
    """Labeled dataset → class → number of images."""
    overlaps: tuple[Overlap, ...]
    left_out: int
    """Images of pools that resemble one of an evaluation set."""
    left_out_same: int = 0
    """Those of them with equal bytes."""
    bits: int
    """Bits of 64 in which the hashes of near images may differ."""
    skipped: int
    """Comparisons that were left out because too many hashes were similar."""

    def get_overlap(self, of: str, within: str) -> Overlap:
        return next(overlap for overlap in self.overlaps if (overlap.of, overlap.within) == (of, within))


def check_datasets(
    datasets: Sequence[NamedDataset],
    store: Store,
    fingerprint_store: Store,
    *,
    bits: int = MAX_NEAR_BITS,
    features: Features | None = None,
) -> LeakageReport:
    """Compares all images of all datasets with each other, and writes the lists and the report into `store`.

    `fingerprint_store` keeps fingerprints between checks. With `features`, near images must also have similar features. Raises
    DataError for damaged data, StoreError when a store or scratch space fails.
    """
    order: dict[DatasetRole, int] = {"evaluation": 0, "labeled": 1, "unlabeled": 2}
    datasets = sorted(datasets, key=lambda named: order[named.role])
    for named in datasets:
        fingerprint.compute_fingerprints(named.store, named.dataset, fingerprint_store)
    shards = (
        fingerprint.read_fingerprints(fingerprint_store, named.dataset, shard_index)
        for named in datasets
        for shard_index in range(len(named.dataset.shards))
    )
    with (
        make_scratch_dir("check") as scratch_dir,
        closing(PictureMatcher([(named.store, named.dataset) for named in datasets], scratch_dir / "pictures")) as matcher,
    ):
        pairs = duplicates.find_duplicates(shards, scratch_dir, bits, matcher.match_images)
    if features:
        pairs = pairs._replace(near=_confirm_near_pairs(pairs.near, datasets, features))
    table = _build_duplicate_table(pairs, datasets)
    leaks = table.leaking_rows
    report = _build_report(table, pairs, datasets, bits, leaks)
    _write_duplicates(store, DUPLICATES, table, datasets)
    _write_duplicates(store, LEFT_OUT, leaks, datasets)
    report.save(store)
    return report


def load_left_out_rows(store: Store) -> dict[str, dict[int, str]]:
    """sha256 of a pool's shard → row → reason, for the images that resemble one of an evaluation set."""
    table = parse_table(store.get(LEFT_OUT), f"{store.uri}/{LEFT_OUT}", SCHEMA, "delete the folder, and it will be made again")
    rows: dict[str, dict[int, str]] = {}
    for shard, row, dataset, key in zip(
        *(table[name].to_pylist() for name in ("shard", "row", "like", "like_key")), strict=True
    ):
        rows.setdefault(shard, {})[row] = f"also in {dataset}: {key}"
    return rows


class _DuplicateTable(NamedTuple):
    """One row per image and dataset in which it has an earlier duplicate: the nearest one. All columns are [N]."""

    image: npt.NDArray[np.int64]
    other: npt.NDArray[np.int64]
    bits: npt.NDArray[np.int64]
    """Bits in which the hashes differ; -1 for equal bytes."""
    image_set: npt.NDArray[np.int64]
    """Index of its dataset in the list."""
    other_set: npt.NDArray[np.int64]
    leaking: npt.NDArray[np.bool_]
    """Whether the image is of a pool and the other one of an evaluation set."""

    @property
    def leaking_rows(self) -> "_DuplicateTable":
        """One row per image: its nearest image of all evaluation sets."""
        leaks = self.take_rows(np.flatnonzero(self.leaking))
        leaks = leaks.take_rows(np.lexsort((leaks.other, leaks.bits, leaks.image)))
        return leaks.take_rows(np.flatnonzero(duplicates.mark_changes(leaks.image)))

    def take_rows(self, rows: npt.NDArray[np.int64]) -> "_DuplicateTable":
        return _DuplicateTable._make(column[rows] for column in self)


def _build_duplicate_table(pairs: duplicates.DuplicatePairs, datasets: Sequence[NamedDataset]) -> _DuplicateTable:
    starts = np.cumsum([0, *(named.dataset.samples for named in datasets)])
    # Near pairs hold only the first image with a hash; the others inherit its neighbors.
    same, like_first, near, _ = pairs
    begin, end = (np.searchsorted(near.later, like_first.earlier, side) for side in ("left", "right"))
    counts = end - begin
    inherited = np.repeat(begin, counts) + _count_within_groups(counts)
    image = np.concatenate([same.later, like_first.later, near.later, np.repeat(like_first.later, counts)])
    other = np.concatenate([same.earlier, like_first.earlier, near.earlier, near.earlier[inherited]])
    bits = np.concatenate([same.bits - 1, like_first.bits, near.bits, near.bits[inherited]])
    image_set, other_set = (np.searchsorted(starts, numbers, "right") - 1 for numbers in (image, other))
    roles = np.array([named.role for named in datasets])
    leaking = (roles[image_set] == "unlabeled") & (roles[other_set] == "evaluation")
    table = _DuplicateTable(image, other, bits, image_set, other_set, leaking)
    best = np.lexsort((other, bits, other_set, image))
    return table.take_rows(best[duplicates.mark_changes(image[best], other_set[best])])


def _count_within_groups(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """[2, 0, 3] → [0, 1, 0, 1, 2]."""
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)


def _confirm_near_pairs(
    near: duplicates.ImagePairs, datasets: Sequence[NamedDataset], features: Features
) -> duplicates.ImagePairs:
    """The pairs whose features are similar too."""
    sources = [ImageSource(named.store, named.dataset) for named in datasets]
    confirmed = np.zeros(len(near.later), np.bool_)
    for start in range(0, len(confirmed), 256):
        part = slice(start, start + 256)
        later, earlier = (
            features(
                [
                    next(sources[dataset_index].read_encoded(shard, row, row + 1))
                    for dataset_index, shard, row in _locate_images(datasets, images[part])
                ]
            )
            for images in (near.later, near.earlier)
        )
        norms = np.linalg.norm(later, axis=1) * np.linalg.norm(earlier, axis=1)
        confirmed[part] = (later * earlier).sum(1) >= MIN_COSINE * np.maximum(norms, 1e-12)
    return duplicates.ImagePairs(*(column[confirmed] for column in near))


def _locate_images(datasets: Sequence[NamedDataset], images: npt.NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Index of the dataset in the list, shard and row of each image, given by its number."""
    shards = [(index, shard) for index, named in enumerate(datasets) for shard in range(len(named.dataset.shards))]
    starts = np.cumsum([0, *(shard.samples for named in datasets for shard in named.dataset.shards)])
    at = np.searchsorted(starts, images, "right") - 1
    return [(*shards[shard], row) for shard, row in zip(at.tolist(), (images - starts[at]).tolist(), strict=True)]


def _build_report(
    table: _DuplicateTable,
    pairs: duplicates.DuplicatePairs,
    datasets: Sequence[NamedDataset],
    bits: int,
    leaks: _DuplicateTable,
) -> LeakageReport:
    overlaps = []
    for dataset_index, named in enumerate(datasets):
        for other_index, other_named in enumerate(datasets[: dataset_index + 1]):
            rows = (table.image_set == dataset_index) & (table.other_set == other_index)
            same = int((table.bits[rows] < 0).sum())
            near, resembled = int(rows.sum()) - same, len(np.unique(table.other[rows]))
            overlaps.append(Overlap(of=named.name, within=other_named.name, same=same, near=near, resembled=resembled))
    return LeakageReport(
        datasets={named.name: named.dataset.digest for named in datasets},
        images={named.name: named.dataset.samples for named in datasets},
        classes={
            named.name: count_class_images(named.store, named.dataset)
            for named in datasets
            if named.dataset.classes and named.role != "unlabeled"
        },
        overlaps=tuple(overlaps),
        left_out=len(leaks.image),
        left_out_same=int((leaks.bits < 0).sum()),
        bits=bits,
        skipped=pairs.skipped,
    )


def count_class_images(store: Store, dataset: Dataset) -> dict[str, int]:
    """Class → number of images of a labeled dataset."""
    counts = np.zeros(len(dataset.classes), np.int64)
    source = ImageSource(store, dataset, max_open_shards=2)
    for shard_index in range(len(dataset.shards)):
        counts += np.bincount(source.read_class_ids(shard_index, len(counts)), minlength=len(counts))
    return dict(zip(dataset.classes, counts.tolist(), strict=True))


def _write_duplicates(store: Store, name: str, table: _DuplicateTable, datasets: Sequence[NamedDataset]) -> None:
    """Writes the rows in parts: a pool may be full of duplicates."""

    # A few shards are enough: neighbors in the table are neighbors in a shard.
    @lru_cache(maxsize=16)
    def read_keys(dataset_index: int, shard: int) -> list[str]:
        named = datasets[dataset_index]
        return ShardIndex.load(named.store, named.dataset.shards[shard]).keys

    with make_scratch_dir("check") as scratch_dir:
        path = scratch_dir / name
        with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
            for start in range(0, len(table.image), WRITE_ROWS):
                part = slice(start, start + WRITE_ROWS)
                images, others = (_locate_images(datasets, numbers[part]) for numbers in (table.image, table.other))
                rows = [
                    {
                        "dataset": datasets[image_set].name,
                        "shard": datasets[image_set].dataset.shards[shard].sha256,
                        "row": row,
                        "key": read_keys(image_set, shard)[row],
                        "like": datasets[other_set].name,
                        "like_key": read_keys(other_set, other_shard)[other_row],
                        "same_bytes": bits < 0,
                        "bits": max(bits, 0),
                    }
                    for (image_set, shard, row), (other_set, other_shard, other_row), bits in zip(
                        images, others, table.bits[part].tolist(), strict=True
                    )
                ]
                writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
        store.put_file(name, path)
