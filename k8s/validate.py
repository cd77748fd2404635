"""Checks the manifests: `python -m k8s.validate [--checkov PROGRAM] [FOLDER]`, as `make validate` does.

Every overlay with its parts, and every component alone on the base, is built with `kubectl kustomize`. The objects are checked against
the schemas of all supported Kubernetes versions and of the CRDs used, strictly: an unknown field is an error. Then come the checks that
schemas cannot express: referenced objects exist, images are pinned, pods keep to `restricted`.

The manifests of other projects (k8s/vendor) are checked as part of the overlays. With `--checkov` that program checks the objects as well;
its exceptions are in .checkov.yaml, each with its reason.
"""

import argparse
import functools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import kubernetes_validate
import yaml

from k8s.kubectl import K8sObject, Kubectl
from k8s.manifests import BUILD_SECONDS, OVERLAY_PARTS
from ns.core.errors import ClusterError
from pipelines import load_yaml_documents

HERE = Path(__file__).parent
VERSIONS = ("1.33", "1.34", "1.35", "1.36")
"""Versions of Kubernetes on which the authors of Kubeflow Pipelines 2.17 test it."""

EXTERNAL_OBJECTS = {
    ("ServiceAccount", "pipeline-runner"): "Kubeflow Pipelines' own, as which runs run",
    ("ServiceAccount", "default-editor"): "the same in a profile's namespace, of a Kubeflow with users",
    ("Secret", "mlpipeline-minio-artifact"): "the keys of the object store",
}
"""What manifests refer to and do not contain: docs/security.md tells users of it."""
KUBERNETES_OBJECTS = frozenset(
    {("ServiceAccount", "default"), ("ConfigMap", "kube-root-ca.crt"), ("Role", "extension-apiserver-authentication-reader")}
)
"""What every cluster has, in all namespaces or in kube-system."""


# It reads the definitions of all kinds, megabytes, again for each object.
kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)


class ManifestProblem(NamedTuple):
    location: str
    """Built folder, object, and field."""
    problem: str

    def __str__(self) -> str:
        return f"{self.location}: {self.problem}"


# --- building


def build_folder(folder: Path) -> list[K8sObject]:
    """Returns the objects of a kustomization. Raises ClusterError with kustomize's reason."""
    text = Kubectl().run_command("kustomize", str(folder), seconds=BUILD_SECONDS)
    return [resource for resource in load_yaml_documents(text) if resource]


def find_overlay_folders(root: Path) -> Iterator[Path]:
    """Yields the parts of every overlay."""
    for overlay in sorted((root / "overlays").iterdir()):
        yield from (overlay / part for part in OVERLAY_PARTS if (overlay / part / "kustomization.yaml").exists())


def find_components(root: Path) -> Iterator[Path]:
    """Yields the components of our own objects, without those that are only for the parts cluster/ and kubeflow/."""
    for file in sorted((root / "components").rglob("kustomization.yaml")):
        if "kubeflow" not in file.parts and yaml.safe_load(file.read_text())["kind"] == "Component":
            yield file.parent


def isolate_component(root: Path, component: Path) -> Path:
    """Makes a folder in `root` with a kustomization of the base and one component."""
    folder = root / "alone" / component.relative_to(root / "components")
    folder.mkdir(parents=True)
    up = "/".join([".."] * len(folder.relative_to(root).parts))
    kustomization = {"resources": [f"{up}/base"], "components": [f"{up}/{component.relative_to(root).as_posix()}"]}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return folder


def find_remote_resources(root: Path) -> Iterator[ManifestProblem]:
    """Yields what kustomizations would fetch from the network while an overlay is built."""
    for file in sorted(root.rglob("kustomization.yaml")):
        kustomization = yaml.safe_load(file.read_text())
        for field in ("resources", "components"):
            for url in kustomization.get(field) or []:
                if not (file.parent / url).exists():
                    yield ManifestProblem(
                        f"{file.relative_to(root)} {field}", f"{url} is not in this folder; `make vendor` renders it"
                    )


# --- schemas


def find_schema_errors(resource: K8sObject) -> tuple[tuple[str, str], ...]:
    """Returns what the schemas refuse: field, and reason with the versions of Kubernetes if not all refuse it."""
    # Most objects are in several overlays.
    return _find_schema_errors(json.dumps(resource))


@functools.cache
def _find_schema_errors(text: str) -> tuple[tuple[str, str], ...]:
    resource = json.loads(text)
    return tuple(_iterate_schema_errors(resource))


