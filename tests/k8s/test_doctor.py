import json

import pytest

from k8s import doctor
from k8s.doctor import Permission, Requirements, examine_cluster, selector_matches
from k8s.kubectl import Kubectl, NotFoundError, classify_failure
from ns.core.errors import ClusterError
from tests.k8s.conftest import PATIENT, RETRYING, definition, node, thing, workload


class Answers(Kubectl):
    """kubectl without a process: answers from a list of objects."""

    def __init__(self, objects, denied=(), refused=(), server="v1.34.2"):
        super().__init__("test")
        self.objects, self.denied, self.refused, self.version = objects, denied, refused, server

    def run_command(self, *arguments, stdin=None, seconds=0, accepted_codes=(0,)):
        if arguments[0] == "version":
            return json.dumps({"serverVersion": {"gitVersion": self.version}, "clientVersion": {"gitVersion": "v1.34.0"}})
        if arguments[0] == "config":
            return json.dumps({"clusters": [{"cluster": {"server": "https://test.example"}}]})
        if arguments[0] == "create":
            spec = json.loads(stdin)["spec"]
            asked = spec["resourceAttributes"]
            text = f"{spec.get('user', 'me')} {asked['verb']} {asked['resource']}"
            return json.dumps({"status": {"allowed": text not in self.refused}})
        kind, *names = [word for word in arguments[1:] if not word.startswith("--")]
        if kind in self.denied:
            raise classify_failure(
                "kubectl get", f'Error from server (Forbidden): {kind} is forbidden: User "u" cannot list it', 1
            )
        plurals = {"StorageClass": "storageclasses", "Prometheus": "prometheuses"}
        spaces = [word.partition("=")[2] for word in arguments if word.startswith("--namespace=")]
        found = [
            item
            for item in self.objects
            if kind.partition(".")[0].rstrip("s") == plurals.get(item["kind"], item["kind"].lower()).rstrip("s")
            and (not spaces or item["metadata"].get("namespace") in spaces)
            and (not names or item["metadata"]["name"] in names)
        ]
        if len(names) == 1:
            if not found:
                raise NotFoundError("not found")
            return json.dumps(found[0])
        return json.dumps({"items": found}) if found or not names else ""


def run_diagnosis(objects, asked=None, **options):
    found = examine_cluster(Answers(objects, **options), asked or Requirements())
    for finding in found:
        assert "\n" not in finding.detail + finding.fix
        assert finding.detail
        assert bool(finding.fix) != finding.ok, finding
    return found


def find_bad(objects, asked=None, **options):
    return {finding.name: finding for finding in run_diagnosis(objects, asked, **options) if not finding.ok}


def find_object(objects, kind, name):
    return next(item for item in objects if (item["kind"], item["metadata"]["name"]) == (kind, name))


ALL_PARTS = Requirements(required_parts=frozenset({"kfp", "trainer", "kueue", "prometheus-operator", "dcgm", "gpu"}))


def test_diagnose_finds_no_fault_in_a_complete_cluster(objects):
    found = run_diagnosis(objects, ALL_PARTS)
    assert [finding for finding in found if not finding.ok] == []
    names = [finding.name for finding in found]
    assert {"cluster", "kubernetes", "nodes", "storage-class", "device-plugin", "gpu-pools", "kfp", "trainer", "kueue"} < set(
        names
    )
    assert {
        "prometheus-operator",
        "pod-monitor",
        "dcgm",
        "dcgm-pods",
        "queue",
        "settings",
        "storage-secret",
        "runner-permissions",
    } < set(names)
    pool = next(finding for finding in found if finding.name == "gpu-pools")
    assert pool.detail == "2 × 2 nvidia.com/gpu; cloud.google.com/gke-accelerator=nvidia-l4; nvidia.com/gpu=present:NoSchedule"


def test_diagnose_reports_missing_parts_only_if_required(objects):
    bare = [
        item
        for item in objects
        if item["kind"] in ("Node", "Namespace", "StorageClass") and item["metadata"]["name"] != "monitoring"
    ]
    assert list(find_bad(bare)) == ["kfp"]
    assert find_bad(bare, Requirements(provided_parts={"kfp": (2, 17, 0)})) == {}
    lacking = find_bad(bare, ALL_PARTS)
    assert list(lacking) == ["kfp", "trainer", "kueue", "prometheus-operator", "dcgm"]
    assert all(finding.is_fatal for finding in lacking.values())


def change(kind, name, **fields):
    def apply(objects):
        find_object(objects, kind, name).update(fields)

    return apply


def set_image(name, text):
    def apply(objects):
        item = next(
            item for item in objects if item["kind"] in ("Deployment", "DaemonSet") and item["metadata"]["name"] == name
        )
        item["spec"]["template"]["spec"]["containers"][0]["image"] = text

    return apply


def remove(kind, name):
    def apply(objects):
        objects.remove(find_object(objects, kind, name))

    return apply


def add(*more):
    return lambda objects: objects.extend(more)


