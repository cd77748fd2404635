"""The steps of the loop, each safe to kill and to run again. KFP components call these and nothing else.

Values that pass between steps are short strings: keys below the root, never bytes. `config_uri` names the experiment's YAML,
`root` the store's URI that holds everything, `run` the folder for this run's notes.

Heavy libraries are imported inside the steps that need them: half of the steps are done before torch would be loaded.
"""

import atexit
import gc
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ns import __version__
from ns.config import schema as config
from ns.config.schema import EvaluationConfig, EvaluationSet, Experiment, RoleConfig
from ns.core import log, telemetry
from ns.core.digest import DISTORTING, EVALUATION, LABELLING, ROBUSTNESS, TRAINING, code_digest, digest, sha256_bytes, short
from ns.core.errors import ConfigError, DataError, Interrupted, NsError, TrainingError, named
from ns.core.process import die_with_client
from ns.data.dataset import Shard
from ns.data.index import ShardIndex
from ns.data.key_list import read_keys
from ns.data.leakage import left_out
from ns.data.prepared import MANIFEST as PREPARED
from ns.data.prepared import Prepared, Source
from ns.evaluation import gate as gates
from ns.evaluation.result import MANIFEST as ACCURACY
from ns.evaluation.result import ROBUSTNESS as ROBUST
from ns.evaluation.result import Evaluation, Robustness
from ns.labeling.audit import audits, deciding
from ns.labeling.diff import compare
from ns.labeling.label_set import MANIFEST as LABEL_SET
from ns.labeling.label_set import LabelShard, join, marker
from ns.labeling.selection import MANIFEST as SELECTION
from ns.labeling.selection import Selection, select_from
from ns.labeling.thresholds import Calibration
from ns.modeling.manifest import FINETUNED, ModelCard, weights_digest
from ns.modeling.manifest import MANIFEST as CARD
from ns.reporting import run_metrics as gauges
from ns.runs import records as runs
from ns.storage import Store, open_store, read_uri
from ns.storage.ledger import Entry, Ledger

if TYPE_CHECKING:
    from ns.modeling.distributed import World

_finished = False
"""Whether a step of this process came to its end."""


def _leave() -> None:
    """Ends Kubeflow's executor, which by now has written what the step answered, at once: to take apart what torch and timm have loaded
    takes half a second of each step, and the system frees it all in one go. Other processes only do without a last look for garbage."""
    if _finished and os.environ.get("_KFP_RUNTIME") == "true" and not hasattr(sys, "last_type"):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    gc.freeze()


# Registered before torch is loaded, it is called after what torch has registered.
atexit.register(_leave)

STOP = "stop"
"""What `resolve` answers when the loop is over."""
TRAIN = "train"
"""In the place of a teacher that is still to be trained."""


def start_run(
    config_place: str, root: str, run: str, overrides: Sequence[str] = (), fields: Mapping[str, str | int] | None = None
) -> tuple[str, str]:
    """Opens a run, or opens it again: reads the experiment (a URI or a preset), changes what is asked for, and keeps it in the run.

    `overrides` are `a.b=c`; `fields` are values by field (`data.pool`), an empty one or 0 as the experiment has it. Without a name the
    run gets one that is made from the experiment. Returns the URI of the experiment as it is kept, and the run's name.
    """
    log.configure()
    die_with_client()
    store = open_store(root)
    experiment = config.chosen(config_place, overrides, fields)
    name = run or runs.name_of(experiment)
    runs.start(store, name, experiment, __version__)
    return f"{store.uri}/{name}/{runs.CONFIG}", name


class NextGeneration(NamedTuple):
    """What one more generation begins with."""

    config_uri: str
    run: str
    data: str
    """Key of `prepared.json`."""
    generation: int
    """Its number; its teacher's is one less."""
    teacher_generation: int
    teacher: str
    """Key of the model's folder, TRAIN if there is none yet, or STOP if there is nothing new."""


def start_generation(
    config_place: str, root: str, run: str, overrides: Sequence[str] = (), fields: Mapping[str, str | int] | None = None
) -> NextGeneration:
    """Opens the run of one more generation, which goes on from the student that a gate accepted last in any run of the experiment of
    this name; without one, the generation is the first and its teacher is to be trained. Prepares the data as `prepare_data` does.

    Without a name the run gets one that is made from the experiment, its data and the teacher: it is another run as soon as one of
    them is. If this run has refused a student of just these already, there is nothing to do. Raises DataError if the accepted model
    knows other classes.
    """
    with _announced("start-generation", 0) as facts:
        started = time.monotonic()
        store = open_store(root)
        ledger = Ledger(store)
        experiment = config.chosen(config_place, overrides, fields)
        data, prepared, reused = _prepare(experiment, store, ledger)
        spent = time.monotonic() - started
        latest = runs.accepted(store, experiment.name)
        generation = latest.generation + 1 if latest else 1
        card = ModelCard.read(store.at(latest.model), CARD) if latest else None
        if card and card.classes != _classes(store, data):
            raise DataError(
                f"data.labelled: {experiment.data.labelled}: its classes are not those of the model that was accepted last (run "
                f"{latest.run if latest else ''}); give the experiment another name, to begin with a teacher of these"
            )
        name = run or runs.name_of_generation(experiment, generation, prepared.digest, card.digest if card else None)
        runs.start(store, name, experiment, __version__)
        step = _Step("start-generation", generation, name, experiment, store, "start-generation", ledger)
        runs.note(store, name, 0, "prepare-data", {"data": data}, spent, reused=reused)
        if latest:
            runs.adopt(store, name, latest)
        teacher = latest.model if latest else _first_teacher(step, data)
        if _refused_before(step, data, teacher):
            log.get().info("nothing new: with these data, settings and teacher the student was refused", run=name)
            teacher = STOP
        elif not latest:
            teacher = TRAIN
        facts.update(reused=reused, **_counts(store, prepared))
        return NextGeneration(f"{store.uri}/{name}/{runs.CONFIG}", name, data, generation, generation - 1, teacher)


