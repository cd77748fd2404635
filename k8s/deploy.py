"""The platform onto a cluster and off it again: look, build images, apply, wait, upload the pipeline, try it.

Every step can be repeated, and finds what is done. A deployment that was stopped goes on with the same command.
"""

import base64
import contextlib
import json
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from images import build
from k8s import doctor, images, manifests
from k8s import rollout as waiting
from k8s.doctor import Requirements
from k8s.kubectl import K8sObject, Kubectl, list_contexts
from k8s.manifests import ObjectKey, RenderedOverlay, make_list_object
from k8s.release import CONFIG_MAP_NAME, FIELD_MANAGER, Release, merge_keys, release_timestamp
from ns import __version__
from ns.core.diagnostics import Diagnostic
from ns.core.errors import ClusterError, ConfigError, Interrupted, RunError
from pipelines import upload
from pipelines.kfp_client import KfpClient, StageTask, stage_names

KIND_CONTEXT_PREFIX = "kind-"
"""How names of contexts of local clusters (kind) begin."""
APPLY_SECONDS = 300
RETRY_SECONDS = 5.0
# What goes away by itself: a webhook whose pods are just starting, a kind that the server has not taken in yet.
TRANSIENT_ERRORS = ("failed calling webhook", "no matches for kind", "no endpoints available", "ensure CRDs are installed")

KEPT_KINDS = ("Namespace", "CustomResourceDefinition", "PersistentVolume", "PersistentVolumeClaim", "Secret")
"""Data, what holds it, and the keys to it: undeploying leaves these, unless it is told to delete data."""
PLACEMENT_CONFIG_MAP, PLACEMENT_KEY = "noisy-student-pools", "inputs.json"
"""The ConfigMap, and its key, that say how the run form is filled in on this cluster."""
UPLOADER = "upload-pipelines"
"""The CronJob that brings the pipelines back if Kubeflow loses them, by the same inputs."""
API_SERVICE, API_PORT = "ml-pipeline", 8888
UI_SERVICE, UI_PORT = "ml-pipeline-ui", 80

SMOKE_EXPERIMENT = "noisy-student-smoke"
SMOKE_INPUTS: dict[str, Any] = {
    "config": "quickstart",
    "overrides": ["generations=1", "teacher.train.epochs=20", "students.0.train.epochs=10", "labeling.tasks=1"],
    # It tries the platform, not the GPUs: it should never wait for eight of them.
    **{f"{pool}_gpus": "0" for pool in ("label", "train")},
    **{f"{pool}_cpu": "1" for pool in ("label", "train")},
    **{f"{pool}_memory": "4Gi" for pool in ("label", "train")},
    **{f"{pool}_node_selector": {} for pool in ("label", "train")},
    **{f"{pool}_tolerations": [] for pool in ("label", "train")},
}
"""The run that shows that all of it works together."""

Say = Callable[[str], None]
Ask = Callable[[str], bool]


@dataclass(frozen=True)
class DeployOptions:
    """What `make deploy` is told."""

    overlay: str = ""
    """Empty: the one that is deployed, or else `kind` on a local cluster and `dev` on others."""
    context: str = ""
    """Empty: the current one, which is asked about."""
    registry: str = ""
    """Where images are pushed; local clusters need none."""
    images: Sequence[str] = ()
    """Names of images that are there already; none are built then."""
    worker: str = ""
    """The image's target that steps run in; empty: worker on local clusters, or else worker-cuda, which does without GPUs too."""
    without: Sequence[str] = ()
    """Steps of the overlay to leave out, where the cluster has it already: cluster, kubeflow."""
    build: Sequence[str] = ()
    """Options for images/build.py."""
    yes: bool = False
    preflight: bool = True
    smoke: bool = True
    force_conflicts: bool = False
    ready_seconds: float = 1200
    """For all workloads together to become ready: images of gigabytes are pulled."""


