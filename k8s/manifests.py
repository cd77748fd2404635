"""The objects of an overlay: rendered by kustomize with this checkout's images, in the order in which they can be applied."""

import copy
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import yaml

from k8s import doctor
from k8s.dns import DNS_POLICY, allow_dns_peers
from k8s.doctor import Permission
from k8s.kubectl import K8sObject, Kubectl
from k8s.versions import Version
from ns.core.errors import ConfigError
from pipelines import load_yaml_documents

CHECKOUT = Path(__file__).parents[1]
OVERLAYS = CHECKOUT / "k8s" / "overlays"
OVERLAY_PARTS = ("cluster", ".", "kubeflow")
"""Parts of an overlay, each a kustomization, in the order in which they are applied. An overlay need not have all."""
BUILD_SECONDS = 600
"""For kustomize, which fetches Kubeflow's own manifests with git."""

# Kinds in the order in which they are applied; kinds that are not listed come just before the workloads.
KINDS_BEFORE = (
    "Namespace",
    "CustomResourceDefinition",
    "PriorityClass",
    "StorageClass",
    "ResourceQuota",
    "LimitRange",
    "NetworkPolicy",
    "ServiceAccount",
    "Secret",
    "ConfigMap",
    "PersistentVolume",
    "PersistentVolumeClaim",
    "ClusterRole",
    "ClusterRoleBinding",
    "Role",
    "RoleBinding",
    "Service",
)
WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet", "CronJob")
DEFAULT_GPU_TYPE = "nvidia.com/gpu"
KINDS_AFTER = (*WORKLOADS, "APIService", "MutatingWebhookConfiguration", "ValidatingWebhookConfiguration")
PHASES = ("namespaces and kinds", "all else", "resources of controllers", "jobs")

# Groups of Kubernetes itself; kinds of other groups need their controller to run first.
BUILT_IN = ("apps", "batch", "policy", "autoscaling", "extensions")
PART_OF_GROUP = {
    "monitoring.coreos.com": "prometheus-operator",
    "trainer.kubeflow.org": "trainer",
    "kueue.x-k8s.io": "kueue",
}


class ObjectKey(NamedTuple):
    """Identity of an object."""

    api_version: str
    """As `apps/v1`; in a release, the version under which the object was applied."""
    kind: str
    namespace: str
    """Empty for cluster-wide objects."""
    name: str

    @classmethod
    def from_object(cls, resource: K8sObject) -> Self:
        meta = resource["metadata"]
        return cls(resource["apiVersion"], resource["kind"], meta.get("namespace", ""), meta["name"])

    def without_version(self) -> tuple[str, str, str, str]:
        """The key without the API version: equal for one object under two versions."""
        return (self.group, *self[1:])

    @property
    def group(self) -> str:
        return self.api_version.rpartition("/")[0]

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace + '/' if self.namespace else ''}{self.name}"


