"""What the pod of a training asks for, on one node and on several."""

import json
from dataclasses import asdict

import pytest

from components.cluster import trainjob
from components.cluster.nodes import make_launcher, plan_training_pod
from ns.core.errors import ConfigError
from pipelines.placement import Placement

CLUSTER = asdict(
    Placement(
        worker_image="worker-cuda@sha256:0",
        train_cpu="96",
        train_memory="512Gi",
        train_node_selector={"pool": "gpu"},
        queue="team",
    )
)


def test_plan_training_pod_on_one_node_has_its_resources():
    assert plan_training_pod(CLUSTER, "8", 1) == ("8", "96", "512Gi", {})
    assert make_launcher("run", {}) is None


def test_plan_training_pod_on_several_nodes_only_starts_them(monkeypatch):
    pod = plan_training_pod(CLUSTER, "8", 4)
    assert pod[:3] == ("0", "500m", "2Gi")
    started = []
    monkeypatch.setattr(trainjob, "run_trainjob", lambda *arguments: started.append(arguments))
    # KFP passes whole numbers on as floats.
    nodes = json.loads(json.dumps(pod.nodes), parse_int=float)
    make_launcher("run", nodes)("0123", ["a"])
    ((run, started_nodes, training_id, arguments),) = started
    assert (run, training_id, arguments) == ("run", "0123", ["a"])
    assert (started_nodes.count, started_nodes.gpus, started_nodes.cpu, started_nodes.memory) == (4, 8, "96", "512Gi")
    assert (started_nodes.image, started_nodes.selector, started_nodes.queue) == (
        "worker-cuda@sha256:0",
        {"pool": "gpu"},
        "team",
    )
    assert isinstance(started_nodes.count, int)


@pytest.mark.parametrize(
    ("gpus", "nodes", "words"), [("8", 0, "nodes: invalid value 0"), ("many", 1, "gpus_train: invalid value 'many'")]
)
def test_plan_training_pod_names_a_wrong_number(gpus, nodes, words):
    with pytest.raises(ConfigError, match=words):
        plan_training_pod(CLUSTER, gpus, nodes)
