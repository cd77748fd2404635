"""The compiled pipeline: the traps of KFP that can be seen in it."""

import json
import re
from collections.abc import Iterator
from itertools import pairwise

import pytest
import yaml

from ns.config import MAX_GENERATIONS
from pipelines.compile import PACKAGE, compiled


@pytest.fixture(scope="module")
def documents() -> list[dict]:
    return list(yaml.load_all(PACKAGE.read_text(), yaml.CSafeLoader))


@pytest.fixture(scope="module")
def spec(documents) -> dict:
    return documents[0]


@pytest.fixture(scope="module")
def pods(documents) -> dict:
    """Executor → what Kubernetes is told of its pods."""
    return documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


@pytest.fixture(scope="module")
def twice() -> list[str]:
    return [compiled(), compiled()]


def dags(spec: dict) -> Iterator[tuple[str, dict]]:
    for name, component in {**spec["components"], "root": spec["root"]}.items():
        if "dag" in component:
            yield name, component


def test_the_committed_pipeline_is_what_the_code_compiles_to(twice):
    assert twice[0] == PACKAGE.read_text(), "run `make compile` and commit the result"


def test_compiling_again_gives_the_same_bytes(twice):
    assert twice[0] == twice[1]


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
    assert len(re.findall(r"triggerPolicy", text)) == 1, "one component, which all generations share"
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


def test_what_kubernetes_is_told_refers_to_inputs_of_the_pipeline_around_the_task(spec, pods):
    def references(node):
        if isinstance(node, dict):
            yield from ([node["componentInputParameter"]] if "componentInputParameter" in node else [])
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    for name, component in dags(spec):
        for task in component["dag"]["tasks"].values():
            label = spec["components"][task["componentRef"]["name"]].get("executorLabel")
            if label:
                inputs = set(component.get("inputDefinitions", {}).get("parameters", {}))
                assert set(references(pods[label])) <= inputs, (name, label)


def test_resources_that_are_inputs_are_never_set_directly_in_a_loop_or_an_if(spec):
    for name, component in dags(spec):
        if name.startswith(("comp-condition", "comp-for-loop")):
            for task in component["dag"]["tasks"].values():
                assert "executorLabel" not in spec["components"][task["componentRef"]["name"]], name


def test_every_step_has_a_time_limit_retries_a_numbered_user_and_scratch_space(spec, pods):
    executors = spec["deploymentSpec"]["executors"]
    assert set(executors) == set(pods)
    for name, facts in pods.items():
        assert int(facts["activeDeadlineSeconds"]) >= 3600, name
        assert facts["securityContext"] == {"runAsGroup": "10001", "runAsNonRoot": True, "runAsUser": "10001"}, name
        assert "/tmp" in [mount["mountPath"] for mount in facts["emptyDirMounts"]], name
        image = "tools_image" if "commit-labels" in name else "worker_image"
        assert executors[name]["container"]["image"] == f"{{{{$.inputs.parameters['pipelinechannel--{image}']}}}}"
    for _, component in dags(spec):
        for task in component["dag"]["tasks"].values():
            if "executorLabel" in spec["components"][task["componentRef"]["name"]]:
                assert task["retryPolicy"]["maxRetryCount"] == 3


def test_training_labelling_and_all_else_have_pools_of_their_own(spec, pods):
    pool = {
        name: facts["nodeSelector"]["nodeSelectorJson"]["componentInputParameter"].partition("_")[0]
        for name, facts in pods.items()
    }
    for name, facts in pods.items():
        kind = "train" if "train" in name else "label" if name.startswith(("exec-label", "exec-evaluate")) else "cpu"
        assert pool[name] == kind, name
        wanted = f"{kind}_tolerations"
        assert facts["tolerations"] == [{"tolerationJson": {"componentInputParameter": wanted}}], name
        container = spec["deploymentSpec"]["executors"][name]["container"]
        assert ("accelerator" in container["resources"]) == (kind != "cpu"), name
        shared = [mount for mount in facts["emptyDirMounts"] if mount["mountPath"] == "/dev/shm"]
        assert [mount["medium"] for mount in shared] == ([] if kind == "cpu" else ["Memory"]), name


def test_inputs_have_defaults_and_lists_offer_their_default(spec):
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert {name for name, facts in parameters.items() if "defaultValue" not in facts} == set()
    offered = {name: facts["literals"] for name, facts in parameters.items() if "literals" in facts}
    assert set(offered) == {"gpu_type", "label_gpus", "train_gpus"}
    for name, values in offered.items():
        assert parameters[name]["defaultValue"] in values
    assert len(json.dumps({name: facts.get("defaultValue", "x" * 200) for name, facts in parameters.items()})) < 5000


def test_equal_components_are_shared_so_that_generations_cost_little(spec):
    attempts = [task["componentRef"]["name"] for name, task in spec["root"]["dag"]["tasks"].items() if "attempt" in name]
    assert attempts == ["comp-attempt"] * MAX_GENERATIONS
    assert sorted(spec["deploymentSpec"]["executors"]) == sorted(
        {c.get("executorLabel") for c in spec["components"].values()} - {None}
    )


def test_artifacts_have_types_that_the_backend_knows(spec):
    titles = set(re.findall(r"schemaTitle: (\S+)", PACKAGE.read_text()))
    assert titles == {"system.Metrics", "system.ClassificationMetrics", "system.HTML", "system.Markdown"}


def test_components_are_a_call_and_nothing_else():
    import ast
    from pathlib import Path

    import components

    for path in Path(components.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.If | ast.For | ast.While | ast.Try), f"{path.name} has logic that belongs in ns"
