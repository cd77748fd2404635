"""The compiled pipelines: the traps of KFP that can be seen in them."""

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


def work(spec: dict) -> dict:
    """The tasks that are done unless the run is a dry one."""
    (found,) = [component["dag"]["tasks"] for _, component in dags(spec) if "report" in component["dag"]["tasks"]]
    return found


def test_the_committed_pipelines_are_what_the_code_compiles_to_at_any_time():
    # On its own: KFP looks its caller up among all modules that are loaded, for each setting of each task; with a test suite's
    # thousands that takes a minute.
    done = subprocess.run([sys.executable, "-m", "pipelines.compile", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_task_refers_to_an_input_that_its_parent_does_not_have(spec):
    for name, component in dags(spec):
        inputs = set(component.get("inputDefinitions", {}).get("parameters", {}))
        for task in component["dag"]["tasks"].values():
            for value in task.get("inputs", {}).get("parameters", {}).values():
                reference = value.get("componentInputParameter")
                assert reference is None or reference in inputs, (name, reference)


def test_it_stays_small(package):
    assert package.make_stat().st_size < 200_000


def test_nothing_is_installed_at_run_time(package):
    assert "pip install" not in package.read_text()


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


def test_conditions_test_single_outputs_or_inputs_and_nothing_is_chosen_between_branches(package, spec):
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
    assert tested == {"dry_run", "resolve-Output"} | ({"teacher"} if package == GENERATION_PACKAGE else set())


def test_loops_sit_in_a_pipeline_whose_inputs_carry_every_value(spec):
    for name, component in dags(spec):
        for task in component["dag"]["tasks"].values():
            if "parameterIterator" in task:
                assert name.startswith("comp-label")
                assert len(component["dag"]["tasks"]) == 1, "no upstream task beside a loop: kfp.local would lose its output"


def test_each_generation_waits_for_the_one_before(package, spec):
    tasks = work(spec)
    attempts = sorted(name for name in tasks if name.startswith("attempt"))
    assert len(attempts) == (1 if package == GENERATION_PACKAGE else MAX_GENERATIONS)
    assert ("teacher" if package == GENERATION_PACKAGE else "first-teacher") in tasks[attempts[0]]["dependentTasks"]
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
    executors = spec["deploymentSpec"]["executors"]
    for name, component in dags(spec):
        if name.startswith(("comp-condition", "comp-for-loop")):
            for task in component["dag"]["tasks"].values():
                label = spec["components"][task["componentRef"]["name"]].get("executorLabel")
                assert "inputs" not in json.dumps(executors[label]["container"]["resources"] if label else {}), name


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


def own(parameter: str) -> str:
    """The input's name, in a pipeline or in a branch of it."""
    return parameter.removeprefix("pipelinechannel--")


def test_training_labeling_and_all_else_have_pools_of_their_own(spec, pods):
    pool = {
        name: own(facts["nodeSelector"]["nodeSelectorJson"]["componentInputParameter"]).partition("_")[0]
        for name, facts in pods.items()
    }
    for name, facts in pods.items():
        # A dry run measures where trainings take place.
        trains, labels = name.startswith(("exec-train", "exec-plan-run")), name.startswith(("exec-label", "exec-evaluate"))
        kind = "train" if trains else "label" if labels else "cpu"
        assert pool[name] == kind, name
        (tolerated,) = facts["tolerations"]
        assert own(tolerated["tolerationJson"]["componentInputParameter"]) == f"{kind}_tolerations", name
        container = spec["deploymentSpec"]["executors"][name]["container"]
        assert ("accelerator" in container["resources"]) == (kind != "cpu"), name
        shared = [mount for mount in facts["emptyDirMounts"] if mount["mountPath"] == "/dev/shm"]
        assert [mount["medium"] for mount in shared] == ([] if kind == "cpu" else ["Memory"]), name


def test_only_the_step_that_commits_gets_the_login_of_the_label_registry(pods):
    for name, facts in pods.items():
        secrets = [own(one["secretNameParameter"]["componentInputParameter"]) for one in facts["secretAsEnv"]]
        also = ["registry_secret"] if name == "exec-commit-labels" else []
        assert secrets == ["storage_secret", *also], name
        assert all(one["optional"] for one in facts["secretAsEnv"]), name


def test_inputs_have_defaults_and_lists_offer_their_default(spec):
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert {name for name, facts in parameters.items() if "defaultValue" not in facts} == set()
    offered = {name: facts["literals"] for name, facts in parameters.items() if "literals" in facts}
    assert set(offered) == {"gpu_type", "label_gpus", "train_gpus"}
    for name, values in offered.items():
        assert parameters[name]["defaultValue"] in values
    assert len(json.dumps({name: facts.get("defaultValue", "x" * 200) for name, facts in parameters.items()})) < 5000


def test_equal_components_are_shared_so_that_generations_cost_little(spec):
    attempts = {task["componentRef"]["name"] for name, task in work(spec).items() if "attempt" in name}
    assert attempts == {"comp-attempt"}
    assert sorted(spec["deploymentSpec"]["executors"]) == sorted(
        {c.get("executorLabel") for c in spec["components"].values()} - {None}
    )


def test_a_dry_run_plans_and_does_nothing_else(spec):
    (planned,) = [name for name, component in dags(spec) if "plan-run" in component["dag"]["tasks"]]
    (choice,) = spec["root"]["dag"]["tasks"].values()
    branches = spec["components"][choice["componentRef"]["name"]]["dag"]["tasks"].values()
    dry, wet = [spec["components"][branch["componentRef"]["name"]]["dag"]["tasks"] for branch in branches]
    assert [task["componentRef"]["name"] for task in dry.values()] == [planned]
    assert "report" in wet


def test_artifacts_have_types_that_the_backend_knows(package):
    titles = set(re.findall(r"schemaTitle: (\S+)", package.read_text()))
    assert titles == {"system.Metrics", "system.ClassificationMetrics", "system.HTML", "system.Markdown"}


def test_components_are_a_call_and_nothing_else():
    import ast

    import components

    for path in Path(components.__file__).parent.glob("*.py"):
        for node in ast.walk_folders(ast.parse(path.read_text())):
            assert not isinstance(node, ast.If | ast.For | ast.While | ast.Try), f"{path.name} has logic that belongs in ns"
