"""Classifying image files with a model of a run."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ns.modeling.predictor import Predictor
from ns.storage import Store


class Prediction(BaseModel):
    model_config = ConfigDict(frozen=True)

    path: Path
    error: str | None
    """Why the image could not be read."""
    classes: list[tuple[str, float]]
    """The most probable classes with their probabilities, best first."""


def predict_files(folder: Store, paths: Sequence[Path], top: int) -> list[Prediction]:
    """Classifies image files with the model in `folder`. A file that cannot be read gets its reason."""
    predictor = Predictor(folder, batch=64)
    blobs: list[bytes] = []
    missing: dict[int, str] = {}
    for index, path in enumerate(paths):
        try:
            blobs.append(path.read_bytes())
        except OSError as error:
            missing[index] = error.strerror or str(error)
            blobs.append(b"")
    probabilities, errors = predictor.images(blobs)
    errors |= missing
    results = []
    for index, path in enumerate(paths):
        best = [] if index in errors else (-probabilities[index]).argsort(kind="stable")[:top].tolist()
        results.append(
            Prediction(
                path=path,
                error=errors.get(index),
                classes=[(predictor.card.classes[label], float(probabilities[index][label])) for label in best],
            )
        )
    return results
