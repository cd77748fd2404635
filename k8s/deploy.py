"""Deploys the platform to a cluster and removes it: check, build images, apply, wait, upload the pipelines, run the quickstart.

Every step can be repeated and skips what is done: the same command continues a deployment that was stopped.
"""

import base64
import contextlib
import json
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

from images import build
from k8s import doctor, images, manifests
from k8s.access import open_cluster_access
from k8s.changes import ABSENT_WEBHOOKS, UNKNOWN_KIND, ClaimChange, DryRun, plan_claims, release_pods, try_objects
from k8s.dns import DNS_POLICY, find_dns_peers
from k8s.doctor import Requirements
from k8s.kubectl import ClusterUnreachableError, ForbiddenError, K8sObject, Kubectl, list_contexts
from k8s.manifests import DEFAULT_GPU_TYPE, ObjectKey, RenderedOverlay, make_list_object
from k8s.node_room import find_rooms, fit_resources
from k8s.pods import RunPods
from k8s.release import CONFIG_MAP_NAME, SERVER_SIDE, Release, merge_keys
from k8s.rollout import WorkloadRow, list_workload_rows, wait_until_ready
from ns import __version__
from ns.core.diagnostics import Diagnostic
from ns.core.errors import ClusterError, ConfigError, Interrupted, prefix_errors
from ns.core.log import StageEvent, format_duration
from ns.runs.records import utc_timestamp
from ns.storage import open_store
from pipelines import upload
from pipelines.kfp_client import KfpClient
from pipelines.placement import Placement, read_placement, render_package
from pipelines.remote_run import follow_run

KIND_CONTEXT_PREFIX = "kind-"
APPLY_SECONDS = 300
RETRY_SECONDS = 5.0
PATIENCE_SECONDS = 300.0
"""For an API server that restarts."""
# Temporary errors: a webhook whose pods are starting, a kind that the server has not registered yet.
TRANSIENT_ERRORS = (*ABSENT_WEBHOOKS, UNKNOWN_KIND, "ensure CRDs are installed")

KEPT_KINDS = ("Namespace", "CustomResourceDefinition", "PersistentVolume", "PersistentVolumeClaim", "Secret")
"""Kinds with data, and the keys to it: undeploying keeps them unless `delete_data`."""
PLACEMENT_CONFIG_MAP, PLACEMENT_KEY = "noisy-student-pools", "inputs.json"
"""The ConfigMap, and its key, with the defaults of the run form on this cluster."""
UPLOADER = "upload-pipelines"
"""The CronJob that uploads the pipelines again if Kubeflow loses them."""

SMOKE_EXPERIMENT = "noisy-student-smoke"
SMOKE_INPUTS: dict[str, Any] = {
    "config": "quickstart",
    # A shorter teacher is unsure of every image, and no label is selected.
    "overrides": ["generations=1", "teacher.train.epochs=100", "students.0.train.epochs=10", "labeling.tasks=1"],
}
"""Inputs of the run that tests the deployment."""
SMOKE_PLACEMENT: dict[str, Any] = {
    f"{pool}_{name}": value
    for pool in ("label", "train")
    for name, value in {"gpus": "0", "cpu": "1", "memory": "4Gi", "node_selector": {}, "tolerations": []}.items()
}
"""Where it runs: it tests the platform, not the GPUs, and must not wait for eight of them."""

Say = Callable[[str], None]
Ask = Callable[[str], bool]


@dataclass(frozen=True)
class DeployOptions:
    """The options of `make deploy`."""

    overlay: str = ""
    """Empty: the deployed one, or `kind` on a local cluster and `dev` on others."""
    context: str = ""
    """Empty: the current one, after a question."""
    registry: str = ""
    """Registry to push images to; local clusters need none."""
    images: Sequence[str] = ()
    """Names of existing images; if given, none is built."""
    worker: str = ""
    """Target of the image of the stages; empty: worker on local clusters, worker-cuda (which also runs on CPUs) on others."""
    without: Sequence[str] = ()
    """Parts of the overlay that the cluster already has: cluster, kubeflow."""
    build: Sequence[str] = ()
    """Options for images/build.py."""
    yes: bool = False
    """True: ask nothing."""
    preflight: bool = True
    smoke: bool = True
    force_conflicts: bool = False
    ready_seconds: float = 1200
    """Time for all workloads to become ready: nodes pull gigabytes of images."""


