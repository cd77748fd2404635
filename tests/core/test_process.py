import os
import signal
import subprocess
import sys
import threading

import pytest

from ns.core.process import OPENMP_VARIABLES, handle_signals, identify_process, set_openmp_to_sleep

READ_IN_THREADS = """
import io, sys
import pyarrow as pa, pyarrow.parquet as pq
from ns.core.process import run_process
sink = io.BytesIO()
pq.write_table(pa.table({"key": ["a"] * 300, "value": list(range(300))}), sink)
# Arrow's threads are at their end when the process is: with Python's own end, every sixth is aborted.
run_process(lambda: pq.read_table(io.BytesIO(sink.getvalue())).num_rows - 293)
"""


def run_main(source: str) -> subprocess.CompletedProcess[str]:
    """Runs a process whose work is the body of a function."""
    program = f"import atexit, sys, threading, time\nfrom ns.core.process import run_process\ndef main():\n {source}\nrun_process(main)"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("source", "code", "said"),
    [
        ("pass", 0, ""),
        ("return 7", 7, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(130)", 130, ""),
        ("sys.exit('the reason')", 1, "the reason"),
        ("raise ValueError('the reason')", 1, "ValueError: the reason"),
        ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt"),
        (
            "sys.stdout = open('/dev/full', 'w'); print(1)",
            120,
            "error: cannot write /dev/full: [Errno 28] No space left on device",
        ),
    ],
)
def test_a_process_ends_with_the_code_of_its_work(source, code, said):
    done = run_main(source)
    assert (done.returncode, done.stdout) == (code, "")
    assert (done.stderr.splitlines() or [""])[-1] == said


def test_a_process_does_at_its_end_what_python_does():
    source = "atexit.register(print, 'registered'); threading.Timer(0.1, print, ['thread']).start(); print('work')"
    done = run_main(source)
    assert (done.returncode, done.stdout.split()) == (0, ["work", "thread", "registered"])


def test_a_process_whose_reader_is_gone_ends_well():
    program = "from ns.core.process import run_process; run_process(lambda: print('a'))"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": ""}
    ) as process:
        process.stdout.close()
    assert process.returncode == 0


@pytest.mark.integration
def test_threads_of_libraries_abort_no_process_at_its_end():
    processes = [subprocess.Popen([sys.executable, "-c", READ_IN_THREADS]) for _ in range(4)]
    assert [process.wait() for process in processes] == [7] * 4


@pytest.mark.integration
@pytest.mark.long
def test_200_processes_with_threads_of_libraries_end_well():
    ends = [subprocess.run([sys.executable, "-c", READ_IN_THREADS]).returncode for _ in range(200)]
    assert ends == [7] * 200


def test_handle_signals_restores_the_handlers_before():
    heard, before = [], signal.getsignal(signal.SIGINT)
    with handle_signals(lambda number, _: heard.append(("outer", number)), [signal.SIGTERM]):
        with handle_signals(lambda number, _: heard.append(("inner", number))):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    inner = [("inner", number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM)]
    assert heard == [*inner, ("outer", signal.SIGTERM)]
    assert signal.getsignal(signal.SIGINT) is before


def test_handle_signals_does_nothing_in_a_thread():
    before, inside = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with handle_signals(lambda *_: None):
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [before]


@pytest.mark.integration
@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="the system does not tell when a process began")  # noqa: PTH110
def test_a_process_dies_with_another_and_knows_it_from_a_later_one_of_its_number():
    own = identify_process(os.getpid())
    assert own.startswith(f"{os.getpid()}:")
    assert identify_process(os.getpid()) == own
    code = "import sys, time\nfrom ns.core.process import die_with_process\ndie_with_process(sys.argv[1])\ntime.sleep(60)"
    with subprocess.Popen(["sleep", "60"]) as other:
        watching = [
            subprocess.Popen([sys.executable, "-c", code, identity])
            for identity in (identify_process(other.pid), f"{os.getpid()}:1", own)
        ]
        assert watching[1].wait(30) == -signal.SIGKILL, "the number is that of a process that began later"
        assert [process.poll() for process in watching] == [None, -signal.SIGKILL, None]
        other.kill()
        # Not reaped yet: what is left of a process counts as gone.
        assert watching[0].wait(30) == -signal.SIGKILL
        assert watching[2].poll() is None
        watching[2].kill()
        watching[2].wait()
    assert identify_process(other.pid) == ""


@pytest.mark.parametrize(
    ("chosen", "spins", "found"),
    [
        ({}, 0, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}),
        ({}, 7, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "7"}),
        ({"GOMP_SPINCOUNT": "9"}, 7, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "9"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, 7, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_set_openmp_to_sleep_leaves_what_the_environment_says(monkeypatch, chosen, spins, found):
    for name in OPENMP_VARIABLES:
        # Set first, so that what the function sets is taken back.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    set_openmp_to_sleep(spins)
    assert {name: os.environ[name] for name in OPENMP_VARIABLES if name in os.environ} == found