class RenderedOverlay(NamedTuple):
    """A rendered overlay."""

    overlay: str
    objects: tuple[K8sObject, ...]

    @property
    def keys(self) -> tuple[ObjectKey, ...]:
        return tuple(map(ObjectKey.from_object, self.objects))

    @property
    def namespace(self) -> str:
        """Namespace of runs: that of the ConfigMap with their settings. Raises ConfigError if there is none."""
        for key in self.keys:
            if (key.kind, key.name) == ("ConfigMap", doctor.SETTINGS_CONFIG_MAP):
                return key.namespace
        raise ConfigError(
            f"overlay {self.overlay}: has no ConfigMap {doctor.SETTINGS_CONFIG_MAP}; add ../../base to its resources"
        )

    @property
    def namespaces(self) -> tuple[str, ...]:
        """All namespaces of its objects."""
        return tuple(sorted({key.namespace for key in self.keys if key.namespace}))

    @property
    def workloads(self) -> tuple[ObjectKey, ...]:
        return tuple(key for key in self.keys if key.kind in WORKLOADS and key.kind != "CronJob")

    @property
    def jobs(self) -> tuple[ObjectKey, ...]:
        return tuple(key for key in self.keys if key.kind == "Job")

    def split_phases(self) -> list[tuple[str, list[K8sObject]]]:
        """Splits the objects into the phases that are applied one after the other; empty phases are left out.

        A kind must be known before objects of it, and a controller must run before its resources, for its webhook checks them.
        """
        phases: dict[str, list[K8sObject]] = {name: [] for name in PHASES}
        keyed = [(ObjectKey.from_object(resource), resource) for resource in self.objects]
        for key, resource in sorted(keyed, key=lambda entry: apply_position(entry[0])):
            phases[_choose_phase(key)].append(resource)
        return [(name, members) for name, members in phases.items() if members]

    def provided_parts(self) -> dict[str, Version | None]:
        """Parts of `ns doctor cluster` that it installs, with their versions if known."""
        kinds = {"deployments": "Deployment", "daemonsets": "DaemonSet", "definitions": "CustomResourceDefinition"}
        objects = {name: [item for item in self.objects if item["kind"] == kind] for name, kind in kinds.items()}
        state = doctor.ClusterState(objects=objects)
        versions = doctor.detect_versions(state)
        return {part: versions.get(part) for part in doctor.PART_IMAGES if doctor.has_part(state, part)}

    def required_parts(self) -> frozenset[str]:
        """Parts that it needs."""
        return frozenset({"kfp"} | {PART_OF_GROUP[key.group] for key in self.keys if key.group in PART_OF_GROUP})

    def required_permissions(self) -> tuple[Permission, ...]:
        """Permissions that are needed to apply it."""
        plurals = {
            definition["spec"]["names"]["kind"]: definition["spec"]["names"]["plural"]
            for definition in self.objects
            if definition["kind"] == "CustomResourceDefinition" and "names" in definition.get("spec", {})
        }
        permissions = {
            Permission(verb, plurals.get(key.kind) or _pluralize_kind(key.kind), key.group, namespace=key.namespace)
            for key in self.keys
            for verb in ("create", "patch")
        }
        return tuple(sorted(permissions))

    def with_inputs(self, name: str, key: str, extra: Mapping[str, Any]) -> Self:
        """A copy with more entries in the JSON object under a key of a ConfigMap, if that exists."""
        objects = []
        for resource in self.objects:
            if (resource["kind"], resource["metadata"]["name"]) == ("ConfigMap", name) and key in (resource.get("data") or {}):
                inputs = {**json.loads(resource["data"][key]), **extra}
                resource = {**resource, "data": {**resource["data"], key: json.dumps(inputs, indent=1)}}
            objects.append(resource)
        return self._replace(objects=tuple(objects))

    def with_gpu_type(self, gpu_type: str) -> Self:
        """A copy whose queues and quotas count a kind of GPU, as many as of DEFAULT_GPU_TYPE.

        Kueue never admits a pod that asks for a resource that its queue does not name.
        """
        return self._replace(objects=tuple(_count_gpu_type(resource, gpu_type) for resource in self.objects))

    def with_dns_peers(self, peers: Sequence[K8sObject]) -> Self:
        """A copy whose network policies let pods ask these peers for names."""
        return self._replace(
            objects=tuple(
                allow_dns_peers(resource, peers) if key.kind == "NetworkPolicy" and key.name == DNS_POLICY else resource
                for key, resource in zip(self.keys, self.objects, strict=True)
            )
        )

    def read_config_map(self, name: str) -> dict[str, str]:
        """Data of a ConfigMap in the namespace of runs; empty if there is none."""
        for key, resource in zip(self.keys, self.objects, strict=True):
            if key[1:] == ("ConfigMap", self.namespace, name):
                return dict(resource.get("data") or {})
        return {}


def list_overlays() -> list[str]:
    """Names of our overlays."""
    return sorted(path.parent.name for path in OVERLAYS.glob("*/kustomization.yaml"))


def render_overlay(kubectl: Kubectl, overlay: str, images: Mapping[str, str], without: Sequence[str] = ()) -> RenderedOverlay:
    """Builds all parts of an overlay (a name of ours, or a folder) except those in `without`.

    `images`: name in the manifests → name that nodes pull, with its tag. Raises ConfigError for an overlay or a part that does not
    exist, ClusterError with kustomize's reason for one that cannot be built.
    """
    folder = OVERLAYS / overlay if overlay in list_overlays() else Path(overlay)
    if not (folder / "kustomization.yaml").exists():
        raise ConfigError(
            f"OVERLAY {overlay!r}: is no folder with a kustomization.yaml, and no overlay in {OVERLAYS.relative_to(CHECKOUT)}; "
            f"choose one of {', '.join(list_overlays())}"
        )
    if unknown := set(without) - set(OVERLAY_PARTS) - {""}:
        raise ConfigError(
            f"--without {', '.join(sorted(unknown))}: is no part of an overlay; these can be left out: cluster, kubeflow"
        )
    objects: dict[tuple[str, ...], K8sObject] = {}
    for part in OVERLAY_PARTS:
        if part not in without and (folder / part / "kustomization.yaml").exists():
            for resource in _build_kustomization(kubectl, folder / part, images):
                objects[ObjectKey.from_object(resource).without_version()] = resource
    return RenderedOverlay(overlay, tuple(objects.values()))


