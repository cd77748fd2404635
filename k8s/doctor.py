"""What of a cluster would stop a deployment or a run: asked through kubectl, and judged here.

`look` fetches, and everything else is a pure function of what it brought. Nothing in the cluster is changed.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from k8s import versions
from k8s.kubectl import ForbiddenError, K8sObject, Kubectl
from k8s.versions import DISPLAY_NAMES, SUPPORTED, Version, format_version
from ns.core.diagnostics import Diagnostic
from ns.core.errors import ClusterError

ClusterPart = Literal["kfp", "trainer", "kueue", "prometheus-operator", "dcgm", "gpu"]
"""What a cluster may have, and an overlay or a run may need."""

RUNNER_ACCOUNT = "pipeline-runner"
"""The service account that KFP's pods run as."""
STORAGE_SECRET = "mlpipeline-minio-artifact"
SETTINGS_CONFIG_MAP = "noisy-student"
RUN_POD_LABELS = {"app.kubernetes.io/part-of": "noisy-student"}
"""The label of all pods of runs (pipelines/placement.py)."""

# The last part of the image's name, which stays when a registry is mirrored.
PART_IMAGES = {
    "kfp": ("kfp-api-server",),
    "argo": ("workflow-controller",),
    "trainer": ("trainer-controller-manager",),
    "kueue": ("kueue",),
    "prometheus-operator": ("prometheus-operator",),
    "dcgm": ("dcgm-exporter",),
}
CRDS = {
    "trainer": "trainjobs.trainer.kubeflow.org",
    "kueue": "workloads.kueue.x-k8s.io",
    "prometheus-operator": "podmonitors.monitoring.coreos.com",
}
INSTALL_HINTS = {
    "kfp": "`make deploy` brings it, or https://www.kubeflow.org/docs/components/pipelines/operator-guides/installation",
    "trainer": "https://www.kubeflow.org/docs/components/trainer/operator-guides/installation, or train in one pod",
    "kueue": "https://kueue.sigs.k8s.io/docs/installation, or leave the component kueue out of the overlay",
    "prometheus-operator": "https://prometheus-operator.dev/docs/getting-started/installation, or leave monitoring out",
    "dcgm": "https://docs.nvidia.com/datacenter/dcgm/latest/gpu-telemetry/dcgm-exporter.html",
}
USED_FOR = {
    "trainer": "only trainings on several nodes need it",
    "kueue": "runs are not queued",
    "prometheus-operator": "metrics are not collected",
    "dcgm": "no series of GPUs",
}

GPU_RESOURCES = ("nvidia.com/", "amd.com/gpu", "gpu.intel.com/")
# Labels by which clouds and operators say that a node has GPUs, whether or not the device plugin runs.
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
DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"


class Permission(NamedTuple):
    """Something that somebody must be allowed to do. As in `kubectl auth can-i`."""

    verb: str
    resource: str
    group: str = ""
    subresource: str = ""
    namespace: str = ""
    """Everywhere, if empty."""

    def __str__(self) -> str:
        name = f"{self.resource}{f'.{self.group}' if self.group else ''}{f'/{self.subresource}' if self.subresource else ''}"
        return f"{self.verb} {name}{f' in {self.namespace}' if self.namespace else ''}"


@dataclass(frozen=True)
class Requirements:
    """What a cluster is looked at for."""

    namespace: str | None = None
    """Where the pods of runs are; Kubeflow Pipelines' own if None."""
    required_parts: frozenset[str] = frozenset({"kfp"})
    """Parts without which it will not do."""
    provided_parts: Mapping[str, Version | None] = field(default_factory=dict)
    """Parts that a deployment is about to bring, with their versions where these are known: that they are not there yet is no fault."""
    permissions: tuple[Permission, ...] = ()
    """That whoever asks must have."""


@dataclass
class ClusterState:
    """What was fetched. A kind that may not be read is in `denied`, with kubectl's words, and has no objects."""

    server_version: Version | None = None
    client_version: Version | None = None
    description: str = ""
    """Context and server, for people."""
    objects: dict[str, list[K8sObject]] = field(default_factory=dict)
    denied: dict[str, str] = field(default_factory=dict)
    permissions: dict[str, dict[Permission, bool | None]] = field(default_factory=dict)
    """Who ("" for whoever asks) → right → whether allowed; None where that may not be asked."""

    def get_objects(self, kind: str) -> list[K8sObject]:
        return self.objects.get(kind, [])


