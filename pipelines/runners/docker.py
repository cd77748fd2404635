"""Runs the compiled pipeline on this machine in containers: kfp.local over the Docker API, of Docker or Podman.

What a step gets is what it gets on a hardened cluster: a user who is not root, a root file system that cannot be written, no
capabilities, and no network if all that the run needs lies in folders. The run's root is mounted at its own path, the experiment's
data as well, and cannot be written.

KFP's own runner takes a container that failed for one that succeeded if it was removed before it was asked (#13332), and does not
resolve images that are inputs of the pipeline; so `_Engine.run_step` stands in for the function that runs one.
"""

import contextlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components import WORKER_IMAGE
from ns.config.schema import Experiment
from ns.core.errors import ConfigError, Interrupted, NsError, RunError
from ns.core.log import EVENTS_VARIABLE, format_last_lines
from ns.storage import LocalStore, Store
from pipelines import PACKAGE, load_yaml_documents
from pipelines.runners.local import (
    POLL_SECONDS,
    STOP_SECONDS,
    LogWriter,
    StageError,
    StageEvent,
    describe_stage,
    init_runner,
    load_pipeline,
    run_redirected,
    tail_events,
)

STAGE_USER = 10001
"""Who the images' steps are (images/Dockerfile)."""
CONTAINER_LABEL = "noisy-student"
FORWARDED_VARIABLES = ("AWS_", "NS_S3_", "NS_GIT_", "OMP_")
"""Variables of the client that steps get: which store, the label registry's login, and how many threads."""
LOG_TAIL_LINES = 200
"""Of a step's log that are kept for a message, should it fail."""


@dataclass(frozen=True)
class ContainerOptions:
    """What the container of a step may have."""

    image: str | None = None
    """The one that `make images` made last if not given."""
    memory: str | None = None
    """As `4g`; no limit if not given."""
    shm: str = "1g"
    gpus: int = 0
    """-1 for all."""
    stage_seconds: float | None = None
    """The longest that a step may take; what the pipeline says if not given."""


def run_in_containers(
    *,
    config_uri: str,
    root: Store,
    run: str,
    experiment: Experiment,
    container: ContainerOptions,
    log: Path | None,
    on_event: Callable[[StageEvent], None],
) -> None:
    """Runs the pipeline to its end, as `pipelines.runners.local.run` does, in containers.

    Containers that a killed client left behind are stopped first. Raises StepError when a step fails, with the last lines of its log,
    ConfigError if there is no engine or no image, Interrupted after SIGINT or SIGTERM.
    """
    from docker.errors import DockerException

    with tempfile.TemporaryDirectory(prefix="ns-run-") as scratch:
        try:
            engine = _ContainerEngine(container, experiment, root, run, Path(scratch), on_event)
        except DockerException as error:
            raise ConfigError(f"no container engine answers ({error}); start Docker or Podman, or set DOCKER_HOST") from error
        output = LogWriter(log)
        with contextlib.closing(engine), tail_events(engine.events, engine.on_event):
            try:
                run_redirected(output, engine.stop_stages, lambda: engine.run_pipeline(config_uri))
            except KeyboardInterrupt:
                raise Interrupted("interrupted; the same command continues") from None
            except Exception as error:
                time.sleep(2 * POLL_SECONDS)  # the last events are on their way
                raise engine.explain_failure(output, error) from error
            finally:
                output.close()


@dataclass
class _StageFailure:
    """A step whose container did not end well."""

    stage: StageEvent
    reason: str
    last_words: str


