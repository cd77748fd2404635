"""The compiled pipelines: what a person sees of them, and traps of KFP that are visible in them."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from google.protobuf import json_format
from kfp.kubernetes import kubernetes_executor_config_pb2

from components import MLFLOW_FOLDER, REGISTRY_FOLDER, SETTINGS_FOLDER, STORE_FOLDER
from ns.config.schema import MAX_GENERATIONS
from pipelines import GENERATION_PACKAGE, PACKAGE
from pipelines.placement import STAGE_PODS, Placement

INPUTS = [
    "config",
    "data_heldout",
    "data_labeled",
    "data_pool",
    "generations",
    "gpus_label",
    "gpus_train",
    "nodes",
    "overrides",
    "run",
]


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


def iterate_dags(spec: dict) -> Iterator[tuple[str, dict]]:
    for name, component in {**spec["components"], "root": spec["root"]}.items():
        if "dag" in component:
            yield name, component


def find_layers(spec: dict, component: dict, depth: int = 0) -> Iterator[tuple[str, int]]:
    """Each stage, and how many boxes a person opens to see it. A loop shows its tasks when it is opened."""
    for task in component["dag"]["tasks"].values():
        inner = spec["components"][task["componentRef"]["name"]]
        if "dag" in inner:
            yield from find_layers(spec, inner, depth + 1)
        else:
            yield task["taskInfo"]["name"], depth


@pytest.mark.integration
def test_committed_packages_are_up_to_date():
    # On its strip_channel: KFP looks its caller up among all modules that are loaded, for each setting of each task; with a test suite's
    # thousands that takes a minute.
    done = subprocess.run([sys.executable, "-m", "pipelines.compile", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_top_layer_reads_like_the_method(package, spec):
    tasks = spec["root"]["dag"]["tasks"]
    generations = (
        ["generation"] if package == GENERATION_PACKAGE else [f"generation-{n}" for n in range(1, MAX_GENERATIONS + 1)]
    )
    before = ["start"] if package == GENERATION_PACKAGE else ["start", "prepare", "teacher"]
    assert set(tasks) == {*before, *generations, "report"}
    # Argo, and what KFP tells of a run, have the same names as the UI.
    assert all(task["taskInfo"]["name"] == name for name, task in tasks.items())
    for earlier, later in pairwise([*before, *generations, "report"]):
        assert earlier in tasks[later]["dependentTasks"]


def test_no_box_has_a_name_that_kfp_made_up(spec):
    for name, component in iterate_dags(spec):
        for task in component["dag"]["tasks"].values():
            assert not re.match(r"condition|for-loop", task["taskInfo"]["name"]), name


def test_stages_are_at_most_two_layers_down(spec):
    layers = dict(find_layers(spec, spec["root"]))
    assert max(depth for stage, depth in layers.items() if stage != "label") <= 2
    # The loop over labeling tasks is itself a box of this name.
    assert layers["label"] <= 3


def test_run_form_asks_at_most_ten_things_in_the_order_of_need(package, spec):
    names = list(spec["root"]["inputDefinitions"]["parameters"])
    assert names == sorted(names), "the order in which KFP's UI shows them"
    assert names == [name for name in INPUTS if package == PACKAGE or name != "generations"]


def test_tasks_refer_to_inputs_of_their_parent(spec):
    for name, component in iterate_dags(spec):
        inputs = set(component.get("inputDefinitions", {}).get("parameters", {}))
        for task in component["dag"]["tasks"].values():
            for value in task.get("inputs", {}).get("parameters", {}).values():
                reference = value.get("componentInputParameter")
                assert reference is None or reference in inputs, (name, reference)


def test_tasks_give_their_components_all_inputs_and_no_others(spec):
    for name, component in iterate_dags(spec):
        for task_name, task in component["dag"]["tasks"].items():
            definitions = spec["components"][task["componentRef"]["name"]].get("inputDefinitions", {}).get("parameters", {})
            item = task.get("parameterIterator", {}).get("itemInput")
            assert set(task["inputs"]["parameters"]) == set(definitions) - {item}, (name, task_name)


def test_resources_refer_to_inputs_of_the_task_itself(spec):
    """In a loop or an If, KFP's compiler leaves inputs of the pipeline that are used for resources dangling."""
    executors = spec["deploymentSpec"]["executors"]
    used = set()
    for component in spec["components"].values():
        if label := component.get("executorLabel"):
            references = re.findall(r"inputs\.parameters\['([^']+)'\]", json.dumps(executors[label]["container"]["resources"]))
            assert set(references) <= set(component["inputDefinitions"]["parameters"]), label
            used |= set(references)
    assert used == {"gpus", "cpu", "memory"}


def test_package_stays_small(package):
    assert package.stat().st_size < 50_000


def test_package_installs_nothing_and_holds_no_code(package, spec):
    assert "pip install" not in package.read_text()
    assert "import" not in json.dumps(spec["deploymentSpec"])
    for component in spec["components"].values():
        assert "description" not in json.dumps(component)


def test_inputs_are_described(spec):
    for name, definition in spec["root"]["inputDefinitions"]["parameters"].items():
        assert definition.get("description"), name


def test_cache_of_kfp_is_off(spec):
    for name, component in iterate_dags(spec):
        for task_name, task in component["dag"]["tasks"].items():
            if "executorLabel" in spec["components"][task["componentRef"]["name"]]:
                assert not task.get("cachingOptions", {}).get("enableCache", False), (name, task_name)


