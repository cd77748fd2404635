"""Says why a stage was redone: what its inputs have that those of earlier finished work did not."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ns.core.errors import RunError
from ns.runs.records import find_stage_note, list_stage_notes
from ns.storage import Store
from ns.storage.ledger import Ledger, LedgerEntry

WORK_NAMES = {
    "train": "train",
    "evaluate": "evaluate",
    "select": "select",
    "gate": "generation",
}
"""Stage → name of its work in the ledger."""


class InputChange(NamedTuple):
    """An input that differs from the one of earlier work."""

    field: str
    before: Any
    now: Any


class StageExplanation(NamedTuple):
    """Why a stage did its work."""

    entry: LedgerEntry
    nearest: LedgerEntry | None
    """Earlier work of this kind whose inputs differ least; None if there was none."""
    changes: list[InputChange]


def explain_stage(root: Store, run: str, generation: int, stage: str) -> StageExplanation:
    """Compares a finished stage's inputs with those of all earlier work of its kind. Raises RunError if the run has no such stage."""
    note = find_stage_note(root, run, generation, stage) if stage in WORK_NAMES else None
    if note is None:
        stages = sorted(
            {f"gen-{other.generation} {other.stage}" for other in list_stage_notes(root, run) if other.stage in WORK_NAMES}
        )
        raise RunError(
            f"run {run}: gen-{generation} {stage}: has not finished here; there are {', '.join(stages) or 'none yet'}"
        )
    entries = Ledger(root).list_entries(WORK_NAMES[stage])
    outputs = set(note.outputs.values())
    entry = next((entry for entry in reversed(entries) if outputs & set(entry.outputs.values())), None)
    if entry is None:
        raise RunError(
            f"run {run}: gen-{generation} {stage}: its entry in the ledger is gone; the next run does the work again"
        )
    # Entries are in order of time; of equally similar ones the latest counts.
    earlier = [other for other in entries[: entries.index(entry)] if _is_same_task(other, entry)]
    if not earlier:
        return StageExplanation(entry, None, [])
    nearest = min(reversed(earlier), key=lambda other: len(compare_inputs(other, entry)))
    return StageExplanation(entry, nearest, compare_inputs(nearest, entry))


def _is_same_task(before: LedgerEntry, now: LedgerEntry) -> bool:
    return bool(before.inputs.get("generation") == now.inputs.get("generation"))


def compare_inputs(before: LedgerEntry, now: LedgerEntry) -> list[InputChange]:
    """The inputs that differ, by field. Changed code is named by its parts where both entries have them."""
    old, new = dict(_iterate_fields(before.inputs)), dict(_iterate_fields(now.inputs))
    if old.get("code") != new.get("code") and before.code and now.code:
        old, new = (
            {name: value for name, value in fields.items() if name != "code"}
            | {f"code.{name}": value for name, value in code.items()}
            for fields, code in ((old, before.code), (new, now.code))
        )
    fields = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [InputChange(name, old.get(name), new.get(name)) for name in fields]


def _iterate_fields(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields dotted names and values of the leaves."""
    if isinstance(value, Mapping) and value:
        for name, part in value.items():
            yield from _iterate_fields(part, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, value
