"""Selection: which pseudo-labeled images a student sees, and how often (arXiv:1911.04252 §2).

It is the paper's filter and balance, made exact and repeatable: of the images whose confidence is above the threshold, each class
keeps its `per_class` most confident ones; a class with fewer repeats them until it has as many. The outcome is a rule for each
class that gives the copies of any row; no image is ever copied.

Memory does not grow with the rows. A first pass counts confidences in narrow bins, which tell the bin of the last image kept of
each class; further passes count only inside those bins, in narrower ones, until the remaining images are few enough to be sorted.
Two passes suffice except for very many equal confidences.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ns.config.schema import SelectionConfig
from ns.core.digest import hash_text
from ns.core.errors import DataError
from ns.data.dataset import format_class_names
from ns.labeling.alignment import align_classes, align_rows, compute_alignment
from ns.labeling.label_set import (
    LabelRows,
    LabelSet,
    ShardScores,
    iter_label_rows,
    iter_shard_scores,
    iter_top_classes,
    read_label_rows,
)
from ns.labeling.thresholds import NEVER_SURE, Thresholds
from ns.storage import Store
from ns.storage.documents import HashedDocument, JsonDocument, dump_hashed_fields
from ns.storage.scratch import explain_scratch_errors, make_scratch_dir

MAX_SORTED_ROWS = 1 << 20
"""At most so many rows are sorted at the end; more are counted in narrower bins once more."""
MAX_COUNTERS = 1 << 20
"""Bins of all classes together at most: so few that counting into them stays within the processor's caches."""
PAPER_PER_CLASS = 130_000
"""Images per class in the paper (arXiv:1911.04252 §3.1)."""
MAX_SHARE_RATIO = 5
"""A class whose share of the candidates and of the labeled images differ by more than this factor is mentioned."""
UNLABELED, FOREIGN = np.float32(-1), np.float32(-2)
"""What stands in the scratch file for the confidence of an image without a label, and of one that is left out as foreign."""
HIGHEST_HASH = "f" * 16
"""Hash of a cut that takes all of its confidence."""
HIGHEST_BITS = int(np.float32(1).view(np.uint32)) + 16
"""Bits of the greatest confidence: a softmax in float32 may exceed 1 by a few units in the last place."""


class RankingCut(JsonDocument):
    """A position in a class's ranking: most confident first, equal confidences by ascending hash of the key."""

    confidence: float
    hash: str
    """16 hex digits; all f if the cut takes every image of this confidence."""


class ClassRule(JsonDocument):
    """The rule for the images that the teacher puts in one class."""

    candidates: int
    """Images above the confidence threshold."""
    low_confidence: int | None = None
    """Images of this class that are candidates of none; None in selections that were made before this was counted."""
    threshold: float
    fallback: bool = False
    """Whether there is no evidence of the wanted precision at any threshold, so that a share of all candidates is kept."""
    kept: int
    """Distinct images kept: the first in the ranking."""
    images: int
    """Images in an epoch: kept images with their repeats."""
    last_kept: RankingCut | None
    """Position of the last image kept; None if the class keeps none."""
    copies: int
    """Times that each kept image is seen in an epoch."""
    last_extra: RankingCut | None
    """Images up to this position are seen once more; None if there are none."""
    foreign: int = 0
    """Images that were left out as foreign, at any confidence. They are no candidates."""


class ImageChoice(JsonDocument):
    """The earlier selection that chose the images."""

    selection: str
    """Digest of the selection."""
    label_set: str
    """Digest of its label set, to whose rows the rules apply."""
    label_set_key: str
    """Key of that label set's folder below the root."""
    alignment: tuple[float, ...] | None
    """Its factors of alignment."""


