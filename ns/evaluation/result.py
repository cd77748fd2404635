"""What is known of a model from images that people labeled, with a row for each image so that two models can be compared in pairs.

evaluation.json         accuracy: totals, per class, confusion, calibration; written last
predictions.parquet     key string, label uint16, predicted uint16, confidence float32, rank uint16 (0: label on top)

robustness.json         what corruptions, perturbations and attacks leave of the accuracy: raw numbers; written last
units/UNIT.parquet      the predictions that each number was counted from
"""

import re
from typing import Any, ClassVar, Literal

import pyarrow as pa
from pydantic import SerializerFunctionWrapHandler, model_serializer

from ns.core.digest import sha256_bytes
from ns.core.errors import DataError
from ns.storage import Store
from ns.storage.documents import HashedDocument, JsonDocument
from ns.storage.parquet import read_table

PREDICTIONS = "predictions.parquet"

PREDICTIONS_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.uint16()),
        ("predicted", pa.uint16()),
        ("confidence", pa.float32()),
        ("rank", pa.uint16()),
    ]
)


class ReliabilityBin(JsonDocument):
    """Images whose confidence lies in one of 15 equal parts of 0–1."""

    images: int
    confidence: float
    """Mean of the images; the middle of the bin if there are none."""
    accuracy: float
    """Share of right answers; 0 if there are no images."""


class Calibration(JsonDocument):
    """Whether the model is right as often as it says (arXiv:1706.04599)."""

    ece: float
    """Expected calibration error: mean distance of confidence and accuracy over bins, by images."""
    bins: tuple[ReliabilityBin, ...]


class Subsample(JsonDocument):
    """Which of a dataset's images were looked at: drawn evenly over the classes, the same ones for every model."""

    images: int
    """How many were asked for."""
    seed: int


class Evaluation(HashedDocument):
    filename: ClassVar[str] = "evaluation.json"

    format: Literal[1] = 1
    model: str
    """Digest."""
    dataset: str
    """Digest."""
    name: str | None = None
    """Of the dataset."""
    classes: tuple[str, ...]
    images: int
    unreadable: int
    """Images of the dataset that could not be decoded; they count as wrong in no number."""
    mode: str = "float32"
    """How the model was run (`ns.modeling.precision.Mode`)."""
    top1: float
    top5: float
    """Shares in 0–1."""
    confusion: tuple[tuple[int, ...], ...]
    """[label][predicted], images."""
    calibration: Calibration | None = None
    """None in evaluations from before it was measured."""
    subsample: Subsample | None = None
    """None if all images of the dataset were looked at."""
    scored_classes: tuple[str, ...] | None = None
    """The classes that the answer was chosen from; all if None (`noisy_student.md` §6.2)."""
    multi_label_top1: float | None = None
    """Share of answers that are one of the right classes, where several are known of each image (ReaL)."""
    multi_label_images: int | None = None
    """Images with at least one such class."""
    predictions_sha256: str

    @model_serializer(mode="wrap")
    def _drop_unknown_fields(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Evaluations from before these fields keep their digests.
        fields: dict[str, Any] = serialize(self)
        later = ("name", "calibration", "subsample", "scored", "multi_label_top1", "multi_label_images")
        return {name: value for name, value in fields.items() if value is not None or name not in later}

    @property
    def class_accuracy(self) -> list[float | None]:
        """Share of each class that is right, None for a class without images."""
        return [row[index] / total if (total := sum(row)) else None for index, row in enumerate(self.confusion)]


class PerturbationResult(JsonDocument):
    """What a kind of perturbation does to the answers along its sequences (`noisy_student.md` §6.4)."""

    flip_probability: float
    """Share of frames whose answer differs from that of the reference frame."""
    top5_distance: float
    """Mean distance of the five best classes from those of the reference frame."""


class AttackResult(JsonDocument):
    """What is left of the accuracy when each pixel may be changed a little, for the worse."""

    name: Literal["fgsm", "pgd"]
    epsilon: float
    """Largest change, of 255."""
    steps: int
    step_size: float
    """Of 255."""
    top1: float

    def __str__(self) -> str:
        return f"{self.name}-{self.epsilon:g}" + (f"-{self.steps}" if self.name == "pgd" else "")


class Robustness(HashedDocument):
    """Raw numbers of one model on one dataset: another reference is another way to read them, not another measurement."""

    filename: ClassVar[str] = "robustness.json"

    format: Literal[1] = 1
    model: str
    """Digest."""
    dataset: str
    """Digest; of a ready-made benchmark, that of the list of its files."""
    name: str
    """Of the dataset."""
    kind: Literal["images", "imagenet-c", "cifar10-c", "imagenet-p"] = "images"
    """Where corrupted images came from: `images`, made here of plain ones; else read as published."""
    num_classes: int
    imagenet: bool
    """Whether the classes are ImageNet's 1,000, so that AlexNet's published numbers are the ones to divide by."""
    images: int
    """That were looked at in each corruption and attack, or sequences in each perturbation."""
    unreadable: int
    subsample: Subsample | None
    seed: int
    """Of corruptions, perturbations and random starts."""
    mode: str
    """How the model was run; attacks always in float32."""
    top1: float | None
    """Clean accuracy on the same images; None of a ready-made benchmark, which has no clean ones."""
    severities: tuple[int, ...]
    corruptions: dict[str, tuple[float, ...]]
    """Kind → error rate at each of the severities; empty if not asked for."""
    frames: int
    """Images in a sequence; 0 if there are none, or they are as long as they were published."""
    perturbations: dict[str, PerturbationResult]
    attacks: tuple[AttackResult, ...]
    predictions_sha256: str
    """Of the list of all units' digests."""
    seconds: float
    """Work that it took; no part of the digest."""

    def hashed_fields(self) -> Any:
        return self.model_dump(mode="json", exclude={"seconds"})

    def mean_corruption_errors(self) -> dict[str, float]:
        """Kind → mean error rate over the severities."""
        return {name: sum(rates) / len(rates) for name, rates in self.corruptions.items()}


def is_imagenet(classes: tuple[str, ...]) -> bool:
    """Whether these are ImageNet's 1,000 classes: their WordNet ids, in order."""
    return (
        len(classes) == 1000
        and (classes[0], classes[-1]) == ("n01440764", "n15075141")
        and list(classes) == sorted(classes)
        and all(re.fullmatch(r"n\d{8}", name) for name in classes)
    )


def read_predictions(store: Store, evaluation: Evaluation) -> pa.Table:
    """The rows of an evaluation. Raises DataError when they are not the recorded ones."""
    data = store.get(PREDICTIONS)
    if sha256_bytes(data) != evaluation.predictions_sha256:
        raise DataError(f"{store.uri}/{PREDICTIONS}: sha256 differs from {Evaluation.filename}; evaluate again")
    return read_table(data)
