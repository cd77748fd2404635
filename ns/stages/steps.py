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
from ns.core.digest import (
    DISTORTION_SOURCES,
    EVALUATION_SOURCES,
    LABELING_SOURCES,
    ROBUSTNESS_SOURCES,
    TRAINING_SOURCES,
    digest_code,
    digest_json,
    sha256_bytes,
    shorten_digest,
)
from ns.core.errors import ConfigError, DataError, Interrupted, NsError, TrainingError, prefix_errors
from ns.core.process import die_with_client
from ns.data.dataset import Shard
from ns.data.index import ShardIndex
from ns.data.key_list import read_keys
from ns.data.leakage import load_left_out_rows
from ns.data.prepared import MANIFEST as PREPARED
from ns.data.prepared import PreparedData, PreparedDataset
from ns.evaluation import gate as gates
from ns.evaluation.result import MANIFEST as ACCURACY
from ns.evaluation.result import ROBUSTNESS as ROBUST
from ns.evaluation.result import Evaluation, Robustness
from ns.labeling.audit import choose_deciding_audit, load_audits
from ns.labeling.diff import compare_label_sets
from ns.labeling.label_set import MANIFEST as LABEL_SET
from ns.labeling.label_set import LabelShard, join_label_shards, label_shard_key
from ns.labeling.selection import MANIFEST as SELECTION
from ns.labeling.selection import Selection, make_selection
from ns.labeling.thresholds import Thresholds
from ns.modeling.manifest import FINETUNED, ModelManifest, digest_weights
from ns.modeling.manifest import MANIFEST as CARD
from ns.reporting import run_metrics as gauges
from ns.runs import records as runs
from ns.storage import Store, open_store, read_uri
from ns.storage.ledger import Ledger, LedgerEntry

if TYPE_CHECKING:
    from ns.modeling.distributed import World

_stage_finished = False
"""Whether a step of this process came to its end."""


def _exit_executor() -> None:
    """Ends Kubeflow's executor, which by now has written what the step answered, at once: to take apart what torch and timm have loaded
    takes half a second of each step, and the system frees it all in one go. Other processes only do without a last look for garbage."""
    if _stage_finished and os.environ.get("_KFP_RUNTIME") == "true" and not hasattr(sys, "last_type"):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    gc.freeze()


# Registered before torch is loaded, it is called after what torch has registered.
atexit.register(_exit_executor)

STOP = "stop"
"""What `resolve` answers when the loop is over."""
TRAIN = "train"
"""In the place of a teacher that is still to be trained."""


def start_run(
    config_uri: str, root: str, run: str, overrides: Sequence[str] = (), fields: Mapping[str, str | int] | None = None
) -> tuple[str, str]:
    """Opens a run, or opens it again: reads the experiment (a URI or a preset), changes what is asked for, and keeps it in the run.

    `overrides` are `a.b=c`; `fields` are values by field (`data.pool`), an empty one or 0 as the experiment has it. Without a name the
    run gets one that is made from the experiment. Returns the URI of the experiment as it is kept, and the run's name.
    """
    log.configure_logging()
    die_with_client()
    store = open_store(root)
    experiment = config.load_with_overrides(config_uri, overrides, fields)
    name = run or runs.derive_run_name(experiment)
    runs.open_run(store, name, experiment, __version__)
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
    config_uri: str, root: str, run: str, overrides: Sequence[str] = (), fields: Mapping[str, str | int] | None = None
) -> NextGeneration:
    """Opens the run of one more generation, which goes on from the student that a gate accepted last in any run of the experiment of
    this name; without one, the generation is the first and its teacher is to be trained. Prepares the data as `prepare_data` does.

    Without a name the run gets one that is made from the experiment, its data and the teacher: it is another run as soon as one of
    them is. If this run has refused a student of just these already, there is nothing to do. Raises DataError if the accepted model
    knows other classes.
    """
    with announce_stage("start-generation", 0) as log_fields:
        started = time.monotonic()
        store = open_store(root)
        ledger = Ledger(store)
        experiment = config.load_with_overrides(config_uri, overrides, fields)
        data, prepared, reused = _prepare_datasets(experiment, store, ledger)
        seconds = time.monotonic() - started
        latest = runs.find_accepted_student(store, experiment.name)
        generation = latest.generation + 1 if latest else 1
        manifest = ModelManifest.load_file(store.at(latest.model), CARD) if latest else None
        if manifest and manifest.classes != read_labeled_classes(store, data):
            raise DataError(
                f"data.labeled: {experiment.data.labeled}: its classes are not those of the model that was accepted last (run "
                f"{latest.run if latest else ''}); give the experiment another name, to begin with a teacher of these"
            )
        name = run or runs.derive_generation_name(
            experiment, generation, prepared.digest, manifest.digest if manifest else None
        )
        runs.open_run(store, name, experiment, __version__)
        context = StageContext("start-generation", generation, name, experiment, store, "start-generation", ledger)
        runs.write_stage_note(store, name, 0, "prepare-data", {"data": data}, seconds, reused=reused)
        if latest:
            runs.record_inherited_teacher(store, name, latest)
        teacher = latest.model if latest else locate_first_teacher(context, data)
        if was_student_refused(context, data, teacher):
            log.get_logger().info("nothing new: with these data, settings and teacher the student was refused", run=name)
            teacher = STOP
        elif not latest:
            teacher = TRAIN
        log_fields.update(reused=reused, **_count_images(store, prepared))
        return NextGeneration(f"{store.uri}/{name}/{runs.CONFIG}", name, data, generation, generation - 1, teacher)


def prepare_data(config_uri: str, root: str, run: str) -> str:
    """Checks the experiment, finds or imports the three datasets. Returns the key of `prepared.json`."""
    with stage("prepare-data", 0, config_uri, root, run) as context:
        key, prepared, reused = _prepare_datasets(context.experiment, context.root, context.ledger)
        context.write_note({"data": key}, reused=reused, **_count_images(context.root, prepared))
        return key


