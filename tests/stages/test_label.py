"""Labeling tasks."""

from ns.labeling.label_set import read_label_rows
from ns.modeling.predictor import Predictor
from ns.runs.lookup import (
    open_label_set,
)
from ns.stages.prepare import prepare_data
from ns.stages.train import train_generation
from tests.loop import label_pool, open_tiny_run


def test_excluded_images_get_no_label_and_other_shards_are_reused(finished_run, tmp_path, monkeypatch):
    store, ref = finished_run
    labels = open_label_set(store, f"{ref.run}/gen-1")
    rows = read_label_rows(labels.store, labels.label_set.shards[0])
    (tmp_path / "withdrawn.txt").write_text(f"{rows.keys[3]}\n\n{rows.keys[5]}\n")
    ref = open_tiny_run(store, f"data.exclude={tmp_path / 'withdrawn.txt'}")
    data = prepare_data(ref)
    first = train_generation(ref, data=data, generation=0)
    asked = []
    shards_of = Predictor.predict_shards

    def spy(self, source, wanted, progress=None):
        wanted = list(wanted)
        asked.extend(number for number, _ in wanted)
        return shards_of(self, source, wanted, progress)

    monkeypatch.setattr(Predictor, "predict_shards", spy)
    label_pool(ref, data=data, generation=1, teacher=first)
    assert asked == [0]
    found = open_label_set(store, f"{ref.run}/gen-1")
    assert found.label_set.left_out == labels.label_set.left_out + 2
    without = read_label_rows(found.store, found.label_set.shards[0])
    assert without.reasons[3] == "left out: excluded by data.exclude"
    assert found.label_set.shards[1] == labels.label_set.shards[1]