def prepare_data(config_uri: str, root: str, run: str) -> str:
    """Checks the experiment, finds or imports the three datasets. Returns the key of `prepared.json`."""
    with _step("prepare-data", 0, config_uri, root, run) as step:
        key, prepared, reused = _prepare(step.experiment, step.root, step.ledger)
        step.done({"data": key}, reused=reused, **_counts(step.root, prepared))
        return key


def train(
    config_uri: str,
    root: str,
    run: str,
    data: str,
    generation: int,
    teacher: str = "",
    labels: str = "",
    *,
    elsewhere: Callable[[str, Sequence[str]], None] | None = None,
) -> str:
    """Trains the first teacher (generation 0), or a student of `teacher` on the selection in `labels`.

    `elsewhere(key, arguments)` runs `python -m ns.training.worker ARGUMENTS` in processes on other machines until they have ended; `key`, 16 hex
    digits, is this training's and no other's. Without it the processes are on this machine. Returns the key of the model's folder.
    Raises TrainingError when training cannot go on.
    """
    with _step("train", generation, config_uri, root, run, teacher=teacher) as step:
        training = _Training(step.root, step.ledger, step.experiment, data, generation, teacher, labels)
        arguments = [config_uri, root, run, data, str(generation), teacher, labels]

        def work() -> Mapping[str, str]:
            if elsewhere:
                elsewhere(training.key, arguments)
                return training.outputs
            from ns.modeling.distributed import ALONE, launch, processes_here

            processes = processes_here(training.role.train.processes)
            if processes > 1:
                launch(processes, "ns.training.worker", arguments)
            else:
                training.do(ALONE, run)
            return training.outputs

        step.once("train", training.inputs, work)
        card = ModelCard.read(step.root.at(training.folder), CARD)
        step.say(parameters=card.parameters, steps=card.steps)
        return training.folder


def join_training(config_uri: str, root: str, run: str, data: str, generation: int, teacher: str, labels: str) -> None:
    """Trains as one of the processes that torchrun started. Only trains: whoever started them records the result."""
    from ns.modeling.distributed import FAILURE_VARIABLE, failures_told, joined

    die_with_client()
    # Told before the group is left: the others fail for that reason only.
    with joined() as world, failures_told(), log.bound(step="train", generation=generation):
        log.configure() if world.first else log.configure_helper()
        try:
            store, experiment = open_store(root), config.load(config_uri)
            _begin_telemetry("train", generation, run, experiment, teacher)
            _Training(store, Ledger(store), experiment, data, generation, teacher, labels).do(world, run)
        except NsError as error:
            if not os.environ.get(FAILURE_VARIABLE):
                # Whoever started these processes is on another machine, and has nothing of them but their log.
                log.get().error("failed", error=str(error), exit_code=error.exit_code)
            raise


def evaluate(config_uri: str, root: str, run: str, data: str, generation: int, model: str) -> str:
    """Evaluates a model on the held-out images, and on whatever else the experiment asks for; a fine-tuned form of it, if it has one,
    on clean images only: corruptions are measured without it, as in the paper. Returns the key of the model's `evaluation.json`."""
    with _step("evaluate", generation, config_uri, root, run) as step:
        prepared, asked = Prepared.read(step.root, data), step.experiment.evaluation
        entries: dict[str, tuple[Entry, bool]] = {"evaluation": _accuracy(step, prepared.heldout, model)}
        # All else may take hours.
        telemetry.EVALUATED.labels("heldout").set(
            Evaluation.read(step.root, entries["evaluation"][0].outputs["evaluation"]).top1
        )
        if prepared.test:
            entries["test"] = _accuracy(step, prepared.test, model)
        finetuned = f"{model}/{FINETUNED}"
        if step.root.exists(f"{finetuned}/{CARD}"):
            entries["finetuned"] = _accuracy(step, prepared.heldout, finetuned)
            if prepared.test:
                entries["finetuned_test"] = _accuracy(step, prepared.test, finetuned)
        for name, source in prepared.sets.items():
            entries[f"set:{name}"] = _accuracy(step, source, model, asked.sets[name])
        for name, wanted in asked.sets.items():
            if wanted.kind != "images":
                entries[f"set:{name}"] = _published(step, name, wanted, model)
        if asked.robust:
            entries["robustness"] = _robustness(step, prepared.reported, model, asked)
        if step.experiment.gate.suites:
            entries["guarded"] = _guarded(step, prepared, model)
        outputs = {name: next(iter(entry.outputs.values())) for name, (entry, _) in entries.items()}
        step.done(
            outputs,
            reused=all(reused for _, reused in entries.values()),
            seconds=sum(entry.seconds for entry, _ in entries.values()),
            **_numbers(step.root, outputs),
        )
        gauges.show_measures(step.root, run, generation)
        return outputs["evaluation"]


