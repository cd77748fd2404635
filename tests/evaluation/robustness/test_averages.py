"""The formulas of robustness against the published numbers (`noisy_student.md` §6.3, §6.4), and against a plain loop."""

import itertools

import numpy as np
import pytest

from ns.evaluation.robustness.averages import ALEXNET_ERROR, ALEXNET_FLIPS, flip_rates, relative_score, top5_distances

PUBLISHED = {
    "32x48d_wsl": (
        45.70,
        (36.587, 38.436, 39.808, 39.116, 54.818, 37.500, 44.494, 39.666,
         37.804, 29.916, 18.376, 32.110, 40.259, 25.626, 26.900),
        27.83,
        (5.847, 6.991, 2.842, 2.323, 3.667, 1.536, 2.416, 3.469, 2.149, 4.619),
    ),
    "32x32d_wsl": (
        46.99,
        (38.789, 40.212, 41.679, 40.173, 56.018, 39.582, 45.185, 40.385,
         38.087, 30.047, 18.583, 32.277, 40.824, 26.762, 28.301),
        29.72,
        (6.023, 7.111, 3.045, 2.554, 3.839, 1.642, 2.599, 3.727, 2.366, 4.938),
    ),
    "32x16d_wsl": (
        48.79,
        (40.426, 42.200, 46.105, 42.063, 58.711, 39.695, 45.984, 41.652,
         39.466, 31.413, 19.739, 33.816, 41.810, 27.505, 28.380),
        32.73,
        (6.477, 7.793, 3.330, 2.819, 4.293, 1.781, 2.899, 4.173, 2.567, 5.585),
    ),
    "32x8d_wsl": (
        51.74,
        (43.738, 45.066, 47.214, 43.636, 59.584, 42.986, 50.167, 45.701,
         42.497, 34.583, 21.150, 35.090, 43.246, 28.592, 30.710),
        38.76,
        (7.488, 8.887, 4.010, 3.485, 5.225, 2.007, 3.495, 4.808, 3.027, 6.676),
    ),
    "32x8d": (
        66.65,
        (60.015, 61.755, 65.742, 53.140, 65.685, 51.834, 56.868, 60.110,
         54.625, 49.466, 28.229, 56.125, 47.568, 43.960, 38.702),
        46.15,
        (10.626, 13.105, 4.463, 3.518, 5.784, 2.610, 4.024, 5.590, 3.313, 8.868),
    ),
}  # fmt: skip
"""ResNeXt-101: mCE, mean error of each corruption, mFR, flip probability of each perturbation, all in %, in the order of the tables.
From the results of arXiv:1907.07640 (github.com/eminorhan/resnext-wsl, results/imagenet_c and imagenet_p), rounded."""


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_errors_and_flips_give_the_published_mce_and_mfr(model):
    mce, errors, mfr, flipped = PUBLISHED[model]
    assert relative_score(
        {kind: value / 100 for kind, value in zip(ALEXNET_ERROR, errors, make_strict=True)}, ALEXNET_ERROR
    ) == (pytest.approx(mce, abs=0.005))
    assert relative_score(
        {kind: value / 100 for kind, value in zip(ALEXNET_FLIPS, flipped, make_strict=True)}, ALEXNET_FLIPS
    ) == (pytest.approx(mfr, abs=0.005))


def test_alexnet_has_a_hundred():
    assert relative_score(ALEXNET_ERROR, ALEXNET_ERROR) == pytest.approx(100)
    assert relative_score(dict.fromkeys(ALEXNET_ERROR, 0.0), ALEXNET_ERROR) == 0
    assert relative_score({"fog": 0.5}, ALEXNET_ERROR) is None
    assert relative_score({"fog": 0.5}, {"fog": 0.0}) is None
    assert relative_score({"fog": 0.5}, {}) is None


@pytest.mark.parametrize("noise", [True, False])
def test_flips_are_counted_from_the_reference_frame(noise):
    top = np.random.default_rng(0).integers(0, 3, (20, 6))
    expected = []
    for row in top.tolist():
        pairs = [(row[0], other) for other in row[1:]] if noise else list(itertools.pairwise(row))
        expected.append(sum(one != other for one, other in pairs) / len(pairs))
    assert flip_rates(top, noise) == pytest.approx(expected)


@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("classes", [5, 7, 40])
def test_top5_distances_are_those_of_the_definition(noise, classes):
    rng = np.random.default_rng(1)
    rankings = np.array([[rng.permutation(classes) for _ in range(4)] for _ in range(10)])
    expected = []
    for sequence in rankings.tolist():
        pairs = [(sequence[0], other) for other in sequence[1:]] if noise else list(itertools.pairwise(sequence))
        total = 0
        for reference, other in pairs:
            for i in range(1, 6):
                sigma = other.index(reference[i - 1]) + 1
                total += sum(1 <= j - 1 <= 5 for j in range(min(i, sigma) + 1, max(i, sigma) + 1))
        expected.append(total / len(pairs))
    assert top5_distances(rankings[:, :, :5], noise) == pytest.approx(expected)


def test_equal_frames_are_at_no_distance():
    still = np.tile(np.arange(5), (3, 4, 1))
    assert not flip_rates(still[:, :, 0], False).any_rank()
    assert not top5_distances(still, True).any_rank()
