"""Labels that may be wrong: confident learning (cleanlab; Northcutt et al., arXiv:1911.00068) on a model's probabilities."""

import numpy as np
import pyarrow as pa

from ns.core import log
from ns.core.errors import DataError
from ns.data.dataset import Dataset
from ns.data.loading.shard_reader import ImageSource
from ns.data.scratch import scratch
from ns.modeling.predictor import Predictor
from ns.storage import Store

SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("row", pa.int64()),
        ("key", pa.string()),
        ("label", pa.string()),
        ("predicted", pa.string()),
        ("probability_of_label", pa.float32()),
    ]
)


def suspects(predictor: Predictor, folder: Store, data: Dataset) -> pa.Table:
    """Images whose label the model has reason to doubt, the least probable labels first.

    A model that was trained on these very images believes most of their labels: use one that was not. Probabilities are kept
    on disk. Raises DataError if cleanlab is not installed, or the model has other classes.
    """
    if predictor.card.classes != data.classes:
        raise DataError(f"{folder.uri}: has other classes than the model; use a model of the same classes in the same order")
    try:
        from cleanlab.experimental.label_issues_batched import find_label_issues_batched
    except ImportError as error:
        raise DataError("looking for wrong labels needs cleanlab: pip install 'noisy-student[check]'") from error
    source = ImageSource(folder, data)
    progress = log.Progress(data.samples, "images")
    places: list[tuple[int, int]] = []
    labels = np.zeros(data.samples, np.int64)
    with scratch("suspects") as place:
        probabilities = np.lib.format.open_memmap(
            place / "probabilities.npy", "w+", np.float32, (data.samples, len(data.classes))
        )
        done = 0
        for shard in range(len(data.shards)):
            source.fetch_ahead(range(shard + 1, min(shard + 2, len(data.shards))))
            predictions = predictor.shard(source, shard, progress)
            readable = np.flatnonzero(~np.isnan(predictions.probabilities[:, 0]))
            stop = done + len(readable)
            probabilities[done:stop] = predictions.probabilities[readable]
            labels[done:stop] = source.labels(shard, len(data.classes))[readable]
            places += [(shard, row) for row in readable.tolist()]
            done = stop
        doubted = find_label_issues_batched(labels=labels[:done], pred_probs=probabilities[:done], verbose=False)
        doubted = np.asarray(doubted, np.int64)
        own = probabilities[doubted, labels[doubted]]
        doubted = doubted[np.argsort(own, kind="stable")]
        columns: list[list[object]] = [[] for _ in SCHEMA]
        for number in doubted.tolist():
            shard, row = places[number]
            values = (
                data.shards[shard].name, row, source.index(shard).keys[row], data.classes[labels[number]],
                data.classes[int(probabilities[number].argmax())], float(probabilities[number, labels[number]]),
            )  # fmt: skip
            for column, value in zip(columns, values, strict=True):
                column.append(value)
        return pa.table(columns, schema=SCHEMA)
