"""LabelSet: what one teacher says about every image of one dataset. Immutable; another threshold is another Selection.

labelset.json            digests, shards, classes; written last
histogram.parquet        class uint16, bin uint16, count uint64: confidences by predicted class, 1,000 bins; zeros left out
shard-00000.json         one shard's facts, written after its rows: a shard without it is not labeled
shard-00000.parquet …    the rows, same order and keys as the dataset's tar
shard-00000.histogram.parquet …
"""

import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ns.core.digest import sha256_bytes, sha256_file
from ns.core.errors import DataError
from ns.data.dataset import Dataset
from ns.data.index import ShardIndex
from ns.storage import Store
from ns.storage.documents import HashedDocument, JsonDocument
from ns.storage.parquet import read_table

HISTOGRAM = "histogram.parquet"
SHARD_HISTOGRAM = ".histogram.parquet"
"""End of the name of one shard's."""
HISTOGRAM_BINS = 1000

DENSE_CLASSES = 100
"""With at most so many classes all probabilities are kept."""


LOG8_ZERO = 255
LOG8_PROBABILITIES: npt.NDArray[np.float16] = np.append(2.0 ** (-np.arange(LOG8_ZERO) / 16), 0).astype(np.float16)
"""Probability of each byte."""


def build_row_schema(top_k: int, *, log8: bool = False) -> pa.Schema:
    """Rows of a label shard. An image that could not be read, or was left out, has nulls, and the reason in `error`.

    With `log8` a probability p is kept as the byte -16 log₂ p, rounded; 255 stands for nothing.
    """
    return pa.schema(
        [
            ("key", pa.string()),
            ("confidence", pa.float32()),
            ("top_class", pa.list_(pa.uint16(), top_k)),
            ("top_prob", pa.list_(pa.uint8() if log8 else pa.float16(), top_k)),
            ("error", pa.string()),
        ]
    )


class LabelShard(JsonDocument):
    """One labeled shard."""

    name: str
    """Of the Parquet file."""
    source: str
    """sha256 of the dataset's tar shard."""
    rows: int
    unreadable: int
    left_out: int = 0
    """Images that were not looked at: held out elsewhere, excluded, purged, or not kept by a selection."""
    mode: str = "float32"
    """How the teacher was run (`ns.modeling.precision.Mode`); compiled or not, labels differ in their last digits."""
    bytes: int
    sha256: str


class LabelSet(HashedDocument):
    filename: ClassVar[str] = "labelset.json"

    format: Literal[1] = 1
    dataset: str
    """Digest of the labeled dataset."""
    teacher: str
    """Digest of the teacher."""
    code: str
    """Digest of the labeling code."""
    classes: tuple[str, ...]
    top_k: int
    """Classes kept per image; the rest of the mass is spread evenly over the others."""
    shards: tuple[LabelShard, ...]
    views: str = "one"
    """What the teacher's probabilities are averaged over."""
    ensemble: tuple[str, ...] = ()
    """Digests of further models whose probabilities are averaged with the teacher's."""
    probabilities: Literal["float16", "log8"] = "float16"
    """How they are kept."""

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def unreadable(self) -> int:
        return sum(shard.unreadable for shard in self.shards)

    @property
    def left_out(self) -> int:
        return sum(shard.left_out for shard in self.shards)


def count_kept_classes(num_classes: int, top_k: int) -> int:
    """Classes kept per image."""
    return num_classes if num_classes <= DENSE_CLASSES else min(top_k, num_classes)


def label_shard_key(tar_name: str) -> str:
    """Key of the facts of a labeled shard, from the name of the tar: `shard-00000.tar` → `shard-00000.json`."""
    return tar_name.removesuffix(".tar") + ".json"


def histogram_key(rows_key: str) -> str:
    """Of one shard's, from the name of its rows."""
    return rows_key.removesuffix(".parquet") + SHARD_HISTOGRAM


LEFT_OUT_PREFIX = "left out: "
"""How the reason begins for an image that was not looked at."""


