"""CPU and memory of stages that fit the nodes of a cluster."""

from dataclasses import asdict

import pytest

from k8s.node_room import find_rooms, fit_resources
from ns.core.errors import ClusterError
from pipelines.placement import Placement
from tests.k8s.conftest import thing

DEFAULTS = asdict(Placement())
READY = [{"type": "Ready", "status": "True"}]


def make_node(name, cpu, memory, labels=None, **spec):
    return thing(
        "Node", name, labels=labels, spec=spec, status={"conditions": READY, "allocatable": {"cpu": cpu, "memory": memory}}
    )


def make_spec(cpu, memory):
    return {"containers": [{"resources": {"requests": {"cpu": cpu, "memory": memory}}}, {"name": "side-car"}]}


def make_pod(name, cpu, memory, labels=None, phase="Running"):
    return thing(
        "Pod", name, "kubeflow", labels=labels, spec={**make_spec(cpu, memory), "nodeName": "small"}, status={"phase": phase}
    )


KUBEFLOW = thing("Deployment", "ml-pipeline", "kubeflow", spec={"template": {"spec": make_spec("250m", "500Mi")}})
SMALL = make_node("small", "2", "24Gi")


def test_defaults_are_lowered_to_what_a_small_node_has_left():
    filled, lines = fit_resources([SMALL], find_rooms([SMALL], [], [KUBEFLOW]), {"train_gpus": "0"}, DEFAULTS)
    # 2 less 0.25 of Kubeflow and 0.2 of drivers.
    assert filled == {"train_cpu": "1500m", "label_cpu": "1500m"}
    assert lines[0] == "train_cpu 1500m, not 2: what small has beside the platform"


def test_defaults_stay_where_a_node_is_large_enough():
    nodes = [SMALL, make_node("large", "16", "64Gi")]
    assert fit_resources(nodes, find_rooms(nodes, [], [KUBEFLOW]), {}, DEFAULTS) == ({}, [])


def test_memory_is_lowered_too():
    nodes = [make_node("tiny", "4", "8Gi")]
    filled, _ = fit_resources(nodes, find_rooms(nodes, [], [KUBEFLOW]), {}, DEFAULTS)
    assert filled == {"train_memory": "7168Mi", "label_memory": "7168Mi"}


def test_room_is_the_same_before_and_after_a_deployment():
    foreign = make_pod("database-0", "500m", "1Gi")
    before = find_rooms([SMALL], [foreign], [KUBEFLOW])
    own = make_pod("ml-pipeline-5d8f-x2", "250m", "500Mi")
    run = make_pod("noisy-student-7-stage", "1", "8Gi", {"workflows.argoproj.io/workflow": "w"})
    over = make_pod("upload-1", "1", "1Gi", phase="Succeeded")
    assert find_rooms([SMALL], [foreign, own, run, over], [KUBEFLOW]) == before
    assert before["small"].cpu == pytest.approx(2 - 0.5 - 0.25 - 0.2)


def test_what_the_overlay_says_is_kept_and_told():
    nodes = [make_node("gpu", "32", "128Gi", {"pool": "train"}), make_node("cpu", "64", "256Gi")]
    inputs = {
        "train_cpu": "96",
        "train_memory": "64Gi",
        "train_node_selector": {"pool": "train"},
        "label_node_selector": {"pool": "label"},
    }
    filled, lines = fit_resources(nodes, find_rooms(nodes, [], []), inputs, DEFAULTS)
    # The pool for labeling scales from zero.
    assert (filled, lines) == ({}, ["train_cpu 96: no node has so much left (gpu: 31800m)"])


def test_cordoned_nodes_do_not_count():
    nodes = [make_node("away", "64", "256Gi", unschedulable=True), SMALL]
    assert set(find_rooms(nodes, [], [])) == {"small"}


def test_quantity_that_is_none_is_told_with_its_field():
    with pytest.raises(ClusterError, match="train_memory of the placement: '16 GB': is no quantity, as 500m, 8 or 16Gi"):
        fit_resources([SMALL], find_rooms([SMALL], [], []), {"train_memory": "16 GB"}, DEFAULTS)
