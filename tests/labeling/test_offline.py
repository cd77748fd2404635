"""Labeling outside of a run."""

import contextlib
import threading

import pytest
from PIL import Image

from ns.config.schema import ImportConfig, LabelingConfig, SelectionConfig
from ns.core.errors import ConfigError, DataError
from ns.data.importing.ingest import import_images
from ns.labeling.imported import import_labels
from ns.labeling.label_set import verify_label_set
from ns.labeling.offline import LabelingInputs, _find_unselected_rows, label_dataset
from ns.labeling.selection import make_selection
from ns.runs.lookup import (
    open_label_set,
)
from ns.runs.summary import summarize_run
from ns.storage import LocalStore


def test_label_dataset_labels_what_a_selection_kept(finished_run, tmp_path):
    store, ref = finished_run
    labels = open_label_set(store, f"{ref.run}/gen-1")
    model = store.at(summarize_run(store, ref.run).best_model).uri
    pool, _ = labels.open_pool(store)
    only = (labels.store, labels.label_set, labels.selection)
    assert label_dataset(model, pool.uri, str(tmp_path / "again"), LabelingConfig(), shards="1-2", kept_by=only) is None
    with pytest.raises(DataError, match="holds labels of another views: one, not flip; name another folder"):
        label_dataset(model, pool.uri, str(tmp_path / "again"), LabelingConfig(views="flip"), kept_by=only)
    made = label_dataset(model, pool.uri, str(tmp_path / "again"), LabelingConfig(), kept_by=only)
    assert made.rows - made.left_out == labels.selection.kept
    assert verify_label_set(LocalStore(tmp_path / "again"), made, labels.open_pool(store)) == 847
    with pytest.raises(ConfigError, match="must be START-STOP, within 0-2"):
        label_dataset(model, pool.uri, str(tmp_path / "again"), LabelingConfig(), shards="1-9")
    with pytest.raises(ConfigError, match="fitted needs the calibration images of a run; give the number"):
        label_dataset(model, pool.uri, str(tmp_path / "c"), LabelingConfig(temperature="fitted"))
    with pytest.raises(DataError, match=r"holds labels of another temperature: 1\.0, not 2\.0"):
        label_dataset(model, pool.uri, str(tmp_path / "again"), LabelingConfig(temperature=2), kept_by=only)
    with pytest.raises(DataError, match="holds labels of another teacher"):
        label_dataset(store.at(labels.teacher).uri, pool.uri, str(tmp_path / "again"), LabelingConfig())
    with pytest.raises(ConfigError, match="a label set by itself has no selection"):
        label_dataset(model, pool.uri, str(tmp_path / "b"), LabelingConfig(), kept_by=(labels.store, labels.label_set, None))


def test_images_without_a_label_get_none_from_a_labeling_of_the_kept_ones(tmp_path):
    """Their owners withdrew them, say, or the gate decides on them."""
    images, pool_store, label_store = tmp_path / "images", LocalStore(tmp_path / "pool"), LocalStore(tmp_path / "labels")
    images.mkdir()
    for name in "abcd":
        Image.new("RGB", (8, 8)).save(images / f"{name}.png")
    pool = import_images(str(images), pool_store, name="pool", role="unlabeled", config=ImportConfig(), workers=1)
    (tmp_path / "labels.csv").write_text("key,class,confidence\na,cat,0.9\nb,dog,0.8\nc,dog,0.6\n")
    label_set = import_labels(str(tmp_path / "labels.csv"), pool_store.uri, label_store.uri, ("cat", "dog")).label_set
    policy = SelectionConfig(min_confidence=0.7)
    selection = make_selection(label_store, label_set, policy, seed=0, label_set_key="labels")
    find_rows = _find_unselected_rows(pool, label_store, label_set, selection)
    assert find_rows(pool.shards[0]) == {2: "not kept by the selection", 3: "no label was imported"}


def test_of_two_labelings_that_begin_at_once_one_has_the_folder(tmp_path):
    """Else shards of both would become one label set."""
    digests = {
        "dataset": "0",
        "code": "0",
        "views": "one",
        "ensemble": (),
        "probabilities": "float16",
        "top_k": 2,
        "selection": None,
    }
    inputs = [LabelingInputs(teacher=str(number), **digests) for number in range(8)]
    start, owners = threading.Barrier(len(inputs)), []

    def claim(own: LabelingInputs) -> None:
        start.wait()
        with contextlib.suppress(DataError):
            own.claim_store(LocalStore(tmp_path))
            owners.append(own)

    threads = [threading.Thread(target=claim, args=(own,)) for own in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert owners == [LabelingInputs.load(LocalStore(tmp_path))]
