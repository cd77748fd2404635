"""Runs the compiled pipeline on this machine in containers: kfp.local over the API of Docker or Podman.

A stage is confined as on a hardened cluster: a user who is not root, a read-only root file system, no capabilities, and no network if
all that the run needs is in folders. The run's root is mounted at its own path, the experiment's data as well, read-only.

KFP's own runner takes a failed container for a successful one if it is removed before its state is read (#13332), and does not resolve
images that are inputs of the pipeline; so `_ContainerEngine.run_stage` replaces its function that runs a container.
"""

import contextlib
import json
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from components import STAGE_USER, WORKER_IMAGE
from ns.config.schema import Experiment
from ns.core.errors import ConfigError, Interrupted, NsError, RunError
from ns.core.log import EVENTS_VARIABLE, StageEvent, format_last_lines
from ns.runs.records import RECORDS_PREFIX
from ns.storage import LocalStore, Store
from ns.storage.endpoint import CA_VARIABLES, SECRETS_VARIABLE
from ns.storage.scratch import SCRATCH_PREFIX, make_scratch_dir
from pipelines import PACKAGE, load_yaml_documents
from pipelines.runners.local import (
    POLL_SECONDS,
    STOP_SECONDS,
    LogWriter,
    StageError,
    describe_stage,
    run_pipeline,
    run_redirected,
    tail_events,
)

CONTAINER_LABEL = "noisy-student"
FORWARDED_VARIABLES = ("AWS_", "NS_S3_", "SSL_CERT_FILE", "NS_GIT_", "OMP_", "GOMP_")
"""Prefixes of the client's variables that are passed to stages: store, login of the label registry, OpenMP's threads."""
PATH_VARIABLES = (SECRETS_VARIABLE, *CA_VARIABLES)
"""Those of them that name a file or a folder."""


@dataclass(frozen=True)
class ContainerOptions:
    """Image and limits of the stages' containers."""

    image: str | None = None
    """This version's, as built by `make images`, if not given."""
    memory: str | None = None
    """For example `4g`; no limit if not given."""
    gpus: int = 0
    """-1 for all."""
    stage_seconds: float | None = None
    """Time limit of a stage; the compiled pipeline's if not given."""


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
    """Runs the pipeline to its end in containers, with events as in `run_locally`.

    Stops containers that a killed client left behind first. Raises StageError when a stage fails, RunError with the last lines of its log
    when its container does, ConfigError if there is no engine or no image, Interrupted after SIGINT or SIGTERM.
    """
    from docker.errors import DockerException

    with make_scratch_dir("run") as scratch:
        try:
            engine = _ContainerEngine(container, experiment, root, run, scratch, on_event)
        except DockerException as error:
            raise ConfigError(f"no container engine answers ({error}); start Docker or Podman, or set DOCKER_HOST") from error
        with contextlib.closing(engine), tail_events(engine.events, engine.on_event):
            run_redirected(lambda: engine.run_stages(config_uri), log, engine)


