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

from pipelines import load_yaml_documents

HERE = Path(__file__).parent
VERSIONS = ("1.33", "1.34", "1.35", "1.36")
"""Of Kubernetes: those on which Kubeflow Pipelines 2.17 is tested by its authors."""
OVERLAY_PARTS = ("cluster", ".", "kubeflow")
"""Of an overlay, in the order in which they are applied; an overlay need not have all."""

EXTERNAL_OBJECTS = {
    ("ServiceAccount", "pipeline-runner"): "Kubeflow Pipelines' own, as which runs run",
    ("ServiceAccount", "default-editor"): "the same in a profile's namespace, of a Kubeflow with users",
    ("Secret", "mlpipeline-minio-artifact"): "the keys of the object store",
    ("Secret", "webhook-server-tls"): "the certificate of Kubeflow's cache, which makes it itself",
}
"""What is referred to and comes from elsewhere: docs/cluster.md tells people of it."""

K8sObject = dict[str, Any]
REMOTE = re.compile(r"https?://")
PINNED = re.compile(r"[?&]ref=v?\d+(\.\d+)+(&|$)|/releases/download/v?\d+(\.\d+)+/")
MARKER = "fetched-from-the-network"


class ManifestProblem(NamedTuple):
    location: str
    """Folder of what was built, object, and field."""
    problem: str

    def __str__(self) -> str:
        return f"{self.location}: {self.problem}"


class BuildError(Exception):
    """kustomize's own reason why a folder cannot be built."""


# --- building


def find_kubectl() -> str:
    """The environment's own, or else the machine's. Raises BuildError if there is none."""
    path = shutil.which("kubectl", path=sysconfig.get_path("scripts")) or shutil.which("kubectl")
    if not path:
        raise BuildError("no kubectl: install it (https://kubernetes.io/docs/tasks/tools)")
    return path


def build_folder(folder: Path) -> list[K8sObject]:
    """The objects of a kustomization. Raises BuildError."""
    process = subprocess.run([find_kubectl(), "kustomize", str(folder)], capture_output=True, text=True)
    if process.returncode:
        raise BuildError(process.stderr.strip().splitlines()[-1].removeprefix("error: "))
    return [resource for resource in load_yaml_documents(process.stdout) if resource]


def find_overlay_folders(root: Path) -> Iterator[Path]:
    """The folders to build: the steps of every overlay."""
    for overlay in sorted((root / "overlays").iterdir()):
        yield from (overlay / part for part in OVERLAY_PARTS if (overlay / part / "kustomization.yaml").exists())


def find_components(root: Path) -> Iterator[Path]:
    """The components of our own objects: not what is only for the steps cluster/ and kubeflow/."""
    for file in sorted((root / "components").rglob("kustomization.yaml")):
        if "kubeflow" not in file.parts and yaml.safe_load(file.read_text())["kind"] == "Component":
            yield file.parent


def isolate_component(root: Path, component: Path) -> Path:
    """Makes a folder in `root` that has the base and one component."""
    folder = root / "alone" / component.relative_to(root / "components")
    folder.mkdir(parents=True)
    up = "/".join([".."] * len(folder.relative_to(root).parts))
    kustomization = {"resources": [f"{up}/base"], "components": [f"{up}/{component.relative_to(root).as_posix()}"]}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return folder


def replace_remote_resources(root: Path) -> Iterator[ManifestProblem]:
    """Puts a marker in the place of all that comes from the network, in a copy of the manifests. Finds what is not pinned."""
    for file in sorted(root.rglob("kustomization.yaml")):
        kustomization = yaml.safe_load(file.read_text())
        remote = [url for url in kustomization.get("resources", []) if REMOTE.match(url)]
        for url in remote:
            if not PINNED.search(url):
                yield ManifestProblem(f"{file.relative_to(root)} resources", f"{url} names no version; add ?ref=")
        if remote:
            name = re.sub(r"\W+", "-", str(file.parent.relative_to(root))).strip("-")
            stand_in = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"{MARKER}-{name}"}}
            (file.parent / f"{MARKER}.yaml").write_text(yaml.safe_dump(stand_in))
            kustomization["resources"] = [*(url for url in kustomization["resources"] if url not in remote), f"{MARKER}.yaml"]
            file.write_text(yaml.safe_dump(kustomization))


# --- schemas


@lru_cache
def _load_kubernetes_schemas(version: str) -> tuple[Any, Any]:
    """The folder of a version's schemas, and the registry in which their references are looked up."""
    folder = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"v{version}.0-local-strict"
    definitions = Resource.from_contents(json.loads((folder / "_definitions.json").read_text()))
    return folder, Registry().with_resource("_definitions.json", definitions).crawl()


@lru_cache
def make_validator(version: str, api_version: str, kind: str) -> Any:
    """What an object of this kind is held against; None if nobody has a schema for it."""
    group, _, name = api_version.rpartition("/")
    crd_schema = HERE / "schemas" / group / f"{kind}-{name}.json"
    if crd_schema.exists():
        return jsonschema.Draft202012Validator(json.loads(crd_schema.read_text()))
    folder, registry = _load_kubernetes_schemas(version)
    # As that package names them: rbac.authorization.k8s.io/v1 is rbac-v1.
    name_parts = [kind.lower(), *([group.split(".")[0]] if group else []), name]
    file = folder / f"{'-'.join(name_parts)}.json"
    if not file.is_file():
        return None
    return jsonschema.Draft202012Validator(json.loads(file.read_text()), registry=registry)


