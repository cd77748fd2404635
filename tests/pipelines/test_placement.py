"""Packages of one cluster."""

import re
from dataclasses import replace

import pytest

from ns.core.errors import ConfigError
from pipelines import GENERATION_PACKAGE, PACKAGE, load_yaml_documents
from pipelines.placement import Placement, read_placement, render_package

GPUS = Placement(
    root="s3://bucket/runs",
    worker_image="worker-cuda@sha256:1",
    tools_image="tools@sha256:1",
    gpu_type="nvidia.com/mig-1g.10gb",
    label_gpus="1",
    label_cpu="6",
    label_memory="24Gi",
    label_node_selector={"pool": "spot"},
    label_tolerations=[{"key": "spot", "operator": "Exists", "effect": "NoSchedule", "tolerationSeconds": 60}],
    train_gpus="8",
    train_cpu="96",
    train_memory="512Gi",
    train_node_selector={"pool": "train"},
    storage_secret="store-keys",
    settings="team",
)


@pytest.mark.parametrize("package", [PACKAGE, GENERATION_PACKAGE], ids=lambda package: package.stem)
def test_render_package_gives_the_same_bytes_whatever_was_filled_in(package):
    committed = package.read_text()
    default = render_package(committed, Placement())
    filled = render_package(committed, GPUS)
    assert filled != committed
    assert render_package(render_package(committed, replace(GPUS, label_node_selector={"x": "y"})), GPUS) == filled
    assert render_package(filled, Placement()) == default
    assert read_placement(filled) == GPUS


def test_render_package_fills_in_all_that_is_the_clusters():
    spec, platform = load_yaml_documents(render_package(PACKAGE.read_text(), GPUS))
    containers = {name: executor["container"] for name, executor in spec["deploymentSpec"]["executors"].items()}
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert {container["image"] for name, container in containers.items() if name != "exec-select"} == {GPUS.worker_image}
    assert containers["exec-select"]["image"] == GPUS.tools_image
    assert containers["exec-label"]["resources"] == {
        "accelerator": {"resourceCount": "{{$.inputs.parameters['gpus']}}", "resourceType": GPUS.gpu_type},
        "resourceCpuRequest": "6",
        "resourceMemoryLimit": "24Gi",
        "resourceMemoryRequest": "24Gi",
    }
    assert pods["exec-label"]["nodeSelector"] == {"labels": {"pool": "spot"}}
    assert pods["exec-label"]["tolerations"] == GPUS.label_tolerations
    assert pods["exec-student"]["nodeSelector"] == pods["exec-teacher"]["nodeSelector"] == {"labels": {"pool": "train"}}
    assert "nodeSelector" not in pods["exec-prepare"]
    for pod in pods.values():
        assert pod["configMapAsVolume"][0]["configMapNameParameter"]["runtimeValue"]["constant"] == "team"
    inputs = spec["root"]["inputDefinitions"]["parameters"]
    assert (inputs["gpus_label"]["defaultValue"], inputs["gpus_train"]["defaultValue"]) == ("1", "8")


def test_pods_of_all_stages_are_in_the_queue():
    def read_queues(placement):
        _, platform = load_yaml_documents(render_package(PACKAGE.read_text(), placement))
        pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values()
        return {pod["podMetadata"]["labels"].get("kueue.x-k8s.io/queue-name") for pod in pods}

    assert read_queues(replace(GPUS, queue="team")) == {"team"}
    assert read_queues(GPUS) == {None}


def test_render_package_under_another_name():
    (spec, _), (committed, _) = (
        load_yaml_documents(text) for text in (render_package(PACKAGE.read_text(), GPUS, name="mine"), PACKAGE.read_text())
    )
    assert (spec["pipelineInfo"]["name"], committed["pipelineInfo"]["name"]) == ("mine", "noisy-student")


