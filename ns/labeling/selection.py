"""Selection: which pseudo-labelled images a student sees, and how often (paper §3; `noisy_student.md` §2).

The paper's filter and balance, made exact and repeatable: of the images whose confidence is above the threshold, each class
keeps its `per_class` most confident; a class with fewer repeats them until it has as many. The outcome is a rule for each
class, from which the copies of any row follow; no image is ever copied.

Memory does not grow with the rows. A first pass counts confidences in narrow bins, from which follows in which bin the last
image kept of each class lies; further passes count only inside those bins, in narrower ones, until so few images are left that
they can be sorted. Two passes do for all but heaps of equal confidences.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ns.config.schema import SelectionConfig
from ns.data.scratch import scratch, writing
from ns.labeling.label_set import LabelSet, Rows, Scores, all_scores
from ns.labeling.thresholds import Calibration
from ns.storage import Store
from ns.storage.documents import Document, Identified

MANIFEST = "selection.json"

SORTED_ROWS = 1 << 20
"""So many rows at most are sorted at the end; more are counted in narrower bins once more."""
COUNTERS = 1 << 22
"""Bins of all classes together."""
EVERY = "f" * 16
"""Hash of a cut that takes all of its confidence."""
HIGHEST = int(np.float32(1).view(np.uint32)) + 16
"""Bits of the greatest confidence: a softmax in float32 may exceed 1 by a few units in the last place."""


class Cut(Document):
    """A place in a class's ranking: most confident first, equal confidences by ascending hash of the key."""

    confidence: float
    hash: str
    """16 hex digits; all f where no confidence is equal to that of the last one, or all equal ones are taken."""


class ClassRule(Document):
    """What a selection does with the images that the teacher puts in one class."""

    candidates: int
    """Images above the confidence threshold."""
    threshold: float
    kept: int
    """Distinct images kept: the first in the ranking."""
    images: int
    """Images in an epoch: kept ones with their repeats."""
    last: Cut | None
    """The last one kept; None if the class has none."""
    copies: int
    """Times that each kept image is seen in an epoch."""
    last_extra: Cut | None
    """Images up to here in the ranking are seen once more; None if there are none."""


class Selection(Identified):
    format: Literal[1] = 1
    policy: SelectionConfig
    seed: int
    label_set: str
    """Digest."""
    labels: str
    """Key of the label set's folder below the root."""
    rules: tuple[ClassRule, ...]
    """By class index."""
    low_confidence: int
    """Images at or below the threshold."""
    unreadable: int
    left_out: int = 0
    """Images that were not labelled, as `LabelShard.left_out`."""
    calibration: Calibration | None = None
    """Where the thresholds of a wanted precision come from."""

    def identity(self) -> Any:
        return self.model_dump(mode="json", exclude={"labels"})

    @property
    def kept(self) -> int:
        return sum(rule.kept for rule in self.rules)

    @property
    def images(self) -> int:
        return sum(rule.images for rule in self.rules)

    @property
    def balanced_out(self) -> int:
        """Images above the threshold that were not among the most confident of their class."""
        return sum(rule.candidates - rule.kept for rule in self.rules)


def key_hashes(keys: Sequence[str], seed: int) -> npt.NDArray[np.uint64]:
    """uint64 [N]: breaks ties between equal confidences, differently for each seed."""
    salt = seed.to_bytes(8, "little")
    return np.fromiter(
        (int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8, key=salt).digest()) for key in keys),
        np.uint64,
        len(keys),
    )


def select(
    read: Callable[[], Iterable[Scores]],
    classes: int,
    policy: SelectionConfig,
    *,
    seed: int,
    label_set: str,
    labels: str,
    unreadable: int = 0,
    left_out: int = 0,
    calibration: Calibration | None = None,
) -> Selection:
    """Makes the rule of each class from the scores of a label set.

    `read` goes through all shards once, and is called a few times. `unreadable`, `left_out`: rows without a label.
    """
    thresholds = np.full(classes, policy.min_confidence, np.float32)
    if calibration is not None:
        thresholds = np.maximum(thresholds, np.array([one.threshold for one in calibration.classes], np.float32))
    ranking = _Ranking(read, thresholds, seed)
    sizes = [_sizes(count, policy) for count in ranking.candidates.tolist()]
    last, extras = ranking.at(
        [
            {label: kept - 1 for label, (kept, _, _) in enumerate(sizes) if kept},
            {label: extra - 1 for label, (_, _, extra) in enumerate(sizes) if extra},
        ]
    )
    return Selection(
        policy=policy,
        seed=seed,
        label_set=label_set,
        labels=labels,
        rules=tuple(
            ClassRule(
                candidates=int(ranking.candidates[label]),
                threshold=float(thresholds[label]),
                kept=kept,
                images=kept * times + extra,
                last=last.get(label),
                copies=times,
                last_extra=extras.get(label),
            )
            for label, (kept, times, extra) in enumerate(sizes)
        ),
        low_confidence=ranking.low,
        unreadable=unreadable,
        left_out=left_out,
        calibration=calibration,
    )


