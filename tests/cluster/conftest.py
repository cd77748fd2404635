"""A real cluster, which `make test-cluster KUBE_CONTEXT=…` names. Each test has namespaces of its own."""

import os
import secrets

import pytest

from k8s.kubectl import Kubectl

IMAGE = os.environ.get("NS_CLUSTER_IMAGE", "docker.io/library/python:3.11-slim-bookworm")
"""An image with Python that the cluster's nodes can pull."""


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/cluster/" in item.path.as_posix():
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def kube_context():
    context = os.environ.get("KUBE_CONTEXT", "")
    if not context:
        pytest.skip("needs a Kubernetes cluster: make test-cluster KUBE_CONTEXT=…")
    return context


@pytest.fixture(scope="session")
def kubectl(kube_context):
    return Kubectl(kube_context, patience_seconds=120)


@pytest.fixture(scope="module")
def make_namespace(kubectl):
    """Function: the name of a new namespace, which is deleted at the end. With `create=False` a deployment creates it."""
    names = []

    def make(labels=None, *, create=True):
        name = f"noisy-student-test-{secrets.token_hex(3)}"
        names.append(name)
        if create:
            apply(kubectl, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels or {}}})
        return name

    yield make
    for name in names:
        kubectl.run_command("delete", "namespace", name, "--ignore-not-found", "--wait=false")


def apply(kubectl, *objects):
    import json

    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    kubectl.run_command("apply", "--server-side", "--field-manager=tests", "--filename=-", stdin=text, seconds=120)
