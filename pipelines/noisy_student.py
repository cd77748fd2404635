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
from pipelines.placement import Pools, on_cpu, on_gpu, takes_pools, with_registry


@dsl.pipeline(name="shard")
@takes_pools
def shard(config_uri: str, root: str, run: str, data: str, generation: int, teacher: str, shards: str, pools: Pools) -> None:
    """One range of shards."""
    base = {"config_uri": config_uri, "root": root, "run": run, "data": data, "generation": generation}
    on_gpu(label_shards(**base, teacher=teacher, shards=shards), pools, "label", hours=12)


@dsl.pipeline(name="label")
@takes_pools
def label(
    config_uri: str, root: str, run: str, data: str, generation: int, teacher: str, ranges: list[str], pools: Pools
) -> None:
    """The un-noised teacher over the pool, one task for each range of shards."""
    base = {"config_uri": config_uri, "root": root, "run": run, "data": data, "generation": generation}
    with dsl.ParallelFor(ranges) as shards:
        shard(**base, teacher=teacher, shards=shards, **pools)


@dsl.pipeline(name="generation")
@takes_pools
def generation(config_uri: str, root: str, run: str, data: str, generation: int, teacher: str, pools: Pools) -> None:
    """One trip round the loop: label, select, train a student, evaluate, decide."""
    base = {"config_uri": config_uri, "root": root, "run": run, "data": data, "generation": generation}
    plan = on_cpu(plan_labels(**base), pools, hours=1)
    labelled = label(**base, teacher=teacher, ranges=plan.output, **pools)
    # Versions of label sets need DVC.
    labels = on_cpu(commit_labels(**base, teacher=teacher).after(labelled), pools, hours=6, image="tools_image")
    with_registry(labels, pools)
    student = on_gpu(train(**base, teacher=teacher, labels=labels.output), pools, "train", hours=168)
    student.set_display_name("train student")
    evaluated = on_gpu(evaluate(**base, model=student.output), pools, "label", hours=24)
    on_cpu(gate(**base, teacher=teacher, student=student.output).after(evaluated), pools, hours=1)


@dsl.pipeline(name="attempt")
@takes_pools
def attempt(config_uri: str, root: str, run: str, data: str, number: int, first_teacher: str, pools: Pools) -> None:
    """A generation, if the loop is not over. A pipeline of its own, so that the next one can wait for it."""
    base = {"config_uri": config_uri, "root": root, "run": run, "data": data}
    teacher = on_cpu(resolve(**base, generation=number, first_teacher=first_teacher), pools, hours=1)
    with dsl.If(teacher.output != STOP):
        generation(**base, generation=number, teacher=teacher.output, **pools)


@dsl.pipeline(name="first-teacher")
@takes_pools
def first_teacher(config_uri: str, root: str, run: str, data: str, pools: Pools) -> None:
    """The teacher that learns from labelled images alone."""
    base = {"config_uri": config_uri, "root": root, "run": run, "data": data, "generation": 0}
    teacher = on_gpu(train(**base), pools, "train", hours=168)
    teacher.set_display_name("train teacher")
    on_gpu(evaluate(**base, model=teacher.output), pools, "label", hours=24)


@dsl.pipeline(name="known-teacher")
@takes_pools
def known_teacher(config_uri: str, root: str, run: str, data: str, generation: int, model: str, pools: Pools) -> None:
    """A student that is now a teacher, on the images that decide now."""
    base = {"config_uri": config_uri, "root": root, "run": run, "data": data, "generation": generation}
    on_gpu(evaluate(**base, model=model), pools, "label", hours=24)


@dsl.pipeline(name="teacher")
@takes_pools
def teacher(config_uri: str, root: str, run: str, data: str, generation: int, teacher: str, pools: Pools) -> None:
    """What one generation needs first: a teacher that is trained and evaluated."""
    base = {"config_uri": config_uri, "root": root, "run": run, "data": data}
    with dsl.If(teacher == TRAIN):
        first_teacher(**base, **pools)
    with dsl.Elif(teacher != STOP):
        known_teacher(**base, generation=generation, model=teacher, **pools)


@dsl.pipeline(name="dry-run")
@takes_pools
def plan_only(
    config: str,
    root: str,
    overrides: list[str],
    labelled: str,
    pool: str,
    heldout: str,
    generations: int,
    label_workers: int,
    one_generation: bool,
    pools: Pools,
) -> None:
    """The plan, measured where trainings would take place."""
    task = plan_run(
        config=config,
        root=root,
        overrides=overrides,
        labelled=labelled,
        pool=pool,
        heldout=heldout,
        generations=generations,
        label_workers=label_workers,
        devices=pools["train_gpus"],
        one_generation=one_generation,
    )
    on_gpu(task, pools, "train", hours=1)