def select_from(
    folder: Store,
    label_set: LabelSet,
    policy: SelectionConfig,
    *,
    seed: int,
    labels: str,
    calibration: Calibration | None = None,
) -> Selection:
    """As `select`, from a label set in `folder`. Raises DataError if a shard is not what the manifest says."""
    with scratch("select") as place:
        kept = _Kept(place / "scores")
        return select(
            lambda: kept.read() if kept.written else kept.write(all_scores(folder, label_set, policy.classes_per_image)),
            len(label_set.classes),
            policy,
            seed=seed,
            label_set=label_set.digest,
            labels=labels,
            unreadable=label_set.unreadable,
            left_out=label_set.left_out,
            calibration=calibration,
        )


class _Kept:
    """Scores in a file, six bytes an image and class: unpacking Parquet's lists takes ten times as long as reading that back."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._shards: list[tuple[int, int, Callable[[npt.NDArray[np.int64]], list[str]]]] = []
        self.written = False

    def write(self, shards: Iterable[Scores]) -> Iterator[Scores]:
        with writing(self._file, "keep scores"), self._file.open("wb") as file:
            for scores in shards:
                # No probability is negative, so that one can stand for no label.
                file.write(np.where(scores.labelled[:, None], scores.confidence, np.float32(-1)).tobytes())
                file.write(np.ascontiguousarray(scores.classes).tobytes())
                self._shards.append((*scores.classes.shape, scores.keys))
                yield scores
        self.written = True

    def read(self) -> Iterator[Scores]:
        with self._file.open("rb") as file:
            for rows, ranks, keys in self._shards:
                confidence = np.fromfile(file, np.float32, rows * ranks).reshape(rows, ranks)
                classes = np.fromfile(file, np.uint16, rows * ranks).reshape(rows, ranks)
                yield Scores(confidence[:, 0] >= 0, classes, confidence, keys)


def _sizes(candidates: int, policy: SelectionConfig) -> tuple[int, int, int]:
    """Of a class: images kept, how often each is seen, and how many are seen once more."""
    if candidates == 0:
        return 0, 0, 0
    if policy.policy == "all":
        return candidates, 1, 0
    kept = min(candidates, policy.per_class)
    times, extra = divmod(policy.per_class, kept) if policy.repeat else (1, 0)
    return (kept, policy.max_repeat, 0) if times >= policy.max_repeat else (kept, times, extra)


class _Range(NamedTuple):
    """Part of a class's ranking: `depth` counts bits of confidence downwards from HIGHEST."""

    which: int
    """Of the questions asked together."""
    label: int
    rank: int
    """Searched for, counted from 0."""
    before: int
    """Images that rank before the range."""
    inside: int
    low: int
    """Least depth in the range."""


