"""Evaluation: how one model does on one dataset, with a row for each image so that two models can be compared in pairs.

evaluation.json         totals, per class, confusion; written last
predictions.parquet     key string, label uint16, predicted uint16, confidence float32, rank uint16 (0: label on top)
"""

from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from ns.digest import sha256_bytes
from ns.document import Identified
from ns.errors import DataError
from ns.store import Store

MANIFEST = "evaluation.json"
PREDICTIONS = "predictions.parquet"

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.uint16()),
        ("predicted", pa.uint16()),
        ("confidence", pa.float32()),
        ("rank", pa.uint16()),
    ]
)


class Evaluation(Identified):
    format: Literal[1] = 1
    model: str
    """Digest."""
    dataset: str
    """Digest."""
    classes: tuple[str, ...]
    images: int
    unreadable: int
    """Images of the dataset that could not be decoded; they count as wrong in no number."""
    mode: str = "float32"
    """How the model was run (`ns.precision.Mode`)."""
    top1: float
    top5: float
    """Shares in 0–1."""
    confusion: tuple[tuple[int, ...], ...]
    """[label][predicted], images."""
    predictions_sha256: str

    @property
    def class_accuracy(self) -> list[float | None]:
        """Share of each class that is right, None for a class without images."""
        return [row[index] / total if (total := sum(row)) else None for index, row in enumerate(self.confusion)]


def read_predictions(folder: Store, evaluation: Evaluation) -> pa.Table:
    """The rows of an evaluation. Raises DataError when they are not the recorded ones."""
    data = folder.get(PREDICTIONS)
    if sha256_bytes(data) != evaluation.predictions_sha256:
        raise DataError(f"{folder.uri}/{PREDICTIONS}: sha256 differs from {MANIFEST}; evaluate again")
    return pq.read_table(pa.BufferReader(data))
