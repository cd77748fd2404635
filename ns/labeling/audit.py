"""Audit: people review a sample of the labels and mark the wrong ones; this estimates the share of right labels.

The sample is stratified by class and bin of confidence, with at least two images of each stratum, and drawn by a hash of seed and
key: the same label set, seed and size give the same images on any machine.

audit-DIGEST.json     beside labelset.json, one for each audit: the estimate, and the images that are wrong
"""

import csv
import io
import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from ns.core.digest import shorten_digest
from ns.core.errors import DataError
from ns.core.intervals import effective_trials, stratified_interval, wilson_interval
from ns.core.printable import escape_formula
from ns.data.dataset import Dataset
from ns.data.importing.writer import ShardWriter
from ns.data.index import ShardIndex
from ns.labeling.alignment import align_rows
from ns.labeling.confidence_bins import CONFIDENCE_BIN_EDGES, CONFIDENCE_BINS, bin_confidences
from ns.labeling.label_set import LabelRows, LabelSet, iter_label_rows, read_row_keys
from ns.labeling.selection import CopyReader, Selection, hash_keys
from ns.storage import Store
from ns.storage.documents import HashedDocument, JsonDocument

AUDIT_PREFIX = "audit-"
CORRECTIONS = "corrections.csv"

MIN_PER_STRATUM = 2
"""Images of each stratum at least."""
SAMPLE_SALT = 1 << 32
"""Added to the seed: the sample must not depend on how a selection breaks its ties."""

MAX_HELD_ROWS = 1 << 17
"""Rows beyond those that may still be drawn, before the others are let go."""

MAX_SAMPLE_SIZE, MAX_SEED = 5000, 2**31 - 1
SampleSize = Annotated[int, Field(ge=1, le=MAX_SAMPLE_SIZE)]
SampleSeed = Annotated[int, Field(ge=0, le=MAX_SEED)]


class Stratum(JsonDocument):
    """Images of one class in one range of confidence."""

    class_name: str | None
    """None stands for all classes."""
    low: float
    high: float
    """The range excludes `high`, but includes confidence 1."""
    images: int
    """Images in the label set, or in the selection."""
    sampled: int


class AuditedImage(JsonDocument):
    """One image of the sample, and a person's answer."""

    key: str
    shard: int
    row: int
    stratum: int
    """Index of the stratum."""
    class_name: str
    """The teacher's class."""
    confidence: float
    wrong: bool = False
    correct_class: str | None = None
    reviewed: bool = False
    """Images that are not reviewed count neither as right nor as wrong."""


class AuditSheet(JsonDocument):
    """The sample, as a page shows it and sends it back (`audit.json`)."""

    format: Literal[1] = 1
    label_set: str
    """Digest of the label set."""
    selection: str | None
    """Digest of the selection that the sample was drawn from; None if it was drawn from all labeled images."""
    seed: SampleSeed
    requested: SampleSize
    """Sample size that was asked for; there are fewer images if the label set has fewer."""
    strata: tuple[Stratum, ...]
    images: tuple[AuditedImage, ...]


class StratumPrecision(Stratum):
    """Share of right labels in one stratum."""

    reviewed: int
    right: int
    precision: float | None
    """right ÷ reviewed; None if no image was reviewed."""
    precision_low: float
    precision_high: float
    """95 % interval (Wilson); exact where all images were reviewed."""


class LabelAudit(HashedDocument):
    """The result of an audit."""

    format: Literal[1] = 1
    label_set: str
    selection: str | None
    """Digests, as in `AuditSheet`."""
    seed: SampleSeed
    requested: SampleSize
    images: int
    """Images that the sample represents."""
    reviewed: int
    wrong: int
    precision: float
    precision_low: float
    precision_high: float
    """Share of right labels among all images, and its 95 % interval (`stratified_interval`): strata weighted by their sizes."""
    strata: tuple[StratumPrecision, ...]
    mistakes: tuple[AuditedImage, ...]
    """The images that were marked wrong, in the order of the dataset."""


