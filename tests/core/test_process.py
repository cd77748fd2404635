import os
import signal
import subprocess
import sys
import threading

import pytest

from ns.core.process import handle_signals, identify_process


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
