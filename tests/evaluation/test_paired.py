import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, multinomial

from ns.evaluation.paired import (
    PairedCounts,
    bound_rise,
    count_by_class,
    count_pairs,
    exact_lower_bound,
    exact_p_value,
    find_class_drop,
    gain_p_value,
    mcnemar_p_value,
    paired_gain,
    relative_rise,
)

LEVEL = 0.95


def test_paired_gain_interval_covers_true_gain():
    rng = np.random.default_rng(1)
    held = 0
    for pair in range(1000):
        outcome = rng.choice([-1, 0, 1], p=[0.05, 0.85, 0.10], size=400)
        gain = paired_gain(outcome < 1, outcome > -1, level=LEVEL, resamples=1000, seed=pair)
        held += gain.low <= 0.05 <= gain.high
    assert held / 1000 == pytest.approx(2 * LEVEL - 1, abs=0.03)


def test_paired_gain_equals_resampling_images():
    rng = np.random.default_rng(2)
    teacher, student = rng.random(300) < 0.8, rng.random(300) < 0.85
    gain = paired_gain(teacher, student, level=LEVEL, resamples=20_000, seed=0)
    difference = student.astype(int) - teacher.astype(int)
    means = difference[rng.integers(0, 300, (20_000, 300))].mean(1)
    assert gain.value == pytest.approx(difference.mean())
    assert gain.low == pytest.approx(np.quantile(means, 0.05), abs=0.004)
    assert gain.high == pytest.approx(np.quantile(means, 0.95), abs=0.004)


@pytest.mark.parametrize(("teacher", "student"), [(3, 4), (0, 0)])
def test_paired_gain_refuses_unequal_or_no_inputs(teacher, student):
    with pytest.raises(ValueError, match=rf"one non-zero length, got \({teacher},\) and \({student},\)"):
        paired_gain(np.ones(teacher, bool), np.ones(student, bool), level=LEVEL, resamples=1000, seed=0)


def test_paired_gain_of_one_image():
    gain = paired_gain(np.zeros(1, bool), np.ones(1, bool), level=LEVEL, resamples=1000, seed=0)
    assert (gain.value, gain.low, gain.high) == (1, 1, 1)


