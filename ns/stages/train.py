"""Trains the first teacher and the students, in this process, in several on this machine, or on other machines."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from ns.config.loader import load_experiment
from ns.config.schema import Experiment
from ns.core import log, telemetry
from ns.core.digest import digest_json, shorten_digest
from ns.core.errors import NsError
from ns.core.mlflow_client import MlflowRun, is_tracked
from ns.core.process import die_with_client, set_openmp_to_sleep
from ns.data.prepared import PreparedData
from ns.labeling.selection import Selection
from ns.modeling.manifest import FINETUNED, ModelManifest
from ns.reporting.mlflow_runs import open_mlflow_model_run, open_mlflow_run
from ns.runs.records import BASELINE_TRAIN
from ns.stages.context import RunRef, StageContext, begin_telemetry, check_gpus, stage
from ns.stages.keys import read_model_digest, training_inputs, training_seed
from ns.storage import Store, open_store
from ns.storage.ledger import Ledger

if TYPE_CHECKING:
    from ns.modeling.distributed import World

WORKER = "ns.stages.train_worker"
"""Module of the processes that train together."""
RemoteLauncher = Callable[[str, Sequence[str]], None]
"""Trains on other machines (`train_generation`)."""


def train_generation(
    ref: RunRef,
    *,
    data: str,
    generation: int,
    teacher: str = "",
    selection: str = "",
    gpus: int = 0,
    launch_remote: RemoteLauncher | None = None,
) -> str:
    """Trains the first teacher (generation 0), or a student of `teacher` on the images of `selection`.

    `launch_remote(training_id, arguments)` runs `python -m ns.stages.train_worker ARGUMENTS` on other machines until all its processes
    have ended; `training_id`, 16 hex digits, is unique to this training. Without it the processes are on this machine, which was given
    `gpus` GPUs. Returns the key of the model's folder. Raises TrainingError when training cannot go on.
    """
    with stage("train", ref, generation, teacher=teacher) as context:
        training = _Training(context.root, context.ledger, context.experiment, data, generation, teacher, selection)
        _train(context, ref, training, gpus, launch_remote)
        return training.model_key


def train_baseline(
    ref: RunRef,
    *,
    data: str,
    generation: int,
    first_teacher: str,
    gpus: int = 0,
    launch_remote: RemoteLauncher | None = None,
) -> str:
    """Trains the model that `baseline: labeled_only` asks for: a student of the generation without pseudo-labels.

    `first_teacher`: key of the model whose weights such students start from, if they start from their teacher's. As `train_generation`.
    """
    with stage(BASELINE_TRAIN, ref, generation) as context:
        role = context.experiment.get_student(generation)
        teacher = first_teacher if role.train.init == "teacher" else ""
        training = _Training(context.root, context.ledger, context.experiment, data, generation, teacher, "")
        _train(context, ref, training, gpus, launch_remote)
        return training.model_key


def _train(context: StageContext, ref: RunRef, training: "_Training", gpus: int, launch_remote: RemoteLauncher | None) -> None:
    """Trains in this process or in others, unless it is done."""

    def run_training() -> Mapping[str, str]:
        from ns.modeling.distributed import SINGLE, count_local_processes, launch_processes

        check_gpus(gpus)
        arguments = [ref.config_uri, ref.root, ref.run, *training.arguments]
        if launch_remote:
            telemetry.serve_waiting()
            launch_remote(training.training_id, arguments)
        elif (processes := count_local_processes(training.role.train.processes)) > 1:
            launch_processes(processes, WORKER, arguments)
        else:
            training.train_as_rank(SINGLE, ref.run)
        return training.outputs

    context.get_or_run("train", training.inputs, run_training)
    manifest = ModelManifest.load(context.root.at(training.model_key))
    context.add_log_fields(parameters=manifest.parameters, steps=manifest.steps)


def join_training(ref: RunRef, *, data: str, generation: int, teacher: str, selection: str) -> str:
    """Trains as one of the processes that torchrun started. The process that started them records the result.

    Returns the key of the model's folder to the first of them, and an empty text to the others.
    """
    set_openmp_to_sleep()
    from ns.modeling.distributed import process_group, report_failure

    die_with_client()
    # report_failure is inside process_group: the others fail as soon as this one leaves the group, and its reason must be there first.
    with process_group() as world, report_failure(), log.bind_context(stage="train", generation=generation):
        log.configure_logging(quiet=not world.is_main)
        try:
            store, experiment = open_store(ref.root), load_experiment(ref.config_uri)
            begin_telemetry("train", generation, ref.run, experiment, teacher)
            training = _Training(store, Ledger(store), experiment, data, generation, teacher, selection)
            training.train_as_rank(world, ref.run)
        except NsError as error:
            if has_remote_client():
                # It reads nothing but the log.
                log.get_logger().error("failed", error=str(error), exit_code=error.exit_code)
            raise
        return training.model_key if world.is_main else ""


def has_remote_client() -> bool:
    """Whether the process that started those of torchrun is on another machine."""
    from ns.modeling.distributed import FAILURE_VARIABLE

    return not os.environ.get(FAILURE_VARIABLE)


def locate_first_teacher(context: StageContext, data: str) -> str:
    """Key of the folder of the experiment's first teacher, trained or not."""
    return _Training(context.root, context.ledger, context.experiment, data, 0, "", "").model_key


class _Training:
    """A training, by what goes into it. `data`, `teacher` and `selection` are keys; the last two are empty for the first teacher, and
    a student without selection is the baseline."""

    def __init__(
        self, root: Store, ledger: Ledger, experiment: Experiment, data: str, generation: int, teacher: str, selection: str
    ) -> None:
        self.role = experiment.get_student(generation) if generation else experiment.teacher
        self._root = root
        self._generation = generation
        self._teacher = teacher
        self.arguments = (data, str(generation), teacher, selection)
        self._experiment_name = experiment.name
        self._seed = training_seed(experiment, generation)
        self._prepared = PreparedData.load_file(root, data)
        self._selection = Selection.load(root.at(selection)) if selection else None
        self.inputs = training_inputs(
            experiment,
            generation,
            root,
            labeled=self._prepared.labeled.digest,
            pool=self._prepared.pool.digest if self._selection else None,
            selection=self._selection.digest if self._selection else None,
            teacher=read_model_digest(root, teacher) if teacher else None,
        )
        self.training_id = shorten_digest(ledger.compute_digest("train", self.inputs))
        self.model_key = f"store/models/{self.training_id}"

    @property
    def outputs(self) -> dict[str, str]:
        outputs = {"model": f"{self.model_key}/{ModelManifest.filename}"}
        if self.role.train.finetune:
            outputs["finetuned"] = f"{self.model_key}/{FINETUNED}/{ModelManifest.filename}"
        return outputs

    def train_as_rank(self, world: "World", run: str) -> None:
        """Trains, as one of the processes of `world`."""
        from ns.training.runner import train_and_save

        def open_run_of(model_store: Store) -> MlflowRun:
            parent = open_mlflow_run(self._root, run, self._experiment_name)
            model = model_store.uri.removeprefix(f"{self._root.uri}/")
            is_baseline = self._generation > 0 and self._selection is None
            return open_mlflow_model_run(parent, self._generation, model, is_baseline=is_baseline)

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
            world=world,
            run_store=self._root.at(run),
            open_mlflow_run=open_run_of if is_tracked() else None,
        )
