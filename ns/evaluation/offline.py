"""Evaluation outside of a run: any model on any dataset of its classes.

OUT/MODEL-DATASET-…/    evaluation.json, robustness.json, and the predictions that they were counted from
OUT/corrupted/          corrupted images, for the next model
"""

from typing import NamedTuple

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
from ns.evaluation.robustness import published as readymade
from ns.evaluation.robustness import suite
from ns.modeling.manifest import ModelManifest
from ns.modeling.predictor import Predictor
from ns.storage import open_store, read_uri


class OfflineEvaluation(NamedTuple):
    evaluation: Evaluation | None
    """None of a ready-made set, which has no clean images."""
    robustness: Robustness | None
    """None if only clean accuracy was asked for."""
    uri: str
    """URI of the folder that holds both."""


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
    """Evaluates a model on a dataset, or goes on with it. `config.images` holds for clean accuracy too.

    `classes`: between which the answer is chosen; `("own",)` for those of the dataset. Raises DataError for a place without a dataset,
    and for images of other classes.
    """
    data_store, model_store = open_store(dataset_uri), open_store(model_uri)
    if not data_store.exists(Dataset.filename):
        raise DataError(
            f"{data_store.uri}: no {Dataset.filename} here; import the images first: ns data import SOURCE {dataset_uri} --role evaluation"
        )
    data, manifest = Dataset.load(data_store), ModelManifest.load(model_store)
    scored = data.classes if classes == ("own",) else classes
    images = {"dataset": data.digest, "images": config.images, "seed": config.seed}
    multi_label_sha256 = sha256_bytes(read_uri(multi_label_uri)) if multi_label_uri else None
    inputs = {
        "code": digest_code(*EVALUATION_SOURCES),
        "model": manifest.digest,
        "scored": scored,
        "several": multi_label_sha256,
        **images,
    }
    results_store = open_store(out_uri).at(f"{shorten_digest(manifest.digest)}-{shorten_digest(data.digest)}")
    accuracy_store = results_store.at(shorten_digest(digest_json(inputs)))
    num_images = min(data.samples, config.images or data.samples)
    if not accuracy_store.exists(Evaluation.filename):
        predictor = Predictor(model_store, batch=batch, images=num_images, scored_classes=scored)
        multi_labels = MultiLabels.load(multi_label_uri, manifest.classes) if multi_label_uri else None
        evaluate_accuracy(
            predictor, data_store, data, accuracy_store, subsample=suite.build_subsample(config), multi_labels=multi_labels
        )
    robustness = None
    if config.needs_robustness:
        predictions_store = results_store.at(
            shorten_digest(digest_json({"code": digest_code(*ROBUSTNESS_SOURCES), "scored": scored, **images}))
        )
        target = predictions_store.at(shorten_digest(digest_json(suite.measurement_inputs(config))))
        if not target.exists(Robustness.filename):
            predictor = Predictor(
                model_store, batch=batch, images=suite.count_passes(config) * num_images, scored_classes=scored
            )
            corrupted_store = open_store(out_uri).at(
                f"corrupted/{shorten_digest(digest_json({'code': digest_code(*DISTORTION_SOURCES), **images}))}"
            )
            kept_store = corrupted_store if config.keep_gib else None
            suite.RobustnessSuite(predictor, data_store, data, config, predictions_store.at("units"), kept_store).run_suite(
                target
            )
        robustness = Robustness.load(target)
    return OfflineEvaluation(Evaluation.load(accuracy_store), robustness, results_store.uri)


def evaluate_published(
    model_uri: str, set_uri: str, kind: readymade.PublishedKind, out_uri: str, config: EvaluationConfig, *, batch: int
) -> OfflineEvaluation:
    """Evaluates a model on a ready-made set of corrupted or perturbed images, or goes on with it. See `readymade.measure`."""
    set_store, manifest = open_store(set_uri), ModelManifest.load(open_store(model_uri))
    dataset_digest = readymade.digest_listing(set_store)
    images = {"images": config.images, "seed": config.seed}
    results_store = open_store(out_uri).at(f"{shorten_digest(manifest.digest)}-{shorten_digest(dataset_digest)}")
    predictions_store = results_store.at(shorten_digest(digest_json({"code": digest_code(*ROBUSTNESS_SOURCES), **images})))
    full_config = config.model_copy(update={"suites": ("corruptions", "perturbations")})
    target = predictions_store.at(shorten_digest(digest_json(suite.measurement_inputs(full_config))))
    if not target.exists(Robustness.filename):
        predictor = Predictor(open_store(model_uri), batch=batch)
        name = set_store.uri.rstrip("/").rpartition("/")[2]
        readymade.measure_published_set(
            predictor, set_store, kind, name, dataset_digest, config, predictions_store.at("units"), target
        )
    return OfflineEvaluation(None, Robustness.load(target), results_store.uri)
