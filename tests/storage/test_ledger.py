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


@pytest.mark.parametrize(
    ("key", "content"),
    [("weights", None), ("weights", b"half"), ("weights", b""), ("model.json", None), ("sub/more", b"longer than it was")],
)
def test_work_that_lost_or_cut_a_blob_is_made_again(root, capsys, key, content):
    ledger, calls = Ledger(root), []
    folder = ledger.derive_key("models", "train", INPUTS)

    def train():
        calls.append(root.exists(f"{folder}/model.json"))
        for name, data in {"weights": b"all of them", "sub/more": b"more", "model.json": b"{}"}.items():
            root.put(f"{folder}/{name}", data)
        return {"model": f"{folder}/model.json", "teacher": "store/models/other/model.json"}

    root.put("store/models/other/model.json", b"{}")
    ledger.get_or_run("train", INPUTS, train)
    # What is added later is no part of the work.
    root.put(f"{folder}/note", b"x")
    assert ledger.get_or_run("train", INPUTS, train)[1]
    if content is None:
        root.delete(f"{folder}/{key}")
    else:
        root.put(f"{folder}/{key}", content)
    entry, reused = ledger.get_or_run("train", INPUTS, train)
    assert not reused
    # The manifest was gone before the work was done again, unless only another manifest's folder is damaged.
    assert calls == [False, key == "sub/more"]
    made = {f"{folder}/{name}": size for name, size in (("model.json", 2), ("sub/more", 4), ("weights", 11))}
    assert made.items() <= entry.files.items()
    assert "store/models/other/model.json" not in entry.files
    if key != "model.json":
        assert f"{folder}/{key}" in capsys.readouterr().err
    assert root.exists("store/models/other/model.json")


def test_work_of_many_blobs_is_looked_up_by_folder(root, monkeypatch):
    ledger = Ledger(root)
    folder = ledger.derive_key("datasets", "import", INPUTS)

    def import_shards():
        for number in range(20):
            root.put(f"{folder}/shard-{number}.tar", b"x" * number)
        root.put(f"{folder}/dataset.json", b"{}")
        return {"dataset": f"{folder}/dataset.json"}

    ledger.get_or_run("import", INPUTS, import_shards)
    monkeypatch.setattr(root, "size", lambda key: pytest.fail("each blob was looked up by itself"))
    assert ledger.find_entry("import", INPUTS)