class DeployTarget(NamedTuple):
    """The cluster and the overlay of a command."""

    kubectl: Kubectl
    context: str
    overlay: str
    releases: dict[str, Release]
    """Namespace of runs → release: the platform, and the namespaces of teams."""

    @property
    def local(self) -> str | None:
        """Name of the local cluster; None for others."""
        return self.context.removeprefix(KIND_CONTEXT_PREFIX) if self.context.startswith(KIND_CONTEXT_PREFIX) else None

    def find_release(self) -> tuple[Release | None, str]:
        """Returns the release of the overlay and its namespace; None if it is not deployed."""
        deployed = ((release, namespace) for namespace, release in self.releases.items() if release.overlay == self.overlay)
        return next(deployed, (None, ""))


def choose_target(options: DeployOptions, doing: str, ask: Ask | None) -> DeployTarget:
    """Chooses the cluster and the overlay, and asks for confirmation if either is not certain.

    `doing`: the action in the question, as `Deploy`. `ask`: puts a question to the user; None if nobody can answer. Raises ConfigError
    for a context that does not exist, or if nobody can answer; Interrupted if the answer is no.
    """
    names, current = list_contexts()
    context_hint = (
        f"choose one of {', '.join(names)}" if names else "the kubeconfig has none; `make cluster` creates a local cluster"
    )
    context = options.context or current
    if not context:
        raise ConfigError(f"KUBE_CONTEXT is not given, and no context is the current one; {context_hint}")
    if context not in names:
        raise ConfigError(f"KUBE_CONTEXT={context}: there is no such context; {context_hint}")
    kubectl = Kubectl(context)
    releases = Release.load_all(kubectl)
    deployed = sorted(release.overlay for release in releases.values())
    if not options.overlay and len(deployed) > 1:
        raise ConfigError(
            f"OVERLAY is not given, and several are deployed on {context}: {', '.join(deployed)}; give one of them"
        )
    overlay = options.overlay or next(iter(deployed), "kind" if context.startswith(KIND_CONTEXT_PREFIX) else "dev")
    doubts = []
    if not options.context:
        doubts.append(f"KUBE_CONTEXT is not given, and {context} ({kubectl.server_url()}) is the current one")
    if overlay == "kind" and not context.startswith(KIND_CONTEXT_PREFIX):
        doubts.append(f"overlay kind is for local clusters, and {context} is not one")
    _confirm_doubts(doubts, f"{doing} {overlay} on {context}?", options, ask)
    return DeployTarget(kubectl, context, overlay, releases)


def _confirm_doubts(doubts: Sequence[str], question: str, options: DeployOptions, ask: Ask | None) -> None:
    """Raises ConfigError if there are doubts and nobody can answer, Interrupted if the answer is no."""
    if not doubts or options.yes:
        return
    reason = "; ".join(doubts)
    if ask is None:
        raise ConfigError(f"{reason}; there is no terminal to ask on: give KUBE_CONTEXT and OVERLAY, or --yes")
    if not ask(f"{reason}. {question}"):
        raise Interrupted("nothing was changed")


def deploy_overlay(options: DeployOptions, say: Say, ask: Ask | None, show: Callable[[list[Diagnostic]], None]) -> Release:
    """Deploys an overlay to a cluster, and returns the release.

    Raises ClusterError if the cluster lacks something or refuses, ConfigError for unusable options, RunError if Kubeflow or the smoke
    run fails. What was done so far stays, and the same call continues.
    """
    target = choose_target(options, "Deploy", ask)
    kubectl = target.kubectl
    names, rendered = _render_target(target, options, say)
    release = target.releases.get(rendered.namespace)
    if release and release.overlay != target.overlay:
        doubt = f"overlay {release.overlay} is deployed in {rendered.namespace} on {target.context}, not {target.overlay}"
        _confirm_doubts([doubt], "Continue?", options, ask)
    say(f"{target.overlay} on {target.context}: {len(rendered.objects)} objects in {', '.join(rendered.namespaces)}")
    if release and release.state == "under way":
        say(f"continues the deployment of {release.changed_at}, which did not finish")
    # Refuses unknown inputs before anything is changed.
    packages = upload.load_packages(
        rendered.read_config_map(PLACEMENT_CONFIG_MAP).get(PLACEMENT_KEY, ""),
        f"ConfigMap {rendered.namespace}/{PLACEMENT_CONFIG_MAP}: {PLACEMENT_KEY}",
    )
    if options.preflight:
        _run_preflight(kubectl, rendered, show)
    kubectl.patience_seconds = PATIENCE_SECONDS
    remade = _plan_changes(kubectl, rendered, options, say)
    if not options.images:
        images.provide_images(names, say, cluster=target.local, options=options.build)
    release = _apply_overlay(kubectl, rendered, release, names[images.WORKER_IMAGE_NAME], remade, options, say)
    if options.preflight:
        _check_names(kubectl, rendered.namespace, show)
    # The namespace of a team uses the pipelines of the platform.
    if any((key.kind, key.name) == ("CronJob", UPLOADER) for key in rendered.keys):
        uploaded = _upload_pipelines(kubectl, rendered.namespace, packages, options, say)
        release = release.model_copy(update={"pipelines": uploaded})
    return _save_release(kubectl, rendered.namespace, release, state="complete")