class DeployTarget(NamedTuple):
    """Where to."""

    kubectl: Kubectl
    context: str
    overlay: str
    releases: dict[str, Release]
    """Namespace of runs → what is deployed there: the platform, and teams' namespaces beside it."""

    @property
    def local(self) -> str | None:
        """Name of the local cluster; None for others."""
        return self.context.removeprefix(KIND_CONTEXT_PREFIX) if self.context.startswith(KIND_CONTEXT_PREFIX) else None

    def find_release(self) -> tuple[Release | None, str]:
        """The record of the overlay, and its namespace; None if that is not deployed."""
        return next(
            ((release, namespace) for namespace, release in self.releases.items() if release.overlay == self.overlay),
            (None, ""),
        )


def choose_target(options: DeployOptions, doing: str, ask: Ask | None) -> DeployTarget:
    """The cluster and the overlay that are meant; asks where that is not sure.

    `doing` is what is about to happen, as `deploy`; `ask` gets a question, and is None where nobody can be asked. Raises
    ConfigError where nobody can, or for a context that does not exist; Interrupted for a no.
    """
    names, current = list_contexts()
    context_hint = f"there are {', '.join(names)}" if names else "the kubeconfig has none; `make cluster` makes a local one"
    context = options.context or current
    if not context:
        raise ConfigError(f"KUBE_CONTEXT is not given, and no context is the current one; {context_hint}")
    if context not in names:
        raise ConfigError(f"KUBE_CONTEXT={context}: there is no such context; {context_hint}")
    kubectl = Kubectl(context)
    releases = Release.load_all(kubectl)
    deployed = sorted(release.overlay for release in releases.values())
    if not options.overlay and len(deployed) > 1:
        raise ConfigError(f"OVERLAY is not given, and several are deployed on {context}: {', '.join(deployed)}")
    overlay = options.overlay or next(iter(deployed), "kind" if context.startswith(KIND_CONTEXT_PREFIX) else "dev")
    doubts = []
    if not options.context:
        doubts.append(f"KUBE_CONTEXT is not given, and {context} ({kubectl.server_url()}) is the current one")
    if overlay == "kind" and not context.startswith(KIND_CONTEXT_PREFIX):
        doubts.append(f"overlay kind is for local clusters, and {context} is none")
    _confirm_doubts(doubts, f"{doing} {overlay} on {context}?", options, ask)
    return DeployTarget(kubectl, context, overlay, releases)


def _confirm_doubts(doubts: Sequence[str], question: str, options: DeployOptions, ask: Ask | None) -> None:
    """Raises ConfigError if there are doubts and nobody can be asked, Interrupted if somebody says no."""
    if not doubts or options.yes:
        return
    reason = "; ".join(doubts)
    if ask is None:
        raise ConfigError(f"{reason}; nobody can be asked: give KUBE_CONTEXT and OVERLAY as they are meant, or --yes")
    if not ask(f"{reason}. {question}"):
        raise Interrupted("nothing was done")


def deploy_overlay(options: DeployOptions, say: Say, ask: Ask | None, show: Callable[[list[Diagnostic]], None]) -> Release:
    """Brings an overlay onto a cluster, and returns what is there then.

    Raises ClusterError when the cluster lacks something or refuses, ConfigError for options that cannot be meant, RunError when
    Kubeflow or the smoke run fails. What was done so far stays, and the same call goes on.
    """
    target = choose_target(options, "Deploy", ask)
    kubectl = target.kubectl
    names, rendered = _render_target(target, options)
    release = target.releases.get(rendered.namespace)
    if release and release.overlay != target.overlay:
        doubt = f"overlay {release.overlay} is deployed in {rendered.namespace} on {target.context}, not {target.overlay}"
        _confirm_doubts([doubt], "Go on?", options, ask)
    say(f"{target.overlay} on {target.context}: {len(rendered.objects)} objects in {', '.join(rendered.namespaces)}")
    if release and release.state == "under way":
        say(f"the deployment of {release.at} did not come to its end: this one goes on with it")
    # Before anything is changed: inputs that no pipeline has are refused.
    packages = upload.load_packages(
        rendered.read_config_map(PLACEMENT_CONFIG_MAP).get(PLACEMENT_KEY, ""),
        f"ConfigMap {rendered.namespace}/{PLACEMENT_CONFIG_MAP}: {PLACEMENT_KEY}",
    )
    if options.preflight:
        _run_preflight(kubectl, rendered, show)
    if not options.images:
        images.provide_images(names, say, cluster=target.local, options=options.build)
    release = _apply_overlay(kubectl, rendered, release, names[images.WORKER_IMAGE_NAME], options, say)
    # A team's namespace uses the pipelines of the platform.
    if any((key.kind, key.name) == ("CronJob", UPLOADER) for key in rendered.keys):
        release = release.model_copy(
            update={"pipelines": _upload_pipelines(kubectl, rendered.namespace, packages, options, say)}
        )
    release = release.model_copy(update={"state": "whole", "at": release_timestamp()})
    release.save_release(kubectl, rendered.namespace)
    return release


