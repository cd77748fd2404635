"""What a run comes to, in words: the same on the page and in Markdown."""

from ns.evaluation.gate import Guard
from ns.reporting.context import Facts


def headline(facts: Facts) -> str:
    """`87.4 % → 92.6 % → 93.2 %`: the accepted models on the held-out images; of one generation, teacher and student."""
    accepted = {verdict.generation for verdict in facts.verdicts if verdict.promoted}
    values = [
        model.evaluation.top1
        for model in facts.trained
        if model.evaluation
        and (model is facts.trained[0] or model.generation in accepted or model.generation == facts.generation)
    ]
    return " → ".join(f"{100 * value:.1f} %" for value in values)


def outcome(facts: Facts) -> list[str]:
    """What the gate decided, a line for each generation."""
    return [
        f"Generation {verdict.generation} {'promoted' if verdict.promoted else 'refused'}: {verdict.reason}"
        for verdict in facts.verdicts
    ]


def guard_value(guard: Guard, value: float) -> str:
    """A guard's number or limit."""
    if guard.name in ("mCE rise", "mFR rise"):
        return f"{value:+.1f} points"
    if guard.name in ("gain", "class drop"):
        return f"{100 * value:+.1f} points"
    return f"{100 * value:.1f} %"
