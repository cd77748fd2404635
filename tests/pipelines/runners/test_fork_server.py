"""Stages as forks of a server: what a stage finds, how it ends, and what becomes of it without a server."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from kfp.local import subprocess_task_handler

from ns.core.process import OPENMP_VARIABLES
from pipelines import PACKAGE, load_yaml_documents
from pipelines.runners import fork_server
from pipelines.runners.fork_server import ForkServer, parse_command

pytestmark = pytest.mark.integration

HEAD = "import json, os, signal, sys, threading, time\nfrom pathlib import Path\n"
DESCRIBE = """
def component(folder: str):
    import decimal, getpass
    print(json.dumps({
        "arguments": sys.argv[2:],
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "descriptors": sorted(os.listdir("/proc/self/fd"))[:-1],
        "folder": os.getcwd(),
        "handlers": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGCHLD)],
        "python": [sys.path[1:], sys.executable, __name__],
        "same file": os.fstat(1) == os.fstat(2),
        "text": [sys.stdout.encoding, sys.stdout.isatty(), sys.stdin.fileno()],
        "threads": len(os.listdir("/proc/self/task")),
        "variables": dict(os.environ),
    }))
"""


SPEC = next(load_yaml_documents(PACKAGE.read_text()))


def make_command(source: str) -> list[str]:
    """A command like those of the compiled pipeline. `source`: of a function `component` that is given a folder."""
    command = next(iter(SPEC["deploymentSpec"]["executors"].values()))["container"]["command"]
    known = [part.replace("-m components", "-m run_source") for part in command]
    assert known != command
    return subprocess_task_handler.replace_python_executable([*known, HEAD + source], sys.executable)


@pytest.fixture(scope="module", autouse=True)
def _find_run_source():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        yield


def refuse(**_options) -> int:
    raise AssertionError("the server should have run it")


@pytest.fixture(scope="module")
def server():
    with closing(ForkServer(["kfp.dsl.executor_main", "numpy", "no.such.module"])) as server:
        yield server


def run(server, source: str, start_process=refuse, **variables: str) -> int:
    return server.run_command(start_process, full_command=make_command(source), env_vars=variables)


def read_description(text: str) -> dict:
    (line,) = [line for line in text.splitlines() if line.startswith('{"arguments"')]
    return json.loads(line)


def test_stage_finds_what_a_process_of_its_own_finds(server, capfd):
    assert run(server, DESCRIBE, NS_OWN="1") == 0
    forked = read_description(capfd.readouterr().out)
    assert subprocess_task_handler.run_local_subprocess(make_command(DESCRIBE), {"NS_OWN": "1"}) == 0
    started = read_description(capfd.readouterr().out)
    for variables in forked["variables"], started["variables"]:
        # The last are the shell's, and pytest's.
        for name in (*fork_server.SERVER_VARIABLES, *OPENMP_VARIABLES, "_", "SHLVL", "PWD", "OLDPWD", "PYTEST_CURRENT_TEST"):
            variables.pop(name, None)
    assert forked == started
    assert forked["threads"] == 1


def test_stage_need_not_read_the_sources_that_it_compares(server, capfd):
    source = """
def component(folder: str):
    from ns.core import digest
    read = digest._digest_source.cache_info().misses
    digest.describe_code()
    print("read again:", digest._digest_source.cache_info().misses - read)
"""
    assert run(server, source) == 0
    assert "read again: 0" in capfd.readouterr().out


def test_exit_code_and_output_are_the_stages(server, capfd):
    assert run(server, "def component(folder: str):\n    os.write(2, b'bad \\xff\\n'); sys.exit(7)") == 7
    assert run(server, "def component(folder: str):\n    os.kill(os.getpid(), 9)") == -9
    assert run(server, "def component(folder: str):\n    raise ValueError('the reason')") == 1
    printed = capfd.readouterr().out
    assert "bad \ufffd" in printed
    assert "ValueError: the reason" in printed


def test_stages_run_beside_each_other(server, tmp_path):
    source = f"""
def component(folder: str):
    os.mkdir("{tmp_path}/" + os.environ["NS_OWN"])
    while len(os.listdir("{tmp_path}")) < 3:
        time.sleep(0.01)
    sys.exit(int(os.environ["NS_OWN"]))
"""
    codes = {}
    threads = [
        threading.Thread(target=lambda own=own: codes.update({own: run(server, source, NS_OWN=str(own))})) for own in (1, 2, 3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert codes == {1: 1, 2: 2, 3: 3}


def test_interrupt_of_the_group_ends_stages_only(tmp_path):
    """As Ctrl-C in a terminal does, which reaches client, server and stages."""
    script = f"""
import signal, sys
from pipelines.runners.fork_server import ForkServer
from tests.pipelines.runners.test_fork_server import run
signal.signal(signal.SIGINT, lambda *_: None)
server = ForkServer([])
print(run(server, "def component(folder: str):\\n    Path('{tmp_path}/here').touch(); time.sleep(60)"))
print(run(server, "def component(folder: str):\\n    sys.exit(5)"))
server.close()
"""
    client = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / "here").exists():
        time.sleep(0.01)
    os.killpg(client.pid, signal.SIGINT)
    output, _ = client.communicate(timeout=30)
    assert "KeyboardInterrupt" in output
    assert [line for line in output.splitlines() if line.lstrip("-").isdigit()] == ["-2", "5"]


def test_stage_whose_server_was_killed_is_left_to_kfp_when_it_has_ended(tmp_path):
    ended = tmp_path / "ended"
    source = f"""
def component(folder: str):
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(0.3)
    Path("{ended}").touch()
"""

    def start_process(*, full_command, env_vars) -> int:
        assert ended.exists()
        assert full_command == make_command(source)
        return 3

    with closing(ForkServer([])) as server:
        assert run(server, source, start_process) == 3
        assert run(server, source, start_process) == 3, "nor is there a server for the next"


def test_client_that_is_gone_ends_the_server():
    server = ForkServer([])
    server._socket.close()
    assert server._process.wait(30) == 0


def test_commands_that_are_not_known_are_left_to_kfp(server):
    known = make_command("def component(folder: str): pass")
    assert parse_command(known, {}) is not None
    long = [*known[:-1], "#" * fork_server.MAX_REQUEST_BYTES]
    installing = [*known[:2], "python3 -m pip install numpy\n" + known[2], *known[3:]]
    for command in long, installing, ["python3", "-m", "components"], ["sh", "-ec", *known[2:]]:
        assert parse_command(command, {}) is None
        assert server.run_command(lambda *, full_command, env_vars: len(full_command), full_command=command) == len(command)


def test_every_stage_of_the_packages_can_be_forked():
    for name, executor in SPEC["deploymentSpec"]["executors"].items():
        command = [*executor["container"]["command"], *executor["container"]["args"]]
        assert parse_command(subprocess_task_handler.replace_python_executable(command, sys.executable), {}) is not None, name