@pytest.mark.parametrize(
    ("broken", "name", "detail", "fatal"),
    [
        (set_image("ml-pipeline", "ghcr.io/kubeflow/kfp-api-server:2.15.0"), "kfp", "2.15.0: the pipeline takes", True),
        (set_image("ml-pipeline", "ghcr.io/kubeflow/kfp-api-server:2.18.1"), "kfp", "is not tested with it", False),
        (
            set_image("ml-pipeline", "ghcr.io/kubeflow/kfp-api-server:master"),
            "kfp",
            "the version of Kubeflow Pipelines is unknown",
            False,
        ),
        (
            set_image("trainer", "x/trainer-controller-manager:v2.1.0"),
            "version-conflict",
            "Kueue 0.19.3 with Kubeflow Trainer 2.1.0",
            True,
        ),
        (
            set_image("workflow-controller", "x/workflow-controller:v3.6.4"),
            "version-conflict",
            "with Argo Workflows 3.6.4",
            True,
        ),
        (set_image("dcgm-exporter", "x/dcgm-exporter:3.3.5-3.4.1"), "version-conflict", "lack the pod's name", False),
        (add(workload("minio", "quay.io/minio/minio:RELEASE.2025", "kubeflow")), "object-store", "kubeflow/minio", False),
        (add(workload("minio", "local:5000/minio/minio", "kubeflow")), "object-store", "kubeflow/minio", False),
        (add(node("sick", ready="Unknown")), "nodes", "3 of 4 ready; not: sick", False),
        (remove("StorageClass", "standard"), "storage-class", "no default among 0", True),
        (
            add(node("silent", {"nvidia.com/gpu.present": "true"})),
            "device-plugin",
            "1 nodes have the label of GPUs and offer none: silent",
            True,
        ),
        (
            add(node("half", gpus=4, allocatable=3, taints=[("gpu", "x")])),
            "device-plugin",
            "half nvidia.com/gpu: 3 of 4",
            False,
        ),
        (add(node("open", gpus=1)), "gpu-pools", "no label of a pool; no taint", False),
        (
            change("ConfigMap", "kueue-manager-config", data={"c": "integrations:\n  frameworks:\n  - batch/job\n"}),
            "kueue-pods",
            "does not queue plain pods",
            True,
        ),
        (remove("LocalQueue", "runs"), "queue", "no LocalQueue in kubeflow", True),
        (
            change("LocalQueue", "runs", status={"conditions": [{"type": "Active", "status": "False", "message": "no gpus"}]}),
            "queue",
            "not active: no gpus",
            True,
        ),
        (remove("PodMonitor", "runs"), "pod-monitor", "none selects the pods of runs", True),
        (
            lambda objects: find_object(objects, "PodMonitor", "runs")["metadata"].update(labels={"release": "other"}),
            "pod-monitor",
            'monitoring/k8s selects PodMonitors {"matchLabels": {"release": "main"}} in namespaces {}',
            False,
        ),
        (
            lambda objects: find_object(objects, "Prometheus", "k8s")["spec"].pop("podMonitorNamespaceSelector"),
            "pod-monitor",
            "in namespaces of its own",
            False,
        ),
        (
            lambda objects: find_object(objects, "DaemonSet", "dcgm-exporter")["spec"]["template"]["spec"]["containers"][0].pop(
                "env"
            ),
            "dcgm-pods",
            "its metrics do not name the pod",
            False,
        ),
        (
            change(
                "ConfigMap",
                "workflow-controller-configmap",
                data={
                    "workflowDefaults": f"{PATIENT}  templateDefaults: {{retryStrategy: {{limit: '2', retryPolicy: OnError}}}}"
                },
            ),
            "retries",
            "retryPolicy OnError: a stage that is killed, runs out of memory or exits is not tried again",
            False,
        ),
        (
            change(
                "ConfigMap", "workflow-controller-configmap", data={"workflowDefaults": RETRYING.replace(PATIENT, "spec:\n")}
            ),
            "grace",
            "podSpecPatch has no preStop: a stage whose pod is deleted or drained ends at once, without a checkpoint",
            False,
        ),
        (remove("ConfigMap", "noisy-student"), "settings", "runs use Amazon S3", False),
        (remove("Secret", "mlpipeline-minio-artifact"), "storage-secret", "no Secret kubeflow/", False),
        (change("Secret", "mlpipeline-minio-artifact", data={"accesskey": "x"}), "storage-secret", "lacks secretkey", True),
    ],
)
def test_diagnose_reports_only_what_is_broken(objects, broken, name, detail, fatal):
    broken(objects)
    found = find_bad(objects, ALL_PARTS)
    if name == "version-conflict":
        # A component that is too old is reported by itself too.
        found = {key: finding for key, finding in found.items() if key not in ("trainer", "argo")}
    assert list(found) == [name]
    assert detail in found[name].detail
    assert found[name].is_fatal is fatal


def test_check_version_of_old_trainer_is_fatal_only_if_required(objects):
    set_image("trainer", "x/trainer-controller-manager:v2.1.0")(objects)
    assert find_bad(objects, ALL_PARTS)["trainer"].is_fatal
    assert find_bad(objects)["trainer"].is_warning


