"""The pipeline of one generation, twice: the second run continues from the student that the first accepted."""

import pytest

from ns.evaluation.gate import Verdict
from ns.runs.lookup import resolve_run_name
from ns.runs.summary import RunSummary, summarize_run
from ns.storage import LocalStore
from pipelines import GENERATION_PACKAGE
from pipelines.runners import local

pytestmark = [pytest.mark.integration, pytest.mark.slow]

QUICK = [
    "teacher.train.epochs=30",
    "students.0.train.epochs=6",
    "students.0.train.unlabeled_ratio=1",
    "gate.min_gain=-1",
    "gate.max_churn=1",
    "labeling.tasks=1",
]


def test_recurring_run_builds_on_the_accepted_student(tmp_path):
    store = LocalStore(tmp_path / "root")

    def run_once() -> RunSummary:
        local.run_locally(
            config_uri="quickstart",
            root=store.uri,
            run="",
            log=tmp_path / "pipeline.log",
            on_event=lambda event: None,
            package=GENERATION_PACKAGE,
            overrides=QUICK,
        )
        return summarize_run(store, resolve_run_name(store))

    first, second = run_once(), run_once()
    assert first.run.startswith("quickstart-gen-1-")
    assert second.run.startswith("quickstart-gen-2-")
    (student,), (grandchild,) = first.generations, second.generations
    assert (student.generation, student.verdict) == (1, "promoted")
    assert grandchild.generation == 2
    assert grandchild.teacher_top1 == second.teacher_top1 == student.student_top1
    assert store.exists(f"{second.run}/report.html")
    # The labels before are those of another run.
    (gate,) = [note for note in second.stages if note.stage == "gate"]
    verdict = Verdict.load_file(store, gate.outputs["verdict"])
    assert verdict.teacher == student.model
    assert "churn" in {condition.name for condition in verdict.conditions}
