"""How many held-out images it takes to see a gain, a loss of a class, or a rise of mCE: known before a run, under stated assumptions."""

import math
from collections.abc import Iterator
from statistics import NormalDist
from typing import NamedTuple

from ns.config.schema import GateConfig
from ns.evaluation.gate import spend_level

POWER = 0.8
"""Probability with which a change is to be seen."""
DISCORDANT = 0.1
"""Assumed share of images that only one of two models gets right; if a change is larger, it is this share."""
RISE_SPREADS = {"max_mce_rise": 100.0, "max_mfr_rise": 700.0}
"""Assumed standard deviation, over images, of what an image adds to a rise, in points; flips are rarer than mistakes."""


class ChangeNeeds(NamedTuple):
    """What it takes to see a change that a requirement of the gate asks about."""

    field: str
    """Field of `gate`."""
    change: float
    """The true change, in points."""
    images: int
    """Held-out images with which it is seen with probability POWER; of one class, for `max_class_drop`."""


def list_needs(gate: GateConfig, classes: int) -> Iterator[ChangeNeeds]:
    """Changes beyond each requirement that is set, and how many images each takes. `classes`: those that have held-out images."""
    for field, beyond in (
        ("min_gain", (0.01, 0.02, 0.05)),
        ("max_class_drop", (0.05, 0.1, 0.2, 0.4)),
        ("max_mce_rise", (0.02, 0.05, 0.1)),
        ("max_mfr_rise", (0.02, 0.05, 0.1)),
    ):
        limit = _read_limit(gate, field)
        if limit is None:
            continue
        for change in (limit + step for step in beyond):
            if change < 1 or "rise" in field:
                yield ChangeNeeds(field, 100 * change, math.ceil(_count_images(gate, field, change, classes)))


def find_seen_change(gate: GateConfig, field: str, images: int, classes: int) -> float | None:
    """The least change, in tenths of a point, that so many images show with probability POWER; None if none does.

    `images`: all held-out images, or those of one class for `max_class_drop`.
    """
    limit = _read_limit(gate, field) or 0.0
    steps = range(1, 10_001 if "rise" in field else math.ceil(1000 * (1 - limit)))
    return next((100 * limit + s / 10 for s in steps if _count_images(gate, field, limit + s / 1000, classes) <= images), None)


def _read_limit(gate: GateConfig, field: str) -> float | None:
    """The limit of a requirement as a share."""
    limit: float | None = getattr(gate, field)
    return limit / 100 if limit is not None and "rise" in field else limit


def _count_images(gate: GateConfig, field: str, change: float, classes: int) -> float:
    """Images with which a change, a share above the limit of `field`, is seen with probability POWER."""
    limit = _read_limit(gate, field) or 0.0
    if field == "min_gain":
        return count_paired_images(change, limit, spend_level(gate, 1))
    if field == "max_class_drop":
        return count_paired_images(change, limit, 1 - (1 - gate.level) / classes)
    distances = NormalDist().inv_cdf(gate.level) + NormalDist().inv_cdf(POWER)
    return (distances * RISE_SPREADS[field] / 100 / (change - limit)) ** 2


def count_paired_images(change: float, margin: float, level: float) -> float:
    """Images on which the test that a difference of two shares is above `margin` sees a difference of `change` with probability POWER:
    more than it takes where they are few and the level is high.

    The variance under the hypothesis is that of the score statistic (Nam, Biometrics 53, 1997), by which `paired.exact_p_value` orders
    outcomes.
    """
    less = max(0.0, (DISCORDANT - abs(change)) / 2) + max(0.0, -change)
    more = less + change
    linear = (2 - more + less) * margin - more - less
    # At a margin of -1 all of it vanishes, up to rounding: nothing is lost that may not be lost.
    restricted = (math.sqrt(max(0.0, linear**2 + 8 * less * margin * (1 - margin))) - linear) / 4
    null_variance, variance = 2 * restricted + margin * (1 - margin), more + less - change**2
    spreads = (math.sqrt(max(0.0, null_variance)), math.sqrt(max(0.0, variance)))
    distance = NormalDist().inv_cdf(level) * spreads[0] + NormalDist().inv_cdf(POWER) * spreads[1]
    return (distance / (change - margin)) ** 2
