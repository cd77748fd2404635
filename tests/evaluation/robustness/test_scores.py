"""The scores of robustness against published numbers and against a plain loop."""

import itertools

import numpy as np
import pytest

from ns.config.schema import CORRUPTIONS, EXTRA_CORRUPTIONS, PERTURBATIONS
from ns.data.subsample import Subsample
from ns.evaluation.result import AttackResult, PerturbationResult, Robustness
from ns.evaluation.robustness.scores import (
    ALEXNET_ERROR,
    ALEXNET_FLIPS,
    flip_rates,
    relative_score,
    score_robustness,
    top5_distances,
)

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
def test_relative_score_gives_published_mce_and_mfr(model):
    mce, errors, mfr, flipped = PUBLISHED[model]
    assert relative_score({kind: value / 100 for kind, value in zip(ALEXNET_ERROR, errors, strict=True)}, ALEXNET_ERROR) == (
        pytest.approx(mce, abs=0.005)
    )
    assert relative_score({kind: value / 100 for kind, value in zip(ALEXNET_FLIPS, flipped, strict=True)}, ALEXNET_FLIPS) == (
        pytest.approx(mfr, abs=0.005)
    )


def test_relative_score_of_alexnet_is_100():
    assert relative_score(ALEXNET_ERROR, ALEXNET_ERROR) == pytest.approx(100)
    assert relative_score(dict.fromkeys(ALEXNET_ERROR, 0.0), ALEXNET_ERROR) == 0
    assert relative_score({"fog": 0.5}, ALEXNET_ERROR) is None
    assert relative_score({"fog": 0.5}, {"fog": 0.0}) is None
    assert relative_score({"fog": 0.5}, {}) is None


@pytest.mark.parametrize("noise", [True, False])
def test_flip_rates_count_from_reference_frame(noise):
    top = np.random.default_rng(0).integers(0, 3, (20, 6))
    expected = []
    for row in top.tolist():
        pairs = [(row[0], other) for other in row[1:]] if noise else list(itertools.pairwise(row))
        expected.append(sum(one != other for one, other in pairs) / len(pairs))
    assert flip_rates(top, noise) == pytest.approx(expected)


@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("classes", [5, 7, 40])
def test_top5_distances_follow_definition(noise, classes):
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


def test_top5_distances_of_equal_frames_are_zero():
    still = np.tile(np.arange(5), (3, 4, 1))
    assert not flip_rates(still[:, :, 0], False).any()
    assert not top5_distances(still, True).any()


def make_robustness(error=0.5, flip=0.1, distance=1.0, **fields) -> Robustness:
    kinds = (*CORRUPTIONS, *EXTRA_CORRUPTIONS)
    options = {
        "model": "m",
        "dataset": "d",
        "name": "n",
        "num_classes": 10,
        "imagenet": False,
        "images": 100,
        "unreadable": 0,
        "subsample": None,
        "seed": 0,
        "mode": "float32",
        "top1": 0.9,
        "severities": (1, 2, 3, 4, 5),
        "corruptions": dict.fromkeys(kinds, (error,) * 5),
        "frames": 31,
        "perturbations": {kind: PerturbationResult(flip_probability=flip, top5_distance=distance) for kind in PERTURBATIONS},
        "attacks": (AttackResult(name="pgd", epsilon=16, steps=10, step_size=4, top1=0.1),),
        "predictions_sha256": "0",
        "seconds": 1.0,
    }
    return Robustness(**{**options, **fields})


def test_score_robustness_is_relative_to_reference():
    result = score_robustness(make_robustness(error=0.3, flip=0.05, distance=0.5), make_robustness(error=0.6, flip=0.2))
    assert result.mce == pytest.approx(50)
    assert result.mfr == pytest.approx(25)
    assert result.mt5d == pytest.approx(50)
    assert (result.mce_relative_to, result.mfr_relative_to) == ("reference", "reference")
    assert result.corruption_error == pytest.approx(0.3)
    own = make_robustness()
    assert score_robustness(own, own).mce == pytest.approx(100)


def test_score_robustness_is_relative_to_alexnet_on_imagenet():
    alexnet = make_robustness(
        imagenet=True,
        corruptions={kind: (value,) * 5 for kind, value in ALEXNET_ERROR.items()} | {"spatter": (1.0,) * 5},
        perturbations={
            kind: PerturbationResult(flip_probability=value, top5_distance=1.0) for kind, value in ALEXNET_FLIPS.items()
        },
    )
    result = score_robustness(alexnet, make_robustness(error=0.01))
    assert result.mce == pytest.approx(100)
    assert result.mfr == pytest.approx(100)
    assert (result.mce_relative_to, result.mfr_relative_to) == ("AlexNet", "AlexNet")
    assert result.mt5d == pytest.approx(100)  # relative to the reference: there is no published one


@pytest.mark.parametrize(
    "other",
    [
        None,
        make_robustness(dataset="other"),
        make_robustness(subsample=Subsample(images=7, seed=0)),
    ],
)
def test_score_robustness_needs_reference_on_same_images(other):
    result = score_robustness(make_robustness(), other)
    assert (result.mce, result.mce_relative_to, result.mfr, result.mt5d) == (None, None, None, None)
    assert result.corruption_error == pytest.approx(0.5)


def test_score_robustness_needs_all_corruptions_for_mce():
    part = make_robustness(imagenet=True, corruptions={"fog": (0.5,) * 5})
    assert score_robustness(part).mce is None
    assert (
        score_robustness(make_robustness(imagenet=True, severities=(3,), corruptions=dict.fromkeys(CORRUPTIONS, (0.5,)))).mce
        is None
    )


def test_score_robustness_ignores_extra_corruptions():
    worse = make_robustness(
        corruptions={kind: (1.0 if kind in EXTRA_CORRUPTIONS else 0.5,) * 5 for kind in (*CORRUPTIONS, "spatter")}
    )
    result = score_robustness(worse, make_robustness())
    assert result.corruption_error == pytest.approx(0.5)
    assert result.mce == pytest.approx(100)
