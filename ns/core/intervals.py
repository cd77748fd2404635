"""Confidence intervals of shares: how far the share in a sample may be from the true one."""

import math
from collections.abc import Sequence
from typing import NamedTuple

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


def effective_trials(sample_size: int, population: int) -> float:
    """Number of independent trials that say as much as `sample_size` draws without replacement from a population; infinity if all are
    drawn.

    The variance of such a sample's share is smaller by (population − sample_size) / (population − 1) (Cochran, Sampling Techniques,
    §3.2).
    """
    if sample_size == population:
        return math.inf
    return sample_size * (population - 1) / (population - sample_size)


def combine_shares(shares: Sequence[ShareInterval], weights: Sequence[float]) -> ShareInterval:
    """The share in a whole of parts with these shares, measured independently, and these weights (which sum to 1).

    The squared distances of the parts' bounds from their values add up: MOVER (Zou and Donner, Statistics in Medicine 27,
    2008, eq. 4; for two parts, Newcombe 1998). With Wilson's bounds it also holds where a part has no failures at all, where
    the usual variance is 0.
    """
    value = sum(weight * share.value for share, weight in zip(shares, weights, strict=True))
    below = math.sqrt(sum((weight * (share.value - share.low)) ** 2 for share, weight in zip(shares, weights, strict=True)))
    above = math.sqrt(sum((weight * (share.high - share.value)) ** 2 for share, weight in zip(shares, weights, strict=True)))
    return ShareInterval(value, max(0.0, value - below), min(1.0, value + above))
