"""What a teacher and a student go through in one go: training, evaluation, and what is decided of them.

Each part is a stage of its own, with its ledger entries and its note, so what is done is not done again when the rest is.
"""

from ns.config.loader import load_experiment
from ns.modeling.manifest import ModelManifest
from ns.reporting import mlflow_runs
from ns.runs.records import BASELINE_TRAIN, list_stage_notes
from ns.stages.context import RunRef
from ns.stages.evaluate import evaluate_baseline, evaluate_generation
from ns.stages.gate import check_first_teacher, gate_generation
from ns.stages.train import RemoteLauncher, train_baseline, train_generation
from ns.storage import open_store


def provide_teacher(
    ref: RunRef, *, data: str, teacher: str = "", gpus: int = 0, launch_remote: RemoteLauncher | None = None
) -> str:
    """Trains the first teacher unless it is there, evaluates it, and checks that it has learned anything.

    `teacher`: key of the student that is the teacher of a recurring run, which is only evaluated; empty, or its own key: the
    experiment's first teacher. `gpus`: that this process was given. Returns the key of the model's folder. Raises TrainingError if the
    first teacher is no better than chance, and whatever its stages raise.
    """
    generation = _find_generation(ref, teacher)
    if generation == 0:
        teacher = train_generation(ref, data=data, generation=0, gpus=gpus, launch_remote=launch_remote)
    # A known teacher was evaluated when it was a student, perhaps on other images than the gate compares on now.
    evaluate_generation(ref, data=data, generation=generation, model=teacher)
    if generation == 0:
        check_first_teacher(ref, data=data, teacher=teacher)
    mlflow_runs.publish_mlflow_generation(open_store(ref.root), ref.run, generation)
    return teacher


def provide_student(
    ref: RunRef,
    *,
    data: str,
    generation: int,
    teacher: str,
    selection: str,
    gpus: int = 0,
    launch_remote: RemoteLauncher | None = None,
) -> str:
    """Trains a student, evaluates it, and decides whether it replaces its teacher; then the baseline, if the run has none yet.

    Returns the key of the student's folder.
    """
    student = train_generation(
        ref,
        data=data,
        generation=generation,
        teacher=teacher,
        selection=selection,
        gpus=gpus,
        launch_remote=launch_remote,
    )
    evaluate_generation(ref, data=data, generation=generation, model=student)
    gate_generation(ref, data=data, generation=generation, teacher=teacher, student=student)
    if load_experiment(ref.config_uri).baseline == "labeled_only":
        baselines = list_stage_notes(open_store(ref.root), ref.run, BASELINE_TRAIN)
        if all(note.generation == generation for note in baselines):
            key = train_baseline(
                ref, data=data, generation=generation, first_teacher=teacher, gpus=gpus, launch_remote=launch_remote
            )
            evaluate_baseline(ref, data=data, generation=generation, model=key)
    mlflow_runs.publish_mlflow_generation(open_store(ref.root), ref.run, generation)
    return student


def _find_generation(ref: RunRef, teacher: str) -> int:
    """Generation of a teacher: 0 for a first one, trained or not."""
    manifest = ModelManifest.find_file(open_store(ref.root), f"{teacher}/{ModelManifest.filename}") if teacher else None
    return manifest.generation if manifest else 0
