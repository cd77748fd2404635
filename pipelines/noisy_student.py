"""The wiring: start → prepare → teacher → generation-1 → … → report; and the same for one generation.

A generation is label → select → student. The loop is unrolled, since KFP has no loop that stops early, and its state is in the ledger:
from the second generation on, `next_teacher` says which teacher labels, or that the loop is over. What Kubeflow's UI shows is named here:
a box has the name of its component, of its If or loop, or the display name of its task. Rules that keep the shape valid under kfp.local and
on a cluster alike:

- an If tests only the single output of one task, or an input of the pipeline that contains it;
- what comes after an If depends on a pipeline that contains it: the task of a skipped If counts as failed;
- no task that a loop uses is beside it in one pipeline or If: kfp.local would put the loop's item in place of its outputs.

Kubeflow's run form shows the inputs in alphabetical order, which is therefore the order in which people need them.
"""

from collections.abc import Callable, Sequence
from typing import Any

from kfp import dsl
from kfp.dsl import PipelineTask

from components import WORKER_IMAGE
from components.label import label
from components.next_teacher import next_teacher
from components.prepare import prepare
from components.report import report
from components.select import select
from components.start import start
from components.start_generation import start_generation
from components.student import student
from components.teacher import teacher
from ns.config.schema import MAX_GENERATIONS
from ns.stages.context import STOP
from pipelines.placement import (
    PENDING_HOURS,
    STAGE_PAUSE_SECONDS,
    STAGE_PODS,
    STAGE_RETRIES,
    START_PAUSE_SECONDS,
    START_RETRIES,
)

TRAINING_POD = ("gpus", "cpu", "memory", "nodes")
"""What the start of a run plans the pods of trainings by."""


def run_stage(function: Callable[..., Any], /, *after: PipelineTask, **inputs: Any) -> PipelineTask:
    """Adds a stage that waits for others, is tried again, and is never answered from KFP's cache.

    That cache compares strings; ours, the ledger, compares content.
    """
    component = dsl.component(function, base_image=WORKER_IMAGE, packages_to_install=[], install_kfp_package=False)
    task = component(**inputs).after(*after)
    pod = STAGE_PODS[task.component_spec.name]
    is_start = function is start
    retries, pause = (START_RETRIES, START_PAUSE_SECONDS) if is_start else (STAGE_RETRIES, STAGE_PAUSE_SECONDS)
    # KFP's maximum is for all tries together, from the first one's start: a try that is under way at its end is killed.
    hours = (retries + 1) * pod.hours + PENDING_HOURS
    task.set_retry(retries, backoff_duration=f"{pause}s", backoff_factor=2.0, backoff_max_duration=f"{hours}h")
    return task.set_caching_options(False)


def add_generation(
    base: dict[str, Any], shards: list[str], gpus_label: str, training: dict[str, Any], after: Sequence[PipelineTask] = ()
) -> None:
    """Adds the stages of a generation to the pipeline, or to the If, that is being defined."""
    with dsl.ParallelFor(shards, name="label") as shard_range:
        labeled = run_stage(label, *after, **base, shards=shard_range, gpus=gpus_label)
    selection = run_stage(select, labeled, **base)
    run_stage(student, **base, selection=selection.output, **training)


@dsl.pipeline(name="first-generation")
def run_first_generation(
    run: str,
    shards: list[str],
    teacher: str,
    gpus_label: str,
    gpus: str,
    cpu: str,
    memory: str,
    nodes: dict[str, Any],
) -> None:
    """Runs the generation that every run has."""
    base = {"run": run, "generation": 1, "teacher": teacher}
    add_generation(base, shards, gpus_label, {"gpus": gpus, "cpu": cpu, "memory": memory, "nodes": nodes})


@dsl.pipeline(name="generation")
def run_later_generation(
    run: str,
    shards: list[str],
    generation: int,
    first_teacher: str,
    gpus_label: str,
    gpus: str,
    cpu: str,
    memory: str,
    nodes: dict[str, Any],
) -> None:
    """Runs a generation, if the loop is not over. It is a pipeline of its own, so that the next generation can wait for it."""
    decided = run_stage(next_teacher, run=run, generation=generation, first_teacher=first_teacher)
    with dsl.If(decided.output != STOP, name="generation"):
        base = {"run": run, "generation": generation, "teacher": decided.output}
        add_generation(base, shards, gpus_label, {"gpus": gpus, "cpu": cpu, "memory": memory, "nodes": nodes})