def train_generation(
    config_uri: str,
    root: str,
    run: str,
    data: str,
    generation: int,
    teacher: str = "",
    selection: str = "",
    *,
    launch_remote: Callable[[str, Sequence[str]], None] | None = None,
) -> str:
    """Trains the first teacher (generation 0), or a student of `teacher` on the selection in `labels`.

    `elsewhere(key, arguments)` runs `python -m ns.training.worker ARGUMENTS` in processes on other machines until they have ended; `key`, 16 hex
    digits, is this training's and no other's. Without it the processes are on this machine. Returns the key of the model's folder.
    Raises TrainingError when training cannot go on.
    """
    with stage("train", generation, config_uri, root, run, teacher=teacher) as context:
        training = _Training(context.root, context.ledger, context.experiment, data, generation, teacher, selection)
        arguments = [config_uri, root, run, data, str(generation), teacher, selection]

        def run_training() -> Mapping[str, str]:
            if launch_remote:
                launch_remote(training.training_id, arguments)
                return training.outputs
            from ns.modeling.distributed import SINGLE, count_local_processes, launch_processes

            processes = count_local_processes(training.role.train.processes)
            if processes > 1:
                launch_processes(processes, "ns.training.worker", arguments)
            else:
                training.train_as_rank(SINGLE, run)
            return training.outputs

        context.get_or_run("train", training.inputs, run_training)
        manifest = ModelManifest.load_file(context.root.at(training.model_key), CARD)
        context.add_log_fields(parameters=manifest.parameters, steps=manifest.steps)
        return training.model_key


def join_training(config_uri: str, root: str, run: str, data: str, generation: int, teacher: str, selection: str) -> None:
    """Trains as one of the processes that torchrun started. Only trains: whoever started them records the result."""
    from ns.modeling.distributed import FAILURE_VARIABLE, process_group, report_failure

    die_with_client()
    # Told before the group is left: the others fail for that reason only.
    with process_group() as world, report_failure(), log.bind_context(step="train", generation=generation):
        log.configure_logging() if world.is_main else log.configure_helper_logging()
        try:
            store, experiment = open_store(root), config.load_experiment(config_uri)
            begin_telemetry("train", generation, run, experiment, teacher)
            _Training(store, Ledger(store), experiment, data, generation, teacher, selection).train_as_rank(world, run)
        except NsError as error:
            if not os.environ.get(FAILURE_VARIABLE):
                # Whoever started these processes is on another machine, and has nothing of them but their log.
                log.get_logger().error("failed", error=str(error), exit_code=error.exit_code)
            raise


def evaluate_generation(config_uri: str, root: str, run: str, data: str, generation: int, model: str) -> str:
    """Evaluates a model on the held-out images, and on whatever else the experiment asks for; a fine-tuned form of it, if it has one,
    on clean images only: corruptions are measured without it, as in the paper. Returns the key of the model's `evaluation.json`."""
    with stage("evaluate", generation, config_uri, root, run) as context:
        prepared, evaluation_config = PreparedData.load_file(context.root, data), context.experiment.evaluation
        entries: dict[str, tuple[LedgerEntry, bool]] = {"evaluation": _measure_accuracy(context, prepared.heldout, model)}
        # All else may take hours.
        telemetry.EVALUATED.labels("heldout").set(
            Evaluation.load_file(context.root, entries["evaluation"][0].outputs["evaluation"]).top1
        )
        if prepared.test:
            entries["test"] = _measure_accuracy(context, prepared.test, model)
        finetuned = f"{model}/{FINETUNED}"
        if context.root.exists(f"{finetuned}/{CARD}"):
            entries["finetuned"] = _measure_accuracy(context, prepared.heldout, finetuned)
            if prepared.test:
                entries["finetuned_test"] = _measure_accuracy(context, prepared.test, finetuned)
        for name, source in prepared.sets.items():
            entries[f"set:{name}"] = _measure_accuracy(context, source, model, evaluation_config.sets[name])
        for name, set_config in evaluation_config.sets.items():
            if set_config.kind != "images":
                entries[f"set:{name}"] = _measure_published_set(context, name, set_config, model)
        if evaluation_config.needs_robustness:
            entries["robustness"] = _measure_robustness(context, prepared.reported_set, model, evaluation_config)
        if context.experiment.gate.required_suites:
            entries["guarded"] = measure_gate_robustness(context, prepared, model)
        outputs = {name: next(iter(entry.outputs.values())) for name, (entry, _) in entries.items()}
        context.write_note(
            outputs,
            reused=all(reused for _, reused in entries.values()),
            seconds=sum(entry.seconds for entry, _ in entries.values()),
            **_summarize_evaluation(context.root, outputs),
        )
        gauges.publish_evaluation(context.root, run, generation)
        return outputs["evaluation"]


def next_teacher(config_uri: str, root: str, run: str, data: str, generation: int, first_teacher: str) -> str:
    """Says whether generation `generation` takes place: the key of its teacher, or STOP.

    `first_teacher` is the model that the run began with, TRAIN for the one that it trained itself, STOP if it was over before it began.
    Raises TrainingError if the first teacher has learnt nothing: pseudo-labels of chance would only waste the student.
    """
    with stage("resolve", generation, config_uri, root, run, quiet=True) as context:
        if first_teacher == STOP:
            return STOP
        teacher = locate_first_teacher(context, data) if first_teacher == TRAIN else first_teacher
        first_generation = ModelManifest.load_file(context.root.at(teacher), CARD).generation
        if generation - first_generation > context.experiment.generations:
            return STOP
        if generation == 1:
            _check_beats_chance(context, data, teacher)
        for earlier in range(first_generation + 1, generation):
            inputs = generation_inputs(context, data, earlier, teacher)
            ledger_entry = context.ledger.find_entry("generation", context.ledger.compute_digest("generation", inputs))
            if ledger_entry is None:
                return STOP
            verdict = gates.Verdict.load_file(context.root, ledger_entry.outputs["verdict"])
            if not verdict.promoted:
                return STOP
            teacher = verdict.student
        return teacher


