"""Labeling tasks: which images, and the way to Label Studio and back."""

import csv
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from ns.config.schema import ImportConfig
from ns.core.errors import DataError
from ns.data.importing.ingest import import_images
from ns.data.index import ShardIndex
from ns.labeling.imported import import_labels
from ns.labeling.label_set import LabelSet, iter_label_rows
from ns.labeling.next_images import choose_next_images, find_unsure_images, take_diverse_images
from ns.labeling.tasks import find_least_confident, write_label_table, write_tasks
from ns.modeling.predictor import Predictor
from ns.runs.lookup import open_label_set
from ns.storage import LocalStore


@pytest.fixture(scope="module")
def labels(finished_run):
    store, ref = finished_run
    return open_label_set(store, f"{ref.run}/gen-1")


def test_tasks_go_to_label_studio_and_come_back_as_labeled_data(finished_run, labels, tmp_path):
    store, _ = finished_run
    pool = labels.open_pool(store)
    out = LocalStore(tmp_path / "tasks")
    tasks = find_least_confident(labels.store, labels.label_set, labels.selection, 30)
    write_tasks(out, tasks, pool, labels.label_set.classes, model="teacher")
    documents = json.loads(out.get("tasks.json"))
    confidence = [task["predictions"][0]["score"] for task in documents]
    assert len(documents) == 30
    assert confidence == sorted(confidence)
    assert min(confidence) > labels.selection.policy.min_confidence
    # A person corrects some tasks, agrees with others, and leaves the last ones alone.
    for number, task in enumerate(documents[:24]):
        answer = {"choices": [str(number % 10)]} if number < 12 else task["predictions"][0]["result"][0]["value"]
        task["annotations"] = [{"result": [{"type": "choices", "value": answer}]}]
    (tmp_path / "tasks" / "export.json").write_text(json.dumps(documents))
    labeled = import_images(
        str(tmp_path / "tasks" / "export.json"),
        LocalStore(tmp_path / "labeled"),
        name="corrected",
        role="labeled",
        config=ImportConfig(),
        classes=labels.label_set.classes,
    )
    assert labeled.samples == 24
    index = ShardIndex.load(LocalStore(tmp_path / "labeled"), labeled.shards[0])
    by_key = dict(zip(index.keys, index.class_ids.tolist(), strict=True))
    assert [by_key[f"images/{task['data']['key']}"] for task in documents[:12]] == [number % 10 for number in range(12)]
    again = import_labels(str(tmp_path / "tasks" / "export.json"), pool[0].uri, str(tmp_path / "set"), labels.label_set.classes)
    assert (again.labeled, again.unmatched) == (30, [])


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_table_of_labels_imports_as_the_same_labels(finished_run, labels, tmp_path, form):
    store, _ = finished_run
    pool_store, _ = labels.open_pool(store)
    count = write_label_table(LocalStore(tmp_path), f"labels.{form}", labels.store, labels.label_set, None, form)
    made = import_labels(str(tmp_path / f"labels.{form}"), pool_store.uri, str(tmp_path / "set"), labels.label_set.classes)
    assert made.labeled == count == labels.label_set.rows - labels.label_set.unreadable - labels.label_set.left_out
    pairs = zip(
        iter_label_rows(labels.store, labels.label_set),
        iter_label_rows(LocalStore(tmp_path / "set"), made.label_set),
        strict=True,
    )
    for before, after in pairs:
        assert before.keys == after.keys
        np.testing.assert_array_equal(before.top_class[before.readable, 0], after.top_class[after.readable, 0])
        np.testing.assert_allclose(before.confidence, after.confidence, rtol=1e-6)


def test_a_table_of_labels_is_written_shard_by_shard(labels, tmp_path):
    """That of a large pool does not fit into memory."""
    write_label_table(LocalStore(tmp_path), "labels.parquet", labels.store, labels.label_set, None, "parquet")
    groups = pq.ParquetFile(tmp_path / "labels.parquet").metadata.num_row_groups
    assert groups == len(labels.label_set.shards) > 1


