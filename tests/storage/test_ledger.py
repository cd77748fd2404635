import pytest

from ns.core.errors import DataError
from ns.storage import LocalStore
from ns.storage.ledger import Ledger

INPUTS = {"data": "abc", "epochs": 3}


@pytest.fixture
def root(tmp_path):
    return LocalStore(tmp_path)


def work(root, calls):
    def run():
        calls.append(1)
        root.put("store/models/m/model.json", b"{}")
        return {"model": "store/models/m/model.json"}

    return run


def test_done_work_is_not_done_twice(root):
    calls = []
    first, reused = Ledger(root).get_or_run("train", INPUTS, work(root, calls))
    assert not reused
    second, reused = Ledger(root).get_or_run("train", dict(reversed(INPUTS.items())), work(root, calls))
    assert reused
    assert second == first
    assert len(calls) == 1


def test_other_inputs_are_other_work(root):
    calls = []
    Ledger(root).get_or_run("train", INPUTS, work(root, calls))
    Ledger(root).get_or_run("train", {**INPUTS, "epochs": 4}, work(root, calls))
    Ledger(root).get_or_run("evaluate", INPUTS, work(root, calls))
    assert len(calls) == 3


def test_work_whose_output_is_gone_is_done_again(root):
    calls = []
    Ledger(root).get_or_run("train", INPUTS, work(root, calls))
    root.delete("store/models/m/model.json")
    _, reused = Ledger(root).get_or_run("train", INPUTS, work(root, calls))
    assert not reused
    assert len(calls) == 2


def test_failed_work_leaves_no_entry(root):
    def fail():
        raise DataError("no")

    with pytest.raises(DataError):
        Ledger(root).get_or_run("train", INPUTS, fail)
    assert list(root.list("store/ledger/")) == []


def test_a_damaged_entry_is_named(root):
    ledger = Ledger(root)
    entry, _ = ledger.get_or_run("train", INPUTS, work(root, []))
    root.put(f"store/ledger/train/{entry.digest}.json", b'{"stage": 3}')
    with pytest.raises(DataError, match=rf"{entry.digest}\.json: stage"):
        ledger.find_entry("train", entry.digest)