FETCHED_KINDS = ("nodes", "storageclasses", "deployments", "daemonsets", "namespaces", "persistentvolumeclaims")


def examine_cluster(kubectl: Kubectl, requirements: Requirements) -> list[Diagnostic]:
    """Looks at a cluster and judges it. When it does not answer, the one finding says why."""
    try:
        cluster = fetch_state(kubectl, requirements)
    except ClusterError as error:
        detail, _, fix = str(error).rpartition("; ")
        return [Diagnostic("cluster", False, detail or fix, fix if detail else "look at kubectl's own words: kubectl version")]
    return diagnose(cluster, requirements)


def fetch_state(kubectl: Kubectl, requirements: Requirements) -> ClusterState:
    """Fetches what `judge` needs. Raises ClusterError if the cluster does not answer."""
    reply = json.loads(kubectl.run_command("version", "--output=json"))
    cluster = ClusterState(
        versions.parse_version(reply.get("serverVersion", {}).get("gitVersion", "")),
        versions.parse_version(reply.get("clientVersion", {}).get("gitVersion", "")),
        f"{kubectl.context or 'current context'}, {kubectl.server_url() or 'in a pod'}",
    )

    def fetch_kind(kind: str, call: Callable[[], list[K8sObject]]) -> None:
        try:
            cluster.objects[kind] = call()
        except ForbiddenError as error:
            cluster.denied[kind] = str(error)

    def fetch_object(kind: str, name: str, namespace: str) -> list[K8sObject]:
        fetched = kubectl.get_object(kind, name, namespace)
        return [fetched] if fetched else []

    def fetch_definitions() -> list[K8sObject]:
        # All of them are tens of megabytes; a list of names is one call.
        reply = kubectl.run_command("get", "customresourcedefinitions", *CRDS.values(), "--ignore-not-found", "--output=json")
        # One object is printed as itself, none as nothing, and several as a list.
        value: Any = json.loads(reply) if reply.strip() else {"items": []}
        return list(value.get("items", [value]))

    with ThreadPoolExecutor(8) as threads:
        first: list[tuple[str, Callable[[], list[K8sObject]]]] = [(kind, _make_lister(kubectl, kind)) for kind in FETCHED_KINDS]
        list(threads.map(lambda one: fetch_kind(*one), [*first, ("definitions", fetch_definitions)]))
        run_namespace = find_run_namespace(cluster, requirements)
        second: list[tuple[str, Callable[[], list[K8sObject]]]] = [
            ("settings", lambda: fetch_object("configmap", SETTINGS_CONFIG_MAP, run_namespace)),
            ("secret", lambda: fetch_object("secret", STORAGE_SECRET, run_namespace)),
            ("account", lambda: fetch_object("serviceaccount", RUNNER_ACCOUNT, run_namespace)),
        ]
        if has_part(cluster, "prometheus-operator"):
            second += [
                (kind, _make_lister(kubectl, kind))
                for kind in ("prometheuses.monitoring.coreos.com", CRDS["prometheus-operator"])
            ]
        if has_part(cluster, "kueue"):
            second += [("localqueues", lambda: kubectl.list_objects("localqueues.kueue.x-k8s.io", run_namespace))]
            manager = next(_find_containers(cluster, "kueue"), None)
            if manager:
                manager_namespace = manager[0]["metadata"]["namespace"]
                second.append(("kueue-config", lambda: fetch_object("configmap", "kueue-manager-config", manager_namespace)))
        list(threads.map(lambda one: fetch_kind(*one), second))
        questions = [(who, right) for who, rights in _collect_questions(cluster, requirements).items() for right in rights]
        answers = list(threads.map(lambda one: is_allowed(kubectl, one[1], one[0]), questions))
    for (who, right), answer in zip(questions, answers, strict=True):
        cluster.permissions.setdefault(who, {})[right] = answer
    return cluster


def _make_lister(kubectl: Kubectl, kind: str) -> Callable[[], list[K8sObject]]:
    return lambda: kubectl.list_objects(kind)


