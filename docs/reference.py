"""The reference pages of the documentation: config, commands, metrics and messages, made from the code that has them."""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import typer
from prometheus_client import CollectorRegistry

from benchmarks.measure import format_markdown_table
from ns.config.schema import Experiment
from ns.core import errors, telemetry
from ns.core.errors import NsError

ROOT = Path(__file__).parents[1]
SOURCES = ("ns", "components", "pipelines", "k8s")
"""Folders whose messages are listed."""
PAPER_VALUE = re.compile(r"\s*Paper: (.*?)\.?$", re.DOTALL)
"""The end of a field's description, if the paper has a value for it."""
STYLED = re.compile(r"\[\w+\](.*?)\[/\w*\]")
"""A command in a help text, colored there."""


def format_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table. Cells may hold any text; their newlines become spaces."""
    return format_markdown_table(head, ([_escape_pipes(" ".join(cell.split())) for cell in row] for row in rows))


def _escape_pipes(text: str) -> str:
    """A bar in code ends no cell."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else part.replace("|", "\\|") for part in parts)


# --- Config


def render_config_page() -> str:
    """Every field of an experiment, section by section."""
    schema = Experiment.model_json_schema()
    parts = [
        "# Reference: the experiment",
        "Every field of an experiment file, from `ns config schema`. A field without a default must be given. Below its effect "
        "stand the values that it may have, and that of [the paper](https://arxiv.org/abs/1911.04252). `students[]` has the fields "
        "of `teacher`. [The method](../method.md) tells which fields matter.",
    ]
    for section in list_sections(schema):
        title = f"`{section.field}`" if section.field else "The experiment"
        rows = [_describe_field(name, definition, section.definition) for name, definition in section.values.items()]
        parts += [f"## {title}", section.definition.get("description", "") if section.field else ""]
        parts.append(format_table(["field", "default", "effect"], rows))
    return "\n\n".join(part for part in parts if part) + "\n"


class ConfigSection(NamedTuple):
    """A part of the experiment."""

    field: str
    """Its place: `students[].train.optimizer`; empty for the experiment itself."""
    definition: Mapping[str, Any]
    """Its JSON schema."""
    values: Mapping[str, Mapping[str, Any]]
    """Its fields that are no sections themselves."""


def list_sections(schema: Mapping[str, Any]) -> list[ConfigSection]:
    """The experiment and all its sections, each once. What teachers and students share stands under the teacher."""
    seen: set[str] = set()

    def walk(field: str, definition: Mapping[str, Any]) -> Iterator[ConfigSection]:
        values, inner = {}, []
        for name, value in definition["properties"].items():
            reference = _find_reference(value)
            path = f"{field}.{name}".lstrip(".") + {"array": "[]", "object": ".NAME"}.get(value.get("type", ""), "")
            if reference is None or "description" in value:
                values[name] = value
            if reference is not None and reference not in seen:
                seen.add(reference)
                inner.append((path, schema["$defs"][reference]))
        yield ConfigSection(field, definition, values)
        for path, section in inner:
            yield from walk(path, section)

    return list(walk("", schema))


def _find_reference(value: Mapping[str, Any]) -> str | None:
    """Name of the section that a field holds, one or several."""
    for part in (value, *value.get("anyOf", ()), value.get("items", {}), *value.get("patternProperties", {}).values()):
        if "$ref" in part:
            return str(part["$ref"]).rpartition("/")[2]
    return None


def _describe_field(name: str, definition: Mapping[str, Any], section: Mapping[str, Any]) -> list[str]:
    description = definition.get("description", "")
    paper = PAPER_VALUE.search(description)
    default = "" if name in section.get("required", ()) else _format_value(definition.get("default"))
    effect = description[: paper.start()] if paper else description
    values = _describe_values(definition)
    return [f"`{name}`", default, f"{effect}<br>*{values}*{f'; **paper: {paper[1]}**' if paper else ''}"]


def _format_value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "one, with the defaults below"
    if isinstance(value, list) and len(value) > 5:
        return f"all {len(value)}"
    return f"`{value}`" if not isinstance(value, bool) else f"`{str(value).lower()}`"


