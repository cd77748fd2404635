"""How robust a model is in one number each: its raw errors, divided by those of a reference."""

from typing import Literal

from ns.config.schema import EXTRA_CORRUPTIONS
from ns.evaluation.result import Robustness
from ns.evaluation.robustness.averages import ALEXNET_ERROR, ALEXNET_FLIPS, relative_score
from ns.storage.documents import JsonDocument

ScoreReference = Literal["AlexNet", "reference"]


class RobustnessScores(JsonDocument):
    """None where it was not measured, or there is nothing to divide by."""

    corruption_error: float | None
    """Mean error rate over corruptions and severities, the extra ones left out; a share."""
    mce: float | None
    """Mean corruption error, %."""
    mce_relative_to: ScoreReference | None
    flip_probability: float | None
    """Mean over perturbations; a share."""
    mfr: float | None
    """Mean flip rate, %."""
    mfr_relative_to: ScoreReference | None
    top5_distance: float | None
    """Mean over perturbations."""
    mt5d: float | None
    """Mean top-5 distance, %; relative to the reference only: AlexNet's are not published with the paper."""


def score_robustness(robustness: Robustness, reference: Robustness | None = None) -> RobustnessScores:
    """Divides by AlexNet's published numbers if the classes are ImageNet's 1,000, else by those of `reference`, such as the first teacher
    of a run, where both measured the same. What it divided by is said."""
    errors = {kind: value for kind, value in robustness.mean_corruption_errors().items() if kind not in EXTRA_CORRUPTIONS}
    flip_probabilities = {kind: perturbed.flip_probability for kind, perturbed in robustness.perturbations.items()}
    distances = {kind: perturbed.top5_distance for kind, perturbed in robustness.perturbations.items()}
    reference_errors = reference_flips = reference_distances = None
    if reference is not None and (reference.dataset, reference.subsample) == (robustness.dataset, robustness.subsample):
        if reference.severities == robustness.severities:
            reference_errors = {kind: value for kind, value in reference.mean_corruption_errors().items() if kind in errors}
        if reference.frames == robustness.frames:
            reference_flips = {
                kind: perturbed.flip_probability
                for kind, perturbed in reference.perturbations.items()
                if kind in flip_probabilities
            }
            reference_distances = {
                kind: perturbed.top5_distance
                for kind, perturbed in reference.perturbations.items()
                if kind in flip_probabilities
            }
    relative_to: ScoreReference = "reference"
    if robustness.imagenet:
        relative_to = "AlexNet"
        reference_errors = ALEXNET_ERROR if robustness.severities == (1, 2, 3, 4, 5) else None
        reference_flips = ALEXNET_FLIPS
    mce = relative_score(errors, reference_errors or {})
    mfr = relative_score(flip_probabilities, reference_flips or {})
    return RobustnessScores(
        corruption_error=_average_values(errors),
        mce=mce,
        mce_relative_to=None if mce is None else relative_to,
        flip_probability=_average_values(flip_probabilities),
        mfr=mfr,
        mfr_relative_to=None if mfr is None else relative_to,
        top5_distance=_average_values(distances),
        mt5d=relative_score(distances, reference_distances or {}),
    )


def _average_values(values: dict[str, float]) -> float | None:
    return sum(values.values()) / len(values) if values else None
