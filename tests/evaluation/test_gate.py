import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from ns.config.loader import parse_experiment
from ns.config.schema import CORRUPTIONS, PERTURBATIONS, GateConfig
from ns.core.errors import ConfigError
from ns.evaluation.accuracy import build_predictions_table, summarize_predictions
from ns.evaluation.gate import (
    GateCondition,
    LabelQuality,
    PairedCounts,
    beats_chance,
    corruption_rise,
    count_pairs,
    evaluate_gate,
    find_lost_classes,
    find_worst_class_drop,
    flip_rise,
    mcnemar_p_value,
    paired_gain,
    required_gain,
)
from ns.evaluation.result import PerturbationResult, Robustness

LEVEL = 0.95


def make_verdict(gate: GateConfig, teacher: np.ndarray, student: np.ndarray, labels: np.ndarray | None = None, **facts):
    labels = np.zeros(len(teacher), np.uint16) if labels is None else labels
    return evaluate_gate(
        gate,
        generation=1,
        teacher="models/t",
        student="models/s",
        class_ids=labels,
        teacher_correct=teacher,
        student_correct=student,
        classes=("cat", "dog"),
        seed=0,
        **facts,
    )


def make_robustness(errors: dict[str, float], flips: dict[str, float] | None = None) -> Robustness:
    return Robustness(
        model="m", dataset="d", name="n", num_classes=10, imagenet=False, images=100, unreadable=0, subsample=None, seed=0,
        mode="float32", top1=0.9, severities=(1, 3), corruptions={kind: (rate, rate) for kind, rate in errors.items()}, frames=11,
        perturbations={kind: PerturbationResult(flip_probability=rate, top5_distance=1) for kind, rate in (flips or {}).items()},
        attacks=(), predictions_sha256="", seconds=0,
    )  # fmt: skip


@pytest.mark.parametrize(("images", "differ"), [(500, 0.16), (500, 0.01)])
def test_evaluate_gate_false_promotions_stay_at_level(images, differ):
    """10,000 pairs of models of equal accuracy: at most 5 % may be promoted at level 0.95, up to sampling error, also where the models
    differ on few images, so that the bound is often exactly 0."""
    rng = np.random.default_rng(0)
    pairs = 10_000
    # Each right where the other is wrong equally often in expectation.
    counts = rng.multinomial(images, [differ / 2, 1 - differ, differ / 2], size=pairs)
    seen, times = np.unique(counts, axis=0, return_counts=True)
    gate, promoted = GateConfig(level=LEVEL, resamples=1000), 0
    for (lost, _, won), count in zip(seen.tolist(), times.tolist(), strict=True):
        # Pairs with equal counts are judged alike, up to the bootstrap's seed.
        teacher, student = np.arange(images) >= won, np.ones(images, bool)
        student[images - lost :] = False
        promoted += count * make_verdict(gate, teacher, student).promoted
    assert promoted / pairs < (1 - LEVEL) + 3 * (0.05 * 0.95 / pairs) ** 0.5
    assert promoted / pairs > 0.03


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


def test_evaluate_gate_promotes_clear_gain():
    weak, strong = np.arange(200) < 120, np.arange(200) < 160
    assert make_verdict(GateConfig(), weak, strong).promoted
    refused = make_verdict(GateConfig(), strong, weak)
    assert not refused.promoted
    assert "lower 95% bound of the gain" in refused.reason


def test_evaluate_gate_equal_models_need_margin():
    same = np.arange(100) < 70
    assert make_verdict(GateConfig(min_gain=-0.01), same, same).promoted
    assert not make_verdict(GateConfig(min_gain=0.0), same, same).promoted
    assert not make_verdict(GateConfig(min_gain=0.001), same, same).promoted


def test_evaluate_gate_refuses_class_drop():
    labels = np.repeat(np.array([0, 1], np.uint16), 100)
    teacher = np.concatenate([np.arange(100) < 90, np.arange(100) < 50])
    student = np.concatenate([np.arange(100) < 70, np.arange(100) < 100])
    assert make_verdict(GateConfig(), teacher, student, labels).promoted
    refused = make_verdict(GateConfig(max_class_drop=0.1), teacher, student, labels)
    assert not refused.promoted
    assert refused.conditions[1].value == pytest.approx(0.2)
    assert (refused.conditions[1].name, refused.conditions[1].required) == ("class drop", 0.1)
    assert refused.reason == "largest loss of accuracy in a class (cat) is +0.200, must be at most +0.100"
    # A class that loses as much as it may passes.
    assert make_verdict(GateConfig(max_class_drop=0.5), np.arange(200) < 150, np.arange(200) >= 50, labels).conditions[1].passed