class Selection(HashedDocument):
    filename: ClassVar[str] = "selection.json"

    format: Literal[1] = 1
    policy: SelectionConfig
    seed: int
    label_set: str
    """Digest of the label set."""
    label_set_key: str
    """Key of the label set's folder below the root."""
    rules: tuple[ClassRule, ...]
    """One rule per class, by class index."""
    low_confidence: int
    """Images at or below the threshold."""
    unreadable: int
    left_out: int = 0
    """Images that were not labeled, as in `LabelShard.left_out`."""
    thresholds: Thresholds | None = None
    """Thresholds for a wanted precision; None if the policy asks for none."""
    per_class: int | None = None
    """Images per class that the selection was balanced to; None if it was not balanced."""
    labeled_images: tuple[int, ...] | None = None
    """Labeled images of each class, which its share of the candidates is compared with; None if they are not known."""
    alignment: tuple[float, ...] | None = None
    """Factor of each class, by which probabilities are multiplied before they are renormalized; None if they stay as they are."""
    mean_confidence: float | None = None
    """Mean confidence over the images of an epoch, with repeats: an image's weight is its confidence divided by this. None: no weights."""
    choice: ImageChoice | None = None
    """The selection that chose the images, and whose rules these are; None if this one chose them by its own label set."""
    foreign_limit: float | None = None
    """Images with a foreign score above it are left out; None if the label set has no such scores."""

    def hashed_fields(self) -> Any:
        return dump_hashed_fields(self, exclude={"label_set_key": True, "choice": {"label_set_key": True}})

    @property
    def kept(self) -> int:
        return sum(rule.kept for rule in self.rules)

    @property
    def foreign(self) -> int:
        """Images that were left out as foreign."""
        return sum(rule.foreign for rule in self.rules)

    @property
    def images(self) -> int:
        return sum(rule.images for rule in self.rules)

    @property
    def empty_classes(self) -> list[int]:
        """Classes without pseudo-labels."""
        return [class_id for class_id, rule in enumerate(self.rules) if rule.kept == 0]

    @property
    def distorted_classes(self) -> dict[int, tuple[float, float]]:
        """Classes with pseudo-labels whose share of the candidates differs from their share of the labeled images by more than
        MAX_SHARE_RATIO; with both shares, in 0–1."""
        if self.labeled_images is None:
            return {}
        candidates, labeled = (
            np.array(counts, np.float64) for counts in ([rule.candidates for rule in self.rules], self.labeled_images)
        )
        shares, priors = candidates / max(1.0, candidates.sum()), labeled / max(1.0, labeled.sum())
        is_distorted = (candidates > 0) & (
            (shares * MAX_SHARE_RATIO < priors) | ((shares > priors * MAX_SHARE_RATIO) & (priors > 0))
        )
        return {int(class_id): (float(shares[class_id]), float(priors[class_id])) for class_id in np.flatnonzero(is_distorted)}

    @property
    def represented_share(self) -> float:
        """Share of the classes, 0–1, that have pseudo-labels, and not less than a fifth of their share of the labeled images."""
        scarce = [class_id for class_id, (share, prior) in self.distorted_classes.items() if share < prior]
        # Not as 1 minus the others' share: 2 of 10 must be the number that 0.2 is, to reach a limit of 0.2.
        return (len(self.rules) - len(self.empty_classes) - len(scarce)) / len(self.rules)

    def describe_classes(self, classes: Sequence[str]) -> list[str]:
        """What a person should know of single classes, one sentence per kind; empty if there is nothing."""
        fallback = [class_id for class_id, rule in enumerate(self.rules) if rule.fallback and rule.kept]
        scarce, plentiful = (
            [class_id for class_id, (share, prior) in self.distorted_classes.items() if (share < prior) == is_scarce]
            for is_scarce in (True, False)
        )
        return [
            f"{len(class_ids):,} of {len(classes):,} classes {what}: {format_class_names([classes[class_id] for class_id in class_ids])}"
            for class_ids, what in (
                (self.empty_classes, "have no pseudo-labels"),
                (fallback, f"have no evidence of the precision, and keep {self.policy.fallback_share:.0%} of their candidates"),
                (scarce, f"have less than 1/{MAX_SHARE_RATIO} of their share of the labeled images"),
                (plentiful, f"have more than {MAX_SHARE_RATIO} times their share of the labeled images"),
            )
            if class_ids
        ]

    @property
    def unproven(self) -> int:
        """Images above the threshold of classes without evidence of the precision, but for the share that these keep."""
        return sum(self.count_unproven(rule) for rule in self.rules)

    def count_unproven(self, rule: ClassRule) -> int:
        """As `unproven`, for one class."""
        return rule.candidates - math.ceil(self.policy.fallback_share * rule.candidates) if rule.fallback else 0

    @property
    def balanced_out(self) -> int:
        """Other images above the threshold that were not among the most confident of their class."""
        return sum(rule.candidates - rule.kept for rule in self.rules) - self.unproven


