"""Finds labels that may be wrong by confident learning on a model's probabilities (cleanlab; Northcutt et al., arXiv:1911.00068)."""

import numpy as np
import pyarrow as pa

from ns.core import log
from ns.core.errors import DataError
from ns.data.dataset import Dataset
from ns.data.loading.shard_reader import ImageSource
from ns.modeling.predictor import Predictor
from ns.storage import Store
from ns.storage.scratch import make_scratch_dir

LABEL_ERROR_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("row", pa.int64()),
        ("key", pa.string()),
        ("class_name", pa.string()),
        ("predicted_class_name", pa.string()),
        ("class_probability", pa.float32()),
    ]
)


def find_label_errors(predictor: Predictor, store: Store, data: Dataset) -> pa.Table:
    """Rows of `LABEL_ERROR_SCHEMA` for images whose label is probably wrong, the least probable labels first.

    Use a model that was not trained on these images: one that was believes most of their labels. Probabilities are kept on disk, so
    the dataset may be larger than memory. Raises DataError if cleanlab is not installed or the model has other classes.
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
    with make_scratch_dir("label-errors") as scratch_dir:
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
        error_positions = [positions[number] for number in error_rows.tolist()]
        names = np.array(data.classes)
        columns = [
            [data.shards[shard].name for shard, _ in error_positions],
            [row for _, row in error_positions],
            [source.read_index(shard).keys[row] for shard, row in error_positions],
            names[class_ids[error_rows]],
            names[probabilities[error_rows].argmax(1)],
            probabilities[error_rows, class_ids[error_rows]],
        ]
        return pa.table(columns, schema=LABEL_ERROR_SCHEMA)
