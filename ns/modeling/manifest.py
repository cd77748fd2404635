"""A model on disk: `model.json` beside `model-SHA.safetensors` and `history-SHA.json`; SHA begins the sha256 of the weights.

Reading the manifest needs no torch.
"""

from typing import ClassVar, Literal

from ns.config.schema import IMAGENET_MEAN, IMAGENET_STD, ModelConfig, NoiseConfig
from ns.core.digest import sha256_file
from ns.core.errors import DataError
from ns.storage import Store, open_store, split_uri
from ns.storage.documents import HashedDocument, JsonDocument, decode_json, name_by_content

WEIGHTS = "model.safetensors"
HISTORY = "history.json"
FINETUNED = "finetuned"
"""Folder of the fine-tuned model, in the folder of the model that it was made from."""


class Lineage(JsonDocument):
    """Digests of what a model was made from."""

    config: str
    labeled: str
    teacher: str | None = None
    label_set: str | None = None
    selection: str | None = None
    init: str | None = None
    """SHA-256 of the weights that training started from, if they were neither random nor the teacher's."""
    init_source: str | None = None
    """Repository and commit of these weights, if they are of a hub."""
    init_license: str | None = None
    """License of these weights, as their source states it."""


class ModelManifest(HashedDocument):
    """`model.json`: everything that is needed to build the network and to feed it."""

    filename: ClassVar[str] = "model.json"

    format: Literal[1] = 1
    generation: int
    """0 for the first teacher, g for the student of generation g."""
    model: ModelConfig
    noise: NoiseConfig
    classes: tuple[str, ...]
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    parameters: int
    steps: int
    training_mode: str = "float32"
    """How the network was run in training: its precision, with `+compile` if compiled. `model.inference_precision` is that of
    inference."""
    lineage: Lineage
    weights_sha256: str
    """SHA-256 of the averaged (EMA) weights."""

    @property
    def weights_key(self) -> str:
        """File of the weights, in the folder of the manifest."""
        return name_by_content(WEIGHTS, self.weights_sha256)

    @property
    def history_key(self) -> str:
        """File of the training's curves, a list of points, in the folder of the manifest."""
        return name_by_content(HISTORY, self.weights_sha256)


def read_history(store: Store, manifest: ModelManifest) -> list[dict[str, float]]:
    """The curves of the model in the folder `store`. Raises DataError for a file that holds none."""
    uri = f"{store.uri}/{manifest.history_key}"
    try:
        points = decode_json(store.get(manifest.history_key))
    except ValueError as error:
        raise DataError(f"{uri}: not JSON ({error}); the run that trained the model makes it again") from error
    if not isinstance(points, list) or not all(isinstance(point, dict) and "step" in point for point in points):
        raise DataError(f"{uri}: must be a list of points with a step; the run that trained the model makes it again")
    return points


def split_weights_uri(uri: str) -> tuple[str, str | None]:
    """URI of the folder, and key of the file; no key if `uri` is the folder of a model."""
    return split_uri(uri) if uri.endswith(".safetensors") else (uri, None)


def digest_weights(uri: str) -> str:
    """SHA-256 of the weights in a safetensors file or in a model's folder."""
    parent, key = split_weights_uri(uri)
    if key is None:
        return ModelManifest.load(open_store(parent)).weights_sha256
    return sha256_file(open_store(parent).path(key))
