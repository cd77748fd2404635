"""What is wrong with a document that a person wrote: pydantic's errors, as lines for whoever has to mend them."""

import difflib
from typing import Any

from pydantic import BaseModel, ValidationError


def explained(error: ValidationError, within: type[BaseModel]) -> list[str]:
    """A line for each wrong field of a document of this kind: its path, its value, and what would be right."""
    lines: dict[str, str] = {}
    for detail in error.errors():
        # A list whose items are wrong is also reported as too short; that line would only confuse.
        if detail["type"] == "too_short" and detail["input"]:
            continue
        path = _path(detail["loc"], within)
        message = _explain(detail, path, within)
        # Of a field that takes this or that, pydantic says of each why it is not it.
        lines[path] = f"{lines[path]}, or {_reason(detail)}" if path in lines else message
    return list(lines.values())


def _explain(detail: Any, path: str, within: type[BaseModel]) -> str:
    if detail["type"] == "extra_forbidden":
        known = list(_section_at(detail["loc"][:-1], within).model_fields)
        close = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        return f"{path}: unknown field; {hint}"
    if detail["type"] == "missing":
        return f"{path}: missing; it has no default"
    if not path:
        return _reason(detail)
    if detail["type"] == "value_error" and isinstance(detail["input"], dict):
        # A check across the fields of a section: its message begins with the field.
        return f"{path}.{_reason(detail)}"
    return f"{path}: invalid value {detail['input']!r:.80}: {_reason(detail)}"


def _reason(detail: Any) -> str:
    return str(detail["msg"]).removeprefix("Value error, ").removeprefix("Input ")


def _path(location: tuple[int | str, ...], within: type[BaseModel]) -> str:
    """`students.0.train.epochs`. What pydantic adds to it is left out: which of the kinds a field takes was tried."""
    parts = [
        part
        for place, part in enumerate(location)
        if part != "[key]" and (isinstance(part, int) or _section_at(location[:place], within) is not None)
    ]
    return ".".join(map(str, parts))


def _section_at(location: tuple[int | str, ...], within: type[BaseModel]) -> Any:
    """The section that a field, or an item or a name in it, is one of; None of a field that is none."""
    section: Any = within
    for part in location:
        if section is None or part not in section.model_fields:
            continue  # the place in a list, or a name in a mapping
        annotation = section.model_fields[part].annotation
        nested = [annotation, *getattr(annotation, "__args__", ())]
        section = next((kind for kind in nested if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return section
