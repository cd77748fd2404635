import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ns.errors import DataError
from ns.evaluate.accuracy import summarise, table_of
from ns.evaluate.result import MANIFEST, Evaluation, read_predictions
from ns.store import LocalStore

CLASSES = tuple(f"class {index}" for index in range(7))


def evaluation(table, **fields) -> Evaluation:
    options = {"model": "m", "dataset": "d", "classes": CLASSES, "unreadable": 0, "predictions_sha256": "0", **fields}
    return summarise(table, **options)


@given(st.integers(1, 40), st.integers(0, 10_000))
def test_numbers_equal_those_counted_by_hand(images, seed):
    rng = np.random.default_rng(seed)
    # Few distinct values, so that ties are common.
    probabilities = rng.integers(1, 4, (images, 7)).astype(np.float32)
    probabilities /= probabilities.sum(1, keepdims=True)
    labels = rng.integers(0, 7, images)
    table = table_of([str(index) for index in range(images)], labels, probabilities)
    result = evaluation(table)
    top1 = top5 = 0
    for row, label in zip(probabilities, labels, strict=True):
        ranking = sorted(range(7), key=lambda index: (-row[index], index))
        top1 += ranking[0] == label
        top5 += label in ranking[:5]
    assert result.top1 == pytest.approx(top1 / images)
    assert result.top5 == pytest.approx(top5 / images)
    assert sum(map(sum, result.confusion)) == images
    assert sum(result.confusion[index][index] for index in range(7)) == top1
    for index, accuracy in enumerate(result.class_accuracy):
        own = labels == index
        if own.any():
            assert accuracy == pytest.approx((probabilities[own].argmax(1) == index).mean())
        else:
            assert accuracy is None


def test_predictions_are_read_back_only_if_they_are_the_recorded_ones(tmp_path):
    folder = LocalStore(tmp_path)
    result = evaluation(table_of(["a"], np.array([0]), np.full((1, 7), 1 / 7, np.float32)))
    result.write(folder, MANIFEST)
    assert Evaluation.read(folder, MANIFEST) == result
    folder.put("predictions.parquet", b"other")
    with pytest.raises(DataError, match="evaluate again"):
        read_predictions(folder, result)
