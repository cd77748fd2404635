"""Everything that the report says, read from the run's notes and what they point to."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ns.config import schema as config
from ns.config.schema import Experiment
from ns.data.dataset import Dataset
from ns.data.leakage import MANIFEST as CHECK
from ns.data.leakage import LeakageReport
from ns.data.prepared import PreparedData
from ns.evaluation.gate import Verdict
from ns.evaluation.result import MANIFEST as EVALUATION
from ns.evaluation.result import ROBUSTNESS, Evaluation, Robustness
from ns.evaluation.robustness.relative_scores import RobustnessScores, score_robustness
from ns.labeling.diff import DiffSide, LabelDiff, compare_label_sets
from ns.labeling.label_set import LabelSet, read_histogram
from ns.labeling.selection import Selection
from ns.modeling.manifest import HISTORY, ModelManifest
from ns.reporting.disagreement import ClassGains, Disagreement, ModelAnswers, compare_answers, compute_class_gains
from ns.reporting.pictures import Gallery, build_flip_gallery, build_label_galleries, limit_galleries
from ns.runs import records as runs
from ns.runs.records import RunSummary, StageNote
from ns.storage import Store

PICTURE_BYTES = 3_000_000
"""Of all pictures of a page together; charts and tables take no more than the rest of 5 MB."""


@dataclass(frozen=True)
class TrainedModel:
    """A model and how it came about."""

    generation: int
    key: str
    """Of its folder below the root."""
    manifest: ModelManifest
    history: list[dict[str, float]]
    evaluations: dict[str, Evaluation]
    """As the run's notes call them: `evaluation` of the held-out images, `test`, `finetuned`, `set:NAME`. Empty if the run has not
    come so far."""
    robustness: dict[str, tuple[Robustness, RobustnessScores]]
    """By the same names, with what they come to in comparison with the first teacher's, or AlexNet's."""
    predictions_key: str | None
    """Key of the folder with the held-out images' predictions."""

    @property
    def evaluation(self) -> Evaluation | None:
        """On the held-out images, once the run has come so far."""
        return self.evaluations.get("evaluation")

    @property
    def title(self) -> str:
        return "First teacher" if self.generation == 0 else f"Student {self.generation}"


@dataclass(frozen=True)
class GenerationLabeling:
    """One generation's pseudo-labels."""

    generation: int
    label_set: LabelSet
    selection: Selection
    histogram: npt.NDArray[np.uint64]
    """Images by predicted class and confidence: uint64 [classes, BINS]."""
    diff: LabelDiff | None
    """From the generation before."""


@dataclass(frozen=True)
class ReportContext:
    summary: RunSummary
    experiment: Experiment
    version: str
    generation: int | None
    """The one that these facts are confined to; None if they are the whole run's."""
    datasets: dict[str, Dataset]
    leaks: LeakageReport | None
    """What the leak guard found, if it looked."""
    models: list[TrainedModel]
    labelings: list[GenerationLabeling]
    verdicts: list[Verdict]
    galleries: list[Gallery]
    """Of the latest labels."""
    flips: Gallery | None
    """Of the latest labels that have some before them."""
    disagreement: Disagreement | None
    """Of the latest student and its teacher."""
    gains: ClassGains | None
    """From the first teacher to the best model, or to the latest if none is better."""
    stages: list[StageNote]

    @property
    def first_model(self) -> TrainedModel | None:
        """The first teacher, or that of the generation, once it is evaluated."""
        return self.models[0] if self.models and self.models[0].evaluation else None

    @property
    def best_model(self) -> TrainedModel | None:
        """The last accepted model."""
        return _pick_best(self.models, self.verdicts)

    def labeling_of(self, generation: int) -> GenerationLabeling | None:
        return next((labeling for labeling in self.labelings if labeling.generation == generation), None)

    def verdict_of(self, generation: int) -> Verdict | None:
        return next((verdict for verdict in self.verdicts if verdict.generation == generation), None)


