"""Audit: people look at a sample of the labels and say which are wrong; from that, how right the labels are.

The sample is stratified by class and band of confidence, at least two of each stratum, and drawn by a hash of seed and key:
the same label set, seed and number give the same images on any machine.

audit-DIGEST.json     beside labelset.json, one for each audit: the estimate, and the images that are wrong
"""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field

from ns.core.digest import short
from ns.core.errors import DataError
from ns.core.intervals import Share, trials, weighted, wilson
from ns.data.dataset import MANIFEST as DATASET
from ns.data.dataset import Dataset
from ns.data.importing.writer import ShardWriter
from ns.data.index import ShardIndex
from ns.labeling.confidence_bins import BANDS, EDGES, bands
from ns.labeling.label_set import LabelSet, Rows, all_rows
from ns.labeling.selection import Selection, copies, key_hashes
from ns.storage import Store
from ns.storage.documents import Document, Identified

PREFIX = "audit-"
CORRECTIONS = "corrections.csv"

MINIMUM = 2
"""Images of each stratum: one alone says little, none nothing."""
SALT = 1 << 32
"""Added to the seed: the sample must not depend on how a selection breaks its ties."""

ByAlias = ConfigDict(frozen=True, extra="forbid", serialize_by_alias=True)


class Stratum(Document):
    """Images of one class in one band of confidence."""

    model_config = ByAlias

    label: str | None = Field(alias="class")
    """None: of all classes."""
    low: float
    high: float
    """Half open, but for 1, which is in."""
    images: int
    """In the label set, or the selection."""
    sampled: int


class Image(Document):
    """One image of the sample, and what a person says about it."""

    model_config = ByAlias

    key: str
    shard: int
    row: int
    stratum: int
    """Index."""
    label: str = Field(alias="class")
    """The teacher's."""
    confidence: float
    wrong: bool = False
    correct_class: str | None = None
    looked: bool = False
    """Images that nobody looked at count neither as right nor as wrong."""


class Sheet(Document):
    """The sample, as a page shows it and sends it back (`audit.json`)."""

    format: Literal[1] = 1
    label_set: str
    """Digest."""
    selection: str | None
    """Digest of the selection whose images were drawn from; None: all labelled images."""
    seed: int
    asked: int
    """Images that were asked for; there are fewer if the label set has."""
    strata: tuple[Stratum, ...]
    images: tuple[Image, ...]


class Precision(Document):
    """How many labels of one stratum are right."""

    model_config = ByAlias

    label: str | None = Field(alias="class")
    low: float
    high: float
    """Confidence."""
    images: int
    looked: int
    right: int
    precision: float | None
    """right ÷ looked; None if nobody looked."""
    precision_low: float
    precision_high: float
    """95 % (Wilson), exact where all images were looked at."""


class Mistake(Document):
    """A label that a person calls wrong."""

    model_config = ByAlias

    key: str
    shard: int
    row: int
    label: str = Field(alias="class")
    confidence: float
    correct_class: str | None
    """None: not said."""


class Audit(Identified):
    """What an audit found."""

    format: Literal[1] = 1
    label_set: str
    selection: str | None
    """Digests; the selection is None if all labelled images were drawn from."""
    seed: int
    asked: int
    images: int
    """That the sample stands for."""
    looked: int
    wrong: int
    precision: float
    precision_low: float
    precision_high: float
    """Share of right labels among all images, and its 95 % interval: strata weighted by their sizes."""
    strata: tuple[Precision, ...]
    mistakes: tuple[Mistake, ...]


# Sampling


def allocate(sizes: Sequence[int], total: int) -> list[int]:
    """How many of each stratum to draw: two (all, if there are fewer), and of the rest a proportional part.

    The sum is `total`, or all there are. `total` must be at least the sum of the minima.
    """
    least = [min(MINIMUM, size) for size in sizes]
    rest = [size - own for size, own in zip(sizes, least, strict=True)]
    remaining = min(total, sum(sizes)) - sum(least)
    if not sum(rest):
        return least
    # Whole numbers throughout, so that no rounding depends on the machine; the largest remainders get what is left.
    parts = [divmod(remaining * size, sum(rest)) for size in rest]
    drawn = [own + whole for own, (whole, _) in zip(least, parts, strict=True)]
    by_remainder = sorted(range(len(parts)), key=lambda index: (-parts[index][1], index))
    for index in by_remainder[: remaining - sum(whole for whole, _ in parts)]:
        drawn[index] += 1
    return drawn