def _describe_values(definition: Mapping[str, Any]) -> str:
    """What a field may hold: words, or a kind with its range."""
    if "anyOf" in definition:
        kinds = [_describe_values(part) for part in definition["anyOf"] if part.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in definition or "const" in definition:
        return ", ".join(f"`{value}`" for value in definition.get("enum", [definition.get("const")]))
    if "$ref" in definition:
        return "fields of its own, below"
    if definition.get("type") == "array":
        return f"list: {_describe_values(definition['items'])}" if "items" in definition else "list"
    low = "≥ " if "minimum" in definition else "> "
    high = "≤ " if "maximum" in definition else "< "
    least = definition.get("minimum", definition.get("exclusiveMinimum"))
    greatest = definition.get("maximum", definition.get("exclusiveMaximum"))
    json_type = str(definition.get("type", ""))
    kind = {"object": "mapping", "string": "text", "boolean": "true or false"}.get(json_type, json_type)
    limits = [f"{sign}{limit:,}" for sign, limit in ((low, least), (high, greatest)) if limit is not None]
    return " ".join([kind, ", ".join(limits)]).strip()


# --- Commands


def render_command_page(program: typer.Typer) -> str:
    """Every command of `ns` with its arguments and options."""
    parts = [
        "# Reference: commands",
        "Every command of `ns`, as `--help` shows it. [Exit codes](../runs.md#exit-codes) have a table.",
    ]
    for words, command in _list_commands("ns", typer.main.get_command(program)):
        parts.append(f"## `{words}`")
        parts.append(STYLED.sub(r"`\1`", command.help or ""))
        if not hasattr(command, "commands"):
            context = type(command).context_class(command)
            rows = [parameter.get_help_record(context) for parameter in command.params if not parameter.hidden]
            parts.append(format_table(["", "meaning"], [[f"`{form}`", meaning] for form, meaning in rows]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _list_commands(words: str, command: Any) -> Iterator[tuple[str, Any]]:
    inner = getattr(command, "commands", {})
    if words != "ns":
        yield words, command
    for name, child in inner.items():
        if not child.hidden:
            yield from _list_commands(f"{words} {name}", child)


# --- Metrics


def render_metric_page() -> str:
    """Every metric, of stages and of the summary that a run pushes."""
    parts = [
        "# Reference: metrics",
        "Every Prometheus metric. Ratios are 0–1, times are in seconds. [Monitoring](../monitoring.md) tells which stage serves what, "
        "and has alerts and dashboards.",
    ]
    for title, registry in (("Served by stages", telemetry.REGISTRY), ("Pushed once, at the end of a run", telemetry.SUMMARY)):
        parts += [f"## {title}", format_table(["metric", "type", "labels", "meaning"], _list_metrics(registry))]
    return "\n\n".join(parts) + "\n"


def _list_metrics(registry: CollectorRegistry) -> Iterator[list[str]]:
    for collector in dict.fromkeys(registry._collector_to_names):
        (family,) = collector.describe()  # type: ignore[attr-defined]
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = ", ".join(f"`{label}`" for label in getattr(collector, "_labelnames", ()))
        yield [f"`{name}`", family.type, labels, family.documentation]


# --- Messages


class Message(NamedTuple):
    """A message in the source."""

    text: str
    """With … where a value stands."""
    exit_code: int | None
    """Of the command that ends with it; None for a warning."""
    path: str
    """File of the source, from the root."""


def render_message_page() -> str:
    """Every error and warning, by exit code."""
    messages = sorted(set(list_messages()), key=lambda message: (message.exit_code or 999, message.text.lower()))
    parts = [
        "# Reference: messages",
        "Every error and every warning of the code; … stands for a name, a number or another value. Search for a piece of yours; "
        "[troubleshooting](../troubleshooting.md) explains those that need more than their own words.",
    ]
    names = {kind.exit_code: kind.__doc__ for kind in _list_error_classes().values()}
    for code in sorted({message.exit_code for message in messages}, key=lambda code: code or 999):
        title = f"Exit code {code}" if code is not None else "Warnings"
        rows = [[f"`` {message.text} ``", f"`{message.path}`"] for message in messages if message.exit_code == code]
        about = (names.get(code) or "").splitlines()[0] if code is not None else "Work goes on."
        parts += [f"## {title}", about, format_table(["message", "in"], rows)]
    return "\n\n".join(parts) + "\n"


def list_messages() -> Iterator[Message]:
    """Messages of errors that are raised, of values that an experiment refuses, and of warnings."""
    classes = _list_error_classes()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            file = path.relative_to(ROOT).as_posix()
            for node in ast.walk(ast.parse(path.read_text())):
                match node:
                    case ast.Raise(exc=ast.Call(func=ast.Name(id=name), args=[message, *_])) if name in classes:
                        code: int | None = classes[name].exit_code
                    case ast.Raise(exc=ast.Call(func=ast.Name(id="ValueError"), args=[message])) if (
                        file == "ns/config/schema.py"
                    ):
                        code = errors.ConfigError.exit_code
                    case ast.Call(func=ast.Attribute(attr="warning"), args=[message, *_]):
                        code = None
                    case _:
                        continue
                text = re.sub(r"(…[\s:]*)+…", "…", _read_text(message)).strip()
                if re.search(r"\w{3}", text):
                    yield Message(text, code, file)


def _list_error_classes() -> dict[str, type[NsError]]:
    """Name → class of every error that has an exit code of its own."""
    return {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, NsError)}


def _read_text(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_read_text(part) for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _read_text(left) + _read_text(right)
    return "…"
