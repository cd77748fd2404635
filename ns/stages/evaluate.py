"""Measures a model: its accuracy on held-out and further images, and what corruptions, perturbations and attacks leave of it."""

from collections.abc import Mapping
from typing import Any

from ns.config.schema import EvaluationConfig, EvaluationSet
from ns.core import telemetry
from ns.core.digest import (
    DISTORTION_SOURCES,
    EVALUATION_SOURCES,
    ROBUSTNESS_SOURCES,
    digest_code,
    digest_json,
    sha256_bytes,
    shorten_digest,
)
from ns.data.prepared import PreparedData, PreparedDataset
from ns.evaluation.result import Evaluation, Robustness
from ns.modeling.manifest import FINETUNED, ModelManifest
from ns.reporting import run_metrics
from ns.stages.context import RunRef, StageContext, stage
from ns.stages.keys import read_model_digest
from ns.storage import Store, open_store, parent_key, read_uri
from ns.storage.ledger import LedgerEntry

Measured = tuple[LedgerEntry, bool]
"""The ledger's entry of a measurement, and whether it had been made before."""


def evaluate_generation(ref: RunRef, *, data: str, generation: int, model: str) -> str:
    """Evaluates a model on the held-out images and on everything else that the experiment asks for.

    The fine-tuned form of a model is evaluated on clean images only: the paper too measures corruptions without it (arXiv:1911.04252).
    Returns the key of the model's `evaluation.json`.
    """
    with stage("evaluate", ref, generation) as context:
        root, config = context.root, context.experiment.evaluation
        prepared = PreparedData.load_file(root, data)
        measured = {"evaluation": _measure_accuracy(context, prepared.heldout, model)}
        heldout = Evaluation.load_file(root, measured["evaluation"][0].outputs["evaluation"])
        # All else may take hours.
        telemetry.EVALUATED.labels("heldout").set(heldout.top1)
        telemetry.BALANCED_ACCURACY.labels("heldout").set(heldout.balanced_accuracy)
        if prepared.test:
            measured["test"] = _measure_accuracy(context, prepared.test, model)
        finetuned = f"{model}/{FINETUNED}"
        if root.exists(f"{finetuned}/{ModelManifest.filename}"):
            measured["finetuned"] = _measure_accuracy(context, prepared.heldout, finetuned)
            if prepared.test:
                measured["finetuned_test"] = _measure_accuracy(context, prepared.test, finetuned)
        for name, source in prepared.sets.items():
            measured[f"set:{name}"] = _measure_accuracy(context, source, model, config.sets[name])
        for name, set_config in config.sets.items():
            if set_config.kind != "images":
                measured[f"set:{name}"] = _measure_published_set(context, name, set_config, model)
        if config.needs_robustness:
            measured["robustness"] = _measure_robustness(context, prepared.reported_set, model, config)
        if context.experiment.gate.required_suites:
            measured["gate_robustness"] = measure_gate_robustness(context, prepared, model)
        outputs = {name: next(iter(entry.outputs.values())) for name, (entry, _) in measured.items()}
        context.write_note(
            outputs,
            reused=all(reused for _, reused in measured.values()),
            seconds=sum(entry.seconds for entry, _ in measured.values()),
            **_summarize_evaluation(root, outputs),
        )
        run_metrics.publish_evaluation(root, ref.run, generation)
        return outputs["evaluation"]


def evaluate_heldout(context: StageContext, data: str, model: str) -> tuple[Store, Evaluation]:
    """A model's evaluation on the held-out images, and the store that holds it."""
    entry, _ = _measure_accuracy(context, PreparedData.load_file(context.root, data).heldout, model)
    store = context.root.at(parent_key(entry.outputs["evaluation"]))
    return store, Evaluation.load(store)


def measure_gate_robustness(context: StageContext, prepared: PreparedData, model: str) -> Measured:
    """What the gate asks of a model's robustness: on held-out images, never on those that are only reported."""
    experiment = context.experiment
    config = experiment.gate_evaluation if prepared.test else experiment.evaluation
    return _measure_robustness(context, prepared.heldout, model, config)


