"""YAML that people wrote, strangers too: read within bounds, with errors of one line."""

import re
from typing import Any

import yaml
from yaml.composer import Composer

from ns.core.errors import ConfigError

MAX_BYTES, MAX_VALUES, MAX_DEPTH = 4 << 20, 100_000, 30
"""Size, values and levels of a YAML file, at most; an experiment has a few kB, some hundred values and six levels."""
MAX_NUMBER_BITS = 128
"""Of a whole number. 0x with thousands of digits would be one that Python refuses to print."""


class _WordLoader(Composer, yaml.CSafeLoader):
    """YAML in which only true and false are truth values, as YAML 1.2 has it: off, no, on and yes are words, and may be settings or
    names of classes. Fields that are truth values take them too. A field that is there twice is an error, as in YAML 1.2.

    libyaml reads the text, five times as fast as Python; its nodes are composed here.
    """

    def __init__(self, text: str | bytes) -> None:
        yaml.CSafeLoader.__init__(self, text)
        Composer.__init__(self)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here `<<` is not merged yet; its fields may be overridden.
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.composer.ComposerError(
                        problem=f"{key.value} is there twice; keep one", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return node


_WordLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool" or first in "tTfF"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _describe_yaml_error(error: Exception, text: str | bytes) -> str:
    """One line, with the place in the file."""
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark):
        lines = (text if isinstance(text, str) else text.decode(errors="replace")).splitlines()
        if mark.line < len(lines) and re.match(r" *\t", lines[mark.line]):
            return f"line {mark.line + 1} begins with a tab; indent it with spaces"
        return f"line {mark.line + 1}, column {mark.column + 1}: {' '.join(filter(None, (error.context, error.problem)))}"
    return str(error).splitlines()[0]


def parse_yaml(text: str | bytes, origin: str) -> Any:
    """The value of a YAML text. Aliases become copies: an override of the teacher must not reach a student that merges it.

    `origin` names the text in messages. Raises ConfigError if it is no YAML, and if it, or what its aliases stand for, is endless or huge:
    ten lines of them stand for billions of values.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(
            f"{origin}: has {len(text):,} bytes; at most {MAX_BYTES:,} are read; name another file, or shorten it"
        )
    try:
        return _copy_unshared(yaml.load(text, Loader=_WordLoader), origin)  # noqa: S506
    except RecursionError as error:
        raise ConfigError(f"{origin}: is nested too deeply; use at most {MAX_DEPTH} levels") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{origin}: not YAML: {_describe_yaml_error(error, text)}") from error
    except (ValueError, OverflowError, TypeError, AttributeError, LookupError) as error:
        # Values that look like dates and numbers but are none (2026-99-01, 1e), and keys that cannot be hashed.
        raise ConfigError(
            f"{origin}: not YAML: {type(error).__name__}; put the value that is meant as a text in quotes"
        ) from error


def _copy_unshared(document: Any, origin: str) -> Any:
    values = 0

    def copy_node(node: Any, depth: int) -> Any:
        nonlocal values
        values += 1
        if values > MAX_VALUES or depth > MAX_DEPTH:
            raise ConfigError(
                f"{origin}: has more than {MAX_VALUES:,} values or {MAX_DEPTH} levels with its aliases; use fewer (*name)"
            )
        if isinstance(node, dict):
            return {_check_number(key): copy_node(value, depth + 1) for key, value in node.items()}
        if isinstance(node, list):
            return [copy_node(value, depth + 1) for value in node]
        return _check_number(node)

    return copy_node(document, 0)


def _check_number(value: Any) -> Any:
    if isinstance(value, int) and value.bit_length() > MAX_NUMBER_BITS:
        raise OverflowError
    return value
