"""Checks the manifests: `python -m k8s.validate [--remote] [--checkov PROGRAM] [FOLDER]`, as `make validate` does.

Every overlay with its steps, and every component alone on the base, is built as `kubectl kustomize` builds it. What comes out is held
against the schemas of all Kubernetes versions that we support and of the CRDs used, strictly: a field that they do not know is an
error. Then what schemas cannot say: that what is referred to exists, that images are pinned, that pods keep to `restricted`.

What manifests take from the network (Kubeflow Pipelines, Kueue, Trainer) must name its version, and is left out of the build; with
`--remote` it is fetched and checked too, and so is whether our patches find their targets there. With `--checkov` that program looks
at what was built; what it need not say is in .checkov.yaml, each with its reason.
"""

import argparse
import importlib.resources
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import yaml
from referencing import Registry, Resource

from pipelines import documents

HERE = Path(__file__).parent
VERSIONS = ("1.33", "1.34", "1.35", "1.36")
"""Of Kubernetes: those on which Kubeflow Pipelines 2.17 is tested by its authors."""
STEPS = ("cluster", ".", "kubeflow")
"""Of an overlay, in the order in which they are applied; an overlay need not have all."""

GIVEN = {
    ("ServiceAccount", "pipeline-runner"): "Kubeflow Pipelines' own, as which runs run",
    ("ServiceAccount", "default-editor"): "the same in a profile's namespace, of a Kubeflow with users",
    ("Secret", "mlpipeline-minio-artifact"): "the keys of the object store",
    ("Secret", "webhook-server-tls"): "the certificate of Kubeflow's cache, which makes it itself",
}
"""What is referred to and comes from elsewhere: docs/cluster.md tells people of it."""

Object = dict[str, Any]
REMOTE = re.compile(r"https?://")
PINNED = re.compile(r"[?&]ref=v?\d+(\.\d+)+(&|$)|/releases/download/v?\d+(\.\d+)+/")
MARKER = "fetched-from-the-network"


class Finding(NamedTuple):
    where: str
    """Folder of what was built, object, and field."""
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class BuildError(Exception):
    """kustomize's own reason why a folder cannot be built."""


# --- building


def kubectl() -> str:
    """The environment's own, or else the machine's. Raises BuildError if there is none."""
    found = shutil.which("kubectl", path=sysconfig.get_path("scripts")) or shutil.which("kubectl")
    if not found:
        raise BuildError("no kubectl: install it (https://kubernetes.io/docs/tasks/tools)")
    return found


def build(folder: Path) -> list[Object]:
    """The objects of a kustomization. Raises BuildError."""
    done = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise BuildError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    return [one for one in documents(done.stdout) if one]


def targets(root: Path) -> Iterator[Path]:
    """The folders to build: the steps of every overlay."""
    for overlay in sorted((root / "overlays").iterdir()):
        yield from (overlay / step for step in STEPS if (overlay / step / "kustomization.yaml").exists())


def components(root: Path) -> Iterator[Path]:
    """The components of our own objects: not what is only for the steps cluster/ and kubeflow/."""
    for file in sorted((root / "components").rglob("kustomization.yaml")):
        if "kubeflow" not in file.parts and yaml.safe_load(file.read_text())["kind"] == "Component":
            yield file.parent


def alone(root: Path, component: Path) -> Path:
    """Makes a folder in `root` that has the base and one component."""
    folder = root / "alone" / component.relative_to(root / "components")
    folder.mkdir(parents=True)
    up = "/".join([".."] * len(folder.relative_to(root).parts))
    wanted = {"resources": [f"{up}/base"], "components": [f"{up}/{component.relative_to(root).as_posix()}"]}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(wanted))
    return folder


