"""Held-out accuracy: every image once, un-noised, averaged weights; a row kept for each image."""

import io

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ns import log
from ns.data.dataset import Dataset
from ns.data.images import ImageSource
from ns.digest import sha256_bytes
from ns.errors import DataError
from ns.evaluate.result import MANIFEST, PREDICTIONS, SCHEMA, Evaluation
from ns.inference import Predictor
from ns.store import Store


def evaluate(predictor: Predictor, data_folder: Store, data: Dataset, folder: Store) -> Evaluation:
    """Evaluates a model on a labelled dataset and writes the evaluation into `folder`.

    Raises DataError for images without a label, or a label that the model has no class for.
    """
    classes = len(predictor.card.classes)
    progress = log.Progress(data.samples, "images")
    parts = []
    unreadable = 0
    source = ImageSource(data_folder, data, held=2)
    for shard in range(len(data.shards)):
        source.fetch_ahead([shard + 1] if shard + 1 < len(data.shards) else [])
        labels = source.labels(shard, classes)
        predictions = predictor.shard(source, shard, progress)
        readable = ~np.isnan(predictions.probabilities[:, 0])
        unreadable += int((~readable).sum())
        parts.append(
            table_of(
                [key for key, keep in zip(predictions.index.keys, readable, strict=True) if keep],
                labels[readable],
                predictions.probabilities[readable],
            )
        )
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
    )
    folder.put(PREDICTIONS, sink.getvalue())
    evaluation.write(folder, MANIFEST)
    return evaluation


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
) -> Evaluation:
    """Totals of a table of predictions."""
    labels, predicted, rank = (table[name].to_numpy() for name in ("label", "predicted", "rank"))
    count = len(classes)
    confusion = np.bincount(labels.astype(np.int64) * count + predicted, minlength=count * count).reshape(count, count)
    return Evaluation(
        model=model,
        dataset=dataset,
        classes=classes,
        images=len(table),
        unreadable=unreadable,
        mode=mode,
        top1=float(np.mean(rank == 0)),
        top5=float(np.mean(rank < 5)),
        confusion=tuple(tuple(int(cell) for cell in row) for row in confusion),
        predictions_sha256=predictions_sha256,
    )
