"""What an overlay consists of: rendered by kustomize, with this checkout's images, and put in the order in which it can be applied."""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import yaml

from k8s import doctor
from k8s.doctor import Right
from k8s.kubectl import Kubectl, Object
from k8s.versions import Version
from ns.core.errors import ConfigError
from pipelines import documents

CHECKOUT = Path(__file__).parents[1]
OVERLAYS = CHECKOUT / "k8s" / "overlays"
STEPS = ("cluster", ".", "kubeflow")
"""Parts of an overlay, each a kustomization; it need not have all. Two of them come from the network."""
BUILD_SECONDS = 600
"""For kustomize, which fetches Kubeflow's own manifests with git."""

# A kind is applied before those that stand after it; what is not named comes just before the workloads.
BEFORE = (
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
AFTER = (*WORKLOADS, "APIService", "MutatingWebhookConfiguration", "ValidatingWebhookConfiguration")
FIRST = ("Namespace", "CustomResourceDefinition")

# Groups of Kubernetes itself; kinds of all others are resources of somebody's controller, which must run first.
BUILT_IN = ("apps", "batch", "policy", "autoscaling", "extensions")
NEEDED_BY = {
    "monitoring.coreos.com": "prometheus-operator",
    "trainer.kubeflow.org": "trainer",
    "kueue.x-k8s.io": "kueue",
}


class Key(NamedTuple):
    """What an object is known by."""

    api: str
    """`apps/v1`; of a kept list, as it was applied."""
    kind: str
    namespace: str
    """Empty for objects of the whole cluster."""
    name: str

    @classmethod
    def of(cls, thing: Object) -> Self:
        meta = thing["metadata"]
        return cls(thing["apiVersion"], thing["kind"], meta.get("namespace", ""), meta["name"])

    def same(self) -> tuple[str, str, str, str]:
        """Equal for one object under two versions of its API."""
        return (self.group, *self[1:])

    @property
    def group(self) -> str:
        return self.api.rpartition("/")[0]

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace + '/' if self.namespace else ''}{self.name}"


class Manifests(NamedTuple):
    """A rendered overlay."""

    overlay: str
    objects: tuple[Object, ...]

    @property
    def keys(self) -> tuple[Key, ...]:
        return tuple(map(Key.of, self.objects))

    @property
    def namespace(self) -> str:
        """Where runs are: that of the ConfigMap with their settings. Raises ConfigError if there is none."""
        for key in self.keys:
            if (key.kind, key.name) == ("ConfigMap", doctor.SETTINGS):
                return key.namespace
        raise ConfigError(f"overlay {self.overlay}: has no ConfigMap {doctor.SETTINGS}; let it take ../../base")

    @property
    def namespaces(self) -> tuple[str, ...]:
        """All that it puts something into."""
        return tuple(sorted({key.namespace for key in self.keys if key.namespace}))

    @property
    def workloads(self) -> tuple[Key, ...]:
        return tuple(key for key in self.keys if key.kind in WORKLOADS and key.kind != "CronJob")

    @property
    def jobs(self) -> tuple[Key, ...]:
        return tuple(key for key in self.keys if key.kind == "Job")

    def stages(self) -> list[tuple[str, list[Object]]]:
        """What is applied together, in this order; between two of them is waited. Empty ones are left out.

        A kind must be known before objects of it, and a controller must run before its resources: its webhook is asked about
        them.
        """
        stages: dict[str, list[Object]] = {
            "namespaces and kinds": [],
            "all else": [],
            "resources of controllers": [],
            "jobs": [],
        }
        for one in sorted(self.objects, key=_order):
            key = Key.of(one)
            if key.kind in FIRST:
                stages["namespaces and kinds"].append(one)
            elif key.kind == "Job":
                stages["jobs"].append(one)
            elif _is_custom(key):
                stages["resources of controllers"].append(one)
            else:
                stages["all else"].append(one)
        return [(name, members) for name, members in stages.items() if members]

    def brings(self) -> dict[str, Version | None]:
        """Parts of `ns doctor cluster` that it installs, with their versions where these can be told."""
        seen = self._seen()
        versions = doctor.found_versions(seen)
        return {part: versions.get(part) for part in doctor.IMAGES if doctor.has(seen, part)}

    def needs(self) -> frozenset[str]:
        """Parts without which it cannot be applied or used."""
        return frozenset({"kfp"} | {NEEDED_BY[key.group] for key in self.keys if key.group in NEEDED_BY})

    def _seen(self) -> doctor.Cluster:
        kinds = {"Deployment": "deployments", "DaemonSet": "daemonsets", "CustomResourceDefinition": "definitions"}
        objects: dict[str, list[Object]] = {}
        for one in self.objects:
            if one["kind"] in kinds:
                objects.setdefault(kinds[one["kind"]], []).append(one)
        return doctor.Cluster(objects=objects)

    def rights(self) -> tuple[Right, ...]:
        """What whoever applies it must be allowed."""
        plurals = {
            one["spec"]["names"]["kind"]: one["spec"]["names"]["plural"]
            for one in self.objects
            if one["kind"] == "CustomResourceDefinition" and "names" in one.get("spec", {})
        }
        found = {
            Right(verb, plurals.get(key.kind) or _plural(key.kind), key.group, namespace=key.namespace)
            for key in self.keys
            for verb in ("create", "patch")
        }
        return tuple(sorted(found))

    def with_inputs(self, name: str, key: str, more: Mapping[str, Any]) -> Self:
        """The same, with more entries in the JSON object under a key of a ConfigMap, where there is one."""
        objects = []
        for one in self.objects:
            if (one["kind"], one["metadata"]["name"]) == ("ConfigMap", name) and key in (one.get("data") or {}):
                inputs = {**json.loads(one["data"][key]), **more}
                one = {**one, "data": {**one["data"], key: json.dumps(inputs, indent=1)}}
            objects.append(one)
        return self._replace(objects=tuple(objects))

    def config(self, name: str) -> dict[str, str]:
        """Data of a ConfigMap of the namespace of runs; nothing if there is none of that name."""
        for one in self.objects:
            if one["kind"] == "ConfigMap" and (one["metadata"].get("namespace"), one["metadata"]["name"]) == (
                self.namespace,
                name,
            ):
                return dict(one.get("data") or {})
        return {}


