"""The benchmark of polluted pools: what it generates, and how it counts."""

import numpy as np
import pytest

from benchmarks.polluted_pool import (
    PoolLabels,
    PoolSizes,
    compute_pool_figures,
    load_digit_classes,
    make_foreign_images,
    write_experiment_data,
)
from ns.data.dataset import Dataset
from ns.data.index import ShardIndex
from ns.storage import LocalStore


def test_polluted_pool_is_the_same_for_a_seed_and_has_equally_many_images_of_each_kind():
    digits = load_digit_classes()
    withheld = [digits[str(digit)] for digit in (7, 8, 9)]
    kinds, again, other = (make_foreign_images(withheld, digits["0"], 50, seed) for seed in (0, 0, 1))
    assert {kind: images.shape for kind, images in kinds.items()} == dict.fromkeys(
        ("withheld", "digits", "noise", "textures"), (50, 32, 32, 3)
    )
    assert all(images.dtype == np.uint8 for images in kinds.values())
    assert all(np.array_equal(images, again[kind]) for kind, images in kinds.items())
    assert not np.array_equal(kinds["textures"], other["textures"])


def test_parts_share_no_image_and_the_pool_has_no_labels(tmp_path):
    digits = load_digit_classes()
    known = {name: digits[name] for name in ("0", "1")}
    foreign = make_foreign_images([digits["2"]], None, 10, 0)
    sizes = PoolSizes(labeled=6, calibration=3, heldout=2, pool=5, epochs=1, channels=(8, 8, 8, 8))
    data = write_experiment_data(tmp_path, known, foreign, sizes)
    blobs, keys = [], {}
    for part, folder in data.items():
        store = LocalStore(folder)
        dataset = Dataset.load(store)
        assert dataset.classes == (() if part == "pool" else ("0", "1"))
        index = ShardIndex.load(store, dataset.shards[0])
        keys[part] = index.keys
        blobs += [
            store.get_range(dataset.shards[0].name, int(offset), int(size))
            for offset, size, key in zip(index.offsets, index.sizes, index.keys, strict=True)
            if key.rpartition("/")[0] in known
        ]
    assert len(set(blobs)) == len(blobs) == 2 * (6 + 3 + 2 + 5)
    assert {part: len(part_keys) for part, part_keys in keys.items()} == {
        "labeled": 12, "calibration": 6, "heldout": 4, "pool": 10 + 3 * 10
    }  # fmt: skip


def test_figures_count_foreign_images_as_wrong():
    names = np.array(["a"] * 10 + ["withheld"] * 10 + ["noise"] * 10 + ["textures"] * 10)
    is_right = np.arange(40) < 9
    kept = (np.arange(40) < 10) | (np.arange(40) % 10 < 4)
    familiar = np.concatenate([np.ones(20, np.bool_), np.zeros(10, np.bool_), np.arange(10) < 2])
    figures = compute_pool_figures(PoolLabels(names, is_right, kept, kept & familiar, familiar), ["a"])
    assert figures["kept_precision_clean"] == pytest.approx(0.9)
    assert figures["kept_precision_polluted"] == pytest.approx(9 / 14, abs=1e-4)
    assert figures["kept_precision_filtered"] == pytest.approx(9 / 11, abs=1e-4)
    assert figures["kept_precision_filtered.noise"] == pytest.approx(0.9)
    assert figures["kept_precision_filtered.withheld"] == pytest.approx(9 / 14, abs=1e-4)
    assert figures["precision_lost"] == pytest.approx(100 * (9 / 10 - 9 / 11), abs=0.01)
    assert figures["foreign_share_kept"] == pytest.approx(0.1)
    assert figures["kept_share"] == 1
