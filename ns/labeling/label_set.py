"""LabelSet: what one teacher says about every image of one dataset. Immutable; another threshold is another Selection.

labelset.json            digests, shards, classes; written last
histogram.parquet        class uint16, bin uint16, count uint64: confidences by predicted class, 1,000 bins; zeros left out
shard-00000.json         one shard's facts, written after its rows: a shard without it is not labelled
shard-00000.parquet …    the rows, same order and keys as the dataset's tar
shard-00000.histogram.parquet …
"""

import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ns.core.digest import sha256_bytes, sha256_file
from ns.core.errors import DataError
from ns.data.dataset import Dataset
from ns.data.index import ShardIndex
from ns.storage import Store
from ns.storage.documents import Document, Identified
from ns.storage.parquet import read_table

MANIFEST = "labelset.json"
HISTOGRAM = "histogram.parquet"
SHARD_HISTOGRAM = ".histogram.parquet"
"""End of the name of one shard's."""
BINS = 1000

DENSE_CLASSES = 100
"""With at most so many classes all probabilities are kept."""


LOG8_NOTHING = 255
LOG8: npt.NDArray[np.float16] = np.append(2.0 ** (-np.arange(LOG8_NOTHING) / 16), 0).astype(np.float16)
"""Probability of each byte."""


def row_schema(top_k: int, *, log8: bool = False) -> pa.Schema:
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


class LabelShard(Document):
    """One labelled shard."""

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


class LabelSet(Identified):
    format: Literal[1] = 1
    dataset: str
    """Digest of the labelled dataset."""
    teacher: str
    """Digest of the teacher."""
    code: str
    """Digest of the labelling code."""
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


def kept_classes(classes: int, top_k: int) -> int:
    """Classes kept per image."""
    return classes if classes <= DENSE_CLASSES else min(top_k, classes)


def marker(source: str) -> str:
    """Key of the facts of a labelled shard, from the name of the tar: `shard-00000.tar` → `shard-00000.json`."""
    return source.removesuffix(".tar") + ".json"


def histogram_name(rows: str) -> str:
    """Of one shard's, from the name of its rows."""
    return rows.removesuffix(".parquet") + SHARD_HISTOGRAM


LEFT_OUT = "left out: "
"""How the reason begins for an image that was not looked at."""


class Scores(NamedTuple):
    """What a selection looks at of one label shard, for the P best classes of each image."""

    labelled: npt.NDArray[np.bool_]
    """[N]: whether the image has labels."""
    classes: npt.NDArray[np.uint16]
    """[N, P]"""
    confidence: npt.NDArray[np.float32]
    """[N, P]: of the first class as it was, of the others as they are kept."""
    keys: Callable[[npt.NDArray[np.int64]], list[str]]
    """Rows → keys."""


class Rows:
    """The rows of one label shard as arrays. Images that are unreadable or left out have confidence NaN."""

    def __init__(self, table: pa.Table) -> None:
        self.keys: list[str] = table["key"].to_pylist()
        self.confidence: npt.NDArray[np.float32] = table["confidence"].to_numpy(zero_copy_only=False).astype(np.float32)
        self.reasons: list[str | None] = table["error"].to_pylist()
        """Why there is no label."""
        self.left_out: npt.NDArray[np.bool_] = np.array(
            [(reason or "").startswith(LEFT_OUT) for reason in self.reasons], np.bool_
        )
        k = table.schema.field("top_class").type.list_size
        self.top_class: npt.NDArray[np.uint16] = _fixed(table["top_class"], k).astype(np.uint16)
        self.top_prob = _probabilities(table["top_prob"], k)

    def scores(self, ranks: int) -> Scores:
        """Of the first `ranks` classes, as far as they are kept."""
        confidence = self.top_prob[:, :ranks].astype(np.float32)
        confidence[:, 0] = np.nan_to_num(self.confidence)
        return Scores(
            self.readable, self.top_class[:, :ranks], confidence, lambda rows: [self.keys[row] for row in rows.tolist()]
        )

    def histogram(self, classes: int) -> npt.NDArray[np.uint64]:
        """Of the images that have labels; see `histogram`."""
        return histogram(self.top_class[self.readable, 0], self.confidence[self.readable], classes)

    @property
    def readable(self) -> npt.NDArray[np.bool_]:
        return ~np.isnan(self.confidence)


