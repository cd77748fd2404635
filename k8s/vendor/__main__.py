"""Renders manifests of other projects into this folder: `python -m k8s.vendor [--repository OWNER/NAME=PATH …]`, as `make vendor` does.

Each source is a release of a repository, taken from a git repository on this machine or from GitHub. What its kustomizations take from
GitHub is taken from the other sources. Nothing is changed but this: objects that are not needed are left out, and CRDs lose their
descriptions. Patches of ours are in k8s/components.
"""

import argparse
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from k8s.kubectl import K8sObject, Kubectl
from k8s.manifests import ObjectKey, apply_position
from ns.core.errors import ClusterError, ConfigError
from pipelines import load_yaml_documents

HERE = Path(__file__).parent
REMOTE_RESOURCE = re.compile(
    r"https://github\.com/(?P<repository>argoproj/argo-workflows|kubernetes-sigs/jobset)/"
    r"(?:releases/download/(?P<tag>[\w.-]+)/manifests\.yaml|(?P<path>[\w./-]+)\?ref=(?P<ref>[\w.-]+)(?:&[\w=&]+)?)"
)


class Source(NamedTuple):
    """A release of a repository."""

    tag: str
    folders: tuple[str, ...]
    """Folders that are taken from it, besides its license."""
    release_folder: str = ""
    """Kustomization from which the project renders the manifests.yaml of a release."""


SOURCES = {
    "kubeflow/pipelines": Source("2.17.0", ("manifests/kustomize",)),
    "argoproj/argo-workflows": Source("v4.0.5", ("manifests/base", "manifests/namespace-install")),
    "kubeflow/trainer": Source("v2.3.0", ("manifests",)),
    "kubernetes-sigs/jobset": Source("v0.12.0", ("config",), "config/default"),
    "kubernetes-sigs/kueue": Source("v0.19.2", ("config",)),
}

# Kubeflow Pipelines 2 uses none of these. ml-pipeline wants to know where visualizations are, though: k8s/components/kubeflow.
UNUSED_PARTS = (
    # A webhook for pods of version 1; version 2 looks its cache up in the API server. EKS refuses the signer of its certificate.
    r"kubeflow-pipelines-cache.*|cache-(deployer-deployment|server)",
    # It skips the pods of version 2 (metadata_writer.py: is_kfp_v2_pod).
    r"(kubeflow-pipelines-)?metadata-writer.*",
    # Only the API of version 1 has CreateVisualization.
    r"ml-pipeline-visualizationserver",
    # TensorBoards, and images, of version 1.
    r"ml-pipeline-viewer-.*|viewers\.kubeflow\.org|kubeflow-pipelines-(viewer|container-builder)",
    # Its controller does not belong to this installation.
    r"applications\.app\.k8s\.io",
)
# The base and the components object-store and external-s3 have their own.
REPLACED_PARTS = (r"kubeflow", r"seaweedfs(-pvc)?", r"mlpipeline-minio-artifact", r"kfp-cluster-scoped-params")


class Bundle(NamedTuple):
    """A folder beside this file."""

    folders: tuple[tuple[str, str], ...]
    """Repository, and kustomization in it."""
    omitted: tuple[str, ...] = ()
    """Patterns of names of objects that are left out."""
    images: Mapping[str, str] = {}
    """Image in the repository → that of the release, where a project names it only when it makes a release."""


BUNDLES = {
    "kubeflow-pipelines": Bundle(
        (
            ("kubeflow/pipelines", "manifests/kustomize/cluster-scoped-resources"),
            ("kubeflow/pipelines", "manifests/kustomize/env/platform-agnostic"),
        ),
        UNUSED_PARTS + REPLACED_PARTS,
    ),
    "kueue": Bundle(
        (("kubernetes-sigs/kueue", "config/default"),),
        images={"us-central1-docker.pkg.dev/k8s-staging-images/kueue/kueue:main": "registry.k8s.io/kueue/kueue:v0.19.2"},
    ),
    "trainer": Bundle((("kubeflow/trainer", "manifests/overlays/manager"),)),
}


def export_source(repository: str, checkout: Path, folder: Path) -> None:
    """Writes the folders of a source, as they are at its tag in a git repository. Raises ConfigError if that lacks them."""
    source = SOURCES[repository]
    command = ["git", "-C", str(checkout), "archive", source.tag, "LICENSE", *source.folders]
    process = subprocess.run(command, capture_output=True)
    if process.returncode:
        reason = process.stderr.decode().strip().splitlines()[-1]
        raise ConfigError(f"{repository}: {checkout} does not have its {source.tag}: {reason}; name a clone that has it")
    folder.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(process.stdout)) as archive:
        archive.extractall(folder, filter="data")


