"""Why pods wait and fail, as Kubernetes shows it."""

import json

import pytest

from k8s import pods
from k8s.kubectl import Kubectl
from k8s.pods import RunPods, explain_end, find_trouble
from ns.core.errors import RunError
from tests.k8s.conftest import thing
from tests.k8s.fake_kubectl import Fake

UNSCHEDULABLE = {
    "conditions": [
        {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": "0/1 nodes are available: 1 Insufficient cpu. no new claims to deallocate",
        }
    ]
}


def pod(name, phase="Pending", stage="train", run="run-1", created="2026-01-01T00:00:00Z", **status):
    labels = {"pipeline/runid": run} | ({"app.kubernetes.io/component": stage} if stage else {})
    made = thing("Pod", name, "kubeflow", labels=labels, status={"phase": phase, **status})
    made["metadata"]["creationTimestamp"] = created
    return made


def waiting(reason, message="", name="main"):
    return {"containerStatuses": [{"name": name, "state": {"waiting": {"reason": reason, "message": message}}}]}


def terminated(**ended):
    return {
        "containerStatuses": [
            {"name": "wait", "state": {"terminated": {"exitCode": 1}}},
            {"name": "main", "state": {"terminated": ended}},
        ]
    }


@pytest.fixture
def cluster(monkeypatch, tmp_path):
    """A cluster whose pods have been pending for a minute at the second look."""
    monkeypatch.setattr(pods, "POLL_SECONDS", 0.0)
    clock = iter(range(0, 10_000, 61))
    monkeypatch.setattr(pods.time, "monotonic", lambda: float(next(clock)))
    return Fake(tmp_path, monkeypatch)


def watch(cluster, polls=3):
    """What is told of the run's pods in some polls."""
    said = []
    run_pods = RunPods(Kubectl("kind-test"), "kubeflow", "run-1", said.append)
    for _ in range(polls):
        run_pods.report_waiting()
    return said


def test_report_waiting_tells_the_pods_own_reason_and_a_cure_once(cluster):
    cluster.state["objects"] = [
        pod("train-1", **UNSCHEDULABLE),
        pod("train-2", **UNSCHEDULABLE),
        pod("label-1", stage="label", **waiting("ImagePullBackOff", "Back-off pulling image x:1")),
        pod("ready", "Running"),
        pod("other", run="run-2", **UNSCHEDULABLE),
    ]
    cluster.save()
    cpu, image = watch(cluster)
    assert cpu == (
        "train: pod train-1 waits: Unschedulable: 0/1 nodes are available: 1 Insufficient cpu. no new claims to deallocate; "
        "no node has so much free: wait for other pods, ask for less with --input NAME=VALUE (docs/pipeline.md), or add a node"
    )
    assert image.startswith("label: pod label-1 waits: ImagePullBackOff: Back-off pulling image x:1; push that image")


def test_report_waiting_gives_a_pod_a_minute(cluster):
    cluster.state["objects"] = [pod("train-1", **UNSCHEDULABLE)]
    cluster.save()
    assert watch(cluster, polls=1) == []


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (
            {**UNSCHEDULABLE, "conditions": [UNSCHEDULABLE["conditions"][0] | {"message": "1 node(s) were unschedulable."}]},
            "Unschedulable: 1 node(s) were unschedulable.; nodes are cordoned: kubectl uncordon NODE, or add a node",
        ),
        (
            {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "SchedulingGated", "message": "gated"}]},
            "SchedulingGated: gated; it waits for its turn in a queue",
        ),
        (waiting("ErrImagePull", "no basic auth"), "ErrImagePull: no basic auth; push that image"),
        (waiting("CreateContainerConfigError", 'secret "s" not found'), 'CreateContainerConfigError: secret "s" not found'),
        (waiting("ContainerCreating"), 'FailedMount: secret "certificates" not found'),
    ],
)
def test_report_waiting_of_each_reason(cluster, status, said):
    event = thing("Event", "e", "kubeflow", type="Warning", reason="FailedMount", message='secret "certificates" not found')
    cluster.state["objects"] = [pod("train-1", **status), event]
    cluster.save()
    (line,) = watch(cluster)
    assert line.startswith(f"train: pod train-1 waits: {said}")


def test_report_waiting_tells_images_once_however_they_fail(cluster, monkeypatch):
    said = []
    run_pods = RunPods(Kubectl("kind-test"), "kubeflow", "run-1", said.append)
    for reason in ("ErrImagePull", "ErrImagePull", "ImagePullBackOff", "ErrImagePull"):
        cluster.state["objects"] = [pod("train-1", **waiting(reason, "x"))]
        cluster.save()
        run_pods.report_waiting()
    assert len(said) == 1


def test_run_pods_of_an_unreachable_cluster_say_nothing(cluster):
    cluster.rule("get pods", stderr="The connection to the server was refused")
    assert watch(cluster) == []
    assert RunPods(Kubectl("kind-test"), "kubeflow", "run-1", print).explain_failures() == {}