@pytest.mark.parametrize("package", [PACKAGE, GENERATION_PACKAGE], ids=lambda package: package.stem)
def test_rendered_loops_run_their_stage_without_a_pipeline_around_it(package):
    committed, rendered = load_spec(package.read_text()), load_spec(render_package(package.read_text(), Placement()))
    flat = 0
    for before, after in iterate_loops(committed, rendered):
        body = committed["components"][before["componentRef"]["name"]]["dag"]["tasks"]["label"]
        component = rendered["components"][after["componentRef"]["name"]]
        assert component == committed["components"][body["componentRef"]["name"]]
        assert (after["retryPolicy"], after.get("dependentTasks")) == (body["retryPolicy"], before.get("dependentTasks"))
        assert after["parameterIterator"] == {"itemInput": "shards", "items": {"inputParameter": "items"}}
        inputs = after["inputs"]["parameters"]
        assert inputs["items"] == before["inputs"]["parameters"]["shards"]
        assert set(inputs) == {"items", *component["inputDefinitions"]["parameters"]} - {"shards"}
        # In what the loop is in, as before.
        for name, value in inputs.items():
            source = body["inputs"]["parameters"].get(name, {}).get("componentInputParameter")
            assert value == before["inputs"]["parameters"].get(source, value)
        flat += 1
    assert flat == (1 if package == GENERATION_PACKAGE else 2)


def test_rendered_loops_have_components_of_their_own():
    """The backend names a loop's templates after its component, and refuses a name that is taken."""
    rendered = load_spec(render_package(PACKAGE.read_text(), Placement()))
    names = [task["componentRef"]["name"] for task in iterate_tasks(rendered) if "parameterIterator" in task]
    assert len(set(names)) == len(names) == 2


def iterate_tasks(spec):
    for component in [spec["root"], *spec["components"].values()]:
        yield from component.get("dag", {}).get("tasks", {}).values()


def iterate_loops(committed, rendered):
    """Loops of the committed package, with what became of them."""
    for name, component in committed["components"].items():
        for task_name, task in component.get("dag", {}).get("tasks", {}).items():
            if "parameterIterator" in task:
                yield task, rendered["components"][name]["dag"]["tasks"][task_name]


def load_spec(text):
    return next(iter(load_yaml_documents(text)))


def test_render_package_with_one_generation():
    whole, single = (load_spec(render_package(PACKAGE.read_text(), Placement(), generations=number)) for number in (0, 1))
    tasks = single["root"]["dag"]["tasks"]
    assert set(tasks) == {"start", "prepare", "teacher", "generation-1", "report"}
    assert tasks["report"]["dependentTasks"] == ["generation-1", "start"]
    # A person who starts it cannot ask for generations that are not in it.
    assert "generations" not in single["root"]["inputDefinitions"]["parameters"]
    assert tasks["start"]["inputs"]["parameters"]["generations"] == {"runtimeValue": {"constant": 1.0}}
    assert set(whole["components"]) - set(single["components"]) == {
        "comp-generation",
        "comp-condition-1",
        "comp-next-teacher",
        "comp-for-loop-2",
    }
    assert set(whole["deploymentSpec"]["executors"]) - set(single["deploymentSpec"]["executors"]) == {"exec-next-teacher"}
    used = {task["componentRef"]["name"] for task in iterate_tasks(single)}
    assert used == set(single["components"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must be an object"),
        ('{"lable_gpus": "1"}', "lable_gpus: is no field of the placement; there are root, worker_image, "),
        ('{"label_gpus": "3"}', "label_gpus: invalid value '3': must be one of 0, 1, 2, 4, 8"),
        ('{"label_cpu": 4}', "label_cpu: invalid value 4: Input should be a valid string"),
        ('{"label_tolerations": {}}', "label_tolerations: invalid value {}: "),
        ('{"settings": "team.settings"}', "settings: invalid value 'team.settings': is mounted as a volume of its name: "),
        (
            '{"settings": "keys", "storage_secret": "keys"}',
            "storage_secret: invalid value 'keys': storage_secret, registry_secret, ",
        ),
        ('{"runtime_kind": "Runtime"}', "runtime_kind: invalid value 'Runtime': "),
    ],
)
def test_from_json_names_what_is_wrong(text, message):
    with pytest.raises(ConfigError, match="^HERE: " + re.escape(message)):
        Placement.from_json(text, "HERE")


def test_from_json_keeps_defaults():
    assert Placement.from_json("", "") == Placement()
    assert Placement.from_json('{"label_gpus": "1"}', "") == Placement(label_gpus="1")
