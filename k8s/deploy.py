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
from k8s.doctor import Asked
from k8s.kubectl import Kubectl, Object, contexts
from k8s.manifests import Key, Manifests, listed
from k8s.release import MANAGER, NAME, Record, merged, now
from ns import __version__
from ns.core.diagnostics import Finding
from ns.core.errors import ClusterError, ConfigError, Interrupted, RunError
from pipelines import upload
from pipelines.kfp_client import Server, Task, step_names

KIND = "kind-"
"""How names of contexts of local clusters (kind) begin."""
APPLY_SECONDS = 300
RETRY_SECONDS = 5.0
# What goes away by itself: a webhook whose pods are just starting, a kind that the server has not taken in yet.
PASSING = ("failed calling webhook", "no matches for kind", "no endpoints available", "ensure CRDs are installed")

KEPT = ("Namespace", "CustomResourceDefinition", "PersistentVolume", "PersistentVolumeClaim", "Secret")
"""Data, what holds it, and the keys to it: undeploying leaves these, unless it is told to delete data."""
POOLS, INPUTS = "noisy-student-pools", "inputs.json"
"""The ConfigMap, and its key, that say how the run form is filled in on this cluster."""
UPLOADER = "upload-pipelines"
"""The CronJob that brings the pipelines back if Kubeflow loses them, by the same inputs."""
API, API_PORT = "ml-pipeline", 8888
UI, UI_PORT = "ml-pipeline-ui", 80