def is_allowed(kubectl: Kubectl, permission: Permission, subject: str = "") -> bool | None:
    """Whether somebody (`system:serviceaccount:NAMESPACE:NAME`; whoever asks if empty) has a right. None if one may not ask."""
    attributes = {
        "verb": permission.verb,
        "resource": permission.resource,
        "group": permission.group,
        "subresource": permission.subresource,
        "namespace": permission.namespace,
    }
    kind = "SubjectAccessReview" if subject else "SelfSubjectAccessReview"
    spec: K8sObject = {"resourceAttributes": {key: value for key, value in attributes.items() if value}}
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
    """All findings, in the order in which things depend on each other."""
    installed_versions = detect_versions(cluster)
    # Versions as they will be.
    expected_versions = installed_versions | {part: version for part, version in requirements.provided_parts.items() if version}
    findings = [Diagnostic("cluster", True, cluster.description), _check_client(cluster)]
    findings.append(_check_version(cluster, installed_versions, "kubernetes", requirements))
    findings += [_check_nodes(cluster), _check_storage(cluster), *_check_gpus(cluster, requirements)]
    for part in ("kfp", "argo", "trainer", "kueue", "prometheus-operator", "dcgm"):
        if part != "argo" or part in installed_versions:
            findings.append(_check_version(cluster, installed_versions, part, requirements))
    findings += [
        Diagnostic(
            "bad-pair",
            False,
            f"{DISPLAY_NAMES[conflict.component]} {format_version(expected_versions[conflict.component])} with {DISPLAY_NAMES[conflict.other_component]} {format_version(expected_versions[conflict.other_component])}: {conflict.problem}",
            conflict.fix,
            is_warning=not conflict.fatal,
        )
        for conflict in versions.find_version_conflicts(expected_versions)
    ]
    findings += _check_minio(cluster)
    findings += _check_queues(cluster, requirements)
    findings += _check_pod_monitor(cluster, requirements)
    findings += _check_gpu_exporter(cluster)
    findings += _check_settings(cluster, requirements)
    findings += _check_permissions(cluster)
    return findings


def find_run_namespace(cluster: ClusterState, requirements: Requirements) -> str:
    """Where the pods of runs are: as asked, or with KFP's API server, or where KFP is usually."""
    if requirements.namespace:
        return requirements.namespace
    server = next(_find_containers(cluster, "kfp"), None)
    return str(server[0]["metadata"]["namespace"]) if server else "kubeflow"


def detect_versions(cluster: ClusterState) -> dict[str, Version]:
    """Component → version, of those whose version can be told."""
    detected = {"kubernetes": cluster.server_version} if cluster.server_version else {}
    for part in PART_IMAGES:
        for workload, container in _find_containers(cluster, part):
            labels = workload["metadata"].get("labels") or {}
            version = versions.parse_image_version(container["image"]) or versions.parse_version(
                labels.get("app.kubernetes.io/version", "")
            )
            if version:
                detected[part] = version
                break
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
    """Whether a label selector takes these labels. None takes nothing, {} everything."""
    if selector is None:
        return False
    for key, value in (selector.get("matchLabels") or {}).items():
        if labels.get(key) != value:
            return False
    for expression in selector.get("matchExpressions") or ():
        value, values = labels.get(expression["key"]), expression.get("values") or ()
        matched = {
            "In": value in values,
            "NotIn": value not in values,
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }[expression["operator"]]
        if not matched:
            return False
    return True


def _find_containers(cluster: ClusterState, part: str) -> Iterator[tuple[K8sObject, K8sObject]]:
    """Workloads that run a part's image, with the container."""
    for workload in (*cluster.get_objects("deployments"), *cluster.get_objects("daemonsets")):
        for container in workload["spec"]["template"]["spec"].get("containers") or ():
            if _parse_repository(container).rpartition("/")[2] in PART_IMAGES[part]:
                yield workload, container


def _parse_repository(container: K8sObject) -> str:
    """`localhost:5000/minio/minio` of `localhost:5000/minio/minio:TAG@sha256:…`."""
    prefix, slash, name = container.get("image", "").partition("@")[0].rpartition("/")
    return f"{prefix}{slash}{name.partition(':')[0]}"


def _check_client(cluster: ClusterState) -> Diagnostic:
    if cluster.client_version is None or cluster.server_version is None:
        return Diagnostic("kubectl", True, "installed")
    detail = f"{format_version(cluster.client_version)}, the server has {format_version(cluster.server_version)}"
    if cluster.client_version[0] != cluster.server_version[0] or abs(cluster.client_version[1] - cluster.server_version[1]) > 1:
        fix = f"install kubectl {cluster.server_version[0]}.{cluster.server_version[1]}"
        return Diagnostic("kubectl", False, f"{detail}: more than one minor version apart", fix, is_warning=True)
    return Diagnostic("kubectl", True, detail)