# Sampling


def allocate_sample(sizes: Sequence[int], total: int) -> list[int]:
    """Images to draw from each stratum: two (or all, if it has fewer), and a proportional part of the rest.

    The sum is the lesser of `total` and the sum of `sizes`. `total` must be at least the sum of the minima.
    """
    minima = [min(MIN_PER_STRATUM, size) for size in sizes]
    spare = [size - minimum for size, minimum in zip(sizes, minima, strict=True)]
    remaining = min(total, sum(sizes)) - sum(minima)
    if not sum(spare):
        return minima
    # Whole numbers throughout, so that no rounding depends on the machine; the largest remainders get what is left.
    parts = [divmod(remaining * size, sum(spare)) for size in spare]
    drawn = [minimum + whole for minimum, (whole, _) in zip(minima, parts, strict=True)]
    by_remainder = sorted(range(len(parts)), key=lambda index: (-parts[index][1], index))
    for index in by_remainder[: remaining - sum(whole for whole, _ in parts)]:
        drawn[index] += 1
    return drawn


def draw_audit_sample(
    store: Store, label_set: LabelSet, *, sample_size: int, seed: int, selection: Selection | None = None
) -> AuditSheet:
    """Draws about `sample_size` labeled images; only of those that `selection` keeps if it is given.

    Strata are the finest division of which two images each are at most half of `sample_size`, so that the other half is in proportion:
    classes × confidence bins, classes, bins, or one stratum. Reads the label set once, shard by shard, and the keys of the sample
    again; between shards it keeps what may still be drawn, at most `sample_size` images of each stratum. Raises DataError if there are
    no images to draw from.
    """
    sizes = np.zeros((len(label_set.classes), CONFIDENCE_BINS), np.int64)
    held, kept_rows = [np.zeros(0, _DRAWABLE_ROW)], 0
    for shard, rows, candidates in _iter_candidates(store, label_set, selection):
        shard_rows = np.zeros(len(candidates), _DRAWABLE_ROW)
        shard_rows["class_id"] = rows.top_class[candidates, 0]
        shard_rows["confidence"] = rows.confidence[candidates]
        shard_rows["hash"] = hash_keys([rows.keys[row] for row in candidates.tolist()], SAMPLE_SALT + seed)
        shard_rows["shard"], shard_rows["row"] = shard, candidates
        np.add.at(sizes, _find_cells(shard_rows), 1)
        held.append(shard_rows)
        if sum(map(len, held)) > 2 * kept_rows + MAX_HELD_ROWS:
            held = [_keep_drawable(np.concatenate(held), sizes, sample_size)]
            kept_rows = len(held[0])
    if not sizes.any():
        raise DataError(f"{store.uri}: has no {'selected' if selection else 'labeled'} images to look at")
    stratum_grid = _list_divisions(sizes, sample_size)[-1]
    counts = np.bincount(stratum_grid.ravel(), sizes.ravel()).astype(np.int64)
    drawn = allocate_sample(counts.tolist(), sample_size)
    numbers = np.flatnonzero(drawn).tolist()
    drawable = np.concatenate(held)
    stratum = stratum_grid[_find_cells(drawable)]
    sample = drawable[_rank_in_strata(drawable, stratum) < np.array(drawn)[stratum]]
    # By class, since an image of another class is then seen at a glance; within a class in random order.
    sample = sample[np.lexsort((sample["row"], sample["shard"], sample["hash"], sample["class_id"]))]
    keys: dict[tuple[int, int], str] = {}
    for shard in np.unique(sample["shard"]).tolist():
        shard_rows = sample["row"][sample["shard"] == shard].tolist()
        keys |= zip(
            [(shard, row) for row in shard_rows], read_row_keys(store, label_set.shards[shard], shard_rows), strict=True
        )
    images = tuple(
        AuditedImage(
            key=keys[shard, row],
            shard=shard,
            row=row,
            stratum=ordinal,
            class_name=label_set.classes[class_id],
            confidence=confidence,
        )
        for (class_id, confidence, _, shard, row), ordinal in zip(
            sample.tolist(), np.searchsorted(numbers, stratum_grid[_find_cells(sample)]).tolist(), strict=True
        )
    )
    return AuditSheet(
        label_set=label_set.digest,
        selection=selection.digest if selection else None,
        seed=seed,
        requested=sample_size,
        strata=tuple(
            _build_stratum(stratum_grid, number, label_set.classes, int(counts[number]), drawn[number]) for number in numbers
        ),
        images=images,
    )


