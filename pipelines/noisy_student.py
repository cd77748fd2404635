"""The wiring: start → prepare → teacher → (next teacher → generation) × MAX_GENERATIONS → report; and the same for one generation.

The loop is unrolled, since KFP has no loop that stops early, and its state is in the ledger: `next_teacher` always runs, and returns
the teacher of the generation, or that the loop is over. Three rules keep the shape valid under kfp.local and on a cluster alike:

- an If tests only the single output of one task, or an input of the pipeline that contains it;
- a ParallelFor has a pipeline of its own, whose inputs carry every value that its body uses;
- a task whose CPUs, memory or GPUs are inputs is in a pipeline, never directly in a loop or an If: there KFP's compiler would leave
  its inputs dangling.
"""

from kfp import dsl
from kfp.dsl import PipelineTask

from components.commit_labels import commit_labels
from components.evaluate import evaluate
from components.gate import gate
from components.label_shards import label_shards
from components.next_teacher import next_teacher
from components.plan_labels import plan_labels
from components.prepare_data import prepare_data
from components.report import report
from components.start_generation import start_generation
from components.start_run import start_run
from components.train import train
from ns.config.schema import MAX_GENERATIONS
from ns.stages.context import TeacherSignal
from pipelines.placement import Inputs, add_registry_login, place_on_cpu, place_on_gpu, with_input_groups

# KFP compares plain strings.
STOP, TRAIN = TeacherSignal.STOP.value, TeacherSignal.TRAIN.value


@dsl.pipeline(name="shard")
@with_input_groups
def label_range(base: Inputs, teacher: str, shards: str, placement: Inputs) -> None:
    """Labels one range of shards."""
    place_on_gpu(label_shards(**base, teacher=teacher, shards=shards), placement, "label", hours=12)


@dsl.pipeline(name="label")
@with_input_groups
def label_pool(base: Inputs, teacher: str, ranges: list[str], placement: Inputs) -> None:
    """Labels the pool with the un-noised teacher, one task per range of shards."""
    with dsl.ParallelFor(ranges) as shards:
        label_range(**base, teacher=teacher, shards=shards, **placement)


@dsl.pipeline(name="generation")
@with_input_groups
def run_generation(base: Inputs, teacher: str, placement: Inputs) -> None:
    """Runs one generation: label, select, train a student, evaluate, decide."""
    plan = place_on_cpu(plan_labels(**base), placement, hours=1)
    pool_labeled = label_pool(**base, teacher=teacher, ranges=plan.output, **placement)
    # The tools image, since versions of label sets need DVC.
    selection = place_on_cpu(
        commit_labels(**base, teacher=teacher).after(pool_labeled), placement, hours=6, image="tools_image"
    )
    add_registry_login(selection, placement)
    student = place_on_gpu(train(**base, teacher=teacher, selection=selection.output), placement, "train", hours=168)
    student.set_display_name("train student")
    evaluated = place_on_gpu(evaluate(**base, model=student.output), placement, "label", hours=24)
    place_on_cpu(gate(**base, teacher=teacher, student=student.output).after(evaluated), placement, hours=1)


@dsl.pipeline(name="attempt")
@with_input_groups
def attempt_generation(base: Inputs, first_teacher: str, placement: Inputs) -> None:
    """Runs a generation, if the loop is not over. It is a pipeline of its own, so that the next generation can wait for it."""
    teacher = place_on_cpu(next_teacher(**base, first_teacher=first_teacher), placement, hours=1)
    with dsl.If(teacher.output != STOP):
        run_generation(**base, teacher=teacher.output, **placement)


@dsl.pipeline(name="first-teacher")
@with_input_groups
def train_first_teacher(config_uri: str, root: str, run: str, data: str, placement: Inputs) -> None:
    """Trains and evaluates the teacher that learns from labeled images alone."""
    base = {"config_uri": config_uri, "root": root, "run": run, "data": data, "generation": 0}
    teacher = place_on_gpu(train(**base), placement, "train", hours=168)
    teacher.set_display_name("train teacher")
    place_on_gpu(evaluate(**base, model=teacher.output), placement, "label", hours=24)


@dsl.pipeline(name="known-teacher")
@with_input_groups
def evaluate_known_teacher(base: Inputs, model: str, placement: Inputs) -> None:
    """Evaluates a student that has become the teacher, on the images that the gate compares on now."""
    place_on_gpu(evaluate(**base, model=model), placement, "label", hours=24)


