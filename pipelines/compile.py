"""Compiles the pipelines: `python -m pipelines.compile [--check]`. The YAML is committed; `--check` compares and fails.

KFP's compiler repeats a component for every task that uses it, so an unrolled loop would grow past what Kubernetes stores; and Argo keeps
eight copies of what the pod of each stage is given. So equal components are merged (the backend visits each once, however many tasks refer
to it). Their sources, which are in the images, are left out, as are descriptions of what no person fills in, the prefix of inputs that KFP
passes on, and what is its default anyway. The placement
(pipelines/placement.py) is filled in last: a package for a cluster is made from the committed one.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from kfp import compiler

from pipelines import GENERATION_PACKAGE, PACKAGE, dump_yaml_documents, load_yaml_documents
from pipelines.noisy_student import noisy_student, noisy_student_generation
from pipelines.placement import Placement, fill_placement

COMMAND = ["sh", "-c", '_KFP_RUNTIME=true python3 -P -m components "$@"', "kfp.dsl.executor_main"]
"""What a stage's pod runs, with the arguments that KFP appends. kfp.local wants the name of KFP's own executor in it."""
INPUT_PREFIX = "pipelinechannel--"
PIPELINES = {PACKAGE: noisy_student, GENERATION_PACKAGE: noisy_student_generation}
Spec = dict[str, Any]


def compile_package(package: Path) -> str:
    """Compiles the pipeline of a package for the default placement. Returns its YAML, the same bytes every time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / package.name
        compiler.Compiler().compile(PIPELINES[package], str(path))
        text = path.read_text()
    (spec,) = load_yaml_documents(text.replace(INPUT_PREFIX, ""))
    strip_code(spec)
    merge_duplicates(spec)
    for component in [spec["root"], *spec["components"].values()]:
        if "dag" in component:
            name_tasks(component["dag"]["tasks"])
    return dump_yaml_documents([spec, fill_placement(spec, Placement())])


def strip_code(spec: Spec) -> None:
    """Leaves of the components what KFP needs: not their sources, and no descriptions but those of the pipeline's own inputs."""
    for executor in spec["deploymentSpec"]["executors"].values():
        executor["container"]["command"] = COMMAND
    for component in spec["components"].values():
        for definitions in (component.get("inputDefinitions", {}), component.get("outputDefinitions", {})):
            for definition in (definition for kind in definitions.values() for definition in kind.values()):
                definition.pop("description", None)


def merge_duplicates(spec: Spec) -> None:
    """Merges equal executors, then equal components, from the inside out."""
    executors, components = spec["deploymentSpec"]["executors"], spec["components"]
    renamed = _merge_equal(executors, lambda name: executors[name])
    for component in components.values():
        if "executorLabel" in component:
            component["executorLabel"] = renamed.get(component["executorLabel"], component["executorLabel"])
    while renamed := _merge_equal(components, lambda name: components[name]):
        for component in [*components.values(), spec["root"]]:
            for task in component.get("dag", {}).get("tasks", {}).values():
                reference = task["componentRef"]
                reference["name"] = renamed.get(reference["name"], reference["name"])


def name_tasks(tasks: Spec) -> None:
    """Names tasks as their boxes in the UI: Argo, and what KFP tells of a run, have the tasks' own names.

    Options of KFP's cache go: without them nothing is cached.
    """
    names = {name: task["taskInfo"]["name"] for name, task in tasks.items()}
    for task in tasks.values():
        task.pop("cachingOptions", None)
        if "dependentTasks" in task:
            task["dependentTasks"] = sorted(names[name] for name in task["dependentTasks"])
        for value in task["inputs"]["parameters"].values():
            if output := value.get("taskOutputParameter"):
                output["producerTask"] = names[output["producerTask"]]
    renamed = {names[name]: task for name, task in tasks.items()}
    tasks.clear()
    tasks.update(renamed)


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