_DRAWABLE_ROW = np.dtype(
    [("class_id", np.uint16), ("confidence", np.float32), ("hash", np.uint64), ("shard", np.uint32), ("row", np.uint32)]
)
"""A row that may be drawn."""


def _find_cells(rows: npt.NDArray[np.void]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Class and bin of each row."""
    return rows["class_id"].astype(np.int64), bin_confidences(rows["confidence"])


def _keep_drawable(rows: npt.NDArray[np.void], sizes: npt.NDArray[np.int64], sample_size: int) -> npt.NDArray[np.void]:
    """The rows that a sample may hold, whatever is found later: the first ones of each stratum. A division that `sample_size` does not
    suffice for never becomes possible again, and the first ones of a coarser division are among those of a finer one."""
    cells = _find_cells(rows)
    *coarser, finest = _list_divisions(sizes, sample_size)
    is_drawable = _rank_in_strata(rows, finest[cells]) < sample_size
    if finest.max() + 1 < sizes.size:
        # Classes and bins: neither is finer than the other.
        for division in coarser:
            is_drawable |= _rank_in_strata(rows, division[cells]) < sample_size
    return rows[is_drawable]


def _rank_in_strata(rows: npt.NDArray[np.void], strata: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Position of each row in its stratum, int64 [N]: by hash, and of equal hashes the earlier image first."""
    order = np.lexsort((rows["row"], rows["shard"], rows["hash"], strata))
    ordered = strata[order]
    ranks = np.empty(len(rows), np.int64)
    ranks[order] = np.arange(len(rows)) - np.searchsorted(ordered, ordered, side="left")
    return ranks


def _iter_candidates(
    store: Store, label_set: LabelSet, selection: Selection | None
) -> Iterator[tuple[int, LabelRows, npt.NDArray[np.int64]]]:
    """Number of each shard, its rows, and the indices of the rows that can be drawn."""
    copy_reader = CopyReader(store, selection) if selection else None
    for shard, rows in enumerate(iter_label_rows(store, label_set)):
        if selection is None or copy_reader is None:
            yield shard, rows, np.flatnonzero(rows.readable)
        else:
            # What is audited is what the student learns.
            kept = np.flatnonzero(copy_reader.count_shard_copies(shard, rows) > 0)
            yield shard, align_rows(rows, selection.alignment), kept


def _list_divisions(sizes: npt.NDArray[np.int64], sample_size: int) -> list[npt.NDArray[np.int64]]:
    """The divisions into strata that `sample_size` suffices for, the finest last: the number of the stratum of each class and bin, int64
    [classes, bins]."""
    grid: npt.NDArray[np.int64] = np.indices(sizes.shape, np.int64)
    class_index, bin_index = grid[0], grid[1]
    divisions: list[npt.NDArray[np.int64]] = [np.zeros(sizes.shape, np.int64)]
    for finer in (bin_index, class_index, class_index * CONFIDENCE_BINS + bin_index):
        counts = np.bincount(finer.ravel(), sizes.ravel()).astype(np.int64)
        if 2 * np.minimum(counts, MIN_PER_STRATUM).sum() <= sample_size:
            divisions.append(finer)
    return divisions


def _build_stratum(
    stratum_grid: npt.NDArray[np.int64], number: int, classes: tuple[str, ...], images: int, sampled: int
) -> Stratum:
    class_ids, bins = (np.unique(indices) for indices in np.nonzero(stratum_grid == number))
    return Stratum(
        class_name=classes[class_ids[0]] if len(class_ids) == 1 else None,
        low=CONFIDENCE_BIN_EDGES[int(bins[0])],
        high=CONFIDENCE_BIN_EDGES[int(bins[-1]) + 1],
        images=images,
        sampled=sampled,
    )


# The answers


def check_audit_sheet(
    sheet: AuditSheet,
    path: str,
    store: Store,
    label_set: LabelSet,
    selection: Selection | None,
    *,
    sample_size: int,
    seed: int,
) -> None:
    """Compares a filled-in sheet with its label set. `selection` is the selection of the run that made the label set.

    `sample_size` and `seed` are those that the page was asked for: a file that names its own could choose the images that it is about.
    Raises DataError naming the file, the field, the value and the cure.
    """
    for name, option, value, expected in (
        ("seed", "--seed", sheet.seed, seed),
        ("requested", "--images", sheet.requested, sample_size),
    ):
        if value != expected:
            raise DataError(
                f"{path}: {name}: {value!r}: expected {expected}; if you made the page with {option} {value}, give this option here too"
            )
    if sheet.label_set != label_set.digest:
        raise DataError(
            f"{path}: label_set: {sheet.label_set!r}: an audit of another label set; {store.uri} is {label_set.digest!r}: "
            "name the label set that the page was made of"
        )
    if sheet.selection is not None and (selection is None or selection.digest != sheet.selection):
        raise DataError(
            f"{path}: selection: {sheet.selection!r}: the page was made with --selected-only; "
            "name the run's generation that it was made of (as in latest/gen-1), not a folder"
        )
    drawn = draw_audit_sample(
        store, label_set, sample_size=sample_size, seed=seed, selection=selection if sheet.selection else None
    )
    if sheet.strata != drawn.strata:
        raise DataError(f"{path}: strata: are not those of {store.uri}: the file was edited; download it again from the page")
    if {image.key for image in sheet.images} != {image.key for image in drawn.images} or len(sheet.images) != len(drawn.images):
        raise DataError(
            f"{path}: images: are not those of the sample that the page showed; download the file again from the page"
        )
    drawn_by_key = {image.key: image for image in drawn.images}
    for number, image in enumerate(sheet.images):
        for name in ("shard", "row", "stratum", "class_name", "confidence"):
            value, expected = getattr(image, name), getattr(drawn_by_key[image.key], name)
            if value != expected:
                raise DataError(
                    f"{path}: images.{number}.{name}: {value!r}: the label set says {expected!r}; "
                    "download the file again from the page"
                )
        _check_answer(f"{path}: images.{number}", image, label_set.classes)


def _check_answer(field_path: str, image: AuditedImage, classes: tuple[str, ...]) -> None:
    correct_class = image.correct_class
    if image.wrong and not image.reviewed:
        raise DataError(
            f"{field_path}.reviewed: False: an image that is marked wrong must be reviewed; set it to true, or wrong to false"
        )
    if correct_class is None:
        return
    if correct_class not in classes:
        class_names = ", ".join(classes[:20]) + (", …" if len(classes) > 20 else "")
        raise DataError(f"{field_path}.correct_class: {correct_class!r}: no such class; name one of {class_names}, or null")
    if not image.wrong:
        raise DataError(
            f"{field_path}.correct_class: {correct_class!r}: given for an image that is not marked wrong; set wrong to true, or it to null"
        )
    if correct_class == image.class_name:
        raise DataError(
            f"{field_path}.correct_class: {correct_class!r}: is the teacher's class; name another, or set wrong to false"
        )


def estimate_precision(sheet: AuditSheet, path: str) -> LabelAudit:
    """Estimates the share of right labels in each stratum and overall from the reviewed images.

    Images that were not reviewed count as the reviewed ones of their stratum. Of a stratum without reviewed images, the lower bound
    takes all labels as wrong, and the upper bound all as right. Raises DataError if no image was reviewed.
    """
    reviewed = [0] * len(sheet.strata)
    right = [0] * len(sheet.strata)
    for image in sheet.images:
        reviewed[image.stratum] += image.reviewed
        right[image.stratum] += image.reviewed and not image.wrong
    if not any(reviewed):
        raise DataError(f"{path}: images: none of them was reviewed; go through the page, and download the file again")
    wrong = [image for image in sheet.images if image.reviewed and image.wrong]
    mistakes = tuple(sorted(wrong, key=lambda image: (image.shard, image.row)))
    return _build_audit(sheet, sheet.strata, reviewed, right, mistakes)


def _build_audit(
    request: AuditSheet | LabelAudit,
    strata: Sequence[Stratum],
    reviewed: Sequence[int],
    right: Sequence[int],
    mistakes: tuple[AuditedImage, ...],
) -> LabelAudit:
    """The audit that follows from the answers, by stratum. `request` has what was asked for."""
    sizes = [stratum.images for stratum in strata]
    total = stratified_interval(right, reviewed, sizes)
    bounds = [
        wilson_interval(good / count if count else 0, effective_trials(count, size))
        for good, count, size in zip(right, reviewed, sizes, strict=True)
    ]
    return LabelAudit(
        label_set=request.label_set,
        selection=request.selection,
        seed=request.seed,
        requested=request.requested,
        images=sum(sizes),
        reviewed=sum(reviewed),
        wrong=len(mistakes),
        precision=total.value,
        precision_low=total.low,
        precision_high=total.high,
        strata=tuple(
            StratumPrecision(
                **stratum.model_dump(include=set(Stratum.model_fields)),
                reviewed=count,
                right=good,
                precision=good / count if count else None,
                precision_low=low,
                precision_high=high,
            )
            for stratum, count, good, (low, high) in zip(strata, reviewed, right, bounds, strict=True)
        ),
        mistakes=mistakes,
    )


def check_audit(audit: LabelAudit, store: Store, label_set: LabelSet, selection: Selection | None) -> None:
    """Draws the sample of an audit again, and computes its estimate from the counts of its answers.

    A file beside a label set may be anybody's: only what follows from the label set and the answers is believed. Reads the label set
    once. Raises DataError naming the file and the field.
    """
    uri = f"{store.uri}/{build_audit_key(audit)}"
    drawn = draw_audit_sample(
        store, label_set, sample_size=audit.requested, seed=audit.seed, selection=selection if audit.selection else None
    )
    strata = tuple(Stratum(**stratum.model_dump(include=set(Stratum.model_fields))) for stratum in audit.strata)
    if strata != drawn.strata:
        raise DataError(
            f"{uri}: strata: are not those of the label set: the file was not made by `ns labels audit apply`; remove it"
        )
    drawn_by_key = {image.key: image for image in drawn.images}
    wrong = [0] * len(strata)
    for image in audit.mistakes:
        drawn_image = image.model_copy(update={"wrong": False, "reviewed": False, "correct_class": None})
        if drawn_by_key.pop(image.key, None) != drawn_image or not (image.wrong and image.reviewed):
            raise DataError(f"{uri}: mistakes: {image.key!r}: is not in the sample, or not marked wrong; remove the file")
        wrong[image.stratum] += 1
    reviewed = [stratum.reviewed for stratum in audit.strata]
    if any(not missed <= count <= stratum.sampled for missed, count, stratum in zip(wrong, reviewed, strata, strict=True)):
        raise DataError(f"{uri}: strata: have other numbers of images than the sample; remove the file")
    right = [count - missed for count, missed in zip(reviewed, wrong, strict=True)]
    expected = _build_audit(audit, strata, reviewed, right, audit.mistakes)
    for name, value in expected.model_dump().items():
        if not _is_close(getattr(audit, name), value):
            raise DataError(
                f"{uri}: {name}: is not what follows from the answers: the file was edited; remove it, and apply the audit.json again"
            )


def _is_close(value: Any, expected: Any) -> bool:
    """Equal up to the rounding of another machine."""
    match expected:
        case float():
            return isinstance(value, float | int) and math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-12)
        case dict():
            return all(_is_close(getattr(value, name), field) for name, field in expected.items())
        case tuple():
            return len(value) == len(expected) and all(map(_is_close, value, expected))
        case _:
            return bool(value == expected)


