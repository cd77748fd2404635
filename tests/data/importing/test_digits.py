import io
import itertools
import sys

import numpy as np
import pytest
from PIL import Image

from ns.core.errors import DataError
from ns.data.dataset import Dataset
from ns.data.importing.digits import write_digits
from ns.data.shards import read_samples
from ns.storage import LocalStore

PARTS = ("labeled", "pool", "heldout", "test")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Each part's store and dataset."""
    folders = {part: LocalStore(tmp_path_factory.mktemp(part)) for part in PARTS}
    return {part: (folder, write_digits(f"digits:{part}", folder)) for part, folder in folders.items()}


def samples(folder, dataset):
    return [(shard.name, sample) for shard in dataset.shards for sample in read_samples(folder.path(shard.name))]


def test_digits_are_split_evenly_without_overlap(parts):
    counts = {"labeled": 50, "pool": 847, "heldout": 500, "test": 400}
    assert {part: dataset.samples for part, (_, dataset) in parts.items()} == counts
    keys = {part: [sample.key for _, sample in samples(*parts[part])] for part in PARTS}
    assert sorted(itertools.chain(*keys.values())) == [f"digit-{index:04d}" for index in range(1797)]
    for part, each in (("labeled", 5), ("heldout", 50), ("test", 40)):
        labels = [sample.class_id for _, sample in samples(*parts[part])]
        assert [labels.count(label) for label in range(10)] == [each] * 10


def test_digits_pool_has_no_labels(parts):
    folder, dataset = parts["pool"]
    assert all(sample.class_id is None for _, sample in samples(folder, dataset))
    assert dataset.classes == ()
    assert dataset.role == "unlabeled"
    assert len(dataset.shards) == 2


def test_digits_equal_scikit_learns(parts):
    from sklearn.datasets import load_digits

    bunch = load_digits()
    folder, dataset = parts["labeled"]
    for name, sample in samples(folder, dataset):
        index = int(sample.key.removeprefix("digit-"))
        pixels = np.asarray(Image.open(io.BytesIO(folder.get_range(name, sample.offset, sample.size))))
        assert np.array_equal(pixels, np.rint(bunch["images"][index] * 255 / 16))
        assert dataset.classes[sample.class_id] == str(bunch["target"][index])


@pytest.mark.parametrize("part", PARTS)
def test_digits_split_is_fixed(parts, part, tmp_path):
    assert write_digits(f"digits:{part}", LocalStore(tmp_path)) == parts[part][1]
    assert Dataset.load(LocalStore(tmp_path)) == parts[part][1]


def test_digits_error_without_scikit_learn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(DataError, match=r"pip install 'noisy-student\[quickstart\]'"):
        write_digits("digits:pool", LocalStore(tmp_path))