def test_paired_gain_is_reproducible():
    teacher, student = np.arange(1000) < 600, np.arange(1000) >= 300
    first, again, other = (paired_gain(teacher, student, level=LEVEL, resamples=1000, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_count_pairs_and_mcnemar_match_scipy(answers):
    teacher, student = (np.array(column) for column in zip(*answers, strict=True))
    paired = count_pairs(teacher, student)
    assert paired.images == len(answers)
    assert (paired.both, paired.only_teacher) == (answers.count((True, True)), answers.count((True, False)))
    assert (paired.only_student, paired.neither) == (answers.count((False, True)), answers.count((False, False)))
    discordant = paired.only_teacher + paired.only_student
    assert mcnemar_p_value(paired) == pytest.approx(binomtest(paired.only_teacher, discordant).pvalue if discordant else 1)


def test_mcnemar_p_value_of_many_images():
    # Of 2,000,000 images; by the normal approximation with continuity correction.
    z = (10_300 - 10_000 - 1) / 20_300**0.5
    expected = math.erfc(z / 2**0.5)
    assert mcnemar_p_value(
        PairedCounts(both=1_900_000, only_teacher=10_000, only_student=10_300, neither=79_700)
    ) == pytest.approx(expected, rel=0.01)


# The exact test


def enumerate_p_value(more: int, less: int, images: int, margin: float, shares: np.ndarray | None = None) -> float:
    """By the definition: every outcome whose statistic is as large, at each of these shares of `less` outcomes, or of 400."""
    from ns.evaluation.paired import _score

    outcomes = np.array([(a, b, images - a - b) for a in range(images + 1) for b in range(images + 1 - a)])
    score = _score(outcomes[:, 0], outcomes[:, 1], images, margin)
    extreme = outcomes[score >= _score(np.array([more]), np.array([less]), images, margin) - 1e-9]
    if shares is None:
        shares = np.linspace(max(0.0, -margin), (1 - margin) / 2, 400)
    tails = [multinomial(images, [q + margin, q, max(0, 1 - 2 * q - margin)]).pmf(extreme).sum() for q in shares]
    return max(tails)


@pytest.mark.parametrize(
    ("more", "less", "images", "margin"),
    [(5, 1, 20, 0.0), (8, 2, 20, 0.1), (0, 0, 12, -0.2), (1, 2, 15, -0.3), (6, 0, 30, 0.05)],
)
def test_exact_p_value_equals_enumeration(more, less, images, margin):
    assert exact_p_value(more, less, images, margin) == pytest.approx(enumerate_p_value(more, less, images, margin), rel=0.02)


def test_exact_p_value_where_models_agree_on_few_images():
    """Below 0 the least favorable share may be close to its greatest value, where one or two images are expected to be alike."""
    images, margin = 100, -0.05
    worst = enumerate_p_value(1, 0, images, margin, (1 - np.linspace(0.5, 3, 6) / images - margin) / 2)
    assert worst * 0.999 <= exact_p_value(1, 0, images, margin) <= worst * 1.02


def test_exact_p_value_of_simple_cases():
    # Without any discordant image, a margin of 1 % takes 299 images: 0.99²⁹⁹ is below 5 %.
    assert exact_p_value(0, 0, 298, -0.01) == pytest.approx(0.99**298, rel=1e-6)
    assert exact_p_value(0, 0, 298, -0.01) > 0.05 > exact_p_value(0, 0, 299, -0.01)
    assert exact_p_value(0, 10, 10, -1.0) == 0
    # Of many images, the statistic is nearly normal, except where few are discordant, which may be the least favorable case.
    normal = math.erfc(300 / 20_300**0.5 / 2**0.5) / 2
    assert normal < exact_p_value(10_300, 10_000, 200_000, 1e-9) < 1.2 * normal


def test_exact_lower_bound_inverts_test():
    low = exact_lower_bound(25, 1, 50, 0.999)
    assert exact_p_value(25, 1, 50, low - 2e-4) < 0.001 < exact_p_value(25, 1, 50, low + 2e-4)
    assert exact_lower_bound(25, 1, 50, 0.999, between=(0.1, 0.4)) == pytest.approx(low, abs=2e-4)
    # Nothing lies below -1: that all images were lost is certain.
    assert exact_lower_bound(0, 9, 9, 0.95) == -1


@pytest.mark.parametrize(("won", "lost", "passes"), [(4, 0, False), (5, 0, True), (5, 1, False), (7, 1, True)])
def test_gain_p_value_needs_five_discordant_images(won, lost, passes):
    paired = PairedCounts(both=400, only_teacher=lost, only_student=won, neither=100)
    assert gain_p_value(paired, 0.0) == pytest.approx(binomtest(won, won + lost, alternative="greater").pvalue)
    assert (gain_p_value(paired, 0.0) <= 0.05) == passes
    # What is not above 0 is not above more than 0 either; a margin below 0 is another question.
    assert gain_p_value(paired, 0.001) >= gain_p_value(paired, 0.0) >= gain_p_value(paired, -0.001)


# Classes


def test_count_by_class_and_find_class_drop():
    class_ids = np.repeat([0, 2], 100)
    teacher = np.concatenate([np.arange(100) < 90, np.arange(100) < 50])
    student = np.concatenate([np.arange(100) < 40, np.arange(100) < 100])
    lost, won, images = count_by_class(class_ids, teacher, student)
    assert (lost.tolist(), won.tolist(), images.tolist()) == ([50, 0, 0], [0, 0, 50], [100, 0, 100])
    drop = find_class_drop(lost, won, images, limit=0.1, level=LEVEL)
    assert (drop.class_id, drop.images, drop.value) == (0, 100, 0.5)
    # Two classes share the level.
    assert drop.low == pytest.approx(exact_lower_bound(50, 0, 100, 0.975), abs=2e-4)
    assert 0.3 < drop.low < 0.5
    gained = find_class_drop(won, lost, images, limit=0.1, level=LEVEL)
    assert (gained.class_id, gained.value) == (2, 0.5)
    assert find_class_drop(np.array([0]), np.array([3]), np.array([4]), limit=0.1, level=LEVEL).value == -0.75


def refuse_share(shares, classes, images, *, limit, runs, seed, worse=None) -> float:
    """Share of `runs` in which a class seems to lose more than the limit. `shares`: of images that a class loses and wins."""
    rng, refused = np.random.default_rng(seed), 0
    for _ in range(runs):
        counts = rng.multinomial(images, [*shares, 1 - sum(shares)], classes)
        if worse:
            counts[0] = rng.multinomial(images, [*worse, 1 - sum(worse)])
        drop = find_class_drop(counts[:, 0], counts[:, 1], np.full(classes, images), limit=limit, level=LEVEL)
        refused += drop.low > limit
    return refused / runs


@pytest.mark.parametrize(("classes", "images", "runs"), [(1000, 50, 100), (100, 50, 100), (10, 300, 15)])
def test_find_class_drop_keeps_equal_models(classes, images, runs):
    """Compared with the limit, the largest drop as measured refuses most of them: 0.1 is 1.6 standard deviations of 50 images."""
    assert refuse_share((0.1, 0.1), classes, images, limit=0.1, runs=runs, seed=0) == 0
    assert refuse_share((0.1, 0.1), classes, images, limit=0.005, runs=runs, seed=1) <= 0.05


def test_find_class_drop_holds_its_level_at_the_limit():
    """All of ten classes lose exactly as much as they may."""
    assert refuse_share((0.2, 0.1), 10, 50, limit=0.1, runs=1000, seed=2) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)


@pytest.mark.parametrize(("classes", "images", "drop"), [(1000, 50, 0.7), (100, 50, 0.6), (10, 300, 0.3)])
def test_find_class_drop_refuses_large_drop_of_one_class(classes, images, drop):
    assert refuse_share((0.1, 0.1), classes, images, limit=0.1, runs=20, seed=3, worse=(drop + 0.05, 0.05)) >= 0.8


# Robustness


def draw_mistakes(rng, images, *, kinds=15, easy=-1.0, rise=0.0):
    """Mistakes of two models at five severities, uint8 [N, kinds] each. Images differ in difficulty, for each model in part alike."""
    difficulty = rng.normal(0, 1.5, (images, 1, 1)) + np.linspace(-1.5, 1.5, kinds)[:, None] + np.linspace(-1, 1, 5) + easy
    drawn = []
    for extra in (0.0, rise):
        logit = difficulty + extra + rng.normal(0, 1, (images, 1, 1)) + rng.normal(0, 1, (images, kinds, 1))
        drawn.append((rng.random((images, kinds, 5)) < 1 / (1 + np.exp(-logit))).sum(2, dtype=np.uint8))
    return drawn


def refuse_rises(images, limit, runs=150, **options):
    """Shares of models that a limit refuses by the lower bound, and by the rise as measured."""
    rng, refused, above = np.random.default_rng(0), 0, 0
    for run in range(runs):
        teacher, student = draw_mistakes(rng, images, **options)
        refused += bound_rise(teacher, student, level=LEVEL, resamples=1000, seed=run) > limit
        above += relative_rise(teacher.sum(0), student.sum(0)) > limit
    return refused / runs, above / runs


def test_bound_rise_keeps_equal_models_that_the_measured_rise_refuses():
    refused, above = refuse_rises(300, 2.0)
    assert refused <= 0.05
    assert above > 0.25


def test_bound_rise_of_rare_mistakes_is_not_biased():
    """With one mistake in 20, the rise of equal models is 3 points on average, and a percentile bootstrap refuses one in ten."""
    assert refuse_rises(300, 2.0, easy=-4.5)[0] <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 150)


