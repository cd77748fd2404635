"""Accuracy: every image once, un-noised, averaged weights; a row kept for each image."""

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ns.core import log
from ns.core.digest import sha256_bytes
from ns.core.errors import DataError
from ns.data.dataset import Dataset
from ns.data.loading.shard_reader import ImageSource
from ns.evaluation.multi_label import MultiLabels
from ns.evaluation.result import MANIFEST, PREDICTIONS, SCHEMA, Bin, Calibration, Evaluation, Subsample
from ns.evaluation.subsample import drawn
from ns.modeling.predictor import Predictor
from ns.storage import Store

BINS = 15
"""Of the reliability diagram, as is usual since arXiv:1706.04599."""


def evaluate(
    predictor: Predictor,
    data_folder: Store,
    data: Dataset,
    folder: Store,
    *,
    subsample: Subsample | None = None,
    multi_labels: MultiLabels | None = None,
) -> Evaluation:
    """Evaluates a model on a labelled dataset and writes the evaluation into `folder`.

    The dataset's classes are the model's or some of them, by name. Raises DataError for images without a label, or a class that
    the model does not know, or does not choose between.
    """
    to_model = model_labels(predictor, data_folder, data)
    source = ImageSource(data_folder, data, held=2)
    rows = drawn(source, len(data.shards), len(data.classes), subsample)
    progress = log.Progress(sum(map(len, rows.values())), "images")
    parts = []
    unreadable = 0
    shards = list(rows)
    for place, shard in enumerate(shards):
        source.fetch_ahead(shards[place + 1 : place + 2])
        own = rows[shard]
        labels = to_model[source.labels(shard, len(data.classes))[own]]
        index = source.index(shard)
        if len(own) == len(index):
            probabilities = predictor.shard(source, shard, progress).probabilities
        else:
            # A few at a time: a shard may be larger than memory.
            few = (images_of(source, shard, own[at : at + predictor.batch]) for at in range(0, len(own), predictor.batch))
            probabilities = np.concatenate(list(predictor.groups(few, progress)))
        readable = ~np.isnan(probabilities[:, 0])
        unreadable += int((~readable).sum())
        keys = [index.keys[row] for row in own[readable].tolist()]
        parts.append(table_of(keys, labels[readable], probabilities[readable]))
    table = pa.concat_tables(parts) if parts else SCHEMA.empty_table()
    if len(table) == 0:
        raise DataError(f"{data_folder.uri}: no readable image to evaluate on")
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    evaluation = summarise(
        table,
        model=predictor.card.digest,
        dataset=data.digest,
        classes=predictor.card.classes,
        unreadable=unreadable,
        mode=str(predictor.mode),
        predictions_sha256=sha256_bytes(sink.getvalue()),
        name=data.name,
        subsample=subsample,
        scored=predictor.scored,
        multi_labels=multi_labels,
    )
    folder.put(PREDICTIONS, sink.getvalue())
    evaluation.write(folder, MANIFEST)
    return evaluation


def model_labels(predictor: Predictor, data_folder: Store, data: Dataset) -> npt.NDArray[np.int64]:
    """Class index of a dataset → that of the model, by name. Raises DataError for a class that is no answer of the model's."""
    place = {name: number for number, name in enumerate(predictor.card.classes)}
    for known, wrong in (
        (place, "that the model does not know"),
        (set(predictor.scored or place), "that is left out of the answers (classes)"),
    ):
        unknown = [name for name in data.classes if name not in known]
        if unknown or not data.classes:
            named = f"class {unknown[0]!r} ({len(unknown)} of {len(data.classes)})" if unknown else "no labels, so none"
            raise DataError(f"{data_folder.uri}: has {named} {wrong}; evaluate on images of the model's classes")
    return np.array([place[name] for name in data.classes], np.int64)


def images_of(source: ImageSource, shard: int, rows: npt.NDArray[np.int64]) -> list[Any]:
    """Encoded images of some rows of a shard."""
    return [next(source.encoded(shard, row, row + 1)) for row in rows.tolist()]


def table_of(keys: list[str], labels: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float32]) -> pa.Table:
    """Rows of the predictions. The label's rank counts the classes that are more probable, or equally so and before it."""
    own = np.take_along_axis(probabilities, labels[:, None], axis=1)
    before = np.arange(probabilities.shape[1])[None, :] < labels[:, None]
    rank = ((probabilities > own) | ((probabilities == own) & before)).sum(1)
    return pa.table(
        [
            pa.array(keys, pa.string()),
            pa.array(labels.astype(np.uint16)),
            pa.array(probabilities.argmax(1).astype(np.uint16)),
            pa.array(probabilities.max(1)),
            pa.array(rank.astype(np.uint16)),
        ],
        schema=SCHEMA,
    )


def summarise(
    table: pa.Table,
    *,
    model: str,
    dataset: str,
    classes: tuple[str, ...],
    unreadable: int,
    predictions_sha256: str,
    mode: str = "float32",
    name: str | None = None,
    subsample: Subsample | None = None,
    scored: tuple[str, ...] | None = None,
    multi_labels: MultiLabels | None = None,
) -> Evaluation:
    """Totals of a table of predictions."""
    labels, predicted, rank = (table[name].to_numpy() for name in ("label", "predicted", "rank"))
    count = len(classes)
    several = multi_labels.score(table["key"].to_pylist(), predicted) if multi_labels else (None, None)
    confusion = np.bincount(labels.astype(np.int64) * count + predicted, minlength=count * count).reshape(count, count)
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
        confusion=tuple(tuple(int(cell) for cell in row) for row in confusion),
        calibration=calibration(table["confidence"].to_numpy(), rank == 0),
        subsample=subsample,
        scored=scored,
        multi_label_top1=several[0],
        multi_label_images=several[1],
        predictions_sha256=predictions_sha256,
    )


def calibration(confidence: npt.NDArray[np.float32], right: npt.NDArray[np.bool_], bins: int = BINS) -> Calibration:
    """Confidence against accuracy, in equal bins of confidence, each closed above. Arrays [N], N > 0."""
    place = np.clip(np.ceil(confidence.astype(np.float64) * bins).astype(np.int64) - 1, 0, bins - 1)
    images, sure, correct = (np.bincount(place, weights, bins) for weights in (None, confidence.astype(np.float64), right))
    filled = np.maximum(images, 1)
    middles = (np.arange(bins) + 0.5) / bins
    found = tuple(
        Bin(images=int(count), confidence=float(mean if count else middle), accuracy=float(share))
        for count, mean, middle, share in zip(images, sure / filled, middles, correct / filled, strict=True)
    )
    return Calibration(ece=float(np.abs(correct - sure).sum() / len(confidence)), bins=found)