def _check_version(
    cluster: ClusterState, installed_versions: Mapping[str, Version], part: str, requirements: Requirements
) -> Diagnostic:
    name, supported = DISPLAY_NAMES[part], SUPPORTED[part]
    needed = part in requirements.required_parts and part not in requirements.provided_parts
    version = installed_versions.get(part)
    if version is None and part != "kubernetes" and not has_part(cluster, part):
        denied = [kind for kind in ("deployments", "daemonsets", "definitions") if kind in cluster.denied]
        if denied:
            fix = f"let somebody look who may list {' and '.join(denied)} in all namespaces"
            return Diagnostic(part, False, f"cannot be told whether {name} is installed", fix, is_warning=True)
        if part in requirements.provided_parts:
            provided_version = requirements.provided_parts[part]
            return Diagnostic(
                part,
                True,
                f"not installed yet; this deployment brings {format_version(provided_version) if provided_version else 'it'}",
            )
        if needed:
            return Diagnostic(part, False, f"{name} is not installed", INSTALL_HINTS[part])
        return Diagnostic(part, True, f"not installed: {USED_FOR.get(part, 'not needed')}")
    if version is None:
        return Diagnostic(
            part,
            False,
            f"{name} does not tell its version",
            f"see that it is {format_version(supported.minimum)} or newer",
            True,
        )
    provided_version = requirements.provided_parts.get(part)
    if provided_version and provided_version != version:
        return Diagnostic(part, True, f"{format_version(version)}; this deployment brings {format_version(provided_version)}")
    if version < supported.minimum:
        fix = f"update {name} to {format_version(supported.since)} or newer"
        return Diagnostic(
            part,
            False,
            f"{format_version(version)}: {supported.reason}",
            fix,
            is_warning=not needed and part not in ("kubernetes", "kfp"),
        )
    if not supported.since <= version < supported.until:
        fix = (
            f"if something goes wrong, use {format_version(supported.since)} or newer, before {format_version(supported.until)}"
        )
        return Diagnostic(
            part, False, f"{format_version(version)}: nobody has tried this project with it", fix, is_warning=True
        )
    return Diagnostic(part, True, format_version(version))


def _check_nodes(cluster: ClusterState) -> Diagnostic:
    if "nodes" in cluster.denied:
        return Diagnostic("nodes", False, "may not be listed", "let somebody look who may list nodes", is_warning=True)
    nodes = cluster.get_objects("nodes")
    ready = [node for node in nodes if _is_ready(node)]
    unready = sorted(node["metadata"]["name"] for node in nodes if not _is_ready(node))
    if not ready:
        return Diagnostic("nodes", False, f"none of {len(nodes)} is ready", "kubectl get nodes, and describe them")
    if unready:
        listed = ", ".join(unready[:5]) + (" …" if len(unready) > 5 else "")
        fix = f"kubectl describe node {unready[0]}"
        return Diagnostic("nodes", False, f"{len(ready)} of {len(nodes)} ready; not: {listed}", fix, is_warning=True)
    return Diagnostic("nodes", True, f"{len(ready)}, all ready")


def _is_ready(node: K8sObject) -> bool:
    conditions = node.get("status", {}).get("conditions") or ()
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)


def _check_storage(cluster: ClusterState) -> Diagnostic:
    if "storageclasses" in cluster.denied:
        fix = "let somebody look who may list storageclasses"
        return Diagnostic("storage-class", False, "may not be listed", fix, is_warning=True)
    classes = cluster.get_objects("storageclasses")
    defaults = [
        storage_class
        for storage_class in classes
        if (storage_class["metadata"].get("annotations") or {}).get(DEFAULT_CLASS) == "true"
    ]
    names = ", ".join(sorted(storage_class["metadata"]["name"] for storage_class in defaults))
    pending = sorted(
        f"{claim['metadata']['namespace']}/{claim['metadata']['name']}"
        for claim in cluster.get_objects("persistentvolumeclaims")
        if claim.get("status", {}).get("phase") == "Pending" and "storageClassName" not in claim["spec"]
    )
    if not defaults:
        fix = f"kubectl annotate storageclass NAME {DEFAULT_CLASS}=true, or name a class in the overlay"
        waiting = f"; {', '.join(pending)} cannot be bound" if pending else ""
        return Diagnostic("storage-class", False, f"no default among {len(classes)}{waiting}", fix)
    if len(defaults) > 1:
        fix = f"leave {DEFAULT_CLASS}=true on one of them"
        return Diagnostic(
            "storage-class", False, f"{len(defaults)} defaults ({names}): the newest is taken", fix, is_warning=True
        )
    return Diagnostic("storage-class", True, f"{names} ({defaults[0].get('provisioner', '?')}) is the default")


