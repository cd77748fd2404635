"""What a real API server lets in: pods of all overlays at `restricted`, and what quotas and limits make of pods."""

import json

import pytest

from k8s.kubectl import ForbiddenError
from k8s.manifests import list_overlays, render_overlay
from k8s.validate import walk_objects
from tests.cluster.conftest import IMAGE, apply
from tests.cluster.deployer import IMAGES, list_kinds, move_objects
from tests.cluster.test_network import make_pod

IMAGE_NAMES = dict(zip(("noisy-student/worker", "noisy-student/tools"), IMAGES, strict=True))


def try_pod(kubectl, namespace, name, spec):
    """Creates a pod by a dry run, and returns it as it was admitted. Raises ForbiddenError."""
    # The account, the priority class and the volumes of claim templates are there in a deployment.
    spec = {key: value for key, value in spec.items() if key not in ("serviceAccountName", "priorityClassName")}
    mounted = {mount["name"] for container in spec["containers"] for mount in container.get("volumeMounts") or ()}
    claimed = mounted - {volume["name"] for volume in spec.get("volumes") or ()}
    spec["volumes"] = [*(spec.get("volumes") or ()), *({"name": volume, "emptyDir": {}} for volume in claimed)]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace}, "spec": spec}
    return json.loads(kubectl.run_command("create", "--dry-run=server", "--output=json", "--filename=-", stdin=json.dumps(pod)))


@pytest.fixture(scope="module")
def restricted(make_namespace):
    return make_namespace({"pod-security.kubernetes.io/enforce": "restricted"})


@pytest.mark.parametrize("overlay", list_overlays())
def test_pods_are_admitted_at_restricted(kubectl, restricted, overlay):
    # Kueue's and Trainer's own pods are in namespaces of theirs, which enforce nothing.
    objects = render_overlay(kubectl, overlay, IMAGE_NAMES, without=["cluster"]).objects
    pods = {
        f"{item['kind']}-{item['metadata']['name']}".lower(): spec
        for item in objects
        if item["kind"] != "CustomResourceDefinition"
        for _, spec in walk_objects(item)
        if isinstance(spec.get("containers"), list)
    }
    assert len(pods) >= (1 if overlay == "tenant" else 9)
    for name, spec in pods.items():
        if "trainingruntime" in name:
            # Its TrainJob says how many GPUs.
            spec = {**spec, "restartPolicy": "Never"}
        try_pod(kubectl, restricted, name, spec)


def test_pod_beyond_restricted_is_refused(kubectl, restricted):
    with pytest.raises(ForbiddenError, match="violates PodSecurity"):
        try_pod(kubectl, restricted, "root", {"containers": [{"name": "main", "image": IMAGE}]})


@pytest.fixture(scope="module")
def limited(kubectl, make_namespace):
    namespace = make_namespace()
    objects = move_objects(render_overlay(kubectl, "dev", IMAGE_NAMES).objects, namespace, list_kinds(kubectl))
    apply(kubectl, *(item for item in objects if item["kind"] in ("ResourceQuota", "LimitRange")))
    counted = "--for=jsonpath={.status.hard.pods}=300"
    kubectl.run_command("wait", "resourcequota/noisy-student", f"--namespace={namespace}", counted, "--timeout=50s")
    return namespace


def request_cpus(cpus):
    spec = make_pod("pod", "namespace", {})["spec"]
    spec["containers"][0]["resources"] = {"requests": {"cpu": cpus} if cpus else {}}
    return spec


def test_pod_without_requests_gets_those_of_the_limit_range(kubectl, limited):
    (container,) = try_pod(kubectl, limited, "small", request_cpus(None))["spec"]["containers"]
    assert container["resources"]["requests"] == {"cpu": "50m", "memory": "128Mi"}


def test_pod_beyond_the_quota_is_refused(kubectl, limited):
    try_pod(kubectl, limited, "large", request_cpus("255"))
    with pytest.raises(ForbiddenError, match=r"exceeded quota: noisy-student, requested: requests\.cpu=300"):
        try_pod(kubectl, limited, "larger", request_cpus("300"))


def test_services_on_nodes_are_refused(kubectl, limited):
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "open", "namespace": limited},
        "spec": {"type": "NodePort", "ports": [{"port": 80}], "selector": {"app": "open"}},
    }
    with pytest.raises(ForbiddenError, match=r"exceeded quota: noisy-student, requested: services\.nodeports=1"):
        kubectl.run_command("create", "--dry-run=server", "--filename=-", stdin=json.dumps(service))