def test_evaluate_gate_records_comparison():
    teacher, student = np.arange(50_000) < 30_000, np.arange(50_000) >= 10_000
    gate = GateConfig(level=0.9, resamples=2000)
    verdict = make_verdict(gate, teacher, student)
    gain = paired_gain(teacher, student, level=0.9, resamples=2000, seed=0)
    assert (verdict.generation, verdict.teacher, verdict.student, verdict.images) == (1, "models/t", "models/s", 50_000)
    assert (verdict.teacher_top1, verdict.student_top1, verdict.level) == (0.6, 0.8, 0.9)
    assert (verdict.gain, verdict.gain_low, verdict.gain_high) == (gain.value, gain.low, gain.high)
    assert verdict.paired == PairedCounts(both=20_000, only_teacher=10_000, only_student=20_000, neither=0)
    assert verdict.mcnemar == mcnemar_p_value(verdict.paired) < 0.01
    detail = "lower 90% bound of the gain in top-1"
    assert verdict.conditions == (GateCondition.from_value("gain", gain.low, "above", 0, detail),)
    assert verdict.reason == f"gain +0.200, lower bound {gain.low:+.3f} > +0.000"


def test_find_worst_class_drop_is_negative_when_all_gain():
    labels = np.array([0, 0, 1, 1], np.uint16)
    drop, _ = find_worst_class_drop(labels, np.array([1, 0, 1, 0], bool), np.ones(4, bool))
    assert drop == -0.5


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


def answer(class_ids, right):
    """Answers of which the first `right` of each class are right, the others the next class."""
    class_ids, ranks = np.asarray(class_ids), np.empty(len(class_ids), int)
    for class_id in np.unique(class_ids):
        ranks[class_ids == class_id] = np.arange((class_ids == class_id).sum())
    is_right = ranks < np.asarray(right)[class_ids]
    return np.where(is_right, class_ids, (class_ids + 1) % (class_ids.max() + 1))


@pytest.mark.parametrize(
    ("images", "right", "expected"),
    [
        # Balanced classes: chance is 1 in 10, or 1 in 2.
        ([50] * 10, [5] * 10, False), ([50] * 10, [6] * 10, False), ([50] * 10, [7] * 10, True),
        ([250, 250], [131, 131], False), ([250, 250], [138, 138], True),
        # 95 % of one class: top-1 cannot show it, balanced accuracy does.
        ([10, 190], [0, 190], False), ([10, 190], [1, 190], False), ([10, 190], [5, 180], True), ([10, 190], [1, 170], False),
        # All of the only class: nothing shows that the images were looked at.
        ([40], [40], False),
    ],
)  # fmt: skip
def test_beats_chance(images, right, expected):
    class_ids = np.repeat(np.arange(len(images)), images)
    assert beats_chance(class_ids, answer(class_ids, right), seed=0) is expected


def test_beats_chance_of_few_images_of_many_classes():
    class_ids = np.arange(60) * 50
    predicted = np.random.default_rng(0).integers(0, 3000, 60)
    assert not beats_chance(class_ids, predicted, seed=0)
    predicted[:4] = class_ids[:4]
    assert beats_chance(class_ids, predicted, seed=0)


def test_beats_chance_rarely_by_luck():
    rng = np.random.default_rng(1)
    class_ids = np.repeat(np.arange(5), [2, 5, 10, 30, 153])
    passed = [beats_chance(class_ids, rng.choice(5, 200, p=rng.dirichlet(np.ones(5))), seed=0) for _ in range(200)]
    assert sum(passed) <= 12


def test_evaluate_gate_names_classes_that_student_lost():
    teacher, student = np.arange(100) < 60, np.arange(100) < 90
    verdict = make_verdict(GateConfig(), teacher, student, lost_classes=tuple("abcdefg"))
    assert verdict.promoted
    assert verdict.reason.endswith("; the student never predicts 7 classes that its teacher predicts: a, b, c, d, e and 2 more")


def test_evaluate_gate_refuses_less_robust_student():
    weak, strong = np.arange(200) < 120, np.arange(200) < 160
    teacher = make_robustness(dict.fromkeys(CORRUPTIONS, 0.4), dict.fromkeys(PERTURBATIONS, 0.1))
    student = make_robustness(dict.fromkeys(CORRUPTIONS, 0.42), dict.fromkeys(PERTURBATIONS, 0.12))
    assert corruption_rise(teacher, student) == pytest.approx(5)
    assert flip_rise(teacher, student) == pytest.approx(20)
    gate = GateConfig(max_mce_rise=6, max_mfr_rise=21)
    assert make_verdict(gate, weak, strong, robustness=(teacher, student)).promoted
    refused = make_verdict(GateConfig(max_mce_rise=4, max_mfr_rise=21), weak, strong, robustness=(teacher, student))
    assert not refused.promoted
    assert "mean corruption error" in refused.reason
    assert "+5.000, must be at most +4.000" in refused.reason
    assert [condition.passed for condition in refused.conditions] == [True, False, True]
    assert [condition.name for condition in refused.conditions] == ["gain", "mCE rise", "mFR rise"]
    assert [condition.required for condition in refused.conditions] == [0, 4, 21]
    twice = make_verdict(GateConfig(max_mce_rise=4, max_mfr_rise=10), weak, strong, robustness=(teacher, student))
    assert twice.reason == (
        "mean corruption error, in points above the teacher's 100, is +5.000, must be at most +4.000; "
        "mean flip rate, in points above the teacher's 100, is +20.000, must be at most +10.000"
    )
    assert not make_verdict(GateConfig(max_mfr_rise=19), weak, strong, robustness=(teacher, student)).promoted
    assert make_verdict(GateConfig(max_mce_rise=0), weak, strong, robustness=(teacher, teacher)).promoted