def clone_source(repository: str, folder: Path) -> None:
    """Clones a source from GitHub. Raises ClusterError."""
    command = ["git", "clone", "--quiet", "--bare", "--depth=1", f"--branch={SOURCES[repository].tag}"]
    if subprocess.run([*command, f"https://github.com/{repository}", str(folder)]).returncode:
        raise ClusterError(f"github.com/{repository}: cannot be cloned; name a clone of yours: --repository {repository}=PATH")


def link_sources(root: Path) -> None:
    """Lets the kustomizations below `root`/OWNER/NAME take from each other what they take from GitHub.

    Raises ConfigError for a source whose version is not the pinned one.
    """
    for file in sorted(root.rglob("kustomization.yaml")):

        def localize_url(match: re.Match[str], file: Path = file) -> str:
            source = SOURCES[match["repository"]]
            if source.tag != (match["tag"] or match["ref"]):
                raise ConfigError(f"{file.relative_to(root)}: {match[0]} is not the pinned {source.tag}; change SOURCES")
            return os.path.relpath(root / match["repository"] / (match["path"] or source.release_folder), file.parent)

        file.write_text(REMOTE_RESOURCE.sub(localize_url, file.read_text()))


def render_bundle(bundle: Bundle, root: Path) -> list[K8sObject]:
    """Returns the objects of a bundle from the sources below `root`, in the order in which they are applied."""
    kubectl, objects = Kubectl(), []
    for repository, folder in bundle.folders:
        text = kubectl.run_command("kustomize", str(root / repository / folder))
        for old, new in bundle.images.items():
            text = text.replace(f"image: {old}\n", f"image: {new}\n")
        objects += [resource for resource in load_yaml_documents(text) if resource]
    omitted = re.compile("|".join(bundle.omitted) or "$^")
    kept = [resource for resource in objects if not omitted.fullmatch(resource["metadata"]["name"])]
    for resource in kept:
        if resource["kind"] == "CustomResourceDefinition":
            for version in resource["spec"]["versions"]:
                version["schema"] = strip_descriptions(version["schema"])
    return sorted(kept, key=lambda resource: apply_position(ObjectKey.from_object(resource)))


def strip_descriptions(schema: Any) -> Any:
    """A schema without descriptions, which are most of it."""
    if isinstance(schema, list):
        return [strip_descriptions(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        # A field may be called so, too.
        name: {field: strip_descriptions(inner) for field, inner in value.items()}
        if name == "properties"
        else strip_descriptions(value)
        for name, value in schema.items()
        if name != "description"
    }


class BlockDumper(yaml.SafeDumper):
    """Writes texts of several lines as such, so that changes of them can be reviewed."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


BlockDumper.add_representer(str, _represent_text)


def write_bundle(name: str, root: Path, folder: Path) -> int:
    """Writes a bundle into `folder`. Returns the number of its objects."""
    objects = render_bundle(BUNDLES[name], root)
    folder.mkdir(exist_ok=True)
    sources = ", ".join(sorted({f"{repository} {SOURCES[repository].tag}" for repository, _ in BUNDLES[name].folders}))
    head = f"# Rendered by `make vendor` from {sources}; README.md says what is left out. Do not edit: k8s/components patches it.\n"
    (folder / "objects.yaml").write_text(head + yaml.dump_all(objects, Dumper=BlockDumper, sort_keys=False, width=120))
    kustomization = "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources:\n  - objects.yaml\n"
    (folder / "kustomization.yaml").write_text(kustomization)
    return len(objects)


def main() -> int:
    parser = argparse.ArgumentParser(description="Render the manifests of other projects into k8s/vendor.")
    parser.add_argument(
        *("--repository", "-r"),
        action="append",
        default=[],
        metavar="OWNER/NAME=PATH",
        help="a git repository with the tag, instead of a clone from GitHub; repeatable",
    )
    parser.add_argument("--output", type=Path, default=HERE, help="folder to write into")
    options = parser.parse_args()
    given = dict(item.split("=", 1) for item in options.repository)
    try:
        if unknown := sorted(given.keys() - SOURCES.keys()):
            raise ConfigError(f"--repository {unknown[0]}: is no source; choose one of {', '.join(SOURCES)}")
        with tempfile.TemporaryDirectory() as scratch:
            root = Path(scratch) / "exported"
            for repository in SOURCES:
                checkout = Path(given.get(repository) or Path(scratch) / "clones" / repository)
                if repository not in given:
                    clone_source(repository, checkout)
                export_source(repository, checkout, root / repository)
            link_sources(root)
            for name in BUNDLES:
                count = write_bundle(name, root, options.output / name)
                sys.stdout.write(f"{name}: {count} objects\n")
            for repository in SOURCES:
                license_file = options.output / "licenses" / f"{repository.replace('/', '-')}.txt"
                license_file.parent.mkdir(exist_ok=True)
                license_file.write_bytes((root / repository / "LICENSE").read_bytes())
    except (ConfigError, ClusterError) as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
