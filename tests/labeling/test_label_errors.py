import numpy as np
import pytest

from ns.core.errors import DataError
from ns.data.dataset import Dataset
from ns.data.importing.writer import ShardWriter
from ns.data.loading.shard_reader import ImageSource
from ns.labeling.label_errors import find_label_errors
from ns.modeling.predictor import ShardPredictions
from ns.storage import LocalStore

CLASSES = ("a", "b", "c")


class Teacher:
    """Knows the class of every image: its key says it."""

    class manifest:  # noqa: N801
        classes = CLASSES

    def predict_shard(self, source: ImageSource, shard: int, progress) -> ShardPredictions:
        index = source.read_index(shard)
        probabilities = np.full((len(index), 3), 0.05, np.float32)
        probabilities[np.arange(len(index)), [CLASSES.index(key[0]) for key in index.keys]] = 0.9
        if shard == 0:
            probabilities[0] = np.nan
        return ShardPredictions(index, probabilities, {})


@pytest.fixture
def made(tmp_path, picture):
    store = LocalStore(tmp_path)
    with ShardWriter(store, max_samples=25, max_bytes=1 << 24) as writer:
        for number in range(90):
            label = number % 3
            wrong = number in (31, 62)
            writer.add_image(f"{CLASSES[label]}-{number}", "png", picture(number), (label + 1) % 3 if wrong else label)
    return store, Dataset(name="n", role="labeled", classes=CLASSES, shards=writer.shards)


def test_find_label_errors_lists_doubted_labels(made):
    table = find_label_errors(Teacher(), *made)
    assert sorted(table["key"].to_pylist()) == ["b-31", "c-62"]
    assert set(zip(table["class_name"].to_pylist(), table["predicted_class_name"].to_pylist(), strict=True)) == {
        ("c", "b"),
        ("a", "c"),
    }
    assert table["class_probability"].to_pylist() == pytest.approx([0.05, 0.05])


def test_find_label_errors_refuses_other_classes(made):
    folder, data = made
    with pytest.raises(DataError, match="has other classes than the model"):
        find_label_errors(Teacher(), folder, data.model_copy(update={"classes": ("a", "b", "d")}))
