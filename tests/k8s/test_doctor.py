import json

import pytest

from k8s.doctor import Permission, Requirements, examine_cluster, selector_matches
from k8s.kubectl import Kubectl
from ns.core.errors import ClusterError
from tests.k8s.conftest import definition, node, thing, workload


class Answers(Kubectl):
    """kubectl without a process: answers from a list of objects."""

    def __init__(self, objects, denied=(), refused=(), server="v1.34.2"):
        super().__init__("test")
        self.objects, self.denied, self.refused, self.version = objects, denied, refused, server

    def run(self, *arguments, data=None, seconds=0, accepted=(0,)):
        if arguments[0] == "version":
            return json.dumps({"serverVersion": {"gitVersion": self.version}, "clientVersion": {"gitVersion": "v1.34.0"}})
        if arguments[0] == "config":
            return json.dumps({"clusters": [{"cluster": {"server": "https://test.example"}}]})
        if arguments[0] == "create":
            spec = json.loads(data)["spec"]
            asked = spec["resourceAttributes"]
            text = f"{spec.get('user', 'me')} {asked['verb']} {asked['resource']}"
            return json.dumps({"status": {"allowed": text not in self.refused}})
        kind, *names = [word for word in arguments[1:] if not word.startswith("--")]
        if kind in self.denied:
            from k8s.kubectl import classify_failure

            raise classify_failure(
                "kubectl get", f'Error from server (Forbidden): {kind} is forbidden: User "u" cannot list it', 1
            )
        known = {"StorageClass": "storageclasses", "Prometheus": "prometheuses"}
        spaces = [word.partition("=")[2] for word in arguments if word.startswith("--namespace=")]
        found = [
            one
            for one in self.objects
            if kind.partition(".")[0].rstrip("s") == known.get(one["kind"], one["kind"].lower()).rstrip("s")
            and (not spaces or one["metadata"].get("namespace") in spaces)
            and (not names or one["metadata"]["name"] in names)
        ]
        if len(names) == 1:
            if not found:
                from k8s.kubectl import NotFoundError

                raise NotFoundError("not found")
            return json.dumps(found[0])
        return json.dumps({"items": found}) if found or not names else ""


def findings(objects, asked=None, **options):
    found = examine_cluster(Answers(objects, **options), asked or Requirements())
    for finding in found:
        assert "\n" not in finding.detail + finding.fix
        assert finding.detail
        assert bool(finding.fix) != finding.ok, finding
    return found


def bad(objects, asked=None, **options):
    return {finding.name: finding for finding in findings(objects, asked, **options) if not finding.ok}


def the(objects, kind, name):
    return next(one for one in objects if (one["kind"], one["metadata"]["name"]) == (kind, name))


EVERYTHING = Requirements(required_parts=frozenset({"kfp", "trainer", "kueue", "prometheus-operator", "dcgm", "gpu"}))


def test_a_whole_cluster_has_no_faults(objects):
    found = findings(objects, EVERYTHING)
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
        "runner-rights",
    } < set(names)
    pool = next(finding for finding in found if finding.name == "gpu-pools")
    assert pool.detail == "2 × 2 nvidia.com/gpu; cloud.google.com/gke-accelerator=nvidia-l4; nvidia.com/gpu=present:NoSchedule"


def test_a_bare_cluster_lacks_what_is_needed_and_only_that(objects):
    bare = [
        one
        for one in objects
        if one["kind"] in ("Node", "Namespace", "StorageClass") and one["metadata"]["name"] != "monitoring"
    ]
    assert list(bad(bare)) == ["kfp"]
    assert bad(bare, Requirements(provided_parts={"kfp": (2, 17, 0)})) == {}
    lacking = bad(bare, EVERYTHING)
    assert list(lacking) == ["kfp", "trainer", "kueue", "prometheus-operator", "dcgm"]
    assert all(finding.is_fatal for finding in lacking.values())


def change(kind, name, **fields):
    def apply(objects):
        the(objects, kind, name).update(fields)

    return apply


def image(name, text):
    def apply(objects):
        one = next(one for one in objects if one["kind"] in ("Deployment", "DaemonSet") and one["metadata"]["name"] == name)
        one["spec"]["template"]["spec"]["containers"][0]["image"] = text

    return apply


def without(kind, name):
    def apply(objects):
        objects.remove(the(objects, kind, name))

    return apply


def adding(*more):
    return lambda objects: objects.extend(more)


