"""The way to Kubeflow and the store of a cluster."""

import os
import socket

import pytest

from k8s import __main__ as program
from k8s.access import StoreService, find_store_service, open_cluster_access
from k8s.kubectl import Kubectl, NotFoundError
from ns.cli.app import run_app
from ns.core.errors import ClusterError
from ns.storage.endpoint import EnvironmentCredentials, S3Endpoint
from tests.k8s.conftest import thing
from tests.k8s.fake_kubectl import Fake

IN_CLUSTER = {"AWS_ENDPOINT_URL": "http://seaweedfs.kubeflow:9000", "AWS_REGION": "us-east-1", "NS_METRICS_PORT": "9090"}


@pytest.fixture
def cluster(monkeypatch, tmp_path):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "NS_KFP_UI"):
        monkeypatch.delenv(name, raising=False)
    objects = [
        thing("ConfigMap", "noisy-student", "kubeflow", data=IN_CLUSTER),
        thing("Service", "seaweedfs", "kubeflow"),
        thing("Secret", "mlpipeline-minio-artifact", "kubeflow", data={"accesskey": "a2V5", "secretkey": "aGlkZGVu"}),
    ]
    fake = Fake(tmp_path, monkeypatch, objects)
    fake.state["ports"] = {"service/ml-pipeline": 5001, "service/seaweedfs": 5002}
    fake.save()
    return fake


@pytest.mark.parametrize(
    ("endpoint", "service"),
    [
        ("http://seaweedfs.kubeflow:9000", StoreService("kubeflow", "seaweedfs", 9000)),
        ("http://seaweedfs.kubeflow.svc.cluster.local:8333", StoreService("kubeflow", "seaweedfs", 8333)),
        ("http://seaweedfs", StoreService("kubeflow", "seaweedfs", 80)),
        ("http://minio.kubeflow:9000", None),
        ("https://s3.us-east-1.amazonaws.com", None),
        ("", None),
    ],
)
def test_find_store_service_is_one_of_the_cluster(cluster, endpoint, service):
    assert find_store_service(Kubectl("kind-test"), {"AWS_ENDPOINT_URL": endpoint}, "kubeflow") == service


def test_cluster_access_sets_the_environment_inside(cluster, monkeypatch):
    # A person's own keys, of another store: neither the token nor the folder belongs to the cluster's keys.
    monkeypatch.setenv("AWS_SESSION_TOKEN", "own")
    monkeypatch.setenv("NS_S3_SECRETS", "/own")
    before = dict(os.environ)
    with open_cluster_access(Kubectl("kind-test"), "kubeflow", print) as url:
        assert url == "http://127.0.0.1:5001"
        added = {name: value for name, value in os.environ.items() if before.get(name) != value}
        assert added == {
            "NS_KFP_UI": "http://localhost:8080",
            "AWS_ENDPOINT_URL": "http://127.0.0.1:5002",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "hidden",
            "AWS_SESSION_TOKEN": "",
            "NS_S3_SECRETS": "",
        }
        keys = EnvironmentCredentials().retrieve()
        assert (S3Endpoint.from_environment().secrets, keys.access_key, keys.session_token) == (None, "key", None)
    assert dict(os.environ) == before


def test_cluster_access_leaves_an_endpoint_that_is_named(cluster, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://store.example")
    with open_cluster_access(Kubectl("kind-test"), "kubeflow", print):
        assert os.environ["AWS_ENDPOINT_URL"] == "https://store.example"
        assert "AWS_ACCESS_KEY_ID" not in os.environ
    assert cluster.calls("secret|seaweedfs") == []


def test_cluster_access_without_the_right_to_the_keys(cluster):
    cluster.rule("get secret", stderr="Error from server (Forbidden): secrets is forbidden")
    with open_cluster_access(Kubectl("kind-test"), "kubeflow", print):
        assert "AWS_ACCESS_KEY_ID" not in os.environ


def test_cluster_access_without_kubeflow_is_an_error(cluster):
    cluster.rule("port-forward service/ml-pipeline ", stderr='Error from server (NotFound): services "ml-pipeline" not found')
    with pytest.raises(NotFoundError), open_cluster_access(Kubectl("kind-test"), "kubeflow", print):
        pass


def test_ui_forwards_pages_and_store_and_prints_the_environment(cluster, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr(program.webbrowser, "open", opened.append)

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(program.signal, "pause", interrupt)
    assert run_app(program.app, ["ui", "--context=kind-test", "--port=8081", "--store-port=9001"], "make") == 0
    out = capsys.readouterr().out
    secret = "kubectl --context=kind-test --namespace=kubeflow get secret mlpipeline-minio-artifact --output=jsonpath="
    assert out.splitlines() == [
        "export NS_KFP_URL=http://localhost:8081",
        "export AWS_ENDPOINT_URL=http://127.0.0.1:9001",
        "export AWS_REGION=us-east-1",
        f"export AWS_ACCESS_KEY_ID=\"$({secret}'{{.data.accesskey}}' | base64 --decode)\"",
        f"export AWS_SECRET_ACCESS_KEY=\"$({secret}'{{.data.secretkey}}' | base64 --decode)\"",
    ]
    assert opened == ["http://localhost:8081"]
    assert sorted(call.split()[-1] for call in cluster.calls("port-forward")) == ["8081:80", "9001:9000"]


def test_ui_on_a_port_that_is_taken_says_so(cluster, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        cluster.rule("port-forward", stderr="error: unable to listen on any of the requested ports: [{8080 80}]")
        assert run_app(program.app, ["ui", "--context=kind-test", f"--port={port}"], "make") == ClusterError.exit_code
    assert f"error: port {port} of this machine is taken by another program" in capsys.readouterr().err
