"""Why a stage was redone."""

import pytest

from ns.core.errors import RunError
from ns.runs.explain import InputChange, explain_stage
from ns.runs.records import write_stage_note
from ns.storage import LocalStore
from ns.storage.ledger import Ledger


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path)


def train(store, monkeypatch, key, code=None, **inputs):
    """A finished training; its code is `code`, by part."""
    code = code or {"ns": "aaaa", "torch": "2.14.1"}
    monkeypatch.setattr("ns.storage.ledger.describe_code", lambda: code)
    store.put(f"{key}/model.json", b"{}")
    inputs = {"code": "".join(code.values()), "generation": 0, "role": {"epochs": 3, "lr": 0.1}, **inputs}
    Ledger(store).record_entry("train", inputs, {"model": f"{key}/model.json"}, 1.0)


def note(store, key):
    write_stage_note(store, "run", 0, "train", {"model": f"{key}/model.json"}, 1.0, reused=False)


def test_first_work_has_nothing_to_compare_with(store, monkeypatch):
    train(store, monkeypatch, "a")
    note(store, "a")
    explanation = explain_stage(store, "run", 0, "train")
    assert (explanation.nearest, explanation.changes) == (None, [])


def test_changed_setting_is_named(store, monkeypatch):
    train(store, monkeypatch, "a")
    train(store, monkeypatch, "far", role={"epochs": 9, "lr": 0.3})
    train(store, monkeypatch, "other", generation=1, role={"epochs": 5, "lr": 0.1})
    train(store, monkeypatch, "b", role={"epochs": 5, "lr": 0.1})
    note(store, "b")
    explanation = explain_stage(store, "run", 0, "train")
    assert explanation.nearest.outputs == {"model": "a/model.json"}
    assert explanation.changes == [InputChange("role.epochs", 3, 5)]


def test_changed_library_is_named(store, monkeypatch):
    train(store, monkeypatch, "a")
    train(store, monkeypatch, "b", {"ns": "aaaa", "torch": "2.15.0"})
    note(store, "b")
    assert explain_stage(store, "run", 0, "train").changes == [InputChange("code.torch", "2.14.1", "2.15.0")]


@pytest.mark.parametrize("stage", ["evaluate", "report"])
def test_unfinished_stage_is_refused_with_those_there_are(store, monkeypatch, stage):
    train(store, monkeypatch, "a")
    note(store, "a")
    with pytest.raises(RunError, match=rf"run run: gen-0 {stage}: has not finished here; there are gen-0 train"):
        explain_stage(store, "run", 0, stage)
