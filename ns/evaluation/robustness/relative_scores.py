"""How robust a model is in one number each: its raw errors, divided by those of a reference."""

from typing import Literal

from ns.config.schema import EXTRA_CORRUPTIONS
from ns.evaluation.result import Robustness
from ns.evaluation.robustness.averages import ALEXNET_ERROR, ALEXNET_FLIPS, relative
from ns.storage.documents import Document

Reference = Literal["AlexNet", "reference"]


class Scores(Document):
    """None where it was not measured, or there is nothing to divide by."""

    corruption_error: float | None
    """Mean error rate over corruptions and severities, the extra ones left out; a share."""
    mce: float | None
    """Mean corruption error, %."""
    mce_relative_to: Reference | None
    flip_probability: float | None
    """Mean over perturbations; a share."""
    mfr: float | None
    """Mean flip rate, %."""
    mfr_relative_to: Reference | None
    top5_distance: float | None
    """Mean over perturbations."""
    mt5d: float | None
    """Mean top-5 distance, %; relative to the reference only: AlexNet's are not published with the paper."""


def scores(robustness: Robustness, reference: Robustness | None = None) -> Scores:
    """Divides by AlexNet's published numbers if the classes are ImageNet's 1,000, else by those of `reference`, such as the first teacher
    of a run, where both measured the same. What it divided by is said."""
    errors = {kind: value for kind, value in robustness.corruption_error().items() if kind not in EXTRA_CORRUPTIONS}
    flips = {kind: one.flip_probability for kind, one in robustness.perturbations.items()}
    distances = {kind: one.top5_distance for kind, one in robustness.perturbations.items()}
    known_errors = known_flips = known_distances = None
    if reference is not None and (reference.dataset, reference.subsample) == (robustness.dataset, robustness.subsample):
        if reference.severities == robustness.severities:
            known_errors = {kind: value for kind, value in reference.corruption_error().items() if kind in errors}
        if reference.frames == robustness.frames:
            known_flips = {kind: one.flip_probability for kind, one in reference.perturbations.items() if kind in flips}
            known_distances = {kind: one.top5_distance for kind, one in reference.perturbations.items() if kind in flips}
    by: Reference = "reference"
    if robustness.imagenet:
        by = "AlexNet"
        known_errors = ALEXNET_ERROR if robustness.severities == (1, 2, 3, 4, 5) else None
        known_flips = ALEXNET_FLIPS
    mce = relative(errors, known_errors or {})
    mfr = relative(flips, known_flips or {})
    return Scores(
        corruption_error=_mean(errors),
        mce=mce,
        mce_relative_to=None if mce is None else by,
        flip_probability=_mean(flips),
        mfr=mfr,
        mfr_relative_to=None if mfr is None else by,
        top5_distance=_mean(distances),
        mt5d=relative(distances, known_distances or {}),
    )


def _mean(values: dict[str, float]) -> float | None:
    return sum(values.values()) / len(values) if values else None
