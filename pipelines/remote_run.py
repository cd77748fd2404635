"""Runs the pipeline on Kubeflow: submits it and shows its progress.

KFP says which stage runs or failed; the stages leave their generation, their progress and the reason of a failure in the run's folder.
The client only watches: the run continues without it.
"""

import contextlib
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ns import __version__
from ns.config.schema import Experiment
from ns.core.errors import ConfigError, Interrupted, NsError, RunError
from ns.core.log import StageEvent
from ns.core.process import handle_signals
from ns.runs.lifecycle import finish_run, open_run
from ns.runs.records import list_stage_failures, list_stage_notes
from ns.storage import LocalStore, Store
from ns.storage.documents import parse_json_object
from ns.training.monitor import PROGRESS
from pipelines import PACKAGE
from pipelines.kfp_client import ENDED_STATES, KfpClient, StageTask, SubmittedRun, check_inputs, parse_inputs, stage_names

_SHARDS = re.compile(r"-(\d+-\d+)$")
"""The suffix of a labeling task in the stage's name."""


def build_inputs(
    config_uri: str,
    root: Store,
    run: str,
    *,
    image: str | None = None,
    gpus: int = 0,
    inputs: Sequence[str] = (),
    registry: bool = False,
) -> dict[str, Any]:
    """Builds the pipeline's inputs.

    `image`: of the stages; `gpus`: of each labeling task and each training; `inputs`: further ones, NAME=VALUE; `registry`: whether the
    experiment has a label registry, which the stages' image does not support. Raises ConfigError naming the input that is wrong or missing.
    """
    package = PACKAGE.read_text()
    values: dict[str, Any] = {"config_uri": config_uri, "root": root.uri, "run": run}
    extra = parse_inputs(package, inputs)
    image = image or extra.get("worker_image")
    if image:
        if registry and "tools_image" not in extra:
            raise ConfigError(
                "--input tools_image: must be given beside --image: the experiment has a registry, and the stages' image has no DVC; "
                "add --input tools_image=REGISTRY/noisy-student/tools@sha256:…"
            )
        extra = {"tools_image": image} | extra | {"worker_image": image}
    if gpus:
        values |= {"label_gpus": str(gpus), "train_gpus": str(gpus)}
    return check_inputs(package, values | extra)


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


def submit_run(client: KfpClient, root: Store, run: str, experiment: Experiment, inputs: Mapping[str, Any]) -> SubmittedRun:
    """Starts a run with the inputs that `build_inputs` made, unless it is under way. Leaves nothing behind if KFP cannot be reached."""
    existing = client.find_run(run, experiment.name, excluded_states=ENDED_STATES)
    if existing is not None:
        return existing
    pipeline = client.upload_pipeline(PACKAGE.read_text())
    open_run(root, run, experiment, __version__)
    try:
        return client.create_run(pipeline, inputs, name=run, experiment=experiment.name, excluded_states=ENDED_STATES)
    except NsError as error:
        with contextlib.suppress(NsError):
            finish_run(root, run, "failed", str(error))
        raise


def follow_run(
    client: KfpClient, submitted: SubmittedRun, root: Store, run: str, on_event: Callable[[StageEvent], None]
) -> None:
    """Shows a run until it has ended.

    Raises RunError with each failed stage and its reason if the run failed, and Interrupted after SIGINT or SIGTERM, or if the run was
    cancelled.
    """
    watcher = _StageRecordWatcher(root, run, on_event)
    last: dict[str, StageTask] = {}

    def report_task(task: StageTask) -> None:
        last[task.key] = task
        on_event({"event": "state", "stage": task.name, "state": task.state})

    # SIGTERM acts like Ctrl-C; a job in the background receives both.
    with handle_signals(signal.default_int_handler):
        stages = stage_names(PACKAGE.read_text())
        ended = client.wait_for_run(submitted.run_id, report_task, stages=stages, after_poll=watcher.poll_records)
    if ended.state == "SUCCEEDED":
        return
    if ended.state != "FAILED":
        error: NsError = Interrupted(f"run {run}: was terminated; the same command continues")
        finish_run(root, run, "interrupted", str(error))
        raise error
    reasons = _explain_failures(root, run, [task for task in last.values() if task.state == "FAILED"])
    finish_run(root, run, "failed", reasons)
    raise RunError(f"{reasons}; logs: {ended.url}")


def _explain_failures(root: Store, run: str, failed: Sequence[StageTask]) -> str:
    """Lists the failed stages with the reason that the stage recorded, or else KFP's, or else that there is none."""
    recorded = list_stage_failures(root, run)
    reasons = [str(failure) for failure in recorded]
    unexplained = [task for task in failed if task.name not in {failure.stage for failure in recorded}]
    reasons += [
        f"{task.name}: {task.error or 'exited without an error message (killed? out of memory? timed out?)'}"
        for task in unexplained
    ]
    return "; ".join(dict.fromkeys(reasons)) or "no stage recorded a reason"


class _StageRecordWatcher:
    """Turns the records that stages leave in the run's folder into events."""

    def __init__(self, root: Store, run: str, on_event: Callable[[StageEvent], None]) -> None:
        self._root, self._run = root, run
        self._on_event = on_event
        self._seen: dict[tuple[int, str], str] = {}
        self._progress_at = ""
        self._trainings: set[str] = set()

    def poll_records(self) -> None:
        """Emits what is new. Watching must not fail while the run continues: what cannot be read now is read later."""
        with contextlib.suppress(NsError):
            for stage_record in list_stage_notes(self._root, self._run):
                key = (stage_record.generation, stage_record.stage)
                if self._seen.get(key) != stage_record.finished_at:
                    self._seen[key] = stage_record.finished_at
                    stage, shards = _SHARDS.sub("", stage_record.stage), _SHARDS.search(stage_record.stage)
                    self._on_event(
                        {
                            "event": "noted",
                            "stage": stage,
                            "generation": stage_record.generation,
                            "shards": shards[1] if shards else "",
                            "seconds": stage_record.seconds,
                            "reused": stage_record.reused,
                        }
                    )
            self._poll_progress()

    def _poll_progress(self) -> None:
        key = f"{self._run}/{PROGRESS}"
        if not self._root.exists(key):
            return
        progress = parse_json_object(self._root.get(key), key)
        generation, _, name = str(progress["training"]).partition("-")
        if name != "train" or progress["updated_at"] == self._progress_at or (int(generation), "train") in self._seen:
            return
        if generation not in self._trainings:
            self._trainings.add(generation)
            self._on_event({"event": "started", "stage": "train", "generation": int(generation)})
        self._progress_at = progress["updated_at"]
        per_step = progress["images"] / max(1, progress["step"])
        event: StageEvent = {
            "event": "progress",
            "stage": "train",
            "generation": int(generation),
            "done": progress["images"],
            "total": round(progress["steps"] * per_step),
            "per_second": progress["images_per_second"],
            "unit": "images",
        }
        if "loss" in progress["latest"]:
            event["loss"] = progress["latest"]["loss"]
        self._on_event(event)