def read_rows(folder: Store, shard: LabelShard) -> Rows:
    """Reads and checks one label shard. Raises DataError when its bytes are not the recorded ones."""
    data = folder.get(shard.name)
    if sha256_bytes(data) != shard.sha256:
        raise DataError(f"{folder.uri}/{shard.name}: sha256 differs from labelset.json; label the pool again")
    rows = Rows(read_table(data))
    if len(rows.keys) != shard.rows:
        raise DataError(f"{folder.uri}/{shard.name}: {len(rows.keys)} rows, labelset.json says {shard.rows}")
    return rows


def all_rows(folder: Store, labels: LabelSet) -> Iterator[Rows]:
    """Shard by shard, in the dataset's order."""
    for shard in labels.shards:
        yield read_rows(folder, shard)


def all_scores(folder: Store, labels: LabelSet, ranks: int) -> Iterator[Scores]:
    """As `all_rows`, without the columns that a selection does not need."""
    columns = ["confidence", "top_class", *(["top_prob"] if ranks > 1 else [])]
    for shard in labels.shards:
        path = folder.path(shard.name)
        if sha256_file(path) != shard.sha256:
            raise DataError(f"{folder.uri}/{shard.name}: sha256 differs from labelset.json; label the pool again")
        table = pq.ParquetFile(path).read(columns)
        raw = table["confidence"].combine_chunks()
        confidence = np.zeros((len(raw), min(ranks, labels.top_k)), np.float32)
        if ranks > 1:
            confidence[:] = _probabilities(table["top_prob"], labels.top_k)[:, :ranks]
        confidence[:, 0] = raw.fill_null(0).to_numpy(zero_copy_only=False)
        classes = _fixed(table["top_class"], labels.top_k)[:, :ranks]
        yield Scores(raw.is_valid().to_numpy(zero_copy_only=False), classes, confidence, partial(_keys, path))


def _keys(path: Path, rows: npt.NDArray[np.int64]) -> list[str]:
    found: list[str] = pq.ParquetFile(path).read(["key"])["key"].take(pa.array(rows)).to_pylist()
    return found


def dense(rows: Rows, classes: int) -> npt.NDArray[np.float32]:
    """Probabilities float32 [N, classes], each row summing to 1: the kept classes, and the rest of the mass spread evenly.

    Unreadable rows are all NaN.
    """
    top_prob = rows.top_prob.astype(np.float32)
    count, k = top_prob.shape
    if k >= classes:
        full = np.zeros((count, classes), np.float32)
    else:
        tail = np.clip(1 - top_prob.sum(1, keepdims=True), 0, 1) / (classes - k)
        full = np.repeat(tail, classes, axis=1).astype(np.float32)
    np.put_along_axis(full, rows.top_class.astype(np.int64), top_prob, axis=1)
    full[~rows.readable] = np.nan
    full[rows.readable] /= full[rows.readable].sum(1, keepdims=True)
    return full


def histogram(predicted: npt.NDArray[np.uint16], confidence: npt.NDArray[np.float32], classes: int) -> npt.NDArray[np.uint64]:
    """Counts uint64 [classes, BINS] of confidences in [0, 1]; bin b holds [b, b + 1) / BINS, the last one 1 too."""
    bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    flat = np.bincount(predicted.astype(np.int64) * BINS + bins, minlength=classes * BINS)
    return flat.reshape(classes, BINS).astype(np.uint64)


def histogram_table(counts: npt.NDArray[np.uint64]) -> pa.Table:
    label, bin_ = np.nonzero(counts)
    return pa.table(
        {
            "class": pa.array(label.astype(np.uint16)),
            "bin": pa.array(bin_.astype(np.uint16)),
            "count": pa.array(counts[label, bin_]),
        }
    )


def write_histogram(folder: Store, name: str, counts: npt.NDArray[np.uint64]) -> None:
    sink = io.BytesIO()
    pq.write_table(histogram_table(counts), sink)
    folder.put(name, sink.getvalue())


def read_histogram(folder: Store, classes: int, name: str = HISTOGRAM) -> npt.NDArray[np.uint64]:
    """Counts uint64 [classes, BINS]."""
    table = read_table(folder.get(name))
    counts = np.zeros((classes, BINS), np.uint64)
    counts[table["class"].to_numpy(), table["bin"].to_numpy()] = table["count"].to_numpy()
    return counts