class ShardScores(NamedTuple):
    """What a selection looks at of one label shard, for the P best classes of each image."""

    labeled: npt.NDArray[np.bool_]
    """[N]: whether the image has labels."""
    class_ids: npt.NDArray[np.uint16]
    """[N, P]"""
    confidence: npt.NDArray[np.float32]
    """[N, P]: of the first class as it was, of the others as they are kept."""
    read_keys: Callable[[npt.NDArray[np.int64]], list[str]]
    """Rows → keys."""


class LabelRows:
    """The rows of one label shard as arrays. Images that are unreadable or left out have confidence NaN."""

    def __init__(self, table: pa.Table) -> None:
        self.keys: list[str] = table["key"].to_pylist()
        self.confidence: npt.NDArray[np.float32] = table["confidence"].to_numpy(zero_copy_only=False).astype(np.float32)
        self.reasons: list[str | None] = table["error"].to_pylist()
        """Why there is no label."""
        self.left_out: npt.NDArray[np.bool_] = np.array(
            [(reason or "").startswith(LEFT_OUT_PREFIX) for reason in self.reasons], np.bool_
        )
        k = table.schema.field("top_class").type.list_size
        self.top_class: npt.NDArray[np.uint16] = _unpack_lists(table["top_class"], k).astype(np.uint16)
        self.top_prob = _decode_probabilities(table["top_prob"], k)

    def build_scores(self, top_k: int) -> ShardScores:
        """Of the first `ranks` classes, as far as they are kept."""
        confidence = self.top_prob[:, :top_k].astype(np.float32)
        confidence[:, 0] = np.nan_to_num(self.confidence)
        return ShardScores(
            self.readable, self.top_class[:, :top_k], confidence, lambda rows: [self.keys[row] for row in rows.tolist()]
        )

    def build_histogram(self, num_classes: int) -> npt.NDArray[np.uint64]:
        """Of the images that have labels; see `histogram`."""
        return compute_histogram(self.top_class[self.readable, 0], self.confidence[self.readable], num_classes)

    @property
    def readable(self) -> npt.NDArray[np.bool_]:
        return ~np.isnan(self.confidence)


def read_label_rows(store: Store, shard: LabelShard) -> LabelRows:
    """Reads and checks one label shard. Raises DataError when its bytes are not the recorded ones."""
    data = store.get(shard.name)
    if sha256_bytes(data) != shard.sha256:
        raise DataError(f"{store.uri}/{shard.name}: sha256 differs from labelset.json; label the pool again")
    rows = LabelRows(read_table(data))
    if len(rows.keys) != shard.rows:
        raise DataError(f"{store.uri}/{shard.name}: {len(rows.keys)} rows, labelset.json says {shard.rows}")
    return rows


def iter_label_rows(store: Store, label_set: LabelSet) -> Iterator[LabelRows]:
    """Shard by shard, in the dataset's order."""
    for shard in label_set.shards:
        yield read_label_rows(store, shard)


def iter_shard_scores(store: Store, label_set: LabelSet, top_k: int) -> Iterator[ShardScores]:
    """As `all_rows`, without the columns that a selection does not need."""
    columns = ["confidence", "top_class", *(["top_prob"] if top_k > 1 else [])]
    for shard in label_set.shards:
        path = store.path(shard.name)
        if sha256_file(path) != shard.sha256:
            raise DataError(f"{store.uri}/{shard.name}: sha256 differs from labelset.json; label the pool again")
        table = pq.ParquetFile(path).read(columns)
        raw = table["confidence"].combine_chunks()
        confidence = np.zeros((len(raw), min(top_k, label_set.top_k)), np.float32)
        if top_k > 1:
            confidence[:] = _decode_probabilities(table["top_prob"], label_set.top_k)[:, :top_k]
        confidence[:, 0] = raw.fill_null(0).to_numpy(zero_copy_only=False)
        class_ids = _unpack_lists(table["top_class"], label_set.top_k)[:, :top_k]
        yield ShardScores(raw.is_valid().to_numpy(zero_copy_only=False), class_ids, confidence, partial(_read_keys, path))


