"""Accuracy of a model: each image once, without noise, with averaged weights; one row is kept per image.

Nothing here grows with the square of the classes, and probabilities are kept for one batch: there may be 20,000 classes.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ns.core import log
from ns.core.digest import sha256_bytes
from ns.core.errors import DataError
from ns.data.dataset import Dataset
from ns.data.loading.shard_reader import ImageSource
from ns.data.subsample import Subsample, draw_rows
from ns.evaluation.multi_label import MultiLabels
from ns.evaluation.result import (
    MAX_CONFUSIONS,
    PREDICTIONS_SCHEMA,
    Calibration,
    Confusion,
    Evaluation,
    ReliabilityBin,
)
from ns.modeling.labeler import Labeler
from ns.modeling.predictor import Predictor
from ns.storage import Store
from ns.storage.parquet import encode_table

RELIABILITY_BINS = 15
"""Bins of the reliability diagram, as in arXiv:1706.04599."""


def evaluate_accuracy(
    predictor: Predictor | Labeler,
    data_store: Store,
    data: Dataset,
    target: Store,
    *,
    subsample: Subsample | None = None,
    multi_labels: MultiLabels | None = None,
) -> Evaluation:
    """Evaluates a model, or models that label together, on a labeled dataset and writes the evaluation into `target`.

    The dataset's classes must be, by name, some of those that the model chooses from. Raises DataError if they are not, if images
    have no label, or if no image is readable.
    """
    tables = []
    unreadable = 0
    for batch in iter_predicted_batches(predictor, data_store, data, subsample):
        unreadable += batch.unreadable
        tables.append(build_predictions_table(batch.keys, batch.class_ids, batch.probabilities))
    table = pa.concat_tables(tables) if tables else PREDICTIONS_SCHEMA.empty_table()
    if len(table) == 0:
        raise DataError(f"{data_store.uri}: no readable image to evaluate on")
    encoded = encode_table(table)
    evaluation = summarize_predictions(
        table,
        model=predictor.manifest.digest,
        dataset=data.digest,
        classes=predictor.manifest.classes,
        unreadable=unreadable,
        mode=str(predictor.mode),
        predictions_sha256=sha256_bytes(encoded),
        name=data.name,
        subsample=subsample,
        scored_classes=predictor.scored_classes,
        multi_labels=multi_labels,
    )
    target.put(evaluation.predictions_key, encoded)
    return evaluation.commit(target)


class PredictedBatch(NamedTuple):
    """The readable images of a batch."""

    keys: list[str]
    class_ids: npt.NDArray[np.int64]
    """[N]: true class, as an index of the model's classes."""
    probabilities: npt.NDArray[np.float32]
    """[N, classes]"""
    unreadable: int
    """Images of the batch that could not be read."""


def iter_predicted_batches(
    predictor: Predictor | Labeler, data_store: Store, data: Dataset, subsample: Subsample | None = None
) -> Iterator[PredictedBatch]:
    """The predictions for a labeled dataset, in its order. Raises DataError as `map_class_ids` does, and for images without a label."""
    model_class_ids = map_class_ids(predictor, data_store, data)
    source = ImageSource(data_store, data, max_open_shards=2)
    rows = draw_rows(source, len(data.shards), len(data.classes), subsample)
    progress = log.Progress(sum(map(len, rows.values())), "images")
    shards = list(rows)
    for position, shard in enumerate(shards):
        source.fetch_ahead(shards[position + 1 : position + 2])
        shard_rows = rows[shard]
        class_ids = model_class_ids[source.read_class_ids(shard, len(data.classes))[shard_rows]]
        index = source.read_index(shard)
        starts = range(0, len(shard_rows), predictor.batch)
        # In batches: neither a shard's images nor its probabilities must fit into memory.
        if len(shard_rows) == len(index):
            encoded_images = source.read_encoded(shard)
            batches = (list(itertools.islice(encoded_images, predictor.batch)) for _ in starts)
        else:
            batches = (read_encoded_images(source, shard, shard_rows[start : start + predictor.batch]) for start in starts)
        for start, probabilities in zip(starts, predictor.predict_groups(batches, progress), strict=True):
            readable = np.flatnonzero(~np.isnan(probabilities[:, 0]))
            keys = [index.keys[row] for row in shard_rows[start + readable].tolist()]
            unreadable = len(probabilities) - len(readable)
            yield PredictedBatch(keys, class_ids[start + readable], probabilities[readable], unreadable)


def map_class_ids(predictor: Predictor | Labeler, data_store: Store, data: Dataset) -> npt.NDArray[np.int64]:
    """int64 [classes of the dataset]: class id of the dataset → class id of the model, by name.

    Raises DataError for a class that the model does not choose from.
    """
    class_ids = {name: number for number, name in enumerate(predictor.manifest.classes)}
    for names, problem in (
        (class_ids, "that the model does not know"),
        (set(predictor.scored_classes or class_ids), "that is left out of the answers (classes)"),
    ):
        unknown = [name for name in data.classes if name not in names]
        if unknown or not data.classes:
            subject = f"class {unknown[0]!r} ({len(unknown)} of {len(data.classes)})" if unknown else "no labels, so none"
            raise DataError(f"{data_store.uri}: has {subject} {problem}; evaluate on images of the model's classes")
    return np.array([class_ids[name] for name in data.classes], np.int64)


