import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context

import psutil
import pytest

from ns.core.process_pool import ProcessPool

LARGE = 8_000_000
"""Bytes of a result that no pipe takes at once."""


def count_start(cells, number):
    cells[0] += number


def make_large():
    """A large result, and time to be killed in."""
    time.sleep(0.002)
    return bytes(LARGE)


def test_process_pool_calls_in_processes_and_hands_over_errors():
    cells = get_context("forkserver").RawArray("q", 1)
    with ProcessPool(1, count_start, (cells, 7)) as pool:
        pids = {pool.submit(os.getpid).result() for _ in range(5)}
        assert len(pids) == 1
        assert os.getpid() not in pids
        assert cells[0] == 7
        assert pool.submit(int, "11", base=2).result() == 3
        with pytest.raises(ValueError, match="invalid literal") as error:
            pool.submit(int, "x").result()
        assert "Traceback" in error.value.__notes__[0]
        with pytest.raises(TypeError, match="pickle"):
            pool.submit(threading.Lock).result()
        assert pool.submit(len, "abc").result() == 3
    assert not any(map(psutil.pid_exists, pids))


def test_process_pool_goes_on_after_the_death_of_a_process():
    with ProcessPool(1) as pool:
        with pytest.raises(BrokenProcessPool, match="was killed"):
            pool.submit(os.kill, pool.submit(os.getpid).result(), signal.SIGKILL).result()
        assert pool.submit(len, "abc").result() == 3


@pytest.mark.integration
def test_processes_end_in_silence_when_their_parent_is_killed(tmp_path):
    """Whether they are asked for something at that instant, or have an answer."""
    program = "import time\nfrom ns.core.process_pool import ProcessPool\nif __name__ == '__main__':\n"
    program += " pool = ProcessPool(2)\n print(pool.submit(len, 'abc').result(), flush=True)\n"
    program += " [pool.submit(time.sleep, 0.3) for _ in range(9)]\n time.sleep(60)\n"
    (tmp_path / "parent.py").write_text(program)
    with subprocess.Popen(
        [sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout.readline() == "3\n"
        time.sleep(0.1)
        parent.kill()
        # Its processes hold the pipe too: this ends when they do.
        assert parent.stderr.read() == ""


@pytest.mark.integration
@pytest.mark.parametrize("kills", [10, pytest.param(300, marks=pytest.mark.long)])
@pytest.mark.timeout(900)
def test_process_pool_ends_whenever_its_processes_are_killed(kills):
    """While they send large results, and with the server that forks them: with CPython's own pool half of these kills hang."""
    chance = random.Random(0)
    with ProcessPool(2) as pool:
        for number in range(kills):
            sending = [pool.submit(make_large) for _ in range(12)]
            wait(sending[: chance.randint(0, 6)])
            time.sleep(chance.uniform(0, 0.01))
            processes = psutil.Process().children(recursive=True)
            servers = [one for one in processes if one.children()]
            workers = [one for one in processes if one.ppid() != os.getpid()]
            for victim in servers if number % 10 == 9 else workers and [chance.choice(workers)]:
                victim.kill()
            assert not wait(sending, timeout=60).not_done
            for future in sending:
                with suppress(BrokenProcessPool):
                    assert len(future.result()) == LARGE
