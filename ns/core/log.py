"""The log: one structured line per event, for people on a terminal and as JSON elsewhere.

`ns run` points `NS_EVENTS` at a file, and draws its progress from the lines that the stages append there.
"""

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, MutableMapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Required, TypedDict

import structlog

from ns.core.printable import make_printable

EVENTS_VARIABLE = "NS_EVENTS"
# On a terminal and in NS_EVENTS people watch progress. A pod's log is kept, and paid for by the line.
PROGRESS_SECONDS = 0.25
LOGGED_PROGRESS_SECONDS = 10.0
_ONLY_WATCHED = "only_watched"
"""Field of a line that NS_EVENTS gets, and the log does not."""
LAST_LINES = 15


class StageEvent(TypedDict, total=False):
    """A line of NS_EVENTS: what a stage says while it runs. Only `event` is always there."""

    event: Required[str]
    """started, progress, finished or failed; noted where a run is watched from outside; else the text of a log line."""
    stage: str
    generation: int
    shards: str
    """Range START-STOP that a labeling task works on."""
    pid: int
    at: float
    """Seconds since 1970."""
    level: str
    timestamp: str
    seconds: float
    reused: bool
    error: str
    reason: str
    """Why a try failed, where a run is watched from outside."""
    exit_code: int
    done: int
    total: int
    unit: str
    per_second: float
    loss: float
    forward_passes: int
    labeled: int
    pool: int
    heldout: int
    calibration: int
    test: int
    images: int
    kept: int
    foreign: int
    temperature: float
    classes: str
    steps: int
    parameters: int
    top1: float
    never_predicted: str
    corruption_error: float
    promoted: bool
    gain: float


def configure_logging(*, quiet: bool = False) -> None:
    """Sets the form of the log, once per process. Lines go to stderr; stdout is for results.

    `quiet`: only warnings, for a process whose work another process reports.
    """
    renderer: Any
    if sys.stderr.isatty():
        renderer = structlog.dev.ConsoleRenderer(colors="NO_COLOR" not in os.environ)
    else:
        renderer = structlog.processors.JSONRenderer(ensure_ascii=False)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _make_values_printable,
            _append_to_events,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING if quiet else logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


def get_logger() -> Any:
    """The log; in a process that did not say how, as `configure_logging` sets it: by itself it would write to stdout."""
    if not structlog.is_configured():
        configure_logging()
    return structlog.get_logger()


bind_context = structlog.contextvars.bound_contextvars
"""A context that adds fields (stage, generation) to every line that is logged inside it."""


_progress_listeners: list[Callable[[int], object]] = []


def add_progress_listener(listener: Callable[[int], object]) -> None:
    """Calls `listener` with every count by which a stage advances from now on."""
    _progress_listeners.append(listener)


class Progress:
    """How far a stage has come: `done` of `total` units.

    Shows it every PROGRESS_SECONDS where a person watches, logs it every LOGGED_PROGRESS_SECONDS, and both at the end.
    """

    def __init__(self, total: int, unit: str, done: int = 0) -> None:
        self.total = total
        self.unit = unit
        self.done = done
        self._first = done
        self._started = time.monotonic()
        self._shown = self._logged = -math.inf

    def update(self, count: int = 1, **metrics: Any) -> None:
        """Counts `count` more units as done, and shows `metrics` (loss, top1) beside them."""
        self.done += count
        for listener in _progress_listeners:
            listener(count)
        now, ends = time.monotonic(), self.done >= self.total
        if now - self._shown < PROGRESS_SECONDS and not ends:
            return
        self._shown = now
        if sys.stderr.isatty() or now - self._logged >= LOGGED_PROGRESS_SECONDS or ends:
            self._logged = now
        else:
            metrics = {**metrics, _ONLY_WATCHED: True}
        rate = (self.done - self._first) / max(now - self._started, 1e-9)
        get_logger().info("progress", done=self.done, total=self.total, unit=self.unit, per_second=round(rate, 2), **metrics)


def _make_values_printable(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name, value in event.items():
        event[name] = _make_value_printable(value)
    return event


def _make_value_printable(value: Any) -> Any:
    """Text inside lists and dicts too; what is none of JSON's types becomes text."""
    match value:
        case None | bool() | int() | float():
            return value
        case list() | tuple() | set():
            return [_make_value_printable(item) for item in value]
        case dict():
            return {make_printable(str(name)): _make_value_printable(item) for name, item in value.items()}
    return make_printable(str(value))


def _append_to_events(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    only_watched = event.pop(_ONLY_WATCHED, False)
    path = os.environ.get(EVENTS_VARIABLE)
    if path:
        line = json.dumps({**event, "at": datetime.now(UTC).timestamp()}, default=str) + "\n"
        # Showing progress must never stop the work: neither a full disk nor a vanished file matters here.
        with contextlib.suppress(OSError), Path(path).open("a") as file:
            file.write(line)
    if only_watched:
        raise structlog.DropEvent
    return event


def format_last_lines(lines: Iterable[str]) -> str:
    """The end of a log for the end of a message: its last 15 lines that are neither empty nor JSON; an empty text if there are none."""
    text_lines = [line for line in lines if line.strip() and not (line.startswith("{") and line.endswith("}"))]
    return ":" + "".join(f"\n  {line}" for line in text_lines[-LAST_LINES:]) if text_lines else ""


def format_duration(seconds: float) -> str:
    """`3.2 s`, `4 min 10 s`, `2 h 5 min`, `4.5 days`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 72 * 60:
        return f"{minutes / 60 / 24:,.1f} days"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
