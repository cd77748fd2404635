"""The log, and the lines for those who watch a run."""

import json
from types import SimpleNamespace

import pytest

from ns.core import log


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the log's clock shows: its only item."""
    seconds = [100.0]
    monkeypatch.setattr(log, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    return seconds


def read_done(text):
    return [line["done"] for line in map(json.loads, text.splitlines()) if line["event"] == "progress"]


def test_progress_is_shown_often_and_logged_seldom(clock, tmp_path, monkeypatch, capfd):
    events = tmp_path / "events"
    monkeypatch.setenv(log.EVENTS_VARIABLE, str(events))
    log.configure_logging()
    progress = log.Progress(100, "images")
    for _ in range(100):
        progress.update(loss=0.5)
        clock[0] += 0.125
    # An update in 0.125 s; the 81st comes 10 s after the first.
    assert read_done(events.read_text()) == [*range(1, 100, 2), 100]
    assert read_done(capfd.readouterr().err) == [1, 81, 100]
    assert "only_watched" not in events.read_text()


def test_progress_is_logged_as_often_as_shown_on_a_terminal(clock, monkeypatch):
    monkeypatch.setattr(log, "sys", SimpleNamespace(stderr=SimpleNamespace(isatty=lambda: True)))
    lines = []
    monkeypatch.setattr(log, "get_logger", lambda: SimpleNamespace(info=lambda event, **fields: lines.append(fields)))
    progress = log.Progress(4, "images")
    for _ in range(4):
        progress.update()
        clock[0] += 0.25
    assert [line["done"] for line in lines] == [1, 2, 3, 4]
    assert not any("only_watched" in line for line in lines)