def test_conditions_compare_single_outputs_or_inputs(package, spec):
    assert "oneOf" not in package.read_text()
    tested = set()
    for name, component in iterate_dags(spec):
        for task in component["dag"]["tasks"].values():
            condition = task.get("triggerPolicy", {}).get("condition", "")
            for channel in re.findall(r"parameter_values\['(\w[\w-]*)'\]", condition):
                tested.add(channel)
                source = task["inputs"]["parameters"][channel]
                single = source.get("taskOutputParameter", {}).get("outputParameterKey") == "Output"
                assert single or "componentInputParameter" in source, (name, channel)
    assert tested == ({"known_teacher"} if package == GENERATION_PACKAGE else {"next-teacher-Output"})


def test_no_skipped_task_is_waited_for(spec):
    """The backend waits for `.Succeeded`, and what is skipped did not succeed."""
    for name, component in iterate_dags(spec):
        tasks = component["dag"]["tasks"]
        conditional = {task_name for task_name, task in tasks.items() if "triggerPolicy" in task}
        for task in tasks.values():
            assert not conditional & set(task.get("dependentTasks", ())), name


def test_loops_use_no_output_of_a_task_beside_them(spec):
    """kfp.local would put the loop's item in its place."""
    loops = 0
    for name, component in iterate_dags(spec):
        for task in component["dag"]["tasks"].values():
            if "parameterIterator" in task:
                loops += 1
                assert not any("taskOutputParameter" in value for value in task["inputs"]["parameters"].values()), name
    assert loops


def test_pods_are_valid_to_kubeflow(pods):
    for pod in pods.values():
        json_format.ParseDict(pod, kubernetes_executor_config_pb2.KubernetesExecutorConfig())


def test_stages_have_time_limit_user_and_scratch(spec, pods):
    executors = spec["deploymentSpec"]["executors"]
    assert set(executors) == set(pods)
    for name, pod in pods.items():
        assert int(pod["activeDeadlineSeconds"]) >= 3600, name
        assert pod["securityContext"] == {"runAsGroup": "10001", "runAsNonRoot": True, "runAsUser": "10001"}, name
        assert "/tmp" in [mount["mountPath"] for mount in pod["emptyDirMounts"]], name
        image = Placement().tools_image if name == "exec-select" else Placement().worker_image
        assert executors[name]["container"]["image"] == image


def test_pods_by_their_pool(spec, pods):
    for name, pod in pods.items():
        stage = name.removeprefix("exec-")
        shared = [mount for mount in pod["emptyDirMounts"] if mount["mountPath"] == "/dev/shm"]
        assert [mount["medium"] for mount in shared] == ([] if STAGE_PODS[stage].pool == "cpu" else ["Memory"]), name
        resources = spec["deploymentSpec"]["executors"][name]["container"]["resources"]
        assert ("accelerator" in resources) == (STAGE_PODS[stage].pool != "cpu"), name
        assert pod["podMetadata"]["labels"]["app.kubernetes.io/component"] == stage


def test_secrets_are_files_of_the_stages_that_use_them(pods):
    for name, pod in pods.items():
        folders = {
            entry["mountPath"]: entry["secretNameParameter"]["runtimeValue"]["constant"] for entry in pod["secretAsVolume"]
        }
        also = {REGISTRY_FOLDER: Placement().registry_secret} if name == "exec-select" else {}
        if name in ("exec-teacher", "exec-student", "exec-report"):
            also = {MLFLOW_FOLDER: Placement().mlflow_secret}
        assert folders == {STORE_FOLDER: Placement().storage_secret, **also}, name
        (settings,) = pod["configMapAsVolume"]
        assert settings["mountPath"] == SETTINGS_FOLDER
        assert all(entry["optional"] for entry in (*pod["secretAsVolume"], settings)), name
        # In the environment every process that a stage starts would have the keys.
        assert not {"secretAsEnv", "configMapAsEnv"} & set(pod), name


def test_inputs_have_defaults_among_their_choices(spec):
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert {name for name, definition in parameters.items() if "defaultValue" not in definition} == set()
    offered = {name: definition["literals"] for name, definition in parameters.items() if "literals" in definition}
    assert set(offered) == {"gpus_label", "gpus_train"}
    for name, values in offered.items():
        assert parameters[name]["defaultValue"] in values


def test_equal_components_are_merged(package, spec):
    names = {task["componentRef"]["name"] for name, task in spec["root"]["dag"]["tasks"].items() if "generation" in name}
    assert names == (
        {"comp-next-generation"} if package == GENERATION_PACKAGE else {"comp-first-generation", "comp-generation"}
    )
    assert sorted(spec["deploymentSpec"]["executors"]) == sorted(
        {component.get("executorLabel") for component in spec["components"].values()} - {None}
    )


def test_artifact_types_are_known_to_the_backend(package):
    titles = set(re.findall(r"schemaTitle: (\S+)", package.read_text()))
    assert titles == {"system.Metrics", "system.ClassificationMetrics", "system.HTML", "system.Markdown"}


def test_artifacts_are_where_a_user_looks(spec):
    shown = {
        name.removeprefix("comp-"): sorted(component.get("outputDefinitions", {}).get("artifacts", {}))
        for name, component in spec["components"].items()
        if component.get("outputDefinitions", {}).get("artifacts")
    }
    assert shown == {
        "teacher": ["classification", "metrics"],
        "student": ["classification", "metrics", "page", "summary"],
        "report": ["page", "summary"],
    }


def test_components_have_no_logic():
    import ast

    import components

    for path in Path(components.__file__).parent.glob("[!_]*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.If | ast.For | ast.While | ast.Try), f"{path.name} has logic that belongs in ns"
