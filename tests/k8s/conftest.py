"""A cluster that has everything, as kubectl shows it."""

import pytest

PATIENT = "spec:\n  podSpecPatch: '{containers: [{name: main, lifecycle: {preStop: {sleep: {seconds: 9}}}}]}'\n"
RETRYING = f"{PATIENT}  templateDefaults:\n    retryStrategy:\n      retryPolicy: Always\n"


def workload(name, image, namespace, kind="Deployment", labels=None, **container):
    return {
        "apiVersion": "apps/v1",
        "kind": kind,
        "metadata": {"name": name, "namespace": namespace, "labels": labels or {}},
        "spec": {"template": {"spec": {"containers": [{"name": "main", "image": image, **container}]}}},
        "status": {"numberReady": 2, "desiredNumberScheduled": 2},
    }


def thing(kind, name, namespace=None, api="v1", labels=None, annotations=None, **fields):
    meta = {"name": name, "labels": labels or {}, "annotations": annotations or {}}
    if namespace:
        meta["namespace"] = namespace
    return {"apiVersion": api, "kind": kind, "metadata": meta, **fields}


def node(name, labels=None, gpus=0, taints=(), ready="True", allocatable=None):
    amounts = {"cpu": "8", "memory": "64Gi", **({"nvidia.com/gpu": str(gpus)} if gpus else {})}
    return thing(
        "Node",
        name,
        labels=labels,
        spec={"taints": [{"key": key, "value": value, "effect": "NoSchedule"} for key, value in taints]},
        status={
            "conditions": [{"type": "Ready", "status": ready}],
            "capacity": amounts,
            "allocatable": amounts if allocatable is None else {**amounts, "nvidia.com/gpu": str(allocatable)},
        },
    )


def definition(name, annotations=None):
    return thing("CustomResourceDefinition", name, api="apiextensions.k8s.io/v1", annotations=annotations)


@pytest.fixture
def objects():
    """A list of objects that a test may change."""
    accelerator = {"cloud.google.com/gke-accelerator": "nvidia-l4"}
    monitored = {"app.kubernetes.io/part-of": "noisy-student"}
    return [
        node("cpu-1"),
        node("gpu-1", accelerator, 2, [("nvidia.com/gpu", "present")]),
        node("gpu-2", accelerator, 2, [("nvidia.com/gpu", "present")]),
        thing("Namespace", "kubeflow", labels={"kubernetes.io/metadata.name": "kubeflow"}),
        thing("Namespace", "monitoring", labels={"kubernetes.io/metadata.name": "monitoring"}),
        thing(
            "StorageClass",
            "standard",
            api="storage.k8s.io/v1",
            annotations={"storageclass.kubernetes.io/is-default-class": "true"},
            provisioner="csi.example",
        ),
        workload("ml-pipeline", "ghcr.io/kubeflow/kfp-api-server:2.17.0", "kubeflow"),
        workload("workflow-controller", "quay.io/argoproj/workflow-controller:v4.0.5", "kubeflow"),
        workload("trainer", "ghcr.io/kubeflow/trainer/trainer-controller-manager:v2.3.0", "kubeflow-system"),
        workload("kueue-controller-manager", "registry.k8s.io/kueue/kueue:v0.19.3", "kueue-system"),
        workload("operator", "quay.io/prometheus-operator/prometheus-operator:v0.85.0", "monitoring"),
        workload(
            "dcgm-exporter",
            "nvcr.io/nvidia/k8s/dcgm-exporter:4.4.1-4.6.0-ubuntu22.04",
            "gpu-operator",
            "DaemonSet",
            env=[{"name": "DCGM_EXPORTER_KUBERNETES", "value": "true"}],
        ),
        definition("trainjobs.trainer.kubeflow.org"),
        definition("workloads.kueue.x-k8s.io"),
        definition("podmonitors.monitoring.coreos.com", {"operator.prometheus.io/version": "0.85.0"}),
        thing("ConfigMap", "workflow-controller-configmap", "kubeflow", data={"workflowDefaults": RETRYING}),
        thing(
            "ConfigMap",
            "kueue-manager-config",
            "kueue-system",
            data={"controller_manager_config.yaml": "integrations:\n  frameworks:\n  - batch/job\n  - pod\n"},
        ),
        thing(
            "LocalQueue",
            "runs",
            "kubeflow",
            api="kueue.x-k8s.io/v1beta2",
            spec={"clusterQueue": "gpus"},
            status={"conditions": [{"type": "Active", "status": "True"}]},
        ),
        thing(
            "Prometheus",
            "k8s",
            "monitoring",
            api="monitoring.coreos.com/v1",
            spec={
                "serviceAccountName": "prometheus-k8s",
                "podMonitorSelector": {"matchLabels": {"release": "main"}},
                "podMonitorNamespaceSelector": {},
            },
        ),
        thing(
            "PodMonitor",
            "runs",
            "kubeflow",
            api="monitoring.coreos.com/v1",
            labels={"release": "main"},
            spec={"selector": {"matchLabels": monitored}},
        ),
        thing("ConfigMap", "noisy-student", "kubeflow", data={"AWS_ENDPOINT_URL": "http://seaweedfs.kubeflow:9000"}),
        thing("Secret", "mlpipeline-minio-artifact", "kubeflow", data={"accesskey": "bQ==", "secretkey": "bQ=="}),
        thing("ServiceAccount", "pipeline-runner", "kubeflow"),
    ]