# Files


def build_audit_key(audit: LabelAudit) -> str:
    """Name of an audit's file beside its label set."""
    return f"{AUDIT_PREFIX}{shorten_digest(audit.digest)}.json"


def save_audit(audit: LabelAudit, store: Store) -> str:
    """Writes an audit beside its label set. Returns its key."""
    key = build_audit_key(audit)
    audit.save_file(store, key)
    return key


def load_audits(store: Store, label_set: LabelSet) -> list[LabelAudit]:
    """All audits beside a label set, by digest."""
    all_audits = [LabelAudit.load_file(store, key) for key in store.list(AUDIT_PREFIX) if key.endswith(".json")]
    return [audit for audit in all_audits if audit.label_set == label_set.digest]


def choose_deciding_audit(audits: Sequence[LabelAudit], selection: Selection | None) -> LabelAudit | None:
    """The audit that counts for a student: one of its selection before one of all labels, then the one of most images."""
    relevant = [audit for audit in audits if audit.selection is None or (selection and audit.selection == selection.digest)]
    return max(relevant, key=lambda audit: (audit.selection is not None, audit.reviewed, audit.digest), default=None)


def write_corrections(
    audit: LabelAudit, classes: tuple[str, ...], pool_store: Store, pool: Dataset, target: Store
) -> Dataset | None:
    """Writes the images whose right class was named as a labeled dataset, with a table of them. Returns None if there are none.

    The shard is named after the audit, so that those of several audits can lie in one folder. Raises DataError if the folder
    holds another dataset.
    """
    corrected = [mistake for mistake in audit.mistakes if mistake.correct_class is not None]
    if not corrected:
        return None
    class_ids = {name: number for number, name in enumerate(classes)}
    name = f"corrections-{shorten_digest(audit.digest)}"
    if target.exists(Dataset.filename) and Dataset.load(target).name != name:
        raise DataError(f"{target.uri}: holds another dataset; choose another folder with --corrections")
    sink = io.StringIO()
    table = csv.writer(sink, lineterminator="\n")
    table.writerow(["key", "label", "teacher", "confidence"])
    index: ShardIndex | None = None
    open_shard = -1
    with ShardWriter(target, max_samples=10_000, max_bytes=256 << 20, stem=name) as writer:
        for mistake in corrected:
            if index is None or open_shard != mistake.shard:
                open_shard, index = mistake.shard, ShardIndex.load(pool_store, pool.shards[mistake.shard])
            data = pool_store.get_range(
                pool.shards[mistake.shard].name, int(index.offsets[mistake.row]), int(index.sizes[mistake.row])
            )
            writer.add_image(
                mistake.key, index.table["extension"][mistake.row].as_py(), data, class_ids[str(mistake.correct_class)]
            )
            names = (mistake.key, str(mistake.correct_class), mistake.class_name)
            table.writerow([*map(escape_formula, names), f"{mistake.confidence:.4f}"])
    dataset = Dataset(name=name, role="labeled", classes=classes, shards=writer.shards)
    target.put(CORRECTIONS, sink.getvalue().encode())
    dataset.save(target)
    return dataset
