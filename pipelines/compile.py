"""Compiles the pipelines: `python -m pipelines.compile [--check]`. The YAML is committed; `--check` compares and fails.

KFP's compiler repeats a component for every task that uses it, so an unrolled loop would grow past what Kubernetes stores. Equal
components are merged here (the backend visits each component once, however many tasks refer to it). The compiler can also neither list
the values that an input offers nor describe inputs that are added to a function: both are written into its output.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from kfp import compiler

from pipelines import GENERATION_PACKAGE, PACKAGE, dump_yaml_documents, load_yaml_documents
from pipelines.noisy_student import noisy_student, noisy_student_generation
from pipelines.placement import PLACEMENT_INPUTS

PIPELINES = {PACKAGE: noisy_student, GENERATION_PACKAGE: noisy_student_generation}
Spec = dict[str, Any]


def compile_package(package: Path) -> str:
    """Compiles the pipeline of a package. Returns its YAML, the same bytes every time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / package.name
        compiler.Compiler().compile(PIPELINES[package], str(path))
        text = path.read_text()
    header = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    spec, platform = load_yaml_documents(text)
    merge_duplicates(spec, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"])
    _describe_inputs(spec["root"]["inputDefinitions"]["parameters"])
    return header + dump_yaml_documents([spec, platform])


def merge_duplicates(spec: Spec, platform: Spec) -> None:
    """Merges equal executors, compared with their Kubernetes settings (`platform`), then equal components, from the inside out."""
    executors, components = spec["deploymentSpec"]["executors"], spec["components"]
    renamed = _merge_equal(executors, lambda name: [executors[name], platform.get(name)])
    for name in renamed:
        platform.pop(name, None)
    for component in components.values():
        if "executorLabel" in component:
            component["executorLabel"] = renamed.get(component["executorLabel"], component["executorLabel"])
    while renamed := _merge_equal(components, lambda name: components[name]):
        for component in [*components.values(), spec["root"]]:
            for task in component.get("dag", {}).get("tasks", {}).values():
                reference = task["componentRef"]
                reference["name"] = renamed.get(reference["name"], reference["name"])


def _merge_equal(entries: Spec, content: Any) -> dict[str, str]:
    """Keeps the first of equal entries. Returns removed name → kept name."""
    seen: dict[str, str] = {}
    renamed = {}
    for name in sorted(entries, key=lambda name: (len(name), name)):
        kept = seen.setdefault(repr(content(name)), name)
        if kept != name:
            renamed[name] = kept
    for name in renamed:
        del entries[name]
    return renamed


def _describe_inputs(parameters: Spec) -> None:
    for name, placement_input in PLACEMENT_INPUTS.items():
        parameters[name]["description"] = placement_input.description
        if placement_input.choices:
            parameters[name]["literals"] = list(placement_input.choices)


def main() -> int:
    packages = {package: compile_package(package) for package in PIPELINES}
    if "--check" not in sys.argv:
        for package, text in packages.items():
            package.write_text(text)
        return 0
    stale = [package.name for package, text in packages.items() if not package.exists() or package.read_text() != text]
    for name in stale:
        sys.stderr.write(f"{name} differs from what pipelines/noisy_student.py compiles to: run `make compile`\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
