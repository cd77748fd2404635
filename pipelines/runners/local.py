"""Runs the compiled pipeline on this machine: kfp.local, one subprocess a step, nothing installed at run time."""

import contextlib
import getpass
import io
import json
import os
import re
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from ns.core.errors import Interrupted, NsError, RunError
from ns.core.log import EVENTS_VARIABLE
from ns.core.process import CLIENT_VARIABLE
from pipelines import PACKAGE, load_yaml_documents

StageEvent = dict[str, Any]

POLL_SECONDS = 0.1
STOP_SECONDS = 30.0
"""Time that steps get to write a checkpoint when the run is interrupted."""

ANSI_COLORS = re.compile(r"\x1b\[[0-9;]*m")
LOG_NOISE = re.compile(r"Traceback|^File |^\^|^[-=~^ ]*$|finished with status")
# What a person can mend is said in full by its message; Python puts the kind of error before it.
ERROR_CLASS = re.compile(r"^ns\.core\.errors\.\w+: ")


class StageError(NsError):
    """A step failed; carries that step's exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run_locally(
    *,
    config_uri: str,
    root: str,
    run: str,
    log: Path | None,
    on_event: Callable[[StageEvent], None],
    package: Path = PACKAGE,
    **inputs: Any,
) -> None:
    """Runs the pipeline to its end. `on_event` is called, from another thread, with each event of each step. `inputs` are further ones
    of the run form.

    KFP's own output goes to the file `log`. Raises StepError when a step fails, Interrupted after SIGINT or SIGTERM.
    """
    watcher = _EventWatcher(on_event)
    with tempfile.TemporaryDirectory(prefix="ns-run-") as scratch:
        events = Path(scratch) / "events.jsonl"
        events.touch()
        variables = {EVENTS_VARIABLE: str(events), CLIENT_VARIABLE: str(os.getpid()), **_make_temp_variables(scratch)}
        arguments = {"config": config_uri, "root": root, "run": run, **inputs}
        output = LogWriter(log)
        with _set_environment(variables), tail_events(events, watcher):
            try:
                run_redirected(output, watcher.stop_stages, lambda: _run_pipeline(package, Path(scratch) / "kfp", arguments))
            except KeyboardInterrupt:
                raise Interrupted("interrupted; the same command continues") from None
            except Exception as error:
                time.sleep(2 * POLL_SECONDS)  # the last events are on their way
                raise watcher.explain_failure(output, error) from error
            finally:
                output.close()


def run_redirected(output: "LogWriter", stop_stages: Callable[[], None], work: Callable[[], None]) -> None:
    """Does the work with KFP's output in `output`. After SIGINT or SIGTERM stops the steps and raises KeyboardInterrupt."""
    # KFP prints and logs to whatever stdout is; the terminal is ours.
    with _stop_on_signal(stop_stages), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        work()


def _run_pipeline(package: Path, pipeline_root: Path, arguments: dict[str, Any]) -> None:
    from kfp import local

    pipeline = load_pipeline(package)
    init_runner(local.SubprocessRunner(use_venv=False), pipeline_root)
    pipeline(**arguments)


def init_runner(runner: Any, folder: Path) -> None:
    """Has KFP run steps by `runner`, and keep what it keeps in `folder`: a workspace that it makes by itself it never removes."""
    from kfp import local

    local.init(runner, pipeline_root=str(folder), workspace_root=str(folder / "workspace"), raise_on_error=True)


def load_pipeline(package: Path = PACKAGE) -> Any:
    """A compiled pipeline, without its retries: here a person waits, who can say the same command again."""
    # Inside the redirection, since importing kfp warns, and here, since it costs half a second.
    from google.protobuf import json_format
    from kfp.dsl import structures, yaml_component
    from kfp.pipeline_spec import pipeline_spec_pb2

    class LoadedPipeline(yaml_component.YamlComponent):  # type: ignore[misc]
        """KFP's own reads its text anew, by Python's slow parser, whenever it is asked for its specification."""

        @property
        def pipeline_spec(self) -> Any:
            return json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())

    spec, platform = load_yaml_documents(package.read_text())
    for component in [*spec["components"].values(), spec["root"]]:
        for task in component.get("dag", {}).get("tasks", {}).values():
            task.pop("retryPolicy", None)
    return LoadedPipeline(structures.ComponentSpec.from_ir_dicts(spec, platform), component_yaml="")


class _EventWatcher:
    """Follows the events: which steps are under way, and which one failed."""

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
        """Asks the steps under way to stop, and waits: training writes a checkpoint first."""
        for pid in list(self._active):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while any(_is_alive(pid) for pid in list(self._active)) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def explain_failure(self, output: "LogWriter", error: Exception) -> NsError:
        """What a person needs to know of a failed run: the step, and its one-line reason."""
        if self._failed is not None:
            event = self._failed
            if event.get("exit_code") == Interrupted.exit_code:
                return Interrupted(str(event["error"]))
            return StageError(f"{describe_stage(event)}: {event['error']}", int(event.get("exit_code", 1)))
        died = [describe_stage(event) for pid, event in self._active.items() if not _is_alive(pid)]
        last = output.last_words() or f"{type(error).__name__}: {error}"
        if died:
            return RunError(f"{died[0]}: ended without a word (killed? out of memory?); the same command continues: {last}")
        return RunError(last)


def describe_stage(event: StageEvent) -> str:
    """`generation 1: train`; the first teacher has generation 0."""
    generation = event.get("generation", 0)
    prefix = f"generation {generation}" if generation else "teacher"
    shards = f" {event['shards']}" if event.get("shards") else ""
    stage = str(event.get("step", "")).replace("-", " ")
    return (
        f"{stage}{shards}"
        if stage in ("start run", "start generation", "prepare data", "report")
        else f"{prefix}: {stage}{shards}"
    )


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
    """Where KFP's output goes: to the log, without colors and the indentation that it nests into. A full disk loses the log,
    never the run."""

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

    def last_words(self) -> str:
        """The last line that says something."""
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
    """Keeps what the steps leave behind in `scratch`: KFP starts each from a folder that it never removes, and killed ones leave theirs.

    Not so the kernels that torch compiles: they stay where torch keeps them, for later runs and for commands without a pipeline.
    """
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = f"uid_{os.getuid()}"
    kernels = Path(tempfile.gettempdir()) / f"torchinductor_{user}"
    return {"TMPDIR": scratch, "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(kernels))}


@contextlib.contextmanager
def _set_environment(variables: dict[str, str]) -> Iterator[None]:
    # The steps import this project wherever the client did, installed or not.
    checkout = str(Path(__file__).parent.parent)
    search = os.pathsep.join(filter(None, [checkout, os.environ.get("PYTHONPATH", "")]))
    variables = {**variables, "PYTHONPATH": search}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _stop_on_signal(stop_stages: Callable[[], None]) -> Iterator[None]:
    """Stops the steps at once when a signal comes: KFP waits for those that label beside each other before it lets go."""

    def handle_signal(_number: int, _frame: FrameType | None) -> None:
        stopping.start()
        raise KeyboardInterrupt

    stopping = threading.Thread(target=stop_stages, name="stop steps")
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handle_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number in previous:
            signal.signal(number, signal.SIG_IGN)
        if stopping.ident is not None:
            stopping.join()
        for number, handler in previous.items():
            signal.signal(number, handler)