@dsl.pipeline(
    name="noisy-student",
    description="Noisy Student self-training: teacher, pseudo-labels, noisy student, gate, again (arXiv:1911.04252).",
)
@takes_pools
def noisy_student(
    config: str = "quickstart",
    root: str = "s3://mlpipeline/noisy-student",
    run: str = "",
    overrides: list[str] = [],  # noqa: B006  (KFP copies it)
    labelled: str = "",
    pool: str = "",
    heldout: str = "",
    generations: int = 0,
    label_workers: int = 0,
    dry_run: bool = False,
    *,
    pools: Pools,
) -> None:
    """Noisy Student self-training.

    Args:
        config: URI of the experiment's YAML file, or a preset: quickstart.
        root: URI of the store that holds everything: data, models, label sets, the ledger and the runs.
        run: Name of the run, a folder below the root; made from the experiment if empty. The same name continues the same run.
        overrides: Fields of the experiment to change, as ["seed=1", "selection.min_confidence=0.5"].
        labelled: URI of the labelled images; as the experiment says if empty.
        pool: URI of the unlabelled images; as the experiment says if empty.
        heldout: URI of the held-out images; as the experiment says if empty.
        generations: Trips round the loop, at most 5; the gate may stop it earlier. As the experiment says if 0.
        label_workers: Labelling tasks beside each other, at most 50. As the experiment says if 0.
        dry_run: Only say what the run would cost.
    """
    data_places = {"labelled": labelled, "pool": pool, "heldout": heldout}
    asked = {"config": config, "root": root, "overrides": overrides, "label_workers": label_workers, **data_places}
    with dsl.If(dry_run == True):  # noqa: E712  (KFP reads the comparison)
        plan_only(**asked, generations=generations, one_generation=False, **pools)
    with dsl.Else():
        started = on_cpu(start_run(**asked, run=run, generations=generations), pools, hours=1)
        base = {"config_uri": started.outputs["config_uri"], "root": root, "run": started.outputs["run"]}
        data = on_cpu(prepare_data(**base), pools, hours=24)
        last: PipelineTask = first_teacher(**base, data=data.output, **pools)
        for number in range(1, MAX_GENERATIONS + 1):
            last = attempt(**base, data=data.output, number=number, first_teacher=TRAIN, **pools).after(last)
            last.set_display_name(f"generation {number}")
        on_cpu(report(**base).after(last), pools, hours=1)


@dsl.pipeline(
    name="noisy-student-generation",
    description="One generation of Noisy Student self-training, from the student that was accepted last: for recurring runs.",
)
@takes_pools
def noisy_student_generation(
    config: str = "quickstart",
    root: str = "s3://mlpipeline/noisy-student",
    run: str = "",
    overrides: list[str] = [],  # noqa: B006  (KFP copies it)
    labelled: str = "",
    pool: str = "",
    heldout: str = "",
    label_workers: int = 0,
    dry_run: bool = False,
    *,
    pools: Pools,
) -> None:
    """One generation of Noisy Student self-training.

    Args:
        config: URI of the experiment's YAML file, or a preset: quickstart. Its name says which runs it goes on from.
        root: URI of the store that holds everything: data, models, label sets, the ledger and the runs.
        run: Name of the run; made from the experiment, its data and the teacher if empty, as recurring runs want it.
        overrides: Fields of the experiment to change, as ["seed=1", "selection.min_confidence=0.5"].
        labelled: URI of the labelled images; as the experiment says if empty.
        pool: URI of the unlabelled images; as the experiment says if empty.
        heldout: URI of the held-out images; as the experiment says if empty.
        label_workers: Labelling tasks beside each other, at most 50. As the experiment says if 0.
        dry_run: Only say what the run would cost.
    """
    data_places = {"labelled": labelled, "pool": pool, "heldout": heldout}
    asked = {"config": config, "root": root, "overrides": overrides, "label_workers": label_workers, **data_places}
    with dsl.If(dry_run == True):  # noqa: E712  (KFP reads the comparison)
        plan_only(**asked, generations=1, one_generation=True, **pools)
    with dsl.Else():
        started = on_cpu(start_generation(**asked, run=run), pools, hours=24)
        base = {name: started.outputs[name] for name in ("config_uri", "run", "data")} | {"root": root}
        before = teacher(**base, generation=started.outputs["teacher_generation"], teacher=started.outputs["teacher"], **pools)
        last = attempt(**base, number=started.outputs["generation"], first_teacher=started.outputs["teacher"], **pools).after(
            before
        )
        on_cpu(report(config_uri=base["config_uri"], root=root, run=base["run"]).after(last), pools, hours=1)