def test_corruption_rise_without_mistakes_and_extra_kinds():
    teacher = make_robustness({"fog": 0.0, "snow": 0.5, "saturate": 0.1})
    student = make_robustness({"fog": 0.01, "snow": 0.5, "saturate": 0.9})
    # 100 images at 2 severities: one mistake is 0.005.
    assert corruption_rise(teacher, student) == pytest.approx(50)
    assert flip_rise(teacher, student) is None


@pytest.mark.parametrize(("frames", "least"), [(11, 0.001), (2, 0.01), (0, 0.01)])
def test_flip_rise_counts_one_flip_at_least(frames, least):
    # 100 sequences, each of so many frames; 0 says that their number is not known.
    teacher, student = (make_robustness({}, {"tilt": rate}).model_copy(update={"frames": frames}) for rate in (0, 0.02))
    assert flip_rise(teacher, student) == pytest.approx(100 * 0.02 / least - 100)


@pytest.mark.parametrize(
    ("requirements", "name", "good", "bad", "reason"),
    [
        (
            {"max_churn": 0.2},
            "churn",
            LabelQuality(churn=0.2),
            LabelQuality(churn=0.31),
            "share of labels that changed since the generation before is +0.310, must be at most +0.200",
        ),
        (
            {"max_class_shrinkage": 0.5},
            "class shrinkage",
            LabelQuality(shrinkage=0.5, shrunk_class="dog"),
            LabelQuality(shrinkage=0.8, shrunk_class="dog"),
            "largest share of its kept images that a class lost (dog) is +0.800, must be at most +0.500",
        ),
        (
            {"min_audited_precision": 0.9},
            "audited precision",
            LabelQuality(audited_precision=(0.95, 0.9, 4000)),
            LabelQuality(audited_precision=(0.95, 0.89, 4000)),
            "lower 95% bound of the labels that are right (95.0% of 4,000 audited) is +0.890, must be at least +0.900",
        ),
    ],
)
def test_evaluate_gate_checks_label_quality(requirements, name, good, bad, reason):
    # Equal models show no gain, so only the condition on labels decides.
    same, gate = np.ones(50, bool), GateConfig(min_gain=-0.01, **requirements)
    assert make_verdict(gate, same, same, label_quality=good).promoted
    refused = make_verdict(gate, same, same, label_quality=bad)
    assert not refused.promoted
    assert refused.reason == reason
    value = bad.audited_precision[1] if bad.audited_precision else bad.churn or bad.shrinkage
    assert (refused.conditions[1].name, refused.conditions[1].value, refused.conditions[1].required) == (
        name,
        value,
        *requirements.values(),
    )
    # Without a requirement, or without labels of an earlier generation, there is no condition.
    assert len(make_verdict(GateConfig(min_gain=-0.01), same, same, label_quality=bad).conditions) == 1
    assert len(make_verdict(gate, same, same).conditions) == 1


@pytest.mark.parametrize(("required", "coverage", "promoted"), [("auto", 0.95, True), ("auto", 0.9, False), (0.9, 0.9, True)])
def test_class_coverage_is_a_condition(required, coverage, promoted):
    same = np.ones(50, bool)
    gate = GateConfig(min_gain=-0.01, min_class_coverage=required)
    verdict = make_verdict(gate, same, same, label_quality=LabelQuality(class_coverage=coverage))
    assert verdict.promoted == promoted
    assert verdict.conditions[-1].name == "class coverage"
    assert verdict.conditions[-1].required == (0.95 if required == "auto" else required)


@pytest.mark.parametrize("label_quality", [None, LabelQuality()])
def test_evaluate_gate_notes_missing_audit(label_quality):
    same = np.ones(50, bool)
    verdict = make_verdict(GateConfig(min_gain=-0.01, min_audited_precision=0.9), same, same, label_quality=label_quality)
    assert verdict.promoted
    assert verdict.reason == (
        "gain +0.000, lower bound +0.000 > -0.010; the labels are not audited, so gate.min_audited_precision = 0.9 was not checked"
    )
    assert "audited" not in make_verdict(GateConfig(min_gain=-0.01), same, same, label_quality=label_quality).reason


