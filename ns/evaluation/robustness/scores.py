"""Robustness in one number each: mCE, mFR and mT5D of Hendrycks & Dietterich (arXiv:1903.12261 §4).

Each is a mean over kinds of a raw error divided by that of a reference, in percent.
"""

from collections.abc import Container, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ns.config.schema import EXTRA_CORRUPTIONS
from ns.evaluation.result import Robustness
from ns.storage.documents import JsonDocument

ScoreReference = Literal["AlexNet", "reference"]

ALEXNET_ERROR: dict[str, float] = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
    "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
    "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}  # fmt: skip
"""AlexNet's mean error rate over the five severities, 0–1."""

ALEXNET_FLIPS: dict[str, float] = {
    "gaussian_noise": 0.2365, "shot_noise": 0.3006, "motion_blur": 0.0930, "zoom_blur": 0.0594, "snow": 0.1193,
    "brightness": 0.0489, "translate": 0.1101, "rotate": 0.1310, "tilt": 0.0705, "scale": 0.2353,
}  # fmt: skip
"""AlexNet's flip probabilities, 0–1."""


def relative_score(values: Mapping[str, float], reference: Mapping[str, float]) -> float | None:
    """100 × the mean of value ÷ reference value over the reference's kinds: mCE of mean error rates, mFR of flip probabilities,
    mT5D of top-5 distances. None if the reference is empty, a kind of it was not measured, or its value is 0."""
    if not reference or any(kind not in values or not value for kind, value in reference.items()):
        return None
    return 100 * float(np.mean([values[kind] / value for kind, value in reference.items()]))


def flip_rates(top: npt.NDArray[np.integer[Any]], is_noise: bool) -> npt.NDArray[np.float64]:
    """The share of frames of each sequence whose answer differs from that of the frame before, or, for noise, of the first frame.

    `top`: [N, F], the best class of each frame. Returns float64 [N].
    """
    reference = top[:, :1] if is_noise else top[:, :-1]
    differs: npt.NDArray[np.float64] = (top[:, 1:] != reference).mean(1)
    return differs


def top5_distances(top: npt.NDArray[np.integer[Any]], is_noise: bool) -> npt.NDArray[np.float64]:
    """The mean distance between a frame's ranking and that of the frame before, or, for noise, of the first frame.

    `top`: [N, F, K ≤ 5], the best classes of each frame, best first. Returns float64 [N]. Let σ(i) be the rank in the frame of the
    class that is i-th in the reference: the distance is Σ |min(σ(i), K + 1) - i|.
    """
    best = top.shape[2]
    reference = top[:, :1] if is_noise else top[:, :-1]
    same = reference[:, :, :, None] == top[:, 1:, None, :]
    position = np.where(same.any(3), same.argmax(3), best)
    distance: npt.NDArray[np.float64] = np.abs(position - np.arange(best)).sum(2).mean(1)
    return distance


class RobustnessScores(JsonDocument):
    """Scores of one measurement; None for what was not measured or has no reference."""

    corruption_error: float | None
    """Mean error rate over corruptions and severities in 0–1, without the extra corruptions."""
    mce: float | None
    """Mean corruption error, %."""
    mce_relative_to: ScoreReference | None
    flip_probability: float | None
    """Mean flip probability over perturbations, 0–1."""
    mfr: float | None
    """Mean flip rate, %."""
    mfr_relative_to: ScoreReference | None
    top5_distance: float | None
    """Mean top-5 distance over perturbations."""
    mt5d: float | None
    """Mean top-5 distance, % of the reference's; AlexNet's distances are not published with the paper."""


def score_robustness(robustness: Robustness, reference: Robustness | None = None) -> RobustnessScores:
    """Scores relative to AlexNet's published numbers if the classes are ImageNet's 1,000, else relative to `reference` (such as a
    run's first teacher) where both measured the same images, severities and frames. The scores say which."""
    errors = {kind: value for kind, value in robustness.mean_corruption_errors().items() if kind not in EXTRA_CORRUPTIONS}
    flips, distances = robustness.flip_probabilities(), robustness.top5_distances()
    reference_errors: dict[str, float] = {}
    reference_flips: dict[str, float] = {}
    reference_distances: dict[str, float] = {}
    if reference is not None and (reference.dataset, reference.subsample) == (robustness.dataset, robustness.subsample):
        if reference.severities == robustness.severities:
            reference_errors = _pick_kinds(reference.mean_corruption_errors(), errors)
        if reference.frames == robustness.frames:
            reference_flips = _pick_kinds(reference.flip_probabilities(), flips)
            reference_distances = _pick_kinds(reference.top5_distances(), distances)
    relative_to: ScoreReference = "reference"
    if robustness.imagenet:
        relative_to = "AlexNet"
        reference_errors = ALEXNET_ERROR if robustness.severities == (1, 2, 3, 4, 5) else {}
        reference_flips = ALEXNET_FLIPS
    mce, mfr = relative_score(errors, reference_errors), relative_score(flips, reference_flips)
    return RobustnessScores(
        corruption_error=_average_values(errors),
        mce=mce,
        mce_relative_to=None if mce is None else relative_to,
        flip_probability=_average_values(flips),
        mfr=mfr,
        mfr_relative_to=None if mfr is None else relative_to,
        top5_distance=_average_values(distances),
        mt5d=relative_score(distances, reference_distances),
    )


def _pick_kinds(values: dict[str, float], kinds: Container[str]) -> dict[str, float]:
    return {kind: value for kind, value in values.items() if kind in kinds}


def _average_values(values: dict[str, float]) -> float | None:
    return sum(values.values()) / len(values) if values else None
