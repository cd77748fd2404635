"""Runs the pipeline on Kubeflow: submits it and shows its progress.

KFP says whether the run has ended. The stages leave in the run's folder which of them are under way, what they made, their progress, and
why they failed. The client only watches: the run continues without it.
"""

import contextlib
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ns import __version__
from ns.config.schema import Experiment
from ns.core.errors import ConfigError, NsError, RunError, TerminatedError
from ns.core.log import StageEvent
from ns.core.process import handle_signals
from ns.runs.lifecycle import finish_run, open_run
from ns.runs.records import (
    BASELINE_STAGES,
    CONFIG_FILE,
    RunState,
    StageFailure,
    StageNote,
    StageTry,
    list_stage_failures,
    list_stage_tries,
)
from ns.storage import LocalStore, Store
from ns.storage.documents import parse_json_object
from ns.training.monitor import PROGRESS
from pipelines import PACKAGE
from pipelines.kfp_client import (
    ENDED_STATES,
    KfpClient,
    KfpUnreachableError,
    SubmittedRun,
    check_inputs,
    parse_inputs,
    stage_names,
)
from pipelines.placement import PLACEMENT_FIELDS, TEXT_FIELDS, Placement
from pipelines.versions import provide_pipeline

_SHARDS = re.compile(r"-(\d+-\d+)$")
"""The suffix of a labeling task in the stage's name."""


class RunRequest(NamedTuple):
    """A run that is to be started."""

    placed: dict[str, Any]
    """Fields of the placement that are the run's own; all else is the platform's."""
    inputs: dict[str, Any]
    image: str | None
    """Image of the stages, if one is asked for."""


def build_request(
    root: Store,
    run: str,
    *,
    image: str | None = None,
    gpus: int = 0,
    inputs: Sequence[str] = (),
    registry: bool = False,
) -> RunRequest:
    """Builds the request for a run that `open_run` has opened below `root`.

    `image`: of the stages; `gpus`: of each labeling task and each training; `inputs`: inputs of the pipeline and fields of the placement,
    NAME=VALUE; `registry`: whether the experiment has a label registry, which the stages' image does not support. Raises ConfigError naming
    the input that is wrong or missing.
    """
    package = PACKAGE.read_text()
    folder = root.at(run).uri
    given = parse_inputs(package, inputs, TEXT_FIELDS)
    placed = {name: given.pop(name) for name in list(given) if name in PLACEMENT_FIELDS}
    image = image or placed.get("worker_image")
    if image:
        if registry and "tools_image" not in placed:
            raise ConfigError(
                "--input tools_image: must be given beside --image: the experiment has a registry, and the stages' image has no DVC; "
                "add --input tools_image=REGISTRY/noisy-student/tools@sha256:…"
            )
        placed = {"tools_image": image} | placed | {"worker_image": image}
    values = {"config": f"{folder}/{CONFIG_FILE}", "run": folder}
    if gpus:
        values |= {"gpus_label": str(gpus), "gpus_train": str(gpus)}
    values = check_inputs(package, values | given)
    valid = Placement.from_values(placed, "--input")
    return RunRequest({name: getattr(valid, name) for name in placed}, values, image)


def check_remote_uris(root: Store, experiment: Experiment) -> None:
    """Raises ConfigError naming the first URI that only this machine can reach."""
    if isinstance(root, LocalStore):
        raise ConfigError(
            f"--root: invalid value {root.root}: a cluster cannot read folders of this machine; give s3://bucket/prefix"
        )
    for field, uri in experiment.map_uris().items():
        if not uri.startswith("s3://"):
            raise ConfigError(
                f"{field}: invalid value {uri}: a cluster cannot read folders of this machine; put it on S3 (s3://…)"
            )


def submit_run(
    client: KfpClient,
    root: Store,
    run: str,
    experiment: Experiment,
    request: RunRequest,
    say: Callable[[str], object] = lambda _: None,
) -> SubmittedRun:
    """Starts a run as `build_request` has it, unless it is under way. Leaves nothing behind if KFP cannot be reached.

    `say`: is told if the pipeline is not the platform's.
    """
    existing = client.find_run(run, experiment.name, excluded_states=ENDED_STATES)
    if existing is not None:
        return existing
    pipeline = provide_pipeline(client, request.placed, say)
    open_run(root, run, experiment, __version__)
    try:
        return client.create_run(pipeline, request.inputs, name=run, experiment=experiment.name, excluded_states=ENDED_STATES)
    except NsError as error:
        with contextlib.suppress(NsError):
            finish_run(root, run, "failed", str(error))
        raise