def hash_keys(keys: Sequence[str], seed: int) -> npt.NDArray[np.uint64]:
    """uint64 [N]: breaks ties between equal confidences, differently for each seed."""
    salt = seed.to_bytes(8, "little")
    return np.fromiter((hash_text(key, size=8, key=salt) for key in keys), np.uint64, len(keys))


def select_pseudo_labels(
    read_scores: Callable[[], Iterable[ShardScores]],
    num_classes: int,
    policy: SelectionConfig,
    *,
    seed: int,
    label_set: str,
    label_set_key: str,
    unreadable: int = 0,
    left_out: int = 0,
    thresholds: Thresholds | None = None,
    labeled_images: tuple[int, ...] | None = None,
    alignment: tuple[float, ...] | None = None,
    foreign_limit: float | None = None,
) -> Selection:
    """Makes the rule of each class from the scores of a label set.

    Each call of `read_scores` yields all shards once; it is called a few times. `unreadable`, `left_out`: rows without a label.
    `labeled_images`: labeled images of each class, if they are known. `alignment`: the factors that the scores were aligned with.
    """
    class_thresholds = np.full(num_classes, policy.min_confidence, np.float32)
    if policy.policy == "adaptive":
        class_thresholds = np.maximum(
            class_thresholds, policy.adaptive_scale * _measure_confidence(read_scores(), class_thresholds)
        )
    is_fallback = np.zeros(num_classes, np.bool_)
    if thresholds is not None:
        lowest = np.array([class_threshold.threshold for class_threshold in thresholds.classes], np.float32)
        is_fallback = (lowest == NEVER_SURE) & (policy.fallback_share > 0)
        class_thresholds = np.where(is_fallback, class_thresholds, np.maximum(class_thresholds, lowest))
    ranking = _Ranking(read_scores, class_thresholds, seed)
    eligible = np.where(is_fallback, np.ceil(policy.fallback_share * ranking.candidates), ranking.candidates).astype(np.int64)
    per_class = _choose_class_size(eligible, policy)
    sizes = [_plan_copies(count, per_class, policy) for count in eligible.tolist()]
    last, last_extras = ranking.find_cuts(
        [
            {class_id: kept - 1 for class_id, (kept, _, _) in enumerate(sizes) if kept},
            {class_id: extra - 1 for class_id, (_, _, extra) in enumerate(sizes) if extra},
        ]
    )
    rules = tuple(
        ClassRule(
            candidates=int(ranking.candidates[class_id]),
            low_confidence=int(ranking.low[class_id]),
            threshold=float(class_thresholds[class_id]),
            fallback=bool(is_fallback[class_id]),
            kept=kept,
            images=kept * times + extra,
            last_kept=last.get(class_id),
            copies=times,
            last_extra=last_extras.get(class_id),
            foreign=int(ranking.foreign[class_id]),
        )
        for class_id, (kept, times, extra) in enumerate(sizes)
    )
    mean_confidence = None
    if policy.weights == "confidence":
        mean_confidence = _average_confidence(
            (scores.confidence[:, 0], _count_score_copies(rules, scores, seed)) for scores in read_scores()
        )
    return Selection(
        policy=policy,
        seed=seed,
        label_set=label_set,
        label_set_key=label_set_key,
        rules=rules,
        low_confidence=int(ranking.low.sum()),
        unreadable=unreadable,
        left_out=left_out,
        thresholds=thresholds,
        per_class=per_class,
        labeled_images=labeled_images,
        alignment=alignment,
        mean_confidence=mean_confidence,
        foreign_limit=foreign_limit,
    )


