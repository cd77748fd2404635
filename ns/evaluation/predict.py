"""Classifying image files with a model of a run."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ns.modeling.predictor import Predictor
from ns.storage import Store


class FilePrediction(BaseModel):
    model_config = ConfigDict(frozen=True)

    path: Path
    error: str | None
    """Why the image could not be read."""
    classes: list[tuple[str, float]]
    """The most probable classes with their probabilities, best first."""


def predict_files(model_store: Store, paths: Sequence[Path], top_k: int) -> list[FilePrediction]:
    """Classifies image files with the model in `folder`. A file that cannot be read gets its reason."""
    predictor = Predictor(model_store, batch=64)
    blobs: list[bytes] = []
    missing: dict[int, str] = {}
    for index, path in enumerate(paths):
        try:
            blobs.append(path.read_bytes())
        except OSError as error:
            missing[index] = error.strerror or str(error)
            blobs.append(b"")
    probabilities, errors = predictor.predict_images(blobs)
    errors |= missing
    results = []
    for index, path in enumerate(paths):
        best_class_ids = [] if index in errors else (-probabilities[index]).argsort(kind="stable")[:top_k].tolist()
        results.append(
            FilePrediction(
                path=path,
                error=errors.get(index),
                classes=[
                    (predictor.manifest.classes[class_id], float(probabilities[index][class_id])) for class_id in best_class_ids
                ],
            )
        )
    return results
