"""Experiments from YAML files, URIs and presets, with overrides; and back to YAML."""

import importlib.resources
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from ns.config.error_messages import format_validation_error
from ns.config.schema import Experiment, Section
from ns.core.errors import ConfigError, StoreError
from ns.storage import read_uri

MAX_VALUES, MAX_DEPTH = 100_000, 30
"""Values and levels of an experiment, at most."""
SectionT = TypeVar("SectionT", bound=Section)


class _WordLoader(yaml.SafeLoader):
    """YAML in which only true and false are truth values, as YAML 1.2 has it: off, no, on and yes are words, and may be settings or
    names of classes. Fields that are truth values take them too. A field that is there twice is an error, as in YAML 1.2."""

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


def _parse_yaml(text: str | bytes) -> Any:
    return yaml.load(text, Loader=_WordLoader)  # noqa: S506


def _describe_yaml_error(error: Exception) -> str:
    """One line, with the place in the file."""
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark):
        return f"line {mark.line + 1}, column {mark.column + 1}: {' '.join(filter(None, (error.context, error.problem)))}"
    return str(error).splitlines()[0]


def resolve_preset(config_uri: str) -> str:
    """The path of a preset (`quickstart`); any other path or URI unchanged."""
    preset = importlib.resources.files("ns.config.presets") / f"{config_uri}.yaml"
    return str(preset) if preset.is_file() and not Path(config_uri).exists() else config_uri


def load_with_overrides(
    config_uri: str, overrides: Iterable[str] = (), fields: Mapping[str, str | int] | None = None
) -> Experiment:
    """Reads an experiment (a path, a URI or a preset) with what a run form changes: overrides, and `fields`, values by field
    (`data.pool`). An empty value or 0 leaves the field as it is. Raises ConfigError as `load_experiment` does."""
    values = [f"{name}={value}" for name, value in (fields or {}).items() if value]
    return load_experiment(resolve_preset(config_uri), [*overrides, *values])


def load_experiment(uri: str, overrides: Iterable[str] = ()) -> Experiment:
    """Reads an experiment from a YAML file and applies `a.b=c` overrides (list items by index: `students.0.train.epochs=5`).

    Raises ConfigError naming each wrong field with its path, its value and what would be right.
    """
    try:
        document = _parse_yaml(read_uri(uri))
    except RecursionError as error:
        raise ConfigError(f"{uri}: is nested too deeply; an experiment has at most {MAX_DEPTH} levels") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{uri}: not YAML: {_describe_yaml_error(error)}") from error
    except StoreError as error:
        hint = "" if "." in uri.rpartition("/")[2] else "; name a YAML file, or the preset quickstart"
        raise ConfigError(f"config: {error}{hint}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{uri}: must be a mapping of fields, got {type(document).__name__}")
    document = _copy_unshared(document, uri)
    for override in overrides:
        _apply_override(document, override)
    return parse_experiment(document, uri)


def parse_experiment(document: dict[str, Any], uri: str) -> Experiment:
    """Validates a document. `uri` names it in the ConfigError."""
    return _validate_document(Experiment, document, uri)


def with_overrides(section: SectionT, overrides: Iterable[str]) -> SectionT:
    """A section with `a.b=c` overrides. Raises ConfigError naming each wrong field."""
    document = section.model_dump(mode="json")
    for override in overrides:
        _apply_override(document, override)
    return _validate_document(type(section), document, "--set")


def with_uris(experiment: Experiment, uris: Mapping[str, str]) -> Experiment:
    """An experiment that reads from other URIs, by field as `Experiment.map_uris` has them."""
    document = experiment.model_dump(mode="json")
    for field, uri in uris.items():
        _set_field(document, field.split("."), uri, field)
    return Experiment.model_validate(document)


def dump_experiment(experiment: Experiment) -> str:
    """YAML with every field, defaults included; `load_experiment` reads it back to an equal experiment."""
    return yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _validate_document(section_type: type[SectionT], document: dict[str, Any], origin: str) -> SectionT:
    try:
        return section_type.model_validate(document)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{origin}: {line}" for line in format_validation_error(error, section_type))) from error


def _copy_unshared(document: Any, uri: str) -> Any:
    """A copy in which YAML's aliases are separate: an override of the teacher must not reach a student that merges it.

    Raises ConfigError if aliases make it endless or huge: ten lines of them stand for billions of values.
    """
    values = 0

    def copy_node(node: Any, depth: int) -> Any:
        nonlocal values
        values += 1
        if values > MAX_VALUES or depth > MAX_DEPTH:
            raise ConfigError(
                f"{uri}: has more than {MAX_VALUES:,} values or {MAX_DEPTH} levels with its aliases; use fewer (*name)"
            )
        if isinstance(node, dict):
            return {key: copy_node(value, depth + 1) for key, value in node.items()}
        if isinstance(node, list):
            return [copy_node(value, depth + 1) for value in node]
        return node

    return copy_node(document, 0)


def _apply_override(document: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override}: must look like a.b=value")
    try:
        value = _copy_unshared(_parse_yaml(text), f"--set {path}")
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"--set {override}: the value is not YAML: {_describe_yaml_error(error)}") from error
    _set_field(document, keys, value, f"--set {override}")


def _set_field(document: dict[str, Any], keys: Sequence[str], value: Any, origin: str) -> None:
    """Sets the field at a path, in sections and list items; a section that is not there is made."""
    node: Any = document
    for depth, key in enumerate(keys):
        is_last = depth == len(keys) - 1
        index: int | str = key
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise ConfigError(f"{origin}: {key}: must be an index below {len(node)}")
            index = int(key)
        elif not isinstance(node, dict):
            raise ConfigError(f"{origin}: {'.'.join(keys[:depth])} is a value, not a section")
        elif not is_last and node.get(key) is None:
            node[key] = {}
        if is_last:
            node[index] = value
        else:
            node = node[index]
