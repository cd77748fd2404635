"""What a run tells of itself in numbers."""

import pytest

from ns.core.errors import NsError
from ns.modeling.manifest import ModelManifest
from ns.runs.records import find_stage_note
from ns.runs.summary import summarize_run, summarize_run_or_record


def test_summarize_run_counts_and_compares(finished_run):
    store, ref = finished_run
    summary = summarize_run(store, ref.run)
    (generation,) = summary.generations
    assert summary.state == "succeeded"
    assert 0.3 < summary.teacher_top1 < 1
    assert generation.labeled == 847
    assert 0 < generation.kept <= 847
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


@pytest.mark.parametrize("how", ["lost", "cut off"])
@pytest.mark.parametrize(("stage", "output"), [("select", "selection"), ("gate", "verdict"), ("evaluate", "evaluation")])
def test_summarize_run_tells_what_is_lost_and_hides_no_other_run(finished_run, capsys, how, stage, output):
    """Alone it is an error, since a lost verdict would make an older model the best; in a list there is a warning."""
    store, ref = finished_run
    key = find_stage_note(store, ref.run, 1, stage).outputs[output]
    data = store.get(key)
    try:
        store.delete(key)
        if how == "cut off":
            store.put(key, data[:-20])
        with pytest.raises(NsError, match=rf"{output}\.json.*the command that began run {ref.run} makes it again"):
            summarize_run(store, ref.run)
        assert summarize_run(store, ref.run, through_generation=0).teacher_top1 > 0.3
        record = summarize_run_or_record(store, ref.run)
        assert (record.state, record.generations, record.best_model) == ("succeeded", [], None)
        assert "only the record of a run is told" in "".join(capsys.readouterr())
    finally:
        store.put(key, data)
    assert summarize_run_or_record(store, ref.run) == summarize_run(store, ref.run)