EXPERIMENT = "noisy-student-smoke"
SMOKE: dict[str, Any] = {
    "config": "quickstart",
    "overrides": ["generations=1", "teacher.train.epochs=20", "students.0.train.epochs=10", "labelling.tasks=1"],
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
class Options:
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
    seconds: float = 1200
    """For all workloads together to become ready: images of gigabytes are pulled."""


class Chosen(NamedTuple):
    """Where to."""

    kubectl: Kubectl
    context: str
    overlay: str
    records: dict[str, Record]
    """Namespace of runs → what is deployed there: the platform, and teams' namespaces beside it."""

    @property
    def local(self) -> str | None:
        """Name of the local cluster; None for others."""
        return self.context.removeprefix(KIND) if self.context.startswith(KIND) else None

    def deployed(self) -> tuple[Record | None, str]:
        """The record of the overlay, and its namespace; None if that is not deployed."""
        return next(((one, place) for place, one in self.records.items() if one.overlay == self.overlay), (None, ""))


def choose(options: Options, doing: str, ask: Ask | None) -> Chosen:
    """The cluster and the overlay that are meant; asks where that is not sure.

    `doing` is what is about to happen, as `deploy`; `ask` gets a question, and is None where nobody can be asked. Raises
    ConfigError where nobody can, or for a context that does not exist; Interrupted for a no.
    """
    names, current = contexts()
    known = f"there are {', '.join(names)}" if names else "the kubeconfig has none; `make cluster` makes a local one"
    context = options.context or current
    if not context:
        raise ConfigError(f"KUBE_CONTEXT is not given, and no context is the current one; {known}")
    if context not in names:
        raise ConfigError(f"KUBE_CONTEXT={context}: there is no such context; {known}")
    kubectl = Kubectl(context)
    records = Record.all(kubectl)
    deployed = sorted(one.overlay for one in records.values())
    if not options.overlay and len(deployed) > 1:
        raise ConfigError(f"OVERLAY is not given, and several are deployed on {context}: {', '.join(deployed)}")
    overlay = options.overlay or next(iter(deployed), "kind" if context.startswith(KIND) else "dev")
    doubts = []
    if not options.context:
        doubts.append(f"KUBE_CONTEXT is not given, and {context} ({kubectl.server()}) is the current one")
    if overlay == "kind" and not context.startswith(KIND):
        doubts.append(f"overlay kind is for local clusters, and {context} is none")
    _ask_about(doubts, f"{doing} {overlay} on {context}?", options, ask)
    return Chosen(kubectl, context, overlay, records)


def _ask_about(doubts: Sequence[str], question: str, options: Options, ask: Ask | None) -> None:
    """Raises ConfigError if there are doubts and nobody can be asked, Interrupted if somebody says no."""
    if not doubts or options.yes:
        return
    why = "; ".join(doubts)
    if ask is None:
        raise ConfigError(f"{why}; nobody can be asked: give KUBE_CONTEXT and OVERLAY as they are meant, or --yes")
    if not ask(f"{why}. {question}"):
        raise Interrupted("nothing was done")


def deploy(options: Options, say: Say, ask: Ask | None, show: Callable[[list[Finding]], None]) -> Record:
    """Brings an overlay onto a cluster, and returns what is there then.

    Raises ClusterError when the cluster lacks something or refuses, ConfigError for options that cannot be meant, RunError when
    Kubeflow or the smoke run fails. What was done so far stays, and the same call goes on.
    """
    chosen = choose(options, "Deploy", ask)
    kubectl = chosen.kubectl
    names, wanted = _rendered(chosen, options)
    record = chosen.records.get(wanted.namespace)
    if record and record.overlay != chosen.overlay:
        doubt = f"overlay {record.overlay} is deployed in {wanted.namespace} on {chosen.context}, not {chosen.overlay}"
        _ask_about([doubt], "Go on?", options, ask)
    say(f"{chosen.overlay} on {chosen.context}: {len(wanted.objects)} objects in {', '.join(wanted.namespaces)}")
    if record and record.state == "under way":
        say(f"the deployment of {record.at} did not come to its end: this one goes on with it")
    # Before anything is changed: inputs that no pipeline has are refused.
    compiled = upload.packages(wanted.config(POOLS).get(INPUTS, ""), f"ConfigMap {wanted.namespace}/{POOLS}: {INPUTS}")
    if options.preflight:
        _preflight(kubectl, wanted, show)
    if not options.images:
        images.provide(names, say, cluster=chosen.local, options=options.build)
    record = _apply(kubectl, wanted, record, names[images.WORKER], options, say)
    # A team's namespace uses the pipelines of the platform.
    if any((key.kind, key.name) == ("CronJob", UPLOADER) for key in wanted.keys):
        record = record.model_copy(update={"pipelines": _upload(kubectl, wanted.namespace, compiled, options, say)})
    record = record.model_copy(update={"state": "whole", "at": now()})
    record.write(kubectl, wanted.namespace)
    return record


def _upload(kubectl: Kubectl, namespace: str, compiled: Sequence[str], options: Options, say: Say) -> dict[str, str]:
    """Name → version of the pipelines, which are there now; and the smoke run."""
    uploaded = {}
    with _forwarded(kubectl, namespace, API, API_PORT) as url:
        server = Server(url)
        for package in compiled:
            pipeline = server.upload(package)
            uploaded[pipeline.name] = pipeline.version
            say(f"pipeline {pipeline.name}: {pipeline.version}")
            if options.smoke and pipeline.name == "noisy-student":
                _smoke(server, package, say)
    return uploaded


def _rendered(chosen: Chosen, options: Options) -> tuple[dict[str, str], Manifests]:
    """Images and manifests."""
    worker = options.worker or ("worker" if chosen.local else "worker-cuda")
    names = images.plan(options.registry, options.images, worker, local=chosen.local is not None, options=options.build)
    wanted = manifests.render(chosen.kubectl, chosen.overlay, names, options.without)
    # Kustomize knows images of containers only; the run form's are inputs like the others.
    return names, wanted.with_inputs(POOLS, INPUTS, {"worker_image": names[images.WORKER], "tools_image": names[images.TOOLS]})


def _preflight(kubectl: Kubectl, wanted: Manifests, show: Callable[[list[Finding]], None]) -> None:
    brings = wanted.brings()
    asked = Asked(wanted.namespace, wanted.needs(), brings, wanted.rights())
    findings = doctor.examine(kubectl, asked)
    show([finding for finding in findings if not finding.ok])
    fatal = [finding.name for finding in findings if finding.fatal]
    if fatal:
        raise ClusterError(f"nothing was changed: {', '.join(fatal)}; mend what is said above, or go on with --no-preflight")


def _apply(kubectl: Kubectl, wanted: Manifests, record: Record | None, worker_image: str, options: Options, say: Say) -> Record:
    """Everything in the cluster, old things taken away, workloads ready; the record under way, with what is there."""
    place = wanted.namespace
    found = record.found if record else _found(kubectl, wanted)
    old = record.objects if record else ()
    record = Record(
        overlay=wanted.overlay,
        state="under way",
        version=__version__,
        revision=build.revision(build.CHECKOUT),
        at=now(),
        worker_image=worker_image,
        objects=merged(old, wanted.keys),
        found=found,
        pipelines=record.pipelines if record else {},
    )
    for number, (name, objects) in enumerate(wanted.stages()):
        say(f"apply {len(objects)} {name}")
        if name == "jobs":
            _clear_jobs(kubectl, objects, say)
        _apply_stage(kubectl, objects, options, say)
        if number == 0:
            definitions = [Key.of(one).name for one in objects if one["kind"] == "CustomResourceDefinition"]
            if definitions:
                kubectl.run(
                    "wait", "--for=condition=Established", "--timeout=60s", "customresourcedefinition", *definitions, seconds=90
                )
            # From now on it is known what has to go again, and the namespace is there.
            record.write(kubectl, place)
            _provide_keys(kubectl, wanted, say)
        if name == "all else":
            waiting.wait(kubectl, wanted.workloads, options.seconds, say)
        if name == "jobs":
            waiting.wait(kubectl, wanted.jobs, options.seconds, say)
    for key in manifests.gone(old, wanted.keys):
        if key.kind in KEPT:
            say(f"{key}: is no longer in the overlay, and stays: it is or holds data")
        else:
            say(f"{key}: is no longer in the overlay, and goes")
            _delete(kubectl, [key])
    staying = [key for key in record.objects if key.kind in KEPT]
    record = record.model_copy(update={"objects": merged(staying, wanted.keys)})
    record.write(kubectl, place)
    return record


def _found(kubectl: Kubectl, wanted: Manifests) -> tuple[Key, ...]:
    """Namespaces and kinds that somebody else had made before the first deployment."""
    there = {
        (kind, one["metadata"]["name"])
        for kind, plural in (("Namespace", "namespaces"), ("CustomResourceDefinition", "customresourcedefinitions"))
        for one in kubectl.list(plural)
    }
    return tuple(key for key in wanted.keys if (key.kind, key.name) in there)


def _apply_stage(kubectl: Kubectl, objects: Sequence[Object], options: Options, say: Say) -> None:
    """Server-side, so that what others manage stays theirs. Tries again what passes by itself."""
    forced = ["--force-conflicts"] if options.force_conflicts else []
    begun = time.monotonic()
    while True:
        try:
            for line in kubectl.lines(
                *("apply", "--server-side", f"--field-manager={MANAGER}", *forced, "--filename=-"),
                data=json.dumps(listed(objects)),
            ):
                say(f"  {line}")
            return
        except ClusterError as error:
            text = str(error)
            if "conflict" in text and not options.force_conflicts:
                raise ClusterError(
                    f"{text}; somebody else manages these fields: take them out of the overlay, or take them over with --force-conflicts"
                ) from error
            if not any(mark in text for mark in PASSING) or time.monotonic() - begun > APPLY_SECONDS:
                raise
            say("that passes; once more")
            time.sleep(RETRY_SECONDS)


def _provide_keys(kubectl: Kubectl, wanted: Manifests, say: Say) -> None:
    """Keys of the object store that the overlay brings, made once. Those of a store outside are its owner's business."""
    place = wanted.namespace
    brings_store = any(key.kind in ("StatefulSet", "Deployment") and key.name == "seaweedfs" for key in wanted.keys)
    in_overlay = any((key.kind, key.name) == ("Secret", doctor.SECRET) for key in wanted.keys)
    if in_overlay or kubectl.get("secret", doctor.SECRET, place):
        return
    if not brings_store:
        raise ClusterError(
            f"there is no Secret {place}/{doctor.SECRET} with the keys of the store; kubectl -n {place} create secret generic "
            f"{doctor.SECRET} --from-literal=accesskey=… --from-literal=secretkey=…, then deploy again"
        )
    keys = {"accesskey": secrets.token_hex(10), "secretkey": secrets.token_urlsafe(30)}
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": doctor.SECRET, "namespace": place, "labels": {"app.kubernetes.io/part-of": "noisy-student"}},
        "data": {name: base64.b64encode(value.encode()).decode() for name, value in keys.items()},
    }
    # `create`, not `apply`: whoever was faster, his keys are the ones.
    kubectl.run("create", "--filename=-", data=json.dumps(secret))
    say(f"Secret {place}/{doctor.SECRET}: new keys for the object store")


