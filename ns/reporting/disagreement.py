"""Two models on the same images: which each of them has right, class by class, and pictures of the difference."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from ns.core.errors import DataError
from ns.data.dataset import Dataset
from ns.data.locate import find
from ns.evaluation.result import Evaluation, read_predictions
from ns.reporting.pictures import THUMBNAIL_PX, Gallery, Picture, thumbnails
from ns.storage import Store

SHOWN_CLASSES = 3
"""Classes with pictures: so many that gained most, and that lost most."""
CLASS_PICTURES = 8


@dataclass(frozen=True)
class Answers:
    """What a model says of each readable image of a set. Arrays [N], in the set's order."""

    title: str
    classes: tuple[str, ...]
    keys: list[str]
    labels: npt.NDArray[np.uint16]
    predicted: npt.NDArray[np.uint16]
    confidence: npt.NDArray[np.float32]

    @classmethod
    def read(cls, title: str, folder: Store, evaluation: Evaluation) -> Self:
        """Raises DataError if the predictions are not those that were evaluated."""
        rows = read_predictions(folder, evaluation)
        columns = (rows[name].to_numpy() for name in ("label", "predicted", "confidence"))
        return cls(title, evaluation.classes, rows["key"].to_pylist(), *columns)

    @property
    def right(self) -> npt.NDArray[np.bool_]:
        return np.equal(self.labels, self.predicted, dtype=np.bool_)


@dataclass(frozen=True)
class Disagreement:
    """Images by which of two models has them right."""

    before: str
    after: str
    """What the models are called."""
    both: int
    """Images that both have right."""
    won: int
    lost: int
    """That only the later, and only the earlier model has right."""
    neither: int
    otherwise: int
    """Of those that neither has right, the ones of which they say different things."""
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
    """Images that only the later, and only the earlier model has right."""

    @property
    def gain(self) -> float:
        return self.after - self.before


@dataclass(frozen=True)
class Gains:
    """Accuracy by class of two models."""

    before: str
    after: str
    """What the models are called."""
    rows: list[ClassGain]
    """The largest losses first; classes without images are left out."""
    galleries: list[Gallery]


def disagreement(before: Answers, after: Answers, folder: Store, data: Dataset, size: int) -> Disagreement:
    """Counts, and the `size` surest images of each kind. Raises DataError if the two did not see the same images."""
    _check(before, after)
    won, lost = after.right & ~before.right, before.right & ~after.right
    neither = ~before.right & ~after.right
    otherwise = neither & (before.predicted != after.predicted)
    kinds = (
        ("Won", f"{after.title} has them right, {before.title.lower()} does not; the surest pairs of answers first.", won),
        ("Lost", f"{before.title} has them right, {after.title.lower()} does not.", lost),
        ("Wrong in two ways", "Neither has them right, and they say different things.", otherwise),
    )
    return Disagreement(
        before=before.title,
        after=after.title,
        both=int((before.right & after.right).sum()),
        won=int(won.sum()),
        lost=int(lost.sum()),
        neither=int(neither.sum()),
        otherwise=int(otherwise.sum()),
        galleries=_galleries(before, after, folder, data, kinds, size),
    )


def gains(before: Answers, after: Answers, folder: Store, data: Dataset, size: int) -> Gains:
    """Every class, and pictures of those that changed most. Raises DataError if the two did not see the same images."""
    _check(before, after)
    won, lost = after.right & ~before.right, before.right & ~after.right
    count = len(after.classes)
    images, right_before, right_after, gained, given = (
        np.bincount(before.labels[chosen], minlength=count).tolist()
        for chosen in (np.ones_like(won), before.right, after.right, won, lost)
    )
    rows = sorted(
        (
            ClassGain(name, images[c], right_before[c] / images[c], right_after[c] / images[c], gained[c], given[c])
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
         chosen & (before.labels == index[row.name]))
        for row, chosen, verb in shown
    )  # fmt: skip
    return Gains(before.title, after.title, rows, _galleries(before, after, folder, data, kinds, min(size, CLASS_PICTURES)))


def _check(before: Answers, after: Answers) -> None:
    if before.keys != after.keys or before.classes != after.classes:
        raise DataError(
            f"{before.title} and {after.title.lower()} were evaluated on different images; run the evaluation again"
        )


def _galleries(
    before: Answers,
    after: Answers,
    folder: Store,
    data: Dataset,
    kinds: tuple[tuple[str, str, npt.NDArray[np.bool_]], ...],
    size: int,
) -> list[Gallery]:
    """Groups of the images that both models are surest of. Empty groups are left out."""
    score = np.minimum(before.confidence, after.confidence)
    chosen = []
    for _, _, wanted in kinds:
        rows = np.flatnonzero(wanted)
        chosen.append(rows[np.argsort(-score[rows], kind="stable")[:size]].tolist())
    everything = [row for rows in chosen for row in rows]
    places = find(folder, data, {after.keys[row] for row in everything})
    sources = thumbnails(folder, data, [places[after.keys[row]] for row in everything], THUMBNAIL_PX)
    pictures = [
        source and Picture(after.keys[row], _says(before, after, row), source)
        for row, source in zip(everything, sources, strict=True)
    ]
    groups, done = [], 0
    for (title, about, _), rows in zip(kinds, chosen, strict=True):
        group = [picture for picture in pictures[done : done + len(rows)] if picture]
        done += len(rows)
        if group:
            groups.append(Gallery(title, about, group))
    return groups


def _says(before: Answers, after: Answers, row: int) -> str:
    """`cat: dog 61% → cat 74%`: the label, and the two answers."""
    old, new = (f"{side.classes[side.predicted[row]]} {side.confidence[row]:.0%}" for side in (before, after))
    return f"{after.classes[after.labels[row]]}: {old} → {new}"
