"""Evaluates any model on any dataset of its classes, outside of a run.

OUT/MODEL-DATASET/…     evaluation.json, robustness.json, and the predictions that they were counted from
OUT/corrupted/          corrupted images, for the next model
"""

from typing import Any, NamedTuple

from ns.config.schema import EvaluationConfig
from ns.core.digest import (
    DISTORTION_SOURCES,
    EVALUATION_SOURCES,
    ROBUSTNESS_SOURCES,
    digest_code,
    digest_json,
    sha256_bytes,
    shorten_digest,
)
from ns.core.errors import DataError
from ns.data.dataset import Dataset
from ns.evaluation.accuracy import evaluate_accuracy
from ns.evaluation.multi_label import MultiLabels
from ns.evaluation.result import Evaluation, Robustness
from ns.evaluation.robustness import suite
from ns.evaluation.robustness.published import PublishedKind, digest_listing, measure_published_set
from ns.modeling.manifest import ModelManifest
from ns.modeling.predictor import Predictor
from ns.storage import Store, open_store, read_uri


class OfflineEvaluation(NamedTuple):
    evaluation: Evaluation | None
    """None for a published set, which has no clean images."""
    robustness: Robustness | None
    """None if only clean accuracy was measured."""
    uri: str
    """Folder that holds both."""


def evaluate_dataset(
    model_uri: str,
    dataset_uri: str,
    out_uri: str,
    config: EvaluationConfig,
    *,
    batch: int,
    classes: tuple[str, ...] | None = None,
    multi_label_uri: str | None = None,
) -> OfflineEvaluation:
    """Evaluates a model on a dataset; finished work in `out_uri` is not repeated. `config.images` limits clean accuracy too.

    `classes`: the class names that answers are chosen from; `("own",)` for those of the dataset. Raises DataError if there is no
    dataset, or its classes are not the model's.
    """
    data_store, model_store = open_store(dataset_uri), open_store(model_uri)
    if not data_store.exists(Dataset.filename):
        raise DataError(
            f"{data_store.uri}: no {Dataset.filename} here; import the images first: ns data import SOURCE {dataset_uri} --role evaluation"
        )
    data, manifest = Dataset.load(data_store), ModelManifest.load(model_store)
    scored = data.classes if classes == ("own",) else classes
    images = {"dataset": data.digest, "images": config.images, "seed": config.seed}
    out_store, results_store = open_store(out_uri), _open_results(out_uri, manifest, data.digest)
    inputs = {
        "code": digest_code(*EVALUATION_SOURCES),
        "model": manifest.digest,
        "scored_classes": scored,
        "multi_labels": sha256_bytes(read_uri(multi_label_uri)) if multi_label_uri else None,
        **images,
    }
    accuracy_store = results_store.at(_digest_inputs(inputs))
    num_images = min(data.samples, config.images or data.samples)
    if not accuracy_store.exists(Evaluation.filename):
        predictor = Predictor(model_store, batch=batch, images=num_images, scored_classes=scored)
        multi_labels = MultiLabels.load(multi_label_uri, manifest.classes) if multi_label_uri else None
        subsample = suite.build_subsample(config)
        evaluate_accuracy(predictor, data_store, data, accuracy_store, subsample=subsample, multi_labels=multi_labels)
    evaluation = Evaluation.load(accuracy_store)
    if not config.needs_robustness:
        return OfflineEvaluation(evaluation, None, results_store.uri)
    predictions_store = results_store.at(
        _digest_inputs({"code": digest_code(*ROBUSTNESS_SOURCES), "scored_classes": scored, **images})
    )
    target = predictions_store.at(_digest_inputs(suite.measurement_inputs(config)))
    if not target.exists(Robustness.filename):
        passes = suite.count_passes(config) * num_images
        predictor = Predictor(model_store, batch=batch, images=passes, scored_classes=scored)
        distorted_store = out_store.at(f"corrupted/{_digest_inputs({'code': digest_code(*DISTORTION_SOURCES), **images})}")
        suite.RobustnessSuite(
            predictor, data_store, data, config, predictions_store.at("units"), distorted_store if config.keep_gib else None
        ).run_suite(target)
    return OfflineEvaluation(evaluation, Robustness.load(target), results_store.uri)


def evaluate_published(
    model_uri: str, set_uri: str, kind: PublishedKind, out_uri: str, config: EvaluationConfig, *, batch: int
) -> OfflineEvaluation:
    """Evaluates a model on a published set of corrupted or perturbed images; finished work in `out_uri` is not repeated.

    Raises what `measure_published_set` raises.
    """
    set_store, model_store = open_store(set_uri), open_store(model_uri)
    set_digest = digest_listing(set_store)
    results_store = _open_results(out_uri, ModelManifest.load(model_store), set_digest)
    predictions_store = results_store.at(
        _digest_inputs({"code": digest_code(*ROBUSTNESS_SOURCES), "images": config.images, "seed": config.seed})
    )
    full_config = config.model_copy(update={"suites": ("corruptions", "perturbations")})
    target = predictions_store.at(_digest_inputs(suite.measurement_inputs(full_config)))
    if not target.exists(Robustness.filename):
        predictor = Predictor(model_store, batch=batch)
        name = set_store.uri.rstrip("/").rpartition("/")[2]
        measure_published_set(predictor, set_store, kind, name, set_digest, config, predictions_store.at("units"), target)
    return OfflineEvaluation(None, Robustness.load(target), results_store.uri)


def _open_results(out_uri: str, manifest: ModelManifest, dataset: str) -> Store:
    return open_store(out_uri).at(f"{shorten_digest(manifest.digest)}-{shorten_digest(dataset)}")


def _digest_inputs(inputs: dict[str, Any]) -> str:
    return shorten_digest(digest_json(inputs))