def _clear_jobs(kubectl: Kubectl, objects: Sequence[Object], say: Say) -> None:
    """A Job's pods cannot be changed: one that would be another one is deleted first."""
    for one in objects:
        key = Key.of(one)
        try:
            kubectl.run(
                *("apply", "--server-side", "--dry-run=server", f"--field-manager={MANAGER}", "--filename=-"),
                data=json.dumps(one),
            )
        except ClusterError as error:
            if "immutable" not in str(error):
                raise
            say(f"{key}: is another one now, and runs anew")
            _delete(kubectl, [key])


def _delete(kubectl: Kubectl, keys: Sequence[Key], *, seconds: float = 120) -> None:
    """Deletes what is there of these, and waits until it is gone."""
    for key in keys:
        kind = f"{key.kind.lower()}{f'.{key.group}' if key.group else ''}"
        where = [f"--namespace={key.namespace}"] if key.namespace else []
        try:
            kubectl.run(
                *("delete", kind, key.name, *where, "--ignore-not-found", f"--timeout={seconds:g}s"), seconds=seconds + 10
            )
        except ClusterError as error:
            # Its kind is gone, and it with it.
            if "doesn't have a resource type" not in str(error):
                raise


def _smoke(server: Server, package: str, say: Say) -> None:
    """Runs the quickstart, once for each version of the pipeline: one that succeeded is not run again."""
    pipeline = server.upload(package)
    name = f"smoke-{pipeline.version}"
    run = server.submit(pipeline, {**SMOKE, "run": name}, name=name, experiment=EXPERIMENT)
    if not run.new and run.state == "SUCCEEDED":
        say(f"smoke run {name}: has succeeded before")
        return
    say(f"smoke run {name}: {'started' if run.new else 'is under way'}")

    def changed(task: Task) -> None:
        say(f"  {task.name}: {task.state.lower()}{f': {task.error}' if task.error else ''}")

    run = server.follow(run.run_id, changed, steps=step_names(package))
    if run.state != "SUCCEEDED":
        raise RunError(f"smoke run {name}: {run.state.lower()}; `make ui` shows its steps and their logs; then deploy again")
    say(f"smoke run {name}: succeeded")


