import numpy as np
import pytest

from benchmarks.contrasts import Contrast, adjust_holm, bound_mean, contrast_errors, contrast_ratios, join_claims


@pytest.mark.parametrize(("seed_spread", "image_spread", "rest"), [(1, 0, 10), (0.2, 5, 10), (0, 10, 10), (1, 20, 0)])
def test_bound_mean_covers_the_true_mean(seed_spread, image_spread, rest):
    rng, covered, trials = np.random.default_rng(0), 0, 800
    for _ in range(trials):
        layout = (
            0.3
            + seed_spread * rng.standard_normal((5, 1))
            + image_spread * rng.standard_normal(200)
            + rest * rng.standard_normal((5, 200))
        )
        contrast = bound_mean(layout)
        covered += contrast.low <= 0.3 <= contrast.high
    # The measured rate is within 0.02 of the true one, at 99 %. More than 95 % is allowed: it only says less.
    assert covered / trials > 0.93


def test_bound_mean_is_students_t_over_the_seeds_if_images_do_not_differ():
    layout = np.repeat([[1.0], [2.0], [3.0]], 50, axis=1)
    contrast = bound_mean(layout)
    # t(0.975, 2) = 4.3027; the standard deviation of 1, 2, 3 is 1.
    assert contrast.high - contrast.value == pytest.approx(4.3027 / 3**0.5, abs=1e-4)
    assert contrast.p_value == pytest.approx(0.0742, abs=1e-3)


def test_bound_mean_of_one_seed_is_over_the_images():
    contrast = bound_mean(np.array([[0.0, 1.0] * 50]))
    assert contrast.high - contrast.value == pytest.approx(1.984 * 0.5025 / 10, rel=1e-3)
    assert bound_mean(np.zeros((5, 9))) == Contrast(0, 0, 0, 1)


def test_contrast_errors_counts_errors_avoided():
    control, student = np.zeros((2, 100), bool), np.zeros((2, 100), bool)
    control[:, :30], student[:, :20] = True, True
    contrast = contrast_errors(student, control)
    assert contrast.value == pytest.approx(0.1)
    assert contrast.change_unit(100).value == pytest.approx(10)
    assert 0 < contrast.low < 0.1 < contrast.high


def test_contrast_ratios_is_mean_of_kinds_with_the_interval_of_a_resampling():
    rng = np.random.default_rng(0)
    control = rng.binomial(3, [0.2, 0.5], (40, 60, 2))
    student = rng.binomial(3, [0.1, 0.4], (40, 60, 2))
    contrast = contrast_ratios(student, control)
    assert contrast.value == pytest.approx(1 - np.mean(student.mean((0, 1)) / control.mean((0, 1))))
    values = []
    for _ in range(400):
        seeds, images = rng.integers(0, 40, 40), rng.integers(0, 60, 60)
        drawn = student[seeds][:, images].mean((0, 1)) / control[seeds][:, images].mean((0, 1))
        values.append(1 - drawn.mean())
    # Without any effect of seeds or images, resampling both counts the rest several times.
    assert 0.4 < (contrast.high - contrast.low) / (3.92 * np.std(values)) < 1.1


def test_contrast_ratios_leaves_out_kinds_without_a_mistake_of_the_control():
    control, student = np.zeros((2, 50, 2)), np.zeros((2, 50, 2))
    control[:, :10, 0], student[:, :5, 0], student[:, :5, 1] = 1, 1, 1
    assert contrast_ratios(student, control).value == pytest.approx(0.5)
    assert contrast_ratios(student, np.zeros((2, 50, 2))) == Contrast(0, 0, 0, 1)


def test_adjust_holm():
    assert adjust_holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )


def test_join_claims_needs_all_above_zero():
    better, worse = Contrast(1, 0.5, 1.5, 0.01), Contrast(-1, -1.5, -0.5, 0.01)
    assert join_claims([better, better._replace(p_value=0.03)]) == 0.03
    assert join_claims([better, worse]) == 1