def _check_gpus(cluster: ClusterState, requirements: Requirements) -> list[Diagnostic]:
    if "nodes" in cluster.denied:
        return []
    nodes = cluster.get_objects("nodes")
    with_gpus = [node for node in nodes if _gpu_resources(node, "allocatable")]
    promised = [node for node in nodes if any(label in _node_labels(node) for label in GPU_LABELS)]
    silent = sorted(node["metadata"]["name"] for node in promised if not _gpu_resources(node, "capacity"))
    findings = []
    if silent:
        detail = f"{len(silent)} nodes are labeled as having GPUs and offer none: {', '.join(silent[:5])}"
        fix = "install the device plugin (NVIDIA GPU operator, or the cloud's driver installer), and see that its pods tolerate the taints"
        findings.append(Diagnostic("device-plugin", False, detail, fix))
    sick = sorted(
        f"{node['metadata']['name']} {resource}: {_gpu_resources(node, 'allocatable').get(resource, 0)} of {count}"
        for node in nodes
        for resource, count in _gpu_resources(node, "capacity").items()
        if _gpu_resources(node, "allocatable").get(resource, 0) < count
    )
    if sick:
        detail = f"GPUs that cannot be used: {'; '.join(sick[:5])}"
        findings.append(
            Diagnostic("device-plugin", False, detail, "look for Xid errors on the node, and drain it", is_warning=True)
        )
    if not with_gpus:
        if "gpu" in requirements.required_parts:
            fix = "add a node pool with GPUs; a pool that scales from zero shows none until a pod asks for one"
            findings.append(Diagnostic("gpu-pools", False, "no node offers GPUs", fix, is_warning=True))
        else:
            findings.append(Diagnostic("gpu-pools", True, "no node offers GPUs: everything runs on CPUs"))
        return findings
    if not findings:
        findings.append(Diagnostic("device-plugin", True, f"{len(with_gpus)} nodes offer GPUs"))
    pools: dict[tuple[str, ...], list[K8sObject]] = {}
    for node in with_gpus:
        pools.setdefault(_describe_pool(node), []).append(node)
    for (resource, taints, labels), members in sorted(pools.items()):
        description = f"{len(members)} × {resource}; {labels or 'no label of a pool'}; {taints or 'no taint'}"
        if taints:
            findings.append(Diagnostic("gpu-pools", True, description))
        else:
            fix = (
                "taint them, as nvidia.com/gpu=present:NoSchedule, and let label_tolerations and train_tolerations tolerate it"
            )
            findings.append(
                Diagnostic("gpu-pools", False, f"{description}: steps without GPUs take their place", fix, is_warning=True)
            )
    return findings


def _node_labels(node: K8sObject) -> dict[str, str]:
    return node["metadata"].get("labels") or {}


def _gpu_resources(node: K8sObject, field_name: str) -> dict[str, int]:
    """GPUs of a node by resource, those with none left out. `what`: capacity or allocatable."""
    amounts = node.get("status", {}).get(field_name) or {}
    return {
        name: int(count)
        for name, count in amounts.items()
        if name.startswith(GPU_RESOURCES) and str(count).isdigit() and int(count)
    }


def _describe_pool(node: K8sObject) -> tuple[str, str, str]:
    """Resources, taints and telling labels of a node, for people: equal in all nodes of a pool."""
    taints = sorted(
        f"{taint['key']}{'=' + taint['value'] if taint.get('value') else ''}:{taint['effect']}"
        for taint in node["spec"].get("taints") or ()
        if not taint["key"].startswith("node.kubernetes.io/")
    )
    labels = [f"{label}={_node_labels(node)[label]}" for label in POOL_LABELS if label in _node_labels(node)]
    resources = [f"{count} {name}" for name, count in sorted(_gpu_resources(node, "allocatable").items())]
    return ", ".join(resources), ", ".join(taints), ", ".join(labels)