def _save_release(kubectl: Kubectl, namespace: str, release: Release, **changes: Any) -> Release:
    release = release.model_copy(update={**changes, "changed_at": utc_timestamp()})
    release.save(kubectl, namespace)
    return release


def _upload_pipelines(
    kubectl: Kubectl, namespace: str, packages: Sequence[str], options: DeployOptions, say: Say
) -> dict[str, str]:
    """Uploads the pipelines, and runs the smoke run. Returns name → version."""
    uploaded = {}
    with open_cluster_access(kubectl, namespace, say) as url:
        client = KfpClient(url, patience_seconds=PATIENCE_SECONDS)
        for package in packages:
            pipeline = upload.upload_package(client, package)
            uploaded[pipeline.name] = pipeline.version
            say(f"pipeline {pipeline.name}: {pipeline.version}")
            if options.smoke and pipeline.name == "noisy-student":
                _run_smoke(client, kubectl, namespace, package, say)
    return uploaded


def _render_target(target: DeployTarget, options: DeployOptions, say: Say) -> tuple[dict[str, str], RenderedOverlay]:
    """Returns the names of the images, and the objects with these images."""
    worker = options.worker or ("worker" if target.local else "worker-cuda")
    names = images.plan_images(options.registry, options.images, worker, local=target.local is not None, options=options.build)
    rendered = manifests.render_overlay(target.kubectl, target.overlay, names, options.without)
    if any(key.kind == "NetworkPolicy" and key.name == DNS_POLICY for key in rendered.keys):
        rendered = rendered.with_dns_peers(find_dns_peers(target.kubectl))
    inputs = _read_inputs(rendered)
    rendered = rendered.with_gpu_type(inputs.get("gpu_type", DEFAULT_GPU_TYPE))
    filled = {**_find_queue(rendered), **inputs, **_fit_resources(target.kubectl, rendered, inputs, say)}
    # Kustomize sets images of containers only; those of the run form are inputs.
    return names, rendered.with_inputs(
        PLACEMENT_CONFIG_MAP,
        PLACEMENT_KEY,
        {**filled, "worker_image": names[images.WORKER_IMAGE_NAME], "tools_image": names[images.TOOLS_IMAGE_NAME]},
    )


def _read_inputs(rendered: RenderedOverlay) -> dict[str, Any]:
    """The defaults of the run form that the overlay sets; none if they are not readable, which uploading the pipelines tells."""
    with contextlib.suppress(ValueError):
        value = json.loads(rendered.read_config_map(PLACEMENT_CONFIG_MAP).get(PLACEMENT_KEY) or "{}")
        return value if isinstance(value, dict) else {}
    return {}


def _find_queue(rendered: RenderedOverlay) -> dict[str, str]:
    """The queue of runs, if the overlay has one: without its name on their pods, Kueue never sees them."""
    queues = [key.name for key in rendered.keys if (key.kind, key.namespace) == ("LocalQueue", rendered.namespace)]
    return {"queue": queues[0]} if queues else {}


def _fit_resources(kubectl: Kubectl, rendered: RenderedOverlay, inputs: dict[str, Any], say: Say) -> dict[str, str]:
    """Returns CPUs and memory of trainings and labeling tasks where the pipeline's defaults fit no node, and says so."""
    try:
        nodes, pods = kubectl.list_objects("nodes"), kubectl.list_objects("pods")
    except ForbiddenError:
        return {}
    workloads = [item for key, item in zip(rendered.keys, rendered.objects, strict=True) if key in rendered.workloads]
    filled, lines = fit_resources(nodes, find_rooms(nodes, pods, workloads), inputs, asdict(Placement()))
    for line in lines:
        say(line)
    return filled


