"""Results of evaluations: totals, and one row per image, so that two models can be compared in pairs.

evaluation.json         accuracy: totals, counts by class, the most frequent mistakes, calibration; written last
predictions-SHA.parquet key string, class_id uint16 (ground truth), predicted_class_id uint16, confidence float32,
                        rank uint16 (position of the true class among the answers; 0: the prediction is right)

robustness.json         accuracy under corruptions, perturbations and attacks: raw numbers; written last
mistakes-SHA.parquet    key string, and uint8 columns that models are compared by, image by image: `corruption KIND` (severities at
                        which the answer is wrong), `perturbation KIND` (flips along the sequence) and `attack NAME` (1: wrong)
units/UNIT.parquet      the predictions that these numbers were counted from

SHA begins the file's sha256, so that two attempts at one evaluation do not mix.
"""

import re
from collections.abc import Container, Iterable
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ns.core.digest import sha256_bytes
from ns.core.errors import DataError
from ns.data.dataset import format_class_names
from ns.data.subsample import Subsample
from ns.storage import Store
from ns.storage.documents import HashedDocument, JsonDocument, dump_hashed_fields, name_by_content
from ns.storage.parquet import check_columns, encode_table, explain_table_errors, read_table

MAX_CONFUSIONS = 1_000
"""Pairs of classes that an evaluation lists; those of 32 classes all have room."""

PREDICTIONS_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("class_id", pa.uint16()),
        ("predicted_class_id", pa.uint16()),
        ("confidence", pa.float32()),
        ("rank", pa.uint16()),
    ]
)


class ReliabilityBin(JsonDocument):
    """The images whose confidence lies in one of 15 equal bins of 0–1."""

    images: int
    confidence: float
    """Mean confidence of the images; the middle of the bin if it is empty."""
    accuracy: float
    """Share of right answers; 0 if the bin is empty."""


class Calibration(JsonDocument):
    """How well confidence agrees with accuracy (arXiv:1706.04599)."""

    ece: float
    """Expected calibration error, 0–1: the distance between mean confidence and accuracy of a bin, averaged over images."""
    bins: tuple[ReliabilityBin, ...]


class Confusion(JsonDocument):
    """The images of one class for which the answer was one other class."""

    class_id: int
    predicted_class_id: int
    images: int


class Evaluation(HashedDocument):
    filename: ClassVar[str] = "evaluation.json"

    format: Literal[1] = 1
    model: str
    """Digest of the model's manifest."""
    dataset: str
    """Digest of the dataset."""
    name: str
    """Name of the dataset."""
    classes: tuple[str, ...]
    """Class names of the model."""
    images: int
    """Images that were classified."""
    unreadable: int
    """Images that could not be decoded; no number counts them."""
    mode: str
    """Precision in which the model ran (`ns.modeling.precision.PrecisionMode`)."""
    top1: float
    top5: float
    """Accuracies in 0–1."""
    balanced_accuracy: float
    """Mean accuracy of the classes that have images, in 0–1."""
    class_images: tuple[int, ...]
    """Images of each class."""
    class_correct: tuple[int, ...]
    """Right answers of each class."""
    class_predicted: tuple[int, ...]
    """Images for which each class is the answer."""
    confusions: tuple[Confusion, ...]
    """Wrong answers by pair of classes, the most frequent first, at most `MAX_CONFUSIONS`."""
    confusions_left_out: int
    """Number of pairs that are not listed."""
    calibration: Calibration
    subsample: Subsample | None = None
    """The part of the dataset that was drawn; None for all of it."""
    scored_classes: tuple[str, ...] | None = None
    """The classes that answers were chosen from; None for all (ImageNet-A and -R have 200 of the 1,000)."""
    multi_label_top1: float | None = None
    """Share of answers that are among the image's right classes; None without a file that names several per image (ReaL)."""
    multi_label_images: int | None = None
    """Images for which that file names at least one class."""
    predictions_sha256: str

    @property
    def predictions_key(self) -> str:
        """File of the predictions, in the folder of the manifest."""
        return name_by_content("predictions.parquet", self.predictions_sha256)

    @property
    def class_accuracy(self) -> list[float | None]:
        """Accuracy of each class in 0–1; None for a class without images."""
        return [
            correct / images if images else None for correct, images in zip(self.class_correct, self.class_images, strict=True)
        ]

    @property
    def never_predicted(self) -> list[str]:
        """Names of the classes that have images, and are the answer for none."""
        return [
            name
            for name, images, predicted in zip(self.classes, self.class_images, self.class_predicted, strict=True)
            if images and not predicted
        ]

    def describe_never_predicted(self) -> str:
        """`never predicts 2 of 7 classes: cat, dog`; empty if each class that has images is predicted."""
        names = self.never_predicted
        classes = sum(images > 0 for images in self.class_images)
        return f"never predicts {len(names):,} of {classes:,} classes: {format_class_names(names)}" if names else ""

    def build_confusion_matrix(self) -> list[list[int]]:
        """Images by [true class][predicted class]: for few classes, it grows with their square. Raises ValueError if pairs are left out."""
        if self.confusions_left_out:
            raise ValueError(f"{self.confusions_left_out} pairs of classes are left out: count the predictions instead")
        matrix = [[0] * len(self.classes) for _ in self.classes]
        for class_id, correct in enumerate(self.class_correct):
            matrix[class_id][class_id] = correct
        for confusion in self.confusions:
            matrix[confusion.class_id][confusion.predicted_class_id] = confusion.images
        return matrix


