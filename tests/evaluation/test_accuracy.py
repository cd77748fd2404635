import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from ns.core.errors import DataError
from ns.data.loading.shard_reader import ImageSource
from ns.data.subsample import Subsample, draw_rows
from ns.evaluation.accuracy import build_predictions_table, compute_calibration, evaluate_accuracy, summarize_predictions
from ns.evaluation.multi_label import MultiLabels
from ns.evaluation.result import Evaluation, read_predictions
from ns.modeling.precision import PrecisionMode
from ns.modeling.predictor import Predictor
from ns.storage import LocalStore

CLASSES = tuple(f"class {index}" for index in range(7))


def summarize(table, **fields) -> Evaluation:
    options = {
        "model": "m",
        "dataset": "d",
        "name": "n",
        "mode": "float32",
        "classes": CLASSES,
        "unreadable": 0,
        "predictions_sha256": "0",
        **fields,
    }
    return summarize_predictions(table, **options)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 10_000))
def test_summarize_predictions_matches_counts_by_hand(images, seed):
    rng = np.random.default_rng(seed)
    # Few distinct values, so that ties are common.
    probabilities = rng.integers(1, 4, (images, 7)).astype(np.float32)
    probabilities /= probabilities.sum(1, keepdims=True)
    labels = rng.integers(0, 7, images)
    table = build_predictions_table([str(index) for index in range(images)], labels, probabilities)
    result = summarize(table)
    top1 = top5 = 0
    for row, label in zip(probabilities, labels, strict=True):
        ranking = sorted(range(7), key=lambda index: (-row[index], index))
        top1 += ranking[0] == label
        top5 += label in ranking[:5]
    assert result.top1 == pytest.approx(top1 / images)
    assert result.top5 == pytest.approx(top5 / images)
    matrix = np.zeros((7, 7), int)
    np.add.at(matrix, (labels, probabilities.argmax(1)), 1)
    assert result.build_confusion_matrix() == matrix.tolist()
    assert [one.images for one in result.confusions] == sorted((one.images for one in result.confusions), reverse=True)
    assert result.class_images == tuple(matrix.sum(1))
    assert result.class_correct == tuple(matrix.diagonal())
    assert result.class_predicted == tuple(matrix.sum(0))
    assert result.balanced_accuracy == pytest.approx(np.mean([one for one in result.class_accuracy if one is not None]))
    assert result.never_predicted == [CLASSES[one] for one in range(7) if matrix[one].any() and not matrix[:, one].any()]
    for index, accuracy in enumerate(result.class_accuracy):
        own = labels == index
        if own.any():
            assert accuracy == pytest.approx((probabilities[own].argmax(1) == index).mean())
        else:
            assert accuracy is None


def test_read_predictions_refuses_other_file(tmp_path):
    folder = LocalStore(tmp_path)
    result = summarize(build_predictions_table(["a"], np.array([0]), np.full((1, 7), 1 / 7, np.float32)))
    result.save(folder)
    assert Evaluation.load(folder) == result
    folder.put(result.predictions_key, b"other")
    with pytest.raises(DataError, match="evaluate again"):
        read_predictions(folder, result)


def test_compute_calibration_matches_calculation_by_hand():
    confidence = np.array([0.05, 0.5, 0.5, 0.95, 1.0, 1.0], np.float32)
    right = np.array([True, True, False, True, True, False])
    result = compute_calibration(confidence, right)
    assert len(result.bins) == 15
    assert [one.images for one in result.bins if one.images] == [1, 2, 3]
    last = result.bins[-1]
    assert (last.images, last.accuracy) == (3, pytest.approx(2 / 3))
    assert last.confidence == pytest.approx((0.95 + 1 + 1) / 3)
    assert result.ece == pytest.approx((0.95 + 2 * 0 + abs(2.95 - 2)) / 6)


def test_compute_calibration_bins():
    # A softmax in float32 may exceed 1 by a few units in the last place.
    confidence = np.array([0, 0.25, 0.5, 1, 1.0000001], np.float32)
    result = compute_calibration(confidence, np.array([False, True, True, True, False]), num_bins=4)
    shown = [(one.images, pytest.approx(one.confidence), one.accuracy) for one in result.bins]
    assert shown == [(2, 0.125, 0.5), (1, 0.5, 1), (0, 0.625, 0), (2, 1, 0.5)]


def test_summarize_predictions_records_settings_and_calibration():
    probabilities = np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8]], np.float32)
    table = build_predictions_table(["a", "b", "c"], np.array([0, 1, 1]), probabilities)
    several = MultiLabels({"a": frozenset({1}), "b": frozenset({0, 1})})
    fields = {"name": "photographs", "mode": "bfloat16", "subsample": Subsample(images=3, seed=1), "scored_classes": ("x", "y")}
    result = summarize(table, classes=("x", "y", "z"), unreadable=2, **fields, multi_labels=several)
    assert {name: getattr(result, name) for name in fields} == fields
    assert (result.images, result.unreadable) == (3, 2)
    assert result.build_confusion_matrix() == [[1, 0, 0], [1, 0, 1], [0, 0, 0]]
    assert result.balanced_accuracy == 0.5
    assert result.describe_never_predicted() == "never predicts 1 of 2 classes: y"
    assert (result.multi_label_top1, result.multi_label_images) == (0.5, 2)
    assert result.calibration == compute_calibration(probabilities.max(1), np.array([True, False, False]))


