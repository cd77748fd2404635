"""Tries the deployed platform on a real cluster, with real faults, and tells what was expected and what was seen.

Every check starts a run of the quickstart's data at a small size, in a folder of its own below the platform's root, so that no check
finds the work of another. What was seen is kept in a file: a second call tries what is missing, and again what was not as expected.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from k8s.access import open_cluster_access
from k8s.deploy import PLACEMENT_CONFIG_MAP, PLACEMENT_KEY
from k8s.kubectl import K8sObject, Kubectl
from k8s.workflow import (
    MAX_PACKED_BYTES,
    RUN_LABEL,
    WorkflowFigures,
    list_tries,
    measure_seconds,
    measure_workflow,
    read_node_id,
)
from ns.core.errors import ConfigError, Interrupted, NsError, RunError
from ns.core.log import format_duration
from ns.runs.records import list_stage_failures, list_stage_notes
from ns.storage import Store, open_store
from ns.storage.documents import JsonDocument, parse_json_object
from ns.training.monitor import PROGRESS
from pipelines import PACKAGE
from pipelines.kfp_client import PATIENCE_SECONDS, KfpClient, SubmittedRun, UploadedPipeline
from pipelines.placement import Placement, render_package
from pipelines.run_size import RunShape, predict_run

EXPERIMENT = "noisy-student-acceptance"
TRAINING = "teacher"
"""The stage that the faults hit."""
SMALL_PODS: dict[str, Any] = {
    f"{pool}_{name}": value
    for pool, cpu, memory in (("label", "200m", "2Gi"), ("train", "500m", "3Gi"))
    for name, value in {"gpus": "0", "cpu": cpu, "memory": memory, "node_selector": {}, "tolerations": []}.items()
}
"""Where runs are placed: on two cores, some labeling tasks run at once."""
RUN_SECONDS = 1800.0
"""For one run; one that takes longer is ended, and counts as lost."""
TRAIN_JOBS = "trainjobs.trainer.kubeflow.org"
GONE_SECONDS = 120.0
"""For the pods of a run that was terminated."""
POLL_SECONDS = 2.0

SMALL = ("generations=1", "teacher.train.epochs=100", "students.0.train.epochs=10", "labeling.tasks=1")
"""The smallest run whose teacher labels anything."""
LONG_TEACHER = ("generations=1", "teacher.train.epochs=2500", "students.0.train.epochs=10", "labeling.tasks=1")
"""Its teacher trains for a minute or more, and writes a checkpoint every five seconds."""
CHECKPOINTS = ("teacher.train.checkpoint_seconds=5",)
MAX_SHARE = 0.6
"""Of Argo's limit, for a compressed Workflow."""
LARGE_TASKS, LARGE_GENERATIONS = 50, 3
LARGE = (
    *(f"generations={LARGE_GENERATIONS}", "gate.min_gain=-1", f"labeling.tasks={LARGE_TASKS}", "data.shard_samples=17"),
    *("teacher.train.epochs=100", "students.0.train.epochs=10"),
)
"""Each labeling task has a shard of 17 images, and every student is accepted."""

# ns.training.checkpoint, which names these files, imports torch.
_CHECKPOINT = re.compile(r"/step-(\d{8})-[0-9a-f]{16}\.safetensors$")

Say = Callable[[str], None]


class Observation(NamedTuple):
    """A row of the table."""

    check: str
    what: str
    expected: str
    seen: str
    ok: bool


class CheckRecord(BaseModel):
    """What a check has seen, the last time it was tried."""

    model_config = ConfigDict(frozen=True)

    tries: int
    """How often it was tried, this time included."""
    rows: tuple[Observation, ...] = ()
    skipped: str = ""
    """What the cluster lacks for it."""

    @property
    def passed(self) -> bool:
        return bool(self.rows) and all(row.ok for row in self.rows)