def test_bound_rise_of_rare_flips_is_nearly_at_its_level():
    """Kinds in which a teacher flips 2 to 500 times on 300 images: the hardest case for a bootstrap, at a limit of exactly 0."""
    rng, rates, refused = np.random.default_rng(0), np.geomspace(0.002, 0.3, 10), 0
    for run in range(150):
        restless = rng.gamma(0.5, 2, (300, 1))
        shares = (np.minimum(1, rates * restless * rng.gamma(2, 0.5, (300, 1))) for _ in range(2))
        teacher, student = (rng.binomial(6, share).astype(np.uint8) for share in shares)
        refused += bound_rise(teacher, student, level=LEVEL, resamples=1000, seed=run) > 0
    assert refused / 150 <= 0.08


def test_bound_rise_refuses_less_robust_student():
    assert refuse_rises(300, 2.0, runs=40, rise=0.8)[0] >= 0.9


def test_relative_rise_counts_one_mistake_at_least():
    # Kinds without a mistake of the teacher count as if there were one.
    assert relative_rise(np.array([0, 100]), np.array([2, 100])) == pytest.approx(50)
    assert relative_rise(np.array([[4, 2], [1, 1]]), np.array([[5, 2], [1, 3]])) == pytest.approx([12.5, 100])


def test_bound_rise_of_same_answers_is_zero():
    teacher, _ = draw_mistakes(np.random.default_rng(0), 50)
    assert bound_rise(teacher, teacher, level=LEVEL, resamples=1000, seed=0) == 0
    # One image says nothing of others.
    assert bound_rise(teacher[:1], teacher[:1] + 1, level=LEVEL, resamples=1000, seed=0) == -math.inf


def test_bound_rise_resamples_images_together():
    """The bound is that of a bootstrap written plainly, up to its correction for bias and skew, which is small here."""
    teacher, student = draw_mistakes(np.random.default_rng(3), 400, rise=0.3)
    rows = np.random.default_rng(1).integers(0, 400, (3000, 400))
    plain = np.quantile(relative_rise(teacher[rows].sum(1), student[rows].sum(1)), 0.05)
    assert bound_rise(teacher, student, level=LEVEL, resamples=3000, seed=2) == pytest.approx(plain, abs=0.5)
