"""The wiring: start → prepare → teacher → (resolve → generation) × MAX_GENERATIONS → report; and the same for one generation.

The loop is unrolled, since KFP has none that stops early, and its state is in the ledger: `resolve` always runs, says which
teacher the generation has, or that the loop is over. So the shape holds under kfp.local and on a cluster alike:

- an If only ever tests the single output of one task, or an input of the pipeline that it stands in;
- a ParallelFor has a pipeline of its own, whose inputs carry every value that its body uses;
- a task whose CPUs, memory or GPUs are inputs stands in a pipeline, never directly in a loop or an If: KFP's compiler would leave
  its inputs dangling there.
"""

from kfp import dsl
from kfp.dsl import PipelineTask

from components.commit_labels import commit_labels
from components.evaluate import evaluate
from components.gate import gate
from components.label_shards import label_shards
from components.plan_labels import plan_labels
from components.plan_run import plan_run
from components.prepare_data import prepare_data
from components.report import report
from components.resolve import resolve
from components.start_generation import start_generation
from components.start_run import start_run
from components.train import train
from ns.config.schema import MAX_GENERATIONS
from ns.stages.steps import STOP, TRAIN
from pipelines.placement import Placement, add_registry_login, place_on_cpu, place_on_gpu, with_placement_inputs


@dsl.pipeline(name="shard")
@with_placement_inputs
def label_range(
    config_uri: str, root: str, run: str, data: str, generation: int, teacher: str, shards: str, placement: Placement
) -> None:
    """One range of shards."""
    base = {"config_uri": config_uri, "root": root, "run": run, "data": data, "generation": generation}
    place_on_gpu(label_shards(**base, teacher=teacher, shards=shards), placement, "label", hours=12)


@dsl.pipeline(name="label")
@with_placement_inputs
def label_pool(
    config_uri: str, root: str, run: str, data: str, generation: int, teacher: str, ranges: list[str], placement: Placement
) -> None:
    """The un-noised teacher over the pool, one task for each range of shards."""
    base = {"config_uri": config_uri, "root": root, "run": run, "data": data, "generation": generation}
    with dsl.ParallelFor(ranges) as shards:
        label_range(**base, teacher=teacher, shards=shards, **placement)


@dsl.pipeline(name="generation")
@with_placement_inputs
def run_generation(
    config_uri: str, root: str, run: str, data: str, generation: int, teacher: str, placement: Placement
) -> None:
    """One trip round the loop: label, select, train a student, evaluate, decide."""
    base = {"config_uri": config_uri, "root": root, "run": run, "data": data, "generation": generation}
    plan = place_on_cpu(plan_labels(**base), placement, hours=1)
    pool_labeled = label_pool(**base, teacher=teacher, ranges=plan.output, **placement)
    # Versions of label sets need DVC.
    selection = place_on_cpu(
        commit_labels(**base, teacher=teacher).after(pool_labeled), placement, hours=6, image="tools_image"
    )
    add_registry_login(selection, placement)
    student = place_on_gpu(train(**base, teacher=teacher, selection=selection.output), placement, "train", hours=168)
    student.set_display_name("train student")
    evaluated = place_on_gpu(evaluate(**base, model=student.output), placement, "label", hours=24)
    place_on_cpu(gate(**base, teacher=teacher, student=student.output).after(evaluated), placement, hours=1)


@dsl.pipeline(name="attempt")
@with_placement_inputs
def attempt_generation(
    config_uri: str, root: str, run: str, data: str, number: int, first_teacher: str, placement: Placement
) -> None:
    """A generation, if the loop is not over. A pipeline of its own, so that the next one can wait for it."""
    base = {"config_uri": config_uri, "root": root, "run": run, "data": data}
    teacher = place_on_cpu(resolve(**base, generation=number, first_teacher=first_teacher), placement, hours=1)
    with dsl.If(teacher.output != STOP):
        run_generation(**base, generation=number, teacher=teacher.output, **placement)


@dsl.pipeline(name="first-teacher")
@with_placement_inputs
def train_first_teacher(config_uri: str, root: str, run: str, data: str, placement: Placement) -> None:
    """The teacher that learns from labeled images alone."""
    base = {"config_uri": config_uri, "root": root, "run": run, "data": data, "generation": 0}
    teacher = place_on_gpu(train(**base), placement, "train", hours=168)
    teacher.set_display_name("train teacher")
    place_on_gpu(evaluate(**base, model=teacher.output), placement, "label", hours=24)


@dsl.pipeline(name="known-teacher")
@with_placement_inputs
def evaluate_known_teacher(
    config_uri: str, root: str, run: str, data: str, generation: int, model: str, placement: Placement
) -> None:
    """A student that is now a teacher, on the images that decide now."""
    base = {"config_uri": config_uri, "root": root, "run": run, "data": data, "generation": generation}
    place_on_gpu(evaluate(**base, model=model), placement, "label", hours=24)


@dsl.pipeline(name="teacher")
@with_placement_inputs
def provide_teacher(
    config_uri: str, root: str, run: str, data: str, generation: int, teacher: str, placement: Placement
) -> None:
    """What one generation needs first: a teacher that is trained and evaluated."""
    base = {"config_uri": config_uri, "root": root, "run": run, "data": data}
    with dsl.If(teacher == TRAIN):
        train_first_teacher(**base, **placement)
    with dsl.Elif(teacher != STOP):
        evaluate_known_teacher(**base, generation=generation, model=teacher, **placement)


