"""Differences of two arms over seeds and images, with intervals that hold for new seeds and new images.

All seeds are measured on the same images, so a mistake depends on the seed, on the image, and on both: a two-way layout with random rows
and columns. The variance of its grand mean is estimated from the mean squares of rows, columns and the rest, and the interval is that of
Student's t with Satterthwaite's degrees of freedom (Biometrics Bulletin 2, 1946). Ratios are linearized (delta method).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

Numbers = npt.NDArray[Any]
"""Of any type; false and true are 0 and 1."""
LEVEL = 0.95


class Contrast(NamedTuple):
    """By how much one arm is better than another; positive is better."""

    value: float
    low: float
    """Bounds of the two-sided 95 % interval."""
    high: float
    p_value: float
    """Two-sided, that there is no difference."""

    def change_unit(self, factor: float) -> "Contrast":
        """The same in another unit. `factor`: above 0."""
        return self._replace(value=factor * self.value, low=factor * self.low, high=factor * self.high)


def bound_mean(layout: Numbers) -> Contrast:
    """The mean of a layout [seeds, images]. With one seed the interval holds for new images only."""
    layout = layout.astype(np.float64)
    seeds, images = layout.shape
    value = float(layout.mean())
    row_variance = float(layout.mean(1).var(ddof=1)) / seeds if seeds > 1 else 0.0
    column_variance = float(layout.mean(0).var(ddof=1)) / images
    if seeds > 1:
        rest = layout - layout.mean(1, keepdims=True) - layout.mean(0) + value
        # Both of the others contain it once.
        rest_variance = float((rest**2).sum()) / ((seeds - 1) * (images - 1)) / (seeds * images)
        column_variance = max(0.0, column_variance - rest_variance)
    variance = row_variance + column_variance
    if variance == 0:
        return Contrast(value, value, value, float(value == 0))
    row_share = row_variance**2 / (seeds - 1) if seeds > 1 else 0.0
    freedom = variance**2 / (row_share + column_variance**2 / (images - 1))
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * variance**0.5
    return Contrast(value, value - half, value + half, 2 * float(stats.t.sf(abs(value) / variance**0.5, freedom)))


def contrast_errors(student: Numbers, control: Numbers) -> Contrast:
    """Errors avoided: mean of the control's mistakes − mean of the student's. Both: mistakes [seeds, images]."""
    return bound_mean(control.astype(np.float64) - student.astype(np.float64))


def contrast_ratios(student: Numbers, control: Numbers) -> Contrast:
    """Share of errors avoided: 1 − the mean over kinds of the student's mistakes ÷ the control's, each over all seeds and images.

    Both: mistakes [seeds, images, kinds]. Kinds in which the control makes no mistake are left out; 0 if there is no other.
    """
    student_means, control_means = student.mean((0, 1), dtype=np.float64), control.mean((0, 1), dtype=np.float64)
    kinds = control_means > 0
    if not kinds.any():
        return Contrast(0.0, 0.0, 0.0, 1.0)
    ratios = student_means[kinds] / control_means[kinds]
    # What each seed and image contributes, to first order.
    changes = (ratios * control[..., kinds] - student[..., kinds]) / control_means[kinds]
    return bound_mean(1 - ratios.mean() + changes.mean(-1))


def adjust_holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values that are adjusted for their number (Holm, Scandinavian Journal of Statistics 6, 1979), in the order given."""
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def join_claims(contrasts: Sequence[Contrast]) -> float:
    """P-value of the claim that all of them are above 0: the largest, and 1 if any is not (intersection-union test)."""
    return max(contrast.p_value if contrast.value > 0 else 1.0 for contrast in contrasts)
