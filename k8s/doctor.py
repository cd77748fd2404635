"""Diagnoses a cluster: what would stop a deployment or a run, asked through kubectl.

`fetch_state` fetches, and everything else is a pure function of its result. Nothing in the cluster is changed, but for one pod that looks
up names where Kubeflow is installed, and is deleted.
"""

import contextlib
import json
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import yaml

from k8s import versions
from k8s.kubectl import ForbiddenError, K8sObject, Kubectl
from k8s.name_probe import find_unresolved_names
from k8s.versions import DISPLAY_NAMES, SUPPORTED, Version, format_version
from ns.core.diagnostics import Diagnostic
from ns.core.errors import ClusterError

PATIENCE_SECONDS = 120.0
"""For an API server that restarts while it is asked."""
RUNNER_ACCOUNT = "pipeline-runner"
"""The service account that KFP's pods run as."""
STORAGE_SECRET = "mlpipeline-minio-artifact"
SETTINGS_CONFIG_MAP = "noisy-student"
ARGO_CONFIG_MAP = "workflow-controller-configmap"
RETRIES_FIX = "take workflowDefaults from k8s/components/kubeflow/workflow-controller-configmap.yaml"
RUN_POD_LABELS = {"app.kubernetes.io/part-of": "noisy-student"}
"""Label of all pods of runs (pipelines/placement.py)."""

# The last component of the image's name, which stays the same in a mirror.
PART_IMAGES = {
    "kfp": "kfp-api-server",
    "argo": "workflow-controller",
    "trainer": "trainer-controller-manager",
    "kueue": "kueue",
    "prometheus-operator": "prometheus-operator",
    "dcgm": "dcgm-exporter",
}
CRDS = {
    "trainer": "trainjobs.trainer.kubeflow.org",
    "kueue": "workloads.kueue.x-k8s.io",
    "prometheus-operator": "podmonitors.monitoring.coreos.com",
}
INSTALL_HINTS = {
    "kfp": "`make deploy` installs it, or https://www.kubeflow.org/docs/components/pipelines/operator-guides/installation",
    "trainer": "https://www.kubeflow.org/docs/components/trainer/operator-guides/installation, or train in one pod",
    "kueue": "https://kueue.sigs.k8s.io/docs/installation, or leave the component kueue out of the overlay",
    "prometheus-operator": "https://prometheus-operator.dev/docs/getting-started/installation, or leave monitoring out",
    "dcgm": "https://docs.nvidia.com/datacenter/dcgm/latest/gpu-telemetry/dcgm-exporter.html",
}
USED_FOR = {
    "trainer": "only multi-node training needs it",
    "kueue": "runs are not queued",
    "prometheus-operator": "metrics are not collected",
    "dcgm": "there are no GPU metrics",
}

GPU_RESOURCES = ("nvidia.com/", "amd.com/gpu", "gpu.intel.com/")
# Labels of nodes with GPUs, by clouds and operators, whether or not the device plugin runs.
GPU_LABELS = (
    "cloud.google.com/gke-accelerator",
    "k8s.amazonaws.com/accelerator",
    "kubernetes.azure.com/accelerator",
    "nvidia.com/gpu.present",
    "amd.com/gpu.device-id",
)
POOL_LABELS = (
    *GPU_LABELS[:3],
    "nvidia.com/gpu.product",
    "node.kubernetes.io/instance-type",
    "cloud.google.com/gke-nodepool",
    "eks.amazonaws.com/nodegroup",
    "kubernetes.azure.com/agentpool",
    "karpenter.sh/nodepool",
    "pool",
)
PROMETHEUSES = "prometheuses.monitoring.coreos.com"
DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"


class Permission(NamedTuple):
    """A right in the cluster, as in `kubectl auth can-i`."""

    verb: str
    resource: str
    group: str = ""
    subresource: str = ""
    namespace: str = ""
    """Empty: all namespaces."""

    def __str__(self) -> str:
        name = f"{self.resource}{f'.{self.group}' if self.group else ''}{f'/{self.subresource}' if self.subresource else ''}"
        return f"{self.verb} {name}{f' in {self.namespace}' if self.namespace else ''}"


@dataclass(frozen=True)
class Requirements:
    """What a cluster is checked for. Parts are the keys of PART_IMAGES, and `gpu`."""

    namespace: str | None = None
    """Namespace of the pods of runs; None: that of Kubeflow Pipelines."""
    required_parts: frozenset[str] = frozenset({"kfp"})
    """Parts whose absence is an error."""
    provided_parts: Mapping[str, Version | None] = field(default_factory=dict)
    """Parts that the deployment will install, with their versions if known: their absence is no error."""
    permissions: tuple[Permission, ...] = ()
    """Permissions that the user must have."""


