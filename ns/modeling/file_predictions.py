"""Classifies image files with a trained model."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ns.modeling.predictor import Predictor
from ns.storage import Store

FILES_IN_MEMORY = 256


class FilePrediction(BaseModel):
    model_config = ConfigDict(frozen=True)

    path: Path
    error: str | None
    """Why the image could not be read; None if it was."""
    classes: list[tuple[str, float]]
    """Names of the most probable classes with their probabilities in 0–1, best first; empty after an error."""


def predict_files(model_store: Store, paths: Sequence[Path], top_k: int) -> Iterable[FilePrediction]:
    """The `top_k` most probable classes of each file, in the order of `paths`. A file that cannot be read gets an error."""
    predictor = Predictor(model_store, batch=64)
    for start in range(0, len(paths), FILES_IN_MEMORY):
        yield from _predict_some(predictor, paths[start : start + FILES_IN_MEMORY], top_k)


def _predict_some(predictor: Predictor, paths: Sequence[Path], top_k: int) -> Iterator[FilePrediction]:
    blobs: list[bytes] = []
    missing: dict[int, str] = {}
    for index, path in enumerate(paths):
        try:
            blobs.append(path.read_bytes())
        except OSError as error:
            missing[index] = "is a folder; name its files: FOLDER/*.jpg" if path.is_dir() else error.strerror or str(error)
            blobs.append(b"")
    probabilities, errors = predictor.predict_images(blobs)
    errors |= missing
    class_names = predictor.manifest.classes
    for index, path in enumerate(paths):
        best = [] if index in errors else (-probabilities[index]).argsort(kind="stable")[:top_k].tolist()
        classes = [(class_names[class_id], float(probabilities[index][class_id])) for class_id in best]
        yield FilePrediction(path=path, error=errors.get(index), classes=classes)