class FittedTemperature(HashedDocument):
    """The temperature at which a labeler's confidences agree best with the truth."""

    filename: ClassVar[str] = "temperature.json"

    format: Literal[1] = 1
    temperature: float
    images: int
    nll_before: float
    """Mean negative log-likelihood of the true classes at temperature 1, nats."""
    nll_after: float
    """The same at the fitted temperature."""


class PerturbationResult(JsonDocument):
    """How a kind of perturbation changes the answers along its sequences (arXiv:1903.12261 §3)."""

    flip_probability: float
    """Share of frames whose answer differs from that of the reference frame."""
    top5_distance: float
    """Mean distance of the five best classes from those of the reference frame."""


class AttackResult(JsonDocument):
    """Accuracy when an attacker may change each pixel a little."""

    name: Literal["fgsm", "pgd"]
    epsilon: float
    """Largest change of a pixel value, which is in 0–255."""
    steps: int
    step_size: float
    """Change of a pixel value per step, in the same unit."""
    top1: float

    def __str__(self) -> str:
        return f"{self.name}-{self.epsilon:g}" + (f"-{self.steps}" if self.name == "pgd" else "")


class Robustness(HashedDocument):
    """Raw numbers of one model on one dataset. Scores relative to a reference are computed from them (`robustness.scores`)."""

    filename: ClassVar[str] = "robustness.json"

    format: Literal[1] = 1
    model: str
    """Digest of the model's manifest."""
    dataset: str
    """Digest of the dataset; for a published set, the digest of its file list."""
    name: str
    """Name of the dataset."""
    kind: Literal["images", "imagenet-c", "cifar10-c", "imagenet-p"] = "images"
    """Source of the corrupted images: `images` if they were made here from plain ones, else the published set."""
    num_classes: int
    imagenet: bool
    """Whether the classes are ImageNet's 1,000, so that scores are relative to AlexNet's published numbers."""
    images: int
    """Images per corruption and attack, and sequences per perturbation."""
    unreadable: int
    subsample: Subsample | None
    seed: int
    """Seed of corruptions, perturbations and the attacks' random starts."""
    mode: str
    """Precision in which the model ran; attacks always run in float32."""
    top1: float | None
    """Clean accuracy on the same images; None for a published set, which has no clean images."""
    severities: tuple[int, ...]
    corruptions: dict[str, tuple[float, ...]]
    """Kind → error rate at each severity; empty if not measured."""
    frames: int
    """Images per sequence; 0 without perturbations."""
    perturbations: dict[str, PerturbationResult]
    attacks: tuple[AttackResult, ...]
    predictions_sha256: str
    """Digest of the list of all units' digests."""
    mistakes_sha256: str | None = None
    """Digest of the mistakes by image; None for a published set, which decides nothing."""
    seconds: float
    """Time that the measurement took; not part of the digest."""

    @property
    def mistakes_key(self) -> str:
        """File of the mistakes, in the folder of the manifest."""
        return name_by_content("mistakes.parquet", self.mistakes_sha256 or "")

    def hashed_fields(self) -> Any:
        return dump_hashed_fields(self, exclude={"seconds"})

    def mean_corruption_errors(self) -> dict[str, float]:
        """Kind → mean error rate over the severities."""
        return {kind: sum(rates) / len(rates) for kind, rates in self.corruptions.items()}

    def flip_probabilities(self) -> dict[str, float]:
        """Kind → flip probability."""
        return {kind: result.flip_probability for kind, result in self.perturbations.items()}

    def top5_distances(self) -> dict[str, float]:
        """Kind → top-5 distance."""
        return {kind: result.top5_distance for kind, result in self.perturbations.items()}