def _check_minio(cluster: ClusterState) -> list[Diagnostic]:
    servers = sorted(
        f"{workload['metadata']['namespace']}/{workload['metadata']['name']}"
        for workload in cluster.get_objects("deployments")
        for container in workload["spec"]["template"]["spec"].get("containers") or ()
        if _parse_repository(container).endswith("minio/minio")
    )
    if not servers:
        return []
    detail = f"{', '.join(servers)}: MinIO's server image is no longer published, and its last one has known holes"
    fix = "move the data to SeaweedFS (component object-store) or another S3 server"
    return [Diagnostic("object-store", False, detail, fix, is_warning=True)]


def _check_queues(cluster: ClusterState, requirements: Requirements) -> list[Diagnostic]:
    if not has_part(cluster, "kueue"):
        return []
    findings, run_namespace = [], find_run_namespace(cluster, requirements)
    config = next(iter(cluster.get_objects("kueue-config")), None)
    text = "\n".join((config or {}).get("data", {}).values())
    if config and '"pod"' not in text and "- pod\n" not in f"{text}\n":
        fix = "add pod to integrations.frameworks in ConfigMap kueue-manager-config, and restart Kueue"
        needed = "kueue" in requirements.required_parts
        findings.append(
            Diagnostic("kueue-pods", False, "Kueue leaves plain pods alone, and so the steps of runs", fix, not needed)
        )
    queues = cluster.get_objects("localqueues")
    if not queues and "localqueues" not in cluster.denied:
        if "kueue" in requirements.required_parts and "kueue" not in requirements.provided_parts:
            fix = "make a LocalQueue (component kueue)"
            findings.append(Diagnostic("queue", False, f"there is no LocalQueue in {run_namespace}", fix))
        return findings
    for queue in queues:
        conditions = queue.get("status", {}).get("conditions") or ()
        name = f"{run_namespace}/{queue['metadata']['name']} to {queue['spec'].get('clusterQueue', '?')}"
        inactive = next(
            (condition for condition in conditions if condition["type"] == "Active" and condition["status"] == "False"), None
        )
        if inactive:
            detail = f"{name} is not active: {inactive.get('message', 'no reason is given')}"
            findings.append(Diagnostic("queue", False, detail, "see that its ClusterQueue and its ResourceFlavors exist"))
        else:
            findings.append(Diagnostic("queue", True, name))
    return findings


def _check_pod_monitor(cluster: ClusterState, requirements: Requirements) -> list[Diagnostic]:
    """Whether a Prometheus takes the PodMonitor of runs, and may list their pods."""
    if not has_part(cluster, "prometheus-operator"):
        return []
    run_namespace = find_run_namespace(cluster, requirements)
    monitors = [
        resource for resource in cluster.get_objects(CRDS["prometheus-operator"]) if _is_for_runs(resource, run_namespace)
    ]
    if not monitors:
        if "prometheus-operator" in requirements.provided_parts or "prometheus-operator" not in requirements.required_parts:
            return [Diagnostic("pod-monitor", True, "none takes the pods of runs yet (component monitoring)")]
        return [Diagnostic("pod-monitor", False, "none takes the pods of runs", "add the component monitoring to the overlay")]
    findings = []
    for monitor in monitors:
        name = f"{monitor['metadata']['namespace']}/{monitor['metadata']['name']}"
        prometheuses = [
            resource
            for resource in cluster.get_objects("prometheuses.monitoring.coreos.com")
            if _takes_monitor(resource, monitor, cluster)
        ]
        if not prometheuses:
            selectors = "; ".join(
                f"{resource['metadata']['namespace']}/{resource['metadata']['name']} wants {_describe_selectors(resource['spec'])}"
                for resource in cluster.get_objects("prometheuses.monitoring.coreos.com")
            )
            detail = f"{name} is taken by no Prometheus ({selectors or 'there is none'})"
            fix = (
                "give the PodMonitor and its namespace the labels that podMonitorSelector and podMonitorNamespaceSelector want"
            )
            findings.append(Diagnostic("pod-monitor", False, detail, fix, is_warning=True))
        for prometheus in prometheuses:
            account = _service_account(prometheus)
            prometheus_name = f"{prometheus['metadata']['namespace']}/{prometheus['metadata']['name']}"
            if cluster.permissions.get(account, {}).get(_discovery_permission(run_namespace)) is False:
                detail = f"{name} is taken by {prometheus_name}, which may not list pods in {run_namespace}"
                fix = f"bind a Role with get, list, watch on pods in {run_namespace} to {account}"
                findings.append(Diagnostic("pod-monitor", False, detail, fix, is_warning=True))
            else:
                findings.append(Diagnostic("pod-monitor", True, f"{name} is taken by {prometheus_name}"))
    return findings


