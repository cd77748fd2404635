"""The data of a report, read from the run's notes and the documents that they name."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ns.config.loader import load_experiment
from ns.config.schema import Experiment
from ns.data.dataset import Dataset
from ns.data.leakage import LeakageReport
from ns.data.prepared import PreparedData
from ns.evaluation.gate import Verdict
from ns.evaluation.result import Evaluation, Robustness
from ns.evaluation.robustness.scores import RobustnessScores, score_robustness
from ns.labeling.diff import DiffSide, LabelDiff, compare_label_sets
from ns.labeling.label_set import LabelSet, read_histogram
from ns.labeling.selection import Selection
from ns.modeling.manifest import ModelManifest, read_history
from ns.reporting.disagreement import ClassGains, Disagreement, ModelAnswers, compare_answers, compute_class_gains
from ns.reporting.pictures import Gallery, build_flip_gallery, build_label_galleries, limit_galleries
from ns.runs.records import BASELINE_EVALUATE, BASELINE_TRAIN, CONFIG_FILE, RECORDS_PREFIX, RunRecord, StageNote
from ns.runs.summary import RunSummary, summarize_run
from ns.storage import Store, parent_key

REPORT_PICTURE_BYTES = 3_000_000
"""Size limit of all pictures of the report together; charts and tables fit into the rest of 5 MB."""


@dataclass(frozen=True)
class TrainedModel:
    """A model of the run with its results."""

    generation: int
    key: str
    """Key of its folder below the root."""
    manifest: ModelManifest
    history: list[dict[str, float]]
    evaluations: dict[str, Evaluation]
    """By their names in the run's notes: `evaluation` (held-out images), `test`, `finetuned`, `set:NAME`. Empty before the model is
    evaluated."""
    robustness: dict[str, tuple[Robustness, RobustnessScores]]
    """By their names in the run's notes, with scores relative to the first teacher or AlexNet."""
    predictions_key: str | None
    """Key of the folder with the predictions on held-out images; None before the model is evaluated."""
    is_baseline: bool = False
    """Whether it is the model that `baseline` asks for, and no part of the loop."""

    @property
    def evaluation(self) -> Evaluation | None:
        """The evaluation on held-out images; None before the model is evaluated."""
        return self.evaluations.get("evaluation")

    @property
    def title(self) -> str:
        if self.is_baseline:
            return "Labeled images only"
        return "First teacher" if self.generation == 0 else f"Student {self.generation}"


@dataclass(frozen=True)
class GenerationLabeling:
    """The pseudo-labels of one generation."""

    generation: int
    label_set: LabelSet
    selection: Selection
    histogram: npt.NDArray[np.uint64]
    """Images by predicted class and confidence: uint64 [classes, HISTOGRAM_BINS]."""
    diff: LabelDiff | None
    """Changes since the previous generation; None in the first."""
    imported_from: str | None = None
    """URI of the label set that was imported; None for labels of the generation's teacher."""


@dataclass(frozen=True)
class ReportContext:
    summary: RunSummary
    experiment: Experiment
    version: str
    generation: int | None
    """The generation that this context is confined to; None for the whole run."""
    datasets: dict[str, Dataset]
    leaks: LeakageReport | None
    """The report of the leak guard; None if it is off."""
    models: list[TrainedModel]
    baseline: TrainedModel | None
    """The model that `baseline` asks for; None without one."""
    labelings: list[GenerationLabeling]
    verdicts: list[Verdict]
    galleries: list[Gallery]
    """Images of the latest label set."""
    flips: Gallery | None
    """Images of the latest label set whose class changed since the previous generation; None in the first."""
    disagreement: Disagreement | None
    """Comparison of the latest student with its teacher."""
    gains: ClassGains | None
    """Gains from the first teacher to the best model, or to the latest if none is better."""
    stages: list[StageNote]

    @property
    def shown_models(self) -> list[TrainedModel]:
        """The models whose measurements stand side by side."""
        return [*self.models, *([self.baseline] if self.baseline else [])]

    @property
    def first_model(self) -> TrainedModel | None:
        """The first teacher, or the generation's teacher, once it is evaluated."""
        return self.models[0] if self.models and self.models[0].evaluation else None

    @property
    def best_model(self) -> TrainedModel | None:
        """The last accepted model."""
        return _pick_best(self.models, self.verdicts)

    def model_of(self, generation: int) -> TrainedModel | None:
        return next((model for model in self.models if model.generation == generation), None)

    def teacher_of(self, generation: int) -> TrainedModel | None:
        """The last model before a generation; it was accepted, because the loop ends with the first refused one."""
        return next((model for model in reversed(self.models) if model.generation < generation), None)

    def labeling_of(self, generation: int) -> GenerationLabeling | None:
        return next((labeling for labeling in self.labelings if labeling.generation == generation), None)

    def verdict_of(self, generation: int) -> Verdict | None:
        return next((verdict for verdict in self.verdicts if verdict.generation == generation), None)


