"""LabelSet: the answers of one teacher for every image of one dataset. Immutable; another threshold is another Selection.

labelset.json            digests, shards, classes; written last
histogram.parquet        class uint16, bin uint16, count uint64: confidences by predicted class, 1,000 bins; zeros left out
shard-00000.json         record of one shard, written after its rows: a shard without it is not labeled
shard-00000-SHA.parquet  the rows, in the order and with the keys of the dataset's tar; SHA begins the file's sha256, so that two attempts
                         at one shard do not mix
shard-00000-SHA.histogram.parquet
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from ns.config.schema import ForeignScore
from ns.core import log
from ns.core.digest import sha256_bytes, sha256_file
from ns.core.errors import DataError
from ns.data.dataset import Dataset, Shard
from ns.data.index import ShardIndex
from ns.storage import Store
from ns.storage.documents import FileName, HashedDocument, JsonDocument, Sha256, name_by_content
from ns.storage.parquet import check_columns, explain_table_errors, parse_table, read_table, read_table_file, write_table

HISTOGRAM = "histogram.parquet"
HISTOGRAM_BINS = 1000

DENSE_CLASSES = 100
"""With at most so many classes all probabilities are kept."""

LOG8_ZERO = 255
LOG8_PROBABILITIES: npt.NDArray[np.float16] = np.append(2.0 ** (-np.arange(LOG8_ZERO) / 16), 0).astype(np.float16)
"""Probability of each byte."""


def build_row_schema(top_k: int, *, log8: bool = False, foreign_score: bool = False) -> pa.Schema:
    """Schema of the rows of a label shard. The row of an image that is unreadable or left out has nulls, and the reason in `error`.

    With `log8` a probability p is kept as the byte -16 log₂ p, rounded; 255 stands for 0. `foreign_score`: whether there is such a
    column.
    """
    return pa.schema(
        [
            ("key", pa.string()),
            ("confidence", pa.float32()),
            ("top_class", pa.list_(pa.uint16(), top_k)),
            ("top_prob", pa.list_(pa.uint8() if log8 else pa.float16(), top_k)),
            ("error", pa.string()),
            *([("foreign_score", pa.float32())] if foreign_score else []),
        ]
    )


class LabelShard(JsonDocument):
    """One labeled shard."""

    name: FileName
    """Key of the Parquet file."""
    source: str
    """sha256 of the dataset's tar shard."""
    rows: int
    unreadable: int
    left_out: int = 0
    """Images that the teacher did not see: held out elsewhere, excluded, purged, or not kept by a selection."""
    mode: str = "float32"
    """Precision of the teacher, and whether it was compiled; labels differ in their last digits between modes."""
    bytes: int
    sha256: Sha256


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
    top_k: int = Field(ge=1)
    """Classes kept per image; the rest of the probability is spread evenly over the other classes."""
    shards: tuple[LabelShard, ...]
    views: str = "one"
    """Views of an image that probabilities are averaged over."""
    ensemble: tuple[str, ...] = ()
    """Digests of further models whose probabilities are averaged with the teacher's."""
    probabilities: Literal["float16", "log8"] = "float16"
    """Encoding of the kept probabilities."""
    temperature: float = 1.0
    """Temperature of the probabilities."""
    foreign_score: ForeignScore = "none"
    """Kind of the foreign scores that the rows have."""

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


ROWS_NAME = re.compile(r"(.*?)(-[0-9a-f]{16})?\.parquet")


def rows_key(name: str, sha256: str) -> str:
    """Key of rows with this checksum, from the name of their tar or of other rows of it: `shard-00000-0123456789abcdef.parquet`."""
    return name_by_content(f"{_strip_name(name)}.parquet", sha256)


def label_shard_key(name: str) -> str:
    """Key of the record of a labeled shard, from the name of its tar or its rows: `shard-00000.json`."""
    return f"{_strip_name(name)}.json"


def histogram_key(name: str) -> str:
    """Key of the histogram of a shard, from the name of its rows: `shard-00000-0123456789abcdef.histogram.parquet`."""
    return name.removesuffix(".parquet") + ".histogram.parquet"