@pytest.mark.parametrize(
    ("broken", "name", "detail", "fatal"),
    [
        (image("ml-pipeline", "ghcr.io/kubeflow/kfp-api-server:2.15.0"), "kfp", "2.15.0: the pipeline takes", True),
        (image("ml-pipeline", "ghcr.io/kubeflow/kfp-api-server:2.18.1"), "kfp", "nobody has tried", False),
        (image("ml-pipeline", "ghcr.io/kubeflow/kfp-api-server:master"), "kfp", "does not tell its version", False),
        (image("trainer", "x/trainer-controller-manager:v2.1.0"), "bad-pair", "Kueue 0.19.3 with Kubeflow Trainer 2.1.0", True),
        (image("workflow-controller", "x/workflow-controller:v3.6.4"), "bad-pair", "with Argo Workflows 3.6.4", True),
        (image("dcgm-exporter", "x/dcgm-exporter:3.3.5-3.4.1"), "bad-pair", "lack the pod's name", False),
        (adding(workload("minio", "quay.io/minio/minio:RELEASE.2025", "kubeflow")), "object-store", "kubeflow/minio", False),
        (adding(workload("minio", "local:5000/minio/minio", "kubeflow")), "object-store", "kubeflow/minio", False),
        (adding(node("sick", ready="Unknown")), "nodes", "3 of 4 ready; not: sick", False),
        (without("StorageClass", "standard"), "storage-class", "no default among 0", True),
        (
            adding(node("silent", {"nvidia.com/gpu.present": "true"})),
            "device-plugin",
            "1 nodes are labeled as having GPUs and offer none: silent",
            True,
        ),
        (
            adding(node("half", gpus=4, allocatable=3, taints=[("gpu", "x")])),
            "device-plugin",
            "half nvidia.com/gpu: 3 of 4",
            False,
        ),
        (adding(node("open", gpus=1)), "gpu-pools", "no label of a pool; no taint", False),
        (
            change("ConfigMap", "kueue-manager-config", data={"c": "integrations:\n  frameworks:\n  - batch/job\n"}),
            "kueue-pods",
            "leaves plain pods alone",
            True,
        ),
        (without("LocalQueue", "runs"), "queue", "no LocalQueue in kubeflow", True),
        (
            change(
                "LocalQueue", "runs", fetch_status={"conditions": [{"type": "Active", "status": "False", "message": "no gpus"}]}
            ),
            "queue",
            "not active: no gpus",
            True,
        ),
        (without("PodMonitor", "runs"), "pod-monitor", "none takes the pods of runs", True),
        (
            lambda objects: the(objects, "PodMonitor", "runs")["metadata"].update(labels={"release": "other"}),
            "pod-monitor",
            'monitoring/k8s wants PodMonitors {"matchLabels": {"release": "main"}} in namespaces {}',
            False,
        ),
        (
            lambda objects: the(objects, "Prometheus", "k8s")["spec"].pop("podMonitorNamespaceSelector"),
            "pod-monitor",
            "in namespaces of its own",
            False,
        ),
        (
            lambda objects: the(objects, "DaemonSet", "dcgm-exporter")["spec"]["template"]["spec"]["containers"][0].pop("env"),
            "dcgm-pods",
            "do not name the pod",
            False,
        ),
        (without("ConfigMap", "noisy-student"), "settings", "steps take Amazon's S3", False),
        (without("Secret", "mlpipeline-minio-artifact"), "storage-secret", "no Secret kubeflow/", False),
        (change("Secret", "mlpipeline-minio-artifact", data={"accesskey": "x"}), "storage-secret", "lacks secretkey", True),
    ],
)
def test_what_is_broken_is_found_and_nothing_else(objects, broken, name, detail, fatal):
    broken(objects)
    found = bad(objects, EVERYTHING)
    if name == "bad-pair":
        # The one that is too old is told by itself too.
        found = {key: finding for key, finding in found.items() if key not in ("trainer", "argo")}
    assert list(found) == [name]
    assert detail in found[name].detail
    assert found[name].is_fatal is fatal


def test_an_old_trainer_stops_only_those_who_need_it(objects):
    image("trainer", "x/trainer-controller-manager:v2.1.0")(objects)
    assert bad(objects, EVERYTHING)["trainer"].is_fatal
    assert bad(objects)["trainer"].is_warning


@pytest.mark.parametrize(
    ("server", "name", "fatal"),
    [("v1.30.4", "kubernetes", True), ("v1.32.0", "kubernetes", False), ("v1.38.0", "kubernetes", False)],
)
def test_kubernetes_itself_may_be_too_old_or_too_new(objects, server, name, fatal):
    found = bad(objects, server=server)
    assert found[name].is_fatal is fatal
    assert "minor version apart" in found["kubectl"].detail


def test_rights_are_asked_for(objects):
    rights = (Permission("create", "deployments", "apps"), Permission("create", "namespaces"))
    runner, prometheus = "system:serviceaccount:kubeflow:pipeline-runner", "system:serviceaccount:monitoring:prometheus-k8s"
    asked = Requirements(permissions=rights)
    assert bad(objects, asked) == {}
    found = bad(objects, asked, refused=["me create namespaces", f"{runner} get secrets", f"{prometheus} list pods"])
    assert found["rights"].detail == "you may not create namespaces"
    assert found["runner-rights"].detail == "kubeflow/pipeline-runner may not get secrets in kubeflow"
    assert found["pod-monitor"].detail == "kubeflow/runs is taken by monitoring/k8s, which may not list pods in kubeflow"


def test_what_may_not_be_looked_at_is_said_and_stops_nothing(objects):
    found = bad(objects, denied=("nodes", "storageclasses", "deployments", "daemonsets", "customresourcedefinitions"))
    assert {"nodes", "storage-class", "kfp", "trainer", "kueue"} <= found.keys()
    assert not any(finding.is_fatal for finding in found.values())


def test_a_cluster_that_does_not_answer_is_the_only_finding(objects):
    class Silent(Answers):
        def run(self, *arguments, **options):
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
def test_label_selectors_select_as_kubernetes_does(selector, taken):
    assert selector_matches(selector, {"a": "1"}) is taken


def test_definitions_alone_tell_the_operators_version(objects):
    objects.remove(the(objects, "Deployment", "operator"))
    assert bad(objects, EVERYTHING) == {}
    objects.remove(the(objects, "CustomResourceDefinition", "podmonitors.monitoring.coreos.com"))
    objects.append(definition("podmonitors.monitoring.coreos.com"))
    assert "does not tell its version" in bad(objects)["prometheus-operator"].detail


def test_several_default_classes_are_remarked(objects):
    annotations = {"storageclass.kubernetes.io/is-default-class": "true"}
    objects.append(thing("StorageClass", "fast", api="storage.k8s.io/v1", annotations=annotations))
    assert bad(objects)["storage-class"].detail == "2 defaults (fast, standard): the newest is taken"
