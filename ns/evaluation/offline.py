"""Evaluation outside of a run: any model on any dataset of its classes.

OUT/MODEL-DATASET-…/    evaluation.json, robustness.json, and the predictions that they were counted from
OUT/corrupted/          corrupted images, for the next model
"""

from typing import NamedTuple

from ns.config.schema import EvaluationConfig
from ns.core.digest import DISTORTING, EVALUATION, ROBUSTNESS, code_digest, digest, sha256_bytes, short
from ns.core.errors import DataError
from ns.data.dataset import MANIFEST as DATASET
from ns.data.dataset import Dataset
from ns.evaluation.accuracy import evaluate
from ns.evaluation.multi_label import MultiLabels
from ns.evaluation.result import MANIFEST, Evaluation, Robustness
from ns.evaluation.result import ROBUSTNESS as ROBUST
from ns.evaluation.robustness import published as readymade
from ns.evaluation.robustness import suite
from ns.modeling.manifest import MANIFEST as CARD
from ns.modeling.manifest import ModelCard
from ns.modeling.predictor import Predictor
from ns.storage import open_store, read_uri


class Evaluated(NamedTuple):
    evaluation: Evaluation | None
    """None of a ready-made set, which has no clean images."""
    robustness: Robustness | None
    """None if only clean accuracy was asked for."""
    place: str
    """URI of the folder that holds both."""


def evaluate_dataset(
    model: str,
    dataset: str,
    out: str,
    config: EvaluationConfig,
    *,
    batch: int,
    classes: tuple[str, ...] | None = None,
    multi_label: str | None = None,
) -> Evaluated:
    """Evaluates a model on a dataset, or goes on with it. `config.images` holds for clean accuracy too.

    `classes`: between which the answer is chosen; `("own",)` for those of the dataset. Raises DataError for a place without a dataset,
    and for images of other classes.
    """
    folder, place = open_store(dataset), open_store(model)
    if not folder.exists(DATASET):
        raise DataError(
            f"{folder.uri}: no {DATASET} here; import the images first: ns data import SOURCE {dataset} --role evaluation"
        )
    data, card = Dataset.load(folder), ModelCard.read(place, CARD)
    scored = data.classes if classes == ("own",) else classes
    images = {"dataset": data.digest, "images": config.images, "seed": config.seed}
    several = sha256_bytes(read_uri(multi_label)) if multi_label else None
    inputs = {"code": code_digest(*EVALUATION), "model": card.digest, "scored": scored, "several": several, **images}
    results = open_store(out).at(f"{short(card.digest)}-{short(data.digest)}")
    clean = results.at(short(digest(inputs)))
    looked = min(data.samples, config.images or data.samples)
    if not clean.exists(MANIFEST):
        predictor = Predictor(place, batch=batch, images=looked, scored=scored)
        labels = MultiLabels.read(multi_label, card.classes) if multi_label else None
        evaluate(predictor, folder, data, clean, subsample=suite.subsample(config), multi_labels=labels)
    robustness = None
    if config.robust:
        predictions = results.at(short(digest({"code": code_digest(*ROBUSTNESS), "scored": scored, **images})))
        target = predictions.at(short(digest(suite.asked(config))))
        if not target.exists(ROBUST):
            predictor = Predictor(place, batch=batch, images=suite.passes(config) * looked, scored=scored)
            made = open_store(out).at(f"corrupted/{short(digest({'code': code_digest(*DISTORTING), **images}))}")
            keep = made if config.keep_gib else None
            suite.Suite(predictor, folder, data, config, predictions.at("units"), keep).run(target)
        robustness = Robustness.read(target, ROBUST)
    return Evaluated(Evaluation.read(clean, MANIFEST), robustness, results.uri)


def evaluate_published(
    model: str, place: str, kind: readymade.Kind, out: str, config: EvaluationConfig, *, batch: int
) -> Evaluated:
    """Evaluates a model on a ready-made set of corrupted or perturbed images, or goes on with it. See `readymade.measure`."""
    folder, card = open_store(place), ModelCard.read(open_store(model), CARD)
    dataset = readymade.listing_digest(folder)
    images = {"images": config.images, "seed": config.seed}
    results = open_store(out).at(f"{short(card.digest)}-{short(dataset)}")
    predictions = results.at(short(digest({"code": code_digest(*ROBUSTNESS), **images})))
    wide = config.model_copy(update={"suites": ("corruptions", "perturbations")})
    target = predictions.at(short(digest(suite.asked(wide))))
    if not target.exists(ROBUST):
        predictor = Predictor(open_store(model), batch=batch)
        name = folder.uri.rstrip("/").rpartition("/")[2]
        readymade.measure(predictor, folder, kind, name, dataset, config, predictions.at("units"), target)
    return Evaluated(None, Robustness.read(target, ROBUST), results.uri)