def find_misfits(resource: K8sObject) -> Iterator[tuple[str, str, str]]:
    """Where an object is not what the schemas say: field, reason, versions of Kubernetes."""
    mismatches: dict[tuple[str, str], list[str]] = {}
    for version in VERSIONS:
        schema = make_validator(version, resource["apiVersion"], resource["kind"])
        if schema is None:
            mismatches.setdefault(("kind", f"no schema has {resource['apiVersion']} {resource['kind']}"), []).append(version)
            continue
        metadata = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": resource["metadata"]}
        errors = [*schema.iter_errors(resource), *make_validator(version, "v1", "ConfigMap").iter_errors(metadata)]
        for error in errors:
            # Of alternatives, the one that comes nearest says what is wrong.
            best = jsonschema.exceptions.best_match([error])
            field = ".".join(str(part) for part in best.absolute_path) or "it"
            mismatches.setdefault((field, best.message), []).append(version)
    for (field, reason), versions in mismatches.items():
        yield field, reason[:300], "" if len(versions) == len(VERSIONS) else f" (Kubernetes {', '.join(versions)})"


# --- what schemas cannot say


def describe_object(resource: K8sObject) -> str:
    return f"{resource['kind']}/{resource['metadata'].get('name', '')}"


def find_pod_specs(node: Any, path: str = "") -> Iterator[tuple[str, K8sObject]]:
    """The pods' specs in an object, wherever its kind keeps them, each with its path."""
    if isinstance(node, dict):
        if isinstance(node.get("containers"), list):
            yield path, node
        for key, value in node.items():
            yield from find_pod_specs(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from find_pod_specs(value, f"{path}.{index}")


def list_containers(pod: K8sObject) -> Iterator[K8sObject]:
    for kind in ("initContainers", "containers", "ephemeralContainers"):
        yield from pod.get(kind) or []


ALLOWED_VOLUMES = frozenset(
    {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
)


def find_restricted_violations(pod: K8sObject) -> Iterator[str]:
    """What of a pod the Pod Security Standard `restricted` does not allow (kubernetes.io/docs/concepts/security)."""
    pod_security = pod.get("securityContext") or {}
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(field):
            yield f"{field} must not be set"
    for volume in pod.get("volumes") or []:
        for kind in set(volume) - {"name"} - ALLOWED_VOLUMES:
            yield f"volume {volume['name']} must not be a {kind}"
    for container in list_containers(pod):
        security = container.get("securityContext") or {}
        name = container["name"]
        if security.get("allowPrivilegeEscalation") is not False:
            yield f"{name} must have allowPrivilegeEscalation: false"
        if security.get("privileged"):
            yield f"{name} must not be privileged"
        if "ALL" not in (security.get("capabilities") or {}).get("drop", []):
            yield f"{name} must drop the capabilities ALL"
        if set((security.get("capabilities") or {}).get("add", [])) - {"NET_BIND_SERVICE"}:
            yield f"{name} must not add capabilities"
        if security.get("runAsNonRoot", pod_security.get("runAsNonRoot")) is not True:
            yield f"{name} must have runAsNonRoot: true"
        if security.get("runAsUser", pod_security.get("runAsUser")) == 0:
            yield f"{name} must not have runAsUser: 0"
        if (security.get("seccompProfile") or pod_security.get("seccompProfile") or {}).get("type") not in (
            "RuntimeDefault",
            "Localhost",
        ):
            yield f"{name} must have seccompProfile.type: RuntimeDefault"
        if any(port.get("hostPort") for port in container.get("ports") or []):
            yield f"{name} must not have a hostPort"


def is_pinned(image: str) -> bool:
    """Whether an image says its version: a digest, or a tag with a number in it that is not moved."""
    if "@" in image:
        return bool(re.search(r"@sha256:[0-9a-f]{64}$", image))
    tag = image.rpartition("/")[2].partition(":")[2]
    return bool(re.search(r"\d", tag)) and tag != "latest"


def find_references(pod: K8sObject) -> Iterator[tuple[str, str]]:
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
    for container in list_containers(pod):
        for source in container.get("envFrom") or []:
            for key, kind in (("secretRef", "Secret"), ("configMapRef", "ConfigMap")):
                if key in source and not source[key].get("optional"):
                    yield kind, source[key]["name"]
        for variable in container.get("env") or []:
            for key, kind in (("secretKeyRef", "Secret"), ("configMapKeyRef", "ConfigMap")):
                if key in (value := variable.get("valueFrom") or {}) and not value[key].get("optional"):
                    yield kind, value[key]["name"]


def collect_available(objects: Iterable[K8sObject]) -> set[tuple[str, str]]:
    """What is there once the objects are applied, and what comes from elsewhere."""
    applied = {(resource["kind"], resource["metadata"]["name"]) for resource in objects if "name" in resource["metadata"]}
    # An operator makes the secret; GIVEN is what people make, or Kubeflow.
    generated = {("Secret", name) for kind, name in applied if kind == "ExternalSecret"}
    return applied | generated | set(EXTERNAL_OBJECTS) | {("ServiceAccount", "default"), ("ConfigMap", "kube-root-ca.crt")}


def check_objects(objects: list[K8sObject], location: str, others: Iterable[K8sObject] = ()) -> Iterator[ManifestProblem]:
    """All that is wrong with objects that are applied together, beside `others`, which are there before."""
    available = collect_available([*objects, *others])
    for resource in objects:
        name = f"{location} {describe_object(resource)}"
        for field, reason, versions in find_misfits(resource):
            yield ManifestProblem(f"{name} {field}", f"{reason}{versions}")
        if resource["kind"] in ("RoleBinding", "ClusterRoleBinding"):
            subjects = [(subject["kind"], subject["name"]) for subject in resource.get("subjects") or []]
            subjects.append((resource["roleRef"]["kind"], resource["roleRef"]["name"]))
            for reference in subjects:
                if reference[0] not in ("User", "Group") and reference not in available:
                    yield ManifestProblem(name, f"there is no {'/'.join(reference)}")
        if resource["kind"] == "CustomResourceDefinition":
            continue
        for path, pod in find_pod_specs(resource):
            for reference in sorted(set(find_references(pod)) - available):
                yield ManifestProblem(f"{name} {path}", f"there is no {'/'.join(reference)}")
            for container in list_containers(pod):
                if not is_pinned(container.get("image", "")):
                    yield ManifestProblem(
                        f"{name} {path}", f"image {container.get('image')} is not pinned; give its version or digest"
                    )
            for reason in find_restricted_violations(pod):
                yield ManifestProblem(f"{name} {path}", f"{reason} (pod security `restricted`)")


def build_all(root: Path, *, remote: bool = False) -> tuple[dict[str, list[K8sObject]], list[ManifestProblem]]:
    """The objects of every step of every overlay, of every component alone, and of every example, by folder; and what cannot be."""
    built: dict[str, list[K8sObject]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        copy, offline = Path(scratch) / "k8s", Path(scratch) / "offline"
        shutil.copytree(root, copy)
        shutil.copytree(root, offline)
        problems = list(replace_remote_resources(offline))
        copy = copy if remote else offline
        for folder in [*find_overlay_folders(copy), *(isolate_component(copy, item) for item in find_components(copy))]:
            location = folder.relative_to(copy).as_posix()
            try:
                built[location] = [item for item in build_folder(folder) if not item["metadata"]["name"].startswith(MARKER)]
            except BuildError as error:
                problems.append(ManifestProblem(location, str(error).replace(str(copy), "k8s")))
        for file in sorted((copy / "examples").rglob("*.yaml")):
            built[file.relative_to(copy).as_posix()] = [*load_yaml_documents(file.read_text())]
    return built, problems


def validate_manifests(built: dict[str, list[K8sObject]]) -> Iterator[ManifestProblem]:
    """What is wrong with what was built. A step of an overlay may refer to what another one brings."""
    overlays: dict[str, list[K8sObject]] = {}
    for location, objects in built.items():
        overlays.setdefault("/".join(location.split("/")[:2]), []).extend(objects)
    for location, objects in built.items():
        beside = overlays["/".join(location.split("/")[:2])] if location.startswith("overlays/") else []
        yield from check_objects(objects, location, beside)


def run_checkov(built: dict[str, list[K8sObject]], checkov: str) -> int:
    """What checkov says of what was built, to standard output. Returns its exit code."""
    with tempfile.TemporaryDirectory() as scratch:
        for location, objects in built.items():
            file = Path(scratch) / (location.removesuffix(".yaml").replace("/", "_") + ".yaml")
            file.write_text(yaml.safe_dump_all(objects))
        command = [checkov, "--config-file", str(HERE / ".checkov.yaml"), "--directory", scratch]
        return subprocess.run(command).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the manifests against Kubernetes' schemas and our own rules.")
    parser.add_argument("folder", nargs="?", type=Path, default=HERE, help="where base, components and overlays are")
    parser.add_argument("--remote", action="store_true", help="fetch and check what comes from the network, too")
    parser.add_argument("--checkov", metavar="PROGRAM", help="have checkov look for weaknesses, too")
    options = parser.parse_args()
    built, problems = build_all(options.folder, remote=options.remote)
    problems = sorted({*problems, *validate_manifests(built)})
    for problem in problems:
        sys.stderr.write(f"error: {problem}\n")
    without = "" if options.remote else "; not fetched: Kubeflow Pipelines, Kueue, Trainer (--remote)"
    object_count = sum(len(objects) for objects in built.values())
    sys.stdout.write(f"{object_count} objects, Kubernetes {VERSIONS[0]} to {VERSIONS[-1]}: {len(problems)} errors{without}\n")
    checkov_code = run_checkov(built, options.checkov) if options.checkov else 0
    return 1 if problems or checkov_code else 0


if __name__ == "__main__":
    sys.exit(main())