def _read_keys(path: Path, rows: npt.NDArray[np.int64]) -> list[str]:
    keys: list[str] = pq.ParquetFile(path).read(["key"])["key"].take(pa.array(rows)).to_pylist()
    return keys


def expand_probabilities(rows: LabelRows, num_classes: int) -> npt.NDArray[np.float32]:
    """Probabilities float32 [N, classes], each row summing to 1: the kept classes, and the rest of the mass spread evenly.

    Unreadable rows are all NaN.
    """
    top_prob = rows.top_prob.astype(np.float32)
    count, k = top_prob.shape
    if k >= num_classes:
        full = np.zeros((count, num_classes), np.float32)
    else:
        tail = np.clip(1 - top_prob.sum(1, keepdims=True), 0, 1) / (num_classes - k)
        full = np.repeat(tail, num_classes, axis=1).astype(np.float32)
    np.put_along_axis(full, rows.top_class.astype(np.int64), top_prob, axis=1)
    full[~rows.readable] = np.nan
    full[rows.readable] /= full[rows.readable].sum(1, keepdims=True)
    return full


def compute_histogram(
    predicted: npt.NDArray[np.uint16], confidence: npt.NDArray[np.float32], num_classes: int
) -> npt.NDArray[np.uint64]:
    """Counts uint64 [classes, BINS] of confidences in [0, 1]; bin b holds [b, b + 1) / BINS, the last one 1 too."""
    bins = np.minimum((confidence * HISTOGRAM_BINS).astype(np.int64), HISTOGRAM_BINS - 1)
    flat = np.bincount(predicted.astype(np.int64) * HISTOGRAM_BINS + bins, minlength=num_classes * HISTOGRAM_BINS)
    return flat.reshape(num_classes, HISTOGRAM_BINS).astype(np.uint64)


def build_histogram_table(counts: npt.NDArray[np.uint64]) -> pa.Table:
    class_ids, bins = np.nonzero(counts)
    return pa.table(
        {
            "class": pa.array(class_ids.astype(np.uint16)),
            "bin": pa.array(bins.astype(np.uint16)),
            "count": pa.array(counts[class_ids, bins]),
        }
    )


def write_histogram(store: Store, key: str, counts: npt.NDArray[np.uint64]) -> None:
    sink = io.BytesIO()
    pq.write_table(build_histogram_table(counts), sink)
    store.put(key, sink.getvalue())


def read_histogram(store: Store, num_classes: int, key: str = HISTOGRAM) -> npt.NDArray[np.uint64]:
    """Counts uint64 [classes, BINS]."""
    table = read_table(store.get(key))
    counts = np.zeros((num_classes, HISTOGRAM_BINS), np.uint64)
    counts[table["class"].to_numpy(), table["bin"].to_numpy()] = table["count"].to_numpy()
    return counts


def join_label_shards(
    label_store: Store,
    pool: Dataset,
    *,
    teacher: str,
    code: str,
    classes: tuple[str, ...],
    top_k: int,
    views: str = "one",
    ensemble: tuple[str, ...] = (),
    probabilities: Literal["float16", "log8"] = "float16",
) -> LabelSet:
    """Joins labeled shards into a label set, without reading a row. Raises StoreError naming the shard that is not labeled yet."""
    label_set = LabelSet(
        views=views,
        ensemble=ensemble,
        probabilities=probabilities,
        dataset=pool.digest,
        teacher=teacher,
        code=code,
        classes=classes,
        top_k=count_kept_classes(len(classes), top_k),
        shards=tuple(LabelShard.load_file(label_store, label_shard_key(shard.name)) for shard in pool.shards),
    )
    counts = np.zeros((len(classes), HISTOGRAM_BINS), np.uint64)
    for shard in label_set.shards:
        counts += read_histogram(label_store, len(classes), histogram_key(shard.name))
    write_histogram(label_store, HISTOGRAM, counts)
    return label_set


