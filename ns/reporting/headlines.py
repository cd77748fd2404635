"""The results of a run in words, the same on the page and in Markdown."""

from collections.abc import Sequence

from ns.evaluation.result import Evaluation
from ns.reporting.context import ReportContext


def format_headline(context: ReportContext) -> str:
    """`87.4 % → 92.6 % → 93.2 % on 10,000 test images`: accuracy of the accepted models; for one generation, of teacher and student.

    On held-out images, which the gate decides by, only if there are no test images; then without their number.
    """
    accepted = {verdict.generation for verdict in context.verdicts if verdict.promoted}
    models = [
        model
        for model in context.models
        if model.evaluation
        and (model is context.models[0] or model.generation in accepted or model.generation == context.generation)
    ]
    tests = [model.evaluations["test"] for model in models if "test" in model.evaluations]
    if tests and len(tests) == len(models):
        return f"{_join_accuracies(tests)} on {tests[0].images:,} test images"
    return _join_accuracies([model.evaluation for model in models if model.evaluation])


def _join_accuracies(evaluations: Sequence[Evaluation]) -> str:
    return " → ".join(f"{100 * evaluation.top1:.1f} %" for evaluation in evaluations)


def format_outcomes(context: ReportContext) -> list[str]:
    """The gate's decisions, one line per generation."""
    return [
        f"Generation {verdict.generation} {'promoted' if verdict.promoted else 'refused'}: {verdict.reason}"
        for verdict in context.verdicts
    ]
