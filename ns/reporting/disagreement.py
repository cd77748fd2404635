"""Compares two models on the same images: counts, accuracy by class, and pictures of their disagreements."""

from dataclasses import dataclass
from itertools import islice
from typing import Self

import numpy as np
import numpy.typing as npt

from ns.core.errors import DataError
from ns.data.dataset import Dataset
from ns.data.index import locate_keys
from ns.evaluation.result import Evaluation, read_predictions
from ns.reporting.pictures import THUMBNAIL_PX, Gallery, Picture, make_thumbnails
from ns.storage import Store

SHOWN_CLASSES = 3
"""Classes with pictures, of those that gained most and of those that lost most."""
CLASS_PICTURES = 8


@dataclass(frozen=True)
class ModelAnswers:
    """The answers of a model for each readable image of a set. Arrays [N], in the set's order."""

    title: str
    classes: tuple[str, ...]
    keys: list[str]
    class_ids: npt.NDArray[np.uint16]
    predicted: npt.NDArray[np.uint16]
    confidence: npt.NDArray[np.float32]

    @classmethod
    def from_evaluation(cls, title: str, store: Store, evaluation: Evaluation) -> Self:
        """Raises DataError if the predictions are not those that were evaluated."""
        rows = read_predictions(store, evaluation)
        columns = (rows[name].to_numpy() for name in ("class_id", "predicted_class_id", "confidence"))
        return cls(title, evaluation.classes, rows["key"].to_pylist(), *columns)

    @property
    def is_right(self) -> npt.NDArray[np.bool_]:
        return np.equal(self.class_ids, self.predicted, dtype=np.bool_)


@dataclass(frozen=True)
class Disagreement:
    """Images by which of two models is right."""

    before: str
    after: str
    """Titles of the models."""
    both: int
    """Images that both classify correctly."""
    won: int
    lost: int
    """Images that only the later, and only the earlier model classifies correctly."""
    neither: int
    different_mistakes: int
    """Images that neither classifies correctly and for which their answers differ."""
    galleries: list[Gallery]

    @property
    def images(self) -> int:
        return self.both + self.won + self.lost + self.neither


@dataclass(frozen=True)
class ClassGain:
    name: str
    images: int
    before: float
    after: float
    """Accuracies, in 0–1."""
    won: int
    lost: int
    """Images that only the later, and only the earlier model classifies correctly."""

    @property
    def gain(self) -> float:
        return self.after - self.before


@dataclass(frozen=True)
class ClassGains:
    """Accuracy of two models by class."""

    before: str
    after: str
    """Titles of the models."""
    rows: list[ClassGain]
    """The largest losses first; classes without images are left out."""
    galleries: list[Gallery]


def compare_answers(before: ModelAnswers, after: ModelAnswers, store: Store, dataset: Dataset, size: int) -> Disagreement:
    """Counts, and the `size` most confident images of each kind. Raises DataError if the models saw different images."""
    _check_same_images(before, after)
    won, lost = after.is_right & ~before.is_right, before.is_right & ~after.is_right
    neither = ~before.is_right & ~after.is_right
    different_mistakes = neither & (before.predicted != after.predicted)
    kinds = (
        ("Won", f"{after.title} is right and {before.title.lower()} is wrong; the most confident answers come first.", won),
        ("Lost", f"{before.title} is right and {after.title.lower()} is wrong.", lost),
        ("Different mistakes", "Both are wrong, with different answers.", different_mistakes),
    )
    return Disagreement(
        before=before.title,
        after=after.title,
        both=int((before.is_right & after.is_right).sum()),
        won=int(won.sum()),
        lost=int(lost.sum()),
        neither=int(neither.sum()),
        different_mistakes=int(different_mistakes.sum()),
        galleries=_build_galleries(before, after, store, dataset, kinds, size),
    )


def compute_class_gains(before: ModelAnswers, after: ModelAnswers, store: Store, dataset: Dataset, size: int) -> ClassGains:
    """All classes, and pictures of those that changed most. Raises DataError if the models saw different images."""
    _check_same_images(before, after)
    won, lost = after.is_right & ~before.is_right, before.is_right & ~after.is_right
    count = len(after.classes)
    images, right_before, right_after, won_counts, lost_counts = (
        np.bincount(before.class_ids[mask], minlength=count).tolist()
        for mask in (np.ones_like(won), before.is_right, after.is_right, won, lost)
    )
    rows = sorted(
        (
            ClassGain(name, images[c], right_before[c] / images[c], right_after[c] / images[c], won_counts[c], lost_counts[c])
            for c, name in enumerate(after.classes)
            if images[c]
        ),
        key=lambda row: (row.gain, row.name),
    )
    index = {name: number for number, name in enumerate(after.classes)}
    shown = [(row, lost, "lost") for row in rows[:SHOWN_CLASSES] if row.gain < 0]
    shown += [(row, won, "won") for row in rows[::-1][:SHOWN_CLASSES] if row.gain > 0]
    kinds = tuple(
        (f"{row.name}: {100 * row.gain:+.1f} points", f"Images of this class that {after.title.lower()} {verb}.",
         mask & (before.class_ids == index[row.name]))
        for row, mask, verb in shown
    )  # fmt: skip
    return ClassGains(
        before.title, after.title, rows, _build_galleries(before, after, store, dataset, kinds, min(size, CLASS_PICTURES))
    )


def _check_same_images(before: ModelAnswers, after: ModelAnswers) -> None:
    if before.keys != after.keys or before.classes != after.classes:
        raise DataError(
            f"{before.title} and {after.title.lower()} were evaluated on different images; run the evaluation again"
        )


def _build_galleries(
    before: ModelAnswers,
    after: ModelAnswers,
    store: Store,
    dataset: Dataset,
    kinds: tuple[tuple[str, str, npt.NDArray[np.bool_]], ...],
    size: int,
) -> list[Gallery]:
    """Galleries of the images with the highest smaller confidence of the two models. Empty galleries are left out."""
    score = np.minimum(before.confidence, after.confidence)
    rows_by_kind = []
    for _, _, mask in kinds:
        rows = np.flatnonzero(mask)
        rows_by_kind.append(rows[np.argsort(-score[rows], kind="stable")[:size]].tolist())
    all_rows = [row for rows in rows_by_kind for row in rows]
    locations = locate_keys(store, dataset, {after.keys[row] for row in all_rows})
    sources = make_thumbnails(store, dataset, [locations[after.keys[row]] for row in all_rows], THUMBNAIL_PX)
    pictures = iter(
        source and Picture(after.keys[row], _caption_answers(before, after, row), source)
        for row, source in zip(all_rows, sources, strict=True)
    )
    galleries = [
        Gallery(title, about, [picture for picture in islice(pictures, len(rows)) if picture])
        for (title, about, _), rows in zip(kinds, rows_by_kind, strict=True)
    ]
    return [gallery for gallery in galleries if gallery.pictures]


def _caption_answers(before: ModelAnswers, after: ModelAnswers, row: int) -> str:
    """`cat: dog 61% → cat 74%`: the true class, and the two answers."""
    old, new = (f"{side.classes[side.predicted[row]]} {side.confidence[row]:.0%}" for side in (before, after))
    return f"{after.classes[after.class_ids[row]]}: {old} → {new}"