@dsl.pipeline(name="teacher")
@with_input_groups
def provide_teacher(config_uri: str, root: str, run: str, data: str, generation: int, teacher: str, placement: Inputs) -> None:
    """Provides what one generation needs first: a teacher that is trained and evaluated."""
    base = {"config_uri": config_uri, "root": root, "run": run, "data": data}
    with dsl.If(teacher == TRAIN):
        train_first_teacher(**base, **placement)
    with dsl.Elif(teacher != STOP):
        evaluate_known_teacher(**base, generation=generation, model=teacher, **placement)


@dsl.pipeline(
    name="noisy-student",
    description="Noisy Student self-training: teacher, pseudo-labels, noisy student, gate, again (arXiv:1911.04252).",
)
@with_input_groups
def noisy_student(
    config_uri: str = "quickstart",
    root: str = "s3://mlpipeline/noisy-student",
    run: str = "",
    overrides: list[str] = [],  # noqa: B006  (KFP copies it)
    labeled: str = "",
    pool: str = "",
    heldout: str = "",
    generations: int = 0,
    labeling_tasks: int = 0,
    *,
    placement: Inputs,
) -> None:
    """Noisy Student self-training.

    Args:
        config_uri: URI of the experiment's YAML file, or the name of a preset.
        root: URI of the store that holds everything: data, models, label sets, the ledger and the runs.
        run: Name of the run, a folder below the root; if empty, named after the experiment. The same name continues the same run.
        overrides: Fields of the experiment to change, as ["seed=1", "selection.min_confidence=0.5"].
        labeled: URI of the labeled images; if empty, the experiment's.
        pool: URI of the unlabeled images; if empty, the experiment's.
        heldout: URI of the held-out images; if empty, the experiment's.
        generations: Most generations, 1-5; the gate may stop earlier. 0 uses the experiment's value.
        labeling_tasks: Parallel labeling tasks, 1-50. 0 uses the experiment's value.
    """
    data_uris = {"labeled": labeled, "pool": pool, "heldout": heldout}
    sizes = {"generations": generations, "labeling_tasks": labeling_tasks}
    start = start_run(config_uri=config_uri, root=root, run=run, overrides=overrides, **data_uris, **sizes)
    started = place_on_cpu(start, placement, hours=1)
    base = {"config_uri": started.outputs["config_uri"], "root": root, "run": started.outputs["run"]}
    data = place_on_cpu(prepare_data(**base), placement, hours=24)
    last: PipelineTask = train_first_teacher(**base, data=data.output, **placement)
    for number in range(1, MAX_GENERATIONS + 1):
        last = attempt_generation(**base, data=data.output, generation=number, first_teacher=TRAIN, **placement).after(last)
        last.set_display_name(f"generation {number}")
    place_on_cpu(report(**base).after(last), placement, hours=1)


@dsl.pipeline(
    name="noisy-student-generation",
    description="One generation of Noisy Student self-training, from the student that was accepted last; for recurring runs.",
)
@with_input_groups
def noisy_student_generation(
    config_uri: str = "quickstart",
    root: str = "s3://mlpipeline/noisy-student",
    run: str = "",
    overrides: list[str] = [],  # noqa: B006  (KFP copies it)
    labeled: str = "",
    pool: str = "",
    heldout: str = "",
    labeling_tasks: int = 0,
    *,
    placement: Inputs,
) -> None:
    """One generation of Noisy Student self-training.

    Args:
        config_uri: URI of the experiment's YAML file, or the name of a preset. Continues the runs of experiments of the same name.
        root: URI of the store that holds everything: data, models, label sets, the ledger and the runs.
        run: Name of the run; leave empty for recurring runs, to name each after the experiment, its data and the teacher.
        overrides: Fields of the experiment to change, as ["seed=1", "selection.min_confidence=0.5"].
        labeled: URI of the labeled images; if empty, the experiment's.
        pool: URI of the unlabeled images; if empty, the experiment's.
        heldout: URI of the held-out images; if empty, the experiment's.
        labeling_tasks: Parallel labeling tasks, 1-50. 0 uses the experiment's value.
    """
    data_uris = {"labeled": labeled, "pool": pool, "heldout": heldout}
    start = start_generation(
        config_uri=config_uri, root=root, run=run, overrides=overrides, **data_uris, labeling_tasks=labeling_tasks
    )
    started = place_on_cpu(start, placement, hours=24)
    base = {"config_uri": started.outputs["config_uri"], "root": root, "run": started.outputs["run"]}
    data, teacher = started.outputs["data"], started.outputs["teacher"]
    teacher_ready = provide_teacher(
        **base, data=data, generation=started.outputs["teacher_generation"], teacher=teacher, **placement
    )
    last = attempt_generation(
        **base, data=data, generation=started.outputs["generation"], first_teacher=teacher, **placement
    ).after(teacher_ready)
    place_on_cpu(report(**base).after(last), placement, hours=1)
