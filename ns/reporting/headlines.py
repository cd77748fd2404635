"""What a run comes to, in words: the same on the page and in Markdown."""

from ns.evaluation.gate import GateCondition
from ns.reporting.context import ReportContext


def format_headline(context: ReportContext) -> str:
    """`87.4 % → 92.6 % → 93.2 %`: the accepted models on the held-out images; of one generation, teacher and student."""
    accepted = {verdict.generation for verdict in context.verdicts if verdict.promoted}
    values = [
        model.evaluation.top1
        for model in context.models
        if model.evaluation
        and (model is context.models[0] or model.generation in accepted or model.generation == context.generation)
    ]
    return " → ".join(f"{100 * value:.1f} %" for value in values)


def format_outcomes(context: ReportContext) -> list[str]:
    """What the gate decided, a line for each generation."""
    return [
        f"Generation {verdict.generation} {'promoted' if verdict.promoted else 'refused'}: {verdict.reason}"
        for verdict in context.verdicts
    ]


def format_condition_value(condition: GateCondition, value: float) -> str:
    """A guard's number or limit."""
    if condition.name in ("mCE rise", "mFR rise"):
        return f"{value:+.1f} points"
    if condition.name in ("gain", "class drop"):
        return f"{100 * value:+.1f} points"
    return f"{100 * value:.1f} %"
