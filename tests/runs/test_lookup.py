"""What is found by a name."""

import pytest

from ns.config.loader import load_with_overrides
from ns.modeling.manifest import ModelManifest
from ns.runs.lifecycle import open_run
from ns.runs.lookup import (
    find_accepted_student,
    list_runs,
    resolve_run_name,
    resolve_verdict,
)
from ns.runs.records import record_key, write_stage_note
from ns.storage import LocalStore


def test_find_accepted_student_ignores_repeated_runs(finished_run, tmp_path):
    source, ref = finished_run
    verdict = resolve_verdict(source, ref.run)[1]
    experiment = load_with_overrides("quickstart")
    store = LocalStore(tmp_path)
    for name, students in (("a", ["1"]), ("b", ["1", "2"]), ("a-again", ["1"])):
        open_run(store, name, experiment, "test")
        teacher = verdict.teacher
        for generation, student in enumerate(students, 1):
            key = f"store/verdicts/{name}-{student}/verdict.json"
            fields = {"teacher": teacher, "student": student, "generation": generation}
            verdict.model_copy(update=fields).save_file(store, key)
            teacher = student
            store.put(f"{student}/{ModelManifest.filename}", b"{}")
            write_stage_note(store, name, generation, "gate", {"verdict": key}, 0, reused=False)
    assert find_accepted_student(store, experiment.name) == ("b", 2, "2")
    assert find_accepted_student(store, "another") is None
    store.delete(f"2/{ModelManifest.filename}")
    assert find_accepted_student(store, experiment.name) == ("a", 1, "1")


@pytest.mark.parametrize("content", [b"", b'{"run": "two"}', b"not json"])
def test_one_bad_record_hides_no_other_run(tmp_path, content):
    store, experiment = LocalStore(tmp_path), load_with_overrides("quickstart")
    for name in ("one", "two"):
        open_run(store, name, experiment, "test")
    store.put(record_key("two"), content)
    assert [record.run for record in list_runs(store)] == ["one"]
    assert resolve_run_name(store) == "one"
    # It can be begun again.
    open_run(store, "two", experiment, "test")
    assert resolve_run_name(store, "two") == "two"


def test_run_that_is_named_is_read_without_the_others(tmp_path, monkeypatch):
    store, experiment = LocalStore(tmp_path), load_with_overrides("quickstart")
    open_run(store, "one", experiment, "test")
    monkeypatch.setattr("ns.runs.lookup.list_runs", lambda root: pytest.fail("all records were read"))
    assert resolve_run_name(store, "one") == "one"
