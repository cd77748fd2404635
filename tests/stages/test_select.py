"""Label sets and selections."""

import numpy as np
import pytest

from ns.config.schema import SelectionConfig
from ns.core.errors import DataError, RunError
from ns.data.loading.shard_reader import ImageSource
from ns.evaluation.result import Evaluation, read_predictions
from ns.labeling.alignment import align_rows
from ns.labeling.label_set import read_label_rows
from ns.labeling.pseudo_label_dataset import load_pseudo_labels
from ns.labeling.selection import CopyReader, count_copies
from ns.labeling.thresholds import NEVER_SURE
from ns.modeling.predictor import Predictor
from ns.reporting.pictures import build_label_galleries
from ns.runs.lookup import (
    find_policy_thresholds,
    open_label_set,
)
from ns.runs.summary import summarize_run
from ns.stages.evaluate import evaluate_generation
from ns.stages.prepare import prepare_data
from ns.stages.train import train_generation
from ns.storage import parent_key
from tests.labeling.dense import expand_probabilities
from tests.loop import label_pool, open_tiny_run, run_loop


def test_commit_labels_fails_if_nothing_is_selected(finished_run):
    store, _ = finished_run
    ref = open_tiny_run(store, "selection.min_confidence=0.999999")
    with pytest.raises(
        DataError, match=r"^the teacher labeled no image with confidence above .*; lower it, or train a better teacher"
    ):
        run_loop(ref)


@pytest.mark.integration
def test_commit_labels_turns_a_precision_into_thresholds(finished_run):
    store, _ = finished_run
    ref = open_tiny_run(store, "selection.precision=0.3", "selection.confidence=0.8", "labeling.views=five")
    data = prepare_data(ref)
    first = train_generation(ref, data=data, generation=0)
    evaluated = Evaluation.load_file(store, evaluate_generation(ref, data=data, generation=0, model=first))
    label_pool(ref, data=data, generation=1, teacher=first)
    labels = open_label_set(store, f"{ref.run}/gen-1")
    thresholds = labels.selection.thresholds
    # Found on images that the gate does not decide on, labeled as the pool is.
    calibration = Evaluation.load_file(store, labels.calibration)
    assert thresholds.evaluation == calibration.digest
    assert calibration.dataset == labels.prepared.calibration.digest
    calibration_store, dataset = labels.prepared.calibration.open_dataset(store)
    predictor = Predictor(store.at(first), batch=50, views="five")
    shards = [predictor.predict_shard(ImageSource(calibration_store, dataset), shard) for shard in range(len(dataset.shards))]
    rows = read_predictions(store.at(parent_key(labels.calibration)), calibration)
    assert rows["key"].to_pylist() == [key for predictions in shards for key in predictions.index.keys]
    expected = np.concatenate([predictions.probabilities.max(1) for predictions in shards])
    np.testing.assert_allclose(rows["confidence"].to_numpy(), expected, atol=1e-6)
    assert {calibration.images, evaluated.images} == {250}
    assert thresholds == find_policy_thresholds(store, labels, labels.selection.policy)
    for rule, of_class in zip(labels.selection.rules, thresholds.classes, strict=True):
        assert rule.fallback == (of_class.threshold == NEVER_SURE)
        assert rule.threshold == (np.float32(0.3) if rule.fallback else max(np.float32(0.3), np.float32(of_class.threshold)))
        assert rule.fallback or of_class.bound >= 0.3
    assert not all(rule.fallback for rule in labels.selection.rules)
    assert 0 < labels.selection.kept < labels.label_set.rows


@pytest.mark.integration
def test_a_class_without_pseudo_labels_is_said_and_can_refuse_the_student(finished_run, monkeypatch):
    store, _ = finished_run
    # Of so short a teacher, some classes have no confidence above this one, and others have.
    ref = open_tiny_run(store, "selection.min_confidence=0.5", "selection.per_class=auto", "gate.min_class_coverage=auto")
    lines = {}
    monkeypatch.setattr("ns.stages.context.StageContext.add_log_fields", lambda _, **fields: lines.update(fields))
    run_loop(ref)
    labels = open_label_set(store, f"{ref.run}/gen-1")
    assert 0 < len(labels.selection.empty_classes) < 10
    assert labels.selection.labeled_images == (5,) * 10
    assert "of 10 classes have no pseudo-labels: " in lines["classes"]
    verdict = summarize_run(store, ref.run).generations[0]
    assert verdict.verdict == "refused"
    assert "share of the classes with their share of pseudo-labels is" in verdict.reason


def test_thresholds_need_calibration_images(finished_run):
    store, ref = finished_run
    with pytest.raises(RunError, match=r"there are none; start a run with data.calibration, or with selection.precision"):
        find_policy_thresholds(store, open_label_set(store, f"{ref.run}/gen-1"), SelectionConfig(precision=0.9))


@pytest.mark.integration
def test_first_selection_chooses_the_images_of_all_generations(finished_run):
    store, _ = finished_run
    # A name of its own: the accepted students of an experiment are those of all its runs.
    options = [
        "name=first-choice",
        "selection.from=first",
        "selection.policy=aligned",
        "selection.weights=confidence",
        "generations=2",
    ]
    ref = open_tiny_run(store, *options)
    run_loop(ref)
    first, second = (open_label_set(store, f"{ref.run}/gen-{generation}") for generation in (1, 2))
    assert second.label_set.digest != first.label_set.digest
    assert (first.selection.choice, second.selection.choice.selection) == (None, first.selection.digest)
    assert second.selection.rules == first.selection.rules
    assert second.selection.alignment != first.selection.alignment
    titles = [
        [gallery.title for gallery in build_label_galleries(*labels.open_pool(store), *labels.side, 2)]
        for labels in (first, second)
    ]
    # The labels of the second generation left out no image.
    assert titles == [["Most confident", "Least confident", "Just below the threshold"], ["Most confident", "Least confident"]]
    pool = second.open_pool(store)
    for labels in (first, second):
        pseudo = load_pseudo_labels(labels.store, labels.label_set, labels.selection, *pool)
        total = images = 0.0
        for shard, label_shard in enumerate(labels.label_set.shards):
            chosen_by = read_label_rows(first.store, first.label_set.shards[shard])
            assert pseudo.copies[shard].tolist() == count_copies(first.selection, chosen_by).tolist()
            rows = align_rows(read_label_rows(labels.store, label_shard), labels.selection.alignment)
            kept = np.flatnonzero(pseudo.copies[shard])
            targets = np.array([pseudo.read_targets(shard)[row] for row in kept])
            weights = rows.confidence[kept] / np.float32(labels.selection.mean_confidence)
            np.testing.assert_allclose(targets, expand_probabilities(rows, 10)[kept] * weights[:, None], rtol=1e-5)
            total += float(weights @ pseudo.copies[shard][kept])
            images += float(pseudo.copies[shard].sum())
        assert total / images == pytest.approx(1, rel=1e-5)
    with pytest.raises(DataError, match="which are not beside it; name the label set as a run's generation"):
        CopyReader(first.store, second.selection)
