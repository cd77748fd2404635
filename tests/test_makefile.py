"""The front door, on a project of the same shape that installs in seconds and needs no network."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
TOOLS = ("sh", "make", "awk", "rm", "touch", "tail", "env", "flock", "mkdir", "sleep")

PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "tiny"
version = "1"
"""

# Builds an empty wheel with a script `ns`, by hand: pip then has nothing to fetch.
BACKEND = """
import os, time, zipfile

def build_editable(folder, config_settings=None, metadata_directory=None):
    time.sleep(float(os.environ.get("BUILD_SECONDS", "0")))
    with zipfile.ZipFile(os.path.join(folder, "tiny-1-py3-none-any.whl"), "w") as wheel:
        info = "tiny-1.dist-info/"
        extras = "".join(f"Provides-Extra: {name}\\n" for name in ("pipelines", "quickstart", "versions", "dev"))
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: tiny\\nVersion: 1\\n" + extras)
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nGenerator: b\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "entry_points.txt", "[console_scripts]\\nns = tiny:main\\n")
        wheel.writestr("tiny.py", "import sys\\n\\ndef main():\\n    print('ran', *sys.argv[1:])\\n")
        wheel.writestr(info + "RECORD", "")
    return "tiny-1-py3-none-any.whl"

def build_wheel(folder, config_settings=None, metadata_directory=None):
    return build_editable(folder)
"""


class Machine:
    """A folder with the project and a PATH that holds nothing but what a test puts there."""

    def __init__(self, root: Path) -> None:
        self.project = root / "project"
        self.bin = root / "bin"
        self.project.mkdir()
        self.bin.mkdir()
        for name in ("Makefile", "install.sh", "install_packages.py"):
            shutil.copy(CHECKOUT / name, self.project)
        (self.project / "pyproject.toml").write_text(PYPROJECT)
        (self.project / "backend.py").write_text(BACKEND)
        (self.project / "constraints.txt").touch()
        for name in TOOLS:
            if found := shutil.which(name):
                (self.bin / name).symlink_to(found)
        self.has("id", "echo 1000")
        self.has("sudo", "exit 1")

    def has(self, name: str, script: str) -> None:
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def has_python(self, name: str = "python3") -> None:
        self.has(name, f'exec {sys.executable} "$@"')

    def environment(self, **more: str) -> dict[str, str]:
        # pip must find all it needs in the project itself.
        return {"PATH": str(self.bin), "HOME": str(self.project), "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, **more}

    def make(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["make", *arguments]
        return subprocess.run(command, cwd=self.project, env=self.environment(), capture_output=True, text=True, timeout=120)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_make_help_lists_every_target(machine):
    targets = set(re.findall(r"^([a-z][a-z-]*):.*## ", (CHECKOUT / "Makefile").read_text(), re.MULTILINE))
    shown = machine.make().stdout
    assert {"help", "run", "test", "lint", "clean"} <= targets
    assert targets == set(re.findall(r"^  make ([a-z-]+)", shown, re.MULTILINE))


@pytest.mark.integration
def test_make_run_installs_once_and_passes_arguments(machine):
    machine.has_python()
    first = machine.make("run", "ARGS=--set seed=1")
    assert first.returncode == 0, first.stderr
    assert first.stdout == "ran run quickstart --set seed=1\n"
    assert "Installing into .venv" in first.stderr

    started = time.perf_counter()
    second = machine.make("run")
    assert second.stdout == "ran run quickstart\n"
    assert second.stderr == ""
    assert time.perf_counter() - started < 2

    os.utime(machine.project / "constraints.txt")
    assert "Installing into .venv" in machine.make("run").stderr


def test_install_names_the_python_it_needs(machine):
    machine.has("python3", 'if [ "$1" = --version ]; then echo "Python 3.9.2"; else exit 1; fi')
    refused = machine.make("run")
    assert refused.returncode != 0
    assert "error: Python 3.11 to 3.14 is needed, found: Python 3.9.2" in refused.stderr
    assert not (machine.project / ".venv").exists()


def test_install_without_python(machine):
    assert "found: none" in machine.make("run").stderr


@pytest.mark.integration
def test_install_skips_a_python_that_does_not_start(machine):
    machine.has("python3.13", "echo 'not found in these versions' >&2; exit 127")
    machine.has_python("python3.11")
    machine.has("python3", "exit 1")
    assert machine.make("run").returncode == 0


def without_ensurepip(installed: Path) -> str:
    """A Python as Debian ships it: without ensurepip until its package is there."""
    return f'case "$*" in *ensurepip*|*"-m venv"*) [ -e {installed} ] || exit 1;; esac\nexec {sys.executable} "$@"'


@pytest.mark.integration
def test_install_adds_missing_ensurepip_as_root(machine, tmp_path):
    installed = tmp_path / "installed"
    machine.has("python3", without_ensurepip(installed))
    machine.has("id", "echo 0")
    machine.has("apt-get", f'case "$*" in *install*) echo "$*" > {installed};; esac')
    done = machine.make("run")
    assert done.returncode == 0, done.stderr
    version = "{}.{}".format(*sys.version_info)
    assert installed.read_text().split()[-1] == f"python{version}-venv"


def test_install_without_rights_names_the_command(machine, tmp_path):
    machine.has("python3", without_ensurepip(tmp_path / "installed"))
    machine.has("apt-get", "exit 1")
    refused = machine.make("run")
    assert refused.returncode != 0
    assert re.search(r"run: sudo apt-get install -y python3\.\d+-venv\n", refused.stderr)
    assert not (machine.project / ".venv").exists()


@pytest.mark.integration
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_install_repeats_an_interrupted_installation(machine, end):
    machine.has_python()
    process = subprocess.Popen(
        ["make", "run"],
        cwd=machine.project,
        env=machine.environment(BUILD_SECONDS="60"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # In a shell's background job it is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    under_way = machine.project / ".venv" / ".installing"
    deadline = time.monotonic() + 60
    while not under_way.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    code = None
    while code is None and time.monotonic() < deadline + 60:
        # An interpreter that is just starting may swallow an interrupt; people press Ctrl-C again.
        os.killpg(process.pid, end)
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(timeout=5)
    assert code
    # What a half-unpacked package might look like.
    leftover = machine.project / ".venv" / "half-unpacked"
    leftover.touch()

    done = machine.make("run")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ran run quickstart\n"
    assert not leftover.exists()
    assert not under_way.exists()


@pytest.mark.integration
def test_install_that_fails_shows_its_log_and_keeps_the_environment(machine):
    machine.has_python()
    assert machine.make("run").returncode == 0
    kept = machine.project / ".venv" / "kept"
    kept.touch()
    backend = BACKEND.replace("+ extras)", '+ extras + "Requires-Dist: no-such-thing\\n")')
    (machine.project / "backend.py").write_text(backend)
    os.utime(machine.project / "pyproject.toml")
    refused = machine.make("run")
    assert refused.returncode != 0
    assert "no-such-thing" in refused.stderr
    assert "error: the installation failed; all of its output is in .venv/install.log" in refused.stderr
    assert kept.exists()