def _run_preflight(kubectl: Kubectl, rendered: RenderedOverlay, show: Callable[[list[Diagnostic]], None]) -> None:
    provided_parts = rendered.provided_parts()
    requirements = Requirements(rendered.namespace, rendered.required_parts(), provided_parts, rendered.required_permissions())
    findings = doctor.examine_cluster(kubectl, requirements)
    show([finding for finding in findings if not finding.ok])
    fatal = [finding.name for finding in findings if finding.is_fatal]
    if fatal:
        raise ClusterError(
            f"nothing was changed: {', '.join(fatal)}; fix what is reported above, or continue with --no-preflight"
        )


def _check_names(kubectl: Kubectl, namespace: str, show: Callable[[list[Diagnostic]], None]) -> None:
    """Raises ClusterError if pods of runs cannot look up names, with policies in force: each stage would wait, and fail."""
    findings = [finding for finding in doctor.diagnose_names(kubectl, namespace) if not finding.ok]
    show(findings)
    if any(finding.is_fatal for finding in findings):
        raise ClusterError("deployed, but runs would fail: fix what is reported above, then deploy again")


RemadeSets = dict[ObjectKey, list[ClaimChange]]
"""StatefulSets that are made again around their pods and volumes → what happens to their claims."""


def _plan_changes(kubectl: Kubectl, rendered: RenderedOverlay, options: DeployOptions, say: Say) -> RemadeSets:
    """Tries all objects by a dry run. Raises ClusterError, before anything is changed, if the cluster refuses one."""
    dry_run = try_objects(kubectl, rendered.objects, force=options.force_conflicts)
    remade = _find_remade_sets(kubectl, rendered, dry_run)
    # Jobs are deleted before they are applied.
    refused = [
        item for item in dry_run.refusals if item.key not in remade and not (item.is_immutable and item.key.kind == "Job")
    ]
    if refused:
        advice = "remove these fields from the overlay, or take them over with --force-conflicts"
        lines = [f"{item.key}: {item.reason}{f'; {advice}' if item.is_conflict else ''}" for item in refused]
        raise ClusterError("\n  ".join(["nothing was changed: the cluster refuses", *lines]))
    untried = f"; {len(dry_run.untried)} follow the namespace or the kind that comes with them" if dry_run.untried else ""
    say(f"the cluster takes all {len(rendered.objects) - len(dry_run.untried)} objects in a dry run{untried}")
    for line in _describe_remade_sets(remade):
        say(line)
    return remade


def _find_remade_sets(kubectl: Kubectl, rendered: RenderedOverlay, dry_run: DryRun) -> RemadeSets:
    keys = {item.key for item in dry_run.refusals if item.is_immutable and item.key.kind == "StatefulSet"}
    objects = zip(rendered.keys, rendered.objects, strict=True)
    return {key: plan_claims(kubectl, resource) for key, resource in objects if key in keys}


def _describe_remade_sets(remade: RemadeSets) -> Iterator[str]:
    for key, claims in remade.items():
        yield f"{key}: is made again around its pods and volumes, since its claims cannot be changed in place"
        yield from (f"{claim.key}: {claim.note}" for claim in claims)


def _apply_overlay(
    kubectl: Kubectl,
    rendered: RenderedOverlay,
    release: Release | None,
    worker_image: str,
    remade: RemadeSets,
    options: DeployOptions,
    say: Say,
) -> Release:
    """Applies all objects, deletes old ones, and waits for the workloads. Returns the release, still under way."""
    namespace = rendered.namespace
    preexisting = release.preexisting if release else _find_preexisting(kubectl, rendered)
    old = release.objects if release else ()
    release = Release(
        overlay=rendered.overlay,
        state="under way",
        version=__version__,
        revision=build.read_revision(build.CHECKOUT),
        changed_at=utc_timestamp(),
        worker_image=worker_image,
        objects=merge_keys(old, rendered.keys),
        preexisting=preexisting,
        pipelines=release.pipelines if release else {},
    )
    for number, (name, objects) in enumerate(rendered.split_phases()):
        say(f"apply {len(objects)} {name}")
        if name == "jobs":
            _clear_jobs(kubectl, objects, say)
        for key in map(ObjectKey.from_object, objects):
            if key in remade:
                release_pods(kubectl, key, remade[key])
        _apply_phase(kubectl, objects, options, say)
        if number == 0:
            definitions = [
                ObjectKey.from_object(resource).name for resource in objects if resource["kind"] == "CustomResourceDefinition"
            ]
            if definitions:
                kubectl.run_command(
                    "wait", "--for=condition=Established", "--timeout=60s", "customresourcedefinition", *definitions, seconds=90
                )
            # Now the namespace exists: the record of what to remove must precede the objects.
            release.save(kubectl, namespace)
            _provide_keys(kubectl, rendered, say)
        started = {"all else": rendered.workloads, "jobs": rendered.jobs}
        wait_until_ready(kubectl, started.get(name, ()), options.ready_seconds, say)
    for key in manifests.find_removed_keys(old, rendered.keys):
        if key.kind in KEPT_KINDS:
            say(f"{key}: is no longer in the overlay; kept, because it holds data")
        else:
            say(f"{key}: is no longer in the overlay; deleted")
            _delete_objects(kubectl, [key])
    kept = [key for key in release.objects if key.kind in KEPT_KINDS]
    return _save_release(kubectl, namespace, release, objects=merge_keys(kept, rendered.keys))


