"""Why was this redone? What the result of each piece of work depends on: the inputs that the ledger digests, and the keys made of them.

Inputs hold digests and plain values, never URIs: data that was moved is still the same data. What decides only how fast the work is
done stays out.
"""

from typing import Any

from ns.config.schema import Experiment, LabelingConfig, RoleConfig
from ns.core.digest import FOREIGN_SOURCES, LABELING_SOURCES, TEMPERATURE_SOURCES, TRAINING_SOURCES, digest_code, digest_json
from ns.data.key_list import read_keys
from ns.data.prepared import PreparedData
from ns.labeling.label_set import LabelSet
from ns.labeling.selection import Selection
from ns.modeling.manifest import ModelManifest
from ns.modeling.pretrained import digest_pretrained
from ns.runs.records import list_stage_notes
from ns.stages.context import StageContext
from ns.storage import Store, open_store
from ns.storage.documents import dump_hashed_fields


def generation_inputs(context: StageContext, data: str, generation: int, teacher: str) -> dict[str, Any]:
    """What the verdict on a generation depends on: teacher, data and settings."""
    experiment = context.experiment
    measures_robustness = bool(experiment.gate.required_suites)
    return {
        "code": digest_code(*TRAINING_SOURCES, *LABELING_SOURCES, *FOREIGN_SOURCES, "evaluation", "labeling/thresholds.py"),
        "data": PreparedData.load_file(context.root, data).digest,
        "generation": generation,
        "teacher": read_model_digest(context.root, teacher),
        "student": role_inputs(experiment.get_student(generation), context.root),
        "seed": experiment.seed,
        "labeling": _dump_labeling(context) | {"ensemble": ensemble_digests(context)},
        "imported": imported[1].digest if (imported := open_imported_labels(context)) else None,
        "exclude": digest_json(sorted(excluded_keys(context))),
        "selection": dump_hashed_fields(experiment.selection),
        "choosing": choosing.digest if (choosing := find_choosing_selection(context, generation)) else None,
        "gate": dump_hashed_fields(experiment.gate),
        "robustness": measures_robustness and dump_hashed_fields(experiment.gate_evaluation, {"sets", "keep_gib"}),
    }


def label_set_key(context: StageContext, prepared: PreparedData, teacher: str) -> str:
    """Folder of a teacher's labels for the pool. All runs share it: a shard that is there is done."""
    inputs = labeling_inputs(context, prepared, teacher) | {
        "dataset": prepared.pool.digest,
        "left_out": prepared.left_out.report_digest if prepared.left_out else None,
        "exclude": digest_json(sorted(excluded_keys(context))),
    }
    return context.ledger.derive_key("labels", "label", inputs)


def labeling_inputs(context: StageContext, prepared: PreparedData, teacher: str) -> dict[str, Any]:
    """What the label of an image depends on, apart from the image."""
    labeling = context.experiment.labeling
    if imported := open_imported_labels(context):
        return {"imported": imported[1].digest}
    return {
        "code": digest_code(*_list_labeling_sources(labeling)),
        "teacher": read_model_digest(context.root, teacher),
        **_dump_labeling(context),
        "ensemble": ensemble_digests(context),
        # What foreign scores of the pool measure the distance to.
        "compared_with": prepared.labeled.digest if labeling.foreign_score == "distance" else None,
        "fitted_on": prepared.calibration.digest if prepared.calibration and labeling.temperature == "fitted" else None,
    }


def _dump_labeling(context: StageContext) -> dict[str, Any]:
    return dump_hashed_fields(context.experiment.labeling, exclude={"tasks", "label_set"})


def open_imported_labels(context: StageContext) -> tuple[Store, LabelSet] | None:
    """The label set of `labeling.label_set` and its store, in the generation that it serves; else None."""
    uri = context.experiment.labeling.label_set
    if uri is None or context.generation != 1:
        return None
    store = open_store(uri)
    return store, LabelSet.load(store)


def _list_labeling_sources(labeling: LabelingConfig) -> tuple[str, ...]:
    """The code that makes labels: also what finds the labeler's temperature, and what foreign images are told by."""
    return (
        *LABELING_SOURCES,
        *(TEMPERATURE_SOURCES if labeling.temperature == "fitted" else ()),
        *(FOREIGN_SOURCES if labeling.foreign_score != "none" else ()),
    )


def ensemble_digests(context: StageContext) -> tuple[str, ...]:
    """Digests of the models that label with the teacher."""
    return tuple(ModelManifest.load(open_store(uri)).digest for uri in context.experiment.labeling.ensemble)


def find_choosing_selection(context: StageContext, generation: int) -> Selection | None:
    """The run's first selection, if it chooses the images of a later generation; else None."""
    if context.experiment.selection.images_from == "each":
        return None
    notes = list_stage_notes(context.root, context.run, "select")
    first = min((note for note in notes if note.generation < generation), key=lambda note: note.generation, default=None)
    return Selection.load_file(context.root, first.outputs["selection"]) if first else None


def excluded_keys(context: StageContext) -> frozenset[str]:
    """Keys of the images of the pool that `data.exclude` lists."""
    uri = context.experiment.data.exclude
    return read_keys(uri).spellings if uri else frozenset()


def training_inputs(
    experiment: Experiment,
    generation: int,
    root: Store,
    *,
    labeled: str,
    pool: str | None,
    selection: str | None,
    teacher: str | None,
) -> dict[str, Any]:
    """What a trained model depends on. Datasets, selection and teacher are given by their digests. `root`: where fetched weights are."""
    return {
        "code": digest_code(*TRAINING_SOURCES),
        "role": role_inputs(experiment.get_student(generation) if generation else experiment.teacher, root),
        "seed": training_seed(experiment, generation),
        "generation": generation,
        "labeled": labeled,
        "pool": pool,
        "selection": selection,
        "teacher": teacher,
    }


def role_inputs(role: RoleConfig, root: Store) -> dict[str, Any]:
    """The settings of a role that change the model, with the digest of the weights that it starts from."""
    speed_fields = {"checkpoint_seconds", "checkpoints_kept", "loader_workers", "processes", "tensorboard"}
    fields = dump_hashed_fields(role, exclude={"preset": True, "model": {"pretrained"}, "train": speed_fields | {"init"}})
    init: str = role.train.init
    if init != "teacher" and role.model.pretrained:
        init = digest_pretrained(role.model.pretrained, root)
    return fields | {"init": init}


def training_seed(experiment: Experiment, generation: int) -> int:
    """The seed of a training: weights, order and noise of each generation are drawn independently."""
    return experiment.seed * 64 + generation


def read_model_digest(root: Store, model: str) -> str:
    return ModelManifest.load(root.at(model)).digest


def read_labeled_classes(root: Store, data: str) -> tuple[str, ...]:
    return PreparedData.load_file(root, data).labeled.open_dataset(root)[1].classes
