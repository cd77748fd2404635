import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from ns.config.schema import SelectionConfig
from ns.labeling.thresholds import NEVER_SURE, clopper_pearson_bound, find_thresholds


def run(entries, classes=3, precision=0.8, level=0.9):
    predicted, confidence, correct = zip(*entries, strict=True) if entries else ((), (), ())
    return find_thresholds(
        np.array(predicted, np.int64),
        np.array(confidence, np.float32),
        np.array(correct, np.bool_),
        classes,
        precision=precision,
        level=level,
        evaluation="0" * 64,
    )


@pytest.mark.parametrize(("correct", "total"), [(1, 1), (9, 10), (50, 50), (97, 100), (3, 700)])
def test_clopper_pearson_bound_is_binomial_tail(correct, total):
    # Clopper & Pearson: the precision at which so many correct ones or more have probability 1 - level.
    bound = float(clopper_pearson_bound(np.array([correct]), np.array([total]), 0.95)[0])
    assert binom.sf(correct - 1, total, bound) == pytest.approx(0.05)
    assert clopper_pearson_bound(np.array([0]), np.array([total]), 0.95)[0] == 0


ENTRY = st.tuples(st.integers(0, 2), st.sampled_from([0.2, 0.4, 0.5, 0.7, 0.8, 0.9, 1.0]), st.booleans())


@settings(max_examples=200, deadline=None)
@given(st.lists(ENTRY, max_size=80), st.sampled_from([0.3, 0.5, 0.8]))
def test_find_thresholds_finds_lowest(entries, precision):
    found = run(entries, precision=precision)
    least = next(n for n in range(1, 1000) if (0.1) ** (1 / n) >= precision)
    rare = {label for label in range(3) if sum(own == label for own, _, _ in entries) < least}
    for label, one in enumerate(found.classes):
        assert one.pooled == (label in rare)
        group = [(c, ok) for own, c, ok in entries if (own in rare if label in rare else own == label)]
        lowest = NEVER_SURE
        for candidate in sorted({c for c, _ in group}, reverse=True):
            above = [ok for c, ok in group if c >= candidate]
            if clopper_pearson_bound(np.array([sum(above)]), np.array([len(above)]), 0.9)[0] >= precision:
                lowest = candidate
        taken = [ok for c, ok in group if np.float32(c) > np.float32(one.threshold)]
        assert (len(taken), sum(taken)) == (one.heldout, one.correct)
        assert [c for c, _ in group if np.float32(c) > np.float32(one.threshold)] == [c for c, _ in group if c >= lowest]


def test_find_thresholds_of_class_that_is_never_right():
    found = run([(0, 0.9, False)] * 50 + [(1, 0.9, True)] * 50)
    never = found.classes[0]
    assert (never.threshold, never.heldout, never.correct, never.bound) == (NEVER_SURE, 0, 0, 0)
    assert found.classes[1].threshold < 0.9
    assert found.classes[2].pooled


def test_find_thresholds_accepts_bound_equal_to_precision():
    bound = float(clopper_pearson_bound(np.array([9]), np.array([9]), 0.9)[0])
    found = run([(0, 0.9, True)] * 9, precision=bound)
    assert (found.classes[0].heldout, found.classes[0].bound) == (9, bound)
    assert run([(0, 0.9, True)] * 9, precision=float(np.nextafter(bound, 1))).classes[0].threshold == NEVER_SURE


def test_selection_precision_needs_one_class_per_image():
    with pytest.raises(ValueError, match="precision: is that of the best class only"):
        SelectionConfig(precision=0.9, classes_per_image=2)