@dataclass
class ClusterState:
    """The fetched state. A kind that may not be read is in `denied`, with kubectl's message, and has no objects."""

    server_version: Version | None = None
    client_version: Version | None = None
    description: str = ""
    """Context and server, for people."""
    objects: dict[str, list[K8sObject]] = field(default_factory=dict)
    denied: dict[str, str] = field(default_factory=dict)
    names: dict[str, bool] = field(default_factory=dict)
    """Name → whether pods of runs can look it up; empty if that was not tried."""
    permissions: dict[str, dict[Permission, bool | None]] = field(default_factory=dict)
    """Subject ("" for the user) → permission → whether allowed; None where that may not be asked."""

    def get_objects(self, kind: str) -> list[K8sObject]:
        return self.objects.get(kind, [])


FETCHED_KINDS = ("nodes", "storageclasses", "deployments", "daemonsets", "namespaces", "persistentvolumeclaims")


def examine_cluster(kubectl: Kubectl, requirements: Requirements) -> list[Diagnostic]:
    """Fetches the state of a cluster and diagnoses it. If the cluster does not answer, the only diagnostic says why."""
    try:
        cluster = fetch_state(kubectl, requirements)
    except ClusterError as error:
        return [Diagnostic.from_error("cluster", error, "see kubectl's own message: kubectl version")]
    return diagnose(cluster, requirements)


def fetch_state(kubectl: Kubectl, requirements: Requirements) -> ClusterState:
    """Fetches what `diagnose` needs. Raises ClusterError if the cluster does not answer."""
    reply = json.loads(kubectl.run_command("version", "--output=json"))
    # It answers: if it stops, it restarts.
    kubectl.patience_seconds = max(kubectl.patience_seconds, PATIENCE_SECONDS)
    cluster = ClusterState(
        versions.parse_version(reply.get("serverVersion", {}).get("gitVersion", "")),
        versions.parse_version(reply.get("clientVersion", {}).get("gitVersion", "")),
        f"{kubectl.context or 'current context'}, {kubectl.server_url() or 'in a pod'}",
    )

    def fetch_object(kind: str, name: str, namespace: str | None = None) -> list[K8sObject]:
        fetched = kubectl.get_object(kind, name, namespace)
        return [fetched] if fetched else []

    def fetch_definitions() -> list[K8sObject]:
        # All of them are tens of megabytes.
        return [definition for name in CRDS.values() for definition in fetch_object("customresourcedefinition", name)]

    with ThreadPoolExecutor(8) as threads:

        def fetch_all(calls: Mapping[str, Callable[[], list[K8sObject]]]) -> None:
            def fetch_kind(kind: str) -> None:
                try:
                    cluster.objects[kind] = calls[kind]()
                except ForbiddenError as error:
                    cluster.denied[kind] = str(error)

            list(threads.map(fetch_kind, calls))

        fetch_all({kind: partial(kubectl.list_objects, kind) for kind in FETCHED_KINDS} | {"definitions": fetch_definitions})
        run_namespace = find_run_namespace(cluster, requirements)
        calls: dict[str, Callable[[], list[K8sObject]]] = {
            "settings": partial(fetch_object, "configmap", SETTINGS_CONFIG_MAP, run_namespace),
            "secret": partial(fetch_object, "secret", STORAGE_SECRET, run_namespace),
            "account": partial(fetch_object, "serviceaccount", RUNNER_ACCOUNT, run_namespace),
        }
        if has_part(cluster, "prometheus-operator"):
            for kind in (PROMETHEUSES, CRDS["prometheus-operator"]):
                calls[kind] = partial(kubectl.list_objects, kind)
        if has_part(cluster, "kueue"):
            calls["localqueues"] = partial(kubectl.list_objects, "localqueues.kueue.x-k8s.io", run_namespace)
            if manager := next(_find_containers(cluster, "kueue"), None):
                namespace = manager[0]["metadata"]["namespace"]
                calls["kueue-config"] = partial(fetch_object, "configmap", "kueue-manager-config", namespace)
        if controller := next(_find_containers(cluster, "argo"), None):
            namespace = controller[0]["metadata"]["namespace"]
            calls["argo-config"] = partial(fetch_object, "configmap", ARGO_CONFIG_MAP, namespace)
        fetch_all(calls)
        _try_names(cluster, kubectl, run_namespace)
        for subject, permissions in _collect_questions(cluster, requirements).items():
            answers = threads.map(partial(is_allowed, kubectl, subject=subject), permissions)
            cluster.permissions[subject] = dict(zip(permissions, answers, strict=True))
    return cluster