def gather_context(
    root: Store, run: str, *, generation: int | None = None, pictures: int | None = None, size: int = REPORT_PICTURE_BYTES
) -> ReportContext:
    """Reads a run in its present state: all of it, or one generation with its teacher.

    `pictures` is the number per gallery, by default the experiment's; 0 reads none. All pictures together take at most `size` bytes.
    Raises RunError if the run does not exist.
    """
    # A stage shows its generation also if what a later one made is lost, and is made again after it.
    summary = summarize_run(root, run, through_generation=generation)
    experiment = load_experiment(f"{root.uri}/{run}/{CONFIG_FILE}")
    stage_notes = summary.stages
    group_size = experiment.report.pictures if pictures is None else pictures
    prepared = next(
        (PreparedData.load_file(root, note.outputs["data"]) for note in stage_notes if note.stage == "prepare"), None
    )
    verdicts = [Verdict.load_file(root, note.outputs["verdict"]) for note in stage_notes if note.stage == "gate"]
    models = _read_models(root, stage_notes)
    labelings = _read_labelings(root, stage_notes, generation, flips=group_size, imported=experiment.labeling.label_set)
    if generation is not None:
        teacher_before = _pick_best(
            [m for m in models if m.generation < generation], [v for v in verdicts if v.generation < generation]
        )
        shown_generations = (teacher_before.generation if teacher_before else 0, generation)
        models = [model for model in models if model.generation in shown_generations]
        labelings = [labeling for labeling in labelings if labeling.generation == generation]
        verdicts = [verdict for verdict in verdicts if verdict.generation == generation]
        stage_notes = [note for note in stage_notes if note.generation == generation]
    evaluated = [model for model in models if model.evaluation]
    galleries: list[Gallery] = []
    flip_gallery: Gallery | None = None
    disagreement: Disagreement | None = None
    gains: ClassGains | None = None
    if prepared and len(evaluated) > 1:
        heldout = prepared.heldout.open_dataset(root)
        best = _pick_best(evaluated, verdicts)
        teacher = _pick_best(evaluated[:-1], verdicts) or evaluated[0]
        compared = best if best and best is not evaluated[0] else evaluated[-1]
        first, last = read_answers(root, evaluated[0]), read_answers(root, evaluated[-1])
        disagreement = compare_answers(read_answers(root, teacher), last, *heldout, group_size)
        gains = compute_class_gains(first, read_answers(root, compared), *heldout, group_size)
    if prepared and labelings and group_size:
        # Only of the latest label set: pictures are what makes a report large.
        pool_store, pool = prepared.pool.open_dataset(root)
        latest = labelings[-1]
        label_store = root.at(latest.selection.label_set_key)
        galleries = build_label_galleries(pool_store, pool, label_store, latest.label_set, latest.selection, group_size)
        flip_gallery = build_flip_gallery(pool_store, pool, latest.diff) if latest.diff else None
    all_galleries = [*galleries, *([flip_gallery] if flip_gallery else [])]
    all_galleries += [gallery for part in (disagreement, gains) if part for gallery in part.galleries]
    limit_galleries(all_galleries, size)
    return ReportContext(
        summary=summary,
        experiment=experiment,
        version=RunRecord.load_file(root, f"{RECORDS_PREFIX}{run}.json").version,
        generation=generation,
        datasets=_open_datasets(root, prepared),
        leaks=LeakageReport.load_file(root, prepared.check) if prepared and prepared.check else None,
        models=models,
        baseline=next(iter(_read_models(root, summary.stages, (BASELINE_TRAIN, BASELINE_EVALUATE))), None),
        labelings=labelings,
        verdicts=verdicts,
        galleries=galleries,
        flips=flip_gallery,
        disagreement=disagreement,
        gains=gains,
        stages=stage_notes,
    )