class _ContainerEngine:
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
        self._labels = {CONTAINER_LABEL: f"{root.uri}/{run}", f"{CONTAINER_LABEL}.scratch": str(scratch)}
        self._on_event = on_event
        self._stopping = threading.Event()
        self._running: dict[str, Any] = {}
        self._reported: list[StageError] = []
        """Failures that stages reported."""
        self._failures: list[RunError] = []
        """Failures of containers."""
        self._image = self._find_image(container.image or WORKER_IMAGE)
        self._timeouts = _read_timeouts()
        self._offline = is_offline(root, experiment)
        self._user = self._choose_user()
        self._volumes = self._list_mounts(experiment)
        self.events = scratch / "events.jsonl"
        self.events.touch()
        if os.getuid() == 0:
            for path in (scratch, self.events):
                os.chown(path, self._user, self._user)
        self._remove_orphans()

    def close(self) -> None:
        self._client.close()

    def on_event(self, event: StageEvent) -> None:
        if event["event"] == "failed":
            self._reported.append(StageError(event))
        self._on_event(event)

    def run_stages(self, config_uri: str) -> None:
        from kfp import local
        from kfp.local import docker_task_handler

        docker_task_handler.run_docker_container = self.run_stage
        arguments = {"config": config_uri, "run": f"{self._root.uri}/{self._run}"}
        run_pipeline(local.DockerRunner(), self._scratch, arguments)

    def run_stage(self, *, command: list[str], **_options: Any) -> int:
        """Runs a stage in a container and returns its exit code. Replaces kfp.local's function (see the module's text)."""
        stage = _parse_stage(command)
        seconds = self._container.stage_seconds or self._timeouts.get(stage["stage"])
        container = self._client.containers.create(
            self._image, command, volumes=self._volumes, labels=self._labels, **self._container_options()
        )
        lines: deque[str] = deque(maxlen=200)
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
                # KFP's output is redirected to the run's log.
                print(line)  # noqa: T201
            code = int(container.wait()["StatusCode"])
            if code:
                container.reload()
                reason = self._failure_reason(code, timed_out.is_set(), container.attrs["State"], seconds)
                message = f"{describe_stage(stage)}: {reason}; the same command continues{format_last_lines(lines)}"
                self._failures.append(RunError(message))
            return code
        finally:
            if timer:
                timer.cancel()
            self._running.pop(container.id, None)
            container.remove(force=True)

    def stop_stages(self) -> None:
        self._stopping.set()
        for container in list(self._running.values()):
            with contextlib.suppress(Exception):
                # Process 1 is KFP's shell, which ignores the signal; the stage is its child.
                container.exec_run(["sh", "-c", "kill -TERM -1"], detach=True)
        deadline = time.monotonic() + STOP_SECONDS
        while self._running and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        for container in list(self._running.values()):
            with contextlib.suppress(Exception):
                container.kill()

    def explain_failure(self, output: LogWriter, error: Exception) -> NsError:
        if isinstance(error, NsError):
            return error
        last = RunError(output.find_last_message() or f"{type(error).__name__}: {error}")
        return [*self._reported, *self._failures, last][0]

    def _failure_reason(self, code: int, timed_out: bool, state: dict[str, Any], seconds: float | None) -> str:
        if timed_out:
            return f"was stopped at its time limit of {seconds:,.0f} s"
        if state.get("OOMKilled") or (code == 137 and self._container.memory):
            limit = f" of {self._container.memory} (--memory)" if self._container.memory else ""
            return f"ran out of memory{limit}"
        return f"ended with exit code {code}"

    def _find_image(self, name: str) -> Any:
        from docker.errors import ImageNotFound

        for image_name in (name, f"localhost/{name}"):  # podman's own images
            with contextlib.suppress(ImageNotFound):
                return self._client.images.get(image_name).id
        raise ConfigError(f"--image {name}: is not on this machine; build it with `make images`, or pull it")

    def _container_options(self) -> dict[str, Any]:
        from docker.types import DeviceRequest
        from docker.utils import parse_bytes

        container = self._container
        memory = parse_bytes(container.memory) if container.memory else self._client.info()["MemTotal"]
        variables = {name: value for name, value in os.environ.items() if name.startswith(FORWARDED_VARIABLES)}
        return {
            "user": f"{self._user}:{self._user}",
            "read_only": True,
            "tmpfs": {"/tmp": "mode=1777"},
            # As Linux has it outside containers. Docker's own 64 MiB would leave data loaders no room.
            "shm_size": memory // 2,
            "cap_drop": ["ALL"],
            "security_opt": ["no-new-privileges"],
            # An S3 server has to be reached; folders are mounted.
            "network_mode": "none" if self._offline else None,
            "environment": variables | {EVENTS_VARIABLE: str(self.events)},
            "mem_limit": container.memory,
            "memswap_limit": container.memory,
            "device_requests": [DeviceRequest(count=container.gpus, capabilities=[["gpu"]])] if container.gpus else None,
        }

    def _remove_orphans(self) -> None:
        """Removes the containers of a client that was killed. This client holds the run's lock, so no other client uses them."""
        label = f"{CONTAINER_LABEL}={self._labels[CONTAINER_LABEL]}"
        for container in self._client.containers.list(all=True, filters={"label": label}):
            scratch = container.labels.get(f"{CONTAINER_LABEL}.scratch", "")
            container.remove(force=True)
            if Path(scratch).name.startswith(SCRATCH_PREFIX):
                shutil.rmtree(scratch, ignore_errors=True)

    def _list_mounts(self, experiment: Experiment) -> dict[str, dict[str, str]]:
        """Mounts folders at their own paths: scratch and root writable, data read-only."""
        volumes = {path: {"bind": path, "mode": "ro"} for path in list_read_paths(experiment, os.environ)}
        writable = [str(self._scratch)]
        if isinstance(self._root, LocalStore):
            writable.append(str(self._root.root))
        return volumes | {path: {"bind": path, "mode": "rw"} for path in writable}

    def _choose_user(self) -> int:
        """Returns the user that stages run as: the caller, but never root. Root hands its folders over to the images' user."""
        if os.getuid() != 0:
            return os.getuid()
        if not isinstance(self._root, LocalStore):
            return STAGE_USER
        owner = self._root.root.stat().st_uid or STAGE_USER
        for path in list_run_files(self._root.root, self._run):
            if path.lstat().st_uid == 0:
                os.chown(path, owner, owner, follow_symlinks=False)
        return owner