def _find_preexisting(kubectl: Kubectl, rendered: RenderedOverlay) -> tuple[ObjectKey, ...]:
    """Namespaces and kinds that existed before the first deployment."""
    plurals = ("namespaces", "customresourcedefinitions")
    existing = {ObjectKey.from_object(item).without_version() for plural in plurals for item in kubectl.list_objects(plural)}
    return tuple(key for key in rendered.keys if key.without_version() in existing)


def _apply_phase(kubectl: Kubectl, objects: Sequence[K8sObject], options: DeployOptions, say: Say) -> None:
    """Applies objects server-side, so that fields of other managers stay theirs. Retries temporary errors."""
    force_options = ["--force-conflicts"] if options.force_conflicts else []
    started = time.monotonic()
    while True:
        try:
            for line in kubectl.stream_lines(
                "apply", *SERVER_SIDE, *force_options, stdin=json.dumps(make_list_object(objects))
            ):
                say(f"  {line}")
            return
        except ClusterError as error:
            text = str(error)
            if "conflict" in text and not options.force_conflicts:
                raise ClusterError(
                    f"{text}; another manager owns these fields: remove them from the overlay, or take them over with --force-conflicts"
                ) from error
            is_transient = isinstance(error, ClusterUnreachableError) or any(mark in text for mark in TRANSIENT_ERRORS)
            if not is_transient or time.monotonic() - started > APPLY_SECONDS:
                raise
            say(f"  retry in {RETRY_SECONDS:g} s")
            time.sleep(RETRY_SECONDS)


def _provide_keys(kubectl: Kubectl, rendered: RenderedOverlay, say: Say) -> None:
    """Generates the keys of the overlay's object store, once. Raises ClusterError if the keys of another store are missing."""
    namespace = rendered.namespace
    names = {(key.kind, key.name) for key in rendered.keys}
    if ("Secret", doctor.STORAGE_SECRET) in names or kubectl.get_object("secret", doctor.STORAGE_SECRET, namespace):
        return
    if ("StatefulSet", "seaweedfs") not in names:
        raise ClusterError(
            f"there is no Secret {namespace}/{doctor.STORAGE_SECRET} with the keys of the store; kubectl -n {namespace} create "
            f"secret generic {doctor.STORAGE_SECRET} --from-literal=accesskey=… --from-literal=secretkey=…, then deploy again"
        )
    keys = {"accesskey": secrets.token_hex(10), "secretkey": secrets.token_urlsafe(30)}
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": doctor.STORAGE_SECRET,
            "namespace": namespace,
            "labels": {"app.kubernetes.io/part-of": "noisy-student"},
        },
        "data": {name: base64.b64encode(value.encode()).decode() for name, value in keys.items()},
    }
    # `create`, not `apply`: keys of a concurrent deployment must not be overwritten.
    kubectl.run_command("create", "--filename=-", stdin=json.dumps(secret))
    say(f"Secret {namespace}/{doctor.STORAGE_SECRET}: new keys for the object store")


def _clear_jobs(kubectl: Kubectl, objects: Sequence[K8sObject], say: Say) -> None:
    """Deletes Jobs whose pods would change, which Kubernetes does not allow."""
    for job in objects:
        key = ObjectKey.from_object(job)
        try:
            kubectl.run_command("apply", "--dry-run=server", *SERVER_SIDE, stdin=json.dumps(job))
        except ClusterError as error:
            if "immutable" not in str(error):
                raise
            say(f"{key}: has changed, and runs again")
            _delete_objects(kubectl, [key])


