import pytest

from ns.evaluation.result import AttackResult, Robustness, is_imagenet

IMAGENET = ("n01440764", *(f"n{number:08d}" for number in range(2_000_000, 2_000_998)), "n15075141")
"""As many names as ImageNet has, of the same form, from the same first to the same last."""


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (IMAGENET, True),
        (IMAGENET[:-1], False),
        (IMAGENET[:500] + IMAGENET[501:], False),
        (("n01440763", *IMAGENET[1:]), False),
        ((*IMAGENET[:-1], "n15075142"), False),
        ((IMAGENET[0], IMAGENET[2], IMAGENET[1], *IMAGENET[3:]), False),
        ((*IMAGENET[:500], f"{IMAGENET[500]}0", *IMAGENET[501:]), False),
        ((), False),
    ],
    ids=[
        "all",
        "without the last",
        "one fewer",
        "another first",
        "another last",
        "out of order",
        "a name of another form",
        "none",
    ],
)
def test_is_imagenet(classes, expected):
    assert is_imagenet(classes) is expected


def test_attack_result_str():
    attack = AttackResult(name="pgd", epsilon=2.0, steps=10, step_size=0.5, top1=0.3)
    assert str(attack) == "pgd-2-10"
    # Of one step it goes without saying.
    assert str(attack.model_copy(update={"name": "fgsm", "epsilon": 0.5, "steps": 1})) == "fgsm-0.5"


def test_robustness_digest_ignores_seconds():
    result = Robustness(
        model="m", dataset="d", name="n", num_classes=10, imagenet=False, images=100, unreadable=0, subsample=None, seed=0,
        mode="float32", top1=0.9, severities=(1, 3), corruptions={"fog": (0.25, 0.5)}, frames=0, perturbations={}, attacks=(),
        predictions_sha256="", seconds=1,
    )  # fmt: skip
    assert result.digest == result.model_copy(update={"seconds": 2}).digest != result.model_copy(update={"seed": 1}).digest
    assert result.mean_corruption_errors() == {"fog": 0.375}