def sample(folder: Store, label_set: LabelSet, *, images: int, seed: int, selection: Selection | None = None) -> Sheet:
    """Draws about `images` labelled images, of those that `selection` keeps if it is given.

    Strata are classes × bands; where two of each would be more than asked for, classes; else bands; else everything is one.
    Reads the label set twice, a shard at a time, and holds no more than the sample. Raises DataError if there is nothing to
    draw from.
    """
    classes = len(label_set.classes)
    sizes = np.zeros((classes, BANDS), np.int64)
    for _, rows, places in _candidates(folder, label_set, selection):
        np.add.at(sizes, (rows.top_class[places, 0].astype(np.int64), bands(rows.confidence[places])), 1)
    if not sizes.any():
        raise DataError(f"{folder.uri}: has no {'selected' if selection else 'labelled'} images to look at")
    cell = _cells(sizes, images)
    counts = np.bincount(cell.ravel(), sizes.ravel()).astype(np.int64)
    drawn = dict(enumerate(allocate(counts.tolist(), images)))
    lowest: dict[int, list[tuple[int, Image]]] = {number: [] for number, wanted in drawn.items() if wanted}
    ordinal = {number: place for place, number in enumerate(lowest)}
    for shard, rows, places in _candidates(folder, label_set, selection):
        label = rows.top_class[places, 0].astype(np.int64)
        stratum = cell[label, bands(rows.confidence[places])]
        hashes = key_hashes([rows.keys[row] for row in places.tolist()], SALT + seed)
        order = np.lexsort((hashes, stratum))
        starts = np.searchsorted(stratum[order], list(lowest), side="left").tolist()
        ends = np.searchsorted(stratum[order], list(lowest), side="right").tolist()
        for number, start, end in zip(lowest, starts, ends, strict=True):
            found = [
                (
                    int(hashes[index]),
                    Image.model_validate(
                        {
                            "key": rows.keys[places[index]],
                            "shard": shard,
                            "row": int(places[index]),
                            "stratum": ordinal[number],
                            "class": label_set.classes[label[index]],
                            "confidence": float(rows.confidence[places[index]]),
                        }
                    ),
                )
                for index in order[start : min(end, start + drawn[number])].tolist()
            ]
            lowest[number] = sorted([*lowest[number], *found], key=_by_hash)[: drawn[number]]
    position = {name: number for number, name in enumerate(label_set.classes)}
    chosen = [pair for pairs in lowest.values() for pair in pairs]
    # One class after the other, since what does not belong is then seen at a glance; within it, in no order.
    chosen.sort(key=lambda pair: (position[pair[1].label], *_by_hash(pair)))
    return Sheet(
        label_set=label_set.digest,
        selection=selection.digest if selection else None,
        seed=seed,
        asked=images,
        strata=tuple(_stratum(cell, number, label_set.classes, int(counts[number]), drawn[number]) for number in lowest),
        images=tuple(image for _, image in chosen),
    )


def _by_hash(pair: tuple[int, Image]) -> tuple[int, int, int]:
    return pair[0], pair[1].shard, pair[1].row


def _candidates(
    folder: Store, label_set: LabelSet, selection: Selection | None
) -> Iterator[tuple[int, Rows, npt.NDArray[np.int64]]]:
    """Number of each shard, its rows, and the indices of those that can be drawn."""
    for shard, rows in enumerate(all_rows(folder, label_set)):
        yield shard, rows, np.flatnonzero(rows.readable if selection is None else copies(selection, rows) > 0)


def _cells(sizes: npt.NDArray[np.int64], images: int) -> npt.NDArray[np.int64]:
    """int64 [classes, BANDS]: the number of the stratum of each class and band, the finest division that `images` suffice for."""
    grid: npt.NDArray[np.int64] = np.indices(sizes.shape, np.int64)
    label, band = grid[0], grid[1]
    cells: npt.NDArray[np.int64] = np.zeros(sizes.shape, np.int64)
    for finer in (band, label, label * BANDS + band):
        counts = np.bincount(finer.ravel(), sizes.ravel()).astype(np.int64)
        if np.minimum(counts, MINIMUM).sum() <= images:
            cells = finer
    return cells


