import numpy as np
import pytest

from ns.config.schema import LabelingConfig
from ns.core.errors import DataError, StoreError
from ns.data.dataset import Dataset, Shard
from ns.data.index import ShardIndex
from ns.data.shards import ShardSample
from ns.labeling.label_set import (
    HISTOGRAM_BINS,
    LabelSet,
    LabelShard,
    compute_histogram,
    join_label_shards,
    read_histogram,
    read_label_rows,
    verify_label_set,
)
from ns.labeling.predict import write_label_shard
from ns.modeling.predictor import ShardPredictions
from ns.storage import LocalStore
from tests.labeling.dense import expand_probabilities


def pool_of(shards: int) -> Dataset:
    made = [Shard(name=f"shard-{i:05d}.tar", samples=8, bytes=1, sha256=f"{i:064x}") for i in range(shards)]
    return Dataset(name="pool", role="unlabeled", classes=(), shards=tuple(made))


def label(folder, pool: Dataset, index: int, classes: int, seed: int = 0, config=None) -> np.ndarray:
    """Labels a shard with made-up probabilities, the last image unreadable."""
    rng = np.random.default_rng([seed, index])
    probabilities = rng.dirichlet(np.full(classes, 0.1), 8).astype(np.float32)
    probabilities[7] = np.nan
    samples = [ShardSample(f"s{index}-{row}", "png", 0, 1, None) for row in range(8)]
    found = ShardPredictions(ShardIndex.from_samples(samples, [(0, 0)] * 8), probabilities, {7: "truncated"})
    write_label_shard(folder, pool.shards[index], [found], config or LabelingConfig(), "float32")
    return probabilities


def joined(folder, pool, classes: int) -> LabelSet:
    names = tuple(str(index) for index in range(classes))
    return join_label_shards(folder, pool, teacher="t", code="c", classes=names, top_k=10)


@pytest.mark.parametrize("classes", [5, 100, 1000])
def test_label_rows_round_trip_within_top_k(tmp_path, classes):
    folder, pool = LocalStore(tmp_path), pool_of(1)
    probabilities = label(folder, pool, 0, classes)[:7]
    label_set = joined(folder, pool, classes)
    assert label_set.top_k == (classes if classes <= 100 else 10)
    rows = read_label_rows(folder, label_set.shards[0])
    full = expand_probabilities(rows, classes)
    assert full.shape == (8, classes)
    assert np.isnan(full[7]).all()
    np.testing.assert_allclose(full[:7].sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(full[:7].argmax(1), probabilities.argmax(1))
    np.testing.assert_array_equal(rows.confidence[:7], probabilities.max(1))
    error = np.abs(full[:7] - probabilities).max()
    assert error < (1e-3 if classes <= 100 else np.sort(probabilities, 1)[:, -11].max() + 1e-3)


def test_join_label_shards_adds_counts(tmp_path):
    folder, pool = LocalStore(tmp_path), pool_of(3)
    probabilities = np.concatenate([label(folder, pool, index, 4)[:7] for index in range(3)])
    label_set = joined(folder, pool, 4)
    assert (label_set.rows, label_set.unreadable) == (24, 3)
    counts = read_histogram(folder, 4)
    assert counts.shape == (4, HISTOGRAM_BINS)
    assert counts.sum(1).tolist() == np.bincount(probabilities.argmax(1), minlength=4).tolist()
    np.testing.assert_array_equal(counts, compute_histogram(probabilities.argmax(1).astype(np.uint16), probabilities.max(1), 4))


def test_label_set_digest_follows_content(tmp_path):
    sets = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder, pool = LocalStore(tmp_path / name), pool_of(2)
        for index in range(2):
            label(folder, pool, index, 4, seed)
        sets.append(joined(folder, pool, 4).digest)
    assert sets[0] == sets[1] != sets[2]


def test_join_label_shards_names_missing_shard(tmp_path):
    folder, pool = LocalStore(tmp_path), pool_of(2)
    label(folder, pool, 0, 4)
    with pytest.raises(StoreError, match=r"shard-00001\.json"):
        joined(folder, pool, 4)


def test_read_label_rows_refuses_changed_bytes(tmp_path):
    folder, pool = LocalStore(tmp_path), pool_of(1)
    label(folder, pool, 0, 4)
    label_set = joined(folder, pool, 4)
    shard = label_set.shards[0]
    folder.put(shard.name, folder.get(shard.name)[:-1])
    with pytest.raises(DataError, match="label the pool again"):
        read_label_rows(folder, shard)


def test_histogram_puts_confidence_1_into_last_bin():
    counts = compute_histogram(np.array([0, 0, 1], np.uint16), np.array([1.0, 0.9995, 0.0], np.float32), 2)
    assert counts[0, HISTOGRAM_BINS - 1] == 2
    assert counts[1, 0] == 1


@pytest.mark.parametrize("classes", [5, 1000])
def test_log8_keeps_probabilities_to_2_percent(tmp_path, classes):
    folder, pool = LocalStore(tmp_path), pool_of(2)
    made = [label(folder, pool, index, classes, config=LabelingConfig(probabilities="log8")) for index in range(2)]
    label_set = join_label_shards(
        folder, pool, teacher="t", code="c", classes=tuple(map(str, range(classes))), top_k=10, probabilities="log8"
    )
    assert verify_label_set(folder, label_set) == 16
    rows = read_label_rows(folder, label_set.shards[1])
    expected = np.take_along_axis(made[1][:7], rows.top_class[:7].astype(np.int64), 1)
    kept = expected > 2**-15
    np.testing.assert_allclose(rows.top_prob[:7][kept], expected[kept], rtol=0.025)
    assert (rows.top_prob[:7][expected < 2**-17] == 0).all()
    assert not rows.readable[7]
    np.testing.assert_array_equal(rows.confidence[:7], expected[:, 0])
    # Log8 by itself is half as large; keys and confidences are what they were.
    size = label_set.shards[0].bytes
    plain = folder.at("plain")
    label(plain, pool, 0, classes)
    assert LabelShard.load_file(plain, "shard-00000.json").bytes > size
