"""A model on disk: `model.json` beside `model.safetensors` and `history.json`. Needs no torch to be read."""

from typing import ClassVar, Literal

from ns.config.schema import ModelConfig, NoiseConfig
from ns.core.digest import sha256_file
from ns.storage import open_store, split_uri
from ns.storage.documents import HashedDocument, JsonDocument

WEIGHTS = "model.safetensors"
HISTORY = "history.json"
"""The training's curves: a list of points."""
FINETUNED = "finetuned"
"""Folder, in a model's folder, of the model that came of its fine-tuning."""

# ImageNet's, as timm and the paper's code have them; on uint8 scaled to 0–1.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class Lineage(JsonDocument):
    """Digests of what a model was made from."""

    config: str
    labeled: str
    teacher: str | None = None
    label_set: str | None = None
    selection: str | None = None
    init: str | None = None
    """Of the weights that training started from, if they were neither random nor the teacher's."""


class ModelManifest(HashedDocument):
    """`model.json`: everything needed to build the network and to feed it."""

    filename: ClassVar[str] = "model.json"

    format: Literal[1] = 1
    generation: int
    """0 for the first teacher, g for the student of generation g."""
    model: ModelConfig
    noise: NoiseConfig
    classes: tuple[str, ...]
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    parameters: int
    steps: int
    training_mode: str = "float32"
    """Precision in training, `+compile` if compiled. That of inference is `model.inference_precision`."""
    lineage: Lineage
    weights_sha256: str
    """Of `model.safetensors`: the averaged (EMA) weights."""


def split_weights_uri(uri: str) -> tuple[str, str | None]:
    """Folder and key of a safetensors file; no key if `place` is the folder of a model of ours."""
    return split_uri(uri) if uri.endswith(".safetensors") else (uri, None)


def digest_weights(uri: str) -> str:
    """SHA-256 of the weights in a safetensors file or in a model's folder: what they are, wherever they are."""
    parent, key = split_weights_uri(uri)
    if key is None:
        return ModelManifest.load(open_store(parent)).weights_sha256
    return sha256_file(open_store(parent).path(key))