@dsl.pipeline(name="next-generation")
def run_next_generation(
    run: str,
    shards: list[str],
    generation: int,
    known_teacher: str,
    gpus_label: str,
    gpus: str,
    cpu: str,
    memory: str,
    nodes: dict[str, Any],
) -> None:
    """Runs the generation of a recurring run, if there is anything new."""
    with dsl.If(known_teacher != STOP, name="generation"):
        training = {"gpus": gpus, "cpu": cpu, "memory": memory, "nodes": nodes}
        ready = run_stage(teacher, run=run, teacher=known_teacher, **training)
        base = {"run": run, "generation": generation, "teacher": known_teacher}
        add_generation(base, shards, gpus_label, training, after=[ready])


@dsl.pipeline(
    name="noisy-student",
    description="Noisy Student self-training: teacher, pseudo-labels, noisy student, gate, again (arXiv:1911.04252).",
)
def noisy_student(
    config: str = "quickstart",
    data_heldout: str = "",
    data_labeled: str = "",
    data_pool: str = "",
    generations: int = 0,
    gpus_label: str = "0",
    gpus_train: str = "0",
    nodes: int = 1,
    overrides: list[str] = [],  # noqa: B006  (KFP copies it)
    run: str = "",
) -> None:
    """Noisy Student self-training.

    Args:
        config: URI of the experiment's YAML file, or the name of a preset.
        data_heldout: URI of the held-out images; if empty, the experiment's.
        data_labeled: URI of the labeled images; if empty, the experiment's.
        data_pool: URI of the unlabeled images; if empty, the experiment's.
        generations: Most generations, 1-5; the gate may stop earlier. 0 uses the experiment's value.
        gpus_label: GPUs of each labeling task.
        gpus_train: GPUs of a training, on each of its nodes; each GPU gets a process.
        nodes: Nodes of a training; more than 1 need Kubeflow Trainer.
        overrides: Fields of the experiment to change, as ["seed=1", "labeling.tasks=8"].
        run: Name of the run; if empty, named after the experiment. The same name continues the same run. Or the URI of its folder.
    """
    data_uris = {"data_labeled": data_labeled, "data_pool": data_pool, "data_heldout": data_heldout}
    given = {"config": config, "run": run, "overrides": overrides, "gpus": gpus_train, "nodes": nodes, "cluster": {}}
    started = run_stage(start, **given, **data_uris, generations=generations)
    folder = started.outputs["run"]
    training = {name: started.outputs[name] for name in TRAINING_POD}
    prepared = run_stage(prepare, run=folder)
    first = run_stage(teacher, run=folder, teacher="", **training).after(prepared)
    pool = {"run": folder, "shards": prepared.output, "gpus_label": gpus_label}
    last: PipelineTask = run_first_generation(**pool, teacher=first.outputs["Output"], **training)
    last.set_display_name("generation-1")
    for number in range(2, MAX_GENERATIONS + 1):
        last = run_later_generation(**pool, generation=number, first_teacher=first.outputs["Output"], **training).after(last)
        last.set_display_name(f"generation-{number}")
    run_stage(report, last, run=folder)


@dsl.pipeline(
    name="noisy-student-generation",
    description="One generation of Noisy Student self-training, from the student that was accepted last; for recurring runs.",
)
def noisy_student_generation(
    config: str = "quickstart",
    data_heldout: str = "",
    data_labeled: str = "",
    data_pool: str = "",
    gpus_label: str = "0",
    gpus_train: str = "0",
    nodes: int = 1,
    overrides: list[str] = [],  # noqa: B006  (KFP copies it)
    run: str = "",
) -> None:
    """One generation of Noisy Student self-training.

    Args:
        config: URI of the experiment's YAML file, or the name of a preset. Continues the runs of experiments of the same name.
        data_heldout: URI of the held-out images; if empty, the experiment's.
        data_labeled: URI of the labeled images; if empty, the experiment's.
        data_pool: URI of the unlabeled images; if empty, the experiment's.
        gpus_label: GPUs of each labeling task.
        gpus_train: GPUs of a training, on each of its nodes; each GPU gets a process.
        nodes: Nodes of a training; more than 1 need Kubeflow Trainer.
        overrides: Fields of the experiment to change, as ["seed=1", "labeling.tasks=8"].
        run: Name of the run; leave empty for recurring runs, to name each after experiment, data and teacher. Or the URI of its folder.
    """
    data_uris = {"data_labeled": data_labeled, "data_pool": data_pool, "data_heldout": data_heldout}
    given = {"config": config, "run": run, "overrides": overrides, "gpus": gpus_train, "nodes": nodes, "cluster": {}}
    started = run_stage(start_generation, **given, **data_uris).set_display_name("start")
    outputs = {name: started.outputs[name] for name in ("run", "shards", "generation", *TRAINING_POD)}
    last = run_next_generation(**outputs, known_teacher=started.outputs["teacher"], gpus_label=gpus_label)
    last.set_display_name("generation")
    run_stage(report, last, run=outputs["run"])