def _strip_name(name: str) -> str:
    match = ROWS_NAME.fullmatch(name)
    return match[1] if match else name.removesuffix(".tar")


LEFT_OUT_PREFIX = "left out: "
"""Beginning of the reason of an image that was left out."""


class ShardScores(NamedTuple):
    """The part of one label shard that a selection reads: the P best classes of each image."""

    labeled: npt.NDArray[np.bool_]
    """[N]: whether the image has labels, and is not foreign."""
    class_ids: npt.NDArray[np.uint16]
    """[N, P]"""
    confidence: npt.NDArray[np.float32]
    """[N, P]: for the first class exact, for the others as rounded in the file."""
    read_keys: Callable[[npt.NDArray[np.int64]], list[str]]
    """Rows → keys."""
    foreign: npt.NDArray[np.bool_] | None = None
    """[N]: whether the image is left out as foreign; None if none is."""


class TopClasses(NamedTuple):
    """The best classes of each image of one label shard."""

    labeled: npt.NDArray[np.bool_]
    """[N]: whether the image has labels, and is not foreign."""
    class_ids: npt.NDArray[np.uint16]
    """[N, k], best first."""
    probabilities: npt.NDArray[np.floating[Any]]
    """[N, k] as rounded in the file; zeros in rows without labels."""
    confidence: npt.NDArray[np.float32]
    """[N]: the first probability, exact; 0 in rows without labels."""
    foreign: npt.NDArray[np.bool_] | None = None
    """[N]: whether the image is left out as foreign; None if none is."""


class LabelRows:
    """The N rows of one label shard as arrays. Images that are unreadable or left out have confidence NaN."""

    def __init__(self, table: pa.Table) -> None:
        self.keys: list[str] = table["key"].to_pylist()
        self.confidence: npt.NDArray[np.float32] = table["confidence"].to_numpy(zero_copy_only=False).astype(np.float32)
        self.reasons: list[str | None] = table["error"].to_pylist()
        """The reason of each image without a label; None where there is one."""
        self.left_out: npt.NDArray[np.bool_] = np.array(
            [(reason or "").startswith(LEFT_OUT_PREFIX) for reason in self.reasons], np.bool_
        )
        k = table.schema.field("top_class").type.list_size
        self.top_class: npt.NDArray[np.uint16] = _unpack_lists(table["top_class"], k).astype(np.uint16)
        self.top_prob: npt.NDArray[np.floating[Any]] = _decode_probabilities(table["top_prob"], k)
        self.foreign_score: npt.NDArray[np.float32] | None = None
        """NaN where there is no label; None if the label set has no such scores."""
        if "foreign_score" in table.column_names:
            self.foreign_score = table["foreign_score"].to_numpy(zero_copy_only=False).astype(np.float32)

    @property
    def top_classes(self) -> TopClasses:
        return TopClasses(self.readable, self.top_class, self.top_prob, np.nan_to_num(self.confidence))

    def build_scores(self, top_k: int, foreign_limit: float | None = None) -> ShardScores:
        """Scores of the first `top_k` classes that are kept. Images with a foreign score above `foreign_limit` are left out."""
        confidence = self.top_prob[:, :top_k].astype(np.float32)
        confidence[:, 0] = np.nan_to_num(self.confidence)
        foreign = find_foreign_rows(self.foreign_score, foreign_limit, len(self.keys))
        return ShardScores(
            self.readable & ~foreign,
            self.top_class[:, :top_k],
            confidence,
            lambda rows: [self.keys[row] for row in rows.tolist()],
            foreign,
        )

    def build_histogram(self, num_classes: int) -> npt.NDArray[np.uint64]:
        """Counts of the images that have labels; see `compute_histogram`."""
        return compute_histogram(self.top_class[self.readable, 0], self.confidence[self.readable], num_classes)

    @property
    def readable(self) -> npt.NDArray[np.bool_]:
        return ~np.isnan(self.confidence)


