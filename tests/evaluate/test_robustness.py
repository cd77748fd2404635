"""The formulas of robustness against the published numbers (`noisy_student.md` §6.4), and against a plain loop."""

import itertools

import numpy as np
import pytest

from ns.evaluate.robustness import ALEXNET_ERROR, ALEXNET_FLIPS, flips, relative, top5_distances

WSL_FLIPS = (5.847, 6.991, 2.842, 2.323, 3.667, 1.536, 2.416, 3.469, 2.149, 4.619)
"""Of ResNeXt-101 WSL 32x48d, %, in the order of the table."""


def test_published_flip_rates_give_the_published_mfr():
    measured = {kind: value / 100 for kind, value in zip(ALEXNET_FLIPS, WSL_FLIPS, strict=True)}
    assert relative(measured, ALEXNET_FLIPS) == pytest.approx(27.83, abs=0.005)


def test_alexnet_has_a_hundred():
    assert relative(ALEXNET_ERROR, ALEXNET_ERROR) == pytest.approx(100)
    assert relative(dict.fromkeys(ALEXNET_ERROR, 0.0), ALEXNET_ERROR) == 0
    assert relative({"fog": 0.5}, ALEXNET_ERROR) is None
    assert relative({"fog": 0.5}, {"fog": 0.0}) is None
    assert relative({"fog": 0.5}, {}) is None


@pytest.mark.parametrize("noise", [True, False])
def test_flips_are_counted_from_the_reference_frame(noise):
    top = np.random.default_rng(0).integers(0, 3, (20, 6))
    expected = []
    for row in top.tolist():
        pairs = [(row[0], other) for other in row[1:]] if noise else list(itertools.pairwise(row))
        expected.append(sum(one != other for one, other in pairs) / len(pairs))
    assert flips(top, noise) == pytest.approx(expected)


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
    assert not flips(still[:, :, 0], False).any()
    assert not top5_distances(still, True).any()