def test_compute_calibration_of_calibrated_model():
    rng = np.random.default_rng(0)
    confidence = rng.random(200_000).astype(np.float32)
    assert compute_calibration(confidence, rng.random(200_000) < confidence).ece < 0.01
    assert compute_calibration(confidence, rng.random(200_000) < confidence**2).ece == pytest.approx(1 / 6, abs=0.01)


def test_summarize_predictions_top5_of_few_classes():
    table = build_predictions_table(["a", "b"], np.array([0, 1]), np.array([[0.9, 0.1], [0.8, 0.2]], np.float32))
    result = summarize(table, classes=("x", "y"))
    assert (result.top1, result.top5) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("subsample", "images"), [(None, 21), (Subsample(images=24, seed=0), 21), (Subsample(images=4, seed=0), 4)]
)
def test_evaluate_accuracy_counts_unreadable_images(tmp_path, model, make_labeled_images, subsample, images):
    folder, data = make_labeled_images(tmp_path / "d", damaged=(2, 3, 17))
    with capture_logs() as logged:
        result = evaluate_accuracy(Predictor(model, batch=8), folder, data, LocalStore(tmp_path / "e"), subsample=subsample)
    looked_at = 24 if images == 21 else 4
    assert result.images + result.unreadable == looked_at
    assert result.images == sum(result.class_images) == sum(result.class_predicted) == images
    progress = [line for line in logged if line["event"] == "progress"][-1]
    assert (progress["done"], progress["total"], progress["unit"]) == (looked_at, looked_at, "images")


@pytest.mark.parametrize("count", [0, 3])
def test_evaluate_accuracy_refuses_unreadable_dataset(tmp_path, model, make_labeled_images, count):
    folder, data = make_labeled_images(tmp_path / "d", count=count, damaged=range(count))
    with pytest.raises(DataError, match=r"/d: no readable image to evaluate on"):
        evaluate_accuracy(Predictor(model, batch=8), folder, data, LocalStore(tmp_path / "e"))


def test_evaluate_accuracy_of_one_image(tmp_path, model, make_labeled_images):
    folder, data = make_labeled_images(tmp_path / "d", count=1)
    predictor = Predictor(model, batch=8)
    predictor.mode = PrecisionMode("bfloat16")
    every = MultiLabels({"image-000": frozenset(range(5))})
    result = evaluate_accuracy(predictor, folder, data, LocalStore(tmp_path / "e"), multi_labels=every)
    assert (result.images, result.name, result.dataset, result.mode) == (1, "images", data.digest, "bfloat16")
    assert (result.model, result.multi_label_top1, result.multi_label_images) == (predictor.manifest.digest, 1, 1)


def test_evaluate_accuracy_fetches_next_shard(tmp_path, model, make_labeled_images, monkeypatch):
    folder, data = make_labeled_images(tmp_path / "d", count=24, per_shard=10)
    ahead = []
    monkeypatch.setattr(ImageSource, "fetch_ahead", lambda self, shards: ahead.append(list(shards)))
    evaluate_accuracy(Predictor(model, batch=8), folder, data, LocalStore(tmp_path / "e"))
    assert ahead == [[1], [2], []]


def test_evaluate_accuracy_scores_subset_of_classes(tmp_path, model, make_labeled_images):
    folder, data = make_labeled_images(tmp_path / "d", classes=("d", "b"), damaged=())
    plain, masked = (Predictor(model, batch=8, scored_classes=scored) for scored in (None, ["d", "b"]))
    results = [
        evaluate_accuracy(one, folder, data, LocalStore(tmp_path / str(number))) for number, one in enumerate((plain, masked))
    ]
    assert results[0].scored_classes is None
    assert results[1].scored_classes == ("b", "d")
    rows = read_predictions(LocalStore(tmp_path / "1"), results[1])
    assert set(rows["predicted_class_id"].to_pylist()) <= {1, 3}
    assert set(rows["class_id"].to_pylist()) == {1, 3}
    # By hand: of the columns that belong to the classes, the softmax.
    source = ImageSource(folder, data)
    logits = plain.compute_logits(plain.decode_pixels(list(source.read_encoded(0))))[:, [1, 3]]
    expected = logits.softmax(1).max(1)
    assert rows["confidence"].to_numpy()[:10] == pytest.approx(expected.values.numpy(), rel=1e-4)
    assert rows["predicted_class_id"].to_numpy()[:10].tolist() == [(1, 3)[place] for place in expected.indices.tolist()]
    other_folder, other = make_labeled_images(tmp_path / "e", classes=("a", "b"), damaged=())
    with pytest.raises(DataError, match=r"has class 'a' \(1 of 2\) that is left out of the answers \(classes\); evaluate"):
        evaluate_accuracy(masked, other_folder, other, LocalStore(tmp_path / "f"))
    with pytest.raises(DataError, match="class 'z' is none of the model's"):
        Predictor(model, batch=8, scored_classes=["z"])


