"""What became of an image: what every teacher said of it, which label sets and runs it was in, and which models have seen it."""

from collections.abc import Collection, Iterator, Mapping

from ns.core.errors import DataError
from ns.data.locate import Place, find
from ns.data.prepared import Part, Prepared
from ns.labeling.label_set import Rows, read_rows
from ns.labeling.selection import copies
from ns.modeling.manifest import MANIFEST as CARD
from ns.modeling.manifest import ModelCard
from ns.runs import records as runs
from ns.storage import Store
from ns.storage.documents import Document


class View(Document):
    """What one teacher said of an image, and what came of it."""

    run: str
    generation: int
    label_set: str
    """Digest."""
    teacher: str | None
    """Key of the model's folder."""
    classes: dict[str, float]
    """Class → probability, the most probable first, as far as they are kept; empty if there is no label."""
    reason: str | None
    """Why there is none."""
    threshold: float | None
    """Of the most probable class, then in force."""
    seen: int
    """Times in an epoch of the student."""
    student: str | None
    """Key of the model that was trained on it, if that was."""


class Trace(Document):
    key: str
    places: dict[Part, str]
    """Part of the data → `dataset digest/shard/row`, of all datasets that hold the key."""
    views: tuple[View, ...]
    models: tuple[str, ...]
    """Digests of all models that have seen the image: as a labelled one, as a pseudo-labelled one, or through the labels of a teacher
    that has."""


def trace(root: Store, key: str) -> Trace:
    """Looks for an image in all runs below a root. Raises DataError if none has it."""
    places: dict[Part, str] = {}
    views: list[View] = []
    found: dict[str, dict[str, Place]] = {}
    for run, prepared in _prepared(root):
        for part, source in prepared.parts.items():
            if source.dataset not in found:
                found[source.dataset] = find(*source.open(root), {key})
            if place := found[source.dataset].get(key):
                places[part] = f"{source.dataset}/{place.shard}/{place.row}"
        if place := found[prepared.pool.dataset].get(key):
            views += [_view(root, run, generation, labels, place) for generation, labels in _label_sets(root, run)]
    if not places:
        raise DataError(f"{key}: no dataset of a run below {root.uri} has this key")
    return Trace(key=key, places=places, views=tuple(views), models=tuple(sorted(models_that_saw(root, {key}))))


def models_that_saw(root: Store, keys: Collection[str]) -> dict[str, str]:
    """Digest of each model that has seen any of the images → key of its folder: of those that trained on one, labelled or
    pseudo-labelled, and of those that learned from them, as a teacher or beside one, by whatever many generations."""
    cards = {
        key.removesuffix(f"/{CARD}"): ModelCard.read(root, key)
        for key in root.list("store/models/")
        if key.endswith(f"/{CARD}")
    }
    found: dict[str, dict[str, Place]] = {}
    selected: dict[str, bool] = {}
    taught: dict[str, tuple[str, ...]] = {}  # label set → models that labelled it with the teacher
    for run, prepared in _prepared(root):
        if prepared.labelled.dataset not in found:
            found[prepared.labelled.dataset] = find(*prepared.labelled.open(root), keys)
        for _, labels in _label_sets(root, run):
            assert labels.selection is not None
            taught[labels.label_set.digest] = labels.label_set.ensemble
            if prepared.pool.dataset not in found:
                found[prepared.pool.dataset] = find(*prepared.pool.open(root), keys)
            if labels.selection.digest not in selected:
                places = found[prepared.pool.dataset]
                selected[labels.selection.digest] = any(_times(labels, _rows(labels, at), at) for at in places.values())
    seen = {
        folder
        for folder, card in cards.items()
        if found.get(card.lineage.labelled) or selected.get(card.lineage.selection or "")
    }
    while True:
        digests = {cards[folder].digest for folder in seen}
        started = {cards[folder].weights_sha256 for folder in seen}
        more = {
            folder
            for folder, card in cards.items()
            if folder not in seen
            and (
                not digests.isdisjoint((card.lineage.teacher, *taught.get(card.lineage.label_set or "", ())))
                or card.lineage.init in started
            )
        }
        if not more:
            return {cards[folder].digest: folder for folder in sorted(seen)}
        seen |= more


def _prepared(root: Store) -> Iterator[tuple[str, Prepared]]:
    """All runs that have come so far, with their data."""
    for record in runs.listed(root):
        for note in runs.notes(root, record.run):
            if note.step == "prepare-data":
                yield record.run, Prepared.read(root, note.outputs["data"])


def _label_sets(root: Store, run: str) -> Iterator[tuple[int, runs.Labels]]:
    for note in runs.notes(root, run):
        if note.step == "commit-labels":
            yield note.generation, runs.generation_labels(root, run, note.generation)


def _rows(labels: runs.Labels, place: Place) -> Rows:
    return read_rows(labels.folder, labels.label_set.shards[place.shard])


def _times(labels: runs.Labels, rows: Rows, place: Place) -> int:
    assert labels.selection is not None
    return int(copies(labels.selection, rows)[place.row])


def _view(root: Store, run: str, generation: int, labels: runs.Labels, place: Place) -> View:
    rows = _rows(labels, place)
    names = labels.label_set.classes
    has = bool(rows.readable[place.row])
    classes: Mapping[str, float] = {
        names[label]: round(float(probability), 4)
        for label, probability in zip(rows.top_class[place.row], rows.top_prob[place.row], strict=True)
        if has and probability > 0
    }
    students = [note for note in runs.notes(root, run) if (note.generation, note.step) == (generation, "train")]
    rules = labels.selection.rules if labels.selection else ()
    return View(
        run=run,
        generation=generation,
        label_set=labels.label_set.digest,
        teacher=labels.teacher,
        classes=dict(classes),
        reason=None if has else rows.reasons[place.row],
        threshold=rules[int(rows.top_class[place.row, 0])].threshold if has and rules else None,
        seen=_times(labels, rows, place),
        student=students[0].outputs["model"].rpartition("/")[0] if students else None,
    )