def gather_context(
    root: Store, run: str, *, generation: int | None = None, pictures: int | None = None, size: int = PICTURE_BYTES
) -> ReportContext:
    """Reads a run as far as it has come: all of it, or one generation, with the model that was its teacher.

    `pictures` of each group, as the experiment says if None, and all together no more than `size` bytes; none are read if 0. Raises
    RunError if the run does not exist.
    """
    summary = runs.summarize_run(root, run)
    experiment = config.load_experiment(f"{root.uri}/{run}/{runs.CONFIG}")
    stage_notes = summary.stages
    group_size = experiment.report.pictures if pictures is None else pictures
    prepared = next(
        (PreparedData.load_file(root, note.outputs["data"]) for note in stage_notes if note.stage == "prepare-data"), None
    )
    verdicts = [Verdict.load_file(root, note.outputs["verdict"]) for note in stage_notes if note.stage == "gate"]
    models = _read_models(root, stage_notes)
    labelings = _read_labelings(root, stage_notes, generation, flips=group_size)
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
    latest_disagreement: Disagreement | None = None
    class_gains: ClassGains | None = None
    if prepared and len(evaluated) > 1:
        heldout = prepared.heldout.open_dataset(root)
        best = _pick_best(evaluated, verdicts)
        teacher = _pick_best(evaluated[:-1], verdicts) or evaluated[0]
        latest_disagreement = compare_answers(
            _read_answers(root, teacher), _read_answers(root, evaluated[-1]), *heldout, group_size
        )
        compared_model = best if best and best is not evaluated[0] else evaluated[-1]
        class_gains = compute_class_gains(
            _read_answers(root, evaluated[0]), _read_answers(root, compared_model), *heldout, group_size
        )
    if prepared and labelings and group_size:
        # Pictures of the latest labels only: earlier ones are history, and pictures are what makes a report large.
        folder, pool = prepared.pool.open_dataset(root)
        latest_labeling = labelings[-1]
        galleries = build_label_galleries(
            folder,
            pool,
            root.at(latest_labeling.selection.label_set_key),
            latest_labeling.label_set,
            latest_labeling.selection,
            group_size,
        )
        flip_gallery = build_flip_gallery(folder, pool, latest_labeling.diff) if latest_labeling.diff else None
    shown_galleries = [*galleries, *([flip_gallery] if flip_gallery else [])]
    shown_galleries += [
        *(latest_disagreement.galleries if latest_disagreement else []),
        *(class_gains.galleries if class_gains else []),
    ]
    limit_galleries(shown_galleries, size)
    return ReportContext(
        summary=summary,
        experiment=experiment,
        version=runs.RunRecord.load_file(root, f"{runs.RECORDS}{run}.json").version,
        generation=generation,
        datasets=_open_datasets(root, prepared),
        leaks=_find_leak_report(root, prepared, experiment),
        models=models,
        labelings=labelings,
        verdicts=verdicts,
        galleries=galleries,
        flips=flip_gallery,
        disagreement=latest_disagreement,
        gains=class_gains,
        stages=stage_notes,
    )


def _read_models(root: Store, notes: Sequence[StageNote]) -> list[TrainedModel]:
    outputs_by_generation = {note.generation: note.outputs for note in notes if note.stage == "evaluate"}
    models: list[TrainedModel] = []
    references: dict[str, Robustness] = {}
    for note in (note for note in notes if note.stage == "train"):
        outputs = outputs_by_generation.get(note.generation, {})
        robustness = {name: Robustness.load_file(root, key) for name, key in outputs.items() if key.endswith(f"/{ROBUSTNESS}")}
        for name, measured in robustness.items():
            references.setdefault(name, measured)
        key = note.outputs["model"].rpartition("/")[0]
        models.append(
            TrainedModel(
                generation=note.generation,
                key=key,
                manifest=ModelManifest.load_file(root, note.outputs["model"]),
                history=json.loads(root.get(f"{key}/{HISTORY}")),
                evaluations={
                    name: Evaluation.load_file(root, evaluation_key)
                    for name, evaluation_key in outputs.items()
                    if evaluation_key.endswith(f"/{EVALUATION}")
                },
                robustness={
                    name: (measured, score_robustness(measured, references[name])) for name, measured in robustness.items()
                },
                predictions_key=outputs["evaluation"].rpartition("/")[0] if outputs else None,
            )
        )
    return models


def _read_labelings(root: Store, notes: Sequence[StageNote], generation: int | None, *, flips: int) -> list[GenerationLabeling]:
    labelings: list[GenerationLabeling] = []
    for note in (note for note in notes if note.stage == "commit-labels"):
        label_set = LabelSet.load_file(root, note.outputs["labels"])
        selection = Selection.load_file(root, note.outputs["selection"])
        label_store = root.at(selection.label_set_key)
        diff = None
        # A comparison reads all labels: none is made that nobody asked for.
        if labelings and generation in (None, note.generation):
            previous = labelings[-1]
            sides = (
                DiffSide(root.at(previous.selection.label_set_key), previous.label_set, previous.selection),
                DiffSide(label_store, label_set, selection),
            )
            diff = compare_label_sets(*sides, flips=flips)
        counts = read_histogram(label_store, len(label_set.classes))
        labelings.append(GenerationLabeling(note.generation, label_set, selection, counts, diff))
    return labelings


def _pick_best(models: Sequence[TrainedModel], verdicts: Sequence[Verdict]) -> TrainedModel | None:
    """The last accepted model; the first one needs no verdict."""
    promoted = {verdict.generation for verdict in verdicts if verdict.promoted}
    accepted = [model for model in models if model.evaluation and (model is models[0] or model.generation in promoted)]
    return accepted[-1] if accepted else None


def _read_answers(root: Store, model: TrainedModel) -> ModelAnswers:
    assert model.evaluation is not None
    assert model.predictions_key is not None
    return ModelAnswers.from_evaluation(model.title, root.at(model.predictions_key), model.evaluation)


def _open_datasets(root: Store, prepared: PreparedData | None) -> dict[str, Dataset]:
    if prepared is None:
        return {}
    sources = dict(prepared.parts) | {f"set {name}": source for name, source in prepared.sets.items()}
    return {part: source.open_dataset(root)[1] for part, source in sources.items()}


def _find_leak_report(root: Store, prepared: PreparedData | None, experiment: Experiment) -> LeakageReport | None:
    """The check of just these datasets. The run's notes name it only if images were left out."""
    if prepared is None or experiment.data.leak_guard == "off":
        return None
    datasets = {"labeled": prepared.labeled.digest, "pool": prepared.pool.digest}
    datasets |= {name: source.digest for name, source in prepared.evaluation_sets.items()}
    for key in root.list("store/checks/"):
        if key.endswith(f"/{CHECK}") and (check_report := LeakageReport.load_file(root, key)).datasets == datasets:
            return check_report
    return None
