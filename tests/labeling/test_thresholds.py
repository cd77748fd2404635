import numpy as np
import pytest
from scipy.stats import binom

from ns.config.schema import SelectionConfig
from ns.labeling.thresholds import NEVER_SURE, clopper_pearson_bound, count_required_images, find_thresholds


def run(entries, classes=3, precision=0.8, level=0.9):
    predicted, confidence, correct = zip(*entries, strict=True) if entries else ((), (), ())
    return find_thresholds(
        np.array(predicted, np.int64),
        np.array(confidence, np.float32),
        np.array(correct, np.bool_),
        classes,
        precision=precision,
        level=level,
        evaluation="0" * 64,
    )


@pytest.mark.parametrize(("correct", "total"), [(1, 1), (9, 10), (50, 50), (97, 100), (3, 700)])
def test_clopper_pearson_bound_is_binomial_tail(correct, total):
    # Clopper & Pearson: the precision at which so many correct ones or more have probability 1 - level.
    bound = float(clopper_pearson_bound(np.array([correct]), np.array([total]), 0.95)[0])
    assert binom.sf(correct - 1, total, bound) == pytest.approx(0.05)
    assert clopper_pearson_bound(np.array([0]), np.array([total]), 0.95)[0] == 0


@pytest.mark.parametrize(("precision", "level"), [(0.9, 0.95), (0.95, 0.95), (0.7, 0.99)])
@pytest.mark.parametrize("mistakes", [0, 1, 4])
def test_count_required_images_is_the_first_number_that_passes(precision, level, mistakes):
    images = count_required_images(precision, level, mistakes)
    # The exact test of "the precision is lower" with so many right ones.
    assert binom.sf(images - mistakes - 1, images, precision) <= 1 - level
    assert binom.sf(images - mistakes - 2, images - 1, precision) > 1 - level


def test_search_ends_at_the_first_threshold_without_evidence():
    # 200 right ones, 100 of which every other is wrong, and then enough right ones that all together pass again.
    entries = [(0, 0.9 - 1e-4 * rank, not (200 <= rank < 300 and rank % 2)) for rank in range(1000)]
    (found, *_) = run(entries, precision=0.9, level=0.95).classes
    assert sum(ok for _, _, ok in entries) / 1000 > 0.94
    assert 200 <= found.calibration < 300
    assert found.correct == sum(ok for _, _, ok in entries[: found.calibration])
    assert found.bound == clopper_pearson_bound(np.array([found.correct]), np.array([found.calibration]), 0.95)[0] >= 0.9
    assert np.float32(found.threshold) == np.float32(entries[found.calibration][1])


def test_threshold_of_a_class_that_is_right_everywhere_is_the_least_confidence():
    entries = [(0, 0.2 + 0.001 * rank, True) for rank in range(200)]
    (found, *_) = run(entries, precision=0.9).classes
    assert (found.threshold, found.calibration) == (0.0, 200)
    kept = find_thresholds(
        *(np.array(column) for column in zip(*entries, strict=True)),
        1,
        precision=0.9,
        level=0.9,
        evaluation="",
        min_confidence=0.3,
    ).classes[0]
    assert (kept.threshold, kept.calibration) == (0.3, sum(np.float32(sure) > np.float32(0.3) for _, sure, _ in entries))


def test_equal_confidences_are_tested_together():
    entries = [(0, 0.9, rank % 3 > 0) for rank in range(60)] + [(0, 0.5, True)] * 60
    # The first 22 could be right by chance; it is all 60 with confidence 0.9 that are tested.
    assert run(entries, precision=0.9).classes[0].threshold == NEVER_SURE
    right = [(0, 0.9, True)] * 60 + [(0, 0.5, False)] * 60
    assert run(right, precision=0.9).classes[0].threshold == np.float32(0.5)


def test_classes_with_too_few_images_share_a_threshold():
    found = run([(0, 0.9, False)] * 50 + [(1, 0.9, True)] * 6 + [(2, 0.8, True)] * 6).classes
    assert (found[0].threshold, found[0].calibration, found[0].bound, found[0].pooled) == (NEVER_SURE, 0, 0, False)
    assert found[1] == found[2]
    assert (found[1].threshold, found[1].calibration, found[1].pooled) == (0.0, 12, True)
    assert {one.threshold for one in run([]).classes} == {NEVER_SURE}


