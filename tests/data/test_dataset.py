import json

import pytest

from ns.core.errors import DataError, StoreError
from ns.data.dataset import Dataset, Shard
from ns.storage import LocalStore

SHARDS = tuple(
    Shard(name=f"shard-{number:05d}.tar", samples=3 + number, bytes=10_240, sha256=f"{number:064x}") for number in range(2)
)
DATASET = Dataset(name="animals", role="labeled", classes=("cat", "dog"), shards=SHARDS, rejected=1)


def edited(folder, **fields):
    DATASET.save(folder)
    document = json.loads(folder.get(Dataset.filename))
    folder.put(Dataset.filename, json.dumps({**document, **fields}).encode())
    return folder


def test_dataset_is_read_back_as_written(tmp_path):
    DATASET.save(LocalStore(tmp_path))
    assert Dataset.load(LocalStore(tmp_path)) == DATASET
    assert (DATASET.samples, DATASET.bytes) == (7, 20_480)


def test_dataset_digest_depends_on_content_only(tmp_path):
    assert DATASET.model_copy(update={"name": "pets", "rejected": 9}).digest == DATASET.digest
    for fields in ({"classes": ("dog", "cat")}, {"role": "evaluation"}, {"shards": SHARDS[::-1]}, {"shards": SHARDS[:1]}):
        assert DATASET.model_copy(update=fields).digest != DATASET.digest


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"classes": ["dog", "cat"]}, "digest: .* the file was edited or damaged"),
        ({"digest": "0" * 64}, "digest: .* the file was edited or damaged"),
        ({"role": "training"}, "role: .*labeled"),
        ({"format": 2}, "format: "),
        ({"color": "red"}, "color: "),
        ({"rejected": -1}, "rejected: "),
        ({"shards": [{**SHARDS[0].model_dump(), "name": "../shard.tar"}]}, r"shards\.0\.name: "),
        ({"shards": [{**SHARDS[0].model_dump(), "sha256": "abc"}]}, r"shards\.0\.sha256: "),
        ({"shards": [{**SHARDS[0].model_dump(), "samples": -1}]}, r"shards\.0\.samples: "),
    ],
)
def test_invalid_dataset_manifest_error_names_field(tmp_path, fields, reason):
    with pytest.raises(DataError, match=rf"dataset\.json: {reason}"):
        Dataset.load(edited(LocalStore(tmp_path), **fields))


def test_dataset_load_names_missing_manifest(tmp_path):
    with pytest.raises(StoreError, match=r"dataset\.json"):
        Dataset.load(LocalStore(tmp_path))
