"""Extracts JSON Schemas from CRDs: `python k8s/schemas/extract.py CRD.yaml…`, for the kinds and versions that README.md lists.

The stored version of each CRD goes into `GROUP/KIND-VERSION.json`, without descriptions, which are most of it, and without CEL rules,
which JSON Schema does not know. An object whose fields are listed may have no others, as under strict field validation.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent


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


def extract_schema(crd: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    spec = crd["spec"]
    (version,) = [candidate for candidate in spec["versions"] if candidate["storage"]]
    schema = make_strict(version["schema"]["openAPIV3Schema"])
    # All objects have these; k8s.validate checks the metadata by itself.
    schema["properties"] |= {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"}}
    # Only controllers write it.
    schema["properties"].pop("status", None)
    return FOLDER / spec["group"] / f"{spec['names']['kind']}-{version['name']}.json", schema


def main() -> int:
    for name in sys.argv[1:]:
        for crd in yaml.safe_load_all(Path(name).read_text(encoding="utf-8")):
            path, schema = extract_schema(crd)
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(schema, separators=(",", ":"), sort_keys=True) + "\n", encoding="utf-8")
            sys.stdout.write(f"{path.relative_to(FOLDER)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