class AcceptanceRecord(JsonDocument):
    """What all checks have seen on one cluster; a file between two calls."""

    version: str
    """Of what was deployed: another version is tried from the beginning."""
    checks: dict[str, CheckRecord] = Field(default_factory=dict)

    def list_rows(self) -> list[Observation]:
        """All rows, in the order of the checks."""
        return [row for name in CHECKS if name in self.checks for row in self.checks[name].rows]


class SkippedCheck(Exception):
    """The cluster lacks what a check needs; the message says what."""


@dataclass(frozen=True)
class Platform:
    """The deployed platform, as checks use it."""

    kubectl: Kubectl
    namespace: str
    client: KfpClient
    pipeline: UploadedPipeline
    package: str
    """Its compiled pipeline."""
    root: Store
    """The platform's store."""
    version: str
    """Of what is deployed; part of the names of runs."""
    say: Say

    def find_workflow(self, run: SubmittedRun) -> K8sObject | None:
        workflows = self.kubectl.list_objects("workflows.argoproj.io", self.namespace, f"{RUN_LABEL}={run.run_id}")
        return next(iter(workflows), None)

    def list_pods(self, run: SubmittedRun) -> list[K8sObject]:
        return self.kubectl.list_objects("pods", self.namespace, f"{RUN_LABEL}={run.run_id}")


@contextmanager
def open_platform(kubectl: Kubectl, namespace: str, say: Say) -> Iterator[Platform]:
    """Gives what is deployed in a namespace. Its runs ask for little, so that a small cluster has room for many pods at once."""
    config_map = kubectl.get_object("configmap", PLACEMENT_CONFIG_MAP, namespace) or {}
    inputs = (config_map.get("data") or {}).get(PLACEMENT_KEY, "")
    placement = Placement.from_json(inputs, f"ConfigMap {namespace}/{PLACEMENT_CONFIG_MAP}: {PLACEMENT_KEY}")
    package = render_package(PACKAGE.read_text(), replace(placement, **SMALL_PODS), name=EXPERIMENT)
    with open_cluster_access(kubectl, namespace, say) as url:
        client = KfpClient(url, patience_seconds=PATIENCE_SECONDS)
        pipeline = client.upload_pipeline(package)
        yield Platform(kubectl, namespace, client, pipeline, package, open_store(placement.root), pipeline.version[-12:], say)


@dataclass
class Trial:
    """A check under way: starts its run, follows it, and collects what was seen."""

    platform: Platform
    check: str
    number: int
    """How often the check was tried before."""
    rows: list[Observation] = field(default_factory=list)

    @property
    def run_name(self) -> str:
        return f"acceptance-{self.check}-{self.platform.version}-{self.number}"

    @property
    def root(self) -> Store:
        """A root of its own: nothing in it was done by another check."""
        return open_store(f"{self.platform.root.uri}/acceptance/{self.run_name}")

    def add_row(self, what: str, expected: str, seen: str, ok: bool) -> None:
        self.rows.append(Observation(self.check, what, expected, seen, ok))
        self.platform.say(f"  {'ok' if ok else 'NO'}  {what}: {seen}{'' if ok else f'; expected {expected}'}")

    def start_run(self, overrides: Sequence[str], *, name: str = "", **inputs: Any) -> SubmittedRun:
        """Starts the run of this trial, or finds it. `name`: of a second run in the same root."""
        name = name or self.run_name
        arguments = {"config": "quickstart", "overrides": [*overrides], "run": f"{self.root.uri}/{name}", **inputs}
        run = self.platform.client.create_run(
            self.platform.pipeline, arguments, name=name, experiment=EXPERIMENT, excluded_states=()
        )
        self.platform.say(f"  {run.name}: {'started' if run.new else run.state.lower()}: {run.url}")
        return run

    def follow_run(
        self, run: SubmittedRun, after_poll: Callable[[], None] = lambda: None, *, seconds: float | None = None
    ) -> SubmittedRun:
        """Waits for the end of the run, and notes its last state. Ends it and raises RunError after `seconds`, or else RUN_SECONDS."""
        limit = RUN_SECONDS if seconds is None else seconds
        until = time.monotonic() + limit

        def check_time() -> None:
            if time.monotonic() > until:
                self.platform.client.terminate_run(run.run_id)
                raise RunError(f"{run.name}: had not ended after {format_duration(limit)}, and was terminated")
            after_poll()

        return self.platform.client.wait_for_run(run.run_id, check_time)

    def observe_success(self, run: SubmittedRun) -> None:
        """Notes how a run ended, with the reasons of stages that failed."""
        reasons = "; ".join(str(failure) for failure in list_stage_failures(self.root, run.name))
        self.add_row(
            "the run", "succeeded", f"{run.state.lower()}{f': {reasons}' if reasons else ''}", run.state == "SUCCEEDED"
        )

    def fetch_workflow(self, run: SubmittedRun) -> K8sObject:
        """Raises RunError if it is gone: Argo keeps it for an hour."""
        workflow = self.platform.find_workflow(run)
        if workflow is None:
            raise RunError(f"{run.name}: its Workflow is gone, so what happened in it is not known; try the check again")
        return workflow


