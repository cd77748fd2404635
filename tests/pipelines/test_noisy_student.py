"""The compiled pipeline: the traps of KFP that can be seen in it."""

import re
from collections.abc import Iterator
from itertools import pairwise

import pytest
import yaml

from ns.config import MAX_GENERATIONS
from pipelines.compile import PACKAGE, compiled


@pytest.fixture(scope="module")
def spec() -> dict:
    return next(yaml.safe_load_all(PACKAGE.read_text()))


def dags(spec: dict) -> Iterator[tuple[str, dict]]:
    for name, component in {**spec["components"], "root": spec["root"]}.items():
        if "dag" in component:
            yield name, component


def test_the_committed_pipeline_is_what_the_code_compiles_to():
    assert compiled() == PACKAGE.read_text(), "run `make compile` and commit the result"


def test_compiling_again_gives_the_same_bytes():
    assert compiled() == compiled()


def test_no_task_refers_to_an_input_that_its_parent_does_not_have(spec):
    for name, component in dags(spec):
        inputs = set(component.get("inputDefinitions", {}).get("parameters", {}))
        for task in component["dag"]["tasks"].values():
            for value in task.get("inputs", {}).get("parameters", {}).values():
                reference = value.get("componentInputParameter")
                assert reference is None or reference in inputs, (name, reference)


def test_it_stays_small(spec):
    assert PACKAGE.stat().st_size < 200_000


def test_nothing_is_installed_at_run_time():
    assert "pip install" not in PACKAGE.read_text()


def test_every_input_of_pipeline_and_components_is_described(spec):
    for name, component in [("root", spec["root"]), *spec["components"].items()]:
        if name != "root" and "dag" in component:
            # Inner pipelines pass on what the root and the components describe; users never fill them in.
            continue
        for field, facts in component.get("inputDefinitions", {}).get("parameters", {}).items():
            assert facts.get("description"), f"{name}.{field}"


def test_kfps_cache_is_off_everywhere(spec):
    for name, component in dags(spec):
        for task_name, task in component["dag"]["tasks"].items():
            reference = task["componentRef"]["name"]
            if "executorLabel" in spec["components"][reference]:
                assert not task.get("cachingOptions", {}).get("enableCache", False), (name, task_name)


def test_conditions_test_single_outputs_and_nothing_is_chosen_between_branches(spec):
    text = PACKAGE.read_text()
    assert "oneOf" not in text
    conditions = re.findall(r"condition: (.*)\n\s+(.*)", text)
    assert len(re.findall(r"triggerPolicy", text)) == MAX_GENERATIONS
    for condition in conditions:
        assert "resolve-Output" in " ".join(condition)


def test_loops_sit_in_a_pipeline_whose_inputs_carry_every_value(spec):
    for name, component in dags(spec):
        for task in component["dag"]["tasks"].values():
            if "parameterIterator" in task:
                assert name.startswith("comp-label")
                assert len(component["dag"]["tasks"]) == 1, "no upstream task beside a loop: kfp.local would lose its output"


def test_each_generation_waits_for_the_one_before(spec):
    tasks = spec["root"]["dag"]["tasks"]
    attempts = sorted(name for name in tasks if name.startswith("attempt"))
    assert len(attempts) == MAX_GENERATIONS
    for before, after in pairwise(attempts):
        assert before in tasks[after]["dependentTasks"]
    assert attempts[-1] in tasks["report"]["dependentTasks"]


def test_components_are_a_call_and_nothing_else():
    import ast
    from pathlib import Path

    import components

    for path in Path(components.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.If | ast.For | ast.While | ast.Try), f"{path.name} has logic that belongs in ns"