def _try_names(cluster: ClusterState, kubectl: Kubectl, run_namespace: str) -> None:
    server = next(_find_containers(cluster, "kfp"), None)
    # Kubeflow's own pods wait for others in a small image with a shell, which nodes have, from wherever they take images.
    containers = server[0]["spec"]["template"]["spec"].get("initContainers") if server else None
    if not server or not containers:
        return
    settings = next(iter(cluster.get_objects("settings")), {})
    store = urllib.parse.urlsplit((settings.get("data") or {}).get("AWS_ENDPOINT_URL", "")).hostname
    names = ["kubernetes.default", f"ml-pipeline.{server[0]['metadata']['namespace']}", *([store] if store else [])]
    try:
        unresolved = find_unresolved_names(kubectl, run_namespace, containers[0]["image"], names)
    except ClusterError as error:
        cluster.denied["names"] = str(error)
    else:
        cluster.names = {name: name not in unresolved for name in names}


def diagnose_names(kubectl: Kubectl, run_namespace: str) -> list[Diagnostic]:
    """Whether pods of runs look up the names that they need; empty without Kubeflow in their namespace. Raises ClusterError."""
    settings = kubectl.get_object("configmap", SETTINGS_CONFIG_MAP, run_namespace)
    deployments = kubectl.list_objects("deployments", run_namespace)
    cluster = ClusterState(objects={"deployments": deployments, "settings": [settings] if settings else []})
    _try_names(cluster, kubectl, run_namespace)
    return list(_check_names(cluster))


def is_allowed(kubectl: Kubectl, permission: Permission, subject: str = "") -> bool | None:
    """Whether a subject has a permission. None if the user may not ask.

    `subject`: `system:serviceaccount:NAMESPACE:NAME`, or empty for the user.
    """
    kind = "SubjectAccessReview" if subject else "SelfSubjectAccessReview"
    spec: K8sObject = {"resourceAttributes": {key: value for key, value in permission._asdict().items() if value}}
    if subject:
        account = subject.split(":")
        spec["user"] = subject
        spec["groups"] = ["system:authenticated", "system:serviceaccounts", f"system:serviceaccounts:{account[2]}"]
    try:
        reply = kubectl.post_object(
            f"/apis/authorization.k8s.io/v1/{kind.lower()}s",
            {"apiVersion": "authorization.k8s.io/v1", "kind": kind, "spec": spec},
        )
    except ForbiddenError:
        return None
    return bool(reply.get("status", {}).get("allowed"))


def diagnose(cluster: ClusterState, requirements: Requirements) -> list[Diagnostic]:
    """Returns all diagnostics, in the order in which things depend on each other."""
    installed_versions = detect_versions(cluster)
    # Versions after the deployment.
    expected_versions = installed_versions | {part: version for part, version in requirements.provided_parts.items() if version}
    return [
        _passed("cluster", cluster.description),
        _check_client(cluster),
        _check_version(cluster, installed_versions, "kubernetes", requirements),
        _check_nodes(cluster),
        _check_storage(cluster),
        *_check_gpus(cluster, requirements),
        *(
            _check_version(cluster, installed_versions, part, requirements)
            for part in PART_IMAGES
            if part != "argo" or part in installed_versions
        ),
        *_check_version_conflicts(expected_versions),
        *_check_retries(cluster, requirements),
        *_check_minio(cluster),
        *_check_queues(cluster, requirements),
        *_check_pod_monitor(cluster, requirements),
        *_check_gpu_exporter(cluster),
        *_check_settings(cluster, requirements),
        *_check_names(cluster),
        *_check_permissions(cluster),
    ]


def _passed(name: str, detail: str) -> Diagnostic:
    return Diagnostic(name, True, detail)


def _failed(name: str, detail: str, fix: str, *, is_warning: bool = False) -> Diagnostic:
    return Diagnostic(name, False, detail, fix, is_warning)


def _warned(name: str, detail: str, fix: str) -> Diagnostic:
    return Diagnostic(name, False, detail, fix, is_warning=True)


def find_run_namespace(cluster: ClusterState, requirements: Requirements) -> str:
    """Namespace of the pods of runs: the required one, or that of KFP's API server, or KFP's usual one."""
    if requirements.namespace:
        return requirements.namespace
    server = next(_find_containers(cluster, "kfp"), None)
    return str(server[0]["metadata"]["namespace"]) if server else "kubeflow"


def detect_versions(cluster: ClusterState) -> dict[str, Version]:
    """Component → version, of those whose version is known."""
    detected = {"kubernetes": cluster.server_version} if cluster.server_version else {}
    for part in PART_IMAGES:
        for workload, container in _find_containers(cluster, part):
            label = _get_labels(workload).get("app.kubernetes.io/version", "")
            if version := versions.parse_image_version(container["image"]) or versions.parse_version(label):
                detected.setdefault(part, version)
    for definition in cluster.get_objects("definitions"):
        if definition["metadata"]["name"] == CRDS["prometheus-operator"]:
            annotated = (definition["metadata"].get("annotations") or {}).get("operator.prometheus.io/version", "")
            if version := versions.parse_version(annotated):
                detected.setdefault("prometheus-operator", version)
    return detected