@contextlib.contextmanager
def _forwarded(kubectl: Kubectl, namespace: str, service: str, port: int) -> Iterator[str]:
    """URL at which a service of the cluster answers here, meanwhile."""
    lines = kubectl.lines("port-forward", f"service/{service}", f":{port}", f"--namespace={namespace}", data="")
    try:
        local = next((match[1] for line in lines if (match := re.search(r"127\.0\.0\.1:(\d+) ->", line))), None)
        if local is None:
            raise ClusterError(
                f"kubectl port-forward service/{service}: ended at once; kubectl -n {namespace} get service {service}"
            )
        yield f"http://127.0.0.1:{local}"
    finally:
        lines.close()


def undeploy(options: Options, say: Say, ask: Ask | None, *, delete_data: bool = False) -> bool:
    """Takes away what was deployed, and says whether there was anything. Data stays (KEPT), unless `delete_data`.

    What was in the cluster before the first deployment stays in any case. Raises ConfigError where somebody must be asked and
    cannot, ClusterError when the cluster refuses; the same call goes on.
    """
    chosen = choose(options, "Take away", ask)
    kubectl, (record, place) = chosen.kubectl, chosen.deployed()
    if record is None:
        say(f"nothing is deployed on {chosen.context}" + (f" of overlay {options.overlay}" if options.overlay else ""))
        return False
    doubts = []
    running = [
        one for one in kubectl.list("workflows.argoproj.io") if (one.get("status") or {}).get("phase") in ("Running", "Pending")
    ]
    if running:
        doubts.append(f"{len(running)} runs are under way, and would be stopped where they are")
    if delete_data:
        doubts.append(
            f"ALL DATA in {', '.join(sorted({key.namespace for key in record.objects if key.namespace}))} would be deleted"
        )
    _ask_about(doubts, f"Go on on {chosen.context}?", options, ask)
    spared = {key.same() for key in record.found}
    doomed = [key for key in record.objects if key.same() not in spared and (delete_data or key.kind not in KEPT)]
    if record.state != "taken away" or delete_data:
        record = record.model_copy(update={"state": "under way", "at": now()})
        record.write(kubectl, place)
    last = [key for key in doomed if key.kind == "Namespace"]
    for key in manifests.ordered_for_deletion(key for key in doomed if key.kind != "Namespace"):
        say(f"{key}: goes")
        _delete(kubectl, [key])
    if delete_data:
        _delete_claims(kubectl, record, say)
        # Its record stands in one of the namespaces: while any of the others is left, it is needed.
        for key in [*(key for key in last if key.name != place), *(key for key in last if key.name == place)]:
            say(f"{key}: goes")
            _delete(kubectl, [key], seconds=600)
        _delete(kubectl, [Key("v1", "ConfigMap", place, NAME)])
        return True
    stays = tuple(key for key in record.objects if key not in doomed)
    record.model_copy(update={"state": "taken away", "objects": stays, "pipelines": {}, "at": now()}).write(kubectl, place)
    say(f"{len(stays)} objects stay: data, what holds it, and what was there before; --delete-data deletes data too")
    return True


