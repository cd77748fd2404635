"""Runs the compiled pipeline on this machine: kfp.local, one process per stage, nothing installed at run time."""

import builtins
import contextlib
import getpass
import io
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from ns.core.errors import Interrupted, NsError, RunError
from ns.core.log import EVENTS_VARIABLE, StageEvent
from ns.core.process import CLIENT_VARIABLE, handle_signals, identify_process, set_environment
from ns.storage.scratch import make_scratch_dir
from pipelines import PACKAGE, load_yaml_documents
from pipelines.runners.fork_server import ForkServer

FORK_VARIABLE = "NS_FORK_STAGES"
"""0: each stage is started as a Python of its own, which takes seconds more."""
STAGE_MODULES = (
    "components.__main__",
    *(f"components.{name}" for name in ("start", "prepare", "teacher", "label", "select", "student", "next_teacher", "report")),
    *(f"ns.stages.{name}" for name in ("start", "prepare", "roles", "label", "select", "report")),
    # What stages load in any case: pyarrow takes pandas, where it is installed, for the first array that it makes.
    "pandas",
    "scipy.special",
)
COMPUTING_MODULES = ("ns.training.runner", "ns.labeling.predict", "ns.evaluation.accuracy", "ns.reporting.page")
POLL_SECONDS = 0.1
STOP_SECONDS = 30.0
"""Time for stages to write a checkpoint when the run is interrupted."""

ANSI_COLORS = re.compile(r"\x1b\[[0-9;]*m")
LOG_NOISE = re.compile(r"Traceback|^File |^\^|^[-=~^ ]*$|finished with status")
# Python prefixes the message with the error class; the message alone tells a person what to do.
ERROR_CLASS = re.compile(r"^ns\.core\.errors\.\w+: ")


class StageError(NsError):
    """A stage failed; carries the exit code of the stage."""

    def __init__(self, failed: StageEvent) -> None:
        super().__init__(f"{describe_stage(failed)}: {failed['error']}")
        self.exit_code = int(failed.get("exit_code", 1))


def run_locally(
    *,
    config_uri: str,
    root: str,
    run: str,
    log: Path | None,
    on_event: Callable[[StageEvent], None],
    package: Path = PACKAGE,
    expect_work: bool = True,
    **inputs: Any,
) -> None:
    """Runs the pipeline to its end. Calls `on_event`, from another thread, with each event of each stage.

    `expect_work`: whether torch and timm are loaded in advance; a stage that needs them loads them in any case.
    `inputs`: further inputs of the pipeline. KFP's own output goes to the file `log`. Raises StageError when a stage fails, RunError when
    one dies, Interrupted after SIGINT or SIGTERM.
    """
    watcher = _EventWatcher(on_event)
    with make_scratch_dir("run") as scratch:
        events = scratch / "events.jsonl"
        events.touch()
        variables = {
            EVENTS_VARIABLE: str(events),
            CLIENT_VARIABLE: identify_process(os.getpid()),
            **_make_temp_variables(str(scratch)),
            **_make_import_variables(),
        }
        arguments = {"config": config_uri, "run": f"{root}/{run}", **inputs}

        def run_stages() -> None:
            from kfp import local

            with _fork_stages(server):
                run_pipeline(local.SubprocessRunner(use_venv=False), scratch / "kfp", arguments, package)

        modules = [*STAGE_MODULES, *(COMPUTING_MODULES if expect_work else ())]
        with set_environment(variables), tail_events(events, watcher), _start_fork_server(modules) as server:
            run_redirected(run_stages, log, watcher)


@contextlib.contextmanager
def _start_fork_server(modules: Sequence[str]) -> Iterator[ForkServer | None]:
    """Yields None where each stage is to be a new Python: elsewhere than on Linux, and with NS_FORK_STAGES=0."""
    if sys.platform != "linux" or os.environ.get(FORK_VARIABLE) == "0":
        yield None
        return
    with contextlib.closing(ForkServer(modules)) as server:
        yield server


