"""Confidence intervals of shares: how far the share in a sample may be from the true one."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Z95 = 1.96
"""Quantile of the normal distribution for two-sided 95 %."""


class ShareInterval(NamedTuple):
    """A share with its interval, all in [0, 1]."""

    value: float
    low: float
    high: float


def wilson_interval(share: float, trial_count: float) -> tuple[float, float]:
    """The 95 % interval (low, high) of a share of `trial_count` trials (Wilson 1927); (0, 1) for no trials."""
    if trial_count == 0:
        return 0.0, 1.0
    spread = Z95**2 / trial_count
    center = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * share * (1 - share) + spread**2 / 4) / (1 + spread)
    # Rounding must not push a bound past the share itself, which it does at 0 and 1.
    return max(0.0, min(share, center - half)), min(1.0, max(share, center + half))


def effective_trials(sample_size: float, population: float) -> float:
    """Number of independent trials that say as much as `sample_size` draws without replacement from a population; infinity if all are
    drawn.

    The variance of such a sample's share is smaller by (population − sample_size) / (population − 1) (Cochran, Sampling Techniques,
    §3.2).
    """
    if sample_size == population:
        return math.inf
    return sample_size * (population - 1) / (population - sample_size)


def stratified_interval(right: Sequence[int], reviewed: Sequence[int], sizes: Sequence[int]) -> ShareInterval:
    """The share in a population of strata of these sizes, of which so many were reviewed and found right, with its 95 % interval.

    Wilson's interval for as many independent trials as have the variance of the stratified mean (its effective sample size: Korn and
    Graubard, Survey Methodology 24, 1998; compared with others by Dean and Pagano, J. Survey Statistics and Methodology 3, 2015). For
    this variance alone, each stratum's share is moved towards the overall one as in a beta-binomial model whose spread is estimated by
    moments (Kleinman, JASA 68, 1973): a stratum without a mistake is not free of them, and without any mistake the sizes and numbers of
    reviewed units decide. Of a stratum without reviewed units nothing is known: its value is that of the others, its bounds are 0 and 1.
    Raises ValueError if nothing was reviewed.
    """
    all_right, all_reviewed, all_sizes = (np.asarray(values, np.float64) for values in (right, reviewed, sizes))
    has_reviews = all_reviewed > 0
    if not has_reviews.any():
        raise ValueError("nothing was reviewed")
    hits, counts, units = all_right[has_reviews], all_reviewed[has_reviews], all_sizes[has_reviews]
    weights = units / units.sum()
    value = float((units * hits / counts).sum() / units.sum())
    total = counts.sum()
    # Wilson's center: with a share of exactly 0 or 1, nothing below would have a variance.
    center = (value * total + Z95**2 / 2) / (total + Z95**2)
    prior = _estimate_prior_trials(hits, counts)
    moved = center if math.isinf(prior) else (hits + prior * center) / (counts + prior)
    shares = np.broadcast_to(moved, counts.shape)
    variance = float(
        weights**2 @ (shares * (1 - shares) / [effective_trials(*pair) for pair in zip(counts, units, strict=True)])
    )
    mean = float(weights @ shares)
    low, high = wilson_interval(value, mean * (1 - mean) / variance if variance else math.inf)
    reviewed_share = float(units.sum() / all_sizes.sum())
    return ShareInterval(value, reviewed_share * low, reviewed_share * high + 1 - reviewed_share)


def _estimate_prior_trials(hits: npt.NDArray[np.float64], counts: npt.NDArray[np.float64]) -> float:
    """The trials that the overall share counts as, beside those of a stratum: 1 / γ − 1 with the correlation γ of two units of a
    stratum; infinity if the strata differ no more than by chance. At least 1."""
    total, pooled = counts.sum(), hits.sum() / counts.sum()
    degrees = len(counts) - 1
    excess = total - (counts**2).sum() / total - degrees
    if excess <= 0 or pooled in (0, 1):
        return math.inf
    spread = (counts * (hits / counts - pooled) ** 2).sum() / (pooled * (1 - pooled))
    correlation = (spread - degrees) / excess
    return max(1.0, 1 / correlation - 1) if correlation > 0 else math.inf