def make_selection(
    store: Store,
    label_set: LabelSet,
    policy: SelectionConfig,
    *,
    seed: int,
    label_set_key: str,
    thresholds: Thresholds | None = None,
    labeled_images: tuple[int, ...] | None = None,
    foreign_limit: float | None = None,
) -> Selection:
    """As `select_pseudo_labels`, from a label set in `store`. Raises DataError if a shard is not what the manifest says."""
    alignment = _compute_policy_alignment(store, label_set, policy, foreign_limit)
    align = (lambda top_classes: align_classes(top_classes, alignment)) if alignment else None
    with make_scratch_dir("select") as scratch_dir:
        score_file = _ScoreFile(scratch_dir / "scores")
        return select_pseudo_labels(
            lambda: score_file.iter_scores(
                lambda: iter_shard_scores(store, label_set, policy.classes_per_image, align, foreign_limit)
            ),
            len(label_set.classes),
            policy,
            seed=seed,
            label_set=label_set.digest,
            label_set_key=label_set_key,
            unreadable=label_set.unreadable,
            left_out=label_set.left_out,
            thresholds=thresholds,
            labeled_images=labeled_images,
            alignment=alignment,
            foreign_limit=foreign_limit,
        )


def keep_selection(
    first: Selection, store: Store, label_set: LabelSet, policy: SelectionConfig, *, label_set_key: str
) -> Selection:
    """A selection of the images that `first` chose, as often, with the labels of another label set of the same dataset in `store`.

    Raises DataError as `CopyReader` does.
    """
    choice = first.choice or ImageChoice(
        selection=first.digest, label_set=first.label_set, label_set_key=first.label_set_key, alignment=first.alignment
    )
    # The limit is one of the first label set's scores.
    alignment = _compute_policy_alignment(store, label_set, policy, None)
    kept = first.model_copy(
        update={
            "policy": policy,
            "label_set": label_set.digest,
            "label_set_key": label_set_key,
            "alignment": alignment,
            "mean_confidence": None,
            "choice": choice,
        }
    )
    if policy.weights == "none":
        return kept
    copy_reader = CopyReader(store, kept)
    mean_confidence = _average_confidence(
        (align_rows(rows, alignment).confidence, copy_reader.count_shard_copies(shard, rows))
        for shard, rows in enumerate(iter_label_rows(store, label_set))
    )
    return kept.model_copy(update={"mean_confidence": mean_confidence})


def _compute_policy_alignment(
    store: Store, label_set: LabelSet, policy: SelectionConfig, foreign_limit: float | None
) -> tuple[float, ...] | None:
    if policy.policy != "aligned":
        return None
    shards = iter_top_classes(store, label_set, foreign_limit=foreign_limit)
    return compute_alignment(shards, len(label_set.classes), policy.alignment)


def _measure_confidence(shards: Iterable[ShardScores], thresholds: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """float32 [classes]: mean confidence of the images of each class above its threshold; 0 for a class without any."""
    totals, counts = np.zeros(len(thresholds)), np.zeros(len(thresholds))
    for scores in shards:
        for rank in range(scores.class_ids.shape[1]):
            class_ids, confidence = scores.class_ids[:, rank], scores.confidence[:, rank]
            is_candidate = scores.labeled & (confidence > thresholds[class_ids])
            totals += np.bincount(class_ids[is_candidate], confidence[is_candidate], len(thresholds))
            counts += np.bincount(class_ids[is_candidate], minlength=len(thresholds))
    return (totals / np.maximum(1, counts)).astype(np.float32)


def _average_confidence(shards: Iterable[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]]) -> float:
    """Mean confidence of images that are seen `copies` times each: pairs of confidence [N] and copies [N]."""
    total, images = 0.0, 0
    for confidence, copies in shards:
        seen = copies > 0
        total += float(confidence[seen].astype(np.float64) @ copies[seen])
        images += int(copies.sum())
    return total / max(1, images)