def join(
    labels: Store,
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
    """Joins labelled shards into a label set, without reading a row. Raises StoreError naming the shard that is not labelled yet."""
    label_set = LabelSet(
        views=views,
        ensemble=ensemble,
        probabilities=probabilities,
        dataset=pool.digest,
        teacher=teacher,
        code=code,
        classes=classes,
        top_k=kept_classes(len(classes), top_k),
        shards=tuple(LabelShard.read(labels, marker(shard.name)) for shard in pool.shards),
    )
    counts = np.zeros((len(classes), BINS), np.uint64)
    for shard in label_set.shards:
        counts += read_histogram(labels, len(classes), histogram_name(shard.name))
    write_histogram(labels, HISTOGRAM, counts)
    return label_set


def verify(labels: Store, label_set: LabelSet, pool: tuple[Store, Dataset] | None = None) -> int:
    """Reads a label set from end to end. Returns its rows.

    Checks checksums, counts of rows and of nulls; that probabilities lie in [0, 1], fall, and sum to 1 at most (to 1 where all
    classes are kept) as far as float16 allows, with the first one as confidence; the histograms; and, given the pool, that
    keys are those of the images. Raises DataError naming the shard, the row and what is wrong with it.
    """
    classes = len(label_set.classes)
    counts = np.zeros((classes, BINS), np.uint64)
    for number, (shard, rows) in enumerate(zip(label_set.shards, all_rows(labels, label_set), strict=True)):
        place = f"{labels.uri}/{shard.name}"
        readable = rows.readable
        nulls = int(rows.left_out.sum()), int((~readable & ~rows.left_out).sum())
        if nulls != (shard.left_out, shard.unreadable):
            raise DataError(f"{place}: {nulls[0]} images left out and {nulls[1]} unreadable; labelset.json says otherwise")
        _check_rows(place, rows, classes, label_set.probabilities)
        if pool is not None and rows.keys != ShardIndex.read(pool[0], pool[1].shards[number]).keys:
            raise DataError(f"{place}: its keys are not those of the images in {pool[1].shards[number].name}")
        counts += rows.histogram(classes)
    if not np.array_equal(counts, read_histogram(labels, classes)):
        raise DataError(f"{labels.uri}/{HISTOGRAM}: its counts are not those of the rows; label the pool again")
    return label_set.rows


def _check_rows(place: str, rows: Rows, classes: int, kept: str) -> None:
    top = rows.top_prob.astype(np.float32)
    k = top.shape[1]
    # Rounding moves each probability by at most a two-thousandth of itself in float16, a forty-fifth in log8.
    total = top.sum(1)
    slack = 0.025 if kept == "log8" else 0.002
    wrong = {
        "a class that does not exist": (rows.top_class >= classes).any(1),
        "a probability outside 0 … 1": ((top < 0) | (top > 1.0005) | np.isnan(top)).any(1),
        "probabilities that do not fall": (np.diff(top, axis=1) > 0).any(1),
        "probabilities that sum to more than 1": total > 1 + slack,
        "probabilities that do not sum to 1": (total < 1 - slack) & (k >= classes),
        "a confidence that is not its first probability": np.abs(top[:, 0] - rows.confidence) > slack,
    }
    for what, found in wrong.items():
        at = np.flatnonzero(found & rows.readable)
        if len(at):
            raise DataError(f"{place}: row {at[0]} ({rows.keys[at[0]]}): {what}; label the pool again")


def _probabilities(column: pa.ChunkedArray, k: int) -> npt.NDArray[np.float16]:
    """[N, k]; zeros where there are none."""
    values = _fixed(column, k, null=LOG8_NOTHING if pa.types.is_uint8(column.type.value_type) else 0)
    return LOG8[values] if values.dtype == np.uint8 else values.astype(np.float16)


def log8(probabilities: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Bytes of probabilities in [0, 1]."""
    with np.errstate(divide="ignore"):
        exponents = np.rint(-16 * np.log2(probabilities))
    return np.asarray(np.clip(exponents, 0, LOG8_NOTHING), np.uint8)


def _fixed(column: pa.ChunkedArray, k: int, null: int = 0) -> npt.NDArray[Any]:
    """[N, k] values of a column of fixed-size lists; `null` where the list is null."""
    array = column.combine_chunks()
    if array.null_count == 0:
        every: npt.NDArray[Any] = array.flatten().to_numpy(zero_copy_only=False).reshape(-1, k)
        return every
    # flatten() leaves out null lists, whatever lies under them.
    flat = array.flatten().to_numpy(zero_copy_only=False)
    values = np.full((len(array), k), null, flat.dtype)
    values[array.is_valid().to_numpy(zero_copy_only=False)] = flat.reshape(-1, k)
    return values
