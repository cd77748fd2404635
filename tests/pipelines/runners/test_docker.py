"""Options of containers. Real containers are in tests/integration/test_docker.py."""

import pytest

from ns.config.loader import load_experiment, resolve_preset
from ns.core.errors import ConfigError
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


def test_list_read_paths_are_data_keys_and_certificates():
    experiment = load_experiment(
        resolve_preset("quickstart"), ["data.pool=/data/pool", "data.labeled='file:///data/la%20beled'"]
    )
    environment = {"NS_S3_SECRETS": "/run/keys", "SSL_CERT_FILE": "/etc/ca.pem", "AWS_ACCESS_KEY_ID": "/none"}
    assert set(docker.list_read_paths(experiment, environment)) == {
        "/data/pool", "/data/la beled", "/run/keys", "/etc/ca.pem"
    }  # fmt: skip


def test_list_run_files_leaves_what_is_not_ours(tmp_path):
    for name in (
        "store/runs/one.json",
        "store/runs/two.json",
        "store/models/a/model.json",
        "one/config.yaml",
        "two/config.yaml",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "one" / "linked").symlink_to("/etc")
    ours = {str(path.relative_to(tmp_path)) for path in docker.list_run_files(tmp_path, "one")}
    assert {".", "store", "store/models/a/model.json", "one/config.yaml"} <= ours
    assert not any(name.startswith(("two", "one/linked/")) for name in ours)
    (tmp_path / "thesis.tex").touch()
    ours = {str(path.relative_to(tmp_path)) for path in docker.list_run_files(tmp_path, "one")}
    assert "thesis.tex" not in ours
    assert "." not in ours, "a folder that holds other things stays as it is"


def test_docker_runner_without_an_engine_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path / 'no.sock'}")
    with pytest.raises(ConfigError, match=r"no container engine answers \(.*\); start Docker or Podman, or set DOCKER_HOST"):
        docker.run_in_containers(
            config_uri="quickstart",
            root=LocalStore(tmp_path / "root"),
            run="test",
            experiment=load_experiment(resolve_preset("quickstart")),
            container=docker.ContainerOptions(),
            log=None,
            on_event=lambda _: None,
        )
