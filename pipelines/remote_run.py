"""Runs the pipeline on Kubeflow: submits it, and shows how it goes.

Which step is under way or failed, KFP says; to which generation it belongs, how far a training is and why a step failed, the steps leave
in the run's folder. The client only watches: the run goes on without it.
"""

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

from ns import __version__
from ns.config.schema import Experiment
from ns.core.errors import ConfigError, Interrupted, NsError, RunError
from ns.core.process import handle_signals
from ns.runs import records as runs
from ns.storage import LocalStore, Store
from ns.storage.documents import parse_json_object
from ns.training.monitor import PROGRESS
from pipelines import PACKAGE
from pipelines.kfp_client import (
    ENDED_STATES,
    POLL_SECONDS,
    KfpClient,
    StageTask,
    SubmittedRun,
    check_inputs,
    parse_inputs,
    stage_names,
)

StageEvent = dict[str, Any]

_SHARDS = re.compile(r"-(\d+-\d+)$")
"""What a labeling task adds to the step's name."""


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
    """The pipeline's inputs. `image`: of the steps; `gpus`: for each labeling task and training; `inputs`: further ones, NAME=VALUE;
    `registry`: whether the experiment has one, for which the image of the steps will not do.

    Raises ConfigError naming the input that is wrong or lacking.
    """
    package = PACKAGE.read_text()
    values: dict[str, Any] = {"config": config_uri, "root": root.uri, "run": run}
    extra = parse_inputs(package, inputs)
    image = image or extra.get("worker_image")
    if image:
        if registry and "tools_image" not in extra:
            raise ConfigError(
                "--input tools_image: must be given beside --image: the experiment has a registry, and the steps' image no DVC; "
                "add --input tools_image=REGISTRY/noisy-student/tools@sha256:…"
            )
        extra = {"tools_image": image} | extra | {"worker_image": image}
    if gpus:
        values |= {"label_gpus": str(gpus), "train_gpus": str(gpus)}
    return check_inputs(package, values | extra)


def check_remote_uris(root: Store, experiment: Experiment) -> None:
    """Raises ConfigError naming the first place that only this machine has."""
    if isinstance(root, LocalStore):
        raise ConfigError(
            f"--root: invalid value {root.root}: a cluster has no folders of this machine; give s3://bucket/prefix"
        )
    for field, uri in experiment.map_uris().items():
        if not uri.startswith("s3://"):
            raise ConfigError(f"{field}: invalid value {uri}: a cluster has no folders of this machine; put it on S3 (s3://…)")


def submit_run(client: KfpClient, root: Store, run: str, experiment: Experiment, inputs: Mapping[str, Any]) -> SubmittedRun:
    """Starts a run, unless it is under way, with the inputs that `arguments` made. If KFP cannot be reached nothing is left behind."""
    existing = client.find_run(run, experiment.name, excluded_states=ENDED_STATES)
    if existing is not None:
        return existing
    pipeline = client.upload_pipeline(PACKAGE.read_text())
    runs.open_run(root, run, experiment, __version__)
    try:
        return client.create_run(pipeline, inputs, name=run, experiment=experiment.name, excluded_states=ENDED_STATES)
    except NsError as error:
        with contextlib.suppress(NsError):
            runs.finish_run(root, run, "failed", str(error))
        raise


def follow_run(
    client: KfpClient,
    submitted: SubmittedRun,
    root: Store,
    run: str,
    on_event: Callable[[StageEvent], None],
    *,
    poll: float = POLL_SECONDS,
) -> None:
    """Shows a run until it has ended.

    Raises RunError if it failed, with each step that did and its reason, and Interrupted after SIGINT or SIGTERM, or if somebody
    cancelled the run.
    """
    watcher = _StageRecordWatcher(root, run, on_event)
    last: dict[str, StageTask] = {}

    def report_task(task: StageTask) -> None:
        last[task.key] = task
        on_event({"event": "state", "step": task.name, "state": task.state})

    with handle_signals(_raise_interrupt):
        ended = client.wait_for_run(
            submitted.run_id, report_task, stages=stage_names(PACKAGE.read_text()), poll=poll, after_poll=watcher.poll_records
        )
    if ended.state == "SUCCEEDED":
        return
    if ended.state != "FAILED":
        error: NsError = Interrupted(f"run {run}: was {ended.state.lower()}; the same command continues")
        runs.finish_run(root, run, "interrupted", str(error))
        raise error
    reasons = _explain_failures(root, run, [task for task in last.values() if task.state == "FAILED"])
    runs.finish_run(root, run, "failed", reasons)
    raise RunError(f"{reasons}; logs: {ended.url}")


def _explain_failures(root: Store, run: str, failed: Sequence[StageTask]) -> str:
    """Every step that failed with its reason: as the step left it, as KFP has it, or that there is none."""
    recorded = runs.list_stage_failures(root, run)
    reasons = [str(failure) for failure in recorded]
    unexplained = [task for task in failed if task.name not in {failure.stage for failure in recorded}]
    reasons += [
        f"{task.name}: {task.error or 'ended without a word (killed? out of memory? too late?)'}" for task in unexplained
    ]
    return "; ".join(dict.fromkeys(reasons)) or "no step says why"


class _StageRecordWatcher:
    """What the steps leave in the run's folder, as events."""

    def __init__(self, root: Store, run: str, on_event: Callable[[StageEvent], None]) -> None:
        self._root, self._run = root, run
        self._on_event = on_event
        self._seen: dict[tuple[int, str], str] = {}
        self._progress_at = ""
        self._trainings: set[str] = set()

    def poll_records(self) -> None:
        """Watching must not fail where the run goes on: what cannot be read now is read later."""
        with contextlib.suppress(NsError):
            for stage_record in runs.list_stage_notes(self._root, self._run):
                key = (stage_record.generation, stage_record.stage)
                if self._seen.get(key) != stage_record.finished_at:
                    self._seen[key] = stage_record.finished_at
                    stage, shards = _SHARDS.sub("", stage_record.stage), _SHARDS.search(stage_record.stage)
                    self._on_event(
                        {
                            "event": "noted",
                            "step": stage,
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
            self._on_event({"event": "started", "step": "train", "generation": int(generation)})
        self._progress_at = progress["updated_at"]
        per_step = progress["images"] / max(1, progress["step"])
        loss = {"loss": progress["latest"]["loss"]} if "loss" in progress["latest"] else {}
        self._on_event(
            {
                "event": "progress",
                "step": "train",
                "generation": int(generation),
                "done": progress["images"],
                "total": round(progress["steps"] * per_step),
                "per_second": progress["images_per_second"],
                "unit": "images",
                **loss,
            }
        )


def _raise_interrupt(_number: int, _frame: FrameType | None) -> None:
    """SIGTERM says what Ctrl-C says, and both are heard by a job in the background too."""
    raise KeyboardInterrupt