@contextlib.contextmanager
def _fork_stages(server: ForkServer | None) -> Iterator[None]:
    """Lets the server run the stages that KFP would start as processes."""
    from kfp.local import subprocess_task_handler

    start_process = subprocess_task_handler.run_local_subprocess
    if server:
        subprocess_task_handler.run_local_subprocess = partial(server.run_command, start_process)
    try:
        yield
    finally:
        subprocess_task_handler.run_local_subprocess = start_process


class StageRunner(Protocol):
    """What runs the stages."""

    def stop_stages(self) -> None:
        """Stops the running stages and waits for them: training writes a checkpoint first."""

    def explain_failure(self, output: "LogWriter", error: Exception) -> NsError:
        """The error of a failed run: the stage and its reason."""


def run_redirected(work: Callable[[], None], log: Path | None, runner: StageRunner) -> None:
    """Does the work with KFP's output in the file `log`.

    After SIGINT or SIGTERM stops the stages and raises Interrupted. Raises what the runner makes of any other error.
    """
    output = LogWriter(log)
    try:
        # KFP prints and logs to the current stdout, and the terminal is ours.
        with (
            _stop_on_signal(runner.stop_stages),
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
            _restore_print(),
        ):
            work()
    except KeyboardInterrupt:
        raise Interrupted("interrupted; the same command continues") from None
    except Exception as error:
        time.sleep(2 * POLL_SECONDS)  # the last events are on their way
        raise runner.explain_failure(output, error) from error
    finally:
        output.close()


@contextlib.contextmanager
def _restore_print() -> Iterator[None]:
    """KFP replaces `print` while a task runs. Tasks that overlap put it back in the wrong order, and leave an indenting one behind."""
    original = builtins.print
    try:
        yield
    finally:
        builtins.print = original


def run_pipeline(runner: Any, folder: Path, arguments: dict[str, Any], package: Path = PACKAGE) -> None:
    """Runs a compiled pipeline with a runner of KFP, which keeps its files in `folder`."""
    from kfp import local

    pipeline = _load_pipeline(package)
    # KFP never removes a workspace that it creates itself.
    local.init(runner, pipeline_root=str(folder), workspace_root=str(folder / "workspace"), raise_on_error=True)
    pipeline(**arguments)


def _load_pipeline(package: Path) -> Any:
    """Loads a compiled pipeline without its retries: here a person waits, who can repeat the command."""
    # Imported here, since it costs half a second, and called inside the redirection, since importing kfp prints warnings.
    from google.protobuf import json_format
    from kfp.dsl import structures, yaml_component
    from kfp.pipeline_spec import pipeline_spec_pb2

    class LoadedPipeline(yaml_component.YamlComponent):  # type: ignore[misc]
        """KFP's own class parses its text again, with Python's slow parser, each time its specification is read."""

        @property
        def pipeline_spec(self) -> Any:
            return json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())

    spec, platform = load_yaml_documents(package.read_text())
    for component in [*spec["components"].values(), spec["root"]]:
        for task in component.get("dag", {}).get("tasks", {}).values():
            task.pop("retryPolicy", None)
    return LoadedPipeline(structures.ComponentSpec.from_ir_dicts(spec, platform), component_yaml="")


class _EventWatcher:
    """Keeps track of the stages that run and of the first that failed."""

    def __init__(self, on_event: Callable[[StageEvent], None]) -> None:
        self._on_event = on_event
        self._active: dict[int, StageEvent] = {}
        self._failed: StageEvent | None = None

    def __call__(self, event: StageEvent) -> None:
        pid = event.get("pid", 0)
        if event["event"] == "started":
            self._active[pid] = event
        elif event["event"] in ("finished", "failed"):
            self._active.pop(pid, None)
            if event["event"] == "failed" and self._failed is None:
                self._failed = event
        self._on_event(event)

    def stop_stages(self) -> None:
        for pid in list(self._active):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while any(_is_alive(pid) for pid in list(self._active)) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def explain_failure(self, output: "LogWriter", error: Exception) -> NsError:
        if self._failed is not None:
            if self._failed.get("exit_code") == Interrupted.exit_code:
                return Interrupted(str(self._failed["error"]))
            return StageError(self._failed)
        died = [describe_stage(event) for pid, event in self._active.items() if not _is_alive(pid)]
        last = output.find_last_message() or f"{type(error).__name__}: {error}"
        if died:
            return RunError(
                f"{died[0]}: exited without an error message (killed? out of memory?); the same command continues: {last}"
            )
        return RunError(last)