def _is_for_runs(monitor: K8sObject, run_namespace: str) -> bool:
    spaces = monitor["spec"].get("namespaceSelector") or {}
    covers_namespace = spaces.get("any") or run_namespace in (spaces.get("matchNames") or [monitor["metadata"]["namespace"]])
    matched_labels = (monitor["spec"].get("selector") or {}).get("matchLabels") or {}
    return bool(covers_namespace) and matched_labels.items() >= RUN_POD_LABELS.items()


def _takes_monitor(prometheus: K8sObject, monitor: K8sObject, cluster: ClusterState) -> bool:
    spec, prometheus_namespace = prometheus["spec"], prometheus["metadata"]["namespace"]
    monitor_namespace = monitor["metadata"]["namespace"]
    if not selector_matches(spec.get("podMonitorSelector"), monitor["metadata"].get("labels") or {}):
        return False
    spaces = spec.get("podMonitorNamespaceSelector")
    if spaces is None:
        return bool(monitor_namespace == prometheus_namespace)
    labels = next(
        (
            candidate["metadata"].get("labels") or {}
            for candidate in cluster.get_objects("namespaces")
            if candidate["metadata"]["name"] == monitor_namespace
        ),
        {},
    )
    return selector_matches(spaces, labels)


def _describe_selectors(spec: K8sObject) -> str:
    monitor_selector, namespace_selector = spec.get("podMonitorSelector"), spec.get("podMonitorNamespaceSelector")
    return f"PodMonitors {json.dumps(monitor_selector)} in namespaces {json.dumps(namespace_selector) if namespace_selector is not None else 'of its own'}"


def _service_account(prometheus: K8sObject) -> str:
    name = prometheus["spec"].get("serviceAccountName") or "default"
    return f"system:serviceaccount:{prometheus['metadata']['namespace']}:{name}"


def _discovery_permission(run_namespace: str) -> Permission:
    return Permission("list", "pods", namespace=run_namespace)


def _check_gpu_exporter(cluster: ClusterState) -> list[Diagnostic]:
    for workload, container in _find_containers(cluster, "dcgm"):
        name = f"{workload['metadata']['namespace']}/{workload['metadata']['name']}"
        environment = {variable["name"]: variable.get("value") for variable in container.get("env") or ()}
        arguments = [*(container.get("command") or ()), *(container.get("args") or ())]
        if environment.get("DCGM_EXPORTER_KUBERNETES") != "true" and not {"-k", "--kubernetes"} & set(arguments):
            fix = "set DCGM_EXPORTER_KUBERNETES=true in its environment, and mount /var/lib/kubelet/pod-resources"
            return [Diagnostic("dcgm-pods", False, f"{name}: its series do not name the pod", fix, is_warning=True)]
        status = workload.get("status", {})
        ready, wanted = status.get("numberReady", 0), status.get("desiredNumberScheduled", 0)
        if ready < wanted:
            fix = f"kubectl -n {name.partition('/')[0]} describe daemonset {name.partition('/')[2]}"
            return [Diagnostic("dcgm-pods", False, f"{name}: ready on {ready} of {wanted} nodes", fix, is_warning=True)]
        return [Diagnostic("dcgm-pods", True, f"{name}: on {wanted} nodes, its series name the pod")]
    return []