def follow_run(
    client: KfpClient,
    submitted: SubmittedRun,
    root: Store,
    run: str,
    on_event: Callable[[StageEvent], None],
    *,
    after_poll: Callable[[], None] = lambda: None,
    explain_pods: Callable[[], Mapping[str, str]] = dict,
) -> None:
    """Shows a run until it has ended.

    `after_poll` is called every few seconds. `explain_pods` says why the pods of stages failed, as Kubernetes has it: task → reason.
    Raises RunError with each failed stage and its reason if the run failed, or if it is lost, TerminatedError if a person ended it, and
    Interrupted after SIGINT or SIGTERM.
    """
    watcher = _StageRecordWatcher(root, run, on_event)

    def poll_all() -> None:
        watcher.poll_records()
        after_poll()

    # SIGTERM acts like Ctrl-C; a job in the background receives both.
    with handle_signals(signal.default_int_handler):
        try:
            ended = client.wait_for_run(submitted.run_id, poll_all)
        except KfpUnreachableError:
            raise
        except RunError as reason:
            lost = RunError(f"run {run}: {reason}; logs: {submitted.url}")
            _record_end(root, run, "failed", lost)
            raise lost from reason
    if ended.state == "SUCCEEDED":
        return
    if ended.state != "FAILED":
        error: NsError = TerminatedError(
            f"run {run}: was terminated in Kubeflow; the same command continues; logs: {ended.url}"
        )
        _record_end(root, run, "interrupted", error)
        raise error
    reasons = _explain_failures(client, ended, root, run, explain_pods())
    error = RunError(f"{reasons}; logs: {ended.url}")
    _record_end(root, run, "failed", RunError(reasons))
    raise error


def _record_end(root: Store, run: str, state: RunState, error: NsError) -> None:
    # The store may be what failed: why the run ended matters more than that this could not be recorded.
    with contextlib.suppress(NsError):
        finish_run(root, run, state, str(error))


def _explain_failures(client: KfpClient, ended: SubmittedRun, root: Store, run: str, pod_reasons: Mapping[str, str]) -> str:
    """Lists the failed stages with the reason that each recorded, or that of its pod, or that there is none."""
    failures: list[StageFailure] = []
    killed: list[StageTry] = []
    unreadable = ""
    try:
        failures, killed = list_stage_failures(root, run), list_stage_tries(root, run)
    except NsError as error:
        unreadable = f"; the stages' own records cannot be read: {error}"
    reasons = [str(failure) for failure in failures]
    explained = {_find_task(failure.stage, failure.generation) for failure in failures}
    for stage_try in killed:
        stage = _split_note_name(stage_try.stage)[0]
        prefix = f"generation {stage_try.generation}: " if stage_try.generation else ""
        task = _find_task(stage, stage_try.generation)
        reason = pod_reasons.get(task) or "exited without an error message (killed? out of memory? timed out?)"
        reasons.append(f"{prefix}{stage}: {reason}")
        explained.add(task)
    reasons += [f"{stage}: {reason}" for stage, reason in pod_reasons.items() if stage not in explained]
    if not reasons:
        # Such a stage did not begin.
        with contextlib.suppress(NsError):
            stages = stage_names(PACKAGE.read_text())
            reasons = [f"{stage}: failed before it began" for stage in client.list_failed_tasks(ended.run_id, stages)]
    return ("; ".join(dict.fromkeys(reasons)) or "no stage recorded a reason") + unreadable


def _find_task(stage: str, generation: int) -> str:
    """The task of the pipeline, and so the name of the pod, that a stage is part of."""
    is_boxed = stage in ("train", "evaluate", "check", "gate", *BASELINE_STAGES)
    return ("student" if generation else "teacher") if is_boxed else stage


