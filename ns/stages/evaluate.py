"""Measures a model: its accuracy on held-out and further images, and what corruptions, perturbations and attacks leave of it."""

from collections.abc import Mapping
from typing import Any

from ns.core import telemetry
from ns.data.prepared import PreparedData
from ns.evaluation.measure import Measurement, ModelMeasurer
from ns.evaluation.result import Evaluation, Robustness
from ns.modeling.manifest import FINETUNED, ModelManifest
from ns.reporting import run_metrics
from ns.runs.records import BASELINE_EVALUATE
from ns.stages.context import RunRef, StageContext, stage
from ns.stages.foreign import prepare_foreign_reference
from ns.storage import Store, parent_key


def evaluate_generation(ref: RunRef, *, data: str, generation: int, model: str) -> str:
    """Evaluates a model on the held-out images and on everything else that the experiment asks for.

    The fine-tuned form of a model is evaluated on clean images only: the paper too measures corruptions without it (arXiv:1911.04252).
    Returns the key of the model's `evaluation.json`.
    """
    with stage("evaluate", ref, generation) as context:
        root, config = context.root, context.experiment.evaluation
        prepared = PreparedData.load_file(root, data)
        measurer = _make_measurer(context, model)
        measured = {"evaluation": measurer.measure_accuracy(prepared.heldout)}
        heldout = Evaluation.load_file(root, measured["evaluation"].key)
        # All else may take hours.
        telemetry.EVALUATED.labels("heldout").set(heldout.top1)
        telemetry.BALANCED_ACCURACY.labels("heldout").set(heldout.balanced_accuracy)
        if prepared.calibration:
            measured["calibration"] = measurer.measure_labeler(prepared.calibration, context.experiment.labeling)
        # The model may label the next generation.
        prepare_foreign_reference(context, prepared, model)
        if prepared.test:
            measured["test"] = measurer.measure_accuracy(prepared.test)
        finetuned = f"{model}/{FINETUNED}"
        if root.exists(f"{finetuned}/{ModelManifest.filename}"):
            finetuned_measurer = _make_measurer(context, finetuned)
            measured["finetuned"] = finetuned_measurer.measure_accuracy(prepared.heldout)
            if prepared.test:
                measured["finetuned_test"] = finetuned_measurer.measure_accuracy(prepared.test)
        for name, source in prepared.sets.items():
            options = config.sets[name]
            measured[f"set:{name}"] = measurer.measure_accuracy(
                source, classes=options.classes, multi_label_uri=options.multi_label
            )
        for name, options in config.sets.items():
            if options.kind != "images":
                measured[f"set:{name}"] = measurer.measure_published(options.uri, options.kind, name, config)
        if config.needs_robustness:
            measured["robustness"] = measurer.measure_robustness(prepared.reported_set, config)
        if context.experiment.gate.required_suites:
            measured["gate_robustness"] = measure_gate_robustness(context, prepared, model)
        outputs = {name: measurement.key for name, measurement in measured.items()}
        context.write_note(
            outputs,
            reused=all(measurement.reused for measurement in measured.values()),
            seconds=sum(measurement.seconds for measurement in measured.values()),
            **_summarize_evaluation(root, outputs),
        )
        run_metrics.publish_evaluation(root, ref.run, generation)
        return outputs["evaluation"]


def evaluate_baseline(ref: RunRef, *, data: str, generation: int, model: str) -> str:
    """Evaluates the baseline on the held-out, the test and the further images. Returns the key of its `evaluation.json`."""
    with stage(BASELINE_EVALUATE, ref, generation) as context:
        prepared, measurer = PreparedData.load_file(context.root, data), _make_measurer(context, model)
        measured = {"evaluation": measurer.measure_accuracy(prepared.heldout)}
        if prepared.test:
            measured["test"] = measurer.measure_accuracy(prepared.test)
        for name, source in prepared.sets.items():
            options = context.experiment.evaluation.sets[name]
            measured[f"set:{name}"] = measurer.measure_accuracy(
                source, classes=options.classes, multi_label_uri=options.multi_label
            )
        outputs = {name: measurement.key for name, measurement in measured.items()}
        context.write_note(
            outputs,
            reused=all(measurement.reused for measurement in measured.values()),
            seconds=sum(measurement.seconds for measurement in measured.values()),
            **_summarize_evaluation(context.root, outputs),
        )
        return outputs["evaluation"]


def evaluate_heldout(context: StageContext, data: str, model: str) -> tuple[Store, Evaluation]:
    """A model's evaluation on the held-out images, and the store that holds it."""
    heldout = PreparedData.load_file(context.root, data).heldout
    store = context.root.at(parent_key(_make_measurer(context, model).measure_accuracy(heldout).key))
    return store, Evaluation.load(store)


def evaluate_calibration(context: StageContext, prepared: PreparedData, teacher: str) -> str | None:
    """Key of the `evaluation.json` of what a teacher says, as it labels the pool, of the calibration images; None if there are none.

    The predictions beside it (`read_predictions`) are what thresholds are found on.
    """
    if prepared.calibration is None:
        return None
    return _make_measurer(context, teacher).measure_labeler(prepared.calibration, context.experiment.labeling).key


def resolve_labeling_temperature(context: StageContext, prepared: PreparedData, teacher: str) -> float:
    """The temperature that a teacher labels with, fitted on the calibration images if the experiment says so."""
    return _make_measurer(context, teacher).resolve_temperature(prepared.calibration, context.experiment.labeling)


def measure_gate_robustness(context: StageContext, prepared: PreparedData, model: str) -> Measurement:
    """What the gate asks of a model's robustness: on held-out images, never on those that are only reported."""
    experiment = context.experiment
    config = experiment.gate_evaluation if prepared.test else experiment.evaluation
    return _make_measurer(context, model).measure_robustness(prepared.heldout, config)


def _make_measurer(context: StageContext, model: str) -> ModelMeasurer:
    return ModelMeasurer(context.root, model, context.experiment.labeling.batch)


def _summarize_evaluation(root: Store, outputs: Mapping[str, str]) -> dict[str, Any]:
    """The numbers in the log line that announces an evaluation."""
    heldout = Evaluation.load_file(root, outputs["evaluation"])
    numbers: dict[str, Any] = {
        "top1": heldout.top1,
        "balanced_accuracy": heldout.balanced_accuracy,
        "images": heldout.images,
    }
    if never_predicted := heldout.describe_never_predicted():
        numbers["never_predicted"] = never_predicted
    for name in ("test", "finetuned"):
        if name in outputs:
            numbers[f"{name}_top1"] = Evaluation.load_file(root, outputs[name]).top1
    if "robustness" in outputs:
        robust = Robustness.load_file(root, outputs["robustness"])
        if errors := robust.mean_corruption_errors():
            numbers["corruption_error"] = sum(errors.values()) / len(errors)
        if robust.perturbations:
            flips = [item.flip_probability for item in robust.perturbations.values()]
            numbers["flip_probability"] = sum(flips) / len(flips)
        if robust.attacks:
            numbers["attacked_top1"] = min(item.top1 for item in robust.attacks)
    return numbers
