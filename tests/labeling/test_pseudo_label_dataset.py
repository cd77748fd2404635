import numpy as np
import pyarrow as pa
import pytest

from ns.config.schema import SelectionConfig
from ns.core.errors import DataError
from ns.data.dataset import Dataset, Shard
from ns.data.index import ShardIndex
from ns.data.shards import ShardSample
from ns.labeling.label_set import LabelRows, build_row_schema, read_label_rows
from ns.labeling.pseudo_label_dataset import TopKTargets, load_pseudo_labels
from ns.labeling.selection import make_selection
from ns.storage import LocalStore
from tests.labeling.dense import expand_probabilities

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


def save_index(tmp_path, keys: str) -> tuple[LocalStore, Dataset]:
    samples = [ShardSample(key, "png", 0, 1, None) for key in keys]
    pool = LocalStore(tmp_path / "pool")
    shard = ShardIndex.from_samples(samples, [(0, 0)] * len(keys)).save(pool, pool_of().shards[0])
    return pool, pool_of().model_copy(update={"shards": (shard,)})


def test_targets_are_the_probabilities_of_the_label_set(make_label_set, tmp_path):
    classes = tuple("abcdefgh")
    store, label_set = make_label_set(tmp_path, [ROWS], classes, pool_of())
    policy = SelectionConfig(per_class=2, min_confidence=0.5)
    selection = make_selection(store, label_set, policy, seed=0, label_set_key=".")
    pseudo = load_pseudo_labels(store, label_set, selection, *save_index(tmp_path, "abcd"))
    expected = expand_probabilities(read_label_rows(store, label_set.shards[0]), len(classes))
    for row in (0, 2):
        np.testing.assert_allclose(pseudo.read_targets(0)[row], expected[row], rtol=1e-6)


def test_targets_refuse_keys_of_another_pool(make_label_set, tmp_path):
    store, label_set = make_label_set(tmp_path, [ROWS], CLASSES, pool_of())
    selection = make_selection(store, label_set, SelectionConfig(), seed=0, label_set_key=".")
    pseudo = load_pseudo_labels(store, label_set, selection, *save_index(tmp_path, "abce"))
    with pytest.raises(DataError, match=r"its keys are not those of the pool's shard 0: label the pool again"):
        pseudo.read_targets(0)


def build_rows(class_ids: np.ndarray, probabilities: np.ndarray) -> LabelRows:
    count, top_k = class_ids.shape
    table = pa.table(
        [
            [str(row) for row in range(count)],
            pa.array(probabilities[:, 0].astype(np.float32)),
            pa.FixedSizeListArray.from_arrays(pa.array(class_ids.reshape(-1).astype(np.uint16)), top_k),
            pa.FixedSizeListArray.from_arrays(pa.array(probabilities.reshape(-1).astype(np.float16)), top_k),
            pa.nulls(count, pa.string()),
        ],
        schema=build_row_schema(top_k),
    )
    return LabelRows(table)


def test_targets_spread_the_rest_evenly():
    rows = build_rows(np.array([[3, 1]]), np.array([[0.6, 0.2]]))
    target = TopKTargets(rows, np.array([0]), 6)[0]
    assert target.dtype == np.float32
    np.testing.assert_allclose(target, [0.05, 0.2, 0.05, 0.6, 0.05, 0.05], atol=1e-3)


@pytest.mark.parametrize(("classes", "top_k"), [(5, 5), (1000, 10)])
def test_targets_of_kept_rows_equal_expanded_probabilities(classes, top_k):
    rng = np.random.default_rng(0)
    probabilities = -np.sort(-rng.dirichlet(np.full(classes, 0.1), 50))[:, :top_k]
    rows = build_rows(np.stack([rng.permutation(classes)[:top_k] for _ in range(50)]), probabilities)
    kept_rows = np.flatnonzero(rng.random(50) < 0.3)
    targets = TopKTargets(rows, kept_rows, classes)
    expected = expand_probabilities(rows, classes)
    for row in kept_rows.tolist():
        np.testing.assert_allclose(targets[row], expected[row], rtol=1e-6)
        assert targets[row].sum() == pytest.approx(1, abs=1e-6)