def has_part(cluster: ClusterState, part: str) -> bool:
    """Whether a part is installed."""
    names = {definition["metadata"]["name"] for definition in cluster.get_objects("definitions")}
    return CRDS.get(part) in names or next(_find_containers(cluster, part), None) is not None


def selector_matches(selector: K8sObject | None, labels: Mapping[str, str]) -> bool:
    """Whether a label selector matches labels. None matches nothing, {} everything."""
    if selector is None or not (selector.get("matchLabels") or {}).items() <= labels.items():
        return False
    for expression in selector.get("matchExpressions") or ():
        value, values = labels.get(expression["key"]), expression.get("values") or ()
        matches = {
            "In": value in values,
            "NotIn": value not in values,
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }
        if not matches[expression["operator"]]:
            return False
    return True


def _find_containers(cluster: ClusterState, part: str) -> Iterator[tuple[K8sObject, K8sObject]]:
    """Yields the workloads that run a part's image, with the container."""
    for workload in (*cluster.get_objects("deployments"), *cluster.get_objects("daemonsets")):
        for container in workload["spec"]["template"]["spec"].get("containers") or ():
            if _parse_repository(container).rpartition("/")[2] == PART_IMAGES[part]:
                yield workload, container


def _parse_repository(container: K8sObject) -> str:
    """`localhost:5000/minio/minio` of `localhost:5000/minio/minio:TAG@sha256:…`."""
    prefix, slash, name = container.get("image", "").partition("@")[0].rpartition("/")
    return f"{prefix}{slash}{name.partition(':')[0]}"


def _check_client(cluster: ClusterState) -> Diagnostic:
    client, server = cluster.client_version, cluster.server_version
    if client is None or server is None:
        return _passed("kubectl", "installed")
    detail = f"{format_version(client)}, the server has {format_version(server)}"
    if client[0] != server[0] or abs(client[1] - server[1]) > 1:
        return _warned("kubectl", f"{detail}: more than one minor version apart", f"install kubectl {server[0]}.{server[1]}")
    return _passed("kubectl", detail)


def _check_version(
    cluster: ClusterState, installed_versions: Mapping[str, Version], part: str, requirements: Requirements
) -> Diagnostic:
    name, supported, version = DISPLAY_NAMES[part], SUPPORTED[part], installed_versions.get(part)
    needed = part in requirements.required_parts and part not in requirements.provided_parts
    provided_version = requirements.provided_parts.get(part)
    if version is None and part != "kubernetes" and not has_part(cluster, part):
        if denied := [kind for kind in ("deployments", "daemonsets", "definitions") if kind in cluster.denied]:
            fix = f"ask a user who may list {' and '.join(denied)} in all namespaces"
            return _warned(part, f"unknown whether {name} is installed", fix)
        if part in requirements.provided_parts:
            provided = format_version(provided_version) if provided_version else "it"
            return _passed(part, f"not installed yet; this deployment installs {provided}")
        if needed:
            return _failed(part, f"{name} is not installed", INSTALL_HINTS[part])
        return _passed(part, f"not installed: {USED_FOR.get(part, 'not needed')}")
    if version is None:
        return _warned(
            part, f"the version of {name} is unknown", f"check that it is {format_version(supported.minimum)} or newer"
        )
    installed = format_version(version)
    if provided_version and provided_version != version:
        return _passed(part, f"{installed}; this deployment installs {format_version(provided_version)}")
    since, until = format_version(supported.since), format_version(supported.until)
    if version < supported.minimum:
        is_warning = not needed and part not in ("kubernetes", "kfp")
        return _failed(part, f"{installed}: {supported.reason}", f"update {name} to {since} or newer", is_warning=is_warning)
    if not supported.since <= version < supported.until:
        fix = f"if something goes wrong, use {since} or newer, before {until}"
        return _warned(part, f"{installed}: this project is not tested with it", fix)
    return _passed(part, installed)


def _check_version_conflicts(expected_versions: Mapping[str, Version]) -> Iterator[Diagnostic]:
    for conflict in versions.find_version_conflicts(expected_versions):
        pair = " with ".join(
            f"{DISPLAY_NAMES[part]} {format_version(expected_versions[part])}"
            for part in (conflict.component, conflict.other_component)
        )
        yield _failed("version-conflict", f"{pair}: {conflict.problem}", conflict.fix, is_warning=not conflict.fatal)


def _check_nodes(cluster: ClusterState) -> Diagnostic:
    if "nodes" in cluster.denied:
        return _warned("nodes", "may not be listed", "ask a user who may list nodes")
    nodes = cluster.get_objects("nodes")
    unready = sorted(node["metadata"]["name"] for node in nodes if not _is_ready(node))
    ready = len(nodes) - len(unready)
    if not ready:
        return _failed("nodes", f"none of {len(nodes)} is ready", "kubectl get nodes, and describe them")
    if unready:
        listed = ", ".join(unready[:5]) + (" …" if len(unready) > 5 else "")
        return _warned("nodes", f"{ready} of {len(nodes)} ready; not: {listed}", f"kubectl describe node {unready[0]}")
    return _passed("nodes", f"{ready}, all ready")