def plan_labels(config_uri: str, root: str, run: str, data: str, generation: int) -> list[str]:
    """Splits the pool into ranges of shards, `START-STOP` (half open), one per labeling task."""
    with stage("plan-labels", generation, config_uri, root, run, quiet=True) as context:
        _, pool = PreparedData.load_file(context.root, data).pool.open_dataset(context.root)
        shards = len(pool.shards)
        tasks = min(context.experiment.labeling.tasks, shards)
        bounds = [index * shards // tasks for index in range(tasks + 1)]
        return [f"{start}-{stop}" for start, stop in pairwise(bounds)]


def label_shard_range(config_uri: str, root: str, run: str, data: str, generation: int, teacher: str, shard_range: str) -> str:
    """Labels one range of shards of the pool, leaving out shards that are done. Returns the range."""
    with stage("label-shards", generation, config_uri, root, run, shards=shard_range, teacher=teacher) as context:
        start, stop = (int(bound) for bound in shard_range.split("-"))
        prepared = PreparedData.load_file(context.root, data)
        pool_store, pool = prepared.pool.open_dataset(context.root)
        key = label_set_key(context, prepared, teacher)
        label_store = context.root.at(key)
        shard_indices = range(start, stop)
        images = sum(pool.shards[index].samples for index in shard_indices)
        reused = all(label_store.exists(label_shard_key(pool.shards[index].name)) for index in shard_indices)
        if not reused:
            from ns.labeling import predict
            from ns.modeling.predictor import Predictor

            labeling_config = context.experiment.labeling
            model_stores = [context.root.at(teacher), *map(open_store, labeling_config.ensemble)]
            predictors = [
                Predictor(model_store, batch=labeling_config.batch, images=images, views=labeling_config.views)
                for model_store in model_stores
            ]
            left_out_rows = _find_left_out(context, prepared, pool_store, [pool.shards[index] for index in shard_indices])
            labeled_shards = _LabeledShardIndex(context, teacher, left_out_rows)
            predict.label_pool_shards(
                predictors,
                pool_store,
                pool,
                label_store,
                shard_indices,
                labeling_config,
                left_out=left_out_rows,
                find_existing=labeled_shards.find_shard,
            )
            labeled_shards.record_shards(key, [pool.shards[index] for index in shard_indices])
        context.write_note({}, reused=reused, images=images)
        return shard_range


def commit_labels(config_uri: str, root: str, run: str, data: str, generation: int, teacher: str) -> str:
    """Joins the labeled shards into a label set, selects from it, and keeps a version of both if there is a registry.

    Returns the key of the selection's folder.
    """
    with stage("commit-labels", generation, config_uri, root, run, teacher=teacher, linger=True) as context:
        experiment = context.experiment
        prepared = PreparedData.load_file(context.root, data)
        _, pool = prepared.pool.open_dataset(context.root)
        key = label_set_key(context, prepared, teacher)
        label_store = context.root.at(key)
        teacher_digest = read_model_digest(context.root, teacher)
        classes = read_labeled_classes(context.root, data)
        label_set = join_label_shards(
            label_store,
            pool,
            teacher=teacher_digest,
            code=digest_code(*LABELING_SOURCES),
            classes=classes,
            top_k=experiment.labeling.top_k,
            views=experiment.labeling.views,
            ensemble=ensemble_digests(context),
            probabilities=experiment.labeling.probabilities,
        )
        label_set.save_file(label_store, LABEL_SET)
        thresholds = _compute_teacher_thresholds(context, data, teacher)
        inputs = {
            "code": digest_code("labeling/selection.py", "labeling/label_set.py", "labeling/thresholds.py"),
            "policy": experiment.selection.model_dump(mode="json"),
            "seed": experiment.seed,
            "label_set": label_set.digest,
            "calibration": thresholds.evaluation if thresholds else None,
        }
        selection_key = f"store/selections/{shorten_digest(context.ledger.compute_digest('select', inputs))}"

        def write_selection() -> Mapping[str, str]:
            selection = make_selection(
                label_store, label_set, experiment.selection, seed=experiment.seed, label_set_key=key, thresholds=thresholds
            )
            if selection.kept == 0:
                precision_hint = f"{', or selection.precision' if thresholds else ''}"
                raise DataError(
                    f"generation {generation}: the teacher labeled no image with confidence above "
                    f"selection.min_confidence = {experiment.selection.min_confidence}{precision_hint}; lower it, or train a better teacher"
                )
            selection.save_file(context.root, f"{selection_key}/{SELECTION}")
            return {"labels": f"{key}/{LABEL_SET}", "selection": f"{selection_key}/{SELECTION}", "teacher": f"{teacher}/{CARD}"}

        context.get_or_run("select", inputs, write_selection)
        selection = Selection.load_file(context.root, f"{selection_key}/{SELECTION}")
        context.add_log_fields(labeled=label_set.rows, kept=selection.kept, images=selection.images)
        gauges.publish_selection(context.root, run, generation, selection, experiment.gate)
        if experiment.registry:
            from ns.labeling.registry import LabelRegistry, VersionTag

            tag = VersionTag.from_parts(experiment.name, run, generation)
            LabelRegistry(experiment.registry.git, experiment.registry.remote).commit_version(
                tag, label_store, label_set, selection
            )
            context.add_log_fields(version=str(tag))
        return selection_key


def gate_generation(config_uri: str, root: str, run: str, data: str, generation: int, teacher: str, student: str) -> str:
    """Compares student and teacher on the held-out images and records the generation. Returns the key of `verdict.json`."""
    with stage("gate", generation, config_uri, root, run, teacher=teacher, linger=True) as context:
        experiment = context.experiment
        from ns.evaluation.result import read_predictions

        teacher_rows, student_rows = (read_predictions(*evaluate_heldout(context, data, model)) for model in (teacher, student))
        if teacher_rows["key"] != student_rows["key"]:
            raise DataError("gate: teacher and student were evaluated on different images; run the evaluation again")
        robustness = None
        if experiment.gate.required_suites:
            prepared = PreparedData.load_file(context.root, data)
            teacher_robustness, student_robustness = (
                measure_gate_robustness(context, prepared, model)[0].outputs["robustness"] for model in (teacher, student)
            )
            robustness = (
                Robustness.load_file(context.root, teacher_robustness),
                Robustness.load_file(context.root, student_robustness),
            )
        verdict = gates.evaluate_gate(
            experiment.gate,
            generation=generation,
            teacher=teacher,
            student=student,
            class_ids=teacher_rows["label"].to_numpy(),
            teacher_correct=teacher_rows["rank"].to_numpy() == 0,
            student_correct=student_rows["rank"].to_numpy() == 0,
            classes=read_labeled_classes(context.root, data),
            seed=experiment.seed,
            label_quality=_collect_label_evidence(context, generation),
            robustness=robustness,
        )
        inputs = generation_inputs(context, data, generation, teacher)
        key = f"store/verdicts/{shorten_digest(context.ledger.compute_digest('generation', inputs))}/{gates.MANIFEST}"
        # When a student was accepted is no matter of who asks again.
        is_unchanged = context.root.exists(key) and gates.Verdict.load_file(context.root, key) == verdict
        verdict.save_file(context.root, key)
        context.ledger.record_entry("generation", inputs, {"verdict": key}, 0.0)
        context.write_note(
            {"verdict": key}, reused=is_unchanged, gain=verdict.gain, promoted=verdict.promoted, reason=verdict.reason
        )
        gauges.publish_verdict(verdict)
        gauges.publish_evaluation(context.root, run, generation)
        return key


def report_run(config_uri: str, root: str, run: str) -> str:
    """Writes the run's report. Returns its key."""
    with stage("report", 0, config_uri, root, run) as context:
        from ns.reporting.page import write_report

        key = write_report(context.root, run)
        if not has_client():
            # On a cluster nobody else keeps the record.
            runs.finish_run(context.root, run, "succeeded")
        gauges.push_run_summary(context.root, run, context.experiment.name)
        return key


class FirstGenerationProgress(NamedTuple):
    """What of an experiment's first generation is done already, whichever run did it."""

    teacher: bool
    """Whether its first teacher is trained."""
    labeled_shards: frozenset[str]
    """sha256 of the shards of the pool that this teacher has labeled."""


def find_finished_work(root: Store, experiment: Experiment, labeled: str, pool: Iterable[Shard]) -> FirstGenerationProgress:
    """Looks into the ledger, with this code. `labeled`: digest of the labeled images; `pool`: shards of the pool.

    A shard with images that the leak guard or `data.exclude` leaves out may be done although it is not in the answer.
    """
    ledger = Ledger(root)
    key = ledger.compute_digest("train", training_inputs(experiment, 0, labeled=labeled))
    entry = ledger.find_entry("train", key)
    if entry is None:
        return FirstGenerationProgress(False, frozenset())
    context = StageContext("foresee", 0, "", experiment, root, "", ledger)
    labeled_shards = _LabeledShardIndex(context, model_key(shorten_digest(key)), {})
    return FirstGenerationProgress(True, frozenset(labeled_shards.list_labeled(pool)))


def publish_generation_metrics(root: str, run: str, generation: int, metrics: Any, classification_metrics: Any) -> None:
    """Hands the numbers, the confusion matrix and the ROC curve of a generation's model to Kubeflow, as its `Metrics` and
    `ClassificationMetrics`. Does nothing where a client shows the run itself, as on a laptop."""
    if has_client():
        return
    from ns.reporting import artifacts

    store = open_store(root)
    for name, value in artifacts.collect_generation_metrics(store, run, generation).items():
        metrics.log_metric(name, value)
    if confusion := artifacts.read_confusion(store, run, generation):
        classification_metrics.log_confusion_matrix(*confusion)
    if curve := artifacts.compute_roc(store, run, generation):
        classification_metrics.log_roc_curve(*curve)


def publish_run_report(root: str, run: str, page: Any, summary: Any) -> None:
    """Hands the report of the whole run and its tables to Kubeflow, as its `HTML` and `Markdown`; where `show_measures` does."""
    if has_client():
        return
    from ns.reporting import artifacts

    store = open_store(root)
    Path(page.path).write_text(artifacts.render_run_html(store, run), encoding="utf-8")
    Path(summary.path).write_text(artifacts.render_run_markdown(store, run), encoding="utf-8")


def publish_generation_report(root: str, run: str, generation: int, page: Any, summary: Any) -> None:
    """Hands a generation's page and tables to Kubeflow, as its `HTML` and `Markdown`; where `show_measures` does."""
    if has_client():
        return
    from ns.reporting import artifacts

    store = open_store(root)
    Path(page.path).write_text(artifacts.render_generation_html(store, run, generation), encoding="utf-8")
    Path(summary.path).write_text(artifacts.render_generation_markdown(store, run, generation), encoding="utf-8")


class _Training:
    """A training, by what goes into it."""

    def __init__(
        self, root: Store, ledger: Ledger, experiment: Experiment, data: str, generation: int, teacher: str, selection: str
    ) -> None:
        self.role = experiment.get_student(generation) if generation else experiment.teacher
        self._root = root
        self._generation = generation
        self._teacher = teacher
        self._seed = training_seed(experiment, generation)
        self._prepared = PreparedData.load_file(root, data)
        self._selection = Selection.load_file(root, f"{selection}/{SELECTION}") if selection else None
        self._inference_batch = experiment.labeling.batch
        self.inputs = training_inputs(
            experiment,
            generation,
            labeled=self._prepared.labeled.digest,
            pool=self._prepared.pool.digest if self._selection else None,
            selection=self._selection.digest if self._selection else None,
            teacher=read_model_digest(root, teacher) if teacher else None,
        )
        self.training_id = shorten_digest(ledger.compute_digest("train", self.inputs))
        self.model_key = model_key(self.training_id)

    @property
    def outputs(self) -> dict[str, str]:
        outputs = {"model": f"{self.model_key}/{CARD}"}
        if self.role.train.finetune:
            outputs["finetuned"] = f"{self.model_key}/{FINETUNED}/{CARD}"
        return outputs

    def train_as_rank(self, world: "World", run: str) -> None:
        """Trains, as one of the processes of `world`."""
        from ns.training.runner import train_and_save

        if world.is_main:
            telemetry.serve_metrics()
        train_and_save(
            self._root.at(self.model_key),
            self._root.at(f"store/checkpoints/{self.training_id}"),
            self._root,
            self.role,
            self._prepared,
            self._selection,
            generation=self._generation,
            seed=self._seed,
            teacher=self._root.at(self._teacher) if self._teacher else None,
            config_digest=digest_json(self.inputs["role"]),
            inference_batch=self._inference_batch,
            world=world,
            run_store=self._root.at(run),
        )


@dataclass
class StageContext:
    """What every step works with."""

    name: str
    generation: int
    run: str
    experiment: Experiment
    root: Store
    note_name: str
    ledger: Ledger
    started: float = field(default_factory=time.monotonic)
    log_fields: dict[str, Any] = field(default_factory=dict)

    def get_or_run(self, stage_name: str, inputs: Mapping[str, Any], work: Callable[[], Mapping[str, str]]) -> None:
        """Does the work unless the ledger has it, and notes it in the run."""
        entry, reused = self.ledger.get_or_run(stage_name, inputs, work)
        self.write_note(entry.outputs, reused=reused, seconds=entry.seconds)

    def write_note(self, outputs: dict[str, str], *, reused: bool, seconds: float | None = None, **log_fields: Any) -> None:
        """Notes the step in the run."""
        spent = time.monotonic() - self.started if seconds is None else seconds
        runs.write_stage_note(self.root, self.run, self.generation, self.note_name, outputs, spent, reused=reused)
        self.add_log_fields(reused=reused, **log_fields)

    def add_log_fields(self, **log_fields: Any) -> None:
        """Adds facts to the line that announces the end of the step."""
        self.log_fields.update(log_fields)


@contextmanager
def stage(
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
) -> Iterator[StageContext]:
    """Reads the experiment for a step of a run. With `linger` what it measured can be scraped after its end."""
    note_name = f"{name}-{shards}" if shards else name
    announcement = announce_stage(name, generation, **({"shards": shards} if shards else {}))
    with announcement as log_fields, _keep_failure(root, run, generation, name, note_name):
        store = open_store(root)
        context = StageContext(
            name=name,
            generation=generation,
            run=run,
            experiment=config.load_experiment(config_uri),
            root=store,
            note_name=note_name,
            ledger=Ledger(store),
            log_fields=log_fields,
        )
        begin_telemetry(name, generation, run, context.experiment, teacher)
        if name != "train":  # where another process may do the work, and has the port
            telemetry.serve_metrics()
        yield context
        if quiet:
            context.add_log_fields(quiet=True)
    telemetry.end_stage(time.monotonic() - context.started, linger=linger)


def begin_telemetry(name: str, generation: int, run: str, experiment: Experiment, teacher: str) -> None:
    telemetry.begin_stage(
        name, generation, run, config_digest=shorten_digest(runs.digest_experiment(experiment)), teacher=teacher
    )


@contextmanager
def announce_stage(name: str, generation: int, **bound_fields: Any) -> Iterator[dict[str, Any]]:
    """Announces begin and end of a step, with the facts that it gives, and gives every failure one line that says what to do.

    A step that was asked to stop, and can go on, ends the process with the exit code of Interrupted.
    """
    log.configure_logging()
    die_with_client()
    started = time.monotonic()
    log_fields: dict[str, Any] = {}
    with log.bind_context(step=name, generation=generation, **bound_fields):
        logger = log.get_logger()
        logger.info("started", pid=os.getpid())
        try:
            yield log_fields
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
        logger.info("finished", seconds=round(time.monotonic() - started, 3), pid=os.getpid(), **log_fields)
        global _stage_finished
        _stage_finished = True


def _prepare_datasets(experiment: Experiment, root: Store, ledger: Ledger) -> tuple[str, PreparedData, bool]:
    """The key of the prepared data, what is there, and whether nothing had to be imported."""
    from ns.stages.prepare import prepare_datasets

    prepared, reused = prepare_datasets(experiment, root, ledger)
    _check_later_inputs(experiment, prepared.labeled.open_dataset(root)[1].classes)
    key = f"store/prepared/{shorten_digest(prepared.digest)}/{PREPARED}"
    prepared.save_file(root, key)
    return key, prepared, reused


def _check_later_inputs(experiment: Experiment, classes: Sequence[str]) -> None:
    """What only later steps read has to be there now: before them comes a training of days. Raises an NsError that names the field."""

    if experiment.data.exclude:
        with prefix_errors("data.exclude"):
            read_keys(experiment.data.exclude)
    for index, uri in enumerate(experiment.labeling.ensemble):
        with prefix_errors(f"labeling.ensemble.{index}"):
            manifest = ModelManifest.load_file(open_store(uri), CARD)
            if manifest.classes != tuple(classes):
                raise ConfigError(f"{uri}: has other classes, or another order of them, than data.labeled")
    for name, set_config in experiment.evaluation.sets.items():
        if set_config.multi_label:
            with prefix_errors(f"evaluation.sets.{name}.multi_label"):
                read_uri(set_config.multi_label)


def _count_images(root: Store, prepared: PreparedData) -> dict[str, int]:
    """Images of each part."""
    return {part: source.open_dataset(root)[1].samples for part, source in prepared.parts.items()}


def has_client() -> bool:
    """Whether a client sees the steps' events, and keeps the run's record. On a cluster nobody does."""
    return bool(os.environ.get(log.EVENTS_VARIABLE))


@contextmanager
def _keep_failure(root: str, run: str, generation: int, stage_name: str, note_name: str) -> Iterator[None]:
    """Keeps why a step failed, until it is tried again, where no client watches: KFP 2.17 says that one did, never why."""
    if has_client():
        yield
        return
    # The store may be what fails; then the step says so itself, and the log has to do.
    with suppress(NsError):
        runs.delete_stage_failure(open_store(root), run, generation, note_name=note_name)
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:
        reason = error if isinstance(error, NsError) else f"{type(error).__name__}: {error}"
        with suppress(NsError):
            runs.write_stage_failure(open_store(root), run, generation, stage_name, reason, note_name=note_name)
        raise


def _measure_accuracy(
    context: StageContext, source: PreparedDataset, model: str, options: EvaluationSet | None = None
) -> tuple[LedgerEntry, bool]:
    """A model's accuracy on a dataset."""
    inputs: dict[str, Any] = {
        "code": digest_code(*EVALUATION_SOURCES),
        "model": read_model_digest(context.root, model),
        "dataset": source.digest,
    }
    if options and options.classes != "all":
        inputs["scored"] = options.classes
    if options and options.multi_label:
        inputs["multi_label"] = sha256_bytes(read_uri(options.multi_label))
    evaluation_key = f"store/evaluations/{shorten_digest(context.ledger.compute_digest('evaluate', inputs))}"

    def run_evaluation() -> Mapping[str, str]:
        from ns.evaluation.accuracy import evaluate_accuracy
        from ns.evaluation.multi_label import MultiLabels
        from ns.modeling.predictor import Predictor

        dataset_store, dataset = source.open_dataset(context.root)
        class_choice = options.classes if options else "all"
        scored = None if class_choice == "all" else dataset.classes if class_choice == "own" else class_choice
        batch = context.experiment.labeling.batch
        predictor = Predictor(context.root.at(model), batch=batch, images=dataset.samples, scored_classes=scored)
        multi_labels = (
            MultiLabels.load(options.multi_label, predictor.manifest.classes) if options and options.multi_label else None
        )
        evaluate_accuracy(predictor, dataset_store, dataset, context.root.at(evaluation_key), multi_labels=multi_labels)
        return {"evaluation": f"{evaluation_key}/{ACCURACY}"}

    return context.ledger.get_or_run("evaluate", inputs, run_evaluation)


def measure_gate_robustness(context: StageContext, prepared: PreparedData, model: str) -> tuple[LedgerEntry, bool]:
    """What the gate asks of a model's robustness: on held-out images, never on those that are only reported."""
    experiment = context.experiment
    return _measure_robustness(
        context, prepared.heldout, model, experiment.gate_evaluation if prepared.test else experiment.evaluation
    )


def _measure_robustness(
    context: StageContext, source: PreparedDataset, model: str, config: EvaluationConfig
) -> tuple[LedgerEntry, bool]:
    """What corruptions, perturbations and attacks leave of a model's accuracy on a dataset."""
    from ns.evaluation.robustness import suite

    images = {"dataset": source.digest, "images": config.images, "seed": config.seed}
    predictions = {"code": digest_code(*ROBUSTNESS_SOURCES), "model": read_model_digest(context.root, model), **images}
    inputs = predictions | {"asked": suite.measurement_inputs(config)}
    robustness_key = f"store/robustness/{shorten_digest(context.ledger.compute_digest('robustness', inputs))}"

    def run_suite() -> Mapping[str, str]:
        from ns.modeling.predictor import Predictor

        dataset_store, dataset = source.open_dataset(context.root)
        passes = suite.count_passes(config) * min(dataset.samples, config.images or dataset.samples)
        predictor = Predictor(context.root.at(model), batch=context.experiment.labeling.batch, images=passes)
        unit_store = context.root.at(f"store/robustness/units/{shorten_digest(digest_json(predictions))}")
        corrupted_store = context.root.at(
            f"store/corrupted/{shorten_digest(digest_json(images | {'code': digest_code(*DISTORTION_SOURCES)}))}"
        )
        suite.RobustnessSuite(
            predictor, dataset_store, dataset, config, unit_store, corrupted_store if config.keep_gib else None
        ).run_suite(context.root.at(robustness_key))
        return {"robustness": f"{robustness_key}/{ROBUST}"}

    return context.ledger.get_or_run("robustness", inputs, run_suite)


def _measure_published_set(context: StageContext, name: str, set_config: EvaluationSet, model: str) -> tuple[LedgerEntry, bool]:
    """What a ready-made set of corrupted or perturbed images leaves of a model's accuracy."""
    from ns.evaluation.robustness import published as readymade
    from ns.evaluation.robustness import suite

    assert set_config.kind != "images"
    kind, config, set_store = set_config.kind, context.experiment.evaluation, open_store(set_config.uri)
    dataset = readymade.digest_listing(set_store)
    predictions = {
        "code": digest_code(*ROBUSTNESS_SOURCES),
        "model": read_model_digest(context.root, model),
        "dataset": dataset,
        "images": config.images,
        "seed": config.seed,
    }
    wide_config = config.model_copy(update={"suites": ("corruptions", "perturbations")})
    inputs = predictions | {"kind": kind, "asked": suite.measurement_inputs(wide_config)}
    robustness_key = f"store/robustness/{shorten_digest(context.ledger.compute_digest('published', inputs))}"

    def run_measurement() -> Mapping[str, str]:
        from ns.modeling.predictor import Predictor

        predictor = Predictor(context.root.at(model), batch=context.experiment.labeling.batch)
        unit_store = context.root.at(f"store/robustness/units/{shorten_digest(digest_json(predictions))}")
        readymade.measure_published_set(
            predictor, set_store, kind, name, dataset, config, unit_store, context.root.at(robustness_key)
        )
        return {"robustness": f"{robustness_key}/{ROBUST}"}

    return context.ledger.get_or_run("published", inputs, run_measurement)


def _summarize_evaluation(root: Store, outputs: Mapping[str, str]) -> dict[str, Any]:
    """What the line says that announces an evaluation."""
    heldout = Evaluation.load_file(root, outputs["evaluation"])
    numbers: dict[str, Any] = {"top1": heldout.top1, "images": heldout.images}
    for name in ("test", "finetuned"):
        if name in outputs:
            numbers[f"{name}_top1"] = Evaluation.load_file(root, outputs[name]).top1
    if "robustness" in outputs:
        robust = Robustness.load_file(root, outputs["robustness"])
        if errors := robust.mean_corruption_errors():
            numbers["corruption_error"] = sum(errors.values()) / len(errors)
        if robust.perturbations:
            flips = [item.flip_probability for item in robust.perturbations.values()]
            numbers["flip_probability"] = sum(flips) / len(flips)
        if robust.attacks:
            numbers["attacked_top1"] = min(item.top1 for item in robust.attacks)
    return numbers


def evaluate_heldout(context: StageContext, data: str, model: str) -> tuple[Store, Evaluation]:
    """A model's evaluation on the held-out images."""
    entry, _ = _measure_accuracy(context, PreparedData.load_file(context.root, data).heldout, model)
    key = entry.outputs["evaluation"]
    return context.root.at(key.rpartition("/")[0]), Evaluation.load_file(context.root, key)


def _compute_teacher_thresholds(context: StageContext, data: str, teacher: str) -> Thresholds | None:
    """The teacher's thresholds for the precision that the selection asks for, from its evaluation on the held-out images."""
    policy = context.experiment.selection
    if policy.precision is None:
        return None
    return runs.compute_policy_thresholds(*evaluate_heldout(context, data, teacher), policy)


def _collect_label_evidence(context: StageContext, generation: int) -> gates.LabelQuality:
    """What the gate asks of the generation's labels; reads them only if it asks."""
    gate_config = context.experiment.gate
    evidence = gates.LabelQuality()
    compares = generation > 1 and (gate_config.max_churn is not None or gate_config.max_class_shrinkage is not None)
    if not compares and gate_config.min_audited_precision is None:
        return evidence
    current = runs.open_run_label_set(context.root, context.run, generation)
    if compares and (previous := runs.open_previous_label_set(context.root, context.run, generation)):
        diff = compare_label_sets(previous.side, current.side, flips=0)
        evidence = evidence._replace(churn=diff.churn, shrinkage=diff.shrinkage, shrunk_class=diff.shrunk_class)
    audit = choose_deciding_audit(load_audits(current.store, current.label_set), current.selection)
    if audit is not None:
        evidence = evidence._replace(audited_precision=(audit.precision, audit.precision_low, audit.reviewed))
    return evidence


def locate_first_teacher(context: StageContext, data: str) -> str:
    """Key of the folder of the experiment's first teacher, trained or not."""
    return _Training(context.root, context.ledger, context.experiment, data, 0, "", "").model_key


def was_student_refused(context: StageContext, data: str, teacher: str) -> bool:
    """Whether this run has been through this very generation, and refused the student."""
    if not context.root.exists(f"{teacher}/{CARD}"):
        return False
    inputs = generation_inputs(context, data, context.generation, teacher)
    ledger_entry = context.ledger.find_entry("generation", context.ledger.compute_digest("generation", inputs))
    noted_outputs = [
        note.outputs
        for note in runs.list_stage_notes(context.root, context.run)
        if (note.generation, note.stage) == (context.generation, "gate")
    ]
    return (
        ledger_entry is not None
        and ledger_entry.outputs in noted_outputs
        and not gates.Verdict.load_file(context.root, ledger_entry.outputs["verdict"]).promoted
    )


def _check_beats_chance(context: StageContext, data: str, teacher: str) -> None:
    _, evaluation = evaluate_heldout(context, data, teacher)
    if not gates.beats_chance(evaluation.top1, evaluation.images, len(evaluation.classes)):
        raise TrainingError(
            f"the first teacher's held-out top-1 is {evaluation.top1:.1%}, no better than chance (1 in "
            f"{len(evaluation.classes)}) on {evaluation.images} images: its pseudo-labels would be noise; "
            "train it longer (teacher.train.epochs), or check data.labeled"
        )


def generation_inputs(context: StageContext, data: str, generation: int, teacher: str) -> dict[str, Any]:
    """What the outcome of a generation depends on: the same teacher, data and settings need no second trip."""
    experiment = context.experiment
    robustness_inputs = {"evaluation": experiment.gate_evaluation.model_dump(mode="json", exclude={"sets", "keep_gib"})}
    return (robustness_inputs if experiment.gate.required_suites else {}) | {
        "code": digest_code(*TRAINING_SOURCES, *LABELING_SOURCES, "evaluation"),
        "data": PreparedData.load_file(context.root, data).digest,
        "generation": generation,
        "teacher": read_model_digest(context.root, teacher),
        "student": role_inputs(experiment.get_student(generation)),
        "seed": experiment.seed,
        "labeling": experiment.labeling.model_dump(mode="json", exclude={"tasks"}) | {"ensemble": ensemble_digests(context)},
        "exclude": digest_json(sorted(excluded_keys(context))),
        "selection": experiment.selection.model_dump(mode="json"),
        "gate": experiment.gate.model_dump(mode="json"),
    }


def label_set_key(context: StageContext, prepared: PreparedData, teacher: str) -> str:
    """The folder of a teacher's labels for the pool: shards that are there are done, whoever labeled them."""
    inputs = labeling_inputs(context, teacher) | {
        "dataset": prepared.pool.digest,
        "left_out": prepared.left_out.report_digest if prepared.left_out else None,
        "exclude": digest_json(sorted(excluded_keys(context))),
    }
    return f"store/labels/{shorten_digest(context.ledger.compute_digest('label', inputs))}"


def labeling_inputs(context: StageContext, teacher: str) -> dict[str, Any]:
    """What the labels of an image depend on, beside the image."""
    return {
        "code": digest_code(*LABELING_SOURCES),
        "teacher": read_model_digest(context.root, teacher),
        **context.experiment.labeling.model_dump(mode="json", exclude={"tasks"}),
        "ensemble": ensemble_digests(context),
    }


def ensemble_digests(context: StageContext) -> tuple[str, ...]:
    """Digests of the models that label with the teacher."""
    return tuple(ModelManifest.load_file(open_store(uri), CARD).digest for uri in context.experiment.labeling.ensemble)


def excluded_keys(context: StageContext) -> frozenset[str]:
    """Keys of the pool that the configuration excludes."""
    uri = context.experiment.data.exclude
    return read_keys(uri) if uri else frozenset()


def _find_left_out(
    context: StageContext, prepared: PreparedData, pool_store: Store, shards: Iterable[Shard]
) -> dict[str, dict[int, str]]:
    """sha256 of a shard → row → why that image gets no label."""
    rows_by_shard = load_left_out_rows(context.root.at(prepared.left_out.key)) if prepared.left_out else {}
    if exclusions := excluded_keys(context):
        for shard in shards:
            rows = {
                row: "excluded by data.exclude"
                for row, key in enumerate(ShardIndex.load(pool_store, shard).keys)
                if key in exclusions
            }
            if rows:
                rows_by_shard[shard.sha256] = rows_by_shard.get(shard.sha256, {}) | rows
    return rows_by_shard


class _LabeledShardIndex:
    """Shards that the same teacher has labeled as part of another pool: a pool that has grown costs only what is new."""

    def __init__(self, context: StageContext, teacher: str, left_out: Mapping[str, Mapping[int, str]]) -> None:
        self._root, self._ledger = context.root, context.ledger
        self._labeling_inputs = labeling_inputs(context, teacher)
        self._left_out = left_out

    def find_shard(self, shard: Shard) -> tuple[Store, LabelShard] | None:
        entry = self._ledger.find_entry("label-shard", self._ledger.compute_digest("label-shard", self._shard_inputs(shard)))
        if entry is None:
            return None
        parent_key, _, name = entry.outputs["facts"].rpartition("/")
        return self._root.at(parent_key), LabelShard.load_file(self._root.at(parent_key), name)

    def list_labeled(self, shards: Iterable[Shard]) -> Iterator[str]:
        """sha256 of those that are labeled."""
        recorded_digests = self._ledger.list_digests("label-shard")
        for shard in shards:
            if self._ledger.compute_digest("label-shard", self._shard_inputs(shard)) in recorded_digests:
                yield shard.sha256

    def record_shards(self, parent_key: str, shards: Iterable[Shard]) -> None:
        for shard in shards:
            self._ledger.record_entry(
                "label-shard", self._shard_inputs(shard), {"facts": f"{parent_key}/{label_shard_key(shard.name)}"}, 0.0
            )

    def _shard_inputs(self, shard: Shard) -> dict[str, Any]:
        reasons = {str(row): reason for row, reason in self._left_out.get(shard.sha256, {}).items()}
        return self._labeling_inputs | {"shard": shard.sha256, "left_out": reasons and digest_json(reasons)}


def training_inputs(
    experiment: Experiment,
    generation: int,
    *,
    labeled: str,
    pool: str | None = None,
    selection: str | None = None,
    teacher: str | None = None,
) -> dict[str, Any]:
    """What a trained model depends on; datasets, selection and teacher by their digests."""
    return {
        "code": digest_code(*TRAINING_SOURCES),
        "role": role_inputs(experiment.get_student(generation) if generation else experiment.teacher),
        "seed": training_seed(experiment, generation),
        "generation": generation,
        "labeled": labeled,
        "pool": pool,
        "selection": selection,
        "teacher": teacher,
    }


def model_key(training_id: str) -> str:
    return f"store/models/{training_id}"


def role_inputs(role: RoleConfig) -> dict[str, Any]:
    """A role without what changes how fast it trains, but not what comes out."""
    fields = role.model_dump(mode="json", exclude={"preset"})
    for name in ("checkpoint_seconds", "checkpoints_kept", "loader_workers", "processes", "tensorboard"):
        fields["train"].pop(name, None)
    if role.train.init_uri:
        fields["train"]["init"] = digest_weights(role.train.init_uri)
    return fields


def training_seed(experiment: Experiment, generation: int) -> int:
    """Each training has its own draws of weights, order and noise."""
    return experiment.seed * 64 + generation


def read_model_digest(root: Store, model: str) -> str:
    return ModelManifest.load_file(root.at(model), CARD).digest


def read_labeled_classes(root: Store, data: str) -> tuple[str, ...]:
    return PreparedData.load_file(root, data).labeled.open_dataset(root)[1].classes
