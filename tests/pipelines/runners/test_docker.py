"""Options of containers. Real containers are in tests/integration/test_docker.py."""

import pytest

from ns.config.loader import load_experiment, resolve_preset
from ns.storage import LocalStore, open_store
from pipelines.runners import docker


@pytest.mark.parametrize(
    ("overrides", "offline"),
    [
        ([], True),
        (["data.test=/data/test"], True),
        (["data.pool=s3://bucket/pool"], False),
        (["evaluation.sets={real: {uri: /data/val, multi_label: s3://bucket/real.json}}"], False),
        (["registry={git: git@git.example:labels.git}"], False),
    ],
)
def test_is_offline_with_local_folders_only(tmp_path, overrides, offline):
    assert docker.is_offline(LocalStore(tmp_path), load_experiment(resolve_preset("quickstart"), overrides)) is offline


def test_is_offline_is_false_with_a_root_on_s3():
    assert not docker.is_offline(open_store("s3://bucket/runs"), load_experiment(resolve_preset("quickstart")))
