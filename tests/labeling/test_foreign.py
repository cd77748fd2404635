"""What foreign images are told by."""

import numpy as np
import pyarrow as pa
import pytest

from ns.core.digest import sha256_bytes
from ns.core.errors import DataError
from ns.labeling.foreign import CALIBRATION_SCORES, STATISTICS, ForeignReference, find_foreign_limit, load_foreign_scorer
from ns.storage import LocalStore
from ns.storage.documents import name_by_content
from ns.storage.parquet import encode_table


def make_reference(folder, scores, statistics_sha256=None):
    store = LocalStore(folder)
    scores = np.asarray(scores, np.float32)
    table = encode_table(pa.table({"key": [f"key-{row}" for row in range(len(scores))], "foreign_score": scores}))
    store.put(name_by_content(CALIBRATION_SCORES, sha256_bytes(table)), table)
    ForeignReference(
        kind="distance",
        teacher="0",
        labeled="0",
        labeled_images=1,
        calibration="0",
        calibration_images=len(scores),
        statistics_sha256=statistics_sha256,
        scores_sha256=sha256_bytes(table),
    ).save(store)
    return store


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.95, 1])
def test_limit_is_exceeded_by_the_rest_of_the_calibration_images(tmp_path, quantile):
    scores = np.random.default_rng(0).permutation(200) / 7
    limit = find_foreign_limit(make_reference(tmp_path, scores), quantile)
    assert (scores.astype(np.float32) > limit).sum() in (round(200 * (1 - quantile)) - 1, round(200 * (1 - quantile)))


def test_files_of_a_reference_are_checked(tmp_path):
    store = make_reference(tmp_path, np.arange(10), statistics_sha256="0" * 64)
    statistics = name_by_content(STATISTICS, "0" * 64)
    store.put(statistics, b"others")
    with pytest.raises(
        DataError, match=rf"{statistics}: sha256 differs from foreign\.json; the file is damaged or was replaced"
    ):
        load_foreign_scorer(store)
    scores = next(store.list("calibration-"))
    store.put(scores, b"others")
    with pytest.raises(DataError, match=rf"{scores}: sha256 differs from foreign\.json"):
        find_foreign_limit(store, 0.95)