def resolve(config_uri: str, root: str, run: str, data: str, generation: int, first_teacher: str) -> str:
    """Says whether generation `generation` takes place: the key of its teacher, or STOP.

    `first_teacher` is the model that the run began with, TRAIN for the one that it trained itself, STOP if it was over before it began.
    Raises TrainingError if the first teacher has learnt nothing: pseudo-labels of chance would only waste the student.
    """
    with _step("resolve", generation, config_uri, root, run, quiet=True) as step:
        if first_teacher == STOP:
            return STOP
        teacher = _first_teacher(step, data) if first_teacher == TRAIN else first_teacher
        begun = ModelCard.read(step.root.at(teacher), CARD).generation
        if generation - begun > step.experiment.generations:
            return STOP
        if generation == 1:
            _refuse_chance(step, data, teacher)
        for earlier in range(begun + 1, generation):
            inputs = _generation_inputs(step, data, earlier, teacher)
            entry = step.ledger.lookup("generation", step.ledger.key("generation", inputs))
            if entry is None:
                return STOP
            verdict = gates.Verdict.read(step.root, entry.outputs["verdict"])
            if not verdict.promoted:
                return STOP
            teacher = verdict.student
        return teacher


def plan_labels(config_uri: str, root: str, run: str, data: str, generation: int) -> list[str]:
    """Splits the pool into ranges of shards, `START-STOP` (half open), one per labelling task."""
    with _step("plan-labels", generation, config_uri, root, run, quiet=True) as step:
        _, pool = Prepared.read(step.root, data).pool.open(step.root)
        shards = len(pool.shards)
        tasks = min(step.experiment.labelling.tasks, shards)
        bounds = [index * shards // tasks for index in range(tasks + 1)]
        return [f"{start}-{stop}" for start, stop in pairwise(bounds)]


def label_shards(config_uri: str, root: str, run: str, data: str, generation: int, teacher: str, shards: str) -> str:
    """Labels one range of shards of the pool, leaving out shards that are done. Returns the range."""
    with _step("label-shards", generation, config_uri, root, run, shards=shards, teacher=teacher) as step:
        start, stop = (int(bound) for bound in shards.split("-"))
        prepared = Prepared.read(step.root, data)
        pool_folder, pool = prepared.pool.open(step.root)
        key = _labels_folder(step, prepared, teacher)
        labels = step.root.at(key)
        wanted = range(start, stop)
        images = sum(pool.shards[index].samples for index in wanted)
        reused = all(labels.exists(marker(pool.shards[index].name)) for index in wanted)
        if not reused:
            from ns.labeling import predict
            from ns.modeling.predictor import Predictor

            config = step.experiment.labelling
            places = [step.root.at(teacher), *map(open_store, config.ensemble)]
            predictors = [Predictor(place, batch=config.batch, images=images, views=config.views) for place in places]
            held_out = _left_out(step, prepared, pool_folder, [pool.shards[index] for index in wanted])
            before = _LabelledBefore(step, teacher, held_out)
            predict.label_shards(predictors, pool_folder, pool, labels, wanted, config, left_out=held_out, known=before.find)
            before.note(key, [pool.shards[index] for index in wanted])
        step.done({}, reused=reused, images=images)
        return shards


def commit_labels(config_uri: str, root: str, run: str, data: str, generation: int, teacher: str) -> str:
    """Joins the labelled shards into a label set, selects from it, and keeps a version of both if there is a registry.

    Returns the key of the selection's folder.
    """
    with _step("commit-labels", generation, config_uri, root, run, teacher=teacher, linger=True) as step:
        experiment = step.experiment
        prepared = Prepared.read(step.root, data)
        _, pool = prepared.pool.open(step.root)
        key = _labels_folder(step, prepared, teacher)
        folder = step.root.at(key)
        card_digest = _model_digest(step.root, teacher)
        classes = _classes(step.root, data)
        label_set = join(
            folder,
            pool,
            teacher=card_digest,
            code=code_digest(*LABELLING),
            classes=classes,
            top_k=experiment.labelling.top_k,
            views=experiment.labelling.views,
            ensemble=_ensemble(step),
            probabilities=experiment.labelling.probabilities,
        )
        label_set.write(folder, LABEL_SET)
        calibration = _calibration(step, data, teacher)
        inputs = {
            "code": code_digest("labeling/selection.py", "labeling/label_set.py", "labeling/thresholds.py"),
            "policy": experiment.selection.model_dump(mode="json"),
            "seed": experiment.seed,
            "label_set": label_set.digest,
            "calibration": calibration.evaluation if calibration else None,
        }
        target = f"store/selections/{short(step.ledger.key('select', inputs))}"

        def work() -> Mapping[str, str]:
            selection = select_from(
                folder, label_set, experiment.selection, seed=experiment.seed, labels=key, calibration=calibration
            )
            if selection.kept == 0:
                wanted = f"{', or selection.precision' if calibration else ''}"
                raise DataError(
                    f"generation {generation}: the teacher labelled no image with confidence above "
                    f"selection.min_confidence = {experiment.selection.min_confidence}{wanted}; lower it, or train a better teacher"
                )
            selection.write(step.root, f"{target}/{SELECTION}")
            return {"labels": f"{key}/{LABEL_SET}", "selection": f"{target}/{SELECTION}", "teacher": f"{teacher}/{CARD}"}

        step.once("select", inputs, work)
        selection = Selection.read(step.root, f"{target}/{SELECTION}")
        step.say(labelled=label_set.rows, kept=selection.kept, images=selection.images)
        gauges.show_selection(step.root, run, generation, selection, experiment.gate)
        if experiment.registry:
            from ns.labeling.registry import Registry, Tag

            tag = Tag.of(experiment.name, run, generation)
            Registry(experiment.registry.git, experiment.registry.remote).commit(tag, folder, label_set, selection)
            step.say(version=str(tag))
        return target


def gate(config_uri: str, root: str, run: str, data: str, generation: int, teacher: str, student: str) -> str:
    """Compares student and teacher on the held-out images and records the generation. Returns the key of `verdict.json`."""
    with _step("gate", generation, config_uri, root, run, teacher=teacher, linger=True) as step:
        experiment = step.experiment
        from ns.evaluation.result import read_predictions

        teacher_rows, student_rows = (read_predictions(*_evaluation(step, data, model)) for model in (teacher, student))
        if teacher_rows["key"] != student_rows["key"]:
            raise DataError("gate: teacher and student were evaluated on different images; run the evaluation again")
        guarded = None
        if experiment.gate.suites:
            prepared = Prepared.read(step.root, data)
            before, after = (_guarded(step, prepared, model)[0].outputs["robustness"] for model in (teacher, student))
            guarded = Robustness.read(step.root, before), Robustness.read(step.root, after)
        verdict = gates.judge(
            experiment.gate,
            generation=generation,
            teacher=teacher,
            student=student,
            labels=teacher_rows["label"].to_numpy(),
            teacher_correct=teacher_rows["rank"].to_numpy() == 0,
            student_correct=student_rows["rank"].to_numpy() == 0,
            classes=_classes(step.root, data),
            seed=experiment.seed,
            about=_label_facts(step, generation),
            robustness=guarded,
        )
        inputs = _generation_inputs(step, data, generation, teacher)
        key = f"store/verdicts/{short(step.ledger.key('generation', inputs))}/{gates.MANIFEST}"
        # When a student was accepted is no matter of who asks again.
        known = step.root.exists(key) and gates.Verdict.read(step.root, key) == verdict
        verdict.write(step.root, key)
        step.ledger.record("generation", inputs, {"verdict": key}, 0.0)
        step.done({"verdict": key}, reused=known, gain=verdict.gain, promoted=verdict.promoted, reason=verdict.reason)
        gauges.show_verdict(verdict)
        gauges.show_measures(step.root, run, generation)
        return key


def report(config_uri: str, root: str, run: str) -> str:
    """Writes the run's report. Returns its key."""
    with _step("report", 0, config_uri, root, run) as step:
        from ns.reporting.page import write

        key = write(step.root, run)
        if not _watched():
            # On a cluster nobody else keeps the record.
            runs.finish(step.root, run, "succeeded")
        gauges.push_summary(step.root, run, step.experiment.name)
        return key


class Foreseen(NamedTuple):
    """What of an experiment's first generation is done already, whichever run did it."""

    teacher: bool
    """Whether its first teacher is trained."""
    shards: frozenset[str]
    """sha256 of the shards of the pool that this teacher has labelled."""


def foresee(root: Store, experiment: Experiment, labelled: str, pool: Iterable[Shard]) -> Foreseen:
    """Looks into the ledger, with this code. `labelled`: digest of the labelled images; `pool`: shards of the pool.

    A shard with images that the leak guard or `data.exclude` leaves out may be done although it is not in the answer.
    """
    ledger = Ledger(root)
    key = ledger.key("train", _training_inputs(experiment, 0, labelled=labelled))
    entry = ledger.lookup("train", key)
    if entry is None:
        return Foreseen(False, frozenset())
    step = _Step("foresee", 0, "", experiment, root, "", ledger)
    before = _LabelledBefore(step, _model_folder(short(key)), {})
    return Foreseen(True, frozenset(before.of(pool)))


def show_measures(root: str, run: str, generation: int, metrics: Any, answers: Any) -> None:
    """Hands the numbers, the confusion matrix and the ROC curve of a generation's model to Kubeflow, as its `Metrics` and
    `ClassificationMetrics`. Does nothing where a client shows the run itself, as on a laptop."""
    if _watched():
        return
    from ns.reporting import artifacts

    store = open_store(root)
    for name, value in artifacts.generation_metrics(store, run, generation).items():
        metrics.log_metric(name, value)
    if confusion := artifacts.confusion(store, run, generation):
        answers.log_confusion_matrix(*confusion)
    if curve := artifacts.roc(store, run, generation):
        answers.log_roc_curve(*curve)


def show_run(root: str, run: str, page: Any, summary: Any) -> None:
    """Hands the report of the whole run and its tables to Kubeflow, as its `HTML` and `Markdown`; where `show_measures` does."""
    if _watched():
        return
    from ns.reporting import artifacts

    store = open_store(root)
    Path(page.path).write_text(artifacts.run_html(store, run), encoding="utf-8")
    Path(summary.path).write_text(artifacts.run_markdown(store, run), encoding="utf-8")


def show_generation(root: str, run: str, generation: int, page: Any, summary: Any) -> None:
    """Hands a generation's page and tables to Kubeflow, as its `HTML` and `Markdown`; where `show_measures` does."""
    if _watched():
        return
    from ns.reporting import artifacts

    store = open_store(root)
    Path(page.path).write_text(artifacts.generation_html(store, run, generation), encoding="utf-8")
    Path(summary.path).write_text(artifacts.generation_markdown(store, run, generation), encoding="utf-8")


class _Training:
    """A training, by what goes into it."""

    def __init__(
        self, root: Store, ledger: Ledger, experiment: Experiment, data: str, generation: int, teacher: str, labels: str
    ) -> None:
        self.role = experiment.student(generation) if generation else experiment.teacher
        self._root = root
        self._generation = generation
        self._teacher = teacher
        self._seed = _seed(experiment, generation)
        self._prepared = Prepared.read(root, data)
        self._selection = Selection.read(root, f"{labels}/{SELECTION}") if labels else None
        self._inference_batch = experiment.labelling.batch
        self.inputs = _training_inputs(
            experiment,
            generation,
            labelled=self._prepared.labelled.dataset,
            pool=self._prepared.pool.dataset if self._selection else None,
            selection=self._selection.digest if self._selection else None,
            teacher=_model_digest(root, teacher) if teacher else None,
        )
        self.key = short(ledger.key("train", self.inputs))
        self.folder = _model_folder(self.key)

    @property
    def outputs(self) -> dict[str, str]:
        outputs = {"model": f"{self.folder}/{CARD}"}
        if self.role.train.finetune:
            outputs["finetuned"] = f"{self.folder}/{FINETUNED}/{CARD}"
        return outputs

    def do(self, world: "World", run: str) -> None:
        """Trains, as one of the processes of `world`."""
        from ns.training.runner import train_and_save

        if world.first:
            telemetry.serve()
        train_and_save(
            self._root.at(self.folder),
            self._root.at(f"store/checkpoints/{self.key}"),
            self._root,
            self.role,
            self._prepared,
            self._selection,
            generation=self._generation,
            seed=self._seed,
            teacher=self._root.at(self._teacher) if self._teacher else None,
            config_digest=digest(self.inputs["role"]),
            inference_batch=self._inference_batch,
            world=world,
            notes=self._root.at(run),
        )


@dataclass
class _Step:
    """What every step works with."""

    name: str
    generation: int
    run: str
    experiment: Experiment
    root: Store
    note: str
    ledger: Ledger
    started: float = field(default_factory=time.monotonic)
    facts: dict[str, Any] = field(default_factory=dict)

    def once(self, step: str, inputs: Mapping[str, Any], work: Callable[[], Mapping[str, str]]) -> None:
        """Does the work unless the ledger has it, and notes it in the run."""
        entry, reused = self.ledger.once(step, inputs, work)
        self.done(entry.outputs, reused=reused, seconds=entry.seconds)

    def done(self, outputs: dict[str, str], *, reused: bool, seconds: float | None = None, **facts: Any) -> None:
        """Notes the step in the run."""
        spent = time.monotonic() - self.started if seconds is None else seconds
        runs.note(self.root, self.run, self.generation, self.note, outputs, spent, reused=reused)
        self.say(reused=reused, **facts)

    def say(self, **facts: Any) -> None:
        """Adds facts to the line that announces the end of the step."""
        self.facts.update(facts)


@contextmanager
def _step(
    name: str,
    generation: int,
    config_uri: str,
    root: str,
    run: str,
    *,
    shards: str = "",
    teacher: str = "",
    quiet: bool = False,
    linger: bool = False,
) -> Iterator[_Step]:
    """Reads the experiment for a step of a run. With `linger` what it measured can be scraped after its end."""
    note = f"{name}-{shards}" if shards else name
    announced = _announced(name, generation, **({"shards": shards} if shards else {}))
    with announced as facts, _failure_kept(root, run, generation, name, note):
        store = open_store(root)
        step = _Step(
            name=name,
            generation=generation,
            run=run,
            experiment=config.load(config_uri),
            root=store,
            note=note,
            ledger=Ledger(store),
            facts=facts,
        )
        _begin_telemetry(name, generation, run, step.experiment, teacher)
        if name != "train":  # where another process may do the work, and has the port
            telemetry.serve()
        yield step
        if quiet:
            step.say(quiet=True)
    telemetry.end(time.monotonic() - step.started, linger=linger)


def _begin_telemetry(name: str, generation: int, run: str, experiment: Experiment, teacher: str) -> None:
    telemetry.begin(name, generation, run, config_digest=short(runs.digest_of(experiment)), teacher=teacher)


@contextmanager
def _announced(name: str, generation: int, **context: Any) -> Iterator[dict[str, Any]]:
    """Announces begin and end of a step, with the facts that it gives, and gives every failure one line that says what to do.

    A step that was asked to stop, and can go on, ends the process with the exit code of Interrupted.
    """
    log.configure()
    die_with_client()
    started = time.monotonic()
    facts: dict[str, Any] = {}
    with log.bound(step=name, generation=generation, **context):
        logger = log.get()
        logger.info("started", pid=os.getpid())
        try:
            yield facts
        except Interrupted as error:
            # An exit code that says: start me again, and I go on.
            logger.error("failed", error=str(error), exit_code=error.exit_code, pid=os.getpid())
            raise SystemExit(error.exit_code) from error
        except NsError as error:
            logger.error("failed", error=str(error), exit_code=error.exit_code, pid=os.getpid())
            raise
        except Exception as error:
            logger.error("failed", error=f"{type(error).__name__}: {error}", exit_code=1, pid=os.getpid())
            raise
        logger.info("finished", seconds=round(time.monotonic() - started, 3), pid=os.getpid(), **facts)
        global _finished
        _finished = True


def _prepare(experiment: Experiment, root: Store, ledger: Ledger) -> tuple[str, Prepared, bool]:
    """The key of the prepared data, what is there, and whether nothing had to be imported."""
    from ns.stages.prepare import prepare

    prepared, reused = prepare(experiment, root, ledger)
    _look_ahead(experiment, prepared.labelled.open(root)[1].classes)
    key = f"store/prepared/{short(prepared.digest)}/{PREPARED}"
    prepared.write(root, key)
    return key, prepared, reused


def _look_ahead(experiment: Experiment, classes: Sequence[str]) -> None:
    """What only later steps read has to be there now: before them comes a training of days. Raises an NsError that names the field."""

    if experiment.data.exclude:
        with named("data.exclude"):
            read_keys(experiment.data.exclude)
    for index, place in enumerate(experiment.labelling.ensemble):
        with named(f"labelling.ensemble.{index}"):
            card = ModelCard.read(open_store(place), CARD)
            if card.classes != tuple(classes):
                raise ConfigError(f"{place}: has other classes, or another order of them, than data.labelled")
    for name, one in experiment.evaluation.sets.items():
        if one.multi_label:
            with named(f"evaluation.sets.{name}.multi_label"):
                read_uri(one.multi_label)


def _counts(root: Store, prepared: Prepared) -> dict[str, int]:
    """Images of each part."""
    return {part: source.open(root)[1].samples for part, source in prepared.parts.items()}


def _watched() -> bool:
    """Whether a client sees the steps' events, and keeps the run's record. On a cluster nobody does."""
    return bool(os.environ.get(log.EVENTS_VARIABLE))


@contextmanager
def _failure_kept(root: str, run: str, generation: int, step: str, key: str) -> Iterator[None]:
    """Keeps why a step failed, until it is tried again, where no client watches: KFP 2.17 says that one did, never why."""
    if _watched():
        yield
        return
    # The store may be what fails; then the step says so itself, and the log has to do.
    with suppress(NsError):
        runs.forget_failure(open_store(root), run, generation, key=key)
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:
        reason = error if isinstance(error, NsError) else f"{type(error).__name__}: {error}"
        with suppress(NsError):
            runs.note_failure(open_store(root), run, generation, step, reason, key=key)
        raise


def _accuracy(step: _Step, source: Source, model: str, options: EvaluationSet | None = None) -> tuple[Entry, bool]:
    """A model's accuracy on a dataset."""
    inputs: dict[str, Any] = {
        "code": code_digest(*EVALUATION),
        "model": _model_digest(step.root, model),
        "dataset": source.dataset,
    }
    if options and options.classes != "all":
        inputs["scored"] = options.classes
    if options and options.multi_label:
        inputs["multi_label"] = sha256_bytes(read_uri(options.multi_label))
    target = f"store/evaluations/{short(step.ledger.key('evaluate', inputs))}"

    def work() -> Mapping[str, str]:
        from ns.evaluation.accuracy import evaluate
        from ns.evaluation.multi_label import MultiLabels
        from ns.modeling.predictor import Predictor

        folder, dataset = source.open(step.root)
        chosen = options.classes if options else "all"
        scored = None if chosen == "all" else dataset.classes if chosen == "own" else chosen
        batch = step.experiment.labelling.batch
        predictor = Predictor(step.root.at(model), batch=batch, images=dataset.samples, scored=scored)
        several = MultiLabels.read(options.multi_label, predictor.card.classes) if options and options.multi_label else None
        evaluate(predictor, folder, dataset, step.root.at(target), multi_labels=several)
        return {"evaluation": f"{target}/{ACCURACY}"}

    return step.ledger.once("evaluate", inputs, work)


def _guarded(step: _Step, prepared: Prepared, model: str) -> tuple[Entry, bool]:
    """What the gate asks of a model's robustness: on held-out images, never on those that are only reported."""
    experiment = step.experiment
    return _robustness(step, prepared.heldout, model, experiment.guarded if prepared.test else experiment.evaluation)


def _robustness(step: _Step, source: Source, model: str, config: EvaluationConfig) -> tuple[Entry, bool]:
    """What corruptions, perturbations and attacks leave of a model's accuracy on a dataset."""
    from ns.evaluation.robustness import suite

    images = {"dataset": source.dataset, "images": config.images, "seed": config.seed}
    predictions = {"code": code_digest(*ROBUSTNESS), "model": _model_digest(step.root, model), **images}
    inputs = predictions | {"asked": suite.asked(config)}
    target = f"store/robustness/{short(step.ledger.key('robustness', inputs))}"

    def work() -> Mapping[str, str]:
        from ns.modeling.predictor import Predictor

        folder, dataset = source.open(step.root)
        passes = suite.passes(config) * min(dataset.samples, config.images or dataset.samples)
        predictor = Predictor(step.root.at(model), batch=step.experiment.labelling.batch, images=passes)
        units = step.root.at(f"store/robustness/units/{short(digest(predictions))}")
        made = step.root.at(f"store/corrupted/{short(digest(images | {'code': code_digest(*DISTORTING)}))}")
        suite.Suite(predictor, folder, dataset, config, units, made if config.keep_gib else None).run(step.root.at(target))
        return {"robustness": f"{target}/{ROBUST}"}

    return step.ledger.once("robustness", inputs, work)


def _published(step: _Step, name: str, wanted: EvaluationSet, model: str) -> tuple[Entry, bool]:
    """What a ready-made set of corrupted or perturbed images leaves of a model's accuracy."""
    from ns.evaluation.robustness import published as readymade
    from ns.evaluation.robustness import suite

    assert wanted.kind != "images"
    kind, config, folder = wanted.kind, step.experiment.evaluation, open_store(wanted.place)
    dataset = readymade.listing_digest(folder)
    predictions = {
        "code": code_digest(*ROBUSTNESS),
        "model": _model_digest(step.root, model),
        "dataset": dataset,
        "images": config.images,
        "seed": config.seed,
    }
    wide = config.model_copy(update={"suites": ("corruptions", "perturbations")})
    inputs = predictions | {"kind": kind, "asked": suite.asked(wide)}
    target = f"store/robustness/{short(step.ledger.key('published', inputs))}"

    def work() -> Mapping[str, str]:
        from ns.modeling.predictor import Predictor

        predictor = Predictor(step.root.at(model), batch=step.experiment.labelling.batch)
        units = step.root.at(f"store/robustness/units/{short(digest(predictions))}")
        readymade.measure(predictor, folder, kind, name, dataset, config, units, step.root.at(target))
        return {"robustness": f"{target}/{ROBUST}"}

    return step.ledger.once("published", inputs, work)


def _numbers(root: Store, outputs: Mapping[str, str]) -> dict[str, Any]:
    """What the line says that announces an evaluation."""
    heldout = Evaluation.read(root, outputs["evaluation"])
    numbers: dict[str, Any] = {"top1": heldout.top1, "images": heldout.images}
    for name in ("test", "finetuned"):
        if name in outputs:
            numbers[f"{name}_top1"] = Evaluation.read(root, outputs[name]).top1
    if "robustness" in outputs:
        robust = Robustness.read(root, outputs["robustness"])
        if errors := robust.corruption_error():
            numbers["corruption_error"] = sum(errors.values()) / len(errors)
        if robust.perturbations:
            flips = [one.flip_probability for one in robust.perturbations.values()]
            numbers["flip_probability"] = sum(flips) / len(flips)
        if robust.attacks:
            numbers["attacked_top1"] = min(one.top1 for one in robust.attacks)
    return numbers


def _evaluation(step: _Step, data: str, model: str) -> tuple[Store, Evaluation]:
    """A model's evaluation on the held-out images."""
    entry, _ = _accuracy(step, Prepared.read(step.root, data).heldout, model)
    key = entry.outputs["evaluation"]
    return step.root.at(key.rpartition("/")[0]), Evaluation.read(step.root, key)


def _calibration(step: _Step, data: str, teacher: str) -> Calibration | None:
    """The teacher's thresholds for the precision that the selection asks for, from its evaluation on the held-out images."""
    policy = step.experiment.selection
    if policy.precision is None:
        return None
    return runs.calibrated(*_evaluation(step, data, teacher), policy)


def _label_facts(step: _Step, generation: int) -> gates.LabelFacts:
    """What the gate asks of the generation's labels; reads them only if it asks."""
    asked = step.experiment.gate
    facts = gates.LabelFacts()
    compares = generation > 1 and (asked.max_churn is not None or asked.max_class_shrinkage is not None)
    if not compares and asked.min_audited_precision is None:
        return facts
    own = runs.generation_labels(step.root, step.run, generation)
    if compares and (before := runs.labels_before(step.root, step.run, generation)):
        diff = compare(before.side, own.side, flips=0)
        facts = facts._replace(churn=diff.churn, shrinkage=diff.shrinkage, shrunk=diff.shrunk)
    audit = deciding(audits(own.folder, own.label_set), own.selection)
    if audit is not None:
        facts = facts._replace(audited=(audit.precision, audit.precision_low, audit.looked))
    return facts


def _first_teacher(step: _Step, data: str) -> str:
    """Key of the folder of the experiment's first teacher, trained or not."""
    return _Training(step.root, step.ledger, step.experiment, data, 0, "", "").folder


def _refused_before(step: _Step, data: str, teacher: str) -> bool:
    """Whether this run has been through this very generation, and refused the student."""
    if not step.root.exists(f"{teacher}/{CARD}"):
        return False
    inputs = _generation_inputs(step, data, step.generation, teacher)
    entry = step.ledger.lookup("generation", step.ledger.key("generation", inputs))
    said = [
        note.outputs for note in runs.notes(step.root, step.run) if (note.generation, note.step) == (step.generation, "gate")
    ]
    return entry is not None and entry.outputs in said and not gates.Verdict.read(step.root, entry.outputs["verdict"]).promoted


def _refuse_chance(step: _Step, data: str, teacher: str) -> None:
    _, evaluation = _evaluation(step, data, teacher)
    if not gates.beats_chance(evaluation.top1, evaluation.images, len(evaluation.classes)):
        raise TrainingError(
            f"the first teacher's held-out top-1 is {evaluation.top1:.1%}, no better than chance (1 in "
            f"{len(evaluation.classes)}) on {evaluation.images} images: its pseudo-labels would be noise; "
            "train it longer (teacher.train.epochs), or check data.labelled"
        )


def _generation_inputs(step: _Step, data: str, generation: int, teacher: str) -> dict[str, Any]:
    """What the outcome of a generation depends on: the same teacher, data and settings need no second trip."""
    experiment = step.experiment
    guarded = {"evaluation": experiment.guarded.model_dump(mode="json", exclude={"sets", "keep_gib"})}
    return (guarded if experiment.gate.suites else {}) | {
        "code": code_digest(*TRAINING, *LABELLING, "evaluation"),
        "data": Prepared.read(step.root, data).digest,
        "generation": generation,
        "teacher": _model_digest(step.root, teacher),
        "student": _training_slice(experiment.student(generation)),
        "seed": experiment.seed,
        "labelling": experiment.labelling.model_dump(mode="json", exclude={"tasks"}) | {"ensemble": _ensemble(step)},
        "exclude": digest(sorted(_excluded(step))),
        "selection": experiment.selection.model_dump(mode="json"),
        "gate": experiment.gate.model_dump(mode="json"),
    }


def _labels_folder(step: _Step, prepared: Prepared, teacher: str) -> str:
    """The folder of a teacher's labels for the pool: shards that are there are done, whoever labelled them."""
    inputs = _labelling(step, teacher) | {
        "dataset": prepared.pool.dataset,
        "left_out": prepared.left_out.report if prepared.left_out else None,
        "exclude": digest(sorted(_excluded(step))),
    }
    return f"store/labels/{short(step.ledger.key('label', inputs))}"


def _labelling(step: _Step, teacher: str) -> dict[str, Any]:
    """What the labels of an image depend on, beside the image."""
    return {
        "code": code_digest(*LABELLING),
        "teacher": _model_digest(step.root, teacher),
        **step.experiment.labelling.model_dump(mode="json", exclude={"tasks"}),
        "ensemble": _ensemble(step),
    }


def _ensemble(step: _Step) -> tuple[str, ...]:
    """Digests of the models that label with the teacher."""
    return tuple(ModelCard.read(open_store(place), CARD).digest for place in step.experiment.labelling.ensemble)


def _excluded(step: _Step) -> frozenset[str]:
    """Keys of the pool that the configuration excludes."""
    place = step.experiment.data.exclude
    return read_keys(place) if place else frozenset()


def _left_out(step: _Step, prepared: Prepared, pool: Store, shards: Iterable[Shard]) -> dict[str, dict[int, str]]:
    """sha256 of a shard → row → why that image gets no label."""
    found = left_out(step.root.at(prepared.left_out.ref)) if prepared.left_out else {}
    if excluded := _excluded(step):
        for shard in shards:
            rows = {
                row: "excluded by data.exclude" for row, key in enumerate(ShardIndex.read(pool, shard).keys) if key in excluded
            }
            if rows:
                found[shard.sha256] = found.get(shard.sha256, {}) | rows
    return found


class _LabelledBefore:
    """Shards that the same teacher has labelled as part of another pool: a pool that has grown costs only what is new."""

    def __init__(self, step: _Step, teacher: str, left_out: Mapping[str, Mapping[int, str]]) -> None:
        self._root, self._ledger = step.root, step.ledger
        self._labelling = _labelling(step, teacher)
        self._left_out = left_out

    def find(self, shard: Shard) -> tuple[Store, LabelShard] | None:
        entry = self._ledger.lookup("label-shard", self._ledger.key("label-shard", self._inputs(shard)))
        if entry is None:
            return None
        folder, _, name = entry.outputs["facts"].rpartition("/")
        return self._root.at(folder), LabelShard.read(self._root.at(folder), name)

    def of(self, shards: Iterable[Shard]) -> Iterator[str]:
        """sha256 of those that are labelled."""
        known = self._ledger.recorded("label-shard")
        for shard in shards:
            if self._ledger.key("label-shard", self._inputs(shard)) in known:
                yield shard.sha256

    def note(self, folder: str, shards: Iterable[Shard]) -> None:
        for shard in shards:
            self._ledger.record("label-shard", self._inputs(shard), {"facts": f"{folder}/{marker(shard.name)}"}, 0.0)

    def _inputs(self, shard: Shard) -> dict[str, Any]:
        reasons = {str(row): reason for row, reason in self._left_out.get(shard.sha256, {}).items()}
        return self._labelling | {"shard": shard.sha256, "left_out": reasons and digest(reasons)}


def _training_inputs(
    experiment: Experiment,
    generation: int,
    *,
    labelled: str,
    pool: str | None = None,
    selection: str | None = None,
    teacher: str | None = None,
) -> dict[str, Any]:
    """What a trained model depends on; datasets, selection and teacher by their digests."""
    return {
        "code": code_digest(*TRAINING),
        "role": _training_slice(experiment.student(generation) if generation else experiment.teacher),
        "seed": _seed(experiment, generation),
        "generation": generation,
        "labelled": labelled,
        "pool": pool,
        "selection": selection,
        "teacher": teacher,
    }


def _model_folder(key: str) -> str:
    return f"store/models/{key}"


def _training_slice(role: RoleConfig) -> dict[str, Any]:
    """A role without what changes how fast it trains, but not what comes out."""
    fields = role.model_dump(mode="json", exclude={"preset"})
    for name in ("checkpoint_seconds", "checkpoints_kept", "loader_workers", "processes", "tensorboard"):
        fields["train"].pop(name, None)
    if role.train.init_place:
        fields["train"]["init"] = weights_digest(role.train.init_place)
    return fields


def _seed(experiment: Experiment, generation: int) -> int:
    """Each training has its own draws of weights, order and noise."""
    return experiment.seed * 64 + generation


def _model_digest(root: Store, model: str) -> str:
    return ModelCard.read(root.at(model), CARD).digest


def _classes(root: Store, data: str) -> tuple[str, ...]:
    return Prepared.read(root, data).labelled.open(root)[1].classes
