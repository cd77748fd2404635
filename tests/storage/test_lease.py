"""Leases: equal work is done once, and goes on when its holder is gone."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from ns.core.errors import DataError
from ns.core.process import ProcessId
from ns.storage import LocalStore, lease
from ns.storage.lease import LEASES, LeaseHolder, hold_lease, sweep_leases
from ns.storage.ledger import Ledger

INPUTS = {"data": "abc"}

HOLD = """
import sys, time
from ns.storage import open_store
from ns.storage.lease import hold_lease
with hold_lease(open_store(sys.argv[1]), "work", "work"):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def quick(monkeypatch):
    """Those who wait look often."""
    monkeypatch.setattr(lease, "POLL_SECONDS", (0.01, 0.02))


class Clock:
    """A clock that only sleeping moves; calls `watch` then."""

    def __init__(self, watch) -> None:
        self.now, self.watch = 0.0, watch

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.watch(self.now)


def leases(root) -> list[str]:
    return list(root.list(f"{LEASES}/"))


def made(root, calls, seconds=0.0):
    def work():
        calls.append(os.getpid())
        time.sleep(seconds)
        root.put("store/models/m/model.json", b"{}")
        return {"model": "store/models/m/model.json"}

    return work


def in_threads(count, function) -> list:
    found = []
    threads = [threading.Thread(target=lambda: found.append(function())) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def elsewhere(root, name="work", **changes) -> None:
    """Writes the lease of a process of another machine."""
    holder = LeaseHolder.make_own().model_copy(update={"process": ProcessId("other boot", "1:1"), "host": "node-7", **changes})
    holder.save_file(root, f"{LEASES}/{name}-0001.json")


def test_equal_work_is_done_once_by_many_at_once(store, quick, request):
    calls = []
    results = in_threads(6, lambda: Ledger(store).get_or_run("train", INPUTS, made(store, calls, 0.3)))
    # Swift looks at the condition, but not in the same instant as it writes: there several may begin, to the same result.
    assert len(calls) == 1 or (request.node.callspec.params["any_store"] == "swift" and len(calls) > 1)
    assert [reused for _, reused in results].count(False) == len(calls)
    assert len({entry.finished_at for entry, _ in results}) <= len(calls)
    assert {tuple(entry.outputs.items()) for entry, _ in results} == {(("model", "store/models/m/model.json"),)}
    assert leases(store) == []


def test_cost_of_a_lease_in_requests(store, monkeypatch):
    """One that only reads what was done before takes none. A folder needs no look at what it has created."""
    requests = Counter[str]()
    for name in ("create", "put", "get", "entries", "exists", "delete"):
        original = getattr(type(store), name)

        def count_and_call(*args, name=name, original=original):
            requests[name] += args[0] is store
            return original(*args)

        monkeypatch.setattr(type(store), name, count_and_call)
    ledger = Ledger(store)
    ledger.get_or_run("train", INPUTS, made(store, []))
    creating = {"create": 1} if isinstance(store, LocalStore) else {"create": 1, "exists": 1, "get": 1}
    if not isinstance(store, LocalStore) and not store.service.can_put_conditionally:
        # Such a server is asked for the blob first, and then given it.
        creating |= {"exists": 2, "put": 1}
    taken = Counter(requests)
    requests.clear()
    with hold_lease(store, "work", "work"):
        pass
    assert +requests == {"entries": 2, **creating, "delete": 1}
    assert taken["create"] == 1
    requests.clear()
    ledger.get_or_run("train", INPUTS, made(store, []))
    assert requests["create"] == requests["put"] == requests["delete"] == 0
    requests.clear()
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.01)
    with hold_lease(store, "work", "work"):
        while requests["put"] < 3:
            time.sleep(0.005)
    beats = requests["put"] - creating.get("put", 0)
    assert +requests == {"entries": 2 + beats, **creating, "put": requests["put"], "delete": 1}


def test_other_work_does_not_wait(store, quick):
    for names in (("work", "work-2"), ("work-0", "work"), ("work-0001", "work")):
        with hold_lease(store, names[0], "work"), hold_lease(store, names[1], "work"):
            assert len(leases(store)) == 2
        assert leases(store) == []


def test_what_else_lies_beside_leases_is_left(tmp_path, quick):
    root = LocalStore(tmp_path)
    strange = [f"{LEASES}/{name}" for name in ("work-zzz.json", "work-.json", "work-1.txt")]
    for key in strange:
        root.put(key, b"{}")
    with hold_lease(root, "work", "work"):
        assert len(leases(root)) == 4
    assert sorted(leases(root)) == sorted(strange)


