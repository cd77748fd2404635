import pytest

from ns.config.schema import CORRUPTIONS, EXTRA_CORRUPTIONS, PERTURBATIONS
from ns.evaluation.result import AttackResult, PerturbationResult, Robustness, Subsample
from ns.evaluation.robustness.averages import ALEXNET_ERROR, ALEXNET_FLIPS
from ns.evaluation.robustness.relative_scores import score_robustness


def robustness(error=0.5, flip=0.1, distance=1.0, **fields) -> Robustness:
    kinds = (*CORRUPTIONS, *EXTRA_CORRUPTIONS)
    options = {
        "model": "m",
        "dataset": "d",
        "name": "n",
        "classes": 10,
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


def test_elsewhere_than_on_imagenet_a_reference_is_divided_by():
    found = score_robustness(robustness(error=0.3, flip=0.05, distance=0.5), robustness(error=0.6, flip=0.2))
    assert found.mce == pytest.approx(50)
    assert found.mfr == pytest.approx(25)
    assert found.mt5d == pytest.approx(50)
    assert (found.mce_relative_to, found.mfr_relative_to) == ("reference", "reference")
    assert found.corruption_error == pytest.approx(0.3)
    own = robustness()
    assert score_robustness(own, own).mce == pytest.approx(100)


def test_on_imagenet_alexnet_is_divided_by_whatever_the_reference():
    alexnet = robustness(
        imagenet=True,
        corruptions={kind: (value,) * 5 for kind, value in ALEXNET_ERROR.items()} | {"spatter": (1.0,) * 5},
        perturbations={
            kind: PerturbationResult(flip_probability=value, top5_distance=1.0) for kind, value in ALEXNET_FLIPS.items()
        },
    )
    found = score_robustness(alexnet, robustness(error=0.01))
    assert found.mce == pytest.approx(100)
    assert found.mfr == pytest.approx(100)
    assert (found.mce_relative_to, found.mfr_relative_to) == ("AlexNet", "AlexNet")
    assert found.mt5d == pytest.approx(100)  # relative to the reference: there is no published one


@pytest.mark.parametrize(
    "other",
    [
        None,
        robustness(dataset="other"),
        robustness(subsample=Subsample(images=7, seed=0)),
    ],
)
def test_there_is_no_score_without_a_reference_that_saw_the_same_images(other):
    found = score_robustness(robustness(), other)
    assert (found.mce, found.mce_relative_to, found.mfr, found.mt5d) == (None, None, None, None)
    assert found.corruption_error == pytest.approx(0.5)


def test_a_part_of_the_corruptions_makes_no_published_mce():
    part = robustness(imagenet=True, corruptions={"fog": (0.5,) * 5})
    assert score_robustness(part).mce is None
    assert (
        score_robustness(robustness(imagenet=True, severities=(3,), corruptions=dict.fromkeys(CORRUPTIONS, (0.5,)))).mce is None
    )


def test_extra_corruptions_count_for_nothing():
    worse = robustness(
        corruptions={kind: (1.0 if kind in EXTRA_CORRUPTIONS else 0.5,) * 5 for kind in (*CORRUPTIONS, "spatter")}
    )
    found = score_robustness(worse, robustness())
    assert found.corruption_error == pytest.approx(0.5)
    assert found.mce == pytest.approx(100)