def _iterate_schema_errors(resource: K8sObject) -> Iterator[tuple[str, str]]:
    kind, (group, _, api_version) = resource["kind"], resource["apiVersion"].rpartition("/")
    crd_schema = HERE / "schemas" / group / f"{kind}-{api_version}.json"
    if crd_schema.exists():
        for error in jsonschema.Draft202012Validator(json.loads(crd_schema.read_text())).iter_errors(resource):
            # Of alternatives, the nearest one says what is wrong.
            yield _describe_error(jsonschema.exceptions.best_match([error]))
        # CRDs leave the metadata to Kubernetes.
        resource = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": resource["metadata"]}
    versions_by_error: dict[tuple[str, str], list[str]] = {}
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(resource, version, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            versions_by_error.setdefault(("kind", f"no schema has {resource['apiVersion']} {kind}"), []).append(version)
        except kubernetes_validate.ValidationError as error:
            versions_by_error.setdefault(_describe_error(error), []).append(version)
    for (field, reason), versions in versions_by_error.items():
        yield field, reason if len(versions) == len(VERSIONS) else f"{reason} (Kubernetes {', '.join(versions)})"


def _describe_error(error: Any) -> tuple[str, str]:
    return ".".join(map(str, error.absolute_path)) or "it", error.message[:300]


# --- what schemas cannot express


def walk_objects(value: Any, path: str = "") -> Iterator[tuple[str, K8sObject]]:
    """Yields every object in a value with its path."""
    if isinstance(value, dict):
        yield path, value
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from walk_objects(inner, f"{path}.{key}".removeprefix("."))


def list_containers(pod: K8sObject) -> Iterator[K8sObject]:
    for kind in ("initContainers", "containers", "ephemeralContainers"):
        yield from pod.get(kind) or []


ALLOWED_VOLUMES = frozenset(
    {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
)


def find_restricted_violations(pod: K8sObject) -> Iterator[str]:
    """Yields what the Pod Security Standard `restricted` does not allow in a pod (kubernetes.io/docs/concepts/security)."""
    pod_security = pod.get("securityContext") or {}
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(field):
            yield f"{field} must not be set"
    for volume in pod.get("volumes") or []:
        for kind in set(volume) - {"name"} - ALLOWED_VOLUMES:
            yield f"volume {volume['name']} must not be a {kind}"
    for container in list_containers(pod):
        security = container.get("securityContext") or {}
        capabilities = security.get("capabilities") or {}
        seccomp = security.get("seccompProfile") or pod_security.get("seccompProfile") or {}
        rules = {
            "must have allowPrivilegeEscalation: false": security.get("allowPrivilegeEscalation") is False,
            "must not be privileged": not security.get("privileged"),
            "must drop the capabilities ALL": "ALL" in capabilities.get("drop", []),
            "must not add capabilities": set(capabilities.get("add", [])) <= {"NET_BIND_SERVICE"},
            "must have runAsNonRoot: true": security.get("runAsNonRoot", pod_security.get("runAsNonRoot")) is True,
            "must not have runAsUser: 0": security.get("runAsUser", pod_security.get("runAsUser")) != 0,
            "must have seccompProfile.type: RuntimeDefault": seccomp.get("type") in ("RuntimeDefault", "Localhost"),
            "must not have a hostPort": not any(port.get("hostPort") for port in container.get("ports") or []),
        }
        yield from (f"{container['name']} {rule}" for rule, holds in rules.items() if not holds)


def is_pinned(image: str) -> bool:
    """Whether an image names its version: a digest, or a tag with a number in it."""
    if "@" in image:
        return bool(re.search(r"@sha256:[0-9a-f]{64}$", image))
    return bool(re.search(r"\d", image.rpartition("/")[2].partition(":")[2]))


REFERENCES = {
    **dict.fromkeys(("secret", "secretRef", "secretKeyRef"), "Secret"),
    **dict.fromkeys(("configMap", "configMapRef", "configMapKeyRef"), "ConfigMap"),
    "persistentVolumeClaim": "PersistentVolumeClaim",
}
"""Field of a pod's volumes and variables → the kind to which it refers."""


def find_references(pod: K8sObject) -> Iterator[tuple[str, str]]:
    """Yields kind and name of the objects without which a pod cannot start."""
    if account := pod.get("serviceAccountName"):
        yield "ServiceAccount", account
    for secret in pod.get("imagePullSecrets") or []:
        yield "Secret", secret["name"]
    for _, around in walk_objects([pod.get("volumes") or [], *list_containers(pod)]):
        for field in REFERENCES.keys() & around.keys():
            reference = around[field]
            if not reference.get("optional"):
                name = next(reference[key] for key in ("name", "secretName", "claimName") if key in reference)
                yield REFERENCES[field], name


def collect_available(objects: Iterable[K8sObject]) -> set[tuple[str, str]]:
    """Returns kind and name of what exists once the objects are applied, including what comes from elsewhere."""
    applied = {(resource["kind"], resource["metadata"]["name"]) for resource in objects if "name" in resource["metadata"]}
    # An operator makes the secret.
    generated = {("Secret", name) for kind, name in applied if kind == "ExternalSecret"}
    return applied | generated | set(EXTERNAL_OBJECTS) | KUBERNETES_OBJECTS


def check_objects(objects: list[K8sObject], location: str, others: Iterable[K8sObject] = ()) -> Iterator[ManifestProblem]:
    """Yields all that is wrong with objects that are applied together, after `others`."""
    available = collect_available([*objects, *others])
    for resource in objects:
        name = f"{location} {resource['kind']}/{resource['metadata'].get('name', '')}"
        for field, reason in find_schema_errors(resource):
            yield ManifestProblem(f"{name} {field}", reason)
        if resource["kind"] in ("RoleBinding", "ClusterRoleBinding"):
            for subject in [*(resource.get("subjects") or []), resource["roleRef"]]:
                reference = (subject["kind"], subject["name"])
                if reference[0] not in ("User", "Group") and reference not in available:
                    yield ManifestProblem(name, f"there is no {'/'.join(reference)}")
        if resource["kind"] == "CustomResourceDefinition":
            continue
        pods = [(path, inner) for path, inner in walk_objects(resource) if isinstance(inner.get("containers"), list)]
        for path, pod in pods:
            for reference in sorted(set(find_references(pod)) - available):
                yield ManifestProblem(f"{name} {path}", f"there is no {'/'.join(reference)}")
            for container in list_containers(pod):
                if not is_pinned(image := container.get("image", "")):
                    yield ManifestProblem(f"{name} {path}", f"image {image} is not pinned; give its version or digest")
            for reason in find_restricted_violations(pod):
                yield ManifestProblem(f"{name} {path}", f"{reason} (pod security `restricted`)")


def build_all(root: Path) -> tuple[dict[str, list[K8sObject]], list[ManifestProblem]]:
    """Builds every part of every overlay, every component alone, and every example.

    Returns the objects by folder, and what cannot be built.
    """
    built: dict[str, list[K8sObject]] = {}
    problems = list(find_remote_resources(root))
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "k8s"
        shutil.copytree(root, copy)
        folders = [*find_overlay_folders(copy), *(isolate_component(copy, item) for item in find_components(copy))]
        with ThreadPoolExecutor() as threads:
            for folder, objects in zip(folders, threads.map(_try_build, folders), strict=True):
                location = folder.relative_to(copy).as_posix()
                if isinstance(objects, ClusterError):
                    problems.append(ManifestProblem(location, str(objects).replace(str(copy), "k8s")))
                else:
                    built[location] = objects
        for file in sorted((copy / "examples").rglob("*.yaml")):
            built[file.relative_to(copy).as_posix()] = [*load_yaml_documents(file.read_text())]
    return built, problems


def _try_build(folder: Path) -> list[K8sObject] | ClusterError:
    try:
        return build_folder(folder)
    except ClusterError as error:
        return error


def validate_manifests(built: dict[str, list[K8sObject]]) -> Iterator[ManifestProblem]:
    """Yields what is wrong with built objects. A part of an overlay may refer to objects of another part."""
    overlays: dict[str, list[K8sObject]] = {}
    for location, objects in built.items():
        overlays.setdefault("/".join(location.split("/")[:2]), []).extend(objects)
    for location, objects in built.items():
        beside = overlays["/".join(location.split("/")[:2])] if location.startswith("overlays/") else []
        yield from check_objects(objects, location, beside)


def run_checkov(built: dict[str, list[K8sObject]], checkov: str) -> int:
    """Runs checkov on built objects, with its output on standard output. Returns its exit code."""
    with tempfile.TemporaryDirectory() as scratch:
        for location, objects in built.items():
            file = Path(scratch) / (location.removesuffix(".yaml").replace("/", "_") + ".yaml")
            file.write_text(yaml.safe_dump_all(objects))
        command = [checkov, "--config-file", str(HERE / ".checkov.yaml"), "--directory", scratch]
        return subprocess.run(command).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the manifests against Kubernetes' schemas and our own rules.")
    parser.add_argument("folder", nargs="?", type=Path, default=HERE, help="folder with base, components and overlays")
    parser.add_argument("--checkov", metavar="PROGRAM", help="run checkov on the objects, too")
    options = parser.parse_args()
    built, problems = build_all(options.folder)
    problems = sorted({*problems, *validate_manifests(built)})
    for problem in problems:
        sys.stderr.write(f"error: {problem}\n")
    object_count = sum(len(objects) for objects in built.values())
    sys.stdout.write(f"{object_count} objects, Kubernetes {VERSIONS[0]} to {VERSIONS[-1]}: {len(problems)} errors\n")
    checkov_code = run_checkov(built, options.checkov) if options.checkov else 0
    return 1 if problems or checkov_code else 0


if __name__ == "__main__":
    sys.exit(main())
