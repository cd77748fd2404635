"""What Argo's Workflow of a run says, in the shape in which Argo 4.0.5 writes it for KFP 2.17."""

import base64
import gzip
import json

import pytest

from k8s.workflow import list_tries, measure_seconds, measure_workflow, read_nodes


def make_node(number, kind, name, started="", **fields):
    return {"id": f"run-{number}", "type": kind, "name": name, "startedAt": started, "phase": "Succeeded", **fields}


@pytest.fixture
def nodes():
    """A teacher whose first pod was killed; its driver; a student of two generations."""
    root = "run(0).root(0)"
    return [
        make_node(1, "Retry", "run"),
        make_node(2, "Pod", "run(0).root-driver(0)"),
        make_node(3, "Pod", f"{root}.teacher-driver(0)"),
        make_node(4, "Retry", f"{root}.teacher(0).executor"),
        make_node(6, "Pod", f"{root}.teacher(0).executor(1)", "2026-01-01T00:02:00Z"),
        make_node(
            5,
            "Pod",
            f"{root}.teacher(0).executor(0)",
            "2026-01-01T00:01:00Z",
            phase="Failed",
            message="main: Error (exit code 137)",
        ),
        make_node(8, "Pod", f"{root}.generation-2(0).student(0).executor(0)", "2026-01-01T00:08:00Z"),
        make_node(7, "Pod", f"{root}.generation-1(0).student(0).executor(0)", "2026-01-01T00:04:00Z"),
    ]


def make_workflow(nodes, *, packed=False):
    by_id = {node["id"]: node for node in nodes}
    status = {"startedAt": "2026-01-01T00:00:00Z", "finishedAt": "2026-01-01T00:09:30Z"}
    if packed:
        return {"status": {**status, "compressedNodes": base64.b64encode(gzip.compress(json.dumps(by_id).encode())).decode()}}
    return {"status": {**status, "nodes": by_id}}


def test_tries_of_a_stage_come_in_the_order_of_their_start(nodes):
    first, second = list_tries(make_workflow(nodes), "teacher")
    assert (first.node_id, first.phase, first.message) == ("run-5", "Failed", "main: Error (exit code 137)")
    assert (second.node_id, second.phase) == ("run-6", "Succeeded")


def test_stage_of_several_generations_counts_for_the_first_one(nodes):
    assert [pod_try.node_id for pod_try in list_tries(make_workflow(nodes), "student")] == ["run-7"]


def test_stage_that_was_not_begun_has_no_tries(nodes):
    assert list_tries(make_workflow(nodes), "report") == []
    assert list_tries({}, "teacher") == []


def test_figures_are_the_same_whether_argo_compressed_the_nodes_or_not(nodes):
    plain, packed = measure_workflow(make_workflow(nodes)), measure_workflow(make_workflow(nodes, packed=True))
    assert plain == packed
    assert (plain.pods, plain.drivers, plain.nodes) == (6, 2, 8)
    assert plain.raw_bytes == len(json.dumps(make_workflow(nodes), separators=(",", ":")))
    assert read_nodes(make_workflow(nodes, packed=True)) == nodes


def test_many_nodes_are_much_smaller_compressed(nodes):
    figures = measure_workflow(make_workflow([{**node, "id": f"{node['id']}-{n}"} for n in range(100) for node in nodes]))
    assert figures.packed_bytes < 0.2 * figures.raw_bytes


def test_wall_time():
    assert measure_seconds(make_workflow([])) == 570