def _stratum(cell: npt.NDArray[np.int64], number: int, classes: tuple[str, ...], images: int, sampled: int) -> Stratum:
    labels, own = (np.unique(indices) for indices in np.nonzero(cell == number))
    return Stratum.model_validate(
        {
            "class": classes[labels[0]] if len(labels) == 1 else None,
            "low": EDGES[int(own[0])],
            "high": EDGES[int(own[-1]) + 1],
            "images": images,
            "sampled": sampled,
        }
    )


# What comes back


def check(sheet: Sheet, place: str, folder: Store, label_set: LabelSet, selection: Selection | None) -> None:
    """Compares a filled-in sheet with the label set that it must be of. `selection` is the one that the labels are known by.

    Raises DataError naming the file, the field, the value and the cure.
    """
    if sheet.label_set != label_set.digest:
        raise DataError(
            f"{place}: label_set: {sheet.label_set!r}: an audit of another label set; {folder.uri} is {label_set.digest!r}: "
            "name the labels that the page was made of"
        )
    if sheet.selection is not None and (selection is None or selection.digest != sheet.selection):
        raise DataError(
            f"{place}: selection: {sheet.selection!r}: the page was made with --selected-only; "
            "name the run's generation that it was made of (as in latest/gen-1), not a folder"
        )
    drawn = sample(folder, label_set, images=sheet.asked, seed=sheet.seed, selection=selection if sheet.selection else None)
    if sheet.strata != drawn.strata:
        raise DataError(f"{place}: strata: are not those of {folder.uri}: the file was edited; download it again from the page")
    known = {image.key: image for image in drawn.images}
    seen: set[str] = set()
    for number, image in enumerate(sheet.images):
        at = f"{place}: images.{number}"
        if image.key not in known or image.key in seen:
            what = "is there twice" if image.key in seen else "is not in the sample that the page showed"
            raise DataError(f"{at}.key: {image.key!r}: {what}; download the file again from the page")
        seen.add(image.key)
        answered = {"wrong": image.wrong, "correct_class": image.correct_class, "looked": image.looked}
        expected = known[image.key].model_copy(update=answered)
        for name, value in image:
            if value != getattr(expected, name):
                field = "class" if name == "label" else name
                raise DataError(
                    f"{at}.{field}: {value!r}: the label set says {getattr(expected, name)!r}; download the file again from the page"
                )
        _check_answer(at, image, label_set.classes)
    if len(seen) < len(known):
        missing = next(key for key in known if key not in seen)
        raise DataError(f"{place}: images: {missing!r} is missing; download the file again from the page")


def _check_answer(at: str, image: Image, classes: tuple[str, ...]) -> None:
    right = image.correct_class
    if image.wrong and not image.looked:
        raise DataError(
            f"{at}.looked: False: an image that is wrong must have been looked at; set it to true, or wrong to false"
        )
    if right is None:
        return
    if right not in classes:
        known = ", ".join(classes[:20]) + (", …" if len(classes) > 20 else "")
        raise DataError(f"{at}.correct_class: {right!r}: no such class; name one of {known}, or null")
    if not image.wrong:
        raise DataError(
            f"{at}.correct_class: {right!r}: given for an image that is not marked wrong; set wrong to true, or it to null"
        )
    if right == image.label:
        raise DataError(f"{at}.correct_class: {right!r}: is the teacher's class; name another, or set wrong to false")


