"""Traces an image: what each teacher said of it, which label sets and runs it is in, and which models have seen it."""

from collections.abc import Collection, Iterator
from typing import TypeVar

from ns.core import log
from ns.core.errors import DataError, StoreError
from ns.data.index import ImageLocation, locate_keys
from ns.data.key_list import spell_key
from ns.data.prepared import DataPart, PreparedData, PreparedDataset
from ns.labeling.alignment import align_rows
from ns.labeling.label_set import LabelRows, LabelSet, read_label_rows
from ns.labeling.selection import CopyReader, Selection
from ns.modeling.manifest import ModelManifest
from ns.runs.lookup import RunLabelSet, find_prepared_data, list_runs, open_run_label_set
from ns.runs.records import find_stage_note, list_stage_notes
from ns.storage import Store, parent_key
from ns.storage.documents import JsonDocument

DocumentType = TypeVar("DocumentType", bound=JsonDocument)


class TeacherAnswer(JsonDocument):
    """What one teacher said of an image, and how its student used it."""

    run: str
    generation: int
    label_set: str
    """Digest of the label set."""
    teacher: str | None
    """Key of the teacher's folder."""
    probabilities: dict[str, float]
    """Class → probability, the most probable first, as far as they are kept; empty if there is no label."""
    reason: str | None
    """Why there is no label."""
    threshold: float | None
    """Threshold of the most probable class."""
    times_per_epoch: int
    """How often the student sees the image in an epoch."""
    student: str | None
    """Key of the folder of the model that was trained on the label set; None if there is none yet."""


class ImageTrace(JsonDocument):
    key: str
    locations: dict[DataPart, str]
    """Part of the data → `dataset digest/shard/row`, in all datasets that hold the key."""
    answers: tuple[TeacherAnswer, ...]
    models: tuple[str, ...]
    """Digests of all models that have seen the image: labeled, pseudo-labeled, or through the labels of a teacher that has seen it."""


def trace_image(root: Store, key: str) -> ImageTrace:
    """Looks for an image in all runs below a root, by its key or the path of its file. Raises DataError if no run has it."""
    spellings = spell_key(key)
    locator = _KeyLocator(root, spellings)
    location_names: dict[DataPart, str] = {}
    answers: list[TeacherAnswer] = []
    for prepared in _iterate_prepared(root):
        for part, source in prepared.parts.items():
            if location := locator.locate_first(source):
                location_names[part] = f"{source.digest}/{location.shard}/{location.row}"
    for record in list_runs(root):
        run_data = find_prepared_data(root, record.run)
        if run_data and (location := locator.locate_first(run_data.pool)):
            answers += [
                _describe_answer(root, record.run, generation, run_label_set, location)
                for generation, run_label_set in _iterate_label_sets(root, record.run)
            ]
    if not location_names:
        raise DataError(f"{key}: no dataset of a run below {root.uri} has this key")
    models = tuple(sorted(find_exposed_models(root, spellings)))
    return ImageTrace(key=key, locations=location_names, answers=tuple(answers), models=models)


def find_exposed_models(root: Store, keys: Collection[str]) -> dict[str, str]:
    """Digest of each model that has seen any of the images → key of its folder.

    These are the models that trained on one of the images, labeled or pseudo-labeled, and, over any number of generations, the
    models that learned from such a model as their teacher, as one of several teachers, or as their initial weights. Data and selections
    count that no run names any more, as after an image was taken out of a folder and the run repeated: their models are still there.
    """
    manifests = {
        parent_key(key): ModelManifest.load_file(root, key)
        for key in root.list("store/models/")
        if key.endswith(f"/{ModelManifest.filename}")
    }
    locator = _KeyLocator(root, keys)
    exposed_sources: set[str | None] = set()
    """Digests of labeled datasets and selections that hold one of the images."""
    ensembles: dict[str | None, tuple[str, ...]] = {}
    """Digest of a label set → digests of the models that labeled it together with the teacher."""
    in_pools: dict[str, dict[str, ImageLocation]] = {}
    for prepared in _iterate_prepared(root):
        if locations := locator.locate_in(prepared.pool):
            in_pools[prepared.pool.digest] = locations
        if locator.locate_in(prepared.labeled):
            exposed_sources.add(prepared.labeled.digest)
    for selection in _iterate_documents(root, Selection, "store/selections/"):
        label_store = root.at(selection.label_set_key)
        label_set = LabelSet.find_file(label_store, LabelSet.filename)
        if label_set is None:
            # It was deleted, and can be asked no more.
            continue
        ensembles[label_set.digest] = label_set.ensemble
        run_label_set = RunLabelSet(label_store, label_set, selection)
        if any(_read_label(run_label_set, location)[1] for location in in_pools.get(label_set.dataset, {}).values()):
            exposed_sources.add(selection.digest)
    exposed = {
        key for key, manifest in manifests.items() if {manifest.lineage.labeled, manifest.lineage.selection} & exposed_sources
    }
    while True:
        digests = {manifests[key].digest for key in exposed}
        weights = {manifests[key].weights_sha256 for key in exposed}
        learners = {
            key
            for key, manifest in manifests.items()
            if not digests.isdisjoint((manifest.lineage.teacher, *ensembles.get(manifest.lineage.label_set, ())))
            or manifest.lineage.init in weights
        }
        if learners <= exposed:
            return {manifests[key].digest: key for key in sorted(exposed)}
        exposed |= learners