def _build_kustomization(kubectl: Kubectl, path: Path, images: Mapping[str, str]) -> Iterator[K8sObject]:
    # Kustomize changes images only in its resources: a kustomization around the overlay names them.
    with tempfile.TemporaryDirectory() as folder:
        renamed = []
        for name, image in images.items():
            new, _, tag = image.rpartition(":")
            renamed.append({"name": name, "newName": new, "newTag": tag})
        wrapper = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [os.path.relpath(os.path.realpath(path), os.path.realpath(folder))],
            "images": renamed,
        }
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(wrapper))
        text = kubectl.run_command("kustomize", folder, seconds=BUILD_SECONDS)
    for document in load_yaml_documents(text):
        if document:
            yield from document["items"] if document["kind"] == "List" else [document]


def make_list_object(objects: Iterable[K8sObject]) -> K8sObject:
    """A List object of them."""
    return {"apiVersion": "v1", "kind": "List", "items": list(objects)}


def find_removed_keys(old: Sequence[ObjectKey], new: Iterable[ObjectKey]) -> list[ObjectKey]:
    """Keys that are in `old` and not in `new`, in the order in which the objects can be deleted."""
    staying = {key.without_version() for key in new}
    return sort_for_deletion(key for key in old if key.without_version() not in staying)


def sort_for_deletion(keys: Iterable[ObjectKey]) -> list[ObjectKey]:
    """Keys in the order of deletion: resources of controllers first, while these still run; namespaces and kinds last."""
    return sorted(keys, key=lambda key: (not _is_custom(key), -_kind_position(key.kind), key))


def _count_gpu_type(resource: K8sObject, gpu_type: str) -> K8sObject:
    resource = copy.deepcopy(resource)
    if resource["kind"] == "ResourceQuota":
        hard = resource["spec"]["hard"]
        if f"requests.{DEFAULT_GPU_TYPE}" in hard:
            hard.setdefault(f"requests.{gpu_type}", hard[f"requests.{DEFAULT_GPU_TYPE}"])
    if resource["kind"] == "ClusterQueue":
        for group in resource["spec"].get("resourceGroups") or ():
            if DEFAULT_GPU_TYPE in group["coveredResources"] and gpu_type not in group["coveredResources"]:
                group["coveredResources"].append(gpu_type)
                for flavor in group["flavors"]:
                    (counted,) = [item for item in flavor["resources"] if item["name"] == DEFAULT_GPU_TYPE]
                    flavor["resources"].append({**counted, "name": gpu_type})
    return resource


def apply_position(key: ObjectKey) -> tuple[int, ObjectKey]:
    """Sorts objects into the order in which they are applied."""
    return _kind_position(key.kind), key


def _is_custom(key: ObjectKey) -> bool:
    return bool(key.group) and key.group not in BUILT_IN and not key.group.endswith(".k8s.io")


def _choose_phase(key: ObjectKey) -> str:
    if key.kind in ("Namespace", "CustomResourceDefinition"):
        return "namespaces and kinds"
    if key.kind == "Job":
        return "jobs"
    return "resources of controllers" if _is_custom(key) else "all else"


def _pluralize_kind(kind: str) -> str:
    """Plural of a kind of Kubernetes: `networkpolicies`, `ingresses`, `endpoints`."""
    name = kind.lower()
    if kind == "Endpoints":
        return name
    if name.endswith("y") and name[-2] not in "aeiou":
        return f"{name[:-1]}ies"
    return f"{name}es" if name.endswith(("s", "x", "ch")) else f"{name}s"


def _kind_position(kind: str) -> int:
    if kind in KINDS_BEFORE:
        return KINDS_BEFORE.index(kind)
    return len(KINDS_BEFORE) + 1 + KINDS_AFTER.index(kind) if kind in KINDS_AFTER else len(KINDS_BEFORE)