class Check(NamedTuple):
    """Something that is tried."""

    title: str
    cost: str
    """Time on a cluster of two cores, and what else it takes."""
    try_it: Callable[[Trial], None]


def try_smoke(trial: Trial) -> None:
    run = trial.start_run(SMALL)
    trial.observe_success(trial.follow_run(run))
    workflow = trial.fetch_workflow(run)
    figures = measure_workflow(workflow)
    trial.add_row("wall time", "told", format_duration(measure_seconds(workflow)), True)
    _observe_size(trial, figures, RunShape(generations=1, tasks=1))
    notes = list_stage_notes(trial.root, run.name)
    worked = sum(note.seconds for note in notes if not note.reused)
    trial.add_row("time that stages worked", "told", format_duration(worked), True)


def try_reuse(trial: Trial) -> None:
    trial.observe_success(trial.follow_run(trial.start_run(SMALL)))
    again = trial.start_run(SMALL, name=f"{trial.run_name}-again")
    trial.observe_success(trial.follow_run(again))
    notes = list_stage_notes(trial.root, again.name)
    trained = [note for note in notes if note.stage == "train" and not note.reused]
    trial.add_row("trainings of a run like one before", "0", str(len(trained)), not trained and bool(notes))
    trial.add_row("its wall time", "told", format_duration(measure_seconds(trial.fetch_workflow(again))), True)


def try_killed_trainer(trial: Trial) -> None:
    _try_fault(trial, kill_processes)


def try_deleted_pod(trial: Trial) -> None:
    _try_fault(trial, delete_pod, is_asked_to_stop=True)


def try_drained_node(trial: Trial) -> None:
    kubectl = trial.platform.kubectl
    nodes = [node["metadata"]["name"] for node in kubectl.list_objects("nodes") if not node["spec"].get("unschedulable")]
    if len(nodes) < 2:
        raise SkippedCheck(f"needs two nodes that take pods, and there is {len(nodes)}")
    drained: list[str] = []

    def drain_node(platform: Platform, pod: K8sObject) -> None:
        drained.append(pod["spec"]["nodeName"])
        platform.kubectl.run_command("cordon", drained[0])
        # Only what belongs to this run: other people's pods stay.
        selector = f"{RUN_LABEL}={pod['metadata']['labels'][RUN_LABEL]}"
        platform.kubectl.run_command(
            *("drain", drained[0], f"--pod-selector={selector}", "--force", "--ignore-daemonsets", "--delete-emptydir-data"),
            seconds=300,
        )

    try:
        _try_fault(trial, drain_node, is_asked_to_stop=True)
    finally:
        for node in drained:
            kubectl.run_command("uncordon", node)