def verify_label_set(label_store: Store, label_set: LabelSet, pool: tuple[Store, Dataset] | None = None) -> int:
    """Reads a label set from end to end. Returns its rows.

    Checks checksums, counts of rows and of nulls; that probabilities lie in [0, 1], fall, and sum to 1 at most (to 1 where all
    classes are kept) as far as float16 allows, with the first one as confidence; the histograms; and, given the pool, that
    keys are those of the images. Raises DataError naming the shard, the row and what is wrong with it.
    """
    num_classes = len(label_set.classes)
    counts = np.zeros((num_classes, HISTOGRAM_BINS), np.uint64)
    for number, (shard, rows) in enumerate(zip(label_set.shards, iter_label_rows(label_store, label_set), strict=True)):
        uri = f"{label_store.uri}/{shard.name}"
        readable = rows.readable
        nulls = int(rows.left_out.sum()), int((~readable & ~rows.left_out).sum())
        if nulls != (shard.left_out, shard.unreadable):
            raise DataError(f"{uri}: {nulls[0]} images left out and {nulls[1]} unreadable; labelset.json says otherwise")
        _check_rows(uri, rows, num_classes, label_set.probabilities)
        if pool is not None and rows.keys != ShardIndex.load(pool[0], pool[1].shards[number]).keys:
            raise DataError(f"{uri}: its keys are not those of the images in {pool[1].shards[number].name}")
        counts += rows.build_histogram(num_classes)
    if not np.array_equal(counts, read_histogram(label_store, num_classes)):
        raise DataError(f"{label_store.uri}/{HISTOGRAM}: its counts are not those of the rows; label the pool again")
    return label_set.rows


def _check_rows(uri: str, rows: LabelRows, num_classes: int, encoding: str) -> None:
    top = rows.top_prob.astype(np.float32)
    k = top.shape[1]
    # Rounding moves each probability by at most a two-thousandth of itself in float16, a forty-fifth in log8.
    total = top.sum(1)
    slack = 0.025 if encoding == "log8" else 0.002
    problems = {
        "a class that does not exist": (rows.top_class >= num_classes).any(1),
        "a probability outside 0 … 1": ((top < 0) | (top > 1.0005) | np.isnan(top)).any(1),
        "probabilities that do not fall": (np.diff(top, axis=1) > 0).any(1),
        "probabilities that sum to more than 1": total > 1 + slack,
        "probabilities that do not sum to 1": (total < 1 - slack) & (k >= num_classes),
        "a confidence that is not its first probability": np.abs(top[:, 0] - rows.confidence) > slack,
    }
    for problem, mask in problems.items():
        bad_rows = np.flatnonzero(mask & rows.readable)
        if len(bad_rows):
            raise DataError(f"{uri}: row {bad_rows[0]} ({rows.keys[bad_rows[0]]}): {problem}; label the pool again")


def _decode_probabilities(column: pa.ChunkedArray, k: int) -> npt.NDArray[np.float16]:
    """[N, k]; zeros where there are none."""
    values = _unpack_lists(column, k, null=LOG8_ZERO if pa.types.is_uint8(column.type.value_type) else 0)
    return LOG8_PROBABILITIES[values] if values.dtype == np.uint8 else values.astype(np.float16)


def encode_log8(probabilities: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Bytes of probabilities in [0, 1]."""
    with np.errstate(divide="ignore"):
        exponents = np.rint(-16 * np.log2(probabilities))
    return np.asarray(np.clip(exponents, 0, LOG8_ZERO), np.uint8)


def _unpack_lists(column: pa.ChunkedArray, k: int, null: int = 0) -> npt.NDArray[Any]:
    """[N, k] values of a column of fixed-size lists; `null` where the list is null."""
    array = column.combine_chunks()
    if array.null_count == 0:
        unpacked: npt.NDArray[Any] = array.flatten().to_numpy(zero_copy_only=False).reshape(-1, k)
        return unpacked
    # flatten() leaves out null lists, whatever lies under them.
    flat = array.flatten().to_numpy(zero_copy_only=False)
    values = np.full((len(array), k), null, flat.dtype)
    values[array.is_valid().to_numpy(zero_copy_only=False)] = flat.reshape(-1, k)
    return values
