"""What Kubernetes does before it ends a stage's pod (workflowDefaults.podSpecPatch), with processes like those in it."""

import json
import os
import subprocess
import sys
import time

import pytest
import yaml

from pipelines import PACKAGE, load_yaml_documents
from tests.k8s.test_retries import CONFIG_MAP

STAGE = """
import os, signal, sys, time
folder = sys.argv[1]
if os.fork() == 0:
    signal.signal(signal.SIGTERM, lambda *_: open(f"{folder}/child-was-hit", "w"))
    time.sleep(60)
    os._exit(0)
def stop(*_):
    time.sleep(0.5)
    open(f"{folder}/checkpoint", "w")
    os.killpg(0, signal.SIGKILL)
signal.signal(signal.SIGTERM, stop)
open(f"{folder}/ready", "w")
time.sleep(60)
"""
"""Has a child, as a training has its loaders, and takes half a second for its checkpoint."""


def read_patch():
    config_map = yaml.safe_load(CONFIG_MAP.read_text())
    return yaml.safe_load(yaml.safe_load(config_map["data"]["workflowDefaults"])["spec"]["podSpecPatch"])


def read_stage_command(folder):
    """What the pod of a stage runs, by the package, with the program above in the place of the stages."""
    spec, _ = load_yaml_documents(PACKAGE.read_text())
    container = spec["deploymentSpec"]["executors"]["exec-teacher"]["container"]
    (folder / "components").mkdir()
    (folder / "components" / "__main__.py").write_text(STAGE.replace("sys.argv[1]", 'os.environ["FOLDER"]'))
    (folder / "python3").symlink_to(sys.executable)
    values = {"{{$}}": json.dumps({"inputs": {}})}
    return [values.get(word, word) for word in (*container["command"], *container["args"])]


@pytest.fixture
def start(tmp_path):
    """Starts programs that are the only processes which the command sees."""
    processes = []

    def start_program(name, command=()):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        environment = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(folder), "FOLDER": str(folder)}
        processes.append(
            subprocess.Popen(command or [sys.executable, "-c", STAGE, str(folder)], start_new_session=True, env=environment)
        )
        until = time.monotonic() + 20
        while not (folder / "ready").exists():
            assert time.monotonic() < until
            time.sleep(0.02)
        children = subprocess.run(["pgrep", "-P", str(processes[-1].pid)], capture_output=True, text=True).stdout.split()
        for number in [processes[-1].pid, *children]:
            (tmp_path / "proc").mkdir(exist_ok=True)
            (tmp_path / "proc" / str(number)).symlink_to(f"/proc/{number}")
        return processes[-1], folder

    yield start_program
    for process in processes:
        subprocess.run(["pkill", "-KILL", "-s", str(process.pid)])
        process.wait()


@pytest.mark.integration
def test_pod_waits_for_its_stage_to_write_a_checkpoint(tmp_path, start):
    (tmp_path / "stage").mkdir()
    stage, folder = start("stage", read_stage_command(tmp_path / "stage"))
    other, other_folder = start("other")
    [container] = read_patch()["containers"]
    assert container["name"] == "main"
    shell, option, script = container["lifecycle"]["preStop"]["exec"]["command"]
    # As the container's init reaps it.
    stopping = subprocess.Popen([shell, option, script.replace("/proc", str(tmp_path / "proc"))])
    stage.wait(timeout=20)
    assert stopping.wait(timeout=20) == 0
    assert (folder / "checkpoint").exists()
    # Loaders are ended by their training, which needs them for its last step.
    assert not (folder / "child-was-hit").exists()
    assert other.poll() is None
    assert not (other_folder / "checkpoint").exists()


def test_pod_without_a_stage_ends_at_once(tmp_path):
    (tmp_path / "proc").mkdir()
    script = read_patch()["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][2]
    assert subprocess.run(["sh", "-c", script.replace("/proc", str(tmp_path / "proc"))], timeout=20).returncode == 0


def test_time_for_a_checkpoint_is_longer_than_the_default():
    assert read_patch()["terminationGracePeriodSeconds"] > 30