def _check_settings(cluster: ClusterState, requirements: Requirements) -> list[Diagnostic]:
    """ConfigMap and Secret that the steps take their store from. Both may be missing; keys that are there must be whole."""
    if not has_part(cluster, "kfp") or "kfp" in requirements.provided_parts:
        return []
    run_namespace, findings = find_run_namespace(cluster, requirements), []
    data = next((resource.get("data") or {} for resource in cluster.get_objects("settings")), None)
    endpoint = (data or {}).get("AWS_ENDPOINT_URL")
    if data is None and "settings" not in cluster.denied:
        fix = f"`make deploy`, or kubectl -n {run_namespace} create configmap {SETTINGS_CONFIG_MAP} --from-literal=AWS_ENDPOINT_URL=…"
        findings.append(
            Diagnostic(
                "settings",
                False,
                f"no ConfigMap {run_namespace}/{SETTINGS_CONFIG_MAP}: steps take Amazon's S3",
                fix,
                is_warning=True,
            )
        )
    elif data is not None:
        findings.append(
            Diagnostic("settings", True, f"ConfigMap {run_namespace}/{SETTINGS_CONFIG_MAP}: store at {endpoint or 'Amazon S3'}")
        )
    keys = next((set(resource.get("data") or {}) for resource in cluster.get_objects("secret")), None)
    missing = sorted({"accesskey", "secretkey"} - (keys or set()))
    if keys is None and "secret" not in cluster.denied:
        fix = f"kubectl -n {run_namespace} create secret generic {STORAGE_SECRET} --from-literal=accesskey=… --from-literal=secretkey=…"
        detail = f"no Secret {run_namespace}/{STORAGE_SECRET}: steps need credentials of their pods' own (workload identity)"
        findings.append(Diagnostic("storage-secret", False, detail, fix, is_warning=True))
    elif keys is not None and missing:
        detail = f"Secret {run_namespace}/{STORAGE_SECRET} lacks {' and '.join(missing)}"
        findings.append(Diagnostic("storage-secret", False, detail, "give it the keys accesskey and secretkey"))
    elif keys is not None:
        findings.append(Diagnostic("storage-secret", True, f"Secret {run_namespace}/{STORAGE_SECRET} has both keys"))
    return findings


def runner_permissions(run_namespace: str, trainer: bool) -> tuple[Permission, ...]:
    """What the steps' service account must be allowed: Argo's results, and TrainJobs where trainings use them."""
    permissions = [
        Permission("create", "workflowtaskresults", "argoproj.io", namespace=run_namespace),
        Permission("patch", "workflowtaskresults", "argoproj.io", namespace=run_namespace),
        Permission("get", "pods", namespace=run_namespace),
        Permission("get", "secrets", namespace=run_namespace),
    ]
    if trainer:
        permissions += [
            Permission(verb, "trainjobs", "trainer.kubeflow.org", namespace=run_namespace)
            for verb in ("create", "get", "watch", "delete")
        ]
        permissions.append(Permission("get", "pods", subresource="log", namespace=run_namespace))
    return tuple(permissions)


def _collect_questions(cluster: ClusterState, requirements: Requirements) -> dict[str, tuple[Permission, ...]]:
    """Who → what must be allowed."""
    run_namespace = find_run_namespace(cluster, requirements)
    questions: dict[str, tuple[Permission, ...]] = {"": requirements.permissions}
    if cluster.get_objects("account"):
        questions[f"system:serviceaccount:{run_namespace}:{RUNNER_ACCOUNT}"] = runner_permissions(
            run_namespace, "trainer" in requirements.required_parts
        )
    for prometheus in cluster.get_objects("prometheuses.monitoring.coreos.com"):
        questions[_service_account(prometheus)] = (_discovery_permission(run_namespace),)
    return questions


def _check_permissions(cluster: ClusterState) -> list[Diagnostic]:
    findings = []
    for subject, permissions in cluster.permissions.items():
        # That of Prometheus is judged with its PodMonitor.
        if subject and not subject.endswith(f":{RUNNER_ACCOUNT}"):
            continue
        name = subject.removeprefix("system:serviceaccount:").replace(":", "/") or "you"
        denied = [permission for permission, answer in permissions.items() if answer is False]
        check_name = "runner-rights" if subject else "rights"
        if denied:
            detail = f"{name} may not {_join_permissions(denied)}"
            fix = (
                "bind a Role to it, as docs/security.md lists them"
                if subject
                else "ask for these rights, or use a context that has them"
            )
            findings.append(Diagnostic(check_name, False, detail, fix))
        elif any(answer is None for answer in permissions.values()):
            fix = f"let somebody look who may create SubjectAccessReviews, or ask in a pod of {name}"
            findings.append(Diagnostic(check_name, False, f"you may not ask what {name} may do", fix, is_warning=True))
        elif permissions:
            findings.append(Diagnostic(check_name, True, f"{name} may do all {len(permissions)} things that are needed"))
    return findings


def _join_permissions(permissions: Iterable[Permission]) -> str:
    names = list(map(str, permissions))
    return ", ".join(names[:6]) + (f" and {len(names) - 6} things more" if len(names) > 6 else "")