class _Ranking:
    """The candidates of each class, most confident first, of which any place can be asked for; none of it is in memory."""

    def __init__(self, read: Callable[[], Iterable[Scores]], thresholds: npt.NDArray[np.float32], seed: int) -> None:
        self._read = read
        self._thresholds = thresholds
        self._seed = seed
        classes = len(thresholds)
        deepest = HIGHEST - int(thresholds.min().view(np.uint32))
        self._bits = _bins(classes)
        self._shift = max(0, deepest.bit_length() - self._bits)
        counts = _Counts(classes, self._bits)
        self.low = 0
        """Images that are a candidate of no class."""
        for scores in read():
            found = np.zeros(len(scores.labelled), np.bool_)
            for rows, label, depth in self._candidates(scores):
                found[rows] = True
                counts.add(label, depth >> self._shift)
            self.low += int((scores.labelled & ~found).sum())
        self._counts = counts.whole()
        self.candidates: npt.NDArray[np.int64] = self._counts.sum(1)

    def at(self, places: Sequence[Mapping[int, int]]) -> list[dict[int, Cut]]:
        """For each question, class → what is at a rank of it. Takes class → rank, ranks below the class's candidates."""
        ranges = [
            self._within(which, label, rank, 0, self._counts[label], 0, self._shift)
            for which, asked in enumerate(places)
            for label, rank in asked.items()
        ]
        shift = self._shift
        while shift and sum(one.inside for one in ranges) > SORTED_ROWS:
            ranges, shift = self._narrowed(ranges, shift)
        return self._sorted(ranges, shift, len(places))

    def _candidates(
        self, scores: Scores
    ) -> Iterable[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint16], npt.NDArray[np.int64]]]:
        """For each rank of classes: rows, class, and depth of confidence."""
        for rank in range(scores.classes.shape[1]):
            label, confidence = scores.classes[:, rank], scores.confidence[:, rank]
            rows = np.flatnonzero(scores.labelled & (confidence > self._thresholds[label]))
            # Positive floats order like their bits.
            yield rows, label[rows], np.maximum(0, HIGHEST - confidence[rows].view(np.uint32).astype(np.int64))

    @staticmethod
    def _within(which: int, label: int, rank: int, before: int, counts: npt.NDArray[np.int64], low: int, shift: int) -> _Range:
        """The bin that holds the image of a rank."""
        ends = before + counts.cumsum()
        bin_ = int(np.searchsorted(ends, rank, "right"))
        inside = int(counts[bin_])
        return _Range(which, label, rank, int(ends[bin_]) - inside, inside, low + (bin_ << shift))

    def _inside(
        self, ranges: Sequence[_Range], shift: int
    ) -> Iterable[tuple[Scores, npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Scores, rows, number of the range, and depth below its beginning, of all that lies in a range; shard by shard."""
        questions = 1 + max((one.which for one in ranges), default=-1)
        number = np.full((questions, len(self._thresholds)), -1, np.int64)
        # No depth is below where there is no range.
        low = np.full_like(number, 1 << 40)
        for index, one in enumerate(ranges):
            number[one.which, one.label], low[one.which, one.label] = index, one.low
        for scores in self._read():
            for rows, label, depth in self._candidates(scores):
                for which in range(questions):
                    below = depth - low[which][label]
                    inside = np.flatnonzero((below >= 0) & (below < 1 << shift))
                    yield scores, rows[inside], number[which][label[inside]], below[inside]

    def _narrowed(self, ranges: Sequence[_Range], shift: int) -> tuple[list[_Range], int]:
        bits = min(shift, _bins(len(ranges)))
        shift -= bits
        counts = _Counts(len(ranges), bits)
        for _, _, number, below in self._inside(ranges, shift + bits):
            counts.add(number, below >> shift)
        return [
            self._within(one.which, one.label, one.rank, one.before, own, one.low, shift)
            for one, own in zip(ranges, counts.whole(), strict=True)
        ], shift

    def _sorted(self, ranges: Sequence[_Range], shift: int, questions: int) -> list[dict[int, Cut]]:
        """Sorts the confidences that lie in the ranges; keys are only read, and hashed, where a cut goes through equal ones."""
        if not ranges:
            return [{} for _ in range(questions)]
        depths: list[npt.NDArray[np.int64]] = [np.zeros(0, np.int64)] * len(ranges)
        if shift:
            gathered = [np.stack((number, below)) for _, _, number, below in self._inside(ranges, shift)]
            numbers, belows = np.concatenate(gathered, axis=1)
            order = np.lexsort((belows, numbers))
            depths = np.split(belows[order], np.searchsorted(numbers[order], np.arange(1, len(ranges))))
        found: list[dict[int, Cut]] = [{} for _ in range(questions)]
        split = []
        for one, own in zip(ranges, depths, strict=True):
            within = one.rank - one.before
            # A range of one depth holds nothing but equal confidences.
            depth = int(own[within]) if shift else 0
            first, last = (int(np.searchsorted(own, depth, side)) for side in ("left", "right")) if shift else (0, one.inside)
            found[one.which][one.label] = Cut(confidence=self._confidence(one.low + depth), hash=EVERY)
            if within + 1 < last:
                split.append(one._replace(low=one.low + depth, before=one.before + first, inside=last - first))
        for one, tie in zip(split, self._ties(split), strict=True):
            found[one.which][one.label] = Cut(confidence=self._confidence(one.low), hash=f"{tie:016x}")
        return found

    @staticmethod
    def _confidence(depth: int) -> float:
        return float(np.array(HIGHEST - depth, np.uint32).view(np.float32))

    def _ties(self, ranges: Sequence[_Range]) -> list[int]:
        """Of ranges of equal confidences, the hash of the key that is at the rank."""
        if not ranges:
            return []
        heaps = [_Heap(one.rank - one.before + 1) for one in ranges]
        for scores, rows, number, _ in self._inside(ranges, 0):
            if len(rows) == 0:
                continue
            hashes = key_hashes(scores.keys(rows), self._seed)
            order = np.argsort(number, kind="stable")
            indices, starts = np.unique(number[order], return_index=True)
            for index, own in zip(indices.tolist(), np.split(order, starts[1:]), strict=True):
                heaps[index].add(hashes[own])
        return [heap.last() for heap in heaps]


class _Heap:
    """The `size` least hashes."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: list[npt.NDArray[np.uint64]] = []
        self._held = 0

    def add(self, hashes: npt.NDArray[np.uint64]) -> None:
        self._kept.append(hashes)
        self._held += len(hashes)
        if self._held > 2 * self._size + 1000:
            self._cut()

    def last(self) -> int:
        self._cut()
        return int(self._kept[0][-1])

    def _cut(self) -> None:
        self._kept = [np.sort(np.concatenate(self._kept))[: self._size]]
        self._held = len(self._kept[0])


class _Counts:
    """Counts of (target, bin) pairs. They are gathered before they are counted: going through all bins for the rows of one shard
    would take longer than reading it."""

    def __init__(self, targets: int, bits: int) -> None:
        self._bits = bits
        self._counts = np.zeros(targets << bits, np.int64)
        self._waiting: list[npt.NDArray[np.int64]] = []
        self._rows = 0

    def add(self, target: npt.NDArray[np.integer], bin_: npt.NDArray[np.int64]) -> None:
        self._waiting.append((target.astype(np.int64) << self._bits) + bin_)
        self._rows += len(bin_)
        if self._rows >= SORTED_ROWS:
            self._count()

    def whole(self) -> npt.NDArray[np.int64]:
        """[targets, bins]"""
        self._count()
        return self._counts.reshape(-1, 1 << self._bits)

    def _count(self) -> None:
        if self._waiting:
            self._counts += np.bincount(np.concatenate(self._waiting), minlength=len(self._counts))
            self._waiting, self._rows = [], 0


def _bins(targets: int) -> int:
    """log2 of the bins that each of so many may have."""
    return min(16, (COUNTERS // max(1, targets)).bit_length() - 1)


def copies(selection: Selection, rows: Rows) -> npt.NDArray[np.int64]:
    """int64 [N]: how often each row is seen in an epoch; 0 for images that are left out."""
    result = np.zeros(len(rows.keys), np.int64)
    scores = rows.scores(selection.policy.classes_per_image)
    rules = selection.rules
    thresholds = np.array([rule.threshold for rule in rules], np.float32)
    times = np.array([rule.copies for rule in rules], np.int64)
    for rank in range(scores.classes.shape[1]):
        label, confidence = scores.classes[:, rank], scores.confidence[:, rank]
        candidate = scores.labelled & (confidence > thresholds[label])
        kept = candidate & _up_to([rule.last for rule in rules], scores, rank, selection.seed)
        more = kept & _up_to([rule.last_extra for rule in rules], scores, rank, selection.seed)
        result[kept] += times[label[kept]]
        result[more] += 1
    return result


def _up_to(cuts: Sequence[Cut | None], scores: Scores, rank: int, seed: int) -> npt.NDArray[np.bool_]:
    """Which rows rank up to the cut of their class. Only those that tie with it need their key's hash."""
    label, confidence = scores.classes[:, rank], scores.confidence[:, rank]
    # float32 → JSON double → float32 is exact, so the comparison with equality is.
    last = np.array([np.inf if cut is None else cut.confidence for cut in cuts], np.float32)[label]
    up_to: npt.NDArray[np.bool_] = scores.labelled & (confidence > last)
    ties = np.flatnonzero(scores.labelled & (confidence == last))
    if len(ties):
        bound = np.array([0 if cut is None else int(cut.hash, 16) for cut in cuts], np.uint64)[label[ties]]
        up_to[ties] = key_hashes(scores.keys(ties), seed) <= bound
    return up_to
