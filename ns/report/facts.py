"""Everything that the report says, read from the run's notes and what they point to."""

import json
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ns import config, runs
from ns.card import HISTORY, ModelCard
from ns.config import Experiment
from ns.data.dataset import Dataset
from ns.data.prepared import Prepared
from ns.evaluate.gate import Verdict
from ns.evaluate.result import Evaluation
from ns.label.diff import Side, compare
from ns.label.labelset import LabelSet, read_histogram
from ns.label.selection import Selection
from ns.report.pictures import Gallery, changed, gallery
from ns.runs import Note, Summary
from ns.store import Store


@dataclass(frozen=True)
class Trained:
    """A model and how it came about."""

    generation: int
    card: ModelCard
    history: list[dict[str, float]]
    evaluation: Evaluation | None
    """None if the run has not come so far."""


@dataclass(frozen=True)
class Labels:
    """One generation's pseudo-labels."""

    generation: int
    label_set: LabelSet
    selection: Selection
    histogram: npt.NDArray[np.uint64]
    """Images by confidence, all classes together: uint64 [BINS]."""
    churn: float | None
    """Share of the pool's images whose most probable class differs from the generation before."""


@dataclass(frozen=True)
class Facts:
    summary: Summary
    experiment: Experiment
    version: str
    datasets: dict[str, Dataset]
    trained: list[Trained]
    labels: list[Labels]
    verdicts: list[Verdict]
    galleries: list[Gallery]
    steps: list[Note]

    @property
    def first(self) -> Trained | None:
        """The first teacher, once it is evaluated."""
        return next((model for model in self.trained if model.generation == 0 and model.evaluation), None)

    @property
    def best(self) -> Trained | None:
        """The last accepted model."""
        promoted = {verdict.generation for verdict in self.verdicts if verdict.promoted} | {0}
        accepted = [model for model in self.trained if model.generation in promoted and model.evaluation]
        return accepted[-1] if accepted else None


def gather(root: Store, run: str) -> Facts:
    """Reads a run as far as it has come. Raises RunError if it does not exist."""
    summary = runs.summarise(root, run)
    experiment = config.load(f"{root.uri}/{run}/{runs.CONFIG}")
    notes = summary.steps
    prepared = next((Prepared.read(root, note.outputs["data"]) for note in notes if note.step == "prepare-data"), None)
    opened = {part: source.open(root) for part, source in prepared.parts.items()} if prepared else {}
    evaluations = {n.generation: Evaluation.read(root, n.outputs["evaluation"]) for n in notes if n.step == "evaluate"}
    trained = [
        Trained(
            generation=note.generation,
            card=ModelCard.read(root, note.outputs["model"]),
            history=json.loads(root.get(f"{note.outputs['model'].rpartition('/')[0]}/{HISTORY}")),
            evaluation=evaluations.get(note.generation),
        )
        for note in notes
        if note.step == "train"
    ]
    labels: list[Labels] = []
    galleries: list[Gallery] = []
    if opened:
        folder, pool = opened["pool"]
        for note in (note for note in notes if note.step == "commit-labels"):
            label_set = LabelSet.read(root, note.outputs["labels"])
            selection = Selection.read(root, note.outputs["selection"])
            where = root.at(selection.labels)
            churn = None
            groups = gallery(folder, pool, where, label_set, selection, experiment.report.pictures)
            if labels:
                before = labels[-1]
                known = root.at(before.selection.labels)
                sides = Side(known, before.label_set), Side(where, label_set)
                diff = compare(*sides, flips=experiment.report.pictures)
                churn = diff.churn
                groups = [*groups, changed(folder, pool, diff)]
            # Pictures of the latest labels only: earlier ones are history, and pictures are what makes a report large.
            galleries = groups
            counts = read_histogram(where, len(label_set.classes)).sum(0)
            labels.append(Labels(note.generation, label_set, selection, counts, churn))
    return Facts(
        summary=summary,
        experiment=experiment,
        version=runs.Record.read(root, f"{runs.RECORDS}{run}.json").version,
        datasets={part: dataset for part, (_, dataset) in opened.items()},
        trained=trained,
        labels=labels,
        verdicts=[Verdict.read(root, note.outputs["verdict"]) for note in notes if note.step == "gate"],
        galleries=galleries,
        steps=notes,
    )