def read_label_rows(store: Store, shard: LabelShard) -> LabelRows:
    """Reads and checks one label shard. Raises DataError when its bytes are not the recorded ones."""
    data = store.get(shard.name)
    if sha256_bytes(data) != shard.sha256:
        raise DataError(f"{store.uri}/{shard.name}: sha256 differs from labelset.json; label the pool again")
    uri = f"{store.uri}/{shard.name}"
    with explain_table_errors(uri, CURE):
        table = read_table(data)
    _check_row_columns(table, uri)
    rows = LabelRows(table)
    if len(rows.keys) != shard.rows:
        raise DataError(f"{store.uri}/{shard.name}: {len(rows.keys)} rows, labelset.json says {shard.rows}")
    return rows


def iter_label_rows(store: Store, label_set: LabelSet) -> Iterator[LabelRows]:
    """Reads shard by shard, in the dataset's order. Raises what `read_label_rows` raises."""
    for shard in label_set.shards:
        rows = read_label_rows(store, shard)
        _check_row_values(label_set, f"{store.uri}/{shard.name}", rows.top_class[rows.readable], rows.confidence[rows.readable])
        yield rows


def _check_row_columns(table: pa.Table, uri: str, columns: Sequence[str] | None = None) -> None:
    """Raises DataError unless the table has these columns, by default all, as `build_row_schema` has them."""
    kinds = {field.name: field.type for field in table.schema}
    lists = [kinds[name] for name in ("top_class", "top_prob") if name in kinds and pa.types.is_fixed_size_list(kinds[name])]
    log8 = bool(lists) and pa.types.is_uint8(lists[-1].value_type)
    schema = build_row_schema(lists[0].list_size if lists else 1, log8=log8, foreign_score="foreign_score" in kinds)
    check_columns(table, uri, pa.schema([field for field in schema if columns is None or field.name in columns]), CURE)
    if "key" in kinds and table["key"].null_count:
        raise DataError(f"{uri}: key: has cells without a value; {CURE}")
    for name in ("top_class", "top_prob"):
        if name in kinds and (table[name].null_count != table["confidence"].null_count or _has_null_items(table[name])):
            raise DataError(f"{uri}: {name}: has no value in a row that has a confidence; {CURE}")


def _has_null_items(column: pa.ChunkedArray) -> bool:
    return any(chunk.flatten().null_count for chunk in column.chunks)


def _check_row_values(
    label_set: LabelSet, uri: str, class_ids: npt.NDArray[np.uint16], confidence: npt.NDArray[np.floating[Any]]
) -> None:
    """What else would be an index outside an array. Raises DataError."""
    if class_ids.ndim != 2 or class_ids.shape[1] != label_set.top_k:
        raise DataError(
            f"{uri}: top_class: has {class_ids.shape[-1]} classes, {LabelSet.filename} says {label_set.top_k}; {CURE}"
        )
    if class_ids.size and class_ids.max() >= len(label_set.classes):
        raise DataError(f"{uri}: top_class: {class_ids.max()}: a class that does not exist; {CURE}")
    if confidence.size and not (confidence.min() >= 0 and confidence.max() <= 1.001):
        raise DataError(f"{uri}: confidence: from {confidence.min()} to {confidence.max()}: must be from 0 to 1; {CURE}")


def find_foreign_rows(foreign_score: npt.NDArray[np.float32] | None, limit: float | None, count: int) -> npt.NDArray[np.bool_]:
    """bool [count]: the rows with a score above the limit; none without a limit. `foreign_score`: float32 [count], NaN without a label."""
    if foreign_score is None or limit is None:
        return np.zeros(count, np.bool_)
    return np.greater(foreign_score, np.float32(limit), dtype=np.bool_)