def without_network(root: Path) -> Iterator[Finding]:
    """Puts a marker in the place of all that comes from the network, in a copy of the manifests. Finds what is not pinned."""
    for file in sorted(root.rglob("kustomization.yaml")):
        wanted = yaml.safe_load(file.read_text())
        remote = [one for one in wanted.get("resources", []) if REMOTE.match(one)]
        for one in remote:
            if not PINNED.search(one):
                yield Finding(f"{file.relative_to(root)} resources", f"{one} names no version; add ?ref=")
        if remote:
            name = re.sub(r"\W+", "-", str(file.parent.relative_to(root))).strip("-")
            stand_in = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"{MARKER}-{name}"}}
            (file.parent / f"{MARKER}.yaml").write_text(yaml.safe_dump(stand_in))
            wanted["resources"] = [*(one for one in wanted["resources"] if one not in remote), f"{MARKER}.yaml"]
            file.write_text(yaml.safe_dump(wanted))


# --- schemas


@lru_cache
def _kubernetes(version: str) -> tuple[Any, Any]:
    """The folder of a version's schemas, and the registry in which their references are looked up."""
    folder = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"v{version}.0-local-strict"
    definitions = Resource.from_contents(json.loads((folder / "_definitions.json").read_text()))
    return folder, Registry().with_resource("_definitions.json", definitions).crawl()


@lru_cache
def validator(version: str, api_version: str, kind: str) -> Any:
    """What an object of this kind is held against; None if nobody has a schema for it."""
    group, _, name = api_version.rpartition("/")
    own = HERE / "schemas" / group / f"{kind}-{name}.json"
    if own.exists():
        return jsonschema.Draft202012Validator(json.loads(own.read_text()))
    folder, registry = _kubernetes(version)
    # As that package names them: rbac.authorization.k8s.io/v1 is rbac-v1.
    named = [kind.lower(), *([group.split(".")[0]] if group else []), name]
    file = folder / f"{'-'.join(named)}.json"
    if not file.is_file():
        return None
    return jsonschema.Draft202012Validator(json.loads(file.read_text()), registry=registry)


def misfits(one: Object) -> Iterator[tuple[str, str, str]]:
    """Where an object is not what the schemas say: field, reason, versions of Kubernetes."""
    found: dict[tuple[str, str], list[str]] = {}
    for version in VERSIONS:
        schema = validator(version, one["apiVersion"], one["kind"])
        if schema is None:
            found.setdefault(("kind", f"no schema has {one['apiVersion']} {one['kind']}"), []).append(version)
            continue
        metadata = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": one["metadata"]}
        errors = [*schema.iter_errors(one), *validator(version, "v1", "ConfigMap").iter_errors(metadata)]
        for error in errors:
            # Of alternatives, the one that comes nearest says what is wrong.
            best = jsonschema.exceptions.best_match([error])
            field = ".".join(str(part) for part in best.absolute_path) or "it"
            found.setdefault((field, best.message), []).append(version)
    for (field, what), versions in found.items():
        yield field, what[:300], "" if len(versions) == len(VERSIONS) else f" (Kubernetes {', '.join(versions)})"


# --- what schemas cannot say


def name_of(one: Object) -> str:
    return f"{one['kind']}/{one['metadata'].get('name', '')}"


def pods(one: Any, path: str = "") -> Iterator[tuple[str, Object]]:
    """The pods' specs in an object, wherever its kind keeps them, each with its path."""
    if isinstance(one, dict):
        if isinstance(one.get("containers"), list):
            yield path, one
        for key, value in one.items():
            yield from pods(value, f"{path}.{key}" if path else str(key))
    elif isinstance(one, list):
        for at, value in enumerate(one):
            yield from pods(value, f"{path}.{at}")


def containers(pod: Object) -> Iterator[Object]:
    for kind in ("initContainers", "containers", "ephemeralContainers"):
        yield from pod.get(kind) or []