def test_the_selected_labels_alone_can_be_written(labels, tmp_path):
    count = write_label_table(LocalStore(tmp_path), "kept.csv", labels.store, labels.label_set, labels.selection, "csv")
    assert count == labels.selection.kept
    rows = list(csv.DictReader((tmp_path / "kept.csv").open()))
    assert len(rows) == count
    assert min(float(row["confidence"]) for row in rows) > labels.selection.policy.min_confidence


def test_next_images_are_unsure_and_of_all_classes(finished_run, labels, tmp_path):
    store, _ = finished_run
    predictor = Predictor(store.at(labels.teacher), batch=64)
    tasks = choose_next_images(labels.store, labels.label_set, labels.open_pool(store), predictor, 20)
    assert len(set(tasks)) == 20
    unsure = find_unsure_images(labels.store, labels.label_set, 200)
    assert {(task.shard, task.row) for task in tasks} <= set(zip(unsure.shards.tolist(), unsure.rows.tolist(), strict=True))
    given = np.bincount(unsure.class_ids, minlength=10)
    assert np.bincount([task.class_id for task in tasks], minlength=10).max() <= np.ceil(20 / (given > 0).sum())
    every = np.concatenate([rows.confidence[rows.readable] for rows in iter_label_rows(labels.store, labels.label_set)])
    assert np.mean([task.confidence for task in tasks]) < every.mean()


def test_unsure_images_are_those_with_the_smallest_margins_of_each_class(labels):
    unsure = find_unsure_images(labels.store, labels.label_set, 50)
    all_rows = list(iter_label_rows(labels.store, labels.label_set))
    class_ids = np.concatenate([rows.top_class[rows.readable, 0] for rows in all_rows])
    margins = np.concatenate(
        [rows.confidence[rows.readable] - rows.top_prob[rows.readable, 1].astype(np.float32) for rows in all_rows]
    )
    for class_id in np.unique(class_ids):
        expected = np.sort(margins[class_ids == class_id])[:5]
        np.testing.assert_allclose(np.sort(1 - unsure.uncertainty[unsure.class_ids == class_id]), expected, atol=1e-6)


def test_copies_of_one_image_are_taken_once_while_there_are_others():
    directions = np.eye(4, dtype=np.float32)
    features = np.concatenate([np.repeat(directions[:1], 5, 0), directions[1:]])
    uncertainty = np.array([0.9] * 5 + [0.5, 0.4, 0.3], np.float32)
    taken = take_diverse_images(features, uncertainty, np.zeros(8, np.int64), 4)
    assert taken.tolist() == [0, 5, 6, 7]


def test_classes_share_the_images_and_give_what_they_do_not_use():
    features = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
    class_ids = np.repeat([0, 1, 2], [20, 8, 2])
    taken = take_diverse_images(features, np.ones(30, np.float32), class_ids, 15)
    counts = np.bincount(class_ids[taken], minlength=3)
    assert counts[2] == 2
    assert counts[1] >= 5
    assert counts.sum() == 15


def test_a_picture_without_an_address_is_no_labeled_image(tmp_path):
    task = {"data": {"key": "a"}, "annotations": [{"result": [{"value": {"choices": ["cat"]}}]}]}
    (tmp_path / "export.json").write_text(json.dumps([task]))
    with pytest.raises(DataError, match="task of a: has no address of a file"):
        import_images(
            str(tmp_path / "export.json"), LocalStore(tmp_path / "out"), name="x", role="labeled", config=ImportConfig()
        )


def test_the_next_images_need_the_two_best_classes(tmp_path):
    label_set = LabelSet(dataset="", teacher="", code="", classes=("a", "b"), top_k=1, shards=())
    with pytest.raises(DataError, match=r"keeps one class per image.*label the pool with labeling\.top_k: 2 or more"):
        choose_next_images(LocalStore(tmp_path), label_set, None, None, 5)
