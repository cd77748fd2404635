"""What a component finds in its pod: secrets and settings, as files that Kubernetes mounts."""

import os

import pytest

from components.cluster import mounts
from ns.core.errors import ConfigError
from ns.storage.endpoint import S3Endpoint


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Folders as Kubernetes mounts a Secret or ConfigMap that is missing: empty."""
    made = {name: tmp_path / name for name in ("store", "registry", "mlflow", "settings")}
    for name, folder in made.items():
        folder.mkdir()
        monkeypatch.setattr(mounts, f"{name.upper()}_FOLDER", str(folder))
    return made


def test_read_mounts_finds_keys_login_and_settings(folders):
    (folders["store"] / "accesskey").write_text("key")
    (folders["store"] / "secretkey").write_text("hidden")
    for key, value in {"username": "robot", "password": "word", "host": "git.example"}.items():
        # As `--from-file` makes them, of files that end with a newline.
        (folders["registry"] / key).write_text(f"{value}\n")
    (folders["mlflow"] / "username").write_text("tracker")
    (folders["mlflow"] / "password").write_text("pass")
    (folders["settings"] / "MLFLOW_TRACKING_URI").write_text("http://mlflow:5000")
    (folders["settings"] / "AWS_ENDPOINT_URL").write_text("http://seaweedfs:9000")
    (folders["settings"] / "PATH").write_text("is none of the settings")
    environment = {"AWS_REGION": "eu-west-1"}
    mounts.read_mounts(environment)
    # The keys stay in their files, where a changed key is seen, and no process that is started has them in its environment.
    assert environment == {
        "NS_S3_SECRETS": str(folders["store"]),
        "NS_GIT_USERNAME": "robot",
        "NS_GIT_PASSWORD": "word",
        "NS_GIT_HOST": "git.example",
        "MLFLOW_TRACKING_USERNAME": "tracker",
        "MLFLOW_TRACKING_PASSWORD": "pass",
        "MLFLOW_TRACKING_URI": "http://mlflow:5000",
        "AWS_ENDPOINT_URL": "http://seaweedfs:9000",
        "AWS_REGION": "eu-west-1",
    }
    assert S3Endpoint.from_environment(environment).secrets == str(folders["store"])


@pytest.mark.parametrize("exist", [True, False], ids=["empty", "missing"])
def test_read_mounts_of_nothing_changes_nothing(folders, exist):
    if not exist:
        for folder in folders.values():
            folder.rmdir()
    environment = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "hidden"}
    mounts.read_mounts(environment)
    assert environment == {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "hidden"}


@pytest.mark.parametrize("content", [b"\xff\xfehidden", b"hid\0den"], ids=["no text", "null byte"])
def test_read_mounts_names_a_bad_file_and_not_its_content(folders, content):
    (folders["registry"] / "password").write_bytes(content)
    with pytest.raises(ConfigError, match="registry/password: is no text") as caught:
        mounts.read_mounts(os.environ)
    assert "hid" not in str(caught.value)