def iter_top_classes(
    store: Store, label_set: LabelSet, *, all_probabilities: bool = True, foreign_limit: float | None = None
) -> Iterator[TopClasses]:
    """As `iter_label_rows`, without keys and reasons. Without `all_probabilities` only the first one of each image is read.
    `foreign_limit`: see `LabelRows.build_scores`."""
    columns = ["confidence", "top_class", *(["top_prob"] if all_probabilities else [])]
    if foreign_limit is not None:
        columns.append("foreign_score")
    for shard in label_set.shards:
        path = store.path(shard.name)
        if sha256_file(path) != shard.sha256:
            raise DataError(f"{store.uri}/{shard.name}: sha256 differs from labelset.json; label the pool again")
        uri = f"{store.uri}/{shard.name}"
        with explain_table_errors(uri, CURE):
            table = read_table_file(path, columns)
        _check_row_columns(table, uri, columns)
        if len(table) != shard.rows:
            raise DataError(f"{uri}: {len(table)} rows, {LabelSet.filename} says {shard.rows}; {CURE}")
        raw = table["confidence"].combine_chunks()
        confidence = raw.fill_null(0).to_numpy(zero_copy_only=False)
        foreign_score = table["foreign_score"].to_numpy() if foreign_limit is not None else None
        foreign = find_foreign_rows(foreign_score, foreign_limit, len(raw))
        valid = raw.is_valid().to_numpy(zero_copy_only=False)
        class_ids = _unpack_lists(table["top_class"], table.schema.field("top_class").type.list_size)
        # Rows without labels have zeros, which are no fault: leaving them out would copy all lists.
        _check_row_values(label_set, uri, class_ids, confidence)
        yield TopClasses(
            valid & ~foreign,
            class_ids,
            _decode_probabilities(table["top_prob"], label_set.top_k) if all_probabilities else confidence[:, None],
            confidence,
            foreign,
        )


def iter_shard_scores(
    store: Store,
    label_set: LabelSet,
    top_k: int,
    align: Callable[[TopClasses], TopClasses] | None = None,
    foreign_limit: float | None = None,
) -> Iterator[ShardScores]:
    """As `iter_label_rows`, without the columns that a selection does not need. `align`: changes the probabilities. `foreign_limit`:
    see `LabelRows.build_scores`."""
    shards = iter_top_classes(store, label_set, all_probabilities=top_k > 1 or align is not None, foreign_limit=foreign_limit)
    for shard, top_classes in zip(label_set.shards, shards, strict=True):
        labeled, class_ids, probabilities, confidence, _ = align(top_classes) if align else top_classes
        scores = probabilities[:, :top_k].astype(np.float32)
        scores[:, 0] = confidence
        yield ShardScores(labeled, class_ids[:, :top_k], scores, partial(read_row_keys, store, shard), top_classes.foreign)


def read_row_keys(store: Store, shard: LabelShard, rows: Sequence[int] | npt.NDArray[np.int64]) -> list[str]:
    """Keys of these rows of a label shard that was read before."""
    keys: list[str] = read_table_file(store.path(shard.name), ["key"])["key"].take(pa.array(rows, pa.int64())).to_pylist()
    return keys


def compute_histogram(
    predicted: npt.NDArray[np.uint16], confidence: npt.NDArray[np.float32], num_classes: int
) -> npt.NDArray[np.uint64]:
    """Counts uint64 [classes, 1000] of confidences in [0, 1]; bin b holds [b, b + 1) / 1000, the last one 1 too."""
    bins = np.minimum((confidence * HISTOGRAM_BINS).astype(np.int64), HISTOGRAM_BINS - 1)
    flat = np.bincount(predicted.astype(np.int64) * HISTOGRAM_BINS + bins, minlength=num_classes * HISTOGRAM_BINS)
    return flat.reshape(num_classes, HISTOGRAM_BINS).astype(np.uint64)


CURE = "label the pool again"
HISTOGRAM_SCHEMA = pa.schema(
    [pa.field("class", pa.uint16(), False), pa.field("bin", pa.uint16(), False), pa.field("count", pa.uint64(), False)]
)


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
    write_table(store, key, build_histogram_table(counts))


def read_histogram(store: Store, num_classes: int, key: str = HISTOGRAM) -> npt.NDArray[np.uint64]:
    """Counts uint64 [classes, 1000]."""
    uri = f"{store.uri}/{key}"
    table = parse_table(store.get(key), uri, HISTOGRAM_SCHEMA, CURE)
    counts = np.zeros((num_classes, HISTOGRAM_BINS), np.uint64)
    for name, limit in (("class", num_classes), ("bin", HISTOGRAM_BINS)):
        values = table[name].to_numpy()
        if values.size and values.max() >= limit:
            raise DataError(f"{uri}: {name}: {values.max()}: must be below {limit}; {CURE}")
    counts[table["class"].to_numpy(), table["bin"].to_numpy()] = table["count"].to_numpy()
    return counts