def _upload_pipelines(
    kubectl: Kubectl, namespace: str, packages: Sequence[str], options: DeployOptions, say: Say
) -> dict[str, str]:
    """Name → version of the pipelines, which are there now; and the smoke run."""
    uploaded = {}
    with _forward_port(kubectl, namespace, API_SERVICE, API_PORT) as url:
        client = KfpClient(url)
        for package in packages:
            pipeline = client.upload_pipeline(package)
            uploaded[pipeline.name] = pipeline.version
            say(f"pipeline {pipeline.name}: {pipeline.version}")
            if options.smoke and pipeline.name == "noisy-student":
                _run_smoke(client, package, say)
    return uploaded


def _render_target(target: DeployTarget, options: DeployOptions) -> tuple[dict[str, str], RenderedOverlay]:
    """Images and manifests."""
    worker = options.worker or ("worker" if target.local else "worker-cuda")
    names = images.plan_images(options.registry, options.images, worker, local=target.local is not None, options=options.build)
    rendered = manifests.render_overlay(target.kubectl, target.overlay, names, options.without)
    # Kustomize knows images of containers only; the run form's are inputs like the others.
    return names, rendered.with_inputs(
        PLACEMENT_CONFIG_MAP,
        PLACEMENT_KEY,
        {"worker_image": names[images.WORKER_IMAGE_NAME], "tools_image": names[images.TOOLS_IMAGE_NAME]},
    )


def _run_preflight(kubectl: Kubectl, rendered: RenderedOverlay, show: Callable[[list[Diagnostic]], None]) -> None:
    provided_parts = rendered.provided_parts()
    requirements = Requirements(rendered.namespace, rendered.required_parts(), provided_parts, rendered.required_permissions())
    findings = doctor.examine_cluster(kubectl, requirements)
    show([finding for finding in findings if not finding.ok])
    fatal = [finding.name for finding in findings if finding.is_fatal]
    if fatal:
        raise ClusterError(f"nothing was changed: {', '.join(fatal)}; mend what is said above, or go on with --no-preflight")


def _apply_overlay(
    kubectl: Kubectl, rendered: RenderedOverlay, release: Release | None, worker_image: str, options: DeployOptions, say: Say
) -> Release:
    """Everything in the cluster, old things taken away, workloads ready; the record under way, with what is there."""
    namespace = rendered.namespace
    preexisting = release.preexisting if release else _find_preexisting(kubectl, rendered)
    old = release.objects if release else ()
    release = Release(
        overlay=rendered.overlay,
        state="under way",
        version=__version__,
        revision=build.read_revision(build.CHECKOUT),
        at=release_timestamp(),
        worker_image=worker_image,
        objects=merge_keys(old, rendered.keys),
        preexisting=preexisting,
        pipelines=release.pipelines if release else {},
    )
    for number, (name, objects) in enumerate(rendered.split_phases()):
        say(f"apply {len(objects)} {name}")
        if name == "jobs":
            _clear_jobs(kubectl, objects, say)
        _apply_phase(kubectl, objects, options, say)
        if number == 0:
            definitions = [
                ObjectKey.from_object(resource).name for resource in objects if resource["kind"] == "CustomResourceDefinition"
            ]
            if definitions:
                kubectl.run_command(
                    "wait", "--for=condition=Established", "--timeout=60s", "customresourcedefinition", *definitions, seconds=90
                )
            # From now on it is known what has to go again, and the namespace is there.
            release.save_release(kubectl, namespace)
            _provide_keys(kubectl, rendered, say)
        if name == "all else":
            waiting.wait_until_ready(kubectl, rendered.workloads, options.ready_seconds, say)
        if name == "jobs":
            waiting.wait_until_ready(kubectl, rendered.jobs, options.ready_seconds, say)
    for key in manifests.find_removed_keys(old, rendered.keys):
        if key.kind in KEPT_KINDS:
            say(f"{key}: is no longer in the overlay, and stays: it is or holds data")
        else:
            say(f"{key}: is no longer in the overlay, and goes")
            _delete_objects(kubectl, [key])
    staying = [key for key in release.objects if key.kind in KEPT_KINDS]
    release = release.model_copy(update={"objects": merge_keys(staying, rendered.keys)})
    release.save_release(kubectl, namespace)
    return release


