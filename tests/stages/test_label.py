"""Labeling tasks."""

import pytest

from ns.core.errors import DataError
from ns.data.index import ShardIndex
from ns.labeling.imported import import_labels
from ns.labeling.label_set import read_label_rows, verify_label_set
from ns.modeling.predictor import Predictor
from ns.reporting.context import gather_context
from ns.runs.lookup import (
    open_label_set,
    open_run_label_set,
)
from ns.stages.prepare import prepare_data
from ns.stages.train import train_generation
from ns.storage.ledger import Ledger
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


def test_shards_are_recorded_by_the_next_run_if_who_labeled_them_was_killed(finished_run):
    """Between the last of its shards and their entries. The entries spare a grown pool the same work."""
    store, ref = finished_run
    ledger = Ledger(store)
    recorded = ledger.list_digests("label-shard")
    assert recorded
    store.delete_prefix("store/ledger/label-shard/")
    store.delete_prefix(f"{ref.run}/stages/1-label-")
    data = prepare_data(ref)
    label_pool(ref, data=data, generation=1, teacher=train_generation(ref, data=data, generation=0))
    assert ledger.list_digests("label-shard") <= recorded
    assert len(ledger.list_digests("label-shard")) == len(open_label_set(store, f"{ref.run}/gen-1").label_set.shards)


@pytest.fixture
def make_imported(finished_run, tmp_path):
    """Function: the URI of a label set in which every image of the pool has this class."""
    store, ref = finished_run
    labels = open_label_set(store, f"{ref.run}/gen-1")
    pool_store, pool = labels.open_pool(store)
    keys = [key for shard in pool.shards for key in ShardIndex.load(pool_store, shard).keys]

    def make(class_name, classes=labels.label_set.classes):
        table = tmp_path / f"{class_name}.csv"
        table.write_text("\n".join(["key,class,confidence", *(f"{key},{class_name},0.9" for key in keys)]))
        import_labels(str(table), pool_store.uri, str(tmp_path / f"labels-{class_name}"), classes, source="another team")
        return str(tmp_path / f"labels-{class_name}")

    return make, keys


def test_imported_labels_serve_the_first_generation(finished_run, make_imported, tmp_path, monkeypatch):
    store, finished = finished_run
    make, keys = make_imported
    (tmp_path / "withdrawn.txt").write_text(f"{keys[3]}\n")
    monkeypatch.setattr(Predictor, "predict_shards", lambda *_: pytest.fail("the teacher labels nothing"))
    selections = []
    for name in ("7", "3"):
        ref = open_tiny_run(store, f"labeling.label_set={make(name)}", f"data.exclude={tmp_path / 'withdrawn.txt'}")
        data = prepare_data(ref)
        first = train_generation(ref, data=data, generation=0)
        selections.append(label_pool(ref, data=data, generation=1, teacher=first))
    assert selections[0] != selections[1]
    found = open_run_label_set(store, ref.run, 1)
    verify_label_set(found.store, found.label_set, found.open_pool(store))
    assert (found.label_set.rows, found.label_set.unreadable, found.label_set.left_out) == (
        len(keys),
        0,
        1 + open_run_label_set(store, finished.run, 1).label_set.left_out,
    )
    assert found.label_set.teacher != open_run_label_set(store, finished.run, 1).label_set.teacher
    rows = read_label_rows(found.store, found.label_set.shards[0])
    assert rows.reasons[3] == "left out: excluded by data.exclude"
    assert {int(best) for best in rows.top_class[rows.readable, 0]} == {found.label_set.classes.index("3")}
    (labeling,) = gather_context(store, ref.run, pictures=0).labelings
    assert labeling.imported_from == str(tmp_path / "labels-3")


def test_imported_labels_of_other_images_or_classes_are_refused_before_a_training(finished_run, make_imported, tmp_path):
    store, _ = finished_run
    make, _ = make_imported
    for overrides, message in (
        ([f"labeling.label_set={tmp_path}"], "labeling.label_set: .* has no labelset.json; name the folder of a label set"),
        (
            [f"labeling.label_set={make('7')}", "data.pool=digits:heldout", "data.leak_guard=off"],
            "labeling.label_set: .* is of other images than data.pool",
        ),
        (
            [f"labeling.label_set={make('x', ('x', *'012345678'))}"],
            r"has not the classes of data.labeled: \(9, x\); import the labels again",
        ),
    ):
        with pytest.raises(DataError, match=message):
            prepare_data(open_tiny_run(store, *overrides))