def try_terminated_run(trial: Trial) -> None:
    run = trial.start_run([*LONG_TEACHER, *CHECKPOINTS])
    terminated_at = 0.0

    def terminate_once() -> None:
        nonlocal terminated_at
        if not terminated_at and _read_progress(trial.root, run.name):
            trial.platform.client.terminate_run(run.run_id)
            terminated_at = time.monotonic()

    ended = trial.follow_run(run, terminate_once)
    trial.add_row("state that the client tells", "canceled", ended.state.lower(), ended.state == "CANCELED")
    alive = [""]
    while alive and time.monotonic() < terminated_at + GONE_SECONDS:
        time.sleep(POLL_SECONDS)
        pods = trial.platform.list_pods(run)
        alive = [pod["metadata"]["name"] for pod in pods if pod["status"].get("phase") in ("Running", "Pending")]
    seconds = time.monotonic() - terminated_at
    gone = f"{len(alive)} left after {format_duration(seconds)}" if alive else f"all gone after {format_duration(seconds)}"
    trial.add_row("its pods", f"all gone within {format_duration(GONE_SECONDS)}", gone, not alive)


def try_bad_settings(trial: Trial) -> None:
    run = trial.follow_run(trial.start_run([*SMALL, "selection.min_confidence=0.999999"]))
    trial.add_row("a run whose settings select nothing", "failed", run.state.lower(), run.state == "FAILED")
    reasons = [str(failure) for failure in list_stage_failures(trial.root, run.name)]
    trial.add_row("its reason in the store", "one line", "; ".join(reasons) or "none", len(reasons) == 1)


def try_many_tasks(trial: Trial) -> None:
    run = trial.start_run(LARGE)
    trial.observe_success(trial.follow_run(run, seconds=4 * RUN_SECONDS))
    workflow = trial.fetch_workflow(run)
    _observe_size(trial, measure_workflow(workflow), RunShape(LARGE_GENERATIONS, LARGE_TASKS))
    trial.add_row("wall time", "told", format_duration(measure_seconds(workflow)), True)


def try_several_nodes(trial: Trial) -> None:
    kubectl, namespace = trial.platform.kubectl, trial.platform.namespace
    kinds = {definition["metadata"]["name"] for definition in kubectl.list_objects("customresourcedefinitions")}
    if TRAIN_JOBS not in kinds:
        raise SkippedCheck("needs Kubeflow Trainer, and this cluster has no TrainJobs")

    def list_jobs() -> set[str]:
        return {job["metadata"]["uid"] for job in kubectl.list_objects(TRAIN_JOBS, namespace)}

    earlier, seen = list_jobs(), set[str]()
    run = trial.start_run(SMALL, nodes=2)
    trial.observe_success(trial.follow_run(run, lambda: seen.update(list_jobs() - earlier)))
    trial.add_row("TrainJobs", "1 or more", str(len(seen)), bool(seen))
    left = list_jobs() & seen
    trial.add_row("TrainJobs that outlive their run", "0", str(len(left)), not left)


def _try_fault(trial: Trial, hit: Callable[[Platform, K8sObject], object], *, is_asked_to_stop: bool = False) -> None:
    """Hits the pod of the first training once that has written a checkpoint, and follows the run to its end.

    `is_asked_to_stop`: the training has time for a checkpoint (preStop of its pod), and so loses nothing.
    """
    run = trial.start_run([*LONG_TEACHER, *CHECKPOINTS])
    watcher = _TrainingWatcher(trial, run, hit)
    trial.observe_success(trial.follow_run(run, watcher.poll_run))
    tries = list_tries(trial.fetch_workflow(run), TRAINING)
    trial.add_row("tries of its training", "2", str(len(tries)), len(tries) == 2)
    seen = f"at step {watcher.first_step}, after {watcher.hit_step} with a checkpoint of {watcher.resumed_step}"
    went_on = watcher.first_step >= watcher.resumed_step > 0
    trial.add_row("the second try goes on", "where the last checkpoint was", seen, went_on)
    if is_asked_to_stop:
        lost = max(0, watcher.hit_step - watcher.resumed_step)
        trial.add_row("steps that were lost", "0", str(lost), lost == 0)