def describe_stage(event: StageEvent) -> str:
    """Names a stage, or what runs several, for people: `generation 1: train`, `teacher: train`, `teacher`, `report`."""
    generation = event.get("generation", 0)
    stage = str(event.get("stage", "")).replace("-", " ")
    if stage in ("start", "prepare", "report", "teacher"):
        return stage
    shards = f" {event['shards']}" if event.get("shards") else ""
    return f"{f'generation {generation}' if generation else 'teacher'}: {stage}{shards}"


def _is_alive(pid: int) -> bool:
    try:
        # A zombie still has a pid; its command line is empty.
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except OSError:
        try:
            os.kill(pid, 0)
        except OSError:
            return False
        return not Path("/proc").is_dir()


class LogWriter(io.TextIOBase):
    """Writes KFP's output to the log, without colors and indentation. A full disk loses the log, never the run."""

    def __init__(self, path: Path | None) -> None:
        self._lock = threading.Lock()
        self._rest = ""
        self._tail: deque[str] = deque(maxlen=50)
        self._file: io.TextIOWrapper | None = None
        if path is not None:
            with contextlib.suppress(OSError):
                self._file = path.open("a")

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
            for line in lines:
                self._write_line(ANSI_COLORS.sub("", line).strip())
        return len(text)

    def _write_line(self, line: str) -> None:
        if not line:
            return
        self._tail.append(line)
        if self._file is not None:
            try:
                self._file.write(line + "\n")
                self._file.flush()
            except OSError:
                self._file = None

    def find_last_message(self) -> str:
        """Returns the last line that is neither a rule nor a traceback."""
        return ERROR_CLASS.sub("", next((line for line in reversed(self._tail) if not LOG_NOISE.search(line)), ""))

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
        super().close()

    def writable(self) -> bool:
        return True


@contextlib.contextmanager
def tail_events(path: Path, on_event: Callable[[StageEvent], None]) -> Iterator[None]:
    """Calls `on_event` with each line that is appended to a file of JSON lines."""
    done = threading.Event()

    def follow_file() -> None:
        with path.open() as file:
            rest = ""
            while True:
                last = done.is_set()
                *lines, rest = (rest + file.read()).split("\n")
                for line in lines:
                    with contextlib.suppress(ValueError):
                        on_event(json.loads(line))
                if last:
                    return
                done.wait(POLL_SECONDS)

    thread = threading.Thread(target=follow_file, name="events", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _make_temp_variables(scratch: str) -> dict[str, str]:
    """Keeps the stages' temporary files in `scratch`: KFP never removes the folder that it starts a stage from.

    The kernels that torch compiles stay in torch's own folder, for later runs and for commands without a pipeline.
    """
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = f"uid_{os.getuid()}"
    kernels = Path(tempfile.gettempdir()) / f"torchinductor_{user}"
    return {"TMPDIR": scratch, "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(kernels))}


def _make_import_variables() -> dict[str, str]:
    """The stages import this project from where the client did, installed or not."""
    checkout = str(Path(__file__).parents[2])
    return {"PYTHONPATH": os.pathsep.join(filter(None, [checkout, os.environ.get("PYTHONPATH", "")]))}


@contextlib.contextmanager
def _stop_on_signal(stop_stages: Callable[[], None]) -> Iterator[None]:
    """Stops the stages at once on a signal: KFP itself first waits for labeling tasks that run in parallel."""

    def handle_signal(_number: int, _frame: FrameType | None) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        stopping.start()
        raise KeyboardInterrupt

    stopping = threading.Thread(target=stop_stages, name="stop stages")
    with handle_signals(handle_signal):
        try:
            yield
        finally:
            if stopping.ident is not None:
                stopping.join()
