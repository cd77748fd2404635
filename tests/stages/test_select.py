"""Label sets and selections."""

import numpy as np
import pytest

from ns.core.errors import DataError
from ns.runs.lookup import (
    find_policy_thresholds,
    open_label_set,
)
from ns.stages.evaluate import evaluate_generation
from ns.stages.prepare import prepare_data
from ns.stages.train import train_generation
from tests.loop import label_pool, open_tiny_run, run_loop


def test_commit_labels_fails_if_nothing_is_selected(finished_run):
    store, _ = finished_run
    ref = open_tiny_run(store, "selection.min_confidence=0.999999")
    with pytest.raises(DataError, match=r"lower it, or train a better teacher"):
        run_loop(ref)


def test_commit_labels_turns_a_precision_into_thresholds(finished_run):
    store, _ = finished_run
    ref = open_tiny_run(store, "selection.precision=0.6", "selection.confidence=0.8")
    data = prepare_data(ref)
    first = train_generation(ref, data=data, generation=0)
    evaluate_generation(ref, data=data, generation=0, model=first)
    label_pool(ref, data=data, generation=1, teacher=first)
    labels = open_label_set(store, f"{ref.run}/gen-1")
    thresholds = labels.selection.thresholds
    assert thresholds == find_policy_thresholds(store, labels, labels.selection.policy)
    for rule, of_class in zip(labels.selection.rules, thresholds.classes, strict=True):
        assert rule.threshold == max(np.float32(0.3), np.float32(of_class.threshold))
        assert of_class.bound >= 0.6 or rule.kept == 0
    assert 0 < labels.selection.kept < labels.label_set.rows
