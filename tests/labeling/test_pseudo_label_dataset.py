import pytest

from ns.config.schema import SelectionConfig
from ns.core.errors import DataError
from ns.data.dataset import Dataset, Shard
from ns.labeling.pseudo_label_dataset import load_pseudo_labels
from ns.labeling.selection import make_selection
from ns.storage import LocalStore

CLASSES = ("cat", "dog")
ROWS = [("a", 0, 0.9), ("b", 0, 0.2), ("c", 1, 0.8), ("d", 1, None)]


def pool_of(digit: str = "0"):
    shard = Shard(name="shard-00000.tar", samples=len(ROWS), bytes=1, sha256=digit * 64)
    return Dataset(name="pool", role="unlabeled", classes=(), shards=(shard,))


@pytest.mark.parametrize("times", [1, 255, 256, 65_535, 65_536, 100_000])
def test_pseudo_labels_repeat_images_as_selected(make_label_set, tmp_path, times):
    store, label_set = make_label_set(tmp_path, [ROWS], CLASSES, pool_of())
    policy = SelectionConfig(per_class=times, max_repeat=100_000)
    selection = make_selection(store, label_set, policy, seed=0, label_set_key=".")
    found = load_pseudo_labels(store, label_set, selection, LocalStore(tmp_path), pool_of())
    assert found.copies[0].tolist() == [times, 0, times, 0]


def test_load_pseudo_labels_refuses_another_pool(make_label_set, tmp_path):
    store, label_set = make_label_set(tmp_path, [ROWS], CLASSES, pool_of())
    selection = make_selection(store, label_set, SelectionConfig(), seed=0, label_set_key=".")
    with pytest.raises(DataError, match="label the pool again"):
        load_pseudo_labels(store, label_set, selection, LocalStore(tmp_path), pool_of("1"))
