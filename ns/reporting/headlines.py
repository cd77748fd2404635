"""The results of a run in words, the same on the page and in Markdown."""

from ns.reporting.context import ReportContext


def format_headline(context: ReportContext) -> str:
    """`87.4 % → 92.6 % → 93.2 %`: held-out accuracy of the accepted models; for one generation, of teacher and student."""
    accepted = {verdict.generation for verdict in context.verdicts if verdict.promoted}
    values = [
        model.evaluation.top1
        for model in context.models
        if model.evaluation
        and (model is context.models[0] or model.generation in accepted or model.generation == context.generation)
    ]
    return " → ".join(f"{100 * value:.1f} %" for value in values)


def format_outcomes(context: ReportContext) -> list[str]:
    """The gate's decisions, one line per generation."""
    return [
        f"Generation {verdict.generation} {'promoted' if verdict.promoted else 'refused'}: {verdict.reason}"
        for verdict in context.verdicts
    ]
