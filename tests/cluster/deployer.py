"""Deploys an overlay into another namespace: `python -m tests.cluster.deployer CONTEXT OVERLAY NAMESPACE`.

All is `make deploy`'s, but: nothing that belongs to the whole cluster is applied but the namespace, so that a deployment beside it stays as
it is; kinds that the cluster does not know are left out; claims are bound to no volume; and nobody waits for pods, whose images the cluster
may not have.
"""

import sys

from k8s import deploy, manifests
from k8s.deploy import DeployOptions
from k8s.kubectl import Kubectl

IMAGES = ("registry.example/noisy-student/worker:1", "registry.example/noisy-student/tools:1")
OVERLAY_NAMESPACES = ("kubeflow", "team-vision")


def list_kinds(kubectl: Kubectl) -> set[str]:
    """Kinds of the cluster that are in namespaces."""
    lines = kubectl.run_command("api-resources", "--namespaced=true", "--no-headers").splitlines()
    return {line.split()[-1] for line in lines}


def move_objects(objects, namespace: str, kinds: set[str]):
    """The namespaced objects of an overlay, and its namespace, under another name."""
    for item in objects:
        meta = item["metadata"]
        if item["kind"] == "Namespace" and meta["name"] in OVERLAY_NAMESPACES:
            yield {**item, "metadata": {**meta, "name": namespace}}
        elif item["kind"] in kinds and meta.get("namespace") in OVERLAY_NAMESPACES:
            item = {**item, "metadata": {**meta, "namespace": namespace}}
            if "subjects" in item:
                item["subjects"] = [
                    {**subject, "namespace": namespace} if subject.get("namespace") in OVERLAY_NAMESPACES else subject
                    for subject in item["subjects"]
                ]
            claims = [item] if item["kind"] == "PersistentVolumeClaim" else item.get("spec", {}).get("volumeClaimTemplates", [])
            for claim in claims:
                claim["spec"]["storageClassName"] = ""
            yield item


def deploy_moved(context: str, overlay: str, namespace: str, say, **options) -> deploy.Release:
    """Deploys an overlay into `namespace`."""
    render_overlay, kinds = manifests.render_overlay, list_kinds(Kubectl(context))

    def render_moved(kubectl, name, images, without=()):
        rendered = render_overlay(kubectl, name, images, without)
        return rendered._replace(objects=tuple(move_objects(rendered.objects, namespace, kinds)))

    replaced = {
        (deploy.manifests, "render_overlay"): render_moved,
        (deploy, "wait_until_ready"): lambda *arguments: None,
        (deploy, "_upload_pipelines"): lambda *arguments: {},
        (deploy.Release, "load_all"): lambda kubectl: load_releases(kubectl, namespace),
    }
    originals = {(owner, name): owner.__dict__[name] for owner, name in replaced}
    for (owner, name), value in replaced.items():
        setattr(owner, name, value)
    try:
        return deploy.deploy_overlay(
            DeployOptions(overlay, context, images=IMAGES, preflight=False, smoke=False, yes=True, **options), say, None, print
        )
    finally:
        for (owner, name), value in originals.items():
            setattr(owner, name, value)


_load_all = deploy.Release.load_all


def load_releases(kubectl: Kubectl, namespace: str) -> dict[str, deploy.Release]:
    """The release in one namespace: others on the cluster are none of the test's business."""
    return {name: release for name, release in _load_all(kubectl).items() if name == namespace}


def main() -> int:
    deploy_moved(*sys.argv[1:4], say=lambda text: print(text, flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