class _ScoreFile:
    """Scores in a file, six bytes per image and class: unpacking Parquet's lists takes ten times as long as reading them back."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._shards: list[tuple[int, int, Callable[[npt.NDArray[np.int64]], list[str]]]] = []
        self._is_written = False

    def iter_scores(self, make_shards: Callable[[], Iterable[ShardScores]]) -> Iterator[ShardScores]:
        """The scores of all shards: the first time from `make_shards`, which is kept, and then from the file."""
        return self._read_scores() if self._is_written else self._write_scores(make_shards())

    def _write_scores(self, shards: Iterable[ShardScores]) -> Iterator[ShardScores]:
        with explain_scratch_errors(self._path, "keep scores"), self._path.open("wb") as file:
            for scores in shards:
                # No probability is negative.
                missing = np.where(False if scores.foreign is None else scores.foreign, FOREIGN, UNLABELED)
                file.write(np.where(scores.labeled[:, None], scores.confidence, missing[..., None]).tobytes())
                file.write(np.ascontiguousarray(scores.class_ids).tobytes())
                self._shards.append((*scores.class_ids.shape, scores.read_keys))
                yield scores
        self._is_written = True

    def _read_scores(self) -> Iterator[ShardScores]:
        with self._path.open("rb") as file:
            for rows, top_k, read_keys in self._shards:
                confidence = np.fromfile(file, np.float32, rows * top_k).reshape(rows, top_k)
                class_ids = np.fromfile(file, np.uint16, rows * top_k).reshape(rows, top_k)
                yield ShardScores(confidence[:, 0] >= 0, class_ids, confidence, read_keys, confidence[:, 0] == FOREIGN)


def _choose_class_size(eligible: npt.NDArray[np.int64], policy: SelectionConfig) -> int | None:
    """Images per class after balancing; None without balancing. `eligible`: int64 [classes], images that each class may keep.

    The mean of the classes is at most the size of the largest one, so that one is seen once: nothing is repeated in all classes.
    """
    if policy.policy == "all":
        return None
    if policy.per_class != "auto":
        return policy.per_class
    mean = math.ceil(int(eligible.sum()) / max(1, int(np.count_nonzero(eligible))))
    return min(PAPER_PER_CLASS, max(1, mean))


def _plan_copies(eligible: int, per_class: int | None, policy: SelectionConfig) -> tuple[int, int, int]:
    """For one class: images kept, how often each is seen, and how many are seen once more."""
    if eligible == 0:
        return 0, 0, 0
    if per_class is None:
        return eligible, 1, 0
    kept = min(eligible, per_class)
    times, extra = divmod(per_class, kept) if policy.repeat else (1, 0)
    return (kept, policy.max_repeat, 0) if times >= policy.max_repeat else (kept, times, extra)


class _RankRange(NamedTuple):
    """Part of a class's ranking. Depth counts bits of confidence downwards from HIGHEST_BITS."""

    question: int
    """Index of the question that the range answers."""
    class_id: int
    rank: int
    """The rank searched for, from 0."""
    before: int
    """Images that rank before the range."""
    inside: int
    """Images in the range."""
    low: int
    """Least depth in the range."""


