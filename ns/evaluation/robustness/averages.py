"""The formulas of robustness: mCE, mFR and mT5D of Hendrycks & Dietterich (arXiv:1903.12261; `noisy_student.md` §6.3, §6.4)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

ALEXNET_ERROR: dict[str, float] = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
    "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
    "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}  # fmt: skip
"""Mean error rate over the five severities."""

ALEXNET_FLIPS: dict[str, float] = {
    "gaussian_noise": 0.2365, "shot_noise": 0.3006, "motion_blur": 0.0930, "zoom_blur": 0.0594, "snow": 0.1193,
    "brightness": 0.0489, "translate": 0.1101, "rotate": 0.1310, "tilt": 0.0705, "scale": 0.2353,
}  # fmt: skip
"""Flip probabilities."""


def relative_score(values: Mapping[str, float], reference: Mapping[str, float]) -> float | None:
    """100 × the mean, over the kinds that the reference has, of a value divided by the reference's; mCE of mean error rates, mFR of
    flip probabilities, mT5D of top-5 distances. None if a kind of the reference was not measured, or the reference is 0 there."""
    if not reference or any(kind not in values or not value for kind, value in reference.items()):
        return None
    return 100 * float(np.mean([values[kind] / value for kind, value in reference.items()]))


def flip_rates(top: npt.NDArray[np.integer[Any]], is_noise: bool) -> npt.NDArray[np.float64]:
    """[N, F] best classes along sequences → float64 [N]: the share of frames that differ from the frame before, or, of noise, from the
    first one."""
    reference = top[:, :1] if is_noise else top[:, :-1]
    differs: npt.NDArray[np.float64] = (top[:, 1:] != reference).mean(1)
    return differs


def top5_distances(top: npt.NDArray[np.integer[Any]], is_noise: bool) -> npt.NDArray[np.float64]:
    """[N, F, K ≤ 5] best classes along sequences, the best first → float64 [N]: the mean distance of a frame's ranking from that of
    the frame before, or, of noise, of the first one.

    With σ(i) the place in the frame's ranking of what is i-th in the reference's, the distance is the sum over i of the places from
    i to σ(i), not counting those beyond K + 1: Σ |min(σ(i), K + 1) - i|.
    """
    best = top.shape[2]
    reference = top[:, :1] if is_noise else top[:, :-1]
    same = reference[:, :, :, None] == top[:, 1:, None, :]
    position = np.where(same.any(3), same.argmax(3), best)
    distance: npt.NDArray[np.float64] = np.abs(position - np.arange(best)).sum(2).mean(1)
    return distance