def _split_note_name(note_name: str) -> tuple[str, str]:
    """`label-0-4` → the stage and its range of shards, which is empty for other stages."""
    shards = _SHARDS.search(note_name)
    return _SHARDS.sub("", note_name), shards[1] if shards else ""


StageKey = tuple[int, str]
"""Generation and name of the note."""


class _StageRecordWatcher:
    """Turns the records that stages leave in the run's folder into events."""

    def __init__(self, root: Store, run: str, on_event: Callable[[StageEvent], None]) -> None:
        self._root, self._run = root, run
        self._on_event = on_event
        self._stamps: dict[str, str] = {}
        self._open: dict[StageKey, StageTry] = {}
        self._progress_at = ""

    def poll_records(self) -> None:
        """Emits what is new. Watching must not fail while the run continues: what cannot be read now is read later."""
        with contextlib.suppress(NsError):
            # Read first: a stage writes its note, or why it failed, before it takes this away.
            under_way = {(entry.generation, entry.stage): entry for entry in list_stage_tries(self._root, self._run)}
            for key, stage_try in under_way.items():
                self._start_stage(key, stage_try)
            for key, blob in self._list_changed("failures"):
                for failure in StageFailure.iterate_files(self._root, [blob]):
                    self._end_stage(key, {"event": "failed", "exit_code": failure.exit_code, "reason": failure.error})
            for key, blob in self._list_changed("stages"):
                for note in StageNote.iterate_files(self._root, [blob]):
                    # An earlier run of the same name left it; the try that is under way will find that work done.
                    if key in self._open and note.finished_at < self._open[key].started_at:
                        continue
                    self._end_stage(key, {"event": "noted", "seconds": note.seconds, "reused": note.reused})
            for key in self._open.keys() - under_way.keys():
                # A stage that found its own work of an earlier try leaves the note as it was.
                self._end_stage(key, {"event": "noted", "seconds": 0.0, "reused": True})
            self._poll_progress()

    def _list_changed(self, folder: str) -> Iterator[tuple[StageKey, str]]:
        """Yields stage and key of the records that are new or have changed, the oldest first."""
        prefix = f"{self._run}/{folder}/"
        changed = [entry for entry in self._root.entries(prefix) if self._stamps.get(entry.key) != entry.stamp]
        for entry in sorted(changed, key=lambda entry: entry.modified_at):
            generation, _, note_name = entry.key.removeprefix(prefix).removesuffix(".json").partition("-")
            if generation.isascii() and generation.isdigit() and note_name and entry.key.endswith(".json"):
                yield (int(generation), note_name), entry.key
            # Only now: what could not be read is read again.
            self._stamps[entry.key] = entry.stamp

    def _start_stage(self, key: StageKey, stage_try: StageTry) -> None:
        if (previous := self._open.get(key)) == stage_try:
            return
        if previous:
            reason = f"exited without an error message; try {stage_try.number} is under way"
            self._end_stage(key, {"event": "failed", "exit_code": 1, "reason": reason})
        self._open[key] = stage_try
        self._emit_event(key, {"event": "started"})

    def _end_stage(self, key: StageKey, event: StageEvent) -> None:
        self._open.pop(key, None)
        self._emit_event(key, event)

    def _emit_event(self, key: StageKey, event: StageEvent) -> None:
        generation, note_name = key
        stage, shards = _split_note_name(note_name)
        self._on_event({**event, "stage": stage, "generation": generation, "shards": shards})

    def _poll_progress(self) -> None:
        key = f"{self._run}/{PROGRESS}"
        if not any(note_name == "train" for _, note_name in self._open) or not self._root.exists(key):
            return
        progress = parse_json_object(self._root.get(key), key)
        generation, _, name = str(progress["training"]).partition("-")
        if name != "train" or progress["updated_at"] == self._progress_at or (int(generation), "train") not in self._open:
            return
        self._progress_at = progress["updated_at"]
        per_step = progress["images"] / max(1, progress["step"])
        event: StageEvent = {
            "event": "progress",
            "done": progress["images"],
            "total": round(progress["steps"] * per_step),
            "per_second": progress["images_per_second"],
            "unit": "images",
        }
        if "loss" in progress["latest"]:
            event["loss"] = progress["latest"]["loss"]
        self._emit_event((int(generation), "train"), event)