class _KeyLocator:
    """Finds keys in datasets, and reads the index of each dataset once."""

    def __init__(self, root: Store, keys: Collection[str]) -> None:
        self._root, self._keys = root, keys
        self._locations: dict[str, dict[str, ImageLocation]] = {}

    def locate_in(self, source: PreparedDataset) -> dict[str, ImageLocation]:
        """The keys that a dataset has; none, with a warning, if it cannot be read any more, as one outside the root."""
        if source.digest not in self._locations:
            try:
                self._locations[source.digest] = locate_keys(*source.open_dataset(self._root), self._keys)
            except (DataError, StoreError) as error:
                log.get_logger().warning("not looked into; models that have seen it may be missing", reason=str(error))
                return {}
        return self._locations[source.digest]

    def locate_first(self, source: PreparedDataset) -> ImageLocation | None:
        locations = self.locate_in(source)
        return next((locations[key] for key in self._keys if key in locations), None)


def _iterate_prepared(root: Store) -> Iterator[PreparedData]:
    """All data that was ever prepared for a run."""
    return _iterate_documents(root, PreparedData, "store/prepared/")


def _iterate_documents(root: Store, kind: type[DocumentType], prefix: str) -> Iterator[DocumentType]:
    """All documents of a kind below a prefix."""
    return kind.iterate_files(root, [key for key in root.list(prefix) if key.endswith(f"/{kind.filename}")])


def _iterate_label_sets(root: Store, run: str) -> Iterator[tuple[int, RunLabelSet]]:
    for note in list_stage_notes(root, run, "select"):
        yield note.generation, open_run_label_set(root, run, note.generation)


def _read_label(run_label_set: RunLabelSet, location: ImageLocation) -> tuple[LabelRows, int]:
    """The label rows of an image's shard as its student learns them, and how often the student sees the image in an epoch."""
    assert run_label_set.selection is not None
    rows = read_label_rows(run_label_set.store, run_label_set.label_set.shards[location.shard])
    copies = CopyReader(run_label_set.store, run_label_set.selection).count_shard_copies(location.shard, rows)
    return align_rows(rows, run_label_set.selection.alignment), int(copies[location.row])


def _describe_answer(
    root: Store, run: str, generation: int, run_label_set: RunLabelSet, location: ImageLocation
) -> TeacherAnswer:
    rows, times_per_epoch = _read_label(run_label_set, location)
    class_names = run_label_set.label_set.classes
    is_labeled = bool(rows.readable[location.row])
    probabilities = {
        class_names[class_id]: round(float(probability), 4)
        for class_id, probability in zip(rows.top_class[location.row], rows.top_prob[location.row], strict=True)
        if is_labeled and probability > 0
    }
    student_note = find_stage_note(root, run, generation, "train")
    assert run_label_set.selection is not None
    rules = run_label_set.selection.rules
    return TeacherAnswer(
        run=run,
        generation=generation,
        label_set=run_label_set.label_set.digest,
        teacher=run_label_set.teacher,
        probabilities=probabilities,
        reason=None if is_labeled else rows.reasons[location.row],
        threshold=rules[int(rows.top_class[location.row, 0])].threshold if is_labeled else None,
        times_per_epoch=times_per_epoch,
        student=parent_key(student_note.outputs["model"]) if student_note else None,
    )
