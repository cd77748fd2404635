"""Labels from elsewhere: a table, or tasks of Label Studio, become a label set like any other.

A table (CSV, TSV or Parquet) has a column with the key, or the path, of each image, and either a class and perhaps a confidence, or a
column of probabilities for each class. An export of Label Studio has a class for each task, chosen by a person or predicted by a model.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ns.config.schema import LabelingConfig
from ns.core.digest import digest_json, sha256_file
from ns.core.errors import DataError
from ns.data.class_names import NUMBER, ClassLabel, match_indices, match_names, normalize_name, shorten_names
from ns.data.dataset import Dataset
from ns.data.importing.label_studio import TaskLabel
from ns.data.importing.tables import PATH_COLUMNS, find_column, map_columns, open_batches, read_cell, read_tasks
from ns.data.importing.tars import LABEL_FIELDS
from ns.data.index import ShardIndex
from ns.data.key_list import spell_key
from ns.labeling.label_set import LEFT_OUT_PREFIX, LabelSet, count_kept_classes, join_label_shards
from ns.labeling.offline import LabelingInputs
from ns.labeling.predict import write_label_shard
from ns.modeling.predictor import ShardPredictions
from ns.storage import open_parent, open_store

KEY_COLUMNS = ("key", *PATH_COLUMNS)
CONFIDENCE_COLUMNS = ("confidence", "score", "probability")
IMPORT_VERSION = 1
"""Part of the digest of imported label sets. Raised when the same table would give other labels."""
MAX_SUM_ERROR = 0.02
"""Probabilities that sum to 1 within this are divided by their sum: tables are rounded."""
NO_LABEL = f"{LEFT_OUT_PREFIX}no label was imported"


class ImportedLabels(NamedTuple):
    label_set: LabelSet
    labeled: int
    """Images of the dataset that have a label now."""
    unmatched: list[str]
    """Names in the table of which the dataset has no image, in order."""


def import_labels(
    labels_uri: str, pool_uri: str, out_uri: str, classes: Sequence[str], *, source: str = "", prefix: str = "", top_k: int = 10
) -> ImportedLabels:
    """Writes the label set of a dataset from a table or from Label Studio's JSON. Images without a row get no label.

    `source`: who made the labels; part of the digest. `prefix`: what stands before the keys or paths in the table. A killed import is
    taken up by the same call. Raises DataError, naming file, row and value, for columns that are missing, classes that are none of
    `classes`, numbers out of range, contradictions, and a table that names no image of the dataset.
    """
    pool_store, label_store = open_store(pool_uri), open_store(out_uri)
    if not pool_store.exists(Dataset.filename):
        raise DataError(f"{pool_uri}: no {Dataset.filename} here; import the images first: ns data import SOURCE {pool_uri}")
    pool = Dataset.load(pool_store)
    folder, file = open_parent(labels_uri)
    path = folder.path(file)
    rows = _collect_rows(labels_uri, _read_rows(path, labels_uri, classes), classes, prefix)
    config = LabelingConfig(top_k=top_k)
    inputs = LabelingInputs(
        dataset=pool.digest,
        teacher=digest_json({"labels": sha256_file(path), "source": source}),
        code=digest_json({"import": IMPORT_VERSION}),
        views=config.views,
        ensemble=config.ensemble,
        probabilities=config.probabilities,
        top_k=count_kept_classes(len(classes), top_k),
        selection=None,
    )
    inputs.claim_store(label_store)
    labeled = 0
    for shard in pool.shards:
        predictions = rows.build_predictions(ShardIndex.load(pool_store, shard))
        labeled += len(predictions.index) - len(predictions.errors)
        write_label_shard(label_store, shard, [predictions], config, "imported")
    unmatched = rows.list_unmatched()
    if not labeled:
        raise DataError(
            f"{labels_uri}: none of its {len(rows.names):,} names is an image of {pool_uri}; the first: {rows.names[0]!r}; "
            "give keys, or paths as they were when the images were imported; --prefix removes what stands before them"
        )
    label_set = join_label_shards(
        label_store, pool, teacher=inputs.teacher, code=inputs.code, classes=tuple(classes), top_k=top_k
    )
    label_set.save(label_store)
    return ImportedLabels(label_set, labeled, unmatched)


class _Row(NamedTuple):
    name: str
    label: ClassLabel | None
    """None without a label, and in tables of probabilities."""
    confidence: float
    probabilities: npt.NDArray[np.float32] | None
    """[classes]"""
    where: str
    """`row 3`, for messages."""


def _read_rows(path: Path, uri: str, classes: Sequence[str]) -> Iterator[_Row]:
    try:
        tasks = read_tasks(path, uri)
        yield from _read_table(path, uri, classes) if tasks is None else map(_read_task, range(1, len(tasks) + 1), tasks)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{uri}: not a readable table: {(str(error) or 'damaged').splitlines()[0]}; write it again") from error


def _read_task(number: int, task: TaskLabel) -> _Row:
    label = None if task.class_name is None else normalize_name(task.class_name)
    return _Row(task.key, label, task.confidence, None, f"task {number}")


def _read_table(path: Path, uri: str, classes: Sequence[str]) -> Iterator[_Row]:
    batches = open_batches(path, uri)
    columns = map_columns(uri, batches.schema.names, (*KEY_COLUMNS, *LABEL_FIELDS, *CONFIDENCE_COLUMNS, *classes))
    key_column = find_column(uri, columns, KEY_COLUMNS, "the key or path of each image")
    class_columns = match_names([normalize_name(name) for name in batches.schema.names if name != key_column], classes)[0]
    has_probabilities = len(set(class_columns.values())) == len(classes)
    label_column = None if has_probabilities else find_column(uri, columns, LABEL_FIELDS, "its class")
    confidence_column = next((columns[name] for name in CONFIDENCE_COLUMNS if name in columns), None)
    spellings = {normalize_name(name): name for name in batches.schema.names}
    order = {class_id: spellings[str(name)] for name, class_id in class_columns.items()}
    number = 0
    for batch in batches:
        table = batch.to_pydict()
        for row in range(batch.num_rows):
            number += 1
            where = f"row {number}"
            name = read_cell(table[key_column][row])
            if not name:
                raise DataError(f"{uri}: {where}: {key_column}: is empty; give the key or path of the image, or remove the row")
            if label_column is None:
                values = [table[order[class_id]][row] for class_id in range(len(classes))]
                yield _Row(name, None, 0.0, _read_probabilities(values, f"{uri}: {where}"), where)
            else:
                label = normalize_name(read_cell(table[label_column][row]))
                confidence = 1.0
                if confidence_column is not None:
                    confidence = _read_number(table[confidence_column][row], f"{uri}: {where}: {confidence_column}")
                yield _Row(name, label or None, confidence, None, where)


def _read_number(cell: Any, where: str) -> float:
    try:
        number = float(read_cell(cell))
    except ValueError:
        number = float("nan")
    if not 0 <= number <= 1:
        raise DataError(f"{where}: {read_cell(cell)!r}: must be a number from 0 to 1")
    return number


def _read_probabilities(cells: Sequence[Any], where: str) -> npt.NDArray[np.float32]:
    probabilities = np.array([_read_number(cell, f"{where}: probability") for cell in cells], np.float32)
    total = float(probabilities.sum())
    if abs(total - 1) > MAX_SUM_ERROR:
        raise DataError(f"{where}: its probabilities sum to {total:.3g}; they must sum to 1: give a softmax's, not logits")
    return probabilities / np.float32(total)


@dataclass(frozen=True)
class _ForeignRows:
    """The rows of a table, and which of them an image was found for."""

    names: list[str]
    by_key: dict[str, int]
    """Key that an image may have → row, of rows with a label."""
    contested: dict[str, str]
    """Key that images of several rows may have, as of `IMG_1.jpg` and `IMG_1.png` → how these differ."""
    class_ids: npt.NDArray[np.int64]
    """[rows]; -1 without a label."""
    confidence: npt.NDArray[np.float32]
    """[rows]"""
    probabilities: npt.NDArray[np.float32] | None
    """[rows, classes] of a table of probabilities."""
    num_classes: int
    matched: npt.NDArray[np.bool_]
    """[rows]; filled by `build_predictions`."""

    def build_predictions(self, index: ShardIndex) -> ShardPredictions:
        if unclear := next((key for key in index.keys if key in self.contested), None):
            raise DataError(self.contested[unclear])
        rows = np.array([self.by_key.get(key, -1) for key in index.keys], np.int64)
        self.matched[rows[rows >= 0]] = True
        labeled = np.flatnonzero((rows >= 0) & (self.class_ids[rows] >= 0))
        probabilities = np.full((len(rows), self.num_classes), np.nan, np.float32)
        if self.probabilities is not None:
            probabilities[labeled] = self.probabilities[rows[labeled]]
        else:
            # What the best class leaves is spread evenly over the others.
            confidence = self.confidence[rows[labeled]]
            probabilities[labeled] = ((1 - confidence) / np.float32(self.num_classes - 1))[:, None]
            probabilities[labeled, self.class_ids[rows[labeled]]] = confidence
        unlabeled = np.flatnonzero(np.isnan(probabilities[:, 0]))
        return ShardPredictions(index, probabilities, dict.fromkeys(unlabeled.tolist(), NO_LABEL))

    def list_unmatched(self) -> list[str]:
        # Of rows that name an image again, the first is its row.
        return [name for name in self.names if not any(self.matched[self.by_key[key]] for key in spell_key(name))]


def _collect_rows(uri: str, rows: Iterable[_Row], classes: Sequence[str], prefix: str) -> _ForeignRows:
    names: list[str] = []
    labels: list[ClassLabel | None] = []
    confidence: list[float] = []
    probabilities: list[npt.NDArray[np.float32]] = []
    row_names: list[str] = []
    for row in rows:
        names.append(row.name.removeprefix(prefix))
        labels.append(row.label)
        confidence.append(row.confidence)
        row_names.append(row.where)
        if row.probabilities is not None:
            probabilities.append(row.probabilities)
    if not names:
        raise DataError(f"{uri}: has no rows; must have one for each labeled image")
    table = np.stack(probabilities) if probabilities else None
    if table is not None:
        class_ids = table.argmax(1)
        confidence = table.max(1).tolist()
    else:
        meanings = _match_labels(uri, labels, row_names, classes)
        class_ids = np.array([-1 if label is None else meanings[label] for label in labels], np.int64)
        shares = np.array(confidence, np.float32)
        if len(too_low := np.flatnonzero((class_ids >= 0) & (shares * len(classes) < 1))):
            row_number = int(too_low[0])
            raise DataError(
                f"{uri}: {row_names[row_number]}: confidence {confidence[row_number]:g}: below 1 / {len(classes)} classes, "
                "so that another class would be more likely; give the best class and its probability"
            )
    by_key: dict[str, int] = {}
    contested: dict[str, str] = {}
    for number, name in enumerate(names):
        for key in spell_key(name):
            first = by_key.setdefault(key, number)
            if first == number:
                continue
            told = [
                f"{classes[class_ids[row]]!r} ({confidence[row]:g})" if class_ids[row] >= 0 else "no class"
                for row in (first, number)
            ]
            if told[0] != told[1] or (table is not None and not np.array_equal(table[first], table[number])):
                message = f"{uri}: {row_names[first]} and {row_names[number]}: {name}: {' and '.join(told)}; keep one of them"
                if names[first] == name:
                    raise DataError(message)
                # Two files, whose keys differ if both are in the dataset.
                contested[key] = message
    return _ForeignRows(
        names, by_key, contested, class_ids, np.array(confidence, np.float32), table, len(classes), np.zeros(len(names), bool)
    )


def _match_labels(
    uri: str, labels: Sequence[ClassLabel | None], row_names: Sequence[str], classes: Sequence[str]
) -> dict[ClassLabel, int]:
    """Label → index in `classes`. Labels that are all numbers may be names or indices."""
    texts = {str(label) for label in labels if label is not None}
    matched, unknown = match_names(texts, classes)
    if unknown and all(NUMBER.fullmatch(text) for text in texts):
        by_index = match_indices(uri, {int(text) for text in texts}, classes)
        return {text: by_index[int(text)] for text in texts}
    if unknown:
        row_name = row_names[next(row for row, label in enumerate(labels) if label == unknown[0])]
        raise DataError(
            f"{uri}: {row_name}: class {unknown[0]!r}: is none of the labeled classes {shorten_names(classes)}; rename it, or remove "
            f"its rows{f' ({len(unknown)} names are no classes)' if len(unknown) > 1 else ''}"
        )
    return matched