def _is_ready(node: K8sObject) -> bool:
    conditions = node.get("status", {}).get("conditions") or ()
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)


def _check_storage(cluster: ClusterState) -> Diagnostic:
    name = "storage-class"
    if "storageclasses" in cluster.denied:
        return _warned(name, "may not be listed", "ask a user who may list storageclasses")
    classes = cluster.get_objects("storageclasses")
    defaults = [item for item in classes if (item["metadata"].get("annotations") or {}).get(DEFAULT_CLASS) == "true"]
    names = ", ".join(sorted(item["metadata"]["name"] for item in defaults))
    if not defaults:
        pending = sorted(
            _full_name(claim)
            for claim in cluster.get_objects("persistentvolumeclaims")
            if claim.get("status", {}).get("phase") == "Pending" and "storageClassName" not in claim["spec"]
        )
        fix = f"kubectl annotate storageclass NAME {DEFAULT_CLASS}=true, or name a class in the overlay"
        unbound = f"; {', '.join(pending)} cannot be bound" if pending else ""
        return _failed(name, f"no default among {len(classes)}{unbound}", fix)
    if len(defaults) > 1:
        detail = f"{len(defaults)} defaults ({names}): Kubernetes takes the newest"
        return _warned(name, detail, f"leave {DEFAULT_CLASS}=true on one of them")
    return _passed(name, f"{names} ({defaults[0].get('provisioner', '?')}) is the default")


def _check_gpus(cluster: ClusterState, requirements: Requirements) -> Iterator[Diagnostic]:
    if "nodes" in cluster.denied:
        return
    nodes = cluster.get_objects("nodes")
    with_gpus = [node for node in nodes if _gpu_resources(node, "allocatable")]
    silent = sorted(
        node["metadata"]["name"]
        for node in nodes
        if any(label in _get_labels(node) for label in GPU_LABELS) and not _gpu_resources(node, "capacity")
    )
    if silent:
        detail = f"{len(silent)} nodes have the label of GPUs and offer none: {', '.join(silent[:5])}"
        fix = (
            "install the device plugin (NVIDIA GPU operator, or the cloud's driver installer), "
            "and check that its pods tolerate the taints"
        )
        yield _failed("device-plugin", detail, fix)
    sick = sorted(
        f"{node['metadata']['name']} {resource}: {_gpu_resources(node, 'allocatable').get(resource, 0)} of {count}"
        for node in nodes
        for resource, count in _gpu_resources(node, "capacity").items()
        if _gpu_resources(node, "allocatable").get(resource, 0) < count
    )
    if sick:
        detail = f"GPUs that cannot be used: {'; '.join(sick[:5])}"
        yield _warned("device-plugin", detail, "look for Xid errors on the node, and drain it")
    if not with_gpus and "gpu" in requirements.required_parts:
        fix = "add a node pool with GPUs; a pool that scales from zero shows none until a pod asks for one"
        yield _warned("gpu-pools", "no node offers GPUs", fix)
    elif not with_gpus:
        yield _passed("gpu-pools", "no node offers GPUs: everything runs on CPUs")
    elif not (silent or sick):
        yield _passed("device-plugin", f"{len(with_gpus)} nodes offer GPUs")
    pools: dict[tuple[str, ...], list[K8sObject]] = {}
    for node in with_gpus:
        pools.setdefault(_describe_pool(node), []).append(node)
    for (resource, taints, labels), members in sorted(pools.items()):
        description = f"{len(members)} × {resource}; {labels or 'no label of a pool'}; {taints or 'no taint'}"
        if taints:
            yield _passed("gpu-pools", description)
        else:
            fix = "taint them, as nvidia.com/gpu=present:NoSchedule, and set label_tolerations and train_tolerations"
            yield _warned("gpu-pools", f"{description}: pods without GPUs are scheduled on them", fix)


def _full_name(resource: K8sObject) -> str:
    return f"{resource['metadata']['namespace']}/{resource['metadata']['name']}"


def _get_labels(resource: K8sObject) -> dict[str, str]:
    return resource["metadata"].get("labels") or {}


def _gpu_resources(node: K8sObject, field_name: str) -> dict[str, int]:
    """Resource → number of GPUs of a node, without zeros. `field_name`: capacity or allocatable."""
    amounts = node.get("status", {}).get(field_name) or {}
    return {
        name: int(count)
        for name, count in amounts.items()
        if name.startswith(GPU_RESOURCES) and str(count).isdigit() and int(count)
    }


