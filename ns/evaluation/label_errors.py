"""Labels that may be wrong: confident learning (cleanlab; Northcutt et al., arXiv:1911.00068) on a model's probabilities."""

import numpy as np
import pyarrow as pa

from ns.core import log
from ns.core.errors import DataError
from ns.data.dataset import Dataset
from ns.data.loading.shard_reader import ImageSource
from ns.data.scratch import make_scratch_dir
from ns.modeling.predictor import Predictor
from ns.storage import Store

LABEL_ERROR_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("row", pa.int64()),
        ("key", pa.string()),
        ("label", pa.string()),
        ("predicted", pa.string()),
        ("probability_of_label", pa.float32()),
    ]
)


def find_label_errors(predictor: Predictor, store: Store, data: Dataset) -> pa.Table:
    """Images whose label the model has reason to doubt, the least probable labels first.

    A model that was trained on these very images believes most of their labels: use one that was not. Probabilities are kept
    on disk. Raises DataError if cleanlab is not installed, or the model has other classes.
    """
    if predictor.manifest.classes != data.classes:
        raise DataError(f"{store.uri}: has other classes than the model; use a model of the same classes in the same order")
    try:
        from cleanlab.experimental.label_issues_batched import find_label_issues_batched
    except ImportError as error:
        raise DataError("looking for wrong labels needs cleanlab: pip install 'noisy-student[check]'") from error
    source = ImageSource(store, data)
    progress = log.Progress(data.samples, "images")
    positions: list[tuple[int, int]] = []
    class_ids = np.zeros(data.samples, np.int64)
    with make_scratch_dir("suspects") as scratch_dir:
        probabilities = np.lib.format.open_memmap(
            scratch_dir / "probabilities.npy", "w+", np.float32, (data.samples, len(data.classes))
        )
        done = 0
        for shard in range(len(data.shards)):
            source.fetch_ahead(range(shard + 1, min(shard + 2, len(data.shards))))
            predictions = predictor.predict_shard(source, shard, progress)
            readable = np.flatnonzero(~np.isnan(predictions.probabilities[:, 0]))
            stop = done + len(readable)
            probabilities[done:stop] = predictions.probabilities[readable]
            class_ids[done:stop] = source.read_class_ids(shard, len(data.classes))[readable]
            positions += [(shard, row) for row in readable.tolist()]
            done = stop
        error_rows = find_label_issues_batched(labels=class_ids[:done], pred_probs=probabilities[:done], verbose=False)
        error_rows = np.asarray(error_rows, np.int64)
        label_probabilities = probabilities[error_rows, class_ids[error_rows]]
        error_rows = error_rows[np.argsort(label_probabilities, kind="stable")]
        columns: list[list[object]] = [[] for _ in LABEL_ERROR_SCHEMA]
        for number in error_rows.tolist():
            shard, row = positions[number]
            values = (
                data.shards[shard].name, row, source.read_index(shard).keys[row], data.classes[class_ids[number]],
                data.classes[int(probabilities[number].argmax())], float(probabilities[number, class_ids[number]]),
            )  # fmt: skip
            for column, value in zip(columns, values, strict=True):
                column.append(value)
        return pa.table(columns, schema=LABEL_ERROR_SCHEMA)