@pytest.mark.parametrize(
    ("server", "name", "fatal"),
    [("v1.30.4", "kubernetes", True), ("v1.32.0", "kubernetes", False), ("v1.38.0", "kubernetes", False)],
)
def test_check_version_of_kubernetes(objects, server, name, fatal):
    found = find_bad(objects, server=server)
    assert found[name].is_fatal is fatal
    assert "minor version apart" in found["kubectl"].detail


def test_check_permissions_names_denied_ones(objects):
    rights = (Permission("create", "deployments", "apps"), Permission("create", "namespaces"))
    runner, prometheus = "system:serviceaccount:kubeflow:pipeline-runner", "system:serviceaccount:monitoring:prometheus-k8s"
    asked = Requirements(permissions=rights)
    assert find_bad(objects, asked) == {}
    found = find_bad(objects, asked, refused=["me create namespaces", f"{runner} get secrets", f"{prometheus} list pods"])
    assert found["permissions"].detail == "you may not create namespaces"
    assert found["runner-permissions"].detail == "kubeflow/pipeline-runner may not get secrets in kubeflow"
    assert found["pod-monitor"].detail == "kubeflow/runs is selected by monitoring/k8s, which may not list pods in kubeflow"


def test_diagnose_only_warns_of_denied_kinds(objects):
    found = find_bad(objects, denied=("nodes", "storageclasses", "deployments", "daemonsets", "customresourcedefinitions"))
    assert {"nodes", "storage-class", "kfp", "trainer", "kueue"} <= found.keys()
    assert not any(finding.is_fatal for finding in found.values())


def test_examine_unreachable_cluster_gives_one_diagnostic(objects):
    class Silent(Answers):
        def run_command(self, *arguments, **options):
            raise ClusterError("kubectl version: Unable to connect to the server; is there a VPN?")

    (finding,) = examine_cluster(Silent(objects), Requirements())
    assert (finding.ok, finding.detail, finding.fix) == (
        False,
        "kubectl version: Unable to connect to the server",
        "is there a VPN?",
    )


@pytest.mark.parametrize(
    ("selector", "taken"),
    [
        (None, False),
        ({}, True),
        ({"matchLabels": {"a": "1"}}, True),
        ({"matchLabels": {"a": "1", "b": "1"}}, False),
        ({"matchExpressions": [{"key": "a", "operator": "In", "values": ["0", "1"]}]}, True),
        ({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["1"]}]}, False),
        ({"matchExpressions": [{"key": "b", "operator": "NotIn", "values": ["1"]}]}, True),
        ({"matchExpressions": [{"key": "a", "operator": "Exists"}, {"key": "b", "operator": "DoesNotExist"}]}, True),
        ({"matchExpressions": [{"key": "b", "operator": "Exists"}]}, False),
    ],
)
def test_selector_matches_as_kubernetes_does(selector, taken):
    assert selector_matches(selector, {"a": "1"}) is taken


def test_detect_versions_reads_operator_version_from_crd(objects):
    objects.remove(find_object(objects, "Deployment", "operator"))
    assert find_bad(objects, ALL_PARTS) == {}
    objects.remove(find_object(objects, "CustomResourceDefinition", "podmonitors.monitoring.coreos.com"))
    objects.append(definition("podmonitors.monitoring.coreos.com"))
    assert "the version of Prometheus operator is unknown" in find_bad(objects)["prometheus-operator"].detail


def test_check_storage_warns_of_several_defaults(objects):
    annotations = {"storageclass.kubernetes.io/is-default-class": "true"}
    objects.append(thing("StorageClass", "fast", api="storage.k8s.io/v1", annotations=annotations))
    assert find_bad(objects)["storage-class"].detail == "2 defaults (fast, standard): Kubernetes takes the newest"


@pytest.mark.parametrize(
    ("unresolved", "expected"),
    [
        ([], (True, "pods of runs look up kubernetes.default, ml-pipeline.kubeflow, seaweedfs.kubeflow")),
        (["seaweedfs.kubeflow"], (False, "pods of runs cannot look up seaweedfs.kubeflow")),
        (ClusterError("no room"), (False, "could not be tried from inside: no room")),
    ],
)
def test_names_are_tried_from_inside(objects, monkeypatch, unresolved, expected):
    server = next(item for item in objects if item["metadata"]["name"] == "ml-pipeline")
    server["spec"]["template"]["spec"]["initContainers"] = [{"name": "wait", "image": "mirror.example/alpine:3.23"}]
    asked = []

    def find(kubectl, namespace, image, names):
        asked.append((namespace, image))
        if isinstance(unresolved, ClusterError):
            raise unresolved
        return unresolved

    monkeypatch.setattr(doctor, "find_unresolved_names", find)
    (found,) = [finding for finding in run_diagnosis(objects) if finding.name == "names"]
    assert (found.ok, found.detail) == expected
    assert asked == [("kubeflow", "mirror.example/alpine:3.23")]