def _find_preexisting(kubectl: Kubectl, rendered: RenderedOverlay) -> tuple[ObjectKey, ...]:
    """Namespaces and kinds that somebody else had made before the first deployment."""
    existing = {
        (kind, resource["metadata"]["name"])
        for kind, plural in (("Namespace", "namespaces"), ("CustomResourceDefinition", "customresourcedefinitions"))
        for resource in kubectl.list_objects(plural)
    }
    return tuple(key for key in rendered.keys if (key.kind, key.name) in existing)


def _apply_phase(kubectl: Kubectl, objects: Sequence[K8sObject], options: DeployOptions, say: Say) -> None:
    """Server-side, so that what others manage stays theirs. Tries again what passes by itself."""
    force_options = ["--force-conflicts"] if options.force_conflicts else []
    started = time.monotonic()
    while True:
        try:
            for line in kubectl.stream_lines(
                *("apply", "--server-side", f"--field-manager={FIELD_MANAGER}", *force_options, "--filename=-"),
                stdin=json.dumps(make_list_object(objects)),
            ):
                say(f"  {line}")
            return
        except ClusterError as error:
            text = str(error)
            if "conflict" in text and not options.force_conflicts:
                raise ClusterError(
                    f"{text}; somebody else manages these fields: take them out of the overlay, or take them over with --force-conflicts"
                ) from error
            if not any(mark in text for mark in TRANSIENT_ERRORS) or time.monotonic() - started > APPLY_SECONDS:
                raise
            say("that passes; once more")
            time.sleep(RETRY_SECONDS)