def _delete_claims(kubectl: Kubectl, record: Record, say: Say) -> None:
    """The volumes that StatefulSets made, which no manifest names: NAME-SET-0."""
    for key in [key for key in record.objects if key.kind == "StatefulSet"]:
        for claim in kubectl.list("persistentvolumeclaims", key.namespace):
            if re.fullmatch(rf".+-{re.escape(key.name)}-\d+", claim["metadata"]["name"]):
                say(f"{Key.of(claim)}: goes")
                _delete(kubectl, [Key.of(claim)])


def diff(options: Options, say: Say, ask: Ask | None) -> str:
    """What `deploy` would change, as `kubectl diff` shows it; empty if nothing."""
    chosen = choose(options, "Compare", ask)
    _, wanted = _rendered(chosen, options)
    record = chosen.records.get(wanted.namespace)
    if record is None:
        return "".join(f"+ {key}\n" for key in wanted.keys)
    # Jobs cannot be changed, only made anew.
    objects = [one for one in wanted.objects if one["kind"] != "Job"]
    shown = chosen.kubectl.run(
        *("diff", "--server-side", f"--field-manager={MANAGER}", "--filename=-"),
        data=json.dumps(listed(objects)),
        seconds=APPLY_SECONDS,
        accepted=(0, 1),
    )
    going = [key for key in manifests.gone(record.objects, wanted.keys) if key.kind not in KEPT]
    say(f"{chosen.overlay} on {chosen.context}, deployed {record.at}")
    return shown + "".join(f"- {key}\n" for key in going)


class Row(NamedTuple):
    """A workload, as `status` shows it."""

    name: str
    ready: bool
    said: str
    why: str


class Status(NamedTuple):
    """What `status` shows."""

    context: str
    record: Record | None
    workloads: list[Row]
    runs: dict[str, int]
    """Phase → workflows."""


def status(options: Options) -> Status:
    """What is deployed, and how it is. Asks about nothing, and changes nothing."""
    chosen = choose(Options(overlay=options.overlay, context=options.context, yes=True), "Look at", None)
    kubectl, (record, _) = chosen.kubectl, chosen.deployed()
    rows: list[Row] = []
    phases: dict[str, int] = {}
    if record:
        rows = [Row(f"{key.namespace}/{key.name}", *seen) for key, seen in waiting.seen(kubectl, record.objects)]
        for one in kubectl.list("workflows.argoproj.io"):
            phase = (one.get("status") or {}).get("phase") or "Pending"
            phases[phase] = phases.get(phase, 0) + 1
    return Status(chosen.context, record, rows, phases)