MISTAKE_SUITES = ("corruption", "perturbation", "attack")
"""Beginnings of the columns of mistakes by image."""


class ImageMistakes(NamedTuple):
    """What a measurement of robustness counted of each image."""

    keys: list[str]
    corruptions: dict[str, npt.NDArray[np.uint8]]
    """Kind → number of severities at which the answer is wrong, [N]."""
    perturbations: dict[str, npt.NDArray[np.uint8]]
    """Kind → number of frames whose answer differs from that of the reference frame, [N]."""
    attacks: dict[str, npt.NDArray[np.uint8]]
    """Attack (`str` of its AttackResult) → 1 if the answer is wrong under it, [N]."""

    def take_images(self, keys: Container[str]) -> "ImageMistakes":
        """Those of the images that have one of these keys."""
        rows = np.flatnonzero([key in keys for key in self.keys])
        return ImageMistakes(
            [self.keys[row] for row in rows],
            {kind: counts[rows] for kind, counts in self.corruptions.items()},
            {kind: counts[rows] for kind, counts in self.perturbations.items()},
            {attack: counts[rows] for attack, counts in self.attacks.items()},
        )

    def encode(self) -> bytes:
        columns = {"key": pa.array(self.keys, pa.string())}
        for suite, kinds in zip(MISTAKE_SUITES, (self.corruptions, self.perturbations, self.attacks), strict=True):
            columns |= {f"{suite} {kind}": pa.array(counts) for kind, counts in kinds.items()}
        return encode_table(pa.table(columns))


def is_imagenet(classes: tuple[str, ...]) -> bool:
    """Whether these are the WordNet ids of ImageNet's 1,000 classes, in order."""
    return (
        len(classes) == 1000
        and (classes[0], classes[-1]) == ("n01440764", "n15075141")
        and list(classes) == sorted(classes)
        and all(re.fullmatch(r"n\d{8}", name) for name in classes)
    )


def read_predictions(store: Store, evaluation: Evaluation) -> pa.Table:
    """The rows of an evaluation, `PREDICTIONS_SCHEMA`. Raises DataError if the file is not the recorded one."""
    table = _read_checked(store, evaluation.predictions_key, evaluation.predictions_sha256, Evaluation.filename)
    schema = pa.schema([field.with_nullable(False) for field in PREDICTIONS_SCHEMA])
    check_columns(table, f"{store.uri}/{evaluation.predictions_key}", schema, "evaluate again")
    return table


def read_mistakes(store: Store, robustness: Robustness) -> ImageMistakes:
    """The mistakes by image of a measurement. Raises DataError if the file is not the recorded one."""
    assert robustness.mistakes_sha256 is not None
    table = _read_checked(store, robustness.mistakes_key, robustness.mistakes_sha256, Robustness.filename)
    kinds_by_suite: tuple[Iterable[object], ...] = (robustness.corruptions, robustness.perturbations, robustness.attacks)
    suites = {suite: [str(kind) for kind in kinds] for suite, kinds in zip(MISTAKE_SUITES, kinds_by_suite, strict=True)}
    counts = [(f"{suite} {kind}", pa.uint8()) for suite, kinds in suites.items() for kind in kinds]
    schema = pa.schema([pa.field(name, kind, nullable=False) for name, kind in (("key", pa.string()), *counts)])
    check_columns(table, f"{store.uri}/{robustness.mistakes_key}", schema, "evaluate again")
    counts_by_suite = ({kind: table[f"{suite} {kind}"].to_numpy() for kind in kinds} for suite, kinds in suites.items())
    return ImageMistakes(table["key"].to_pylist(), *counts_by_suite)


def _read_checked(store: Store, key: str, sha256: str, manifest: str) -> pa.Table:
    data = store.get(key)
    if sha256_bytes(data) != sha256:
        raise DataError(f"{store.uri}/{key}: sha256 differs from {manifest}; evaluate again")
    with explain_table_errors(f"{store.uri}/{key}", "evaluate again"):
        return read_table(data)