class _TrainingWatcher:
    """Follows the first training of a run by what it leaves in the store, and hits its pod once."""

    def __init__(self, trial: Trial, run: SubmittedRun, hit: Callable[[Platform, K8sObject], object]) -> None:
        self._trial, self._run, self._hit = trial, run, hit
        self.hit_step = 0
        """The step it was seen at just before the hit."""
        self.resumed_step = 0
        """The step of the newest checkpoint when the second try began."""
        self.first_step = 0
        """The step that the second try was first seen at."""

    def poll_run(self) -> None:
        if self.first_step:
            return
        platform, root = self._trial.platform, self._trial.root
        tries = list_tries(platform.find_workflow(self._run) or {}, TRAINING)
        progress = _read_progress(root, self._run.name)
        checkpoint = _find_checkpoint(root)
        if len(tries) == 1 and not self.hit_step and checkpoint and progress:
            pods = [pod for pod in platform.list_pods(self._run) if read_node_id(pod) == tries[0].node_id]
            if pods:
                self.hit_step = int(progress["step"])
                platform.say(
                    f"  at step {self.hit_step}, with a checkpoint of step {checkpoint}: {pods[0]['metadata']['name']}"
                )
                self._hit(platform, pods[0])
        elif len(tries) > 1 and tries[1].started_at:
            self.resumed_step = self.resumed_step or checkpoint
            if progress and datetime.fromisoformat(progress["updated_at"]) > datetime.fromisoformat(tries[1].started_at):
                self.first_step = int(progress["step"])


def kill_processes(platform: Platform, pod: K8sObject) -> None:
    """Kills all Python processes of a stage, as the kernel does when memory is exhausted."""
    # Not by their arguments: this shell's own name them.
    script = "for process in /proc/[0-9]*; do grep -qs ^python $process/comm && kill -9 ${process#/proc/}; done; true"
    name, namespace = pod["metadata"]["name"], f"--namespace={platform.namespace}"
    platform.kubectl.run_command("exec", name, namespace, "--container=main", "--", "sh", "-c", script)


def delete_pod(platform: Platform, pod: K8sObject) -> None:
    name, namespace = pod["metadata"]["name"], f"--namespace={platform.namespace}"
    platform.kubectl.run_command("delete", "pod", name, namespace, "--wait=false")


def _observe_size(trial: Trial, figures: WorkflowFigures, shape: RunShape) -> None:
    """Holds what a run cost Argo against what is predicted for it; tries that failed add to both pods and nodes."""
    predicted = predict_run(trial.platform.package, shape)
    for what, seen, expected in (
        ("pods", figures.pods, predicted.pods),
        ("of which drivers", figures.drivers, predicted.drivers),
        ("entries of Argo's status", figures.nodes, len(predicted.nodes)),
    ):
        trial.add_row(what, f"about {expected}", str(seen), abs(seen - expected) <= expected / 10)
    trial.add_row("size of the Workflow", "told", f"{figures.raw_bytes / 1024:,.0f} KiB", True)
    share = figures.packed_bytes / MAX_PACKED_BYTES
    seen_share = f"{figures.packed_bytes / 1024:,.0f} KiB, {share:.0%} of Argo's limit"
    is_as_predicted = abs(share - predicted.share) <= predicted.share / 4 and share <= MAX_SHARE
    trial.add_row(
        "its size, compressed",
        f"about {predicted.share:.0%} of Argo's limit, at most {MAX_SHARE:.0%}",
        seen_share,
        is_as_predicted,
    )