# Precision at a confidence, in cases where the highest thresholds have the wanted precision and the lowest ones have not, and where
# confidence says nothing.
CASES = {
    "nothing, just below": lambda sure: np.full_like(sure, 0.8999),
    "nothing, far below": lambda sure: np.full_like(sure, 0.85),
    "little": lambda sure: 0.88 + 0.04 * sure,
    "much": lambda sure: 0.5 + 0.5 * np.sqrt(sure),
    "all, at once": lambda sure: np.where(sure > 0.7, 0.97, 0.3),
    "sure to be wrong": lambda sure: 0.95 - 0.12 * sure,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [0.3, 1.0, 4.0], ids=["few sure", "even", "many sure"])
def test_thresholds_miss_their_precision_no_more_often_than_their_level_says(case, shape):
    """Simulation: classes with 20 to 1,000 images each, whose true precision above any threshold is known."""
    rng = np.random.default_rng(0)
    sizes = np.tile([20, 45, 100, 300, 1000], 60)
    predicted = np.repeat(np.arange(len(sizes)), sizes)
    sure = rng.random(len(predicted)) ** (1 / shape)
    correct = rng.random(len(sure)) < CASES[case](sure)
    confidence = sure.astype(np.float32)
    found = find_thresholds(predicted, confidence, correct, len(sizes), precision=0.9, level=0.95, evaluation="").classes
    # Precision above each threshold: the mean over the distribution of confidences, on a fine grid.
    grid = ((np.arange(100_000) + 0.5) / 100_000) ** (1 / shape)
    cumulated = np.cumsum(CASES[case](grid)[::-1])[::-1] / np.arange(len(grid), 0, -1)
    own = [one for one in found if not one.pooled]
    true_precision = np.interp([one.threshold for one in own if one.threshold <= 1], grid, cumulated)
    assert len(own) == 240
    misses = int((true_precision < 0.9 - 1e-6).sum())
    assert misses <= binom.ppf(0.995, len(own), 0.05)
    if case in ("much", "all, at once"):
        passing = sum(one.threshold <= 1 for one in own)
        assert passing > (40 if shape < 1 else 80), "a test that never passes misses nothing"


@pytest.mark.parametrize("informative", [False, True], ids=["confidence says nothing", "confidence tells the classes apart"])
def test_pooled_threshold_of_a_mix_of_rare_classes_holds_its_level(informative):
    """Simulation: 40 classes with 1 to 12 images each, half of them right 97 times of 100, half of them 82 times."""
    rng = np.random.default_rng(2)
    misses = passing = 0
    for _ in range(300):
        predicted = np.repeat(np.arange(40), rng.integers(1, 13, 40))
        is_good = predicted % 2 == 0
        correct = rng.random(len(predicted)) < np.where(is_good, 0.97, 0.82)
        confidence = rng.random(len(predicted)) * 0.5 + 0.5 * (is_good & informative)
        found = find_thresholds(
            predicted, confidence.astype(np.float32), correct, 40, precision=0.9, level=0.95, evaluation=""
        ).classes
        assert len(set(found)) == 1
        assert found[0].pooled
        if found[0].threshold <= 1:
            passing += 1
            # Of labels above t, good classes give 0.5 (1 - 2 (t - 0.5)) for t above 0.5, where there are no others.
            t = found[0].threshold
            good, bad = (0.5, 0.5 - t) if informative else (0.5 - t, 0.5 - t)
            misses += t < 0.5 and (0.97 * good + 0.82 * bad) / (good + bad) < 0.9
    assert misses <= binom.ppf(0.995, 300, 0.05)
    assert passing > 100 if informative else passing == misses


def test_lowest_passing_threshold_would_miss_more_often():
    """Why thresholds are tested in a fixed sequence: among all thresholds, one passes by chance far too often."""
    rng = np.random.default_rng(1)
    lucky = 0
    for _ in range(200):
        right = (rng.random(300) < 0.8999).cumsum()
        lucky += bool((clopper_pearson_bound(right, np.arange(1, 301), 0.95) >= 0.9).any())
    assert lucky / 200 > 0.1


def test_selection_precision_needs_one_class_per_image():
    with pytest.raises(ValueError, match="precision: is that of the best class only"):
        SelectionConfig(precision=0.9, classes_per_image=2)