def _measure_accuracy(
    context: StageContext, source: PreparedDataset, model: str, options: EvaluationSet | None = None
) -> Measured:
    """A model's accuracy on a dataset."""
    class_choice = options.classes if options else "all"
    multi_label_uri = options.multi_label if options else None
    inputs: dict[str, Any] = {
        "code": digest_code(*EVALUATION_SOURCES),
        "model": read_model_digest(context.root, model),
        "dataset": source.digest,
        "scored": class_choice,
        "multi_label": sha256_bytes(read_uri(multi_label_uri)) if multi_label_uri else None,
    }
    evaluation_key = context.derive_key("evaluations", "evaluate", inputs)

    def run_evaluation() -> Mapping[str, str]:
        from ns.evaluation.accuracy import evaluate_accuracy
        from ns.evaluation.multi_label import MultiLabels
        from ns.modeling.predictor import Predictor

        dataset_store, dataset = source.open_dataset(context.root)
        scored = None if class_choice == "all" else dataset.classes if class_choice == "own" else class_choice
        batch = context.experiment.labeling.batch
        predictor = Predictor(context.root.at(model), batch=batch, images=dataset.samples, scored_classes=scored)
        multi_labels = MultiLabels.load(multi_label_uri, predictor.manifest.classes) if multi_label_uri else None
        evaluate_accuracy(predictor, dataset_store, dataset, context.root.at(evaluation_key), multi_labels=multi_labels)
        return {"evaluation": f"{evaluation_key}/{Evaluation.filename}"}

    return context.ledger.get_or_run("evaluate", inputs, run_evaluation)


def _measure_robustness(context: StageContext, source: PreparedDataset, model: str, config: EvaluationConfig) -> Measured:
    """What corruptions, perturbations and attacks leave of a model's accuracy on a dataset."""
    from ns.evaluation.robustness import suite

    images = {"dataset": source.digest, "images": config.images, "seed": config.seed}
    predictions = {"code": digest_code(*ROBUSTNESS_SOURCES), "model": read_model_digest(context.root, model), **images}
    inputs = predictions | {"measured": suite.measurement_inputs(config)}
    robustness_key = context.derive_key("robustness", "robustness", inputs)

    def run_suite() -> Mapping[str, str]:
        from ns.modeling.predictor import Predictor

        dataset_store, dataset = source.open_dataset(context.root)
        passes = suite.count_passes(config) * min(dataset.samples, config.images or dataset.samples)
        predictor = Predictor(context.root.at(model), batch=context.experiment.labeling.batch, images=passes)
        corrupted = {"code": digest_code(*DISTORTION_SOURCES), **images}
        corrupted_store = context.root.at(f"store/corrupted/{shorten_digest(digest_json(corrupted))}")
        suite.RobustnessSuite(
            predictor,
            dataset_store,
            dataset,
            config,
            _open_unit_store(context, predictions),
            corrupted_store if config.keep_gib else None,
        ).run_suite(context.root.at(robustness_key))
        return {"robustness": f"{robustness_key}/{Robustness.filename}"}

    return context.ledger.get_or_run("robustness", inputs, run_suite)


def _measure_published_set(context: StageContext, name: str, set_config: EvaluationSet, model: str) -> Measured:
    """What a published set of corrupted or perturbed images leaves of a model's accuracy."""
    from ns.evaluation.robustness import published, suite

    assert set_config.kind != "images"
    kind, config, set_store = set_config.kind, context.experiment.evaluation, open_store(set_config.uri)
    dataset = published.digest_listing(set_store)
    images = {"dataset": dataset, "images": config.images, "seed": config.seed}
    predictions = {"code": digest_code(*ROBUSTNESS_SOURCES), "model": read_model_digest(context.root, model), **images}
    full_config = config.model_copy(update={"suites": ("corruptions", "perturbations")})
    inputs = predictions | {"kind": kind, "measured": suite.measurement_inputs(full_config)}
    robustness_key = context.derive_key("robustness", "published", inputs)

    def run_measurement() -> Mapping[str, str]:
        from ns.modeling.predictor import Predictor

        predictor = Predictor(context.root.at(model), batch=context.experiment.labeling.batch)
        target = context.root.at(robustness_key)
        units = _open_unit_store(context, predictions)
        published.measure_published_set(predictor, set_store, kind, name, dataset, config, units, target)
        return {"robustness": f"{robustness_key}/{Robustness.filename}"}

    return context.ledger.get_or_run("published", inputs, run_measurement)


def _open_unit_store(context: StageContext, predictions: Mapping[str, Any]) -> Store:
    """Where predictions are kept unit by unit, by what they depend on, so that a measurement goes on where another one ended."""
    return context.root.at(f"store/robustness/units/{shorten_digest(digest_json(predictions))}")


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
