"""Turns pydantic's errors in a document that a person wrote into one line per wrong field."""

import difflib
import re
from typing import Any

from pydantic import BaseModel, ValidationError


def format_validation_error(error: ValidationError, document_type: type[BaseModel]) -> list[str]:
    """One line for each wrong field of a document: its path, its value, and what would be right."""
    lines: dict[str, str] = {}
    for detail in error.errors():
        # pydantic also reports a list with wrong items as too short, which would only confuse.
        if detail["type"] == "too_short" and detail["input"]:
            continue
        field_path = _field_path(detail["loc"], document_type)
        message = _format_detail(detail, field_path, document_type)
        # For a field of several types, pydantic reports one error per type.
        lines[field_path] = f"{lines[field_path]}, or {_clean_message(detail)}" if field_path in lines else message
    return list(lines.values())


def _format_detail(detail: Any, path: str, document_type: type[BaseModel]) -> str:
    if detail["type"] == "extra_forbidden":
        fields = _find_section(detail["loc"][:-1], document_type).model_fields
        field_names = [field.alias or name for name, field in fields.items()]
        similar = difflib.get_close_matches(str(detail["loc"][-1]), field_names, n=1)
        hint = f"did you mean {similar[0]!r}?" if similar else f"known here: {', '.join(field_names)}"
        return f"{path}: unknown field; {hint}"
    if detail["type"] == "missing":
        return f"{path}: missing; it has no default"
    if not path:
        return _clean_message(detail)
    if detail["type"] == "value_error" and isinstance(detail["input"], dict):
        # A check across the fields of a section: its message begins with the field.
        return f"{path}.{_clean_message(detail)}"
    return f"{path}: invalid value {_show_value(detail['input'])}: {_clean_message(detail)}"


def _show_value(value: Any) -> str:
    # A password in a URL would stand in logs.
    return "(hidden: it holds a user or a password)" if re.search(r"://[^/]*@", str(value)) else f"{value!r:.80}"


PLAIN_MESSAGES = {"tuple_type": "must be a list", "string_too_short": "must not be empty", "too_short": "must not be empty"}
"""Messages for kinds of errors that pydantic describes in terms of Python."""


def _clean_message(detail: Any) -> str:
    return PLAIN_MESSAGES.get(detail["type"]) or str(detail["msg"]).removeprefix("Value error, ").removeprefix("Input ")


def _field_path(location: tuple[int | str, ...], document_type: type[BaseModel]) -> str:
    """`students.0.train.epochs`, without the names of types that pydantic puts into the path."""
    parts = [
        part
        for depth, part in enumerate(location)
        if part != "[key]" and (isinstance(part, int) or _find_section(location[:depth], document_type) is not None)
    ]
    return ".".join(map(str, parts))


def _find_section(location: tuple[int | str, ...], document_type: type[BaseModel]) -> Any:
    """The type of the section at a location; None if the location is a value."""
    section: Any = document_type
    for part in location:
        if section is None or part not in section.model_fields:
            continue  # an index in a list, or a name in a mapping
        annotation = section.model_fields[part].annotation
        nested = [annotation, *getattr(annotation, "__args__", ())]
        section = next((kind for kind in nested if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return section