class _Ranking:
    """The candidates of each class, most confident first. It finds the image at any rank without holding the ranking in memory."""

    def __init__(
        self, read_scores: Callable[[], Iterable[ShardScores]], thresholds: npt.NDArray[np.float32], seed: int
    ) -> None:
        self._read_scores = read_scores
        self._thresholds = thresholds
        self._seed = seed
        num_classes = len(thresholds)
        deepest = HIGHEST_BITS - int(thresholds.min().view(np.uint32))
        self._bits = _bits_per_group(num_classes)
        self._shift = max(0, deepest.bit_length() - self._bits)
        counts = _BinCounter(num_classes, self._bits)
        self.low = np.zeros(num_classes, np.int64)
        """Images that are candidates of no class, by the class that the teacher puts them in, int64 [classes]."""
        self.foreign = np.zeros(num_classes, np.int64)
        """Foreign images by the class that the teacher puts them in, int64 [classes]."""
        for scores in read_scores():
            if scores.foreign is not None:
                self.foreign += np.bincount(scores.class_ids[scores.foreign, 0], minlength=num_classes)
            is_candidate = np.zeros(len(scores.labeled), np.bool_)
            for rows, class_ids, depth in self._iter_candidates(scores):
                is_candidate[rows] = True
                counts.add_pairs(class_ids, depth >> self._shift)
            self.low += np.bincount(scores.class_ids[scores.labeled & ~is_candidate, 0], minlength=num_classes)
        self._counts = counts.count_all()
        self.candidates: npt.NDArray[np.int64] = self._counts.sum(1)

    def find_cuts(self, questions: Sequence[Mapping[int, int]]) -> list[dict[int, RankingCut]]:
        """For each question, a class → rank below the class's candidates, returns class → position of the image at that rank."""
        ranges = [
            self._locate_bin(question, class_id, rank, 0, self._counts[class_id], 0, self._shift)
            for question, ranks in enumerate(questions)
            for class_id, rank in ranks.items()
        ]
        shift = self._shift
        while shift and sum(range_.inside for range_ in ranges) > MAX_SORTED_ROWS:
            ranges, shift = self._narrow_ranges(ranges, shift)
        return self._cut_sorted_ranges(ranges, shift, len(questions))

    def _iter_candidates(
        self, scores: ShardScores
    ) -> Iterable[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint16], npt.NDArray[np.int64]]]:
        """For each of an image's best classes in turn: rows, class, and depth of confidence."""
        for rank in range(scores.class_ids.shape[1]):
            class_ids, confidence = scores.class_ids[:, rank], scores.confidence[:, rank]
            rows = np.flatnonzero(scores.labeled & (confidence > self._thresholds[class_ids]))
            # Positive floats order like their bits.
            yield rows, class_ids[rows], np.maximum(0, HIGHEST_BITS - confidence[rows].view(np.uint32).astype(np.int64))

    @staticmethod
    def _locate_bin(
        question: int, class_id: int, rank: int, before: int, counts: npt.NDArray[np.int64], low: int, shift: int
    ) -> _RankRange:
        """The bin that holds the image at a rank."""
        ends = before + counts.cumsum()
        bin_ = int(np.searchsorted(ends, rank, "right"))
        inside = int(counts[bin_])
        return _RankRange(question, class_id, rank, int(ends[bin_]) - inside, inside, low + (bin_ << shift))

    def _iter_inside(
        self, ranges: Sequence[_RankRange], shift: int
    ) -> Iterable[tuple[ShardScores, npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Scores, rows, number of the range, and depth below its beginning, of all that lies in a range; shard by shard."""
        num_questions = 1 + max((range_.question for range_ in ranges), default=-1)
        range_of_class = np.full((num_questions, len(self._thresholds)), -1, np.int64)
        # Where there is no range, no depth reaches it.
        low = np.full_like(range_of_class, 1 << 40)
        for index, range_ in enumerate(ranges):
            range_of_class[range_.question, range_.class_id], low[range_.question, range_.class_id] = index, range_.low
        for scores in self._read_scores():
            for rows, class_ids, depth in self._iter_candidates(scores):
                for question in range(num_questions):
                    below = depth - low[question][class_ids]
                    inside = np.flatnonzero((below >= 0) & (below < 1 << shift))
                    yield scores, rows[inside], range_of_class[question][class_ids[inside]], below[inside]

    def _narrow_ranges(self, ranges: Sequence[_RankRange], shift: int) -> tuple[list[_RankRange], int]:
        bits = min(shift, _bits_per_group(len(ranges)))
        shift -= bits
        counts = _BinCounter(len(ranges), bits)
        for _, _, number, below in self._iter_inside(ranges, shift + bits):
            counts.add_pairs(number, below >> shift)
        return [
            self._locate_bin(range_.question, range_.class_id, range_.rank, range_.before, range_counts, range_.low, shift)
            for range_, range_counts in zip(ranges, counts.count_all(), strict=True)
        ], shift

    def _cut_sorted_ranges(self, ranges: Sequence[_RankRange], shift: int, num_questions: int) -> list[dict[int, RankingCut]]:
        """Sorts the confidences that lie in the ranges; keys are only read, and hashed, where a cut goes through equal ones."""
        if not ranges:
            return [{} for _ in range(num_questions)]
        depths: list[npt.NDArray[np.int64]] = [np.zeros(0, np.int64)] * len(ranges)
        if shift:
            gathered = [np.stack((number, below)) for _, _, number, below in self._iter_inside(ranges, shift)]
            numbers, belows = np.concatenate(gathered, axis=1)
            order = np.lexsort((belows, numbers))
            depths = np.split(belows[order], np.searchsorted(numbers[order], np.arange(1, len(ranges))))
        cuts: list[dict[int, RankingCut]] = [{} for _ in range(num_questions)]
        tied_ranges = []
        for range_, range_depths in zip(ranges, depths, strict=True):
            within = range_.rank - range_.before
            # A range of one depth holds nothing but equal confidences.
            depth = int(range_depths[within]) if shift else 0
            first, last = (
                (int(np.searchsorted(range_depths, depth, side)) for side in ("left", "right")) if shift else (0, range_.inside)
            )
            cuts[range_.question][range_.class_id] = RankingCut(
                confidence=self._depth_to_confidence(range_.low + depth), hash=HIGHEST_HASH
            )
            if within + 1 < last:
                tied_ranges.append(range_._replace(low=range_.low + depth, before=range_.before + first, inside=last - first))
        for range_, tie in zip(tied_ranges, self._find_tie_hashes(tied_ranges), strict=True):
            cuts[range_.question][range_.class_id] = RankingCut(
                confidence=self._depth_to_confidence(range_.low), hash=f"{tie:016x}"
            )
        return cuts

    @staticmethod
    def _depth_to_confidence(depth: int) -> float:
        return float(np.array(HIGHEST_BITS - depth, np.uint32).view(np.float32))

    def _find_tie_hashes(self, ranges: Sequence[_RankRange]) -> list[int]:
        """For each range of equal confidences, the hash of the key at the rank."""
        if not ranges:
            return []
        heaps = [_LeastHashes(range_.rank - range_.before + 1) for range_ in ranges]
        for scores, rows, number, _ in self._iter_inside(ranges, 0):
            if len(rows) == 0:
                continue
            hashes = hash_keys(scores.read_keys(rows), self._seed)
            order = np.argsort(number, kind="stable")
            indices, starts = np.unique(number[order], return_index=True)
            for index, positions in zip(indices.tolist(), np.split(order, starts[1:]), strict=True):
                heaps[index].add_hashes(hashes[positions])
        return [heap.find_last() for heap in heaps]


class _LeastHashes:
    """The `size` least hashes."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: list[npt.NDArray[np.uint64]] = []
        self._held = 0

    def add_hashes(self, hashes: npt.NDArray[np.uint64]) -> None:
        self._kept.append(hashes)
        self._held += len(hashes)
        if self._held > 2 * self._size + 1000:
            self._trim_hashes()

    def find_last(self) -> int:
        self._trim_hashes()
        return int(self._kept[0][-1])

    def _trim_hashes(self) -> None:
        self._kept = [np.sort(np.concatenate(self._kept))[: self._size]]
        self._held = len(self._kept[0])


class _BinCounter:
    """Counts of (group, bin) pairs. Pairs are gathered before they are counted: going through all bins for the rows of one shard
    would take longer than reading it."""

    def __init__(self, num_groups: int, bits: int) -> None:
        self._bits = bits
        self._counts = np.zeros(num_groups << bits, np.int64)
        self._waiting: list[npt.NDArray[np.int64]] = []
        self._rows = 0

    def add_pairs(self, groups: npt.NDArray[np.integer], bins: npt.NDArray[np.int64]) -> None:
        self._waiting.append((groups.astype(np.int64) << self._bits) + bins)
        self._rows += len(bins)
        if self._rows >= MAX_SORTED_ROWS:
            self._count_waiting()

    def count_all(self) -> npt.NDArray[np.int64]:
        """Counts [groups, bins]."""
        self._count_waiting()
        return self._counts.reshape(-1, 1 << self._bits)

    def _count_waiting(self) -> None:
        if self._waiting:
            self._counts += np.bincount(np.concatenate(self._waiting), minlength=len(self._counts))
            self._waiting, self._rows = [], 0


def _bits_per_group(num_groups: int) -> int:
    """log2 of the number of bins per group."""
    return min(16, (MAX_COUNTERS // max(1, num_groups)).bit_length() - 1)


def count_copies(selection: Selection, rows: LabelRows) -> npt.NDArray[np.int64]:
    """How often each row is seen in an epoch, int64 [N]; 0 for images that are not kept.

    `rows` are of the label set that chose the images; `CopyReader` finds them for a selection that kept the images of another.
    """
    alignment = selection.choice.alignment if selection.choice else selection.alignment
    scores = align_rows(rows, alignment).build_scores(selection.policy.classes_per_image, selection.foreign_limit)
    return _count_score_copies(selection.rules, scores, selection.seed)


class CopyReader:
    """Counts how often each row of a label set is seen, also where the labels of another label set chose the images.

    Raises DataError if that one is not where it was, relative to `label_store`, or has changed.
    """

    def __init__(self, label_store: Store, selection: Selection) -> None:
        self._selection = selection
        self._choosing: tuple[Store, LabelSet] | None = None
        if choice := selection.choice:
            if not label_store.uri.endswith(f"/{selection.label_set_key}"):
                raise DataError(
                    f"{label_store.uri}: its images were chosen by the labels in {choice.label_set_key}, which are not beside it; "
                    "name the label set as a run's generation: latest/gen-2"
                )
            choosing_store = label_store.at(label_store.uri.removesuffix(selection.label_set_key) + choice.label_set_key)
            choosing = LabelSet.load(choosing_store)
            if choosing.digest != choice.label_set:
                raise DataError(f"{choosing_store.uri}: is not the label set that chose the images, {choice.label_set}")
            self._choosing = choosing_store, choosing

    def count_shard_copies(self, shard: int, rows: LabelRows) -> npt.NDArray[np.int64]:
        """int64 [N]: copies of the rows of a shard of the label set; 0 for images without a label."""
        if self._choosing is None:
            return count_copies(self._selection, rows)
        choosing_store, choosing = self._choosing
        copies = count_copies(self._selection, read_label_rows(choosing_store, choosing.shards[shard]))
        return np.where(rows.readable, copies, 0)


def _count_score_copies(rules: Sequence[ClassRule], scores: ShardScores, seed: int) -> npt.NDArray[np.int64]:
    repeats = np.zeros(len(scores.labeled), np.int64)
    thresholds = np.array([rule.threshold for rule in rules], np.float32)
    times = np.array([rule.copies for rule in rules], np.int64)
    for rank in range(scores.class_ids.shape[1]):
        class_ids, confidence = scores.class_ids[:, rank], scores.confidence[:, rank]
        candidate = scores.labeled & (confidence > thresholds[class_ids])
        is_kept = candidate & _ranks_up_to([rule.last_kept for rule in rules], scores, rank, seed)
        is_extra = is_kept & _ranks_up_to([rule.last_extra for rule in rules], scores, rank, seed)
        repeats[is_kept] += times[class_ids[is_kept]]
        repeats[is_extra] += 1
    return repeats


def _ranks_up_to(cuts: Sequence[RankingCut | None], scores: ShardScores, rank: int, seed: int) -> npt.NDArray[np.bool_]:
    """Whether each row ranks at or before the cut of its class. Only rows that tie with it need their key's hash."""
    class_ids, confidence = scores.class_ids[:, rank], scores.confidence[:, rank]
    # float32 → JSON double → float32 is exact, so the comparison with equality is.
    last = np.array([np.inf if cut is None else cut.confidence for cut in cuts], np.float32)[class_ids]
    mask: npt.NDArray[np.bool_] = scores.labeled & (confidence > last)
    ties = np.flatnonzero(scores.labeled & (confidence == last))
    if len(ties):
        bound = np.array([0 if cut is None else int(cut.hash, 16) for cut in cuts], np.uint64)[class_ids[ties]]
        mask[ties] = hash_keys(scores.read_keys(ties), seed) <= bound
    return mask
