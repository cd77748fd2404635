"""What containers may have. Real ones are in tests/integration/test_docker.py."""

import pytest

from ns.config import schema as config
from ns.storage import LocalStore, open_store
from pipelines.runners import docker


@pytest.mark.parametrize(
    ("overrides", "without"),
    [
        ([], True),
        (["data.test=/data/test"], True),
        (["data.pool=s3://bucket/pool"], False),
        (["evaluation.sets={real: {place: /data/val, multi_label: s3://bucket/real.json}}"], False),
        (["registry={git: git@git.example:labels.git}"], False),
    ],
)
def test_containers_have_no_network_if_all_that_a_run_reads_and_writes_is_in_folders(tmp_path, overrides, without):
    assert (
        docker.is_offline(LocalStore(tmp_path), config.load_experiment(config.resolve_preset("quickstart"), overrides))
        is without
    )


def test_containers_have_a_network_for_a_root_on_s3():
    assert not docker.is_offline(open_store("s3://bucket/runs"), config.load_experiment(config.resolve_preset("quickstart")))