def test_a_later_lease_counts_whatever_its_number_of_digits(tmp_path, quick, monkeypatch):
    root = LocalStore(tmp_path)
    monkeypatch.setattr(lease, "STALE_SECONDS", 0)
    for number in (9999, 10000):
        root.put(f"{LEASES}/work-{number:04d}.json", b"")
    with hold_lease(root, "work", "work"):
        assert f"{LEASES}/work-10001.json" in leases(root)
    assert leases(root) == []


def test_who_waits_says_once_who_holds_the_lease_and_does_the_work_if_it_failed(tmp_path, quick, capsys):
    root, calls = LocalStore(tmp_path), []
    begun = threading.Event()

    def fail():
        begun.set()
        time.sleep(0.3)
        raise DataError("no")

    def fail_at_work():
        with pytest.raises(DataError):
            Ledger(root).get_or_run("train", INPUTS, fail)

    holder = threading.Thread(target=fail_at_work)
    holder.start()
    begun.wait()
    assert not Ledger(root).get_or_run("train", INPUTS, made(root, calls))[1]
    holder.join()
    assert len(calls) == 1
    said = capsys.readouterr()
    lines = [line for line in (said.out + said.err).splitlines() if "waiting for its result" in line]
    assert len(lines) == 1
    assert f"process {os.getpid()}" in lines[0]
    assert '"since": ' in lines[0]
    assert leases(root) == []


@pytest.mark.integration
def test_killed_holder_on_this_machine_is_taken_over_at_once(tmp_path):
    root = LocalStore(tmp_path)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        # Not reaped yet: a zombie counts as gone.
        holder.send_signal(signal.SIGKILL)
        started = time.monotonic()
        with hold_lease(root, "work", "work"):
            assert leases(root) == [f"{LEASES}/work-0001.json", f"{LEASES}/work-0002.json"]
        assert time.monotonic() - started < lease.STALE_SECONDS / 4
    assert leases(root) == []


def test_holder_elsewhere_is_taken_over_only_when_silent(store, monkeypatch):
    elsewhere(store)
    last_beat = 100

    def beat(now: float) -> None:
        if now < last_beat:
            elsewhere(store, beats=int(now / lease.BEAT_SECONDS))

    clock = Clock(beat)
    monkeypatch.setattr(lease, "time", clock)
    with hold_lease(store, "work", "work"):
        assert last_beat - lease.BEAT_SECONDS + lease.STALE_SECONDS <= clock.now < last_beat + lease.STALE_SECONDS + 5
    assert leases(store) == []


def test_silent_holder_that_goes_on_takes_nothing_from_its_successor(tmp_path, monkeypatch, quick):
    monkeypatch.setattr(lease, "STALE_SECONDS", 0)
    root = LocalStore(tmp_path)
    first = lease._wait_for_lease(root, "work", "work")
    # As if its process were stopped.
    first._is_over.set()
    first._beating.join()
    second = lease._wait_for_lease(root, "work", "work")
    first.try_release()
    assert leases(root) == [f"{LEASES}/work-0002.json"]
    second.try_release()
    assert leases(root) == []


def test_number_of_a_process_that_was_given_again_is_another_process():
    own = ProcessId.from_pid(os.getpid())
    before = own._replace(identity=f"{os.getpid()}:1")
    assert not own.is_gone()
    assert before.is_gone()
    assert not before._replace(system="another container").is_gone()
    assert ProcessId.parse(str(own)) == own
    assert ProcessId.parse(str(own._replace(system="another container"))) is None


def test_sweep_removes_what_killed_processes_left(tmp_path):
    root = LocalStore(tmp_path)
    gone = ProcessId.from_pid(os.getpid())._replace(identity=f"{os.getpid()}:1")
    elsewhere(root, "killed", process=gone)
    elsewhere(root, "alive")
    elsewhere(root, "own", process=ProcessId.from_pid(os.getpid()))
    now = Path(tmp_path / f"{LEASES}/alive-0001.json").stat().st_mtime
    sweep_leases(root, now + 60)
    assert leases(root) == [f"{LEASES}/alive-0001.json", f"{LEASES}/own-0001.json"]
    sweep_leases(root, now + lease.ABANDONED_SECONDS + 60)
    assert leases(root) == []
