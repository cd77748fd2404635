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
from ns.data.leakage import CheckReport
from ns.data.prepared import Prepared
from ns.evaluation.gate import Verdict
from ns.evaluation.result import MANIFEST as EVALUATION
from ns.evaluation.result import ROBUSTNESS, Evaluation, Robustness
from ns.evaluation.robustness.relative_scores import Scores, scores
from ns.labeling.diff import Diff, Side, compare
from ns.labeling.label_set import LabelSet, read_histogram
from ns.labeling.selection import Selection
from ns.modeling.manifest import HISTORY, ModelCard
from ns.reporting.disagreement import Answers, Disagreement, Gains, disagreement, gains
from ns.reporting.pictures import Gallery, changed, gallery, shorten
from ns.runs import records as runs
from ns.runs.records import Note, Summary
from ns.storage import Store

PICTURE_BYTES = 3_000_000
"""Of all pictures of a page together; charts and tables take no more than the rest of 5 MB."""


@dataclass(frozen=True)
class Trained:
    """A model and how it came about."""

    generation: int
    key: str
    """Of its folder below the root."""
    card: ModelCard
    history: list[dict[str, float]]
    evaluations: dict[str, Evaluation]
    """As the run's notes call them: `evaluation` of the held-out images, `test`, `finetuned`, `set:NAME`. Empty if the run has not
    come so far."""
    robustness: dict[str, tuple[Robustness, Scores]]
    """By the same names, with what they come to in comparison with the first teacher's, or AlexNet's."""
    predictions: str | None
    """Key of the folder with the held-out images' predictions."""

    @property
    def evaluation(self) -> Evaluation | None:
        """On the held-out images, once the run has come so far."""
        return self.evaluations.get("evaluation")

    @property
    def title(self) -> str:
        return "First teacher" if self.generation == 0 else f"Student {self.generation}"


@dataclass(frozen=True)
class Labels:
    """One generation's pseudo-labels."""

    generation: int
    label_set: LabelSet
    selection: Selection
    histogram: npt.NDArray[np.uint64]
    """Images by predicted class and confidence: uint64 [classes, BINS]."""
    diff: Diff | None
    """From the generation before."""


@dataclass(frozen=True)
class Facts:
    summary: Summary
    experiment: Experiment
    version: str
    generation: int | None
    """The one that these facts are confined to; None if they are the whole run's."""
    datasets: dict[str, Dataset]
    leaks: CheckReport | None
    """What the leak guard found, if it looked."""
    trained: list[Trained]
    labels: list[Labels]
    verdicts: list[Verdict]
    galleries: list[Gallery]
    """Of the latest labels."""
    flips: Gallery | None
    """Of the latest labels that have some before them."""
    disagreement: Disagreement | None
    """Of the latest student and its teacher."""
    gains: Gains | None
    """From the first teacher to the best model, or to the latest if none is better."""
    steps: list[Note]

    @property
    def first(self) -> Trained | None:
        """The first teacher, or that of the generation, once it is evaluated."""
        return self.trained[0] if self.trained and self.trained[0].evaluation else None

    @property
    def best(self) -> Trained | None:
        """The last accepted model."""
        return _best(self.trained, self.verdicts)

    def labels_of(self, generation: int) -> Labels | None:
        return next((labels for labels in self.labels if labels.generation == generation), None)

    def verdict_of(self, generation: int) -> Verdict | None:
        return next((verdict for verdict in self.verdicts if verdict.generation == generation), None)


