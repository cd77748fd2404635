"""What became of an image: what every teacher said of it, which label sets and runs it was in, and which models have seen it."""

from collections.abc import Collection, Iterator, Mapping

from ns.core.errors import DataError
from ns.data.index import ImageLocation, locate_keys
from ns.data.prepared import DataPart, PreparedData
from ns.labeling.label_set import LabelRows, read_label_rows
from ns.labeling.selection import count_copies
from ns.modeling.manifest import ModelManifest
from ns.runs.lookup import RunLabelSet, list_runs, open_run_label_set
from ns.runs.records import list_stage_notes
from ns.storage import Store
from ns.storage.documents import JsonDocument


class TeacherAnswer(JsonDocument):
    """What one teacher said of an image, and what came of it."""

    run: str
    generation: int
    label_set: str
    """Digest."""
    teacher: str | None
    """Key of the model's folder."""
    probabilities: dict[str, float]
    """Class → probability, the most probable first, as far as they are kept; empty if there is no label."""
    reason: str | None
    """Why there is none."""
    threshold: float | None
    """Of the most probable class, then in force."""
    times_per_epoch: int
    """Times in an epoch of the student."""
    student: str | None
    """Key of the model that was trained on it, if that was."""


class ImageTrace(JsonDocument):
    key: str
    locations: dict[DataPart, str]
    """Part of the data → `dataset digest/shard/row`, of all datasets that hold the key."""
    answers: tuple[TeacherAnswer, ...]
    models: tuple[str, ...]
    """Digests of all models that have seen the image: as a labeled one, as a pseudo-labeled one, or through the labels of a teacher
    that has."""


def trace_image(root: Store, key: str) -> ImageTrace:
    """Looks for an image in all runs below a root. Raises DataError if none has it."""
    location_names: dict[DataPart, str] = {}
    answers: list[TeacherAnswer] = []
    locations_by_dataset: dict[str, dict[str, ImageLocation]] = {}
    for run, prepared in _iterate_prepared(root):
        for part, source in prepared.parts.items():
            if source.digest not in locations_by_dataset:
                locations_by_dataset[source.digest] = locate_keys(*source.open_dataset(root), {key})
            if location := locations_by_dataset[source.digest].get(key):
                location_names[part] = f"{source.digest}/{location.shard}/{location.row}"
        if location := locations_by_dataset[prepared.pool.digest].get(key):
            answers += [
                _describe_answer(root, run, generation, run_label_set, location)
                for generation, run_label_set in _iterate_label_sets(root, run)
            ]
    if not location_names:
        raise DataError(f"{key}: no dataset of a run below {root.uri} has this key")
    return ImageTrace(
        key=key, locations=location_names, answers=tuple(answers), models=tuple(sorted(find_exposed_models(root, {key})))
    )


def find_exposed_models(root: Store, keys: Collection[str]) -> dict[str, str]:
    """Digest of each model that has seen any of the images → key of its folder: of those that trained on one, labeled or
    pseudo-labeled, and of those that learned from them, as a teacher or beside one, by whatever many generations."""
    manifests = {
        key.removesuffix(f"/{ModelManifest.filename}"): ModelManifest.load_file(root, key)
        for key in root.list("store/models/")
        if key.endswith(f"/{ModelManifest.filename}")
    }
    locations_by_dataset: dict[str, dict[str, ImageLocation]] = {}
    is_selected: dict[str, bool] = {}
    ensembles: dict[str, tuple[str, ...]] = {}  # label set → models that labeled it with the teacher
    for run, prepared in _iterate_prepared(root):
        if prepared.labeled.digest not in locations_by_dataset:
            locations_by_dataset[prepared.labeled.digest] = locate_keys(*prepared.labeled.open_dataset(root), keys)
        for _, run_label_set in _iterate_label_sets(root, run):
            assert run_label_set.selection is not None
            ensembles[run_label_set.label_set.digest] = run_label_set.label_set.ensemble
            if prepared.pool.digest not in locations_by_dataset:
                locations_by_dataset[prepared.pool.digest] = locate_keys(*prepared.pool.open_dataset(root), keys)
            if run_label_set.selection.digest not in is_selected:
                locations = locations_by_dataset[prepared.pool.digest]
                is_selected[run_label_set.selection.digest] = any(
                    _count_repeats(run_label_set, _read_label_rows(run_label_set, location), location)
                    for location in locations.values()
                )
    exposed = {
        model_key
        for model_key, manifest in manifests.items()
        if locations_by_dataset.get(manifest.lineage.labeled) or is_selected.get(manifest.lineage.selection or "")
    }
    while True:
        digests = {manifests[model_key].digest for model_key in exposed}
        exposed_weights = {manifests[model_key].weights_sha256 for model_key in exposed}
        learners = {
            model_key
            for model_key, manifest in manifests.items()
            if model_key not in exposed
            and (
                not digests.isdisjoint((manifest.lineage.teacher, *ensembles.get(manifest.lineage.label_set or "", ())))
                or manifest.lineage.init in exposed_weights
            )
        }
        if not learners:
            return {manifests[model_key].digest: model_key for model_key in sorted(exposed)}
        exposed |= learners


def _iterate_prepared(root: Store) -> Iterator[tuple[str, PreparedData]]:
    """All runs that have come so far, with their data."""
    for record in list_runs(root):
        for note in list_stage_notes(root, record.run):
            if note.stage == "prepare-data":
                yield record.run, PreparedData.load_file(root, note.outputs["data"])


def _iterate_label_sets(root: Store, run: str) -> Iterator[tuple[int, RunLabelSet]]:
    for note in list_stage_notes(root, run):
        if note.stage == "commit-labels":
            yield note.generation, open_run_label_set(root, run, note.generation)


def _read_label_rows(run_label_set: RunLabelSet, location: ImageLocation) -> LabelRows:
    return read_label_rows(run_label_set.store, run_label_set.label_set.shards[location.shard])


def _count_repeats(run_label_set: RunLabelSet, rows: LabelRows, location: ImageLocation) -> int:
    assert run_label_set.selection is not None
    return int(count_copies(run_label_set.selection, rows)[location.row])


def _describe_answer(
    root: Store, run: str, generation: int, run_label_set: RunLabelSet, location: ImageLocation
) -> TeacherAnswer:
    rows = _read_label_rows(run_label_set, location)
    class_names = run_label_set.label_set.classes
    is_labeled = bool(rows.readable[location.row])
    probabilities: Mapping[str, float] = {
        class_names[class_id]: round(float(probability), 4)
        for class_id, probability in zip(rows.top_class[location.row], rows.top_prob[location.row], strict=True)
        if is_labeled and probability > 0
    }
    students = [note for note in list_stage_notes(root, run) if (note.generation, note.stage) == (generation, "train")]
    rules = run_label_set.selection.rules if run_label_set.selection else ()
    return TeacherAnswer(
        run=run,
        generation=generation,
        label_set=run_label_set.label_set.digest,
        teacher=run_label_set.teacher,
        probabilities=dict(probabilities),
        reason=None if is_labeled else rows.reasons[location.row],
        threshold=rules[int(rows.top_class[location.row, 0])].threshold if is_labeled and rules else None,
        times_per_epoch=_count_repeats(run_label_set, rows, location),
        student=students[0].outputs["model"].rpartition("/")[0] if students else None,
    )