def test_evaluate_accuracy_refuses_unknown_classes(tmp_path, model, make_labeled_images):
    folder, data = make_labeled_images(tmp_path / "d", classes=("a", "emu"))
    with pytest.raises(DataError, match=r"has class 'emu' .* that the model does not know"):
        evaluate_accuracy(Predictor(model, batch=8), folder, data, LocalStore(tmp_path / "e"))


def test_evaluate_accuracy_refuses_unlabeled_images(tmp_path, model, make_labeled_images):
    folder, data = make_labeled_images(tmp_path / "d", count=3)
    pool = data.model_copy(update={"role": "unlabeled", "classes": ()})
    with pytest.raises(DataError, match=r"/d: has no labels, so none that the model does not know"):
        evaluate_accuracy(Predictor(model, batch=8), folder, pool, LocalStore(tmp_path / "e"))


def test_evaluate_accuracy_subsample_is_independent_of_shards(tmp_path, model, make_labeled_images):
    wanted = Subsample(images=7, seed=3)
    keys = []
    for per_shard in (5, 24):
        folder, data = make_labeled_images(tmp_path / f"d{per_shard}", per_shard=per_shard, damaged=())
        out = LocalStore(tmp_path / f"e{per_shard}")
        result = evaluate_accuracy(Predictor(model, batch=8), folder, data, out, subsample=wanted)
        assert (result.images, result.subsample) == (7, wanted)
        rows = read_predictions(out, result)
        whole = evaluate_accuracy(Predictor(model, batch=8), folder, data, LocalStore(tmp_path / "w"))
        every = {row["key"]: row for row in read_predictions(LocalStore(tmp_path / "w"), whole).to_pylist()}
        for row in rows.to_pylist():
            assert row["predicted_class_id"] == every[row["key"]]["predicted_class_id"]
        keys.append(rows["key"].to_pylist())
    assert keys[0] == keys[1]
    # Evenly over the five classes: one of each, and two of two of them.
    counts = np.bincount([int(key.removeprefix("image-")) % 5 for key in keys[0]], minlength=5)
    assert sorted(counts.tolist()) == [1, 1, 1, 2, 2]


def test_draw_rows_depends_on_seed_and_is_nested(tmp_path, make_labeled_images):
    folder, data = make_labeled_images(tmp_path / "d", count=100, damaged=())
    source = ImageSource(folder, data, max_open_shards=10)

    def keys(images, seed):
        rows = draw_rows(source, len(data.shards), 5, Subsample(images=images, seed=seed))
        return {source.read_index(shard).keys[row] for shard, own in rows.items() for row in own}

    assert keys(20, 0) != keys(20, 1)
    assert keys(20, 0) < keys(60, 0)
    assert len(keys(1000, 0)) == 100


@pytest.mark.parametrize("form", ["object", "real", "parquet"])
def test_multi_labels_score_predictions(tmp_path, form):
    answers = {"ILSVRC2012_val_00000001": ["b"], "ILSVRC2012_val_00000002": [0, 2], "ILSVRC2012_val_00000003": []}
    path = tmp_path / "labels"
    if form == "object":
        path.write_text(json.dumps(answers))
    elif form == "real":
        path.write_text(json.dumps([[1], [0, 2], []]))
    else:
        names = [["b"], ["a", "c"], []]
        pq.write_table(pa.table({"key": list(answers), "labels": pa.array(names, pa.list_(pa.string()))}), path)
    labels = MultiLabels.load(str(path), ("a", "b", "c"))
    keys = [f"val/{key}" for key in answers]
    assert labels.score_predictions([*keys, "unknown"], np.array([1, 2, 0, 0])) == (1.0, 2)
    assert labels.score_predictions(keys, np.array([0, 0, 0])) == (0.5, 2)
    assert labels.score_predictions(keys[2:], np.array([0])) == (0.0, 0)
    reason = r"labels: names no image of this set: its first key is ILSVRC2012_val_00000001, that of an image is unknown"
    with pytest.raises(DataError, match=reason):
        labels.score_predictions(["unknown"], np.array([0]))


def test_multi_labels_take_paths_of_files(tmp_path):
    (tmp_path / "labels.json").write_text(json.dumps({"val/IMG.1.jpg": ["Café"], "IMG_2.png": [1]}))
    labels = MultiLabels.load(str(tmp_path / "labels.json"), ("Cafe\u0301", "b"))
    assert labels.score_predictions(["val/IMG_1", "val/IMG_2"], np.array([0, 0])) == (0.5, 2)


@pytest.mark.parametrize("text", ["3", "{", '{"a": ["x"]}', '{"a": 1}', "[[7]]", '{"a": [true]}'])
def test_multi_labels_refuse_other_files(tmp_path, text):
    path = tmp_path / "labels.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"labels\.json: "):
        MultiLabels.load(str(path), ("a", "b", "c"))