def estimate(sheet: Sheet, place: str) -> Audit:
    """The share of right labels, in each stratum and in all, from what was looked at.

    Within a stratum, images that nobody looked at are taken to be like those that somebody did. A stratum that nobody looked
    at at all is taken to be like the others, with an interval from 0 to 1. Raises DataError if nobody looked at anything.
    """
    looked = [0] * len(sheet.strata)
    right = [0] * len(sheet.strata)
    for image in sheet.images:
        looked[image.stratum] += image.looked
        right[image.stratum] += image.looked and not image.wrong
    if not any(looked):
        raise DataError(f"{place}: images: nobody looked at any of them; go through the page, and download the file again")
    sizes = [stratum.images for stratum in sheet.strata]
    seen = sum(size for size, count in zip(sizes, looked, strict=True) if count)
    others = sum(size * good / count for size, good, count in zip(sizes, right, looked, strict=True) if count) / seen
    shares = []
    for size, good, count in zip(sizes, right, looked, strict=True):
        value = good / count if count else others
        shares.append(Share(value, *wilson(value, trials(count, size))))
    total = weighted(shares, [size / sum(sizes) for size in sizes])
    wrong = [image for image in sheet.images if image.looked and image.wrong]
    return Audit(
        label_set=sheet.label_set,
        selection=sheet.selection,
        seed=sheet.seed,
        asked=sheet.asked,
        images=sum(sizes),
        looked=sum(looked),
        wrong=len(wrong),
        precision=total.value,
        precision_low=total.low,
        precision_high=total.high,
        strata=tuple(
            Precision.model_validate(
                {
                    **stratum.model_dump(exclude={"sampled"}),
                    "looked": count,
                    "right": good,
                    "precision": good / count if count else None,
                    "precision_low": share.low,
                    "precision_high": share.high,
                }
            )
            for stratum, count, good, share in zip(sheet.strata, looked, right, shares, strict=True)
        ),
        mistakes=tuple(
            Mistake.model_validate(image.model_dump(exclude={"stratum", "wrong", "looked"}))
            for image in sorted(wrong, key=lambda image: (image.shard, image.row))
        ),
    )


# Keeping


def keep(audit: Audit, folder: Store) -> str:
    """Writes an audit beside its label set. Returns its key."""
    key = f"{PREFIX}{short(audit.digest)}.json"
    audit.write(folder, key)
    return key


def audits(folder: Store, label_set: LabelSet) -> list[Audit]:
    """All audits that lie beside a label set, in the order of their digests."""
    found = [Audit.read(folder, key) for key in folder.list(PREFIX) if key.endswith(".json")]
    return [audit for audit in found if audit.label_set == label_set.digest]


def deciding(found: Sequence[Audit], selection: Selection | None) -> Audit | None:
    """The audit that speaks for what a student learns from: of its selection before of all labels, then of most images."""
    own = [audit for audit in found if audit.selection is None or (selection and audit.selection == selection.digest)]
    rank: Callable[[Audit], Any] = lambda audit: (audit.selection is not None, audit.looked, audit.digest)  # noqa: E731
    return max(own, key=rank, default=None)


def write_corrections(audit: Audit, classes: tuple[str, ...], folder: Store, pool: Dataset, target: Store) -> Dataset | None:
    """Makes a labelled dataset of the images whose right class is known, with a table of them. None if there are none.

    The shard is named after the audit, so that those of several audits can lie in one folder. Raises DataError if another
    dataset is there.
    """
    fixed = [mistake for mistake in audit.mistakes if mistake.correct_class is not None]
    if not fixed:
        return None
    numbers = {name: number for number, name in enumerate(classes)}
    name = f"corrections-{short(audit.digest)}"
    if target.exists(DATASET) and Dataset.load(target).name != name:
        raise DataError(f"{target.uri}: holds another dataset; choose another folder with --corrections")
    sink = io.StringIO()
    table = csv.writer(sink, lineterminator="\n")
    table.writerow(["key", "label", "teacher", "confidence"])
    index: ShardIndex | None = None
    opened = -1
    with ShardWriter(target, max_samples=10_000, max_bytes=256 << 20, first=name) as writer:
        for one in fixed:
            if index is None or opened != one.shard:
                opened, index = one.shard, ShardIndex.read(folder, pool.shards[one.shard])
            data = folder.get_range(pool.shards[one.shard].name, int(index.offsets[one.row]), int(index.sizes[one.row]))
            writer.add(one.key, index.table["extension"][one.row].as_py(), data, numbers[str(one.correct_class)])
            table.writerow([one.key, one.correct_class, one.label, f"{one.confidence:.4f}"])
    dataset = Dataset(name=name, role="labelled", classes=classes, shards=writer.shards)
    target.put(CORRECTIONS, sink.getvalue().encode())
    dataset.save(target)
    return dataset