class _ContainerEngine:
    """The containers of one run."""

    def __init__(
        self,
        container: ContainerOptions,
        experiment: Experiment,
        root: Store,
        run: str,
        scratch: Path,
        on_event: Callable[[StageEvent], None],
    ) -> None:
        import docker

        self._client = docker.from_env(timeout=600)
        self._container = container
        self._root, self._run = root, run
        self._scratch = scratch
        self._on_event = on_event
        self._stopping = threading.Event()
        self._running: dict[str, Any] = {}
        self._failure_events: list[StageEvent] = []
        self._failures: list[_StageFailure] = []
        self._image = self._find_image(container.image or WORKER_IMAGE)
        self._timeouts = _read_timeouts()
        self._offline = is_offline(root, experiment)
        self._user = self._hand_over()
        self._volumes = self._list_mounts(experiment)
        self.events = scratch / "events.jsonl"
        self.events.touch()
        self._give_to_user(scratch)
        self._give_to_user(self.events)
        self._remove_orphans()

    def close(self) -> None:
        self._client.close()

    def on_event(self, event: StageEvent) -> None:
        if event["event"] == "failed":
            self._failure_events.append(event)
        self._on_event(event)

    def run_pipeline(self, config_uri: str) -> None:
        from kfp import local
        from kfp.local import docker_task_handler

        docker_task_handler.run_docker_container = self.run_stage
        pipeline = load_pipeline()
        init_runner(local.DockerRunner(), self._scratch)
        pipeline(config=config_uri, root=self._root.uri, run=self._run)

    def run_stage(self, *, command: list[str], **_given: Any) -> int:
        """Runs a step in a container and returns its exit code. In place of kfp.local's function, whose image and
        folders are not what we want."""
        stage = _parse_stage(command)
        seconds = self._container.stage_seconds or self._timeouts.get(str(stage["function"]))
        container = self._client.containers.create(
            self._image, command, volumes=self._volumes, labels=self._container_labels, **self._container_options()
        )
        lines: deque[str] = deque(maxlen=LOG_TAIL_LINES)
        timed_out = threading.Event()

        def kill_container() -> None:
            timed_out.set()
            container.kill()

        timer = threading.Timer(seconds, kill_container) if seconds else None
        self._running[container.id] = container
        try:
            if self._stopping.is_set():
                return Interrupted.exit_code
            container.start()
            if timer:
                timer.start()
            for line in _split_lines(container.logs(stream=True, follow=True)):
                lines.append(line)
                # KFP's redirection has it written to the run's log.
                print(line)  # noqa: T201
            code = int(container.wait()["StatusCode"])
            if code:
                container.reload()
                reason = self._failure_reason(code, timed_out.is_set(), container.attrs["State"], seconds)
                self._failures.append(_StageFailure(stage, reason, format_last_lines(lines)))
            return code
        finally:
            if timer:
                timer.cancel()
            self._running.pop(container.id, None)
            container.remove(force=True)

    def stop_stages(self) -> None:
        """Asks the steps under way to stop, and waits: training writes a checkpoint first."""
        self._stopping.set()
        running = list(self._running.values())
        for container in running:
            with contextlib.suppress(Exception):
                # Kubeflow's shell is the first process, to which signals do not get through; the step is its child.
                container.exec_run(["sh", "-c", "kill -TERM -1"], detach=True)
        deadline = time.monotonic() + STOP_SECONDS
        while self._running and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        for container in list(self._running.values()):
            with contextlib.suppress(Exception):
                container.kill()

    def explain_failure(self, output: LogWriter, error: Exception) -> NsError:
        """What a person needs to know of a failed run: the step, its reason, and its last words."""
        if isinstance(error, NsError):
            return error
        if self._failure_events:
            event = self._failure_events[0]
            return StageError(f"{describe_stage(event)}: {event['error']}", int(event.get("exit_code", 1)))
        if self._failures:
            failed = self._failures[0]
            return RunError(f"{describe_stage(failed.stage)}: {failed.reason}; the same command continues{failed.last_words}")
        return RunError(output.last_words() or f"{type(error).__name__}: {error}")

    def _failure_reason(self, code: int, timed_out: bool, state: dict[str, Any], seconds: float | None) -> str:
        if timed_out:
            return f"was stopped after {seconds:,.0f} s, the longest that it may take"
        if state.get("OOMKilled") or (code == 137 and self._container.memory):
            limit = f" of {self._container.memory} (--memory)" if self._container.memory else ""
            return f"was killed for want of memory{limit}"
        return f"ended with exit code {code}"

    def _find_image(self, name: str) -> Any:
        from docker.errors import ImageNotFound

        for image_name in (name, f"localhost/{name}"):  # podman's own images
            with contextlib.suppress(ImageNotFound):
                return self._client.images.get(image_name).id
        raise ConfigError(f"--image {name}: is not on this machine; make it with `make images`, or pull it")

    def _container_options(self) -> dict[str, Any]:
        from docker.types import DeviceRequest

        container = self._container
        variables = {name: value for name, value in os.environ.items() if name.startswith(FORWARDED_VARIABLES)}
        return {
            "user": f"{self._user}:{self._user}",
            "read_only": True,
            "tmpfs": {"/tmp": "mode=1777"},
            "shm_size": container.shm,
            "cap_drop": ["ALL"],
            "security_opt": ["no-new-privileges"],
            # An S3 server has to be reached; folders are mounted.
            "network_mode": "none" if self._offline else None,
            "environment": variables | {EVENTS_VARIABLE: str(self.events)},
            "mem_limit": container.memory,
            "memswap_limit": container.memory,
            "device_requests": [DeviceRequest(count=container.gpus, capabilities=[["gpu"]])] if container.gpus else None,
        }

    @property
    def _container_labels(self) -> dict[str, str]:
        return {CONTAINER_LABEL: f"{self._root.uri}/{self._run}", f"{CONTAINER_LABEL}.scratch": str(self._scratch)}

    def _remove_orphans(self) -> None:
        """Stops what a client left behind that was killed. Its successor holds the run, so that nobody waits for them."""
        label = f"{CONTAINER_LABEL}={self._container_labels[CONTAINER_LABEL]}"
        for container in self._client.containers.list(all=True, filters={"label": label}):
            scratch = container.labels.get(f"{CONTAINER_LABEL}.scratch", "")
            container.remove(force=True)
            if Path(scratch).name.startswith("ns-run-"):
                shutil.rmtree(scratch, ignore_errors=True)

    def _list_mounts(self, experiment: Experiment) -> dict[str, dict[str, str]]:
        """Folders by their own paths: those that are written, and data that are not."""
        read_only = [path for path in experiment.map_uris().values() if path.startswith("/")]
        volumes = {path: {"bind": path, "mode": "ro"} for path in read_only}
        writable = [str(self._scratch)]
        if isinstance(self._root, LocalStore):
            writable.append(str(self._root.root))
        return volumes | {path: {"bind": path, "mode": "rw"} for path in writable}

    def _hand_over(self) -> int:
        """The user that steps are: who runs this, but never root. What root has made is handed over to the images' user."""
        if os.getuid() != 0:
            return os.getuid()
        if isinstance(self._root, LocalStore):
            owner = self._root.root.stat().st_uid or STAGE_USER
            for folder, _, files in os.walk(self._root.root):
                for path in (folder, *(os.path.join(folder, name) for name in files)):  # noqa: PTH118
                    os.chown(path, owner, owner, follow_symlinks=False)
            return owner
        return STAGE_USER

    def _give_to_user(self, path: Path) -> None:
        if os.getuid() == 0:
            os.chown(path, self._user, self._user)