def find_label_shard(label_store: Store, shard: Shard) -> LabelShard | None:
    """The record of a labeled shard; None if it is not labeled, or if a part of it was lost or cut off, so that it is made again."""
    record = LabelShard.find_file(label_store, label_shard_key(shard.name))
    if record is None or record.source != shard.sha256:
        return None
    histogram = histogram_key(record.name)
    is_whole = (
        label_store.exists(record.name) and label_store.size(record.name) == record.bytes and label_store.exists(histogram)
    )
    try:
        if is_whole:
            read_table(label_store.get(histogram))
            return record
    except (pa.ArrowException, OSError):
        pass
    log.get_logger().warning("damaged, and made again", file=f"{label_store.uri}/{record.name}")
    return None


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
    temperature: float = 1.0,
    foreign_score: ForeignScore = "none",
) -> LabelSet:
    """Joins labeled shards into a label set, without reading a row, and writes its histogram; the caller saves it.

    Raises StoreError naming the shard that is not labeled yet.
    """
    label_set = LabelSet(
        views=views,
        ensemble=ensemble,
        probabilities=probabilities,
        temperature=temperature,
        foreign_score=foreign_score,
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
    """Reads a label set from end to end. Returns its number of rows.

    Checks checksums, counts of rows and of nulls, and histograms. Probabilities must lie in [0, 1], fall, and sum to at most
    1 (to 1 where all classes are kept) within the precision of their encoding; the first one must be the confidence. Given the
    pool, keys must be those of the images. Raises DataError naming the shard, the row and the problem.
    """
    num_classes = len(label_set.classes)
    counts = np.zeros((num_classes, HISTOGRAM_BINS), np.uint64)
    for number, shard in enumerate(label_set.shards):
        rows = read_label_rows(label_store, shard)
        uri = f"{label_store.uri}/{shard.name}"
        readable = rows.readable
        nulls = int(rows.left_out.sum()), int((~readable & ~rows.left_out).sum())
        if nulls != (shard.left_out, shard.unreadable):
            raise DataError(f"{uri}: {nulls[0]} images left out and {nulls[1]} unreadable; {LabelSet.filename} says otherwise")
        _check_rows(uri, rows, num_classes, label_set.probabilities)
        if label_set.foreign_score != "none" and (rows.foreign_score is None or np.isnan(rows.foreign_score[readable]).any()):
            raise DataError(f"{uri}: labels without a foreign score; label the pool again")
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
    """[N, k]; zeros in rows without labels."""
    values = _unpack_lists(column, k, null=LOG8_ZERO if pa.types.is_uint8(column.type.value_type) else 0)
    return LOG8_PROBABILITIES[values] if values.dtype == np.uint8 else values.astype(np.float16)


def encode_log8(probabilities: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Encodes probabilities in [0, 1]: -16 log₂ p, rounded and capped at 255, which stands for 0."""
    with np.errstate(divide="ignore"):
        exponents = np.rint(-16 * np.log2(probabilities))
    return np.asarray(np.clip(exponents, 0, LOG8_ZERO), np.uint8)


def _unpack_lists(column: pa.ChunkedArray, k: int, null: int = 0) -> npt.NDArray[Any]:
    """[N, k] values of a column of fixed-size lists; `null` where the list is null."""
    array = column.combine_chunks()
    if array.null_count == 0:
        unpacked: npt.NDArray[Any] = array.flatten().to_numpy(zero_copy_only=False).reshape(-1, k)
        return unpacked
    # flatten() leaves out null lists.
    flat = array.flatten().to_numpy(zero_copy_only=False)
    values = np.full((len(array), k), null, flat.dtype)
    values[array.is_valid().to_numpy(zero_copy_only=False)] = flat.reshape(-1, k)
    return values