def list_run_files(root: Path, run: str) -> Iterator[Path]:
    """All files and folders of a run below a root: those in its folder and in `store`, and the root itself if it holds nothing but runs.

    `--root` may name any folder of the machine; what else is in it is not ours.
    """
    names = {"store", *(record.stem for record in (root / RECORDS_PREFIX).glob("*.json"))}
    if {path.name for path in root.iterdir()} <= names:
        yield root
    for top in (root / "store", root / run):
        for folder, _, files in os.walk(top):
            yield from (Path(folder), *(Path(folder, name) for name in files))


def list_read_paths(experiment: Experiment, environment: Mapping[str, str]) -> list[str]:
    """Absolute paths of what stages only read: the experiment's data, and the keys and certificates of the store."""
    uris = [*experiment.map_uris().values(), *(environment.get(name, "") for name in PATH_VARIABLES)]
    paths = [unquote(urlsplit(uri).path) if uri.startswith("file:") else uri for uri in uris]
    return [path for path in dict.fromkeys(paths) if path.startswith("/")]


def is_offline(root: Store, experiment: Experiment) -> bool:
    """Whether a run reads and writes only folders of this machine."""
    remote = any("://" in uri and not uri.startswith("file://") for uri in experiment.map_uris().values())
    return isinstance(root, LocalStore) and experiment.registry is None and not remote


def _parse_stage(command: list[str]) -> StageEvent:
    """Reads stage, generation and shards from the command that KFP runs."""
    function = command[command.index("--function_to_execute") + 1]
    inputs = json.loads(command[command.index("--executor_input") + 1]).get("inputs", {}).get("parameterValues", {})
    return {
        "event": "started",
        "stage": function.replace("_", "-"),
        "generation": int(inputs.get("generation", 0)),
        "shards": inputs.get("shards", ""),
    }


def _read_timeouts() -> dict[str, float]:
    """Stage → its time limit in seconds, from the compiled pipeline."""
    *_, platform = load_yaml_documents(PACKAGE.read_text())
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return {
        label.removeprefix("exec-").rstrip("-0123456789"): float(executor["activeDeadlineSeconds"])
        for label, executor in executors.items()
        if "activeDeadlineSeconds" in executor
    }


def _split_lines(chunks: Any) -> Iterator[str]:
    """Yields the whole lines of a log that comes in pieces."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)
    if rest:
        yield rest.decode(errors="replace")