def _read_models(
    root: Store, notes: Sequence[StageNote], stages: tuple[str, str] = ("train", "evaluate")
) -> list[TrainedModel]:
    """`stages`: those that train and evaluate the models."""
    train_stage, evaluate_stage = stages
    outputs_by_generation = {note.generation: note.outputs for note in notes if note.stage == evaluate_stage}
    models: list[TrainedModel] = []
    references: dict[str, Robustness] = {}
    for note in (note for note in notes if note.stage == train_stage):
        outputs = outputs_by_generation.get(note.generation, {})
        # Without a test set, the gate's measurement is the reported one.
        robustness = {
            name: Robustness.load_file(root, key)
            for name, key in outputs.items()
            if key.endswith(f"/{Robustness.filename}") and (name, key) != ("gate_robustness", outputs.get("robustness"))
        }
        for name, measured in robustness.items():
            references.setdefault(name, measured)
        key = parent_key(note.outputs["model"])
        manifest = ModelManifest.load_file(root, note.outputs["model"])
        models.append(
            TrainedModel(
                generation=note.generation,
                key=key,
                manifest=manifest,
                history=read_history(root.at(key), manifest),
                evaluations={
                    name: Evaluation.load_file(root, evaluation_key)
                    for name, evaluation_key in outputs.items()
                    if evaluation_key.endswith(f"/{Evaluation.filename}")
                },
                robustness={
                    name: (measured, score_robustness(measured, references[name])) for name, measured in robustness.items()
                },
                predictions_key=parent_key(outputs["evaluation"]) if outputs else None,
                is_baseline=train_stage == BASELINE_TRAIN,
            )
        )
    return models


def _read_labelings(
    root: Store, notes: Sequence[StageNote], generation: int | None, *, flips: int, imported: str | None
) -> list[GenerationLabeling]:
    labelings: list[GenerationLabeling] = []
    for note in (note for note in notes if note.stage == "select"):
        label_set = LabelSet.load_file(root, note.outputs["label_set"])
        selection = Selection.load_file(root, note.outputs["selection"])
        label_store = root.at(selection.label_set_key)
        diff = None
        # A comparison reads all labels, so it is made only where it is shown.
        if labelings and generation in (None, note.generation):
            previous = labelings[-1]
            sides = (
                DiffSide(root.at(previous.selection.label_set_key), previous.label_set, previous.selection),
                DiffSide(label_store, label_set, selection),
            )
            diff = compare_label_sets(*sides, flips=flips)
        counts = read_histogram(label_store, len(label_set.classes))
        imported_from = imported if note.generation == 1 else None
        labelings.append(GenerationLabeling(note.generation, label_set, selection, counts, diff, imported_from))
    return labelings


def _pick_best(models: Sequence[TrainedModel], verdicts: Sequence[Verdict]) -> TrainedModel | None:
    """The last accepted model; the first one is accepted without a verdict."""
    promoted = {verdict.generation for verdict in verdicts if verdict.promoted}
    accepted = [model for model in models if model.evaluation and (model is models[0] or model.generation in promoted)]
    return accepted[-1] if accepted else None


def read_answers(root: Store, model: TrainedModel) -> ModelAnswers:
    """The answers of an evaluated model for the held-out images."""
    assert model.evaluation is not None
    assert model.predictions_key is not None
    return ModelAnswers.from_evaluation(model.title, root.at(model.predictions_key), model.evaluation)


def _open_datasets(root: Store, prepared: PreparedData | None) -> dict[str, Dataset]:
    if prepared is None:
        return {}
    sources = dict(prepared.parts) | {f"set {name}": source for name, source in prepared.sets.items()}
    return {part: source.open_dataset(root)[1] for part, source in sources.items()}