def _delete_objects(kubectl: Kubectl, keys: Sequence[ObjectKey], *, seconds: float = 120) -> None:
    """Deletes objects that exist, and waits until they are gone. Neighbors of one kind and namespace go in one call."""
    for (kind, namespace), group in groupby(
        keys, key=lambda key: (f"{key.kind}.{key.group}".rstrip(".").lower(), key.namespace)
    ):
        namespace_options = [f"--namespace={namespace}"] if namespace else []
        names = [key.name for key in group]
        try:
            kubectl.run_command(
                *("delete", kind, *names, *namespace_options, "--ignore-not-found", f"--timeout={seconds:g}s"),
                seconds=seconds + 10,
            )
        except ClusterError as error:
            # Its kind is gone, and the object with it.
            if "doesn't have a resource type" not in str(error):
                raise


def _run_smoke(client: KfpClient, kubectl: Kubectl, namespace: str, package: str, say: Say) -> None:
    """Runs the quickstart once per version of the pipeline. Raises RunError with stage, reason and cure if it fails."""
    placement = replace(read_placement(package), **SMOKE_PLACEMENT)
    package = render_package(package, placement, name=SMOKE_EXPERIMENT, generations=1)
    pipeline = client.upload_pipeline(package)
    name = f"smoke-{pipeline.version}"
    run = client.create_run(pipeline, {**SMOKE_INPUTS, "run": name}, name=name, experiment=SMOKE_EXPERIMENT)
    if not run.new and run.state == "SUCCEEDED":
        say(f"smoke run {name}: succeeded earlier")
        return
    say(f"smoke run {name}: {'started' if run.new else 'is under way'}")
    # Its own kubectl does not wait for an API server that restarts: the run is followed without it.
    pods = RunPods(Kubectl(kubectl.context), namespace, run.run_id, lambda text: say(f"  {text}"))
    with prefix_errors(f"smoke run {name}", "; `make ui` opens its pages; then deploy again"):
        follow_run(
            *(client, run, open_store(placement.root), name, lambda event: _say_event(event, say)),
            after_poll=pods.report_waiting,
            explain_pods=pods.explain_failures,
        )
    say(f"smoke run {name}: succeeded")


def _say_event(event: StageEvent, say: Say) -> None:
    generation = f"generation {event['generation']}: " if event.get("generation") else ""
    match event["event"]:
        case "noted":
            outcome = "reused" if event["reused"] else format_duration(event["seconds"])
            say(f"  {generation}{event['stage']}: {outcome}")
        case "failed":
            say(f"  {generation}{event['stage']}: failed: {event['reason']}")


def undeploy_overlay(options: DeployOptions, say: Say, ask: Ask | None, *, delete_data: bool = False) -> bool:
    """Removes what was deployed, and returns whether there was anything. Keeps data (KEPT_KINDS) unless `delete_data`.

    What existed before the first deployment is always kept. Raises ConfigError if nobody can answer a question, ClusterError if the
    cluster refuses; the same call continues.
    """
    target = choose_target(options, "Remove", ask)
    kubectl, (release, namespace) = target.kubectl, target.find_release()
    kubectl.patience_seconds = PATIENCE_SECONDS
    if release is None:
        say(f"nothing is deployed on {target.context}" + (f" of overlay {options.overlay}" if options.overlay else ""))
        return False
    doubts = []
    if running := [phase for phase in _workflow_phases(kubectl) if phase in ("Running", "Pending")]:
        doubts.append(f"{len(running)} runs are active, and would be stopped")
    if delete_data:
        names = sorted({key.namespace for key in release.objects if key.namespace})
        doubts.append(f"ALL DATA in {', '.join(names)} would be deleted")
    _confirm_doubts(doubts, f"Continue on {target.context}?", options, ask)
    preexisting = {key.without_version() for key in release.preexisting}
    ours = [key for key in release.objects if key.without_version() not in preexisting]
    deleted = [key for key in ours if delete_data or key.kind not in KEPT_KINDS]
    if release.state != "removed" or delete_data:
        release = _save_release(kubectl, namespace, release, state="under way")
    namespaces = [key for key in deleted if key.kind == "Namespace"]
    for _, group in groupby(
        manifests.sort_for_deletion(set(deleted) - set(namespaces)), key=lambda key: (key.kind, key.namespace)
    ):
        keys = list(group)
        for key in keys:
            say(f"{key}: deleting")
        _delete_objects(kubectl, keys)
    if delete_data:
        _delete_claims(kubectl, release, say)
        # The record is in one of the namespaces, and needed until the others are gone.
        for key in sorted(namespaces, key=lambda key: key.name == namespace):
            say(f"{key}: deleting")
            _delete_objects(kubectl, [key], seconds=600)
        _delete_objects(kubectl, [ObjectKey("v1", "ConfigMap", namespace, CONFIG_MAP_NAME)])
        return True
    kept = tuple(key for key in release.objects if key not in deleted)
    _save_release(kubectl, namespace, release, state="removed", objects=kept, pipelines={})
    say(f"{len(kept)} objects stay: those with data, and those that existed before; --delete-data deletes data too")
    return True


