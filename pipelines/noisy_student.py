"""The wiring: prepare → teacher → (resolve → generation) × MAX_GENERATIONS → report.

The loop is unrolled, since KFP has none that stops early, and its state is in the ledger: `resolve` always runs, says which
teacher the generation has, or that the loop is over. So the shape holds under kfp.local and on a cluster alike:

- an If only ever tests the single output of one task;
- a ParallelFor has a pipeline of its own, whose inputs carry every value that its body uses;
- KFP's cache is off: it keys on strings, and ours, the ledger, on content.
"""

from kfp import dsl
from kfp.dsl import PipelineTask

from components.commit_labels import commit_labels
from components.evaluate import evaluate
from components.gate import gate
from components.label_shards import label_shards
from components.plan_labels import plan_labels
from components.prepare_data import prepare_data
from components.report import report
from components.resolve import resolve
from components.train import train
from ns.config import MAX_GENERATIONS
from ns.steps import STOP


def _uncached(task: PipelineTask) -> PipelineTask:
    return task.set_caching_options(False)


@dsl.pipeline(name="label")
def label(config_uri: str, root: str, run: str, data: str, generation: int, teacher: str, ranges: list[str]) -> None:
    """The un-noised teacher over the pool, one task for each range of shards."""
    with dsl.ParallelFor(ranges) as shards:
        _uncached(
            label_shards(
                config_uri=config_uri,
                root=root,
                run=run,
                data=data,
                generation=generation,
                teacher=teacher,
                shards=shards,
            )
        )


@dsl.pipeline(name="generation")
def generation(config_uri: str, root: str, run: str, data: str, generation: int, teacher: str) -> None:
    """One trip round the loop: label, select, train a student, evaluate, decide."""
    base = {"config_uri": config_uri, "root": root, "run": run, "data": data, "generation": generation}
    plan = _uncached(plan_labels(**base))
    labelled = label(**base, teacher=teacher, ranges=plan.output)
    labels = _uncached(commit_labels(**base, teacher=teacher).after(labelled))
    student = _uncached(train(**base, teacher=teacher, labels=labels.output)).set_display_name("train student")
    evaluated = _uncached(evaluate(**base, model=student.output))
    _uncached(gate(**base, teacher=teacher, student=student.output).after(evaluated))


@dsl.pipeline(name="attempt")
def attempt(config_uri: str, root: str, run: str, data: str, number: int, first_teacher: str) -> None:
    """A generation, if the loop is not over. A pipeline of its own, so that the next one can wait for it."""
    base = {"config_uri": config_uri, "root": root, "run": run, "data": data}
    teacher = _uncached(resolve(**base, generation=number, first_teacher=first_teacher))
    with dsl.If(teacher.output != STOP):
        generation(**base, generation=number, teacher=teacher.output)


@dsl.pipeline(
    name="noisy-student",
    description="Noisy Student self-training: teacher, pseudo-labels, noisy student, gate, again (arXiv:1911.04252).",
)
def noisy_student(config_uri: str, root: str, run: str) -> None:
    """Noisy Student self-training.

    Args:
        config_uri: URI of the experiment's YAML file.
        root: URI of the store that holds everything: data, models, label sets, the ledger and the runs.
        run: Name of the run, a folder below the root. The same name continues the same run.
    """
    base = {"config_uri": config_uri, "root": root, "run": run}
    data = _uncached(prepare_data(**base))
    base["data"] = data.output
    teacher = _uncached(train(**base, generation=0)).set_display_name("train teacher")
    last: PipelineTask = _uncached(evaluate(**base, generation=0, model=teacher.output))
    for number in range(1, MAX_GENERATIONS + 1):
        last = attempt(**base, number=number, first_teacher=teacher.output).after(last)
        last.set_display_name(f"generation {number}")
    _uncached(report(config_uri=config_uri, root=root, run=run).after(last))
