"""Experiments from YAML files, URIs and presets, with overrides; and back to YAML."""

import importlib.resources
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from ns.config.error_messages import format_validation_error
from ns.config.schema import Experiment, Section
from ns.config.yaml_text import parse_yaml
from ns.core.errors import ConfigError, StoreError
from ns.storage import read_uri

SectionT = TypeVar("SectionT", bound=Section)


def resolve_preset(config_uri: str) -> str:
    """The path of a preset (`quickstart`); any other path or URI unchanged."""
    return str(_locate_preset(config_uri)) if has_preset(config_uri) and not Path(config_uri).exists() else config_uri


def has_preset(name: str) -> bool:
    """Whether an experiment of this name is part of the package."""
    return _locate_preset(name).is_file()


def _locate_preset(name: str) -> Traversable:
    return importlib.resources.files("ns.config.presets") / f"{name}.yaml"


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
        text = read_uri(uri)
    except StoreError as error:
        hint = "" if "." in uri.rpartition("/")[2] else "; name a YAML file, or the preset quickstart"
        raise ConfigError(f"config: {error}{hint}") from error
    document = parse_yaml(text, uri)
    if not isinstance(document, dict):
        what = "is empty" if document is None else f"is no mapping but a {type(document).__name__}"
        raise ConfigError(f"{uri}: {what}; write fields, one a line (name: animals), or let `ns init` write it")
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


def flatten_fields(value: Any, path: str = "") -> dict[str, str]:
    """Maps field paths such as `a.b.0` to values as text; what is None, to `not set`."""
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {
            key: text
            for name, inner in items
            for key, text in flatten_fields(inner, f"{path}.{name}" if path else str(name)).items()
        }
    return {path: "not set" if value is None else str(value)}


def _validate_document(section_type: type[SectionT], document: dict[str, Any], origin: str) -> SectionT:
    try:
        return section_type.model_validate(document)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{origin}: {line}" for line in format_validation_error(error, section_type))) from error


def _apply_override(document: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override}: must look like a.b=value")
    _set_field(document, keys, parse_yaml(text, f"--set {override}"), f"--set {override}")


def _set_field(document: dict[str, Any], keys: Sequence[str], value: Any, origin: str) -> None:
    """Sets the field at a path, in sections and list items; a section that is not there is made."""
    node: Any = document
    for depth, key in enumerate(keys):
        is_last = depth == len(keys) - 1
        index: int | str = key
        if isinstance(node, list):
            if not (key.isascii() and key.isdigit()) or int(key) >= len(node):
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
