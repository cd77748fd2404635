"""Measures a model and keeps the results below a root. What the root's ledger has is not measured again.

store/evaluations/DIGEST/         evaluation.json, and the predictions that it was counted from
store/temperatures/DIGEST/        temperature.json
store/robustness/DIGEST/          robustness.json
store/robustness/units/DIGEST/    predictions, unit by unit: a measurement goes on where another one ended
store/corrupted/DIGEST/           corrupted images, for the next model
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ns.config.schema import EvaluationConfig, LabelingConfig
from ns.core.digest import (
    DISTORTION_SOURCES,
    EVALUATION_SOURCES,
    ROBUSTNESS_SOURCES,
    TEMPERATURE_SOURCES,
    digest_code,
    digest_json,
    sha256_bytes,
    shorten_digest,
)
from ns.data.prepared import PreparedDataset
from ns.data.subsample import Subsample
from ns.evaluation.result import Evaluation, FittedTemperature, Robustness
from ns.modeling.manifest import ModelManifest
from ns.storage import Store, open_store, read_uri
from ns.storage.ledger import Ledger

if TYPE_CHECKING:
    from ns.evaluation.robustness.published import PublishedKind
    from ns.modeling.labeler import Labeler
    from ns.modeling.predictor import Predictor

ClassChoice = Literal["all", "own"] | tuple[str, ...]
"""The classes that answers are chosen from: all of the model, those that the dataset has, or these names."""


RESULT_FOLDERS = {Evaluation: "evaluations", FittedTemperature: "temperatures", Robustness: "robustness"}
"""Kind of result → its folder in `store/`."""


class Measurement(NamedTuple):
    key: str
    """Key of the result below the root: `…/evaluation.json` or `…/robustness.json`."""
    seconds: float
    reused: bool
    """Whether it had been made before."""


@dataclass(frozen=True)
class ModelMeasurer:
    root: Store
    model: str
    """Key of the model's folder below the root, or its URI."""
    batch: int
    """Images per forward pass."""

    def measure_accuracy(
        self,
        source: PreparedDataset,
        *,
        classes: ClassChoice = "all",
        multi_label_uri: str | None = None,
        subsample: Subsample | None = None,
    ) -> Measurement:
        """Accuracy on a dataset. Raises what `evaluate_accuracy` raises."""
        inputs = self._model_inputs(EVALUATION_SOURCES) | {
            "dataset": source.digest,
            "subsample": subsample and subsample.model_dump(),
            "classes": classes,
            "multi_label": sha256_bytes(read_uri(multi_label_uri)) if multi_label_uri else None,
        }

        def run_evaluation(target: Store) -> None:
            from ns.evaluation.accuracy import evaluate_accuracy
            from ns.evaluation.multi_label import MultiLabels

            data_store, dataset = source.open_dataset(self.root)
            images = min(dataset.samples, subsample.images) if subsample else dataset.samples
            predictor = self._open_predictor(images, classes, dataset.classes)
            multi_labels = MultiLabels.load(multi_label_uri, predictor.manifest.classes) if multi_label_uri else None
            evaluate_accuracy(predictor, data_store, dataset, target, subsample=subsample, multi_labels=multi_labels)

        return self._get_or_run("evaluate", Evaluation, inputs, run_evaluation)

    def measure_labeler(self, source: PreparedDataset, config: LabelingConfig) -> Measurement:
        """Accuracy of what the model says as it labels the pool, with views and ensemble. Raises what `evaluate_accuracy` raises."""

        def run_evaluation(target: Store) -> None:
            from ns.evaluation.accuracy import evaluate_accuracy

            labeler = self._open_labeler(source, config, self.resolve_temperature(source, config))
            evaluate_accuracy(labeler, *source.open_dataset(self.root), target)

        sources = TEMPERATURE_SOURCES if config.temperature == "fitted" else EVALUATION_SOURCES
        inputs = self._labeler_inputs(sources, source, config) | {"temperature": config.temperature}
        return self._get_or_run("calibrate", Evaluation, inputs, run_evaluation)

    def resolve_temperature(self, source: PreparedDataset | None, config: LabelingConfig) -> float:
        """The temperature that the model labels with, fitted on `source` if the configuration says so."""
        if config.temperature != "fitted":
            return config.temperature
        assert source is not None

        def run_fit(target: Store) -> None:
            from ns.evaluation.temperature import fit_labeler_temperature

            fit_labeler_temperature(self._open_labeler(source, config, 1.0), *source.open_dataset(self.root)).save(target)

        inputs = self._labeler_inputs(TEMPERATURE_SOURCES, source, config)
        fitted = self._get_or_run("fit-temperature", FittedTemperature, inputs, run_fit)
        return FittedTemperature.load_file(self.root, fitted.key).temperature

    def _labeler_inputs(self, sources: Sequence[str], source: PreparedDataset, config: LabelingConfig) -> dict[str, Any]:
        return self._model_inputs(sources) | {
            "dataset": source.digest,
            "views": config.views,
            "ensemble": [ModelManifest.load(open_store(uri)).digest for uri in config.ensemble],
        }

    def _open_labeler(self, source: PreparedDataset, config: LabelingConfig, temperature: float) -> "Labeler":
        from ns.modeling.labeler import Labeler
        from ns.modeling.predictor import Predictor

        images = source.open_dataset(self.root)[1].samples
        stores = (self.root.at(self.model), *map(open_store, config.ensemble))
        predictors = [Predictor(store, batch=self.batch, images=images, views=config.views) for store in stores]
        return Labeler(predictors, temperature)

    def measure_robustness(
        self, source: PreparedDataset, config: EvaluationConfig, *, classes: ClassChoice = "all"
    ) -> Measurement:
        """What corruptions, perturbations and attacks leave of the accuracy on a dataset. Raises what `RobustnessSuite` raises."""
        from ns.evaluation.robustness import suite

        images = {"dataset": source.digest, "images": config.images, "seed": config.seed}
        unit_inputs = self._model_inputs(ROBUSTNESS_SOURCES) | images | {"classes": classes}

        def run_suite(target: Store) -> None:
            data_store, dataset = source.open_dataset(self.root)
            passes = suite.count_passes(config) * min(dataset.samples, config.images or dataset.samples)
            predictor = self._open_predictor(passes, classes, dataset.classes)
            distorted_store = self._open_store("corrupted", {"code": digest_code(*DISTORTION_SOURCES), **images})
            suite.RobustnessSuite(
                predictor,
                data_store,
                dataset,
                config,
                self._open_store("robustness/units", unit_inputs),
                distorted_store if config.keep_gib else None,
            ).run_suite(target)

        inputs = unit_inputs | {"measured": suite.measurement_inputs(config)}
        return self._get_or_run("robustness", Robustness, inputs, run_suite)

    def measure_published(self, uri: str, kind: "PublishedKind", name: str, config: EvaluationConfig) -> Measurement:
        """What a published set of corrupted or perturbed images leaves of the accuracy. Raises what `measure_published_set` raises."""
        from ns.evaluation.robustness import published, suite

        set_store = open_store(uri)
        dataset = published.digest_listing(set_store)
        images = {"dataset": dataset, "images": config.images, "seed": config.seed}
        unit_inputs = self._model_inputs(ROBUSTNESS_SOURCES) | images

        def run_set(target: Store) -> None:
            unit_store = self._open_store("robustness/units", unit_inputs)
            predictor = self._open_predictor()
            published.measure_published_set(predictor, set_store, kind, name, dataset, config, unit_store, target)

        full_config = config.model_copy(update={"suites": ("corruptions", "perturbations")})
        inputs = unit_inputs | {"kind": kind, "measured": suite.measurement_inputs(full_config)}
        return self._get_or_run("published", Robustness, inputs, run_set)

    def _model_inputs(self, sources: Sequence[str]) -> dict[str, Any]:
        return {"code": digest_code(*sources), "model": ModelManifest.load(self.root.at(self.model)).digest}

    def _open_predictor(
        self, images: int = 0, classes: ClassChoice = "all", dataset_classes: tuple[str, ...] = ()
    ) -> "Predictor":
        from ns.modeling.predictor import Predictor

        scored = None if classes == "all" else dataset_classes if classes == "own" else classes
        return Predictor(self.root.at(self.model), batch=self.batch, images=images, scored_classes=scored)

    def _open_store(self, folder: str, inputs: Mapping[str, Any]) -> Store:
        return self.root.at(f"store/{folder}/{shorten_digest(digest_json(inputs))}")

    def _get_or_run(
        self,
        work_name: str,
        result: type[Evaluation | Robustness | FittedTemperature],
        inputs: Mapping[str, Any],
        work: Callable[[Store], None],
    ) -> Measurement:
        """The measurement that the ledger has, or else that of `work`, which writes a result into the store that it is given."""
        ledger = Ledger(self.root)
        folder = RESULT_FOLDERS[result]
        store_key = ledger.derive_key(folder, work_name, inputs)

        def run_work() -> Mapping[str, str]:
            work(self.root.at(store_key))
            return {"result": f"{store_key}/{result.filename}"}

        entry, reused = ledger.get_or_run(work_name, inputs, run_work)
        return Measurement(entry.outputs["result"], entry.seconds, reused)
