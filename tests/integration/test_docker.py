"""The pipeline in real containers: an ordinary user, a read-only root file system, no network; and stages that fail."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from k8s.deploy import SMOKE_INPUTS
from tests.integration.outcome import results

pytestmark = [pytest.mark.containers, pytest.mark.slow, pytest.mark.timeout(1200)]

CHECKOUT = Path(__file__).parents[2]
IMAGE = "noisy-student/worker:under-test"
FAULTY = "noisy-student/worker:faulty"
# The settings that `make deploy` tries a cluster with, and what this test asks beside them.
SMOKE = [
    f"--set={override}" for override in (*SMOKE_INPUTS["overrides"], "labeling.tasks=2", "teacher.train.checkpoint_seconds=0")
]
# Loaded by every Python that starts: does to one stage what the variable says.
FAULTS = """
import os, sys, time
fault, _, victim = os.environ.get("NS_S3_TEST_FAULT", "").partition(":")
if fault and "-m components" in " ".join(sys.orig_argv) and f"--function_to_execute {victim}" in " ".join(sys.orig_argv):
    sys.stderr.write("about to fail\\n")
    if fault == "exit":
        os._exit(1)
    if fault == "memory":
        hoard = bytearray(1 << 30)
        hoard[:] = b"x" * len(hoard)
    if fault == "sleep":
        time.sleep(600)
"""


@pytest.fixture(scope="module")
def image(engine, package_folders) -> str:
    mounts = [f"--volume={folder}:{folder}:ro" for folder in package_folders]
    builder = shlex.join(["podman", "build", "--isolation=chroot", "--network=host", *mounts])
    command = [sys.executable, "images/build.py", "--tag", IMAGE.rpartition(":")[2], "--builder", builder, "worker"]
    built = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    assert built.stdout.split() == [IMAGE]
    return IMAGE


@pytest.fixture(scope="module")
def faulty(image, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "sitecustomize.py").write_text(FAULTS)
    (folder / "Dockerfile").write_text(f"FROM localhost/{image}\nCOPY sitecustomize.py /faults/\nENV PYTHONPATH=/faults\n")
    subprocess.run(["podman", "build", "--quiet", "--tag", FAULTY, str(folder)], check=True, capture_output=True)
    return FAULTY


def make_command(root: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "ns", "run", "quickstart", *SMOKE, "--root", str(root), "--run", "test", "--json", *options]


def finish_run(root: Path, *options: str) -> dict:
    done = subprocess.run(make_command(root, *options), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr + (root / "test" / "pipeline.log").read_text()[-3000:]
    return json.loads(done.stdout)


def list_containers(root: Path) -> list[dict]:
    listed = subprocess.run(
        ["podman", "ps", "--all", "--filter", f"label=noisy-student=file://{root}/test", "--format", "json"],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(listed.stdout or "[]")


def test_docker_runner_continues_after_its_client_was_killed(image, tmp_path):
    """The client dies while the teacher trains. The next one stops what is left, and all ends as without containers."""
    expected = results(finish_run(tmp_path / "processes"))
    root = tmp_path / "containers"
    options = ["--runner", "docker", "--image", image]
    client = subprocess.Popen(make_command(root, *options), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 200
    while not list((root / "store" / "checkpoints").glob("*/step-*.safetensors")):
        assert client.poll() is None, client.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (left,) = list_containers(root)
    # At once, so that it is still at work when the next client comes.
    subprocess.run(["podman", "pause", left["Id"]], check=True, capture_output=True)
    details = json.loads(subprocess.run(["podman", "inspect", left["Id"]], capture_output=True, check=True).stdout)[0]
    os.kill(client.pid, signal.SIGKILL)
    client.wait()
    client.stderr.close()
    assert not details["Config"]["User"].startswith("0")
    assert details["HostConfig"]["ReadonlyRootfs"]
    assert details["HostConfig"]["NetworkMode"] == "none"
    assert list_containers(root), "nobody is there to stop it"
    assert results(finish_run(root, *options)) == expected
    assert list_containers(root) == []
    assert "training continues" in (root / "test" / "pipeline.log").read_text()


FAILURES = {
    "exit:prepare": (
        ["--memory", "2g"],
        6,
        "prepare: ended with exit code 1; the same command continues:\n  about to fail",
    ),
    "memory:prepare": (
        ["--memory", "400m"],
        6,
        "prepare: ran out of memory of 400m (--memory); the same command continues:\n  about to fail",
    ),
    "sleep:prepare": (
        ["--stage-timeout", "15"],
        6,
        "prepare: was stopped at its time limit of 15 s; the same command continues:\n  about to fail",
    ),
}


@pytest.mark.parametrize("fault", FAILURES)
def test_docker_runner_failed_container_message(faulty, tmp_path, fault):
    options, code, message = FAILURES[fault]
    done = subprocess.run(
        make_command(tmp_path, "--runner", "docker", "--image", faulty, *options),
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "NS_S3_TEST_FAULT": fault},
    )
    assert done.returncode == code, done.stderr
    assert f"error: {message.splitlines()[0]}" in done.stderr
    assert message.splitlines()[1].strip() in done.stderr
    assert list_containers(tmp_path) == []


def test_docker_runner_failed_stage_message(image, tmp_path):
    empty = tmp_path / "images"
    empty.mkdir()
    options = [f"--set=data.pool={empty}", "--runner", "docker", "--image", image]
    done = subprocess.run(make_command(tmp_path / "root", *options), capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, done.stderr
    assert done.stderr.splitlines()[-1].startswith("log: ") or "prepare: " in done.stderr
    assert str(empty) in done.stderr


def test_docker_runner_missing_image_message(engine, tmp_path):
    done = subprocess.run(
        make_command(tmp_path, "--runner", "docker", "--image", "no/such:image"), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "--image no/such:image: is not on this machine; build it with `make images`, or pull it" in done.stderr
