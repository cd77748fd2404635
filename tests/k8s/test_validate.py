"""The manifests are what Kubernetes takes, and what `make validate` lets through is: each of its rules refuses what breaks it."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from k8s import validate
from k8s.schemas.extract import encode, share_repeated
from ns import __version__
from ns.core.errors import ClusterError
from pipelines import PACKAGE
from pipelines.placement import Placement

CHECKOUT = Path(__file__).parents[2]
K8S = CHECKOUT / "k8s"


def check_overlay(root: Path, folder: str = "overlays/kind") -> list[str]:
    return [str(problem) for problem in validate.check_objects(validate.build_folder(root / folder), folder)]


@pytest.fixture
def copy(tmp_path):
    root = tmp_path / "k8s"
    shutil.copytree(K8S, root, ignore=shutil.ignore_patterns("schemas", "__pycache__"))
    return root


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


@pytest.mark.integration
def test_main_validates_all_parts_of_an_overlay(copy, monkeypatch, capsys):
    # All of them are looked at by `make validate`, which CI runs.
    for name in ("dev", "kind"):
        shutil.rmtree(copy / "overlays" / name)
    monkeypatch.setattr(validate, "find_components", lambda root: [])
    monkeypatch.setattr("sys.argv", ["validate.py", str(copy)])
    assert validate.main() == 0
    assert "1.33 to 1.36: 0 errors" in capsys.readouterr().out

    edit(copy / "overlays/production/kubeflow/kustomization.yaml", "external-s3/kubeflow", "internal-s3/kubeflow")
    edit(copy / "components/quotas/resourcequota-noisy-student.yaml", "hard:", "herd:")
    assert validate.main() == 1
    said = capsys.readouterr().err
    assert "error: overlays/production ResourceQuota/noisy-student spec: " in said
    assert "error: overlays/production/kubeflow: " in said
    assert "internal-s3" in said


@pytest.mark.integration
@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        # A patch with a field misspelt: kustomize merges it without a word.
        ("overlays/kind/seaweedfs.yaml", "  volumeClaimTemplates:", "  replica: 2\n  volumeClaimTemplates:", "'replica' was unexpected"),
        ("components/object-store/statefulset-seaweedfs.yaml", "terminationGracePeriodSeconds: 60", "terminationGracePeriod: 60",
         "'terminationGracePeriod' was unexpected"),
        ("components/object-store/statefulset-seaweedfs.yaml", "replicas: 1", 'replicas: "1"', "'1' is not of type 'integer'"),
        ("components/object-store/statefulset-seaweedfs.yaml", "    app.kubernetes.io/part-of: noisy-student\nspec:",
         "    app.kubernetes.io/part-of: 1\nspec:", "metadata.labels"),
        ("components/object-store/service-seaweedfs.yaml", "apiVersion: v1", "apiVersion: v2", "no schema has v2 Service"),
        ("components/object-store/statefulset-seaweedfs.yaml", "seaweedfs:4.34", "seaweedfs:latest", "is not pinned"),
        ("components/object-store/statefulset-seaweedfs.yaml", "name: mlpipeline-minio-artifact", "name: keys",
         "there is no Secret/keys"),
        ("components/object-store/statefulset-seaweedfs.yaml", "serviceAccountName: seaweedfs", "serviceAccountName: weed",
         "there is no ServiceAccount/weed"),
        ("components/object-store/statefulset-seaweedfs.yaml", "runAsNonRoot: true", "runAsNonRoot: false",
         "must have runAsNonRoot: true"),
        ("components/object-store/statefulset-seaweedfs.yaml", "emptyDir: {}", "hostPath: {path: /tmp}", "must not be a hostPath"),
    ],
)  # fmt: skip
def test_check_objects_finds_what_breaks_a_rule(copy, file, old, new, expected):
    edit(copy / file, old, new)
    found = check_overlay(copy)
    assert any(expected in item for item in found), found
    assert all("/seaweedfs" in item for item in found)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("kueue/clusterqueue-noisy-student.yaml", "queueingStrategy", "queuingStrategy", "'queuingStrategy' was unexpected"),
        ("kueue/clusterqueue-noisy-student.yaml", "BestEffortFIFO", "Fair", "'Fair' is not one of"),
        ("trainer/trainingruntime-noisy-student.yaml", "numNodes: 1", "nodes: 1", "'nodes' was unexpected"),
        ("trainer/trainingruntime-noisy-student.yaml", "drop: [ALL]", "drop: []", "must drop the capabilities ALL"),
        ("trainer/trainingruntime-noisy-student.yaml", "readOnlyRootFilesystem", "readOnlyRootFileSystem",
         "'readOnlyRootFileSystem' was unexpected"),
        ("trainer/rolebinding-noisy-student-trainer.yaml", "name: pipeline-runner", "name: runner",
         "there is no ServiceAccount/runner"),
        ("network-policies/networkpolicy-runs.yaml", "policyTypes", "policyType", "'policyType' was unexpected"),
    ],
)  # fmt: skip
def test_check_objects_applies_schemas_of_custom_resources(copy, file, old, new, expected):
    edit(copy / "components" / file, old, new)
    found = check_overlay(copy, "overlays/production")
    assert any(expected in item for item in found), found


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("protocolVersion: v2", "protocol: v2", "'protocol' was unexpected"),
        ("storageUri", "storageURI", "'storageURI' was unexpected"),
        ("modelFormat:", "format:", "'format' was unexpected"),
        ("runAsNonRoot: true", "runAsNonRoot: yes please", "'yes please' is not of type 'boolean'"),
    ],
)
def test_example_for_kserve_is_held_to_its_schema(old, new, expected):
    text = (K8S / "examples/kserve/inference-service.yaml").read_text()
    assert [validate.find_schema_errors(item) for item in yaml.safe_load_all(text)] == [(), ()]
    found = [reason for item in yaml.safe_load_all(text.replace(old, new)) for _, reason in validate.find_schema_errors(item)]
    assert any(expected in reason for reason in found), found


def test_share_repeated_keeps_the_meaning_of_a_schema():
    container = {"type": "object", "properties": {f"field{number}": {"type": "string"} for number in range(20)}}
    schema = {
        "type": "object",
        "properties": {name: {"type": "array", "items": container} for name in ("type", "first", "last")},
    }
    shared = share_repeated(schema)
    assert len(encode(shared)) < len(encode(schema)) / 2

    def expand(part):
        if isinstance(part, dict) and "$ref" in part:
            part = shared["$defs"][part["$ref"].removeprefix("#/$defs/")]
        if isinstance(part, dict):
            return {name: expand(value) for name, value in part.items() if name != "$defs"}
        return part

    assert expand(shared) == schema


@pytest.mark.integration
def test_build_folder_without_a_component_fails(copy):
    edit(copy / "overlays/kind/kustomization.yaml", "components/pod-security", "components/pod-securty")
    with pytest.raises(ClusterError, match="pod-securty"):
        validate.build_folder(copy / "overlays/kind")


@pytest.mark.integration
def test_tenant_overlay_uses_the_namespace_of_the_team(copy):
    edit(copy / "overlays/tenant/tenant.yaml", "team-vision", "team-sound")
    objects = validate.build_folder(copy / "overlays/tenant")
    assert {item["metadata"].get("namespace", "team-sound") for item in objects} == {"team-sound"}
    names = {
        kind: {item["metadata"]["name"] for item in objects if item["kind"] == kind} for kind in ("Namespace", "ClusterQueue")
    }
    assert names == {"Namespace": {"team-sound"}, "ClusterQueue": {"team-sound"}}
    (bound,) = [item for item in objects if item["kind"] == "RoleBinding"]
    assert bound["subjects"] == [{"kind": "ServiceAccount", "name": "default-editor", "namespace": "team-sound"}]
    assert "CronJob" not in {item["kind"] for item in objects}


@pytest.mark.integration
def test_tenant_overlay_leaves_other_pods_of_the_profile_alone():
    objects = validate.build_folder(K8S / "overlays/tenant")
    policies = [item for item in objects if item["kind"] == "NetworkPolicy"]
    assert policies
    for policy in policies:
        assert policy["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/part-of"] == "noisy-student", policy["metadata"]
    (namespace,) = [item for item in objects if item["kind"] == "Namespace"]
    assert "pod-security.kubernetes.io/enforce" not in namespace["metadata"]["labels"]


def test_training_runtime_retries_nothing_and_keeps_the_reason():
    runtime = yaml.safe_load((K8S / "components" / "trainer" / "trainingruntime-noisy-student.yaml").read_text())
    jobset = runtime["spec"]["template"]["spec"]
    assert jobset["failurePolicy"]["maxRestarts"] == 0
    for replicated in jobset["replicatedJobs"]:
        job = replicated["template"]["spec"]
        assert job["backoffLimit"] == 0
        # JobSet's webhook fills in OnFailure: the kubelet would start the container again and again.
        assert job["template"]["spec"]["restartPolicy"] == "Never"
        assert {item["terminationMessagePolicy"] for item in job["template"]["spec"]["containers"]} == {"FallbackToLogsOnError"}


def test_operators_run_no_pods_of_their_choice():
    role = yaml.safe_load((K8S / "base" / "role-noisy-student-operator.yaml").read_text())
    created = {resource for rule in role["rules"] if "create" in rule["verbs"] for resource in rule["resources"]}
    assert created == {"pods/portforward"}


def test_manifests_take_nothing_from_the_network(copy):
    assert list(validate.find_remote_resources(copy)) == []
    edit(copy / "components/kubeflow/kustomization.yaml", "../../vendor/kubeflow-pipelines", "https://example.com/x?ref=v1")
    (found,) = validate.find_remote_resources(copy)
    assert str(found).startswith(
        "components/kubeflow/kustomization.yaml resources: https://example.com/x?ref=v1 is not in this folder"
    )


@pytest.mark.parametrize(
    ("image", "pinned"),
    [
        ("registry.example:5000/team/noisy-student/tools:0.1.0", True),
        ("noisy-student/tools@sha256:" + "0" * 64, True),
        ("noisy-student/tools:latest", False),
        ("noisy-student/tools", False),
        ("registry.example:5000/tools", False),
        ("noisy-student/tools:main", False),
        ("noisy-student/tools@sha256:12", False),
        ("", False),
    ],
)
def test_is_pinned_by_version_or_digest(image, pinned):
    assert validate.is_pinned(image) is pinned


SAFE = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
POD = {
    "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
    "containers": [{"name": "step", "securityContext": SAFE}],
}


def test_restricted_pod_has_no_violations():
    assert list(validate.find_restricted_violations(POD)) == []


@pytest.mark.parametrize(
    "change",
    [
        {"hostNetwork": True},
        {"securityContext": {}},
        {"volumes": [{"name": "v", "hostPath": {"path": "/"}}]},
        {"initContainers": [{"name": "init"}]},
        {"containers": [{"name": "step", "securityContext": {**SAFE, "privileged": True}}]},
        {"containers": [{"name": "step", "securityContext": {**SAFE, "runAsUser": 0}}]},
        {"containers": [{"name": "step", "securityContext": {**SAFE, "runAsNonRoot": False}}]},
        {
            "containers": [
                {"name": "step", "securityContext": {**SAFE, "capabilities": {"drop": ["ALL"], "add": ["SYS_ADMIN"]}}}
            ]
        },
        {"containers": [{"name": "step", "securityContext": SAFE, "ports": [{"hostPort": 80}]}]},
    ],
)
def test_find_restricted_violations(change):
    assert list(validate.find_restricted_violations(POD | change))


def test_find_references_in_all_fields():
    pod = {
        "serviceAccountName": "account",
        "imagePullSecrets": [{"name": "pull"}],
        "volumes": [
            {"secret": {"secretName": "mounted"}},
            {"configMap": {"name": "there-or-not", "optional": True}},
            {"projected": {"sources": [{"configMap": {"name": "projected"}}]}},
            {"persistentVolumeClaim": {"claimName": "claim"}},
        ],
        "containers": [
            {
                "envFrom": [{"configMapRef": {"name": "whole"}}],
                "env": [{"valueFrom": {"secretKeyRef": {"name": "key"}}}, {"name": "plain", "value": "1"}],
            }
        ],
    }
    assert set(validate.find_references(pod)) == {
        ("ServiceAccount", "account"),
        ("Secret", "pull"),
        ("Secret", "mounted"),
        ("ConfigMap", "projected"),
        ("PersistentVolumeClaim", "claim"),
        ("ConfigMap", "whole"),
        ("Secret", "key"),
    }


def test_external_objects_are_documented():
    told = (CHECKOUT / "docs" / "security.md").read_text()
    for _, name in validate.EXTERNAL_OBJECTS:
        assert f"`{name}`" in told


@pytest.mark.parametrize("cloud", ["gke", "eks", "aks", "on-prem"])
def test_gpu_pools_are_placements(cloud):
    patch = yaml.safe_load((K8S / "components" / "gpu-pools" / cloud / "inputs.yaml").read_text())
    placement = Placement.from_json(patch["data"]["inputs.json"], cloud)
    assert placement.train_gpus != "0"


def test_placement_names_secrets_and_settings_of_the_manifests():
    settings = yaml.safe_load((K8S / "base" / "configmap-noisy-student.yaml").read_text())
    assert Placement().settings == settings["metadata"]["name"]
    assert ("Secret", Placement().storage_secret) in validate.EXTERNAL_OBJECTS


def test_manifests_use_images_of_this_version():
    found = {
        image
        for part in ("base", "components")
        for file in (K8S / part).rglob("*.yaml")
        for image in re.findall(r"image: (noisy-student/\S+)", file.read_text())
    }
    assert found
    assert all(image.endswith(f":{__version__}") for image in found), found


def test_stages_do_not_run_as_root():
    # All else that `restricted` asks for is what Kubeflow gives to every pod of a run since 2.16.
    _, platform = yaml.safe_load_all(PACKAGE.read_text())
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert executors
    for executor in executors.values():
        assert executor["securityContext"]["runAsNonRoot"] is True
        assert int(executor["securityContext"]["runAsUser"]) > 0


def test_manifests_name_their_namespace():
    # kustomize's own means to say it would write one into Kueue's objects, which have none.
    namespaced = {"ConfigMap", "Role", "RoleBinding", "ServiceAccount", "Service", "StatefulSet", "CronJob", "NetworkPolicy",
                  "ResourceQuota", "LimitRange", "LocalQueue", "TrainingRuntime"}  # fmt: skip
    for part in ("base", "components"):
        for file in sorted((K8S / part).rglob("*-*.yaml")):
            item = yaml.safe_load(file.read_text())
            if file.name.startswith(f"{item['kind'].lower()}-") and item["kind"] in namespaced:
                assert item["metadata"]["namespace"] == "kubeflow", file
