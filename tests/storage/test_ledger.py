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


def test_ledger_reuses_finished_work(root):
    calls = []
    first, reused = Ledger(root).get_or_run("train", INPUTS, work(root, calls))
    assert not reused
    second, reused = Ledger(root).get_or_run("train", dict(reversed(INPUTS.items())), work(root, calls))
    assert reused
    assert second == first
    assert len(calls) == 1


def test_ledger_repeats_work_for_other_inputs(root):
    calls = []
    Ledger(root).get_or_run("train", INPUTS, work(root, calls))
    Ledger(root).get_or_run("train", {**INPUTS, "epochs": 4}, work(root, calls))
    Ledger(root).get_or_run("evaluate", INPUTS, work(root, calls))
    assert len(calls) == 3


def test_ledger_repeats_work_whose_output_is_gone(root):
    calls = []
    Ledger(root).get_or_run("train", INPUTS, work(root, calls))
    root.delete("store/models/m/model.json")
    _, reused = Ledger(root).get_or_run("train", INPUTS, work(root, calls))
    assert not reused
    assert len(calls) == 2


def test_ledger_has_no_entry_of_failed_work(root):
    def fail():
        raise DataError("no")

    with pytest.raises(DataError):
        Ledger(root).get_or_run("train", INPUTS, fail)
    assert list(root.list("store/ledger/")) == []


@pytest.mark.parametrize("content", [b"", b'{"stage": "train"'])
def test_damaged_entry_counts_as_absent(root, content):
    calls = []
    first, _ = Ledger(root).get_or_run("train", INPUTS, work(root, calls))
    (key,) = root.list("store/ledger/")
    root.put(key, content)
    second, reused = Ledger(root).get_or_run("train", INPUTS, work(root, calls))
    assert not reused
    assert second.outputs == first.outputs
    assert Ledger(root).find_entry("train", INPUTS) == second
