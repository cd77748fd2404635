import math

import numpy as np
import pytest

from ns.core.intervals import effective_trials, stratified_interval, wilson_interval
from ns.labeling.audit import allocate_sample


def test_wilson_interval_of_whole_population_is_exact():
    assert wilson_interval(0.75, effective_trials(8, 8)) == (0.75, 0.75)
    assert wilson_interval(0.5, 0) == (0, 1)
    assert effective_trials(10, 900) == pytest.approx(10 * 899 / 890)


def test_wilson_interval_equals_scipys():
    binomtest = pytest.importorskip("scipy.stats").binomtest
    for right, count in ((0, 5), (3, 7), (40, 40), (391, 400)):
        expected = binomtest(right, count).proportion_ci(method="wilson")
        assert wilson_interval(right / count, count) == pytest.approx(expected, abs=1e-4)


def test_stratified_interval_of_one_stratum_is_wilsons():
    trials = effective_trials(60, 5000)
    assert stratified_interval([51], [60], [5000]) == pytest.approx((0.85, *wilson_interval(0.85, trials)))
    assert stratified_interval([60], [60], [5000]) == pytest.approx((1, *wilson_interval(1, trials)))


def test_stratified_interval_without_mistakes_is_that_of_sizes_and_counts():
    """By hand: weights 0.9 and 0.1, ten of each: 1 / (0.9² / 10 + 0.1² / 10) = 12.195 trials, as populations are endless here."""
    found = stratified_interval([10, 10], [10, 10], [9 * 10**9, 10**9])
    assert found == pytest.approx((1, *wilson_interval(1, 1 / 0.082)), abs=1e-6)


def test_stratified_interval_is_exact_of_what_was_reviewed_in_full():
    assert stratified_interval([90, 1], [100, 2], [100, 2]) == pytest.approx((91 / 102,) * 3)
    # Of the fourth part that nobody looked at, all may be wrong, or right.
    assert stratified_interval([60, 0], [75, 0], [75, 25]) == pytest.approx((0.8, 0.6, 0.85))
    with pytest.raises(ValueError, match="nothing was reviewed"):
        stratified_interval([0, 0], [0, 0], [5, 7])


def test_stratified_interval_is_narrower_if_mistakes_lie_in_one_stratum():
    sizes, reviewed = [5000, 5000], [50, 50]
    apart, together = stratified_interval([50, 30], reviewed, sizes), stratified_interval([40, 40], reviewed, sizes)
    assert apart.value == together.value == 0.8
    assert apart.high - apart.low < 0.9 * (together.high - together.low)


CONFIDENCE_BINS = [500, 1000, 2000, 6500]
COVERAGE_CASES = {
    "equal strata": ([1000] * 40, [0.95] * 40, 400),
    "mistakes where the teacher is unsure": (CONFIDENCE_BINS * 10, [0.6, 0.8, 0.92, 0.99] * 10, 400),
    "mistakes in the least sure tenth alone": (CONFIDENCE_BINS * 10, [0.5, 1, 1, 1] * 10, 400),
    "mistakes above the cut alone": (CONFIDENCE_BINS * 10, [1, 1, 1, 0.93] * 10, 400),
    "rare mistakes": (CONFIDENCE_BINS * 10, [0.97, 0.98, 0.99, 0.992] * 10, 200),
    "20 images of unequal strata": ([3000, 5000, 200], [0.8, 0.9, 0.97], 20),
}


@pytest.mark.parametrize("case", COVERAGE_CASES)
def test_stratified_interval_covers_the_truth(case):
    sizes, precisions, images = (np.array(values) for values in COVERAGE_CASES[case])
    reviewed = np.array(allocate_sample(sizes.tolist(), int(images)))
    right = np.round(sizes * precisions).astype(int)
    truth = right.sum() / sizes.sum()
    drawn = np.random.default_rng(0).hypergeometric(right, sizes - right, reviewed, (4000, len(sizes)))
    seen, times = np.unique(drawn, axis=0, return_counts=True)
    covered = below = 0
    for hits, count in zip(seen, times, strict=True):
        _, low, high = stratified_interval(hits, reviewed, sizes)
        covered += count * (low <= truth <= high)
        below += count * (truth < low)
    assert 0.94 <= covered / 4000 <= 0.99
    # The gate asks for the lower bound, which is one-sided at 97.5 %.
    assert below / 4000 <= 0.025 + 3 * math.sqrt(0.025 * 0.975 / 4000)