def _describe_pool(node: K8sObject) -> tuple[str, str, str]:
    """Resources, taints and labels of a node, for people: equal in all nodes of a pool."""
    taints = sorted(
        f"{taint['key']}{'=' + taint['value'] if taint.get('value') else ''}:{taint['effect']}"
        for taint in node["spec"].get("taints") or ()
        if not taint["key"].startswith("node.kubernetes.io/")
    )
    labels = [f"{label}={_get_labels(node)[label]}" for label in POOL_LABELS if label in _get_labels(node)]
    resources = [f"{count} {name}" for name, count in sorted(_gpu_resources(node, "allocatable").items())]
    return ", ".join(resources), ", ".join(taints), ", ".join(labels)


def _check_minio(cluster: ClusterState) -> Iterator[Diagnostic]:
    servers = sorted(
        _full_name(workload)
        for workload in cluster.get_objects("deployments")
        for container in workload["spec"]["template"]["spec"].get("containers") or ()
        if _parse_repository(container).endswith("minio/minio")
    )
    if servers:
        detail = (
            f"{', '.join(servers)}: MinIO's server image is no longer published, and its last version has known vulnerabilities"
        )
        yield _warned("object-store", detail, "move the data to SeaweedFS (component object-store) or another S3 server")


def _check_retries(cluster: ClusterState, requirements: Requirements) -> Iterator[Diagnostic]:
    """Checks whether Argo retries stages that exit, are killed or run out of memory, and gives a pod that is deleted time to end."""
    if "kfp" in requirements.provided_parts:
        return
    for config_map in cluster.get_objects("argo-config"):
        # A broken one stops Argo's controller, which says so itself.
        with contextlib.suppress(yaml.YAMLError):
            policy, name = find_retry_policy(config_map), f"ConfigMap {config_map['metadata']['namespace']}/{ARGO_CONFIG_MAP}"
            detail = f"{name}: retryPolicy {policy}"
            # Whatever it runs there.
            if "preStop" in str(_read_workflow_defaults(config_map).get("podSpecPatch")):
                yield _passed("grace", f"{name}: a pod that is deleted first asks its stage to stop")
            else:
                yield _warned(
                    "grace",
                    f"{name}: podSpecPatch has no preStop: a stage whose pod is deleted or drained ends at once, without a checkpoint",
                    RETRIES_FIX,
                )
            if policy in ("Always", "OnFailure"):
                yield _passed("retries", detail)
            else:
                yield _warned(
                    "retries",
                    f"{detail}: a stage that is killed, runs out of memory or exits is not tried again",
                    RETRIES_FIX,
                )


def find_retry_policy(config_map: K8sObject) -> str:
    """The retry policy of every template without one of its own; OnFailure if Argo's ConfigMap names none."""
    part = _read_workflow_defaults(config_map)
    for name in ("templateDefaults", "retryStrategy"):
        part = part.get(name) or {}
    return str(part.get("retryPolicy") or "OnFailure")


def _read_workflow_defaults(config_map: K8sObject) -> K8sObject:
    """The `spec` that Argo gives to every Workflow."""
    defaults = yaml.safe_load((config_map.get("data") or {}).get("workflowDefaults") or "{}") or {}
    return defaults.get("spec") or {}


def _check_queues(cluster: ClusterState, requirements: Requirements) -> Iterator[Diagnostic]:
    if not has_part(cluster, "kueue"):
        return
    run_namespace, needed = find_run_namespace(cluster, requirements), "kueue" in requirements.required_parts
    config = next(iter(cluster.get_objects("kueue-config")), None)
    text = "\n".join((config or {}).get("data", {}).values())
    if config and '"pod"' not in text and "- pod\n" not in f"{text}\n":
        fix = "add pod to integrations.frameworks in ConfigMap kueue-manager-config, and restart Kueue"
        yield _failed("kueue-pods", "Kueue does not queue plain pods, so not the pods of runs", fix, is_warning=not needed)
    queues = cluster.get_objects("localqueues")
    if not queues and "localqueues" not in cluster.denied and needed and "kueue" not in requirements.provided_parts:
        yield _failed("queue", f"there is no LocalQueue in {run_namespace}", "create a LocalQueue (component kueue)")
    for queue in queues:
        name = f"{run_namespace}/{queue['metadata']['name']} to {queue['spec'].get('clusterQueue', '?')}"
        for condition in queue.get("status", {}).get("conditions") or ():
            if condition["type"] == "Active" and condition["status"] == "False":
                detail = f"{name} is not active: {condition.get('message', 'no reason is given')}"
                yield _failed("queue", detail, "check that its ClusterQueue and its ResourceFlavors exist")
                break
        else:
            yield _passed("queue", name)


