"""The compiled pipelines: traps of KFP that are visible in them."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from ns.config.schema import MAX_GENERATIONS
from pipelines import GENERATION_PACKAGE, PACKAGE


@pytest.fixture(scope="module", params=[PACKAGE, GENERATION_PACKAGE], ids=lambda package: package.stem)
def package(request) -> Path:
    return request.param


@pytest.fixture(scope="module")
def documents(package) -> list[dict]:
    return list(yaml.load_all(package.read_text(), yaml.CSafeLoader))


@pytest.fixture(scope="module")
def spec(documents) -> dict:
    return documents[0]


@pytest.fixture(scope="module")
def pods(documents) -> dict:
    """Executor → what Kubernetes is told of its pods."""
    return documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def dags(spec: dict) -> Iterator[tuple[str, dict]]:
    for name, component in {**spec["components"], "root": spec["root"]}.items():
        if "dag" in component:
            yield name, component


def test_committed_packages_are_up_to_date():
    # On its strip_channel: KFP looks its caller up among all modules that are loaded, for each setting of each task; with a test suite's
    # thousands that takes a minute.
    done = subprocess.run([sys.executable, "-m", "pipelines.compile", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_tasks_refer_to_inputs_of_their_parent(spec):
    for name, component in dags(spec):
        inputs = set(component.get("inputDefinitions", {}).get("parameters", {}))
        for task in component["dag"]["tasks"].values():
            for value in task.get("inputs", {}).get("parameters", {}).values():
                reference = value.get("componentInputParameter")
                assert reference is None or reference in inputs, (name, reference)


def test_package_stays_small(package):
    assert package.stat().st_size < 150_000


def test_package_installs_nothing(package):
    assert "pip install" not in package.read_text()


def test_inputs_are_described(spec):
    for name, definition in spec["root"]["inputDefinitions"]["parameters"].items():
        assert definition.get("description"), name


def test_cache_of_kfp_is_off(spec):
    for name, component in dags(spec):
        for task_name, task in component["dag"]["tasks"].items():
            reference = task["componentRef"]["name"]
            if "executorLabel" in spec["components"][reference]:
                assert not task.get("cachingOptions", {}).get("enableCache", False), (name, task_name)


def test_conditions_compare_single_outputs_or_inputs(package, spec):
    assert "oneOf" not in package.read_text()
    tested = set()
    for name, component in dags(spec):
        for task in component["dag"]["tasks"].values():
            condition = task.get("triggerPolicy", {}).get("condition", "")
            for channel in re.findall(r"parameter_values\['pipelinechannel--(\w[\w-]*)'\]", condition):
                tested.add(channel)
                source = task["inputs"]["parameters"][f"pipelinechannel--{channel}"]
                single = source.get("taskOutputParameter", {}).get("outputParameterKey") == "Output"
                assert single or "componentInputParameter" in source, (name, channel)
    assert tested == {"next-teacher-Output"} | ({"teacher"} if package == GENERATION_PACKAGE else set())


def test_loops_are_alone_in_a_pipeline(spec):
    for name, component in dags(spec):
        for task in component["dag"]["tasks"].values():
            if "parameterIterator" in task:
                assert name.startswith("comp-label")
                assert len(component["dag"]["tasks"]) == 1, "no upstream task beside a loop: kfp.local would lose its output"


def test_generations_are_sequential(package, spec):
    tasks = spec["root"]["dag"]["tasks"]
    attempts = sorted(name for name in tasks if name.startswith("attempt"))
    assert len(attempts) == (1 if package == GENERATION_PACKAGE else MAX_GENERATIONS)
    assert ("teacher" if package == GENERATION_PACKAGE else "first-teacher") in tasks[attempts[0]]["dependentTasks"]
    for before, after in pairwise(attempts):
        assert before in tasks[after]["dependentTasks"]
    assert attempts[-1] in tasks["report"]["dependentTasks"]


def test_kubernetes_settings_refer_to_inputs_of_the_parent(spec, pods):
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


def test_resources_are_not_set_in_a_loop_or_condition(spec):
    executors = spec["deploymentSpec"]["executors"]
    for name, component in dags(spec):
        if name.startswith(("comp-condition", "comp-for-loop")):
            for task in component["dag"]["tasks"].values():
                label = spec["components"][task["componentRef"]["name"]].get("executorLabel")
                assert "inputs" not in json.dumps(executors[label]["container"]["resources"] if label else {}), name


def test_stages_have_time_limit_retries_user_and_scratch(spec, pods):
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


def strip_channel(parameter: str) -> str:
    """The input's name, in a pipeline or in a branch of it."""
    return parameter.removeprefix("pipelinechannel--")


def test_placement_by_node_pool(spec, pods):
    pool = {
        name: strip_channel(facts["nodeSelector"]["nodeSelectorJson"]["componentInputParameter"]).partition("_")[0]
        for name, facts in pods.items()
    }
    for name, facts in pods.items():
        trains, labels = name.startswith("exec-train"), name.startswith(("exec-label", "exec-evaluate"))
        kind = "train" if trains else "label" if labels else "cpu"
        assert pool[name] == kind, name
        (tolerated,) = facts["tolerations"]
        assert strip_channel(tolerated["tolerationJson"]["componentInputParameter"]) == f"{kind}_tolerations", name
        container = spec["deploymentSpec"]["executors"][name]["container"]
        assert ("accelerator" in container["resources"]) == (kind != "cpu"), name
        shared = [mount for mount in facts["emptyDirMounts"] if mount["mountPath"] == "/dev/shm"]
        assert [mount["medium"] for mount in shared] == ([] if kind == "cpu" else ["Memory"]), name


def test_registry_login_only_for_commit_labels(pods):
    for name, facts in pods.items():
        secrets = [strip_channel(one["secretNameParameter"]["componentInputParameter"]) for one in facts["secretAsEnv"]]
        also = ["registry_secret"] if name == "exec-commit-labels" else []
        assert secrets == ["storage_secret", *also], name
        assert all(one["optional"] for one in facts["secretAsEnv"]), name


def test_inputs_have_defaults_among_their_choices(spec):
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert {name for name, facts in parameters.items() if "defaultValue" not in facts} == set()
    offered = {name: facts["literals"] for name, facts in parameters.items() if "literals" in facts}
    assert set(offered) == {"gpu_type", "label_gpus", "train_gpus"}
    for name, values in offered.items():
        assert parameters[name]["defaultValue"] in values
    assert len(json.dumps({name: facts.get("defaultValue", "x" * 200) for name, facts in parameters.items()})) < 5000


def test_equal_components_are_merged(spec):
    attempts = {task["componentRef"]["name"] for name, task in spec["root"]["dag"]["tasks"].items() if "attempt" in name}
    assert attempts == {"comp-attempt"}
    assert sorted(spec["deploymentSpec"]["executors"]) == sorted(
        {c.get("executorLabel") for c in spec["components"].values()} - {None}
    )


def test_artifact_types_are_known_to_the_backend(package):
    titles = set(re.findall(r"schemaTitle: (\S+)", package.read_text()))
    assert titles == {"system.Metrics", "system.ClassificationMetrics", "system.HTML", "system.Markdown"}


def test_components_have_no_logic():
    import ast

    import components

    for path in Path(components.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.If | ast.For | ast.While | ast.Try), f"{path.name} has logic that belongs in ns"
