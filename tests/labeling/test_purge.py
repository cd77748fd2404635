"""Label sets without some images."""

import numpy as np
import pytest

from ns.core.errors import DataError
from ns.labeling.label_set import iter_label_rows, verify_label_set
from ns.labeling.purge import purge_images
from ns.runs.lookup import (
    open_label_set,
)
from ns.storage import LocalStore
from tests.loop import find_pool_key


def test_purged_label_set_lacks_only_the_purged_images(finished_run, tmp_path):
    store, ref = finished_run
    labels = open_label_set(store, f"{ref.run}/gen-1")
    keys = [find_pool_key(store, ref.run), find_pool_key(store, ref.run, wanted=False)]
    target = LocalStore(tmp_path / "purged")
    made, count = purge_images(labels.store, labels.label_set, keys, target)
    assert count == 2
    assert made.digest != labels.label_set.digest
    assert verify_label_set(target, made, labels.open_pool(store)) == 847
    assert made.left_out == labels.label_set.left_out + 2
    same = [a.sha256 == b.sha256 for a, b in zip(made.shards, labels.label_set.shards, strict=True)]
    before = {
        key: c
        for rows in iter_label_rows(labels.store, labels.label_set)
        for key, c in zip(rows.keys, rows.confidence, strict=True)
    }
    after = {key: c for rows in iter_label_rows(target, made) for key, c in zip(rows.keys, rows.confidence, strict=True)}
    assert {key for key in before if not np.array_equal(before[key], after[key], equal_nan=True)} <= set(keys)
    assert all(np.isnan(after[key]) for key in keys)
    touched = {n for n, rows in enumerate(iter_label_rows(labels.store, labels.label_set)) if set(keys) & set(rows.keys)}
    assert sum(same) == len(same) - len(touched)
    with pytest.raises(DataError, match="1 of the keys are not in this label set; the first: nobody"):
        purge_images(labels.store, labels.label_set, ["nobody"], target)