def gather(
    root: Store, run: str, *, generation: int | None = None, pictures: int | None = None, size: int = PICTURE_BYTES
) -> Facts:
    """Reads a run as far as it has come: all of it, or one generation, with the model that was its teacher.

    `pictures` of each group, as the experiment says if None, and all together no more than `size` bytes; none are read if 0. Raises
    RunError if the run does not exist.
    """
    summary = runs.summarise(root, run)
    experiment = config.load(f"{root.uri}/{run}/{runs.CONFIG}")
    notes = summary.steps
    wanted = experiment.report.pictures if pictures is None else pictures
    prepared = next((Prepared.read(root, note.outputs["data"]) for note in notes if note.step == "prepare-data"), None)
    verdicts = [Verdict.read(root, note.outputs["verdict"]) for note in notes if note.step == "gate"]
    trained = _trained(root, notes)
    labels = _labels(root, notes, generation, flips=wanted)
    if generation is not None:
        before = _best([m for m in trained if m.generation < generation], [v for v in verdicts if v.generation < generation])
        wanted_models = (before.generation if before else 0, generation)
        trained = [model for model in trained if model.generation in wanted_models]
        labels = [one for one in labels if one.generation == generation]
        verdicts = [verdict for verdict in verdicts if verdict.generation == generation]
        notes = [note for note in notes if note.generation == generation]
    evaluated = [model for model in trained if model.evaluation]
    galleries: list[Gallery] = []
    flipped: Gallery | None = None
    latest: Disagreement | None = None
    gained: Gains | None = None
    if prepared and len(evaluated) > 1:
        heldout = prepared.heldout.open(root)
        best = _best(evaluated, verdicts)
        teacher = _best(evaluated[:-1], verdicts) or evaluated[0]
        latest = disagreement(_answers(root, teacher), _answers(root, evaluated[-1]), *heldout, wanted)
        other = best if best and best is not evaluated[0] else evaluated[-1]
        gained = gains(_answers(root, evaluated[0]), _answers(root, other), *heldout, wanted)
    if prepared and labels and wanted:
        # Pictures of the latest labels only: earlier ones are history, and pictures are what makes a report large.
        folder, pool = prepared.pool.open(root)
        last = labels[-1]
        galleries = gallery(folder, pool, root.at(last.selection.labels), last.label_set, last.selection, wanted)
        flipped = changed(folder, pool, last.diff) if last.diff else None
    shown = [*galleries, *([flipped] if flipped else [])]
    shown += [*(latest.galleries if latest else []), *(gained.galleries if gained else [])]
    shorten(shown, size)
    return Facts(
        summary=summary,
        experiment=experiment,
        version=runs.Record.read(root, f"{runs.RECORDS}{run}.json").version,
        generation=generation,
        datasets=_datasets(root, prepared),
        leaks=_leaks(root, prepared, experiment),
        trained=trained,
        labels=labels,
        verdicts=verdicts,
        galleries=galleries,
        flips=flipped,
        disagreement=latest,
        gains=gained,
        steps=notes,
    )


def _trained(root: Store, notes: Sequence[Note]) -> list[Trained]:
    evaluated = {note.generation: note.outputs for note in notes if note.step == "evaluate"}
    models: list[Trained] = []
    references: dict[str, Robustness] = {}
    for note in (note for note in notes if note.step == "train"):
        outputs = evaluated.get(note.generation, {})
        robustness = {name: Robustness.read(root, key) for name, key in outputs.items() if key.endswith(f"/{ROBUSTNESS}")}
        for name, found in robustness.items():
            references.setdefault(name, found)
        key = note.outputs["model"].rpartition("/")[0]
        models.append(
            Trained(
                generation=note.generation,
                key=key,
                card=ModelCard.read(root, note.outputs["model"]),
                history=json.loads(root.get(f"{key}/{HISTORY}")),
                evaluations={
                    name: Evaluation.read(root, place) for name, place in outputs.items() if place.endswith(f"/{EVALUATION}")
                },
                robustness={name: (found, scores(found, references[name])) for name, found in robustness.items()},
                predictions=outputs["evaluation"].rpartition("/")[0] if outputs else None,
            )
        )
    return models


def _labels(root: Store, notes: Sequence[Note], generation: int | None, *, flips: int) -> list[Labels]:
    found: list[Labels] = []
    for note in (note for note in notes if note.step == "commit-labels"):
        label_set = LabelSet.read(root, note.outputs["labels"])
        selection = Selection.read(root, note.outputs["selection"])
        where = root.at(selection.labels)
        diff = None
        # A comparison reads all labels: none is made that nobody asked for.
        if found and generation in (None, note.generation):
            before = found[-1]
            sides = (
                Side(root.at(before.selection.labels), before.label_set, before.selection),
                Side(where, label_set, selection),
            )
            diff = compare(*sides, flips=flips)
        counts = read_histogram(where, len(label_set.classes))
        found.append(Labels(note.generation, label_set, selection, counts, diff))
    return found


def _best(models: Sequence[Trained], verdicts: Sequence[Verdict]) -> Trained | None:
    """The last accepted model; the first one needs no verdict."""
    promoted = {verdict.generation for verdict in verdicts if verdict.promoted}
    accepted = [model for model in models if model.evaluation and (model is models[0] or model.generation in promoted)]
    return accepted[-1] if accepted else None


def _answers(root: Store, model: Trained) -> Answers:
    assert model.evaluation is not None
    assert model.predictions is not None
    return Answers.read(model.title, root.at(model.predictions), model.evaluation)


def _datasets(root: Store, prepared: Prepared | None) -> dict[str, Dataset]:
    if prepared is None:
        return {}
    sources = dict(prepared.parts) | {f"set {name}": source for name, source in prepared.sets.items()}
    return {part: source.open(root)[1] for part, source in sources.items()}


def _leaks(root: Store, prepared: Prepared | None, experiment: Experiment) -> CheckReport | None:
    """The check of just these datasets. The run's notes name it only if images were left out."""
    if prepared is None or experiment.data.leak_guard == "off":
        return None
    datasets = {"labelled": prepared.labelled.dataset, "pool": prepared.pool.dataset}
    datasets |= {name: source.dataset for name, source in prepared.evaluation.items()}
    for key in root.list("store/checks/"):
        if key.endswith(f"/{CHECK}") and (found := CheckReport.read(root, key)).datasets == datasets:
            return found
    return None