def _provide_keys(kubectl: Kubectl, rendered: RenderedOverlay, say: Say) -> None:
    """Keys of the object store that the overlay brings, made once. Those of a store outside are its owner's business."""
    namespace = rendered.namespace
    brings_store = any(key.kind in ("StatefulSet", "Deployment") and key.name == "seaweedfs" for key in rendered.keys)
    in_overlay = any((key.kind, key.name) == ("Secret", doctor.STORAGE_SECRET) for key in rendered.keys)
    if in_overlay or kubectl.get_object("secret", doctor.STORAGE_SECRET, namespace):
        return
    if not brings_store:
        raise ClusterError(
            f"there is no Secret {namespace}/{doctor.STORAGE_SECRET} with the keys of the store; kubectl -n {namespace} create secret generic "
            f"{doctor.STORAGE_SECRET} --from-literal=accesskey=… --from-literal=secretkey=…, then deploy again"
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
    # `create`, not `apply`: whoever was faster, his keys are the ones.
    kubectl.run_command("create", "--filename=-", stdin=json.dumps(secret))
    say(f"Secret {namespace}/{doctor.STORAGE_SECRET}: new keys for the object store")


def _clear_jobs(kubectl: Kubectl, objects: Sequence[K8sObject], say: Say) -> None:
    """A Job's pods cannot be changed: one that would be another one is deleted first."""
    for job in objects:
        key = ObjectKey.from_object(job)
        try:
            kubectl.run_command(
                *("apply", "--server-side", "--dry-run=server", f"--field-manager={FIELD_MANAGER}", "--filename=-"),
                stdin=json.dumps(job),
            )
        except ClusterError as error:
            if "immutable" not in str(error):
                raise
            say(f"{key}: is another one now, and runs anew")
            _delete_objects(kubectl, [key])


def _delete_objects(kubectl: Kubectl, keys: Sequence[ObjectKey], *, seconds: float = 120) -> None:
    """Deletes what is there of these, and waits until it is gone."""
    for key in keys:
        kind = f"{key.kind.lower()}{f'.{key.group}' if key.group else ''}"
        namespace_options = [f"--namespace={key.namespace}"] if key.namespace else []
        try:
            kubectl.run_command(
                *("delete", kind, key.name, *namespace_options, "--ignore-not-found", f"--timeout={seconds:g}s"),
                seconds=seconds + 10,
            )
        except ClusterError as error:
            # Its kind is gone, and it with it.
            if "doesn't have a resource type" not in str(error):
                raise


def _run_smoke(client: KfpClient, package: str, say: Say) -> None:
    """Runs the quickstart, once for each version of the pipeline: one that succeeded is not run again."""
    pipeline = client.upload_pipeline(package)
    name = f"smoke-{pipeline.version}"
    run = client.create_run(pipeline, {**SMOKE_INPUTS, "run": name}, name=name, experiment=SMOKE_EXPERIMENT)
    if not run.new and run.state == "SUCCEEDED":
        say(f"smoke run {name}: has succeeded before")
        return
    say(f"smoke run {name}: {'started' if run.new else 'is under way'}")

    def report_task(task: StageTask) -> None:
        say(f"  {task.name}: {task.state.lower()}{f': {task.error}' if task.error else ''}")

    run = client.wait_for_run(run.run_id, report_task, stages=stage_names(package))
    if run.state != "SUCCEEDED":
        raise RunError(f"smoke run {name}: {run.state.lower()}; `make ui` shows its steps and their logs; then deploy again")
    say(f"smoke run {name}: succeeded")


@contextlib.contextmanager
def _forward_port(kubectl: Kubectl, namespace: str, service: str, port: int) -> Iterator[str]:
    """URL at which a service of the cluster answers here, meanwhile."""
    lines = kubectl.stream_lines("port-forward", f"service/{service}", f":{port}", f"--namespace={namespace}", stdin="")
    try:
        local = next((match[1] for line in lines if (match := re.search(r"127\.0\.0\.1:(\d+) ->", line))), None)
        if local is None:
            raise ClusterError(
                f"kubectl port-forward service/{service}: ended at once; kubectl -n {namespace} get service {service}"
            )
        yield f"http://127.0.0.1:{local}"
    finally:
        lines.close()


def undeploy_overlay(options: DeployOptions, say: Say, ask: Ask | None, *, delete_data: bool = False) -> bool:
    """Takes away what was deployed, and says whether there was anything. Data stays (KEPT), unless `delete_data`.

    What was in the cluster before the first deployment stays in any case. Raises ConfigError where somebody must be asked and
    cannot, ClusterError when the cluster refuses; the same call goes on.
    """
    target = choose_target(options, "Take away", ask)
    kubectl, (release, namespace) = target.kubectl, target.find_release()
    if release is None:
        say(f"nothing is deployed on {target.context}" + (f" of overlay {options.overlay}" if options.overlay else ""))
        return False
    doubts = []
    running = [
        workflow
        for workflow in kubectl.list_objects("workflows.argoproj.io")
        if (workflow.get("status") or {}).get("phase") in ("Running", "Pending")
    ]
    if running:
        doubts.append(f"{len(running)} runs are under way, and would be stopped where they are")
    if delete_data:
        doubts.append(
            f"ALL DATA in {', '.join(sorted({key.namespace for key in release.objects if key.namespace}))} would be deleted"
        )
    _confirm_doubts(doubts, f"Go on on {target.context}?", options, ask)
    spared = {key.without_version() for key in release.preexisting}
    doomed = [
        key for key in release.objects if key.without_version() not in spared and (delete_data or key.kind not in KEPT_KINDS)
    ]
    if release.state != "taken away" or delete_data:
        release = release.model_copy(update={"state": "under way", "at": release_timestamp()})
        release.save_release(kubectl, namespace)
    last = [key for key in doomed if key.kind == "Namespace"]
    for key in manifests.sort_for_deletion(key for key in doomed if key.kind != "Namespace"):
        say(f"{key}: goes")
        _delete_objects(kubectl, [key])
    if delete_data:
        _delete_claims(kubectl, release, say)
        # Its record stands in one of the namespaces: while any of the others is left, it is needed.
        for key in [*(key for key in last if key.name != namespace), *(key for key in last if key.name == namespace)]:
            say(f"{key}: goes")
            _delete_objects(kubectl, [key], seconds=600)
        _delete_objects(kubectl, [ObjectKey("v1", "ConfigMap", namespace, CONFIG_MAP_NAME)])
        return True
    kept = tuple(key for key in release.objects if key not in doomed)
    release.model_copy(
        update={"state": "taken away", "objects": kept, "pipelines": {}, "at": release_timestamp()}
    ).save_release(kubectl, namespace)
    say(f"{len(kept)} objects stay: data, what holds it, and what was there before; --delete-data deletes data too")
    return True


def _delete_claims(kubectl: Kubectl, release: Release, say: Say) -> None:
    """The volumes that StatefulSets made, which no manifest names: NAME-SET-0."""
    for key in [key for key in release.objects if key.kind == "StatefulSet"]:
        for claim in kubectl.list_objects("persistentvolumeclaims", key.namespace):
            if re.fullmatch(rf".+-{re.escape(key.name)}-\d+", claim["metadata"]["name"]):
                say(f"{ObjectKey.from_object(claim)}: goes")
                _delete_objects(kubectl, [ObjectKey.from_object(claim)])


def diff_overlay(options: DeployOptions, say: Say, ask: Ask | None) -> str:
    """What `deploy` would change, as `kubectl diff` shows it; empty if nothing."""
    target = choose_target(options, "Compare", ask)
    _, rendered = _render_target(target, options)
    release = target.releases.get(rendered.namespace)
    if release is None:
        return "".join(f"+ {key}\n" for key in rendered.keys)
    # Jobs cannot be changed, only made anew.
    objects = [resource for resource in rendered.objects if resource["kind"] != "Job"]
    shown = target.kubectl.run_command(
        *("diff", "--server-side", f"--field-manager={FIELD_MANAGER}", "--filename=-"),
        stdin=json.dumps(make_list_object(objects)),
        seconds=APPLY_SECONDS,
        accepted_codes=(0, 1),
    )
    going = [key for key in manifests.find_removed_keys(release.objects, rendered.keys) if key.kind not in KEPT_KINDS]
    say(f"{target.overlay} on {target.context}, deployed {release.at}")
    return shown + "".join(f"- {key}\n" for key in going)


class WorkloadRow(NamedTuple):
    """A workload, as `status` shows it."""

    name: str
    ready: bool
    summary: str
    reason: str


class PlatformStatus(NamedTuple):
    """What `status` shows."""

    context: str
    release: Release | None
    workloads: list[WorkloadRow]
    runs: dict[str, int]
    """Phase → workflows."""


def fetch_status(options: DeployOptions) -> PlatformStatus:
    """What is deployed, and how it is. Asks about nothing, and changes nothing."""
    target = choose_target(DeployOptions(overlay=options.overlay, context=options.context, yes=True), "Look at", None)
    kubectl, (release, _) = target.kubectl, target.find_release()
    rows: list[WorkloadRow] = []
    phases: dict[str, int] = {}
    if release:
        rows = [
            WorkloadRow(f"{key.namespace}/{key.name}", *fields)
            for key, fields in waiting.list_workload_states(kubectl, release.objects)
        ]
        for workflow in kubectl.list_objects("workflows.argoproj.io"):
            phase = (workflow.get("status") or {}).get("phase") or "Pending"
            phases[phase] = phases.get(phase, 0) + 1
    return PlatformStatus(target.context, release, rows, phases)
