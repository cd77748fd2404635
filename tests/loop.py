"""The whole loop in one process, on a few digits, for tests of what stages leave behind."""

from ns.config.loader import load_with_overrides
from ns.config.schema import MAX_GENERATIONS
from ns.labeling.label_set import read_label_rows
from ns.labeling.selection import count_copies
from ns.runs.lifecycle import derive_run_name, open_run
from ns.runs.lookup import open_run_label_set
from ns.stages.context import STOP, RunRef
from ns.stages.gate import resolve_teacher
from ns.stages.label import label_shards, split_pool
from ns.stages.prepare import prepare_data
from ns.stages.roles import provide_student, provide_teacher
from ns.stages.select import commit_labels
from ns.storage import LocalStore

TINY = [
    "generations=1",
    "teacher.train.epochs=30",
    "students.0.train.epochs=6",
    "students.0.train.unlabeled_ratio=1",
    "gate.min_gain=-1",
]


def open_tiny_run(store: LocalStore, *overrides: str) -> RunRef:
    """Opens a run of the quickstart that takes seconds."""
    experiment = load_with_overrides("quickstart", [*TINY, *overrides])
    run = derive_run_name(experiment)
    open_run(store, run, experiment, "test")
    return RunRef(f"{store.uri}/{run}/config.yaml", store.uri, run)


def label_pool(ref: RunRef, *, data: str, generation: int, teacher: str) -> str:
    """Labels and selects. Returns the key of the selection."""
    for shards in split_pool(ref, data=data):
        label_shards(ref, data=data, generation=generation, teacher=teacher, shards=shards)
    return commit_labels(ref, data=data, generation=generation, teacher=teacher)


def run_generation(ref: RunRef, *, data: str, generation: int, teacher: str) -> None:
    """One generation, from a teacher that is there."""
    selection = label_pool(ref, data=data, generation=generation, teacher=teacher)
    provide_student(ref, data=data, generation=generation, teacher=teacher, selection=selection)


def find_pool_key(store: LocalStore, run: str, wanted: bool = True) -> str:
    """A key of the pool that the first student saw, or that it did not see."""
    labels = open_run_label_set(store, run, 1)
    for shard in labels.label_set.shards:
        rows = read_label_rows(labels.store, shard)
        for key, times in zip(rows.keys, count_copies(labels.selection, rows).tolist(), strict=True):
            if bool(times) == wanted:
                return key
    raise AssertionError("none")


def run_loop(ref: RunRef) -> None:
    """Everything but the report."""
    data = prepare_data(ref)
    first = provide_teacher(ref, data=data)
    run_generation(ref, data=data, generation=1, teacher=first)
    for generation in range(2, MAX_GENERATIONS + 1):
        teacher = resolve_teacher(ref, data=data, generation=generation, first_teacher=first)
        if teacher == STOP:
            return
        run_generation(ref, data=data, generation=generation, teacher=teacher)
