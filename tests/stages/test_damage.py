"""Blobs of finished work that were lost or cut off: the next pass makes them again, equal to the byte."""

import shutil

import pytest

from ns.storage import LocalStore
from tests.loop import open_tiny_run, run_loop

KINDS = (".tar", ".index.parquet", ".safetensors", "evaluations/*/*.parquet", "labels/*/shard-*.parquet")


def read_results(store):
    """What must be the same after a repair: no times, no seconds."""
    paths = sorted(path for kind in KINDS for path in (store.root / "store").rglob(f"*{kind}" if kind[0] == "." else kind))
    return {str(path.relative_to(store.root)): path.read_bytes() for path in paths if "checkpoints" not in path.parts}


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """The store of a finished run, and of no other: what only others made would not be made again."""
    store = LocalStore(tmp_path_factory.mktemp("calm"))
    run_loop(open_tiny_run(store))
    return store


@pytest.mark.integration
@pytest.mark.parametrize(
    "patterns",
    [
        ("datasets/*/shard-00000.tar", "labels/*/shard-00001-*[0-9a-f].parquet", "evaluations/*/predictions-*.parquet"),
        (
            "datasets/*/*.index.parquet",
            "labels/*/*.histogram.parquet",
            "labels/*/histogram.parquet",
            "selections/*/selection.json",
        ),
        ("models/*/model-*.safetensors", "checks/*/left_out.parquet", "labels/*/shard-00000.json"),
        ("models/*/model.json", "evaluations/*/evaluation.json", "datasets/*/dataset.json", "ledger/*/*.json"),
    ],
    ids=["images", "tables", "weights", "manifests"],
)
@pytest.mark.parametrize("lost", [True, False], ids=["lost", "cut"])
def test_damaged_blobs_are_made_again(calm, tmp_path, patterns, lost):
    shutil.copytree(calm.root, tmp_path / "root")
    store = LocalStore(tmp_path / "root")
    ref = open_tiny_run(store)
    before = read_results(store)
    for pattern in patterns:
        paths = sorted((store.root / "store").glob(pattern))
        assert paths, pattern
        for path in paths:
            if lost:
                path.unlink()
            else:
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    run_loop(ref)
    assert read_results(store) == before
