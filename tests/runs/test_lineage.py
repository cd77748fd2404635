"""What became of an image."""

import shutil

import pytest

from ns.core.errors import DataError
from ns.data.index import ShardIndex
from ns.modeling.manifest import Lineage, ModelManifest
from ns.runs import lineage
from ns.runs.lookup import (
    list_runs,
    open_label_set,
    read_prepared_data,
)
from ns.runs.records import RECORDS_PREFIX, list_stage_notes
from ns.runs.summary import summarize_run
from ns.storage import LocalStore, parent_key
from tests.loop import find_pool_key


def test_trace_image_through_labels_runs_and_models(finished_run):
    store, ref = finished_run
    run = ref.run
    key = find_pool_key(store, run)
    trace = lineage.trace_image(store, key)
    assert set(trace.locations) == {"pool"}
    answer = next(answer for answer in trace.answers if answer.run == run)
    labels = open_label_set(store, f"{run}/gen-1")
    assert (answer.generation, answer.label_set, answer.teacher) == (1, labels.label_set.digest, labels.teacher)
    assert answer.times_per_epoch >= 1
    assert answer.threshold == pytest.approx(0.3)
    assert list(answer.probabilities.values()) == sorted(answer.probabilities.values(), reverse=True)
    manifest = ModelManifest.load(store.at(answer.student))
    assert manifest.digest in trace.models
    unseen = lineage.trace_image(store, find_pool_key(store, run, wanted=False))
    assert manifest.digest not in unseen.models
    with pytest.raises(DataError, match="no dataset of a run"):
        lineage.trace_image(store, "nobody")


def test_exposed_models_include_students_of_exposed_teachers(finished_run):
    store, ref = finished_run
    run = ref.run
    labeled = open_label_set(store, f"{run}/gen-1").prepared.labeled
    labeled_store, dataset = labeled.open_dataset(store)
    key = ShardIndex.load(labeled_store, dataset.shards[0]).keys[0]
    models = lineage.find_exposed_models(store, {key})
    trained = [parent_key(note.outputs["model"]) for note in list_stage_notes(store, run) if note.stage == "train"]
    assert len(trained) == 2
    assert set(trained) <= set(models.values())


def test_trace_image_in_a_run_without_labels(finished_run, tmp_path):
    store = LocalStore(shutil.copytree(finished_run[0].root, tmp_path / "root"))
    run = finished_run[1].run
    for key in list(store.list(f"{run}/stages/")):
        if key.rpartition("/")[2] not in ("0-prepare.json", "0-train.json"):
            store.delete(key)
    for record in list_runs(store):
        if record.run != run:
            store.delete(f"{RECORDS_PREFIX}{record.run}.json")
    labeled_store, dataset = read_prepared_data(store, run).labeled.open_dataset(store)
    key = ShardIndex.load(labeled_store, dataset.shards[0]).keys[0]
    (note,) = [note for note in list_stage_notes(store, run) if note.stage == "train"]
    teacher = parent_key(note.outputs["model"])
    assert teacher in lineage.find_exposed_models(store, {key}).values()
    trace = lineage.trace_image(store, key)
    assert set(trace.locations) == {"labeled"}
    assert trace.answers == ()


def test_exposed_models_include_students_of_an_exposed_ensemble(finished_run, tmp_path):
    store, run = LocalStore(shutil.copytree(finished_run[0].root, tmp_path / "root")), finished_run[1].run
    labels = open_label_set(store, f"{run}/gen-1")
    manifest = ModelManifest.load(store.at(summarize_run(store, run).best_model))
    shutil.copytree(labels.store.root, store.root / "store/labels/ensemble")
    ensemble = labels.label_set.model_copy(update={"ensemble": (manifest.digest,)})
    ensemble.save(store.at("store/labels/ensemble"))
    update = {"label_set": ensemble.digest, "label_set_key": "store/labels/ensemble"}
    labels.selection.model_copy(update=update).save(store.at("store/selections/ensemble"))
    lineage_of_pupil = Lineage(config="c", labeled="l", teacher="t", label_set=ensemble.digest, selection="s")
    pupil = manifest.model_copy(update={"lineage": lineage_of_pupil, "weights_sha256": "w"})
    pupil.save(store.at("store/models/pupil"))
    assert lineage.find_exposed_models(store, {find_pool_key(store, run)})[pupil.digest] == "store/models/pupil"
    assert pupil.digest not in lineage.find_exposed_models(store, {find_pool_key(store, run, wanted=False)})


@pytest.mark.parametrize("part", ["labeled", "pool"])
def test_exposed_models_after_the_run_was_repeated_without_the_image(finished_run, tmp_path, part):
    """The notes name the new data and labels; the models that were made of the old ones are still there."""
    store, run = LocalStore(shutil.copytree(finished_run[0].root, tmp_path / "root")), finished_run[1].run
    key = find_pool_key(store, run)
    if part == "labeled":
        labeled_store, dataset = read_prepared_data(store, run).labeled.open_dataset(store)
        key = ShardIndex.load(labeled_store, dataset.shards[0]).keys[0]
    before = lineage.find_exposed_models(store, {key})
    assert before
    store.delete_prefix(f"{run}/stages/")
    assert lineage.find_exposed_models(store, {key}) == before
    trace = lineage.trace_image(store, key)
    assert (set(trace.locations), trace.models) == ({part}, tuple(sorted(before)))
