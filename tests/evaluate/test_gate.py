import numpy as np
import pytest

from ns.config import GateConfig
from ns.evaluate.gate import beats_chance, judge, paired_gain, worst_class_drop

LEVEL = 0.95


def verdict(gate: GateConfig, teacher: np.ndarray, student: np.ndarray, labels: np.ndarray | None = None):
    labels = np.zeros(len(teacher), np.uint16) if labels is None else labels
    return judge(
        gate,
        generation=1,
        teacher="models/t",
        student="models/s",
        labels=labels,
        teacher_correct=teacher,
        student_correct=student,
        classes=("cat", "dog"),
        seed=0,
    )


def test_false_promotions_stay_at_the_stated_level_on_equal_pairs():
    """10,000 pairs of models of equal accuracy: at most 5 % may be promoted at level 0.95, up to sampling error."""
    rng = np.random.default_rng(0)
    images, pairs, promoted = 500, 10_000, 0
    for pair in range(pairs):
        # Each wrong where the other is right on 8 % of the images, equally often in expectation.
        outcome = rng.choice([-1, 0, 1], p=[0.08, 0.84, 0.08], size=images)
        gain = paired_gain(outcome < 1, outcome > -1, level=LEVEL, resamples=1000, seed=pair)
        promoted += gain.low > 0
    assert promoted / pairs < (1 - LEVEL) + 3 * (0.05 * 0.95 / pairs) ** 0.5


def test_the_interval_holds_the_true_gain_as_often_as_it_says():
    rng = np.random.default_rng(1)
    held = 0
    for pair in range(1000):
        outcome = rng.choice([-1, 0, 1], p=[0.05, 0.85, 0.10], size=400)
        gain = paired_gain(outcome < 1, outcome > -1, level=LEVEL, resamples=1000, seed=pair)
        held += gain.low <= 0.05 <= gain.high
    assert held / 1000 == pytest.approx(2 * LEVEL - 1, abs=0.03)


def test_multinomial_draws_equal_resampling_the_images():
    rng = np.random.default_rng(2)
    teacher, student = rng.random(300) < 0.8, rng.random(300) < 0.85
    gain = paired_gain(teacher, student, level=LEVEL, resamples=20_000, seed=0)
    difference = student.astype(int) - teacher.astype(int)
    means = difference[rng.integers(0, 300, (20_000, 300))].mean(1)
    assert gain.value == pytest.approx(difference.mean())
    assert gain.low == pytest.approx(np.quantile(means, 0.05), abs=0.004)
    assert gain.high == pytest.approx(np.quantile(means, 0.95), abs=0.004)


def test_a_clear_gain_is_promoted_and_a_clear_loss_is_not():
    weak, strong = np.arange(200) < 120, np.arange(200) < 160
    assert verdict(GateConfig(), weak, strong).promoted
    refused = verdict(GateConfig(), strong, weak)
    assert not refused.promoted
    assert "lower 95% bound of the gain" in refused.reason


def test_equal_models_pass_only_a_margin():
    same = np.arange(100) < 70
    assert verdict(GateConfig(min_gain=-0.01), same, same).promoted
    assert verdict(GateConfig(min_gain=0.0), same, same).promoted
    assert not verdict(GateConfig(min_gain=0.001), same, same).promoted


def test_the_class_guard_refuses_a_gain_bought_with_one_class():
    labels = np.repeat(np.array([0, 1], np.uint16), 100)
    teacher = np.concatenate([np.arange(100) < 90, np.arange(100) < 50])
    student = np.concatenate([np.arange(100) < 70, np.arange(100) < 100])
    assert verdict(GateConfig(), teacher, student, labels).promoted
    guarded = verdict(GateConfig(max_class_drop=0.1), teacher, student, labels)
    assert not guarded.promoted
    assert guarded.guards[1].value == pytest.approx(0.2)
    assert "cat" in guarded.reason


def test_worst_class_drop_is_negative_when_all_gain():
    labels = np.array([0, 0, 1, 1], np.uint16)
    drop, _ = worst_class_drop(labels, np.array([1, 0, 1, 0], bool), np.ones(4, bool))
    assert drop == -0.5


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="one non-zero length"):
        paired_gain(np.ones(3, bool), np.ones(4, bool), level=LEVEL, resamples=1000, seed=0)


@pytest.mark.parametrize(
    ("top1", "images", "expected"), [(0.1, 500, False), (0.12, 500, False), (0.13, 500, True), (0.12, 5000, True)]
)
def test_chance_is_what_luck_explains(top1, images, expected):
    assert beats_chance(top1, images, classes=10) is expected