def _read_progress(root: Store, run: str) -> dict[str, Any]:
    """What a training in progress says of itself; empty if none does."""
    key = f"{run}/{PROGRESS}"
    return parse_json_object(root.get(key), key) if root.exists(key) else {}


def _find_checkpoint(root: Store) -> int:
    """The step of the newest checkpoint of all trainings; 0 if there is none."""
    return max((int(match[1]) for key in root.list("store/checkpoints/") if (match := _CHECKPOINT.search(key))), default=0)


CHECKS: dict[str, Check] = {
    "smoke": Check("one generation", "8 minutes", try_smoke),
    "reuse": Check("the same run under another name", "12 minutes", try_reuse),
    "killed-trainer": Check("a trainer's processes are killed", "8 minutes", try_killed_trainer),
    "deleted-pod": Check("a trainer's pod is deleted", "8 minutes", try_deleted_pod),
    "drained-node": Check("a trainer's node is drained", "8 minutes; a node takes no pods in this time", try_drained_node),
    "terminated": Check("a run is terminated", "3 minutes", try_terminated_run),
    "bad-settings": Check("a stage fails for good", "5 minutes", try_bad_settings),
    "many-tasks": Check(f"{LARGE_TASKS} labeling tasks × {LARGE_GENERATIONS} generations", "40 minutes", try_many_tasks),
    "several-nodes": Check("a training on two nodes", "8 minutes", try_several_nodes),
}


def choose_checks(only: Sequence[str], skip: Sequence[str]) -> list[str]:
    """Returns the names of the checks to try, in their order. Raises ConfigError for a name that no check has."""
    for name in (*only, *skip):
        if name not in CHECKS:
            raise ConfigError(f"there is no check {name}; there are {', '.join(CHECKS)}")
    return [name for name in CHECKS if (not only or name in only) and name not in skip]


def try_checks(platform: Platform, names: Sequence[str], folder: Store, key: str, *, again: bool = False) -> AcceptanceRecord:
    """Tries the checks, and returns what all have seen so far. Those that were as expected before are not tried again.

    `folder`, `key`: the file that keeps what was seen. `again`: try all of `names`. An error of a check is a row, and the others go on.
    """
    record = AcceptanceRecord.find_file(folder, key)
    if record is None or record.version != platform.version:
        record = AcceptanceRecord(version=platform.version)
    for name in names:
        earlier = record.checks.get(name, CheckRecord(tries=0))
        if earlier.passed and not again:
            platform.say(f"{name}: was as expected")
            continue
        latest = _try_check(platform, name, earlier.tries)
        record = record.model_copy(update={"checks": {**record.checks, name: latest}})
        record.save_file(folder, key)
    return record


def _try_check(platform: Platform, name: str, tries: int) -> CheckRecord:
    check, started = CHECKS[name], time.monotonic()
    platform.say(f"{name}: {check.title}; takes about {check.cost}")
    trial = Trial(platform, name, tries)
    try:
        check.try_it(trial)
    except SkippedCheck as reason:
        platform.say(f"  --  {reason}")
        return CheckRecord(tries=tries, skipped=str(reason))
    except Interrupted:
        raise
    except NsError as error:
        trial.add_row("the check", "ends without an error", str(error), ok=False)
    platform.say(f"{name}: took {format_duration(time.monotonic() - started)}")
    return CheckRecord(tries=tries + 1, rows=tuple(trial.rows))


def format_rows(record: AcceptanceRecord) -> str:
    """The table of expected and seen, with a line for each check that was left out."""
    rows = [("", "check", "what", "expected", "seen")]
    rows += [("ok" if row.ok else "NO", row.check, row.what, row.expected, row.seen) for row in record.list_rows()]
    rows += [("--", name, "left out", "", check.skipped) for name, check in record.checks.items() if check.skipped]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join("  ".join([*map(str.ljust, row[:4], widths), row[4]]).rstrip() for row in rows)