def _delete_claims(kubectl: Kubectl, release: Release, say: Say) -> None:
    """Deletes the volumes of StatefulSets, which no manifest names: NAME-SET-0."""
    for key in [key for key in release.objects if key.kind == "StatefulSet"]:
        for claim in kubectl.list_objects("persistentvolumeclaims", key.namespace):
            if re.fullmatch(rf".+-{re.escape(key.name)}-\d+", claim["metadata"]["name"]):
                say(f"{ObjectKey.from_object(claim)}: deleting")
                _delete_objects(kubectl, [ObjectKey.from_object(claim)])


def diff_overlay(options: DeployOptions, say: Say, ask: Ask | None) -> str:
    """Returns what `deploy` would change; empty if nothing.

    As `kubectl diff` shows it, and a line for each object that the cluster refuses (`!`), that comes with a new namespace or kind (`+`),
    or that is no longer in the overlay (`-`).
    """
    target = choose_target(options, "Compare", ask)
    _, rendered = _render_target(target, options, say)
    release = target.releases.get(rendered.namespace)
    if release is None:
        return "".join(f"+ {key}\n" for key in rendered.keys)
    dry_run = try_objects(target.kubectl, rendered.objects)
    remade = _find_remade_sets(target.kubectl, rendered, dry_run)
    # kubectl shows no difference at all if it cannot tell that of one object.
    hidden = {item.key for item in dry_run.refusals if not item.is_conflict} | dry_run.untried
    objects = [
        item for key, item in zip(rendered.keys, rendered.objects, strict=True) if key not in hidden and key.kind != "Job"
    ]
    shown = target.kubectl.run_command(
        *("diff", *SERVER_SIDE, "--force-conflicts"),
        stdin=json.dumps(make_list_object(objects)),
        seconds=APPLY_SECONDS,
        accepted_codes=(0, 1),
    )
    lines = [f"! {line}" for line in _describe_remade_sets(remade)]
    lines += [f"! {item.key}: {item.reason}" for item in dry_run.refusals if item.key not in remade]
    lines += [f"+ {key}" for key in sorted(dry_run.untried)]
    removed = manifests.find_removed_keys(release.objects, rendered.keys)
    lines += [f"- {key}" for key in removed if key.kind not in KEPT_KINDS]
    say(f"{target.overlay} on {target.context}, deployed {release.changed_at}")
    return shown + "".join(f"{line}\n" for line in lines)


class PlatformStatus(NamedTuple):
    """The output of `make status`."""

    context: str
    release: Release | None
    workloads: list[WorkloadRow]
    runs: dict[str, int]
    """Phase → number of workflows."""


def fetch_status(options: DeployOptions) -> PlatformStatus:
    """Returns what is deployed, and its state. Asks nothing, and changes nothing."""
    target = choose_target(DeployOptions(overlay=options.overlay, context=options.context, yes=True), "Look at", None)
    kubectl, (release, _) = target.kubectl, target.find_release()
    rows: list[WorkloadRow] = []
    phases: Counter[str] = Counter()
    if release:
        rows = list_workload_rows(kubectl, release.objects)
        phases = Counter(_workflow_phases(kubectl))
    return PlatformStatus(target.context, release, rows, phases)


def _workflow_phases(kubectl: Kubectl) -> list[str]:
    workflows = kubectl.list_objects("workflows.argoproj.io")
    return [(workflow.get("status") or {}).get("phase") or "Pending" for workflow in workflows]