VOLUMES = frozenset(
    {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
)


def beyond_restricted(pod: Object) -> Iterator[str]:
    """What of a pod the Pod Security Standard `restricted` does not allow (kubernetes.io/docs/concepts/security)."""
    whole = pod.get("securityContext") or {}
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(field):
            yield f"{field} must not be set"
    for volume in pod.get("volumes") or []:
        for kind in set(volume) - {"name"} - VOLUMES:
            yield f"volume {volume['name']} must not be a {kind}"
    for container in containers(pod):
        own = container.get("securityContext") or {}
        name = container["name"]
        if own.get("allowPrivilegeEscalation") is not False:
            yield f"{name} must have allowPrivilegeEscalation: false"
        if own.get("privileged"):
            yield f"{name} must not be privileged"
        if "ALL" not in (own.get("capabilities") or {}).get("drop", []):
            yield f"{name} must drop the capabilities ALL"
        if set((own.get("capabilities") or {}).get("add", [])) - {"NET_BIND_SERVICE"}:
            yield f"{name} must not add capabilities"
        if own.get("runAsNonRoot", whole.get("runAsNonRoot")) is not True:
            yield f"{name} must have runAsNonRoot: true"
        if own.get("runAsUser", whole.get("runAsUser")) == 0:
            yield f"{name} must not have runAsUser: 0"
        if (own.get("seccompProfile") or whole.get("seccompProfile") or {}).get("type") not in ("RuntimeDefault", "Localhost"):
            yield f"{name} must have seccompProfile.type: RuntimeDefault"
        if any(port.get("hostPort") for port in container.get("ports") or []):
            yield f"{name} must not have a hostPort"


def is_pinned(image: str) -> bool:
    """Whether an image says its version: a digest, or a tag with a number in it that is not moved."""
    if "@" in image:
        return bool(re.search(r"@sha256:[0-9a-f]{64}$", image))
    tag = image.rpartition("/")[2].partition(":")[2]
    return bool(re.search(r"\d", tag)) and tag != "latest"


def references(pod: Object) -> Iterator[tuple[str, str]]:
    """What a pod cannot start without: kind and name."""
    if account := pod.get("serviceAccountName"):
        yield "ServiceAccount", account
    for secret in pod.get("imagePullSecrets") or []:
        yield "Secret", secret["name"]
    for volume in pod.get("volumes") or []:
        for key, kind, name in (
            ("secret", "Secret", "secretName"),
            ("configMap", "ConfigMap", "name"),
            ("persistentVolumeClaim", "PersistentVolumeClaim", "claimName"),
        ):
            if key in volume and not volume[key].get("optional"):
                yield kind, volume[key][name]
        for source in (volume.get("projected") or {}).get("sources", []):
            for key, kind in (("secret", "Secret"), ("configMap", "ConfigMap")):
                if key in source and not source[key].get("optional"):
                    yield kind, source[key]["name"]
    for container in containers(pod):
        for source in container.get("envFrom") or []:
            for key, kind in (("secretRef", "Secret"), ("configMapRef", "ConfigMap")):
                if key in source and not source[key].get("optional"):
                    yield kind, source[key]["name"]
        for variable in container.get("env") or []:
            for key, kind in (("secretKeyRef", "Secret"), ("configMapKeyRef", "ConfigMap")):
                if key in (value := variable.get("valueFrom") or {}) and not value[key].get("optional"):
                    yield kind, value[key]["name"]


def known(objects: Iterable[Object]) -> set[tuple[str, str]]:
    """What is there once the objects are applied, and what comes from elsewhere."""
    there = {(one["kind"], one["metadata"]["name"]) for one in objects if "name" in one["metadata"]}
    # An operator makes the secret; GIVEN is what people make, or Kubeflow.
    made = {("Secret", name) for kind, name in there if kind == "ExternalSecret"}
    return there | made | set(GIVEN) | {("ServiceAccount", "default"), ("ConfigMap", "kube-root-ca.crt")}


def check(objects: list[Object], where: str, others: Iterable[Object] = ()) -> Iterator[Finding]:
    """All that is wrong with objects that are applied together, beside `others`, which are there before."""
    there = known([*objects, *others])
    for one in objects:
        name = f"{where} {name_of(one)}"
        for field, what, versions in misfits(one):
            yield Finding(f"{name} {field}", f"{what}{versions}")
        if one["kind"] in ("RoleBinding", "ClusterRoleBinding"):
            needed = [(subject["kind"], subject["name"]) for subject in one.get("subjects") or []]
            needed.append((one["roleRef"]["kind"], one["roleRef"]["name"]))
            for reference in needed:
                if reference[0] not in ("User", "Group") and reference not in there:
                    yield Finding(name, f"there is no {'/'.join(reference)}")
        if one["kind"] == "CustomResourceDefinition":
            continue
        for path, pod in pods(one):
            for reference in sorted(set(references(pod)) - there):
                yield Finding(f"{name} {path}", f"there is no {'/'.join(reference)}")
            for container in containers(pod):
                if not is_pinned(container.get("image", "")):
                    yield Finding(f"{name} {path}", f"image {container.get('image')} is not pinned; give its version or digest")
            for what in beyond_restricted(pod):
                yield Finding(f"{name} {path}", f"{what} (pod security `restricted`)")


def build_all(root: Path, *, remote: bool = False) -> tuple[dict[str, list[Object]], list[Finding]]:
    """The objects of every step of every overlay, of every component alone, and of every example, by folder; and what cannot be."""
    built: dict[str, list[Object]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        copy, offline = Path(scratch) / "k8s", Path(scratch) / "offline"
        shutil.copytree(root, copy)
        shutil.copytree(root, offline)
        found = list(without_network(offline))
        copy = copy if remote else offline
        for folder in [*targets(copy), *(alone(copy, one) for one in components(copy))]:
            where = folder.relative_to(copy).as_posix()
            try:
                built[where] = [one for one in build(folder) if not one["metadata"]["name"].startswith(MARKER)]
            except BuildError as error:
                found.append(Finding(where, str(error).replace(str(copy), "k8s")))
        for file in sorted((copy / "examples").rglob("*.yaml")):
            built[file.relative_to(copy).as_posix()] = [*documents(file.read_text())]
    return built, found


def validate(built: dict[str, list[Object]]) -> Iterator[Finding]:
    """What is wrong with what was built. A step of an overlay may refer to what another one brings."""
    steps: dict[str, list[Object]] = {}
    for where, objects in built.items():
        steps.setdefault("/".join(where.split("/")[:2]), []).extend(objects)
    for where, objects in built.items():
        beside = steps["/".join(where.split("/")[:2])] if where.startswith("overlays/") else []
        yield from check(objects, where, beside)


def weaknesses(built: dict[str, list[Object]], checkov: str) -> int:
    """What checkov says of what was built, to standard output. Returns its exit code."""
    with tempfile.TemporaryDirectory() as scratch:
        for where, objects in built.items():
            file = Path(scratch) / (where.removesuffix(".yaml").replace("/", "_") + ".yaml")
            file.write_text(yaml.safe_dump_all(objects))
        command = [checkov, "--config-file", str(HERE / ".checkov.yaml"), "--directory", scratch]
        return subprocess.run(command).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the manifests against Kubernetes' schemas and our own rules.")
    parser.add_argument("folder", nargs="?", type=Path, default=HERE, help="where base, components and overlays are")
    parser.add_argument("--remote", action="store_true", help="fetch and check what comes from the network, too")
    parser.add_argument("--checkov", metavar="PROGRAM", help="have checkov look for weaknesses, too")
    asked = parser.parse_args()
    built, found = build_all(asked.folder, remote=asked.remote)
    found = sorted({*found, *validate(built)})
    for one in found:
        sys.stderr.write(f"error: {one}\n")
    without = "" if asked.remote else "; not fetched: Kubeflow Pipelines, Kueue, Trainer (--remote)"
    seen = sum(len(objects) for objects in built.values())
    sys.stdout.write(f"{seen} objects, Kubernetes {VERSIONS[0]} to {VERSIONS[-1]}: {len(found)} errors{without}\n")
    weak = weaknesses(built, asked.checkov) if asked.checkov else 0
    return 1 if found or weak else 0


if __name__ == "__main__":
    sys.exit(main())
