"""Joins the labeled shards into a label set, and selects from it what the student will see."""

from collections.abc import Mapping

from ns.core.digest import LABELING_SOURCES, digest_code
from ns.core.errors import DataError
from ns.data.dataset import Dataset
from ns.data.leakage import count_class_images
from ns.data.prepared import PreparedData
from ns.evaluation.result import Evaluation
from ns.labeling.foreign import find_foreign_limit
from ns.labeling.label_set import LabelSet, join_label_shards
from ns.labeling.selection import Selection, keep_selection, make_selection
from ns.modeling.manifest import ModelManifest
from ns.reporting import run_metrics
from ns.runs.lookup import compute_policy_thresholds
from ns.stages.context import RunRef, StageContext, stage
from ns.stages.evaluate import evaluate_calibration, resolve_labeling_temperature
from ns.stages.foreign import prepare_foreign_reference
from ns.stages.keys import ensemble_digests, find_choosing_selection, label_set_key, open_imported_labels, read_model_digest
from ns.storage import Store, parent_key
from ns.storage.documents import dump_hashed_fields

SELECTION_SOURCES = ("labeling/selection.py", "labeling/label_set.py", "labeling/thresholds.py", "labeling/alignment.py")


def commit_labels(ref: RunRef, *, data: str, generation: int, teacher: str) -> str:
    """Writes the label set and the selection, and a version of both if there is a registry.

    Returns the key of the selection's folder. Raises DataError if no image is selected.
    """
    with stage("select", ref, generation, teacher=teacher, linger=True) as context:
        root, experiment = context.root, context.experiment
        prepared = PreparedData.load_file(root, data)
        _, pool = prepared.pool.open_dataset(root)
        key = label_set_key(context, prepared, teacher)
        label_store = root.at(key)
        label_set = _join_labels(context, prepared, teacher, label_store, pool)
        label_set.save(label_store)
        is_imported = open_imported_labels(context) is not None
        calibration_key = None if is_imported else evaluate_calibration(context, prepared, teacher)
        calibration = Evaluation.load_file(root, calibration_key) if calibration_key else None
        thresholds = None
        if calibration_key and calibration and experiment.selection.precision is not None:
            thresholds = compute_policy_thresholds(root.at(parent_key(calibration_key)), calibration, experiment.selection)
        first = find_choosing_selection(context, generation)
        foreign_limit = None
        if reference := prepare_foreign_reference(context, prepared, teacher):
            foreign_limit = find_foreign_limit(root.at(parent_key(reference)), experiment.selection.foreign_quantile)
        inputs = {
            "code": digest_code(*SELECTION_SOURCES),
            "policy": dump_hashed_fields(experiment.selection),
            "seed": experiment.seed,
            "label_set": label_set.digest,
            "labeled": prepared.labeled.digest,
            "choosing": first.digest if first else None,
            "calibration": calibration.digest if calibration else None,
            "foreign_limit": foreign_limit,
        }
        selection_key = context.ledger.derive_key("selections", "select", inputs)

        def write_selection() -> Mapping[str, str]:
            if first:
                selection = keep_selection(first, label_store, label_set, experiment.selection, label_set_key=key)
            else:
                selection = make_selection(
                    label_store,
                    label_set,
                    experiment.selection,
                    seed=experiment.seed,
                    label_set_key=key,
                    thresholds=thresholds,
                    labeled_images=tuple(count_class_images(*prepared.labeled.open_dataset(root)).values()),
                    foreign_limit=foreign_limit,
                )
            if selection.kept == 0:
                precision_hint = ", or selection.precision" if thresholds else ""
                raise DataError(
                    f"the teacher labeled no image with confidence above selection.min_confidence = "
                    f"{experiment.selection.min_confidence}{precision_hint}; lower it, or train a better teacher"
                )
            selection.save(root.at(selection_key))
            return {
                "label_set": f"{key}/{LabelSet.filename}",
                "selection": f"{selection_key}/{Selection.filename}",
                "teacher": f"{teacher}/{ModelManifest.filename}",
            } | {
                name: output_key
                for name, output_key in (("calibration", calibration_key), ("foreign", reference))
                if output_key
            }

        context.get_or_run("select", inputs, write_selection)
        selection = Selection.load(root.at(selection_key))
        context.add_log_fields(labeled=label_set.rows, kept=selection.kept, images=selection.images)
        if remarks := selection.describe_classes(label_set.classes):
            context.add_log_fields(classes="; ".join(remarks))
        if foreign_limit is not None:
            context.add_log_fields(foreign=selection.foreign)
        if label_set.temperature != 1:
            context.add_log_fields(temperature=label_set.temperature)
        run_metrics.publish_selection(root, ref.run, generation, selection, experiment.gate)
        if experiment.registry:
            from ns.labeling.registry import LabelRegistry, VersionTag

            tag = VersionTag.from_parts(experiment.name, ref.run, generation)
            registry = LabelRegistry(experiment.registry.git, experiment.registry.remote)
            registry.commit_version(tag, label_store, label_set, selection)
            context.add_log_fields(version=str(tag))
        return selection_key


def _join_labels(context: StageContext, prepared: PreparedData, teacher: str, label_store: Store, pool: Dataset) -> LabelSet:
    """The label set of the generation: its teacher's, or the one that was imported."""
    if imported := open_imported_labels(context):
        label_set = imported[1]
        return join_label_shards(
            label_store,
            pool,
            teacher=label_set.teacher,
            code=label_set.code,
            classes=label_set.classes,
            top_k=label_set.top_k,
            views=label_set.views,
            ensemble=label_set.ensemble,
            probabilities=label_set.probabilities,
            temperature=label_set.temperature,
        )
    labeling = context.experiment.labeling
    return join_label_shards(
        label_store,
        pool,
        teacher=read_model_digest(context.root, teacher),
        code=digest_code(*LABELING_SOURCES),
        classes=prepared.labeled.open_dataset(context.root)[1].classes,
        top_k=labeling.top_k,
        views=labeling.views,
        ensemble=ensemble_digests(context),
        probabilities=labeling.probabilities,
        temperature=resolve_labeling_temperature(context, prepared, teacher),
        foreign_score=labeling.foreign_score,
    )