def _check_pod_monitor(cluster: ClusterState, requirements: Requirements) -> Iterator[Diagnostic]:
    """Whether a Prometheus selects the PodMonitor of runs, and may list their pods."""
    if not has_part(cluster, "prometheus-operator"):
        return
    run_namespace, check = find_run_namespace(cluster, requirements), "pod-monitor"
    prometheuses = cluster.get_objects(PROMETHEUSES)
    monitors = [item for item in cluster.get_objects(CRDS["prometheus-operator"]) if _is_for_runs(item, run_namespace)]
    if not monitors:
        if "prometheus-operator" in requirements.required_parts - requirements.provided_parts.keys():
            yield _failed(check, "none selects the pods of runs", "add the component monitoring to the overlay")
        else:
            yield _passed(check, "none selects the pods of runs yet (component monitoring)")
    for monitor in monitors:
        selecting = [prometheus for prometheus in prometheuses if _selects_monitor(prometheus, monitor, cluster)]
        if not selecting:
            selectors = "; ".join(f"{_full_name(item)} selects {_describe_selectors(item['spec'])}" for item in prometheuses)
            detail = f"{_full_name(monitor)} is selected by no Prometheus ({selectors or 'there is none'})"
            fix = "give the PodMonitor and its namespace the labels of podMonitorSelector and podMonitorNamespaceSelector"
            yield _warned(check, detail, fix)
        for prometheus in selecting:
            account, detail = _service_account(prometheus), f"{_full_name(monitor)} is selected by {_full_name(prometheus)}"
            if cluster.permissions.get(account, {}).get(Permission("list", "pods", namespace=run_namespace)) is False:
                fix = f"bind a Role with get, list, watch on pods in {run_namespace} to {account}"
                yield _warned(check, f"{detail}, which may not list pods in {run_namespace}", fix)
            else:
                yield _passed(check, detail)


def _is_for_runs(monitor: K8sObject, run_namespace: str) -> bool:
    spaces = monitor["spec"].get("namespaceSelector") or {}
    covers_namespace = spaces.get("any") or run_namespace in (spaces.get("matchNames") or [monitor["metadata"]["namespace"]])
    matched_labels = (monitor["spec"].get("selector") or {}).get("matchLabels") or {}
    return bool(covers_namespace) and matched_labels.items() >= RUN_POD_LABELS.items()


def _selects_monitor(prometheus: K8sObject, monitor: K8sObject, cluster: ClusterState) -> bool:
    spec, namespace = prometheus["spec"], monitor["metadata"]["namespace"]
    if not selector_matches(spec.get("podMonitorSelector"), _get_labels(monitor)):
        return False
    namespace_selector = spec.get("podMonitorNamespaceSelector")
    if namespace_selector is None:
        return bool(namespace == prometheus["metadata"]["namespace"])
    labels = {item["metadata"]["name"]: _get_labels(item) for item in cluster.get_objects("namespaces")}
    return selector_matches(namespace_selector, labels.get(namespace, {}))


def _describe_selectors(spec: K8sObject) -> str:
    namespace_selector = spec.get("podMonitorNamespaceSelector")
    namespaces = "of its own" if namespace_selector is None else json.dumps(namespace_selector)
    return f"PodMonitors {json.dumps(spec.get('podMonitorSelector'))} in namespaces {namespaces}"


def _service_account(prometheus: K8sObject) -> str:
    name = prometheus["spec"].get("serviceAccountName") or "default"
    return f"system:serviceaccount:{prometheus['metadata']['namespace']}:{name}"


def _check_gpu_exporter(cluster: ClusterState) -> Iterator[Diagnostic]:
    for workload, container in _find_containers(cluster, "dcgm"):
        name, namespace = workload["metadata"]["name"], workload["metadata"]["namespace"]
        environment = {variable["name"]: variable.get("value") for variable in container.get("env") or ()}
        arguments = [*(container.get("command") or ()), *(container.get("args") or ())]
        status = workload.get("status", {})
        ready, desired = status.get("numberReady", 0), status.get("desiredNumberScheduled", 0)
        detail = f"{namespace}/{name}: "
        if environment.get("DCGM_EXPORTER_KUBERNETES") != "true" and not {"-k", "--kubernetes"} & set(arguments):
            fix = "set DCGM_EXPORTER_KUBERNETES=true in its environment, and mount /var/lib/kubelet/pod-resources"
            yield _warned("dcgm-pods", f"{detail}its metrics do not name the pod", fix)
        elif ready < desired:
            fix = f"kubectl -n {namespace} describe daemonset {name}"
            yield _warned("dcgm-pods", f"{detail}ready on {ready} of {desired} nodes", fix)
        else:
            yield _passed("dcgm-pods", f"{detail}on {desired} nodes, its metrics name the pod")
        return


