import numpy as np
import pytest

from ns.config.schema import GateConfig
from ns.evaluation.paired import PairedCounts, bound_rise, exact_p_value, gain_p_value
from ns.evaluation.power import POWER, RISE_SPREADS, count_paired_images, find_seen_change, list_needs


@pytest.mark.parametrize("gain", [0.02, 0.05])
def test_gain_is_seen_with_the_stated_probability(gain):
    images = round(count_paired_images(gain, 0.0, 0.95))
    counts = np.random.default_rng(0).multinomial(images, [0.05 - gain / 2, 0.05 + gain / 2, 0.9], 2000)
    pairs = [PairedCounts(both=other, only_teacher=lost, only_student=won, neither=0) for lost, won, other in counts.tolist()]
    assert np.mean([gain_p_value(paired, 0.0) <= 0.05 for paired in pairs]) == pytest.approx(POWER, abs=0.04)


@pytest.mark.parametrize(("drop", "limit", "classes"), [(0.2, 0.1, 10), (0.3, 0.1, 100), (0.4, 0.05, 1000)])
def test_class_drop_is_seen_with_at_least_about_the_stated_probability(drop, limit, classes):
    level = 1 - 0.05 / classes
    images = round(count_paired_images(drop, limit, level))
    lost = np.random.default_rng(0).binomial(images, drop, 1000)
    seen, times = np.unique(lost, return_counts=True)
    rejected = [exact_p_value(int(count), 0, images, limit) <= 1 - level for count in seen]
    # At a high level and of few images, the normal approximation asks for too many.
    assert POWER - 0.05 < times @ rejected / 1000 < 0.97


def test_rise_is_seen_with_about_the_stated_probability():
    """One kind, at a spread of 100 points an image: the rise of 20 points above 10 takes 619 images."""
    gate = GateConfig(max_mce_rise=10)
    (images,) = (
        need.images for need in list_needs(gate, 2) if need.field == "max_mce_rise" and need.change == pytest.approx(20)
    )
    assert images == 619
    rng, refused = np.random.default_rng(0), 0
    for run in range(100):
        teacher = rng.poisson(20, (images, 1))
        student = teacher + 4 + np.round(rng.normal(0, 0.2 * RISE_SPREADS["max_mce_rise"], (images, 1))).astype(int)
        refused += bound_rise(teacher, student, level=0.95, resamples=1000, seed=run) > 10
    assert refused / 100 == pytest.approx(POWER, abs=0.1)


def test_list_needs_has_the_requirements_that_are_set():
    assert {need.field for need in list_needs(GateConfig(), 10)} == {"min_gain"}
    gate = GateConfig(max_class_drop=0.1, max_mce_rise=2, max_mfr_rise=3)
    assert [need.field for need in list_needs(gate, 10)].count("max_class_drop") == 4
    # A loss of more than all is none.
    assert max(need.change for need in list_needs(GateConfig(max_class_drop=0.7), 10) if "drop" in need.field) < 100


@pytest.mark.parametrize("field", ["min_gain", "max_class_drop", "max_mce_rise"])
def test_find_seen_change_inverts_list_needs(field):
    gate = GateConfig(max_class_drop=0.1, max_mce_rise=2)
    for need in list_needs(gate, 100):
        if need.field == field:
            assert find_seen_change(gate, field, need.images, 100) == pytest.approx(need.change, abs=0.6)
    assert find_seen_change(gate, "max_class_drop", 3, 100) is None


def test_spending_takes_more_images():
    plain, spent = (next(list_needs(GateConfig(spend=spend), 10)).images for spend in ("none", "bonferroni"))
    assert spent > 1.2 * plain


@pytest.mark.parametrize("min_gain", [-1, -0.99, -0.5, -0.1, 0, 0.5, 0.98])
def test_needs_are_known_for_every_margin(min_gain):
    gate = GateConfig(min_gain=min_gain)
    assert all(need.images >= 0 for need in list_needs(gate, 10) if need.field == "min_gain")
    found = find_seen_change(gate, "min_gain", 10_000, 10)
    assert found is None or found > 100 * min_gain