def read_encoded_images(source: ImageSource, shard: int, rows: npt.NDArray[np.int64]) -> list[Any]:
    """The encoded images at `rows` of a shard, in this order."""
    return [next(source.read_encoded(shard, row, row + 1)) for row in rows.tolist()]


def build_predictions_table(
    keys: list[str], class_ids: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float32]
) -> pa.Table:
    """Rows of `PREDICTIONS_SCHEMA`. The rank counts the classes that are more probable than the true one, or equally probable and
    before it. `class_ids`: [N]; `probabilities`: [N, classes]."""
    true_probability = np.take_along_axis(probabilities, class_ids[:, None], axis=1)
    before = np.arange(probabilities.shape[1])[None, :] < class_ids[:, None]
    rank = ((probabilities > true_probability) | ((probabilities == true_probability) & before)).sum(1)
    return pa.table(
        [
            pa.array(keys, pa.string()),
            pa.array(class_ids.astype(np.uint16)),
            pa.array(probabilities.argmax(1).astype(np.uint16)),
            pa.array(probabilities.max(1)),
            pa.array(rank.astype(np.uint16)),
        ],
        schema=PREDICTIONS_SCHEMA,
    )


def summarize_predictions(
    table: pa.Table,
    *,
    model: str,
    dataset: str,
    classes: tuple[str, ...],
    unreadable: int,
    predictions_sha256: str,
    mode: str,
    name: str,
    subsample: Subsample | None = None,
    scored_classes: tuple[str, ...] | None = None,
    multi_labels: MultiLabels | None = None,
) -> Evaluation:
    """Totals of a table of predictions."""
    class_ids, predicted, rank = (table[column].to_numpy() for column in ("class_id", "predicted_class_id", "rank"))
    class_images, class_correct, class_predicted = (
        np.bincount(values, minlength=len(classes)) for values in (class_ids, class_ids[rank == 0], predicted)
    )
    has_images = class_images > 0
    confusions = count_confusions(class_ids, predicted)
    multi_label = multi_labels.score_predictions(table["key"].to_pylist(), predicted) if multi_labels else (None, None)
    return Evaluation(
        model=model,
        dataset=dataset,
        name=name,
        classes=classes,
        images=len(table),
        unreadable=unreadable,
        mode=mode,
        top1=float(np.mean(rank == 0)),
        top5=float(np.mean(rank < 5)),
        balanced_accuracy=float(np.mean(class_correct[has_images] / class_images[has_images])),
        class_images=tuple(class_images.tolist()),
        class_correct=tuple(class_correct.tolist()),
        class_predicted=tuple(class_predicted.tolist()),
        confusions=confusions[:MAX_CONFUSIONS],
        confusions_left_out=max(0, len(confusions) - MAX_CONFUSIONS),
        calibration=compute_calibration(table["confidence"].to_numpy(), rank == 0),
        subsample=subsample,
        scored_classes=scored_classes,
        multi_label_top1=multi_label[0],
        multi_label_images=multi_label[1],
        predictions_sha256=predictions_sha256,
    )


def count_confusions(class_ids: npt.NDArray[np.integer], predicted: npt.NDArray[np.integer]) -> tuple[Confusion, ...]:
    """Wrong answers by pair of classes, the most frequent first, at most one pair per image. Arrays [N], same order."""
    is_wrong = class_ids != predicted
    pairs = np.stack([class_ids[is_wrong], predicted[is_wrong]], axis=1)
    distinct, images = np.unique(pairs, axis=0, return_counts=True)
    order = np.argsort(-images, kind="stable")
    return tuple(
        Confusion(class_id=class_id, predicted_class_id=predicted_class_id, images=count)
        for (class_id, predicted_class_id), count in zip(distinct[order].tolist(), images[order].tolist(), strict=True)
    )


def compute_calibration(
    confidence: npt.NDArray[np.float32], is_right: npt.NDArray[np.bool_], num_bins: int = RELIABILITY_BINS
) -> Calibration:
    """Confidence against accuracy, in equal bins of confidence that include their upper end. Arrays [N], N > 0."""
    bin_index = np.clip(np.ceil(confidence.astype(np.float64) * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    images, confidence_sums, correct = (
        np.bincount(bin_index, weights, num_bins) for weights in (None, confidence.astype(np.float64), is_right)
    )
    filled = np.maximum(images, 1)
    middles = (np.arange(num_bins) + 0.5) / num_bins
    reliability_bins = tuple(
        ReliabilityBin(images=int(count), confidence=float(mean if count else middle), accuracy=float(share))
        for count, mean, middle, share in zip(images, confidence_sums / filled, middles, correct / filled, strict=True)
    )
    return Calibration(ece=float(np.abs(correct - confidence_sums).sum() / len(confidence)), bins=reliability_bins)
