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
    assert render_package(committed, Placement()) == committed
    filled = render_package(committed, GPUS)
    assert filled != committed
    assert render_package(render_package(committed, replace(GPUS, label_node_selector={"x": "y"})), GPUS) == filled
    assert render_package(filled, Placement()) == committed
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
        assert pod["configMapAsEnv"][0]["configMapNameParameter"]["runtimeValue"]["constant"] == "team"
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must be an object"),
        ('{"lable_gpus": "1"}', "lable_gpus: is no field of the placement; there are root, worker_image, "),
        ('{"label_gpus": "3"}', "label_gpus: invalid value '3': must be one of 0, 1, 2, 4, 8"),
        ('{"label_cpu": 4}', "label_cpu: invalid value 4: Input should be a valid string"),
        ('{"label_tolerations": {}}', "label_tolerations: invalid value {}: "),
        ('{"runtime_kind": "Runtime"}', "runtime_kind: invalid value 'Runtime': "),
    ],
)
def test_from_json_names_what_is_wrong(text, message):
    with pytest.raises(ConfigError, match="^HERE: " + re.escape(message)):
        Placement.from_json(text, "HERE")


def test_from_json_keeps_defaults():
    assert Placement.from_json("", "") == Placement()
    assert Placement.from_json('{"label_gpus": "1"}', "") == Placement(label_gpus="1")
