"""Selection: which pseudo-labelled images a student sees, and how often (paper §3; `noisy_student.md` §2).

The paper's filter and balance, made exact and repeatable: of the images whose confidence is above the threshold, each class
keeps its `per_class` most confident; a class with fewer repeats them until it has as many. The outcome is a rule for each
class, from which the copies of any row follow; no image is ever copied.
"""

import hashlib
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ns.config import SelectionConfig
from ns.document import Document, Identified
from ns.label.labelset import Rows

MANIFEST = "selection.json"


class Cut(Document):
    """A place in a class's ranking: most confident first, equal confidences by ascending hash of the key."""

    confidence: float
    hash: str
    """16 hex digits."""


class ClassRule(Document):
    """What a selection does with the images that the teacher puts in one class."""

    candidates: int
    """Images above the confidence threshold."""
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
    """Images of the pool that are held out elsewhere."""

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
    shards: Iterable[Rows], classes: int, policy: SelectionConfig, *, seed: int, label_set: str, labels: str
) -> Selection:
    """Makes the rule of each class from all rows of a label set."""
    confidences, predicted, hashes = [], [], []
    low_confidence = unreadable = left_out = 0
    for rows in shards:
        readable = rows.readable
        above = readable & (rows.confidence > policy.min_confidence)
        left_out += int(rows.left_out.sum())
        unreadable += int((~readable & ~rows.left_out).sum())
        low_confidence += int((readable & ~above).sum())
        confidences.append(rows.confidence[above])
        predicted.append(rows.top_class[above, 0])
        hashes.append(key_hashes([key for key, keep in zip(rows.keys, above, strict=True) if keep], seed))
    confidence = np.concatenate(confidences) if confidences else np.zeros(0, np.float32)
    label = np.concatenate(predicted) if predicted else np.zeros(0, np.uint16)
    tie = np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)
    # Most confident first within each class; ties by hash.
    order = np.lexsort((tie, -confidence, label))
    bounds = np.searchsorted(label[order], np.arange(classes + 1))
    rules = tuple(
        _rule(confidence[order[start:stop]], tie[order[start:stop]], policy) for start, stop in pairwise(bounds.tolist())
    )
    return Selection(
        policy=policy,
        seed=seed,
        label_set=label_set,
        labels=labels,
        rules=rules,
        low_confidence=low_confidence,
        unreadable=unreadable,
        left_out=left_out,
    )


def _rule(confidence: npt.NDArray[np.float32], tie: npt.NDArray[np.uint64], policy: SelectionConfig) -> ClassRule:
    """The rule of one class from its candidates in ranking order."""
    candidates = len(confidence)
    if candidates == 0:
        return ClassRule(candidates=0, kept=0, images=0, last=None, copies=0, last_extra=None)

    def cut(rank: int) -> Cut:
        return Cut(confidence=float(confidence[rank]), hash=f"{tie[rank]:016x}")

    if policy.policy == "all":
        kept, copies, extra = candidates, 1, 0
    else:
        kept = min(candidates, policy.per_class)
        copies, extra = divmod(policy.per_class, kept) if policy.repeat else (1, 0)
        if copies >= policy.max_repeat:
            copies, extra = policy.max_repeat, 0
    return ClassRule(
        candidates=candidates,
        kept=kept,
        images=kept * copies + extra,
        last=cut(kept - 1),
        copies=copies,
        last_extra=cut(extra - 1) if extra else None,
    )


def copies(selection: Selection, rows: Rows) -> npt.NDArray[np.int64]:
    """int64 [N]: how often each row is seen in an epoch; 0 for images that are left out."""
    result = np.zeros(len(rows.keys), np.int64)
    candidate = rows.readable & (rows.confidence > selection.policy.min_confidence)
    predicted = rows.top_class[:, 0]
    hashes = np.zeros(len(rows.keys), np.uint64)
    indices = np.flatnonzero(candidate)
    hashes[indices] = key_hashes([rows.keys[index] for index in indices], selection.seed)
    for label in np.unique(predicted[candidate]):
        rule = selection.rules[label]
        of_class = candidate & (predicted == label)
        result[of_class & _up_to(rule.last, rows.confidence, hashes)] = rule.copies
        result[of_class & _up_to(rule.last_extra, rows.confidence, hashes)] += 1
    return result


def _up_to(cut: Cut | None, confidence: npt.NDArray[np.float32], hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    if cut is None:
        return np.zeros(len(confidence), np.bool_)
    # float32 → JSON double → float32 is exact, so the comparison with equality is.
    threshold = np.float32(cut.confidence)
    up_to: npt.NDArray[np.bool_] = (confidence > threshold) | (
        (confidence == threshold) & (hashes <= np.uint64(int(cut.hash, 16)))
    )
    return up_to
