"""What a run tells of itself in numbers."""

import pytest

from ns.modeling.manifest import ModelManifest
from ns.runs.summary import summarize_run


def test_summarize_run_counts_and_compares(finished_run):
    store, ref = finished_run
    summary = summarize_run(store, ref.run)
    (generation,) = summary.generations
    assert summary.state == "succeeded"
    assert 0.3 < summary.teacher_top1 < 1
    assert generation.labeled == 1247
    assert 0 < generation.kept <= 1247
    assert generation.teacher_top1 == summary.teacher_top1
    assert generation.gain == pytest.approx(generation.student_top1 - generation.teacher_top1)
    assert generation.gain_low <= generation.gain <= generation.gain_high
    assert generation.verdict == "promoted"
    assert summary.best_model == generation.model
    assert summary.label_sets == [generation.label_set]
    model = store.at(summary.best_model)
    assert model.exists(ModelManifest.load(model).weights_key)
    manifest = ModelManifest.load(store.at(summary.best_model))
    assert (manifest.training_mode, manifest.model.inference_precision) == ("float32", "float32")