def overlays() -> list[str]:
    """Names of the overlays there are."""
    return sorted(path.parent.name for path in OVERLAYS.glob("*/kustomization.yaml"))


def render(kubectl: Kubectl, overlay: str, images: Mapping[str, str], without: Sequence[str] = ()) -> Manifests:
    """Builds an overlay (one of ours by its name, or a folder) with all its steps but those in `without`.

    `images`: name in the manifests → name that nodes pull, with its tag. Raises ConfigError for an overlay or a step that does not
    exist, ClusterError with kustomize's reason for one that cannot be built.
    """
    folder = OVERLAYS / overlay if overlay in overlays() else Path(overlay)
    if not (folder / "kustomization.yaml").exists():
        raise ConfigError(
            f"OVERLAY {overlay!r}: is no folder with a kustomization.yaml, and none in {OVERLAYS.relative_to(CHECKOUT)}; "
            f"there are {', '.join(overlays())}"
        )
    if unknown := set(without) - set(STEPS) - {""}:
        raise ConfigError(
            f"--without {', '.join(sorted(unknown))}: is no step of an overlay; these can be left out: cluster, kubeflow"
        )
    objects: dict[tuple[str, ...], Object] = {}
    for step in STEPS:
        if step not in without and (folder / step / "kustomization.yaml").exists():
            for one in _built(kubectl, folder / step, images):
                objects[Key.of(one).same()] = one
    return Manifests(overlay, tuple(objects.values()))


def _built(kubectl: Kubectl, place: Path, images: Mapping[str, str]) -> Iterator[Object]:
    # Kustomize changes images in what it builds on; so what is asked for stands on the overlay, in a folder of its own.
    with tempfile.TemporaryDirectory() as folder:
        renamed = []
        for name, wanted in images.items():
            new, _, tag = wanted.rpartition(":")
            renamed.append({"name": name, "newName": new, "newTag": tag})
        wrapper = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [os.path.relpath(os.path.realpath(place), os.path.realpath(folder))],
            "images": renamed,
        }
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(wrapper))
        text = kubectl.run("kustomize", folder, seconds=BUILD_SECONDS)
    for document in documents(text):
        if document:
            yield from document["items"] if document["kind"] == "List" else [document]


def listed(objects: Iterable[Object]) -> Object:
    """Objects as one."""
    return {"apiVersion": "v1", "kind": "List", "items": list(objects)}


def gone(old: Sequence[Key], new: Iterable[Key]) -> list[Key]:
    """What was applied once and is no longer in an overlay: in the order in which it can be deleted."""
    staying = {key.same() for key in new}
    return ordered_for_deletion(key for key in old if key.same() not in staying)


def ordered_for_deletion(keys: Iterable[Key]) -> list[Key]:
    """Resources of controllers first, while these still run; namespaces and kinds last."""
    return sorted(keys, key=lambda key: (not _is_custom(key), -_rank(key.kind), key))


def _is_custom(key: Key) -> bool:
    return bool(key.group) and key.group not in BUILT_IN and not key.group.endswith(".k8s.io")


def _plural(kind: str) -> str:
    """As Kubernetes' own kinds have it: `networkpolicies`, `ingresses`, `endpoints`."""
    name = kind.lower()
    if kind == "Endpoints":
        return name
    if name.endswith("y") and name[-2] not in "aeiou":
        return f"{name[:-1]}ies"
    return f"{name}es" if name.endswith(("s", "x", "ch")) else f"{name}s"


def _rank(kind: str) -> int:
    if kind in BEFORE:
        return BEFORE.index(kind)
    return len(BEFORE) + 1 + AFTER.index(kind) if kind in AFTER else len(BEFORE)


def _order(one: Object) -> tuple[int, Any]:
    return _rank(one["kind"]), Key.of(one)
