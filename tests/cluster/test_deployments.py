"""Every overlay on a real API server: applied, continued after an interruption, changed to another, taken away."""

import json
import signal
import subprocess
import sys

import pytest

from k8s import deploy
from k8s.changes import try_objects
from k8s.deploy import DeployOptions, undeploy_overlay
from k8s.kubectl import Kubectl
from k8s.manifests import ObjectKey, list_overlays, make_list_object, render_overlay
from tests.cluster.conftest import apply
from tests.cluster.deployer import IMAGES, deploy_moved, load_releases

KEYS = {"accesskey": "dGVzdA==", "secretkey": "dGVzdA=="}


def create_keys(kubectl, namespace):
    name = "mlpipeline-minio-artifact"
    apply(kubectl, {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": namespace}, "data": KEYS})


def find_missing(kubectl, keys):
    """Objects of a release that the cluster does not have."""
    objects = [
        {"apiVersion": key.api_version, "kind": key.kind, "metadata": {"name": key.name, "namespace": key.namespace}}
        for key in keys
    ]
    text = kubectl.run_command(
        "get", "--ignore-not-found", "--output=json", "--filename=-", stdin=json.dumps(make_list_object(objects)), seconds=120
    )
    present = {ObjectKey.from_object(item).without_version() for item in (json.loads(text)["items"] if text else ())}
    return [key for key in keys if key.without_version() not in present]


@pytest.fixture
def undeploy(kube_context, monkeypatch):
    def call(overlay, namespace, **options):
        monkeypatch.setattr(deploy.Release, "load_all", lambda kubectl: load_releases(kubectl, namespace))
        return undeploy_overlay(DeployOptions(overlay, kube_context, yes=True), print, None, **options)

    return call


@pytest.mark.parametrize("overlay", list_overlays())
def test_overlay_is_applied_and_taken_away(kubectl, kube_context, make_namespace, undeploy, overlay):
    # The keys of a store outside are the site's to bring, in a namespace that is there already.
    outside = overlay in ("production", "tenant")
    namespace = make_namespace(create=outside)
    if outside:
        create_keys(kubectl, namespace)
    said = []
    release = deploy_moved(kube_context, overlay, namespace, said.append)
    assert release.state == "complete"
    assert find_missing(kubectl, release.objects) == []
    before = {key.kind for key in release.objects}
    assert {"ConfigMap", "NetworkPolicy" if overlay != "kind" else "StatefulSet"} <= before
    # Again: every object is taken as it is, and nothing is made again.
    assert deploy_moved(kube_context, overlay, namespace, said.append).objects == release.objects
    assert not [line for line in said if "made again" in line or "deleted" in line]
    undeploy(overlay, namespace)
    assert [found.state for found in load_releases(kubectl, namespace).values()] == ["removed"]
    left = [key for key in release.objects if key not in find_missing(kubectl, release.objects)]
    assert {key.kind for key in left} <= set(deploy.KEPT_KINDS)
    undeploy(overlay, namespace, delete_data=True)
    assert [key.kind for key in release.objects if key not in find_missing(kubectl, release.objects)] == ["Namespace"] * outside


def test_deployment_continues_after_a_kill(kubectl, kube_context, make_namespace):
    namespace = make_namespace(create=False)
    command = [sys.executable, "-m", "tests.cluster.deployer", kube_context, "dev", namespace]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        # In the middle of the second of its phases.
        if "resourcequota" in line:
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    (release,) = load_releases(kubectl, namespace).values()
    assert release.state == "under way"
    missing = find_missing(kubectl, release.objects)
    assert {"Deployment", "StatefulSet"} & {key.kind for key in missing}
    said = []
    finished = deploy_moved(kube_context, "dev", namespace, said.append)
    assert finished.state == "complete"
    assert find_missing(kubectl, finished.objects) == []
    assert any("which did not finish" in line for line in said)


def test_another_overlay_keeps_the_pods_of_the_store(kubectl, kube_context, make_namespace):
    namespace = make_namespace(create=False)
    deploy_moved(kube_context, "kind", namespace, print)
    kubectl.run_command("wait", "--for=create", "pod/seaweedfs-0", f"--namespace={namespace}", "--timeout=50s")
    before = kubectl.get_object("pod", "seaweedfs-0", namespace)
    claim = kubectl.get_object("persistentvolumeclaim", "data-seaweedfs-0", namespace)
    said = []
    release = deploy_moved(kube_context, "dev", namespace, said.append)
    assert any("StatefulSet" in line and "is made again around its pods and volumes" in line for line in said)
    assert any("data-seaweedfs-0: keeps its 10Gi, not 100Gi" in line or "is enlarged from 10Gi" in line for line in said)
    assert find_missing(kubectl, release.objects) == []
    wanted = kubectl.get_object("statefulset", "seaweedfs", namespace)["spec"]["volumeClaimTemplates"][0]
    assert wanted["spec"]["resources"]["requests"]["storage"] == "100Gi"
    assert kubectl.get_object("pod", "seaweedfs-0", namespace)["metadata"]["uid"] == before["metadata"]["uid"]
    assert (
        kubectl.get_object("persistentvolumeclaim", "data-seaweedfs-0", namespace)["metadata"]["uid"]
        == claim["metadata"]["uid"]
    )


def test_conflict_stops_a_deployment_before_it_changes_anything(kubectl, kube_context, make_namespace):
    namespace = make_namespace(create=False)
    deploy_moved(kube_context, "kind", namespace, print)
    patch = ("patch", "configmap", "noisy-student", f"--namespace={namespace}", "--field-manager=hand", "--type=merge")
    kubectl.run_command(*patch, '--patch={"data": {"AWS_REGION": "mars-1"}}')
    versions = kubectl.run_command("get", "all,configmaps,networkpolicies", f"--namespace={namespace}", "--output=name")
    with pytest.raises(deploy.ClusterError, match=r"nothing was changed[\s\S]*\.data\.AWS_REGION[\s\S]*--force-conflicts"):
        deploy_moved(kube_context, "dev", namespace, print)
    assert kubectl.run_command("get", "all,configmaps,networkpolicies", f"--namespace={namespace}", "--output=name") == versions
    assert deploy_moved(kube_context, "kind", namespace, print, force_conflicts=True).state == "complete"


@pytest.mark.parametrize("overlay", list_overlays())
def test_cluster_takes_what_belongs_to_all_namespaces(kubectl: Kubectl, overlay):
    images = dict(zip(("noisy-student/worker", "noisy-student/tools"), IMAGES, strict=True))
    rendered = render_overlay(kubectl, overlay, images)
    objects = [item for item in rendered.objects if "namespace" not in item["metadata"]]
    result = try_objects(kubectl, objects, force=True)
    # Kinds of Prometheus and Kueue that the cluster may lack.
    assert [refusal for refusal in result.refusals if "no matches for kind" not in refusal.reason] == []