@dsl.pipeline(name="dry-run")
@with_placement_inputs
def plan_only(
    config: str,
    root: str,
    overrides: list[str],
    labeled: str,
    pool: str,
    heldout: str,
    generations: int,
    label_workers: int,
    one_generation: bool,
    placement: Placement,
) -> None:
    """The plan, measured where trainings would take place."""
    task = plan_run(
        config=config,
        root=root,
        overrides=overrides,
        labeled=labeled,
        pool=pool,
        heldout=heldout,
        generations=generations,
        label_workers=label_workers,
        devices=placement["train_gpus"],
        one_generation=one_generation,
    )
    place_on_gpu(task, placement, "train", hours=1)


@dsl.pipeline(
    name="noisy-student",
    description="Noisy Student self-training: teacher, pseudo-labels, noisy student, gate, again (arXiv:1911.04252).",
)
@with_placement_inputs
def noisy_student(
    config: str = "quickstart",
    root: str = "s3://mlpipeline/noisy-student",
    run: str = "",
    overrides: list[str] = [],  # noqa: B006  (KFP copies it)
    labeled: str = "",
    pool: str = "",
    heldout: str = "",
    generations: int = 0,
    label_workers: int = 0,
    dry_run: bool = False,
    *,
    placement: Placement,
) -> None:
    """Noisy Student self-training.

    Args:
        config: URI of the experiment's YAML file, or a preset: quickstart.
        root: URI of the store that holds everything: data, models, label sets, the ledger and the runs.
        run: Name of the run, a folder below the root; made from the experiment if empty. The same name continues the same run.
        overrides: Fields of the experiment to change, as ["seed=1", "selection.min_confidence=0.5"].
        labeled: URI of the labeled images; as the experiment says if empty.
        pool: URI of the unlabeled images; as the experiment says if empty.
        heldout: URI of the held-out images; as the experiment says if empty.
        generations: Trips round the loop, at most 5; the gate may stop it earlier. As the experiment says if 0.
        label_workers: Labeling tasks beside each other, at most 50. As the experiment says if 0.
        dry_run: Only say what the run would cost.
    """
    data_uris = {"labeled": labeled, "pool": pool, "heldout": heldout}
    start_inputs = {"config": config, "root": root, "overrides": overrides, "label_workers": label_workers, **data_uris}
    with dsl.If(dry_run == True):  # noqa: E712  (KFP reads the comparison)
        plan_only(**start_inputs, generations=generations, one_generation=False, **placement)
    with dsl.Else():
        started = place_on_cpu(start_run(**start_inputs, run=run, generations=generations), placement, hours=1)
        base = {"config_uri": started.outputs["config_uri"], "root": root, "run": started.outputs["run"]}
        data = place_on_cpu(prepare_data(**base), placement, hours=24)
        last: PipelineTask = train_first_teacher(**base, data=data.output, **placement)
        for number in range(1, MAX_GENERATIONS + 1):
            last = attempt_generation(**base, data=data.output, number=number, first_teacher=TRAIN, **placement).after(last)
            last.set_display_name(f"generation {number}")
        place_on_cpu(report(**base).after(last), placement, hours=1)


@dsl.pipeline(
    name="noisy-student-generation",
    description="One generation of Noisy Student self-training, from the student that was accepted last: for recurring runs.",
)
@with_placement_inputs
def noisy_student_generation(
    config: str = "quickstart",
    root: str = "s3://mlpipeline/noisy-student",
    run: str = "",
    overrides: list[str] = [],  # noqa: B006  (KFP copies it)
    labeled: str = "",
    pool: str = "",
    heldout: str = "",
    label_workers: int = 0,
    dry_run: bool = False,
    *,
    placement: Placement,
) -> None:
    """One generation of Noisy Student self-training.

    Args:
        config: URI of the experiment's YAML file, or a preset: quickstart. Its name says which runs it goes on from.
        root: URI of the store that holds everything: data, models, label sets, the ledger and the runs.
        run: Name of the run; made from the experiment, its data and the teacher if empty, as recurring runs want it.
        overrides: Fields of the experiment to change, as ["seed=1", "selection.min_confidence=0.5"].
        labeled: URI of the labeled images; as the experiment says if empty.
        pool: URI of the unlabeled images; as the experiment says if empty.
        heldout: URI of the held-out images; as the experiment says if empty.
        label_workers: Labeling tasks beside each other, at most 50. As the experiment says if 0.
        dry_run: Only say what the run would cost.
    """
    data_uris = {"labeled": labeled, "pool": pool, "heldout": heldout}
    start_inputs = {"config": config, "root": root, "overrides": overrides, "label_workers": label_workers, **data_uris}
    with dsl.If(dry_run == True):  # noqa: E712  (KFP reads the comparison)
        plan_only(**start_inputs, generations=1, one_generation=True, **placement)
    with dsl.Else():
        started = place_on_cpu(start_generation(**start_inputs, run=run), placement, hours=24)
        base = {name: started.outputs[name] for name in ("config_uri", "run", "data")} | {"root": root}
        teacher_ready = provide_teacher(
            **base, generation=started.outputs["teacher_generation"], teacher=started.outputs["teacher"], **placement
        )
        last = attempt_generation(
            **base, number=started.outputs["generation"], first_teacher=started.outputs["teacher"], **placement
        ).after(teacher_ready)
        place_on_cpu(report(config_uri=base["config_uri"], root=root, run=base["run"]).after(last), placement, hours=1)
