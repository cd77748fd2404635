"""Evaluates any model on any dataset of its classes, outside of a run; `ns.evaluation.measure` says what is kept."""

from typing import NamedTuple

from ns.config.schema import EvaluationConfig
from ns.core.errors import DataError
from ns.data.dataset import Dataset
from ns.data.prepared import PreparedDataset
from ns.evaluation.measure import ClassChoice, ModelMeasurer
from ns.evaluation.result import Evaluation, Robustness
from ns.evaluation.robustness.published import PublishedKind
from ns.evaluation.robustness.suite import build_subsample
from ns.storage import open_store, parent_key


class OfflineEvaluation(NamedTuple):
    evaluation: Evaluation | None
    """None for a published set, which has no clean images."""
    robustness: Robustness | None
    """None if only clean accuracy was measured."""
    uri: str
    """Folder of `robustness.json`; of `evaluation.json` if only clean accuracy was measured."""


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
    data_store, root = open_store(dataset_uri), open_store(out_uri)
    if not data_store.exists(Dataset.filename):
        raise DataError(
            f"{data_store.uri}: no {Dataset.filename} here; import the images first: ns data import SOURCE {dataset_uri} --role evaluation"
        )
    source = PreparedDataset(uri=data_store.uri, digest=Dataset.load(data_store).digest)
    measurer = ModelMeasurer(root, open_store(model_uri).uri, batch)
    choice: ClassChoice = "own" if classes == ("own",) else classes or "all"
    accuracy = measurer.measure_accuracy(
        source, classes=choice, multi_label_uri=multi_label_uri, subsample=build_subsample(config)
    )
    evaluation = Evaluation.load_file(root, accuracy.key)
    if not config.needs_robustness:
        return OfflineEvaluation(evaluation, None, root.at(parent_key(accuracy.key)).uri)
    key = measurer.measure_robustness(source, config, classes=choice).key
    return OfflineEvaluation(evaluation, Robustness.load_file(root, key), root.at(parent_key(key)).uri)


def evaluate_published(
    model_uri: str, set_uri: str, kind: PublishedKind, out_uri: str, config: EvaluationConfig, *, batch: int
) -> OfflineEvaluation:
    """Evaluates a model on a published set of corrupted or perturbed images; finished work in `out_uri` is not repeated.

    Raises what `measure_published_set` raises.
    """
    root, set_store = open_store(out_uri), open_store(set_uri)
    name = set_store.uri.rstrip("/").rpartition("/")[2]
    key = ModelMeasurer(root, open_store(model_uri).uri, batch).measure_published(set_store.uri, kind, name, config).key
    return OfflineEvaluation(None, Robustness.load_file(root, key), root.at(parent_key(key)).uri)
