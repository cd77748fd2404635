"""A run killed with SIGKILL at the worst moments ends like one that was left alone: with the same label sets and metrics."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.outcome import results

pytestmark = [pytest.mark.integration, pytest.mark.slow]

# Short, with a checkpoint after every step, so that there is something to continue from wherever the kill falls.
QUICK = [
    f"--set={override}"
    for override in (
        "generations=1",
        "teacher.train.epochs=40",
        "teacher.train.checkpoint_seconds=0",
        "students.0.train.epochs=12",
        "students.0.train.checkpoint_seconds=0",
        "gate.min_gain=-1",
    )
]
NS = [sys.executable, "-m", "ns"]


def command(root: Path) -> list[str]:
    return [*NS, "run", "quickstart", *QUICK, "--root", str(root), "--run", "test", "--json"]


def finish(root: Path) -> dict:
    done = subprocess.run(command(root), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> dict:
    return results(finish(tmp_path_factory.mktemp("calm")))


def notes(root: Path, stage: str) -> list[Path]:
    return list((root / "test" / "stages").glob(f"*-{stage}*.json"))


def checkpoints(root: Path) -> list[Path]:
    return list((root / "store" / "checkpoints").glob("*/step-*.safetensors"))


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "teacher training": lambda root: any(path.name >= "step-00000010" for path in checkpoints(root)),
    "labeling": lambda root: bool(list((root / "store" / "labels").glob("*/*.parquet"))),
    "student training": lambda root: len(notes(root, "select")) == 1 and len(checkpoints(root)) > 0,
}


def start(root: Path, **options) -> subprocess.Popen:
    """A client whose processes all have a variable that names the root."""
    return subprocess.Popen(command(root), env={**os.environ, "UNDER_TEST": str(root)}, stdout=subprocess.DEVNULL, **options)


def running(root: Path) -> list[int]:
    """Processes of a client that was started with this root."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if f"UNDER_TEST={root}\0" in (entry / "environ").read_text():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def until(moment: str, root: Path, client: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while not MOMENTS[moment](root):
        assert client.poll() is None, f"the run ended before the moment came: {moment}"
        assert time.monotonic() < deadline, f"the moment does not come: {moment}"
        time.sleep(0.01)


def test_killed_run_continues_and_ends_like_a_calm_one(tmp_path, calm):
    for moment in MOMENTS:
        client = start(tmp_path, stderr=subprocess.DEVNULL)
        until(moment, tmp_path, client)
        assert len(running(tmp_path)) >= 2, "the server and a stage"
        os.kill(client.pid, signal.SIGKILL)
        client.wait()
        # The stages under way notice that their client is gone.
        deadline = time.monotonic() + 10
        while running(tmp_path):
            assert time.monotonic() < deadline, f"after {moment}, orphans: {running(tmp_path)}"
            time.sleep(0.1)
    assert results(finish(tmp_path)) == calm
    said = (tmp_path / "test" / "pipeline.log").read_text()
    assert said.count("training continues") == 2, "the teacher's and the student's"


def test_interrupted_run_is_continued_by_resume(tmp_path, calm):
    client = subprocess.Popen(
        command(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    until("teacher training", tmp_path, client)
    # As a terminal does it: to the whole process group.
    os.killpg(client.pid, signal.SIGINT)
    _, errors = client.communicate(timeout=60)
    assert client.returncode == 130
    assert "the same command continues" in errors
    assert "Traceback" not in errors
    record = json.loads((tmp_path / "store" / "runs" / "test.json").read_text())
    assert record["state"] == "interrupted"
    resumed = subprocess.run(
        [*NS, "run", "--resume", "--root", str(tmp_path), "--json"], capture_output=True, text=True, timeout=300
    )
    assert resumed.returncode == 0, resumed.stderr
    assert results(json.loads(resumed.stdout)) == calm


def test_second_client_of_a_run_is_refused(tmp_path):
    client = subprocess.Popen(command(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "test" / ".client").exists():
            time.sleep(0.01)
        second = subprocess.run(command(tmp_path), capture_output=True, text=True, timeout=60)
        assert second.returncode == 6
        assert second.stderr.strip() == (
            f"error: run test: is under way already (process {client.pid}); wait for it, or stop it first"
        )
    finally:
        client.kill()
        client.wait()
