"""What of a cluster would stop a deployment or a run: asked through kubectl, and judged here.

`look` fetches, and everything else is a pure function of what it brought. Nothing in the cluster is changed.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from k8s import versions
from k8s.kubectl import Forbidden, Kubectl, Object
from k8s.versions import KNOWN, NAMES, Version, said
from ns.core.diagnostics import Finding
from ns.core.errors import ClusterError

Part = Literal["kfp", "trainer", "kueue", "prometheus-operator", "dcgm", "gpu"]
"""What a cluster may have, and an overlay or a run may need."""

RUNNER = "pipeline-runner"
"""The service account that KFP's pods run as."""
SECRET = "mlpipeline-minio-artifact"
SETTINGS = "noisy-student"
OURS = {"app.kubernetes.io/part-of": "noisy-student"}
"""The label of all pods of runs (pipelines/placement.py)."""

# The last part of the image's name, which stays when a registry is mirrored.
IMAGES = {
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
INSTALL = {
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


class Right(NamedTuple):
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
class Asked:
    """What a cluster is looked at for."""

    namespace: str | None = None
    """Where the pods of runs are; Kubeflow Pipelines' own if None."""
    needs: frozenset[str] = frozenset({"kfp"})
    """Parts without which it will not do."""
    brings: Mapping[str, Version | None] = field(default_factory=dict)
    """Parts that a deployment is about to bring, with their versions where these are known: that they are not there yet is no fault."""
    rights: tuple[Right, ...] = ()
    """That whoever asks must have."""


@dataclass
class Cluster:
    """What was fetched. A kind that may not be read is in `denied`, with kubectl's words, and has no objects."""

    version: Version | None = None
    client: Version | None = None
    place: str = ""
    """Context and server, for people."""
    objects: dict[str, list[Object]] = field(default_factory=dict)
    denied: dict[str, str] = field(default_factory=dict)
    rights: dict[str, dict[Right, bool | None]] = field(default_factory=dict)
    """Who ("" for whoever asks) → right → whether allowed; None where that may not be asked."""

    def of(self, kind: str) -> list[Object]:
        return self.objects.get(kind, [])


KINDS = ("nodes", "storageclasses", "deployments", "daemonsets", "namespaces", "persistentvolumeclaims")


def examine(kubectl: Kubectl, asked: Asked) -> list[Finding]:
    """Looks at a cluster and judges it. When it does not answer, the one finding says why."""
    try:
        cluster = look(kubectl, asked)
    except ClusterError as error:
        detail, _, fix = str(error).rpartition("; ")
        return [Finding("cluster", False, detail or fix, fix if detail else "look at kubectl's own words: kubectl version")]
    return judge(cluster, asked)


def look(kubectl: Kubectl, asked: Asked) -> Cluster:
    """Fetches what `judge` needs. Raises ClusterError if the cluster does not answer."""
    reply = json.loads(kubectl.run("version", "--output=json"))
    cluster = Cluster(
        versions.parse(reply.get("serverVersion", {}).get("gitVersion", "")),
        versions.parse(reply.get("clientVersion", {}).get("gitVersion", "")),
        f"{kubectl.context or 'current context'}, {kubectl.server() or 'in a pod'}",
    )

    def fetch(kind: str, call: Callable[[], list[Object]]) -> None:
        try:
            cluster.objects[kind] = call()
        except Forbidden as error:
            cluster.denied[kind] = str(error)

    def named(kind: str, name: str, namespace: str) -> list[Object]:
        found = kubectl.get(kind, name, namespace)
        return [found] if found else []

    def definitions() -> list[Object]:
        # All of them are tens of megabytes; a list of names is one call.
        reply = kubectl.run("get", "customresourcedefinitions", *CRDS.values(), "--ignore-not-found", "--output=json")
        # One object is printed as itself, none as nothing, and several as a list.
        value: Any = json.loads(reply) if reply.strip() else {"items": []}
        return list(value.get("items", [value]))

    with ThreadPoolExecutor(8) as threads:
        first: list[tuple[str, Callable[[], list[Object]]]] = [(kind, _listing(kubectl, kind)) for kind in KINDS]
        list(threads.map(lambda one: fetch(*one), [*first, ("definitions", definitions)]))
        place = namespace(cluster, asked)
        second: list[tuple[str, Callable[[], list[Object]]]] = [
            ("settings", lambda: named("configmap", SETTINGS, place)),
            ("secret", lambda: named("secret", SECRET, place)),
            ("account", lambda: named("serviceaccount", RUNNER, place)),
        ]
        if has(cluster, "prometheus-operator"):
            second += [
                (kind, _listing(kubectl, kind)) for kind in ("prometheuses.monitoring.coreos.com", CRDS["prometheus-operator"])
            ]
        if has(cluster, "kueue"):
            second += [("localqueues", lambda: kubectl.list("localqueues.kueue.x-k8s.io", place))]
            manager = next(_containers(cluster, "kueue"), None)
            if manager:
                space = manager[0]["metadata"]["namespace"]
                second.append(("kueue-config", lambda: named("configmap", "kueue-manager-config", space)))
        list(threads.map(lambda one: fetch(*one), second))
        questions = [(who, right) for who, rights in _questions(cluster, asked).items() for right in rights]
        answers = list(threads.map(lambda one: allowed(kubectl, one[1], one[0]), questions))
    for (who, right), answer in zip(questions, answers, strict=True):
        cluster.rights.setdefault(who, {})[right] = answer
    return cluster


def _listing(kubectl: Kubectl, kind: str) -> Callable[[], list[Object]]:
    return lambda: kubectl.list(kind)


def allowed(kubectl: Kubectl, right: Right, who: str = "") -> bool | None:
    """Whether somebody (`system:serviceaccount:NAMESPACE:NAME`; whoever asks if empty) has a right. None if one may not ask."""
    attributes = {
        "verb": right.verb,
        "resource": right.resource,
        "group": right.group,
        "subresource": right.subresource,
        "namespace": right.namespace,
    }
    kind = "SubjectAccessReview" if who else "SelfSubjectAccessReview"
    spec: Object = {"resourceAttributes": {key: value for key, value in attributes.items() if value}}
    if who:
        account = who.split(":")
        spec["user"] = who
        spec["groups"] = ["system:authenticated", "system:serviceaccounts", f"system:serviceaccounts:{account[2]}"]
    try:
        reply = kubectl.post(
            f"/apis/authorization.k8s.io/v1/{kind.lower()}s",
            {"apiVersion": "authorization.k8s.io/v1", "kind": kind, "spec": spec},
        )
    except Forbidden:
        return None
    return bool(reply.get("status", {}).get("allowed"))


def judge(cluster: Cluster, asked: Asked) -> list[Finding]:
    """All findings, in the order in which things depend on each other."""
    there = found_versions(cluster)
    # Versions as they will be.
    found = there | {part: version for part, version in asked.brings.items() if version}
    findings = [Finding("cluster", True, cluster.place), _client(cluster)]
    findings.append(_version(cluster, there, "kubernetes", asked))
    findings += [_nodes(cluster), _storage(cluster), *_gpus(cluster, asked)]
    for part in ("kfp", "argo", "trainer", "kueue", "prometheus-operator", "dcgm"):
        if part != "argo" or part in there:
            findings.append(_version(cluster, there, part, asked))
    findings += [
        Finding(
            "bad-pair",
            False,
            f"{NAMES[pair.one]} {said(found[pair.one])} with {NAMES[pair.other]} {said(found[pair.other])}: {pair.what}",
            pair.fix,
            warning=not pair.fatal,
        )
        for pair in versions.bad_pairs(found)
    ]
    findings += _minio(cluster)
    findings += _queues(cluster, asked)
    findings += _pod_monitor(cluster, asked)
    findings += _exporter(cluster)
    findings += _settings(cluster, asked)
    findings += _rights(cluster)
    return findings


def namespace(cluster: Cluster, asked: Asked) -> str:
    """Where the pods of runs are: as asked, or with KFP's API server, or where KFP is usually."""
    if asked.namespace:
        return asked.namespace
    server = next(_containers(cluster, "kfp"), None)
    return str(server[0]["metadata"]["namespace"]) if server else "kubeflow"


def found_versions(cluster: Cluster) -> dict[str, Version]:
    """Component → version, of those whose version can be told."""
    found = {"kubernetes": cluster.version} if cluster.version else {}
    for part in IMAGES:
        for workload, container in _containers(cluster, part):
            labels = workload["metadata"].get("labels") or {}
            version = versions.of_image(container["image"]) or versions.parse(labels.get("app.kubernetes.io/version", ""))
            if version:
                found[part] = version
                break
    for definition in cluster.of("definitions"):
        if definition["metadata"]["name"] == CRDS["prometheus-operator"]:
            annotated = (definition["metadata"].get("annotations") or {}).get("operator.prometheus.io/version", "")
            if version := versions.parse(annotated):
                found.setdefault("prometheus-operator", version)
    return found


def has(cluster: Cluster, part: str) -> bool:
    """Whether a part is installed."""
    names = {definition["metadata"]["name"] for definition in cluster.of("definitions")}
    return CRDS.get(part) in names or next(_containers(cluster, part), None) is not None


def selects(selector: Object | None, labels: Mapping[str, str]) -> bool:
    """Whether a label selector takes these labels. None takes nothing, {} everything."""
    if selector is None:
        return False
    for key, value in (selector.get("matchLabels") or {}).items():
        if labels.get(key) != value:
            return False
    for one in selector.get("matchExpressions") or ():
        value, values = labels.get(one["key"]), one.get("values") or ()
        taken = {
            "In": value in values,
            "NotIn": value not in values,
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }[one["operator"]]
        if not taken:
            return False
    return True


def _containers(cluster: Cluster, part: str) -> Iterator[tuple[Object, Object]]:
    """Workloads that run a part's image, with the container."""
    for workload in (*cluster.of("deployments"), *cluster.of("daemonsets")):
        for container in workload["spec"]["template"]["spec"].get("containers") or ():
            if _repository(container).rpartition("/")[2] in IMAGES[part]:
                yield workload, container


def _repository(container: Object) -> str:
    """`localhost:5000/minio/minio` of `localhost:5000/minio/minio:TAG@sha256:…`."""
    place, slash, name = container.get("image", "").partition("@")[0].rpartition("/")
    return f"{place}{slash}{name.partition(':')[0]}"


def _client(cluster: Cluster) -> Finding:
    if cluster.client is None or cluster.version is None:
        return Finding("kubectl", True, "installed")
    detail = f"{said(cluster.client)}, the server has {said(cluster.version)}"
    if cluster.client[0] != cluster.version[0] or abs(cluster.client[1] - cluster.version[1]) > 1:
        fix = f"install kubectl {cluster.version[0]}.{cluster.version[1]}"
        return Finding("kubectl", False, f"{detail}: more than one minor version apart", fix, warning=True)
    return Finding("kubectl", True, detail)


def _version(cluster: Cluster, found: Mapping[str, Version], part: str, asked: Asked) -> Finding:
    name, known = NAMES[part], KNOWN[part]
    needed = part in asked.needs and part not in asked.brings
    version = found.get(part)
    if version is None and part != "kubernetes" and not has(cluster, part):
        denied = [kind for kind in ("deployments", "daemonsets", "definitions") if kind in cluster.denied]
        if denied:
            fix = f"let somebody look who may list {' and '.join(denied)} in all namespaces"
            return Finding(part, False, f"cannot be told whether {name} is installed", fix, warning=True)
        if part in asked.brings:
            coming = asked.brings[part]
            return Finding(part, True, f"not installed yet; this deployment brings {said(coming) if coming else 'it'}")
        if needed:
            return Finding(part, False, f"{name} is not installed", INSTALL[part])
        return Finding(part, True, f"not installed: {USED_FOR.get(part, 'not needed')}")
    if version is None:
        return Finding(part, False, f"{name} does not tell its version", f"see that it is {said(known.least)} or newer", True)
    coming = asked.brings.get(part)
    if coming and coming != version:
        return Finding(part, True, f"{said(version)}; this deployment brings {said(coming)}")
    if version < known.least:
        fix = f"update {name} to {said(known.since)} or newer"
        return Finding(
            part, False, f"{said(version)}: {known.why}", fix, warning=not needed and part not in ("kubernetes", "kfp")
        )
    if not known.since <= version < known.until:
        fix = f"if something goes wrong, use {said(known.since)} or newer, before {said(known.until)}"
        return Finding(part, False, f"{said(version)}: nobody has tried this project with it", fix, warning=True)
    return Finding(part, True, said(version))


def _nodes(cluster: Cluster) -> Finding:
    if "nodes" in cluster.denied:
        return Finding("nodes", False, "may not be listed", "let somebody look who may list nodes", warning=True)
    nodes = cluster.of("nodes")
    ready = [node for node in nodes if _is_ready(node)]
    away = sorted(node["metadata"]["name"] for node in nodes if not _is_ready(node))
    if not ready:
        return Finding("nodes", False, f"none of {len(nodes)} is ready", "kubectl get nodes, and describe them")
    if away:
        listed = ", ".join(away[:5]) + (" …" if len(away) > 5 else "")
        fix = f"kubectl describe node {away[0]}"
        return Finding("nodes", False, f"{len(ready)} of {len(nodes)} ready; not: {listed}", fix, warning=True)
    return Finding("nodes", True, f"{len(ready)}, all ready")


def _is_ready(node: Object) -> bool:
    conditions = node.get("status", {}).get("conditions") or ()
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


def _storage(cluster: Cluster) -> Finding:
    if "storageclasses" in cluster.denied:
        fix = "let somebody look who may list storageclasses"
        return Finding("storage-class", False, "may not be listed", fix, warning=True)
    classes = cluster.of("storageclasses")
    default = [one for one in classes if (one["metadata"].get("annotations") or {}).get(DEFAULT_CLASS) == "true"]
    names = ", ".join(sorted(one["metadata"]["name"] for one in default))
    pending = sorted(
        f"{claim['metadata']['namespace']}/{claim['metadata']['name']}"
        for claim in cluster.of("persistentvolumeclaims")
        if claim.get("status", {}).get("phase") == "Pending" and "storageClassName" not in claim["spec"]
    )
    if not default:
        fix = f"kubectl annotate storageclass NAME {DEFAULT_CLASS}=true, or name a class in the overlay"
        waiting = f"; {', '.join(pending)} cannot be bound" if pending else ""
        return Finding("storage-class", False, f"no default among {len(classes)}{waiting}", fix)
    if len(default) > 1:
        fix = f"leave {DEFAULT_CLASS}=true on one of them"
        return Finding("storage-class", False, f"{len(default)} defaults ({names}): the newest is taken", fix, warning=True)
    return Finding("storage-class", True, f"{names} ({default[0].get('provisioner', '?')}) is the default")


def _gpus(cluster: Cluster, asked: Asked) -> list[Finding]:
    if "nodes" in cluster.denied:
        return []
    nodes = cluster.of("nodes")
    with_gpus = [node for node in nodes if _resources(node, "allocatable")]
    promised = [node for node in nodes if any(label in _labels(node) for label in GPU_LABELS)]
    silent = sorted(node["metadata"]["name"] for node in promised if not _resources(node, "capacity"))
    findings = []
    if silent:
        detail = f"{len(silent)} nodes are labelled as having GPUs and offer none: {', '.join(silent[:5])}"
        fix = "install the device plugin (NVIDIA GPU operator, or the cloud's driver installer), and see that its pods tolerate the taints"
        findings.append(Finding("device-plugin", False, detail, fix))
    sick = sorted(
        f"{node['metadata']['name']} {resource}: {_resources(node, 'allocatable').get(resource, 0)} of {count}"
        for node in nodes
        for resource, count in _resources(node, "capacity").items()
        if _resources(node, "allocatable").get(resource, 0) < count
    )
    if sick:
        detail = f"GPUs that cannot be used: {'; '.join(sick[:5])}"
        findings.append(Finding("device-plugin", False, detail, "look for Xid errors on the node, and drain it", warning=True))
    if not with_gpus:
        if "gpu" in asked.needs:
            fix = "add a node pool with GPUs; a pool that scales from zero shows none until a pod asks for one"
            findings.append(Finding("gpu-pools", False, "no node offers GPUs", fix, warning=True))
        else:
            findings.append(Finding("gpu-pools", True, "no node offers GPUs: everything runs on CPUs"))
        return findings
    if not findings:
        findings.append(Finding("device-plugin", True, f"{len(with_gpus)} nodes offer GPUs"))
    pools: dict[tuple[str, ...], list[Object]] = {}
    for node in with_gpus:
        pools.setdefault(_pool(node), []).append(node)
    for (resource, taints, labels), members in sorted(pools.items()):
        about = f"{len(members)} × {resource}; {labels or 'no label of a pool'}; {taints or 'no taint'}"
        if taints:
            findings.append(Finding("gpu-pools", True, about))
        else:
            fix = (
                "taint them, as nvidia.com/gpu=present:NoSchedule, and let label_tolerations and train_tolerations tolerate it"
            )
            findings.append(Finding("gpu-pools", False, f"{about}: steps without GPUs take their place", fix, warning=True))
    return findings


def _labels(node: Object) -> dict[str, str]:
    return node["metadata"].get("labels") or {}


def _resources(node: Object, what: str) -> dict[str, int]:
    """GPUs of a node by resource, those with none left out. `what`: capacity or allocatable."""
    amounts = node.get("status", {}).get(what) or {}
    return {
        name: int(count)
        for name, count in amounts.items()
        if name.startswith(GPU_RESOURCES) and str(count).isdigit() and int(count)
    }


def _pool(node: Object) -> tuple[str, str, str]:
    """Resources, taints and telling labels of a node, for people: equal in all nodes of a pool."""
    taints = sorted(
        f"{taint['key']}{'=' + taint['value'] if taint.get('value') else ''}:{taint['effect']}"
        for taint in node["spec"].get("taints") or ()
        if not taint["key"].startswith("node.kubernetes.io/")
    )
    labels = [f"{label}={_labels(node)[label]}" for label in POOL_LABELS if label in _labels(node)]
    resources = [f"{count} {name}" for name, count in sorted(_resources(node, "allocatable").items())]
    return ", ".join(resources), ", ".join(taints), ", ".join(labels)


def _minio(cluster: Cluster) -> list[Finding]:
    servers = sorted(
        f"{workload['metadata']['namespace']}/{workload['metadata']['name']}"
        for workload in cluster.of("deployments")
        for container in workload["spec"]["template"]["spec"].get("containers") or ()
        if _repository(container).endswith("minio/minio")
    )
    if not servers:
        return []
    detail = f"{', '.join(servers)}: MinIO's server image is no longer published, and its last one has known holes"
    fix = "move the data to SeaweedFS (component object-store) or another S3 server"
    return [Finding("object-store", False, detail, fix, warning=True)]


def _queues(cluster: Cluster, asked: Asked) -> list[Finding]:
    if not has(cluster, "kueue"):
        return []
    findings, place = [], namespace(cluster, asked)
    config = next(iter(cluster.of("kueue-config")), None)
    text = "\n".join((config or {}).get("data", {}).values())
    if config and '"pod"' not in text and "- pod\n" not in f"{text}\n":
        fix = "add pod to integrations.frameworks in ConfigMap kueue-manager-config, and restart Kueue"
        needed = "kueue" in asked.needs
        findings.append(
            Finding("kueue-pods", False, "Kueue leaves plain pods alone, and so the steps of runs", fix, not needed)
        )
    queues = cluster.of("localqueues")
    if not queues and "localqueues" not in cluster.denied:
        if "kueue" in asked.needs and "kueue" not in asked.brings:
            fix = "make a LocalQueue (component kueue)"
            findings.append(Finding("queue", False, f"there is no LocalQueue in {place}", fix))
        return findings
    for queue in queues:
        conditions = queue.get("status", {}).get("conditions") or ()
        name = f"{place}/{queue['metadata']['name']} to {queue['spec'].get('clusterQueue', '?')}"
        bad = next((one for one in conditions if one["type"] == "Active" and one["status"] == "False"), None)
        if bad:
            detail = f"{name} is not active: {bad.get('message', 'no reason is given')}"
            findings.append(Finding("queue", False, detail, "see that its ClusterQueue and its ResourceFlavors exist"))
        else:
            findings.append(Finding("queue", True, name))
    return findings


def _pod_monitor(cluster: Cluster, asked: Asked) -> list[Finding]:
    """Whether a Prometheus takes the PodMonitor of runs, and may list their pods."""
    if not has(cluster, "prometheus-operator"):
        return []
    place = namespace(cluster, asked)
    monitors = [one for one in cluster.of(CRDS["prometheus-operator"]) if _is_for_runs(one, place)]
    if not monitors:
        if "prometheus-operator" in asked.brings or "prometheus-operator" not in asked.needs:
            return [Finding("pod-monitor", True, "none takes the pods of runs yet (component monitoring)")]
        return [Finding("pod-monitor", False, "none takes the pods of runs", "add the component monitoring to the overlay")]
    findings = []
    for monitor in monitors:
        name = f"{monitor['metadata']['namespace']}/{monitor['metadata']['name']}"
        takers = [one for one in cluster.of("prometheuses.monitoring.coreos.com") if _takes(one, monitor, cluster)]
        if not takers:
            wanted = "; ".join(
                f"{one['metadata']['namespace']}/{one['metadata']['name']} wants {_selector(one['spec'])}"
                for one in cluster.of("prometheuses.monitoring.coreos.com")
            )
            detail = f"{name} is taken by no Prometheus ({wanted or 'there is none'})"
            fix = (
                "give the PodMonitor and its namespace the labels that podMonitorSelector and podMonitorNamespaceSelector want"
            )
            findings.append(Finding("pod-monitor", False, detail, fix, warning=True))
        for taker in takers:
            account = _account(taker)
            who = f"{taker['metadata']['namespace']}/{taker['metadata']['name']}"
            if cluster.rights.get(account, {}).get(_discover(place)) is False:
                detail = f"{name} is taken by {who}, which may not list pods in {place}"
                fix = f"bind a Role with get, list, watch on pods in {place} to {account}"
                findings.append(Finding("pod-monitor", False, detail, fix, warning=True))
            else:
                findings.append(Finding("pod-monitor", True, f"{name} is taken by {who}"))
    return findings


def _is_for_runs(monitor: Object, place: str) -> bool:
    spaces = monitor["spec"].get("namespaceSelector") or {}
    looked_at = spaces.get("any") or place in (spaces.get("matchNames") or [monitor["metadata"]["namespace"]])
    wanted = (monitor["spec"].get("selector") or {}).get("matchLabels") or {}
    return bool(looked_at) and wanted.items() >= OURS.items()


def _takes(prometheus: Object, monitor: Object, cluster: Cluster) -> bool:
    spec, own = prometheus["spec"], prometheus["metadata"]["namespace"]
    home = monitor["metadata"]["namespace"]
    if not selects(spec.get("podMonitorSelector"), monitor["metadata"].get("labels") or {}):
        return False
    spaces = spec.get("podMonitorNamespaceSelector")
    if spaces is None:
        return bool(home == own)
    labels = next(
        (one["metadata"].get("labels") or {} for one in cluster.of("namespaces") if one["metadata"]["name"] == home), {}
    )
    return selects(spaces, labels)


def _selector(spec: Object) -> str:
    one, other = spec.get("podMonitorSelector"), spec.get("podMonitorNamespaceSelector")
    return f"PodMonitors {json.dumps(one)} in namespaces {json.dumps(other) if other is not None else 'of its own'}"


def _account(prometheus: Object) -> str:
    name = prometheus["spec"].get("serviceAccountName") or "default"
    return f"system:serviceaccount:{prometheus['metadata']['namespace']}:{name}"


def _discover(place: str) -> Right:
    return Right("list", "pods", namespace=place)


def _exporter(cluster: Cluster) -> list[Finding]:
    for workload, container in _containers(cluster, "dcgm"):
        name = f"{workload['metadata']['namespace']}/{workload['metadata']['name']}"
        environment = {one["name"]: one.get("value") for one in container.get("env") or ()}
        arguments = [*(container.get("command") or ()), *(container.get("args") or ())]
        if environment.get("DCGM_EXPORTER_KUBERNETES") != "true" and not {"-k", "--kubernetes"} & set(arguments):
            fix = "set DCGM_EXPORTER_KUBERNETES=true in its environment, and mount /var/lib/kubelet/pod-resources"
            return [Finding("dcgm-pods", False, f"{name}: its series do not name the pod", fix, warning=True)]
        status = workload.get("status", {})
        ready, wanted = status.get("numberReady", 0), status.get("desiredNumberScheduled", 0)
        if ready < wanted:
            fix = f"kubectl -n {name.partition('/')[0]} describe daemonset {name.partition('/')[2]}"
            return [Finding("dcgm-pods", False, f"{name}: ready on {ready} of {wanted} nodes", fix, warning=True)]
        return [Finding("dcgm-pods", True, f"{name}: on {wanted} nodes, its series name the pod")]
    return []


def _settings(cluster: Cluster, asked: Asked) -> list[Finding]:
    """ConfigMap and Secret that the steps take their store from. Both may be missing; keys that are there must be whole."""
    if not has(cluster, "kfp") or "kfp" in asked.brings:
        return []
    place, findings = namespace(cluster, asked), []
    data = next((one.get("data") or {} for one in cluster.of("settings")), None)
    endpoint = (data or {}).get("AWS_ENDPOINT_URL")
    if data is None and "settings" not in cluster.denied:
        fix = f"`make deploy`, or kubectl -n {place} create configmap {SETTINGS} --from-literal=AWS_ENDPOINT_URL=…"
        findings.append(
            Finding("settings", False, f"no ConfigMap {place}/{SETTINGS}: steps take Amazon's S3", fix, warning=True)
        )
    elif data is not None:
        findings.append(Finding("settings", True, f"ConfigMap {place}/{SETTINGS}: store at {endpoint or 'Amazon S3'}"))
    keys = next((set(one.get("data") or {}) for one in cluster.of("secret")), None)
    missing = sorted({"accesskey", "secretkey"} - (keys or set()))
    if keys is None and "secret" not in cluster.denied:
        fix = f"kubectl -n {place} create secret generic {SECRET} --from-literal=accesskey=… --from-literal=secretkey=…"
        detail = f"no Secret {place}/{SECRET}: steps need credentials of their pods' own (workload identity)"
        findings.append(Finding("storage-secret", False, detail, fix, warning=True))
    elif keys is not None and missing:
        detail = f"Secret {place}/{SECRET} lacks {' and '.join(missing)}"
        findings.append(Finding("storage-secret", False, detail, "give it the keys accesskey and secretkey"))
    elif keys is not None:
        findings.append(Finding("storage-secret", True, f"Secret {place}/{SECRET} has both keys"))
    return findings


def runner_rights(place: str, trainer: bool) -> tuple[Right, ...]:
    """What the steps' service account must be allowed: Argo's results, and TrainJobs where trainings use them."""
    rights = [
        Right("create", "workflowtaskresults", "argoproj.io", namespace=place),
        Right("patch", "workflowtaskresults", "argoproj.io", namespace=place),
        Right("get", "pods", namespace=place),
        Right("get", "secrets", namespace=place),
    ]
    if trainer:
        rights += [
            Right(verb, "trainjobs", "trainer.kubeflow.org", namespace=place) for verb in ("create", "get", "watch", "delete")
        ]
        rights.append(Right("get", "pods", subresource="log", namespace=place))
    return tuple(rights)


def _questions(cluster: Cluster, asked: Asked) -> dict[str, tuple[Right, ...]]:
    """Who → what must be allowed."""
    place = namespace(cluster, asked)
    questions: dict[str, tuple[Right, ...]] = {"": asked.rights}
    if cluster.of("account"):
        questions[f"system:serviceaccount:{place}:{RUNNER}"] = runner_rights(place, "trainer" in asked.needs)
    for prometheus in cluster.of("prometheuses.monitoring.coreos.com"):
        questions[_account(prometheus)] = (_discover(place),)
    return questions


def _rights(cluster: Cluster) -> list[Finding]:
    findings = []
    for who, rights in cluster.rights.items():
        # That of Prometheus is judged with its PodMonitor.
        if who and not who.endswith(f":{RUNNER}"):
            continue
        name = who.removeprefix("system:serviceaccount:").replace(":", "/") or "you"
        denied = [right for right, answer in rights.items() if answer is False]
        label = "runner-rights" if who else "rights"
        if denied:
            detail = f"{name} may not {_listed(denied)}"
            fix = (
                "bind a Role to it, as docs/security.md lists them"
                if who
                else "ask for these rights, or use a context that has them"
            )
            findings.append(Finding(label, False, detail, fix))
        elif any(answer is None for answer in rights.values()):
            fix = f"let somebody look who may create SubjectAccessReviews, or ask in a pod of {name}"
            findings.append(Finding(label, False, f"you may not ask what {name} may do", fix, warning=True))
        elif rights:
            findings.append(Finding(label, True, f"{name} may do all {len(rights)} things that are needed"))
    return findings


def _listed(rights: Iterable[Right]) -> str:
    names = list(map(str, rights))
    return ", ".join(names[:6]) + (f" and {len(names) - 6} things more" if len(names) > 6 else "")
