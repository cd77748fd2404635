"""Where MLflow's alias stands after a pointer has moved."""

import pytest
from structlog.testing import capture_logs

from ns.modeling.manifest import ModelManifest
from ns.promotion import mlflow_registry
from ns.promotion.mlflow_registry import register_model
from ns.promotion.promote import read_candidate
from tests.reporting.conftest import RUN

pytestmark = pytest.mark.integration

MODEL = "store/models/01"


@pytest.fixture
def client(monkeypatch, tmp_path):
    """MLflow in a folder. The folders of models hold one file: `ns export` has tests of its own."""
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")

    def write_model(model, root, run, folder):
        folder.mkdir()
        (folder / "MLmodel").write_text(f"{model.uri} {root.uri} {run}")

    monkeypatch.setattr(mlflow_registry, "_write_model", write_model)
    return MlflowClient()


@pytest.fixture
def pointers(made_up, monkeypatch):
    """Of two models of a run."""
    monkeypatch.setattr("ns.promotion.promote.verify_model", lambda *_: 7)
    first = read_candidate(made_up, RUN).pointer
    manifest = ModelManifest.load(made_up.at(MODEL)).model_copy(update={"generation": 7})
    second = first.model_copy(update={"model": made_up.at("store/models/02").uri, "digest": manifest.digest, "generation": 7})
    return first, second


def test_alias_follows_the_pointer_there_and_back(client, pointers):
    first, second = pointers
    moves = [(first, None, "1"), (second, first, "2"), (first, second, "1"), (first, first, "1")]
    for pointer, before, version in moves:
        registered = register_model(pointer, before, "production")
        assert registered.version == version
        assert client.get_model_version_by_alias(registered.name, "production").tags["noisy_student.digest"] == pointer.digest
    assert len(client.search_model_versions(f"name = '{registered.name}'")) == 2


def test_alias_leaves_the_registered_model_of_another_experiment(client, pointers, made_up):
    from mlflow.exceptions import MlflowException

    first, second = pointers
    name = register_model(first, None, "production").name
    made_up.put("other/config.yaml", b"name: other\n")
    other = second.model_copy(update={"run": "other"})
    assert register_model(other, first, "production") == ("other", "1")
    with pytest.raises(MlflowException, match="production"):
        client.get_model_version_by_alias(name, "production")
    assert register_model(first, other, "production") == (name, "1")
    assert client.get_model_version_by_alias(name, "production").version == 1


def test_a_server_that_is_away_is_told_with_the_cure(pointers, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with capture_logs() as logs:
        assert register_model(pointers[0], None, "production") is None
    assert [entry["event"] for entry in logs] == [f"not registered in MLflow; `ns promote {RUN}` tries again"]