def test_evaluate_gate_needs_robustness_measured():
    same = np.ones(20, bool)
    with pytest.raises(ValueError, match="mCE rise must be at most 1"):
        make_verdict(GateConfig(max_mce_rise=1), same, same)


@pytest.mark.parametrize(
    ("gate", "evaluation", "message"),
    [
        ({"max_mce_rise": 2}, {}, r"x.yaml: gate.max_mce_rise: needs corruptions .* evaluation.suites \(now clean\)"),
        ({"max_mfr_rise": 2}, {"suites": ["corruptions"]}, r"gate.max_mfr_rise: needs perturbations"),
        (
            {"max_mce_rise": 2},
            {"suites": ["corruptions"], "corruptions": ["saturate"]},
            "gate.max_mce_rise: .* extra kinds only",
        ),
    ],
)
def test_gate_config_needs_suites(gate, evaluation, message):
    document = {"name": "x", "data": {"labeled": "a", "pool": "b", "heldout": "c"}, "gate": gate, "evaluation": evaluation}
    with pytest.raises(ConfigError, match=message):
        parse_experiment(document, "x.yaml")


def test_gate_evaluation_has_required_suites_only():
    evaluation = {"suites": ["clean", "corruptions", "perturbations", "attacks"], "images": 50}
    document = {"name": "x", "data": {"labeled": "a", "pool": "b", "heldout": "c"}, "evaluation": evaluation}
    assert parse_experiment(document, "x").gate_evaluation.suites == ()
    gate_evaluation = parse_experiment({**document, "gate": {"max_mce_rise": 1}}, "x").gate_evaluation
    assert (gate_evaluation.suites, gate_evaluation.images) == (("corruptions",), 50)


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


def test_required_gain_is_enough():
    teacher, student = np.arange(300) >= 20, np.arange(300) < 288
    refused = make_verdict(GateConfig(), teacher, student)
    assert not refused.promoted
    enough = required_gain(refused)
    assert enough.images is not None
    times = math.ceil(enough.images / 300)
    assert times > 1
    assert make_verdict(GateConfig(), np.tile(teacher, times + 1), np.tile(student, times + 1)).promoted
    assert not make_verdict(GateConfig(), np.tile(teacher, times - 1), np.tile(student, times - 1)).promoted
    assert enough.gain == pytest.approx(refused.gain - refused.gain_low)
    assert required_gain(make_verdict(GateConfig(), student, teacher)).images is None


@pytest.mark.parametrize(("gain", "images"), [(0.5, 226), (0.25, None), (0.125, None)])
def test_required_gain_images_grow_with_spread(gain, images):
    """By hand: 0.25 is required; at a gain of 0.5 chance explains 0.375, and 0.25 would still be too much on 225 images."""
    same = np.ones(100, bool)
    seen = make_verdict(GateConfig(min_gain=0.25), same, same).model_copy(update={"gain": gain, "gain_low": gain - 0.375})
    assert (required_gain(seen).gain, required_gain(seen).images) == (0.625, images)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 20), st.integers(0, 99))
def test_evaluate_gate_promotes_when_all_conditions_pass(drop, min_gain, rise, seed):
    rng = np.random.default_rng(seed)
    teacher, student = rng.random(80) < 0.5, rng.random(80) < 0.9
    labels = rng.integers(0, 2, 80).astype(np.uint16)
    before, after = (make_robustness(dict.fromkeys(CORRUPTIONS, float(rng.random()))) for _ in range(2))
    gate = GateConfig(min_gain=min_gain, max_class_drop=drop or None, max_mce_rise=rise)
    verdict = make_verdict(gate, teacher, student, labels, robustness=(before, after))
    assert verdict.promoted == all(condition.passed for condition in verdict.conditions)
    for condition in verdict.conditions:
        assert condition.passed == (
            condition.value > condition.required if condition.name == "gain" else condition.value <= condition.required
        )
        assert condition.passed or condition.detail in verdict.reason


def test_find_lost_classes():
    def summarize(predicted):
        table = build_predictions_table(list("abcd"), np.array([0, 0, 1, 2]), np.eye(4, dtype=np.float32)[predicted])
        fields = {"model": "m", "dataset": "d", "name": "n", "mode": "float32", "unreadable": 0, "predictions_sha256": "0"}
        return summarize_predictions(table, classes=("ant", "bee", "cat", "dog"), **fields)

    # No image is a dog; neither model predicts a bee.
    teacher, student = summarize([0, 0, 2, 3]), summarize([0, 0, 0, 0])
    assert find_lost_classes(teacher, student) == ("cat",)
    assert find_lost_classes(student, teacher) == ()