def _check_settings(cluster: ClusterState, requirements: Requirements) -> Iterator[Diagnostic]:
    """Checks the ConfigMap and the Secret of the store. Both may be missing; an existing Secret must have both keys."""
    if not has_part(cluster, "kfp") or "kfp" in requirements.provided_parts:
        return
    run_namespace = find_run_namespace(cluster, requirements)
    name = f"ConfigMap {run_namespace}/{SETTINGS_CONFIG_MAP}"
    settings = cluster.get_objects("settings")
    if settings:
        endpoint = (settings[0].get("data") or {}).get("AWS_ENDPOINT_URL")
        yield _passed("settings", f"{name}: store at {endpoint or 'Amazon S3'}")
    elif "settings" not in cluster.denied:
        create = f"kubectl -n {run_namespace} create configmap {SETTINGS_CONFIG_MAP} --from-literal=AWS_ENDPOINT_URL=…"
        yield _warned("settings", f"no {name}: runs use Amazon S3", f"`make deploy`, or {create}")
    name = f"Secret {run_namespace}/{STORAGE_SECRET}"
    secrets = cluster.get_objects("secret")
    missing = sorted({"accesskey", "secretkey"} - set(secrets[0].get("data") or {})) if secrets else []
    if missing:
        yield _failed("storage-secret", f"{name} lacks {' and '.join(missing)}", "give it the keys accesskey and secretkey")
    elif secrets:
        yield _passed("storage-secret", f"{name} has both keys")
    elif "secret" not in cluster.denied:
        options = "--from-literal=accesskey=… --from-literal=secretkey=…"
        fix = f"kubectl -n {run_namespace} create secret generic {STORAGE_SECRET} {options}"
        yield _warned("storage-secret", f"no {name}: pods need credentials of their own (workload identity)", fix)


def _check_names(cluster: ClusterState) -> Iterator[Diagnostic]:
    if "names" in cluster.denied:
        yield _warned(
            "names", f"could not be tried from inside: {cluster.denied['names']}", "try it with the rights to create pods"
        )
    unresolved = [name for name, resolved in cluster.names.items() if not resolved]
    if unresolved:
        detail = f"pods of runs cannot look up {', '.join(unresolved)}"
        yield _failed(
            "names",
            detail,
            "let them ask the cluster's DNS (docs/security.md, Network): kubectl get networkpolicy",
        )
    elif cluster.names:
        yield _passed("names", f"pods of runs look up {', '.join(cluster.names)}")


def runner_permissions(run_namespace: str, trainer: bool) -> tuple[Permission, ...]:
    """Permissions that the service account of runs needs: Argo's results, and TrainJobs if `trainer`."""
    permissions = [
        ("create", "workflowtaskresults", "argoproj.io"),
        ("patch", "workflowtaskresults", "argoproj.io"),
        ("get", "pods"),
        ("get", "secrets"),
    ]
    if trainer:
        permissions += [(verb, "trainjobs", "trainer.kubeflow.org") for verb in ("create", "get", "watch", "delete")]
        permissions.append(("get", "pods", "", "log"))
    return tuple(Permission(*permission)._replace(namespace=run_namespace) for permission in permissions)


def _collect_questions(cluster: ClusterState, requirements: Requirements) -> dict[str, tuple[Permission, ...]]:
    """Subject → permissions to ask for."""
    run_namespace = find_run_namespace(cluster, requirements)
    questions: dict[str, tuple[Permission, ...]] = {"": requirements.permissions}
    if cluster.get_objects("account"):
        questions[f"system:serviceaccount:{run_namespace}:{RUNNER_ACCOUNT}"] = runner_permissions(
            run_namespace, "trainer" in requirements.required_parts
        )
    for prometheus in cluster.get_objects(PROMETHEUSES):
        questions[_service_account(prometheus)] = (Permission("list", "pods", namespace=run_namespace),)
    return questions


def _check_permissions(cluster: ClusterState) -> Iterator[Diagnostic]:
    for subject, permissions in cluster.permissions.items():
        # Those of Prometheus are checked with its PodMonitor.
        if subject and not subject.endswith(f":{RUNNER_ACCOUNT}"):
            continue
        name = subject.removeprefix("system:serviceaccount:").replace(":", "/") or "you"
        check = "runner-permissions" if subject else "permissions"
        denied = [permission for permission, answer in permissions.items() if answer is False]
        if denied:
            fix = "bind the Role in docs/security.md to it" if subject else "ask for them, or use a context that has them"
            yield _failed(check, f"{name} may not {_join_permissions(denied)}", fix)
        elif any(answer is None for answer in permissions.values()):
            fix = f"ask a user who may create SubjectAccessReviews, or check in a pod of {name}"
            yield _warned(check, f"the permissions of {name} may not be read", fix)
        elif permissions:
            yield _passed(check, f"{name} has all {len(permissions)} permissions that are needed")


def _join_permissions(permissions: Sequence[Permission]) -> str:
    names = list(map(str, permissions))
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
