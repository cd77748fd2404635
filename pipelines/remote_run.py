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
from ns.core.process import signalled
from ns.runs import records as runs
from ns.storage import LocalStore, Store
from ns.storage.documents import parse_object
from ns.training.monitor import PROGRESS
from pipelines import PACKAGE
from pipelines.kfp_client import ENDED, POLL_SECONDS, Server, Submitted, Task, checked, parsed, step_names

Event = dict[str, Any]

_SHARDS = re.compile(r"-(\d+-\d+)$")
"""What a labelling task adds to the step's name."""


def arguments(
    config: str,
    root: Store,
    run: str,
    *,
    image: str | None = None,
    gpus: int = 0,
    inputs: Sequence[str] = (),
    registry: bool = False,
) -> dict[str, Any]:
    """The pipeline's inputs. `image`: of the steps; `gpus`: for each labelling task and training; `inputs`: further ones, NAME=VALUE;
    `registry`: whether the experiment has one, for which the image of the steps will not do.

    Raises ConfigError naming the input that is wrong or lacking.
    """
    package = PACKAGE.read_text()
    given: dict[str, Any] = {"config": config, "root": root.uri, "run": run}
    more = parsed(package, inputs)
    image = image or more.get("worker_image")
    if image:
        if registry and "tools_image" not in more:
            raise ConfigError(
                "--input tools_image: must be given beside --image: the experiment has a registry, and the steps' image no DVC; "
                "add --input tools_image=REGISTRY/noisy-student/tools@sha256:…"
            )
        more = {"tools_image": image} | more | {"worker_image": image}
    if gpus:
        given |= {"label_gpus": str(gpus), "train_gpus": str(gpus)}
    return checked(package, given | more)


def check_places(root: Store, experiment: Experiment) -> None:
    """Raises ConfigError naming the first place that only this machine has."""
    if isinstance(root, LocalStore):
        raise ConfigError(
            f"--root: invalid value {root.root}: a cluster has no folders of this machine; give s3://bucket/prefix"
        )
    for field, place in experiment.places().items():
        if not place.startswith("s3://"):
            raise ConfigError(
                f"{field}: invalid value {place}: a cluster has no folders of this machine; put it on S3 (s3://…)"
            )


def submit(server: Server, root: Store, run: str, experiment: Experiment, given: Mapping[str, Any]) -> Submitted:
    """Starts a run, unless it is under way, with the inputs that `arguments` made. If KFP cannot be reached nothing is left behind."""
    there = server.find(run, experiment.name, besides=ENDED)
    if there is not None:
        return there
    pipeline = server.upload(PACKAGE.read_text())
    runs.start(root, run, experiment, __version__)
    try:
        return server.submit(pipeline, given, name=run, experiment=experiment.name, besides=ENDED)
    except NsError as error:
        with contextlib.suppress(NsError):
            runs.finish(root, run, "failed", str(error))
        raise


def follow(
    server: Server,
    submitted: Submitted,
    root: Store,
    run: str,
    on_event: Callable[[Event], None],
    *,
    poll: float = POLL_SECONDS,
) -> None:
    """Shows a run until it has ended.

    Raises RunError if it failed, with each step that did and its reason, and Interrupted after SIGINT or SIGTERM, or if somebody
    cancelled the run.
    """
    notes = _Notes(root, run, on_event)
    last: dict[str, Task] = {}

    def told(task: Task) -> None:
        last[task.key] = task
        on_event({"event": "state", "step": task.name, "state": task.state})

    with signalled(_interrupt):
        ended = server.follow(submitted.run_id, told, steps=step_names(PACKAGE.read_text()), poll=poll, after_look=notes.look)
    if ended.state == "SUCCEEDED":
        return
    if ended.state != "FAILED":
        error: NsError = Interrupted(f"run {run}: was {ended.state.lower()}; the same command continues")
        runs.finish(root, run, "interrupted", str(error))
        raise error
    why = _why(root, run, [task for task in last.values() if task.state == "FAILED"])
    runs.finish(root, run, "failed", why)
    raise RunError(f"{why}; logs: {ended.url}")


def _why(root: Store, run: str, failed: Sequence[Task]) -> str:
    """Every step that failed with its reason: as the step left it, as KFP has it, or that there is none."""
    told = runs.failures(root, run)
    reasons = [str(failure) for failure in told]
    wordless = [task for task in failed if task.name not in {failure.step for failure in told}]
    reasons += [f"{task.name}: {task.error or 'ended without a word (killed? out of memory? too late?)'}" for task in wordless]
    return "; ".join(dict.fromkeys(reasons)) or "no step says why"


class _Notes:
    """What the steps leave in the run's folder, as events."""

    def __init__(self, root: Store, run: str, on_event: Callable[[Event], None]) -> None:
        self._root, self._run = root, run
        self._on_event = on_event
        self._known: dict[tuple[int, str], str] = {}
        self._progress_at = ""
        self._trainings: set[str] = set()

    def look(self) -> None:
        """Watching must not fail where the run goes on: what cannot be read now is read later."""
        with contextlib.suppress(NsError):
            for note in runs.notes(self._root, self._run):
                key = (note.generation, note.step)
                if self._known.get(key) != note.finished_at:
                    self._known[key] = note.finished_at
                    step, shards = _SHARDS.sub("", note.step), _SHARDS.search(note.step)
                    self._on_event(
                        {
                            "event": "noted",
                            "step": step,
                            "generation": note.generation,
                            "shards": shards[1] if shards else "",
                            "seconds": note.seconds,
                            "reused": note.reused,
                        }
                    )
            self._progress()

    def _progress(self) -> None:
        key = f"{self._run}/{PROGRESS}"
        if not self._root.exists(key):
            return
        progress = parse_object(self._root.get(key), key)
        generation, _, name = str(progress["training"]).partition("-")
        if name != "train" or progress["updated_at"] == self._progress_at or (int(generation), "train") in self._known:
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


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """SIGTERM says what Ctrl-C says, and both are heard by a job in the background too."""
    raise KeyboardInterrupt