def is_offline(root: Store, experiment: Experiment) -> bool:
    """Whether all that a run reads and writes is in folders of this machine."""
    remote = any("://" in uri and not uri.startswith("file://") for uri in experiment.map_uris().values())
    return isinstance(root, LocalStore) and experiment.registry is None and not remote


def _parse_stage(command: list[str]) -> StageEvent:
    """Which step a command of KFP's runs: name, generation, shards."""
    function = command[command.index("--function_to_execute") + 1]
    inputs = json.loads(command[command.index("--executor_input") + 1]).get("inputs", {}).get("parameterValues", {})
    return {
        "function": function,
        "step": function.replace("_", "-"),
        "generation": int(inputs.get("generation", 0)),
        "shards": inputs.get("shards", ""),
    }


def _read_timeouts() -> dict[str, float]:
    """Function → seconds, from what the compiled pipeline tells Kubernetes."""
    *_, platform = load_yaml_documents(PACKAGE.read_text())
    executors = platform.get("platforms", {}).get("kubernetes", {}).get("deploymentSpec", {}).get("executors", {})
    return {
        label.removeprefix("exec-").rstrip("-0123456789").replace("-", "_"): float(executor["activeDeadlineSeconds"])
        for label, executor in executors.items()
        if "activeDeadlineSeconds" in executor
    }


def _split_lines(chunks: Any) -> Iterator[str]:
    """Whole lines of a log that comes in pieces."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)
    if rest:
        yield rest.decode(errors="replace")
