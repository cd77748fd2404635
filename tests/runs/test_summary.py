"""What a run tells of itself in numbers."""

import pytest

from ns.core.errors import NsError
from ns.modeling.manifest import ModelManifest
from ns.runs.lookup import resolve_verdict
from ns.runs.records import find_stage_note, write_stage_note
from ns.runs.summary import list_current_notes, summarize_run, summarize_run_or_record
from ns.storage import LocalStore


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


@pytest.mark.parametrize(
    ("changes", "current"),
    [
        ({}, ["0-train", "1-select", "1-train", "1-gate", "2-select", "2-train", "2-gate"]),
        # An audit came after the run, or the code has changed.
        ({"promoted": False}, ["0-train", "1-select", "1-train", "1-gate"]),
        ({"student": "m/another"}, ["0-train", "1-select", "1-train", "1-gate"]),
        ({"teacher": "m/another"}, ["0-train"]),
    ],
)
def test_list_current_notes_leaves_out_what_the_loop_no_longer_comes_to(finished_run, tmp_path, changes, current):
    verdict = resolve_verdict(finished_run[0], finished_run[1].run)[1]
    store = LocalStore(tmp_path)

    def note(generation, stage, **outputs):
        write_stage_note(store, "run", generation, stage, outputs, 1.0, reused=False)

    models = {"teacher": "m/0", "student": "m/1"} | {name: key for name, key in changes.items() if name != "promoted"}
    note(0, "train", model=f"{models['teacher']}/model.json")
    for generation, teacher, student in ((1, "m/0", models["student"]), (2, "m/1", "m/2")):
        note(generation, "select", teacher=f"{teacher}/model.json")
        note(generation, "train", model=f"{student}/model.json")
        promoted = changes.get("promoted", True) or generation == 2
        fields = {"generation": generation, "teacher": teacher, "student": student, "promoted": promoted}
        verdict.model_copy(update=fields).save_file(store, f"v{generation}.json")
        note(generation, "gate", verdict=f"v{generation}.json")
    assert [f"{note.generation}-{note.stage}" for note in list_current_notes(store, "run")] == current
    expected = [name for name in current if name < "2"]
    assert [f"{note.generation}-{note.stage}" for note in list_current_notes(store, "run", through_generation=1)] == expected


@pytest.mark.parametrize(
    ("taught", "current"), [("m/1", ["0-train", "1-train"]), ("m/new", ["0-train", "1-train", "2-select", "2-gate"])]
)
def test_list_current_notes_where_another_student_has_come(finished_run, tmp_path, taught, current):
    """The first gate's note is that of an earlier student. The new one is not decided about, or another run's, which teaches now."""
    verdict = resolve_verdict(finished_run[0], finished_run[1].run)[1]
    store = LocalStore(tmp_path)
    for generation, teacher, student in ((1, "m/0", "m/1"), (2, taught, "m/2")):
        verdict.model_copy(update={"teacher": teacher, "student": student}).save_file(store, f"v{generation}.json")
    for generation, stage, outputs in (
        (0, "train", {"model": "m/0/model.json"}),
        (1, "train", {"model": "m/new/model.json"}),
        (1, "gate", {"verdict": "v1.json"}),
        (2, "select", {"teacher": f"{taught}/model.json"}),
        (2, "gate", {"verdict": "v2.json"}),
    ):
        write_stage_note(store, "run", generation, stage, outputs, 1.0, reused=False)
    assert [f"{note.generation}-{note.stage}" for note in list_current_notes(store, "run")] == current


def test_list_current_notes_of_a_run_that_does_not_name_its_first_teacher(finished_run, tmp_path):
    """It is a student of a run whose notes were removed."""
    verdict = resolve_verdict(finished_run[0], finished_run[1].run)[1]
    store = LocalStore(tmp_path)
    verdict.model_copy(update={"teacher": "m/1", "student": "m/2"}).save_file(store, "v.json")
    outputs = {"select": {"teacher": "m/1/model.json"}, "train": {"model": "m/2/model.json"}, "gate": {"verdict": "v.json"}}
    for stage, output in outputs.items():
        write_stage_note(store, "run", 2, stage, output, 1.0, reused=False)
    assert [note.stage for note in list_current_notes(store, "run")] == [*outputs]