def test_explain_failures_by_the_last_pod_of_each_stage(cluster):
    cluster.state["objects"] = [
        pod("train-1", "Failed", created="2026-01-01T00:00:00Z", **terminated(exitCode=1, reason="Error")),
        pod("train-2", "Failed", created="2026-01-01T00:01:00Z", **terminated(exitCode=137, reason="OOMKilled")),
        pod("evaluate-1", "Failed", "evaluate", created="2026-01-01T00:00:00Z", **terminated(exitCode=1)),
        pod("evaluate-2", "Succeeded", "evaluate", created="2026-01-01T00:01:00Z"),
        pod("gate-1", "Failed", "gate", reason="Evicted", message="The node was low on resource: memory."),
        pod("driver-1", "Failed", "", **terminated(exitCode=1, message="no such version\n")),
    ]
    cluster.save()
    cluster.rule("logs", stderr="error: no logs")
    reasons = RunPods(Kubectl("kind-test"), "kubeflow", "run-1", print).explain_failures()
    assert reasons.pop("train").startswith("OOMKilled: it needs more memory than its limit; raise train_memory")
    assert reasons == {
        "gate": "Evicted: The node was low on resource: memory.",
        "driver-1": "exit code 1: no such version",
    }


def workflow(*nodes):
    nodes = {node["id"]: node for node in nodes}
    return thing("Workflow", "run", "kubeflow", labels={"pipeline/runid": "run-1"}, status={"nodes": nodes})


def node(name, message="", phase="Pending", kind="Pod"):
    return {"id": name, "name": f"run(0).root(0).{name}", "type": kind, "phase": phase, "message": message}


QUOTA = 'pods "run-{}" is forbidden: exceeded quota: runs, requested: pods=1, used: pods={}, limited: pods=9'


def test_report_waiting_tells_pods_that_the_quota_refuses(cluster):
    # A node's own pod says why it waits.
    waits = pod("teacher-1", stage="teacher", **UNSCHEDULABLE)
    waits["metadata"]["annotations"] = {"workflows.argoproj.io/node-id": "teacher(0).executor(0)"}
    cluster.state["objects"] = [
        waits,
        workflow(
            node("teacher(0).executor(0)", "Unschedulable: 0/1 nodes are available"),
            node("generation-1(0).label(0).iteration-iterations(3:3)(0).iteration-item(0).executor(0)", QUOTA.format("a-1", 9)),
            node("generation-1(0).label(0).iteration-iterations(4:4)(0).iteration-item(0).executor(1)", QUOTA.format("b-2", 8)),
            node("report-driver(0)", QUOTA.format("c", 9)),
            node("report(0)", "waits", kind="Retry"),
            node("start(0).executor(0)", "done", phase="Succeeded"),
            node("select(0).executor(0)"),
        ),
    ]
    cluster.save()
    teacher, label, report = watch(cluster, polls=4)
    assert teacher.startswith("teacher: pod teacher-1 waits: Unschedulable: 0/1 nodes")
    assert (
        label
        == f"label: its pod is refused: {QUOTA.format('a-1', 9)}; it starts when the namespace has so much left: wait for "
        "other runs, ask for less, or raise the quota"
    )
    assert report.startswith("report: its pod is refused: ")


def test_report_waiting_raises_if_the_workflow_was_deleted(cluster):
    said = []
    run_pods = RunPods(Kubectl("kind-test"), "kubeflow", "run-1", said.append)
    for objects, is_lost in (([workflow()], False), ([], False), ([workflow()], False), ([], False), ([], True)):
        cluster.state["objects"] = objects
        cluster.save()
        if is_lost:
            with pytest.raises(
                RunError, match="its Workflow in kubeflow was deleted, and Kubeflow goes on to show it as it was"
            ):
                run_pods.report_waiting()
        else:
            run_pods.report_waiting()
    assert said == []


def test_report_waiting_only_tells_of_a_workflow_that_it_never_saw(cluster):
    # It may look in the wrong namespace.
    cluster.state["objects"] = []
    cluster.save()
    (line,) = watch(cluster, polls=4)
    assert line.startswith("run: perhaps its Workflow in kubeflow was deleted")


def test_report_waiting_of_the_nodes_of_a_training(cluster):
    other = pod("train-1-node-0-1", "Failed", **terminated(exitCode=1))
    node_pod = pod("train-1-node-0-0", **UNSCHEDULABLE)
    for each in (other, node_pod):
        each["metadata"]["labels"]["jobset.sigs.k8s.io/jobset-name"] = "train-1"
    cluster.state["objects"] = [node_pod, other]
    cluster.save()
    (line,) = watch(cluster)
    assert line.startswith("train: pod train-1-node-0-0 waits: Unschedulable: 0/1 nodes")
    # Their stage tells why nodes failed.
    assert RunPods(Kubectl("kind-test"), "kubeflow", "run-1", print).explain_failures() == {}


def test_explain_failures_by_what_the_stage_logged(cluster):
    cluster.state["objects"] = [pod("train-1", "Failed", **terminated(exitCode=1))]
    cluster.save()
    failed = json.dumps({"event": "failed", "error": "data.pool: there are no images; add some", "exit_code": 3})
    cluster.rule("logs train-1", code=0, stdout=f'{{"event": "started"}}\n{failed}\nF1129 launcher: exit status 1\n')
    reasons = RunPods(Kubectl("kind-test"), "kubeflow", "run-1", print).explain_failures()
    assert reasons == {"train": "data.pool: there are no images; add some"}


def test_explain_end_of_a_pod_without_a_status():
    assert explain_end(pod("a", "Failed")) == ""


def test_find_trouble_is_that_of_the_workloads_own_pods():
    assert find_trouble([pod("mysql-1", **waiting("ImagePullBackOff", "no such\nimage"))], "mysql").endswith("no such image")
    assert find_trouble([pod("mysqlx-1", **waiting("ImagePullBackOff"))], "mysql") == ""
