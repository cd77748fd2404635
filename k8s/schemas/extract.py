"""Extracts JSON Schemas: `python k8s/schemas/extract.py CRD.yaml… NAME.jsonschema.json…`, from the files that README.md lists.

The stored version of each CRD goes into `GROUP/KIND-VERSION.json`, without descriptions, which are most of it, and without CEL rules,
which JSON Schema does not know. An object whose fields are listed may have no others, as under strict field validation. What is repeated,
as the container of each framework in an InferenceService, stands once, below `$defs`.

Grafana's schemas go into `grafana/NAME.json` without descriptions; they are strict already.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
SHARED_CHARACTERS = 200
"""A repeated part that is longer as JSON is written once."""


def make_strict(schema: Any) -> Any:
    """Returns a CRD's schema as JSON Schema that refuses unlisted fields."""
    if isinstance(schema, list):
        return [make_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result: dict[str, Any] = {}
    for name, value in schema.items():
        if name == "properties":
            # Names of fields, which may equal keywords of JSON Schema.
            result[name] = {field: make_strict(field_schema) for field, field_schema in value.items()}
        elif name not in ("description", "example", "x-kubernetes-validations"):
            result[name] = make_strict(value)
    free = result.get("x-kubernetes-preserve-unknown-fields") or result.get("x-kubernetes-embedded-resource")
    if "properties" in result and "additionalProperties" not in result and not free:
        result["additionalProperties"] = False
    if result.pop("nullable", False) and "type" in result:
        result["type"] = [result["type"], "null"]
    return {name: value for name, value in result.items() if not name.startswith("x-kubernetes-")}


def share_repeated(schema: dict[str, Any]) -> dict[str, Any]:
    """Returns a schema with the same meaning, in which each repeated part is written once."""
    counts = Counter(_iterate_texts(schema))
    names = {text: f"part{number}" for number, text in enumerate(text for text, count in counts.items() if count > 1)}

    def replace_repeated(part: Any, *, is_whole: bool = False) -> Any:
        if isinstance(part, list):
            return [replace_repeated(item) for item in part]
        if not isinstance(part, dict):
            return part
        if not is_whole and (name := names.get(encode(part))):
            return {"$ref": f"#/$defs/{name}"}
        return {key: replace_repeated(value) for key, value in part.items()}

    definitions = {name: replace_repeated(json.loads(text), is_whole=True) for text, name in names.items()}
    shared: dict[str, Any] = replace_repeated(schema, is_whole=True)
    return shared | ({"$defs": definitions} if definitions else {})


def _iterate_texts(part: Any) -> Iterator[str]:
    """Yields the JSON of all schemas in a part that are worth sharing. A list of fields is none: its names may be keywords."""
    if isinstance(part, list):
        for item in part:
            yield from _iterate_texts(item)
    elif isinstance(part, dict):
        if isinstance(part.get("type"), str | list) and len(text := encode(part)) > SHARED_CHARACTERS:
            yield text
        for value in part.values():
            yield from _iterate_texts(value)


def encode(schema: Any) -> str:
    return json.dumps(schema, separators=(",", ":"), sort_keys=True)


def extract_schema(crd: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    spec = crd["spec"]
    (version,) = [candidate for candidate in spec["versions"] if candidate["storage"]]
    schema = make_strict(version["schema"]["openAPIV3Schema"])
    # All objects have these; k8s.validate checks the metadata by itself.
    schema["properties"] |= {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"}}
    # Only controllers write it.
    schema["properties"].pop("status", None)
    return FOLDER / spec["group"] / f"{spec['names']['kind']}-{version['name']}.json", share_repeated(schema)


def drop_descriptions(schema: Any) -> Any:
    if isinstance(schema, list):
        return [drop_descriptions(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    # A field may have this name, too; its schema is no text.
    return {
        name: drop_descriptions(value) for name, value in schema.items() if name != "description" or not isinstance(value, str)
    }


def extract_file(source: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yields path and schema of each kind in a file."""
    text = source.read_text(encoding="utf-8")
    if source.suffix == ".json":
        yield FOLDER / "grafana" / source.name.replace(".jsonschema", ""), drop_descriptions(json.loads(text))
    else:
        yield from map(extract_schema, yaml.safe_load_all(text))


def main() -> int:
    for name in sys.argv[1:]:
        for path, schema in extract_file(Path(name)):
            path.parent.mkdir(exist_ok=True)
            path.write_text(encode(schema) + "\n", encoding="utf-8")
            sys.stdout.write(f"{path.relative_to(FOLDER)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
