"""Training on several nodes, against a stand-in of the Kubernetes API that knows TrainJobs."""

import json
import os
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from components import STORE_FOLDER
from components.cluster import trainjob
from components.cluster.nodes import TrainingNodes
from ns.core.errors import ConfigError, DataError, Interrupted, RunError, TrainingError
from pipelines.placement import Placement
from tests.components.kubernetes_api import JOBS, KubernetesApi

pytestmark = pytest.mark.integration

KEY = "0123456789abcdef"
NAME = f"train-{KEY}"
ARGUMENTS = ["s3://b/r/config.yaml", "s3://b", "r", "data", "1", "", ""]
NODES = TrainingNodes(
    count=2,
    image="worker-cuda@sha256:0",
    runtime="noisy-student",
    runtime_kind="TrainingRuntime",
    gpu_type="nvidia.com/gpu",
    gpus=4,
    cpu="8",
    memory="64Gi",
    selector={"pool": "gpu"},
    tolerations=[{"key": "nvidia.com/gpu", "operator": "Exists"}],
    secret="store",
    settings="noisy-student",
    queue="team",
)


@pytest.fixture
def api(tmp_path, monkeypatch):
    api = KubernetesApi()
    context = {"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "team"}}
    clusters = [{"name": "c", "cluster": {"server": api.url}}]
    kubeconfig = {"current-context": "c", "contexts": [context], "clusters": clusters, "users": [{"name": "u", "user": {}}]}
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config", **kubeconfig}))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr(trainjob, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(trainjob, "QUIET_SECONDS", 1.0)
    monkeypatch.setenv("KFP_POD_NAME", "step")
    monkeypatch.setenv("KFP_POD_UID", "uid-1")
    yield api
    api.close()


@pytest.fixture
def train():
    """Trains, without the rest of the stage."""
    return lambda: trainjob.run_trainjob("r", NODES, KEY, ARGUMENTS)


def succeed(api, name):
    pod = api.pod(name, 0)
    api.pod(name, 1)
    api.logs[pod] += ["one", "two"]
    time.sleep(0.03)
    api.logs[pod].append("three")
    api.pod(name, 0, "Succeeded", 0)
    api.end(name, "Complete")


def test_run_trainjob_shows_the_log_and_deletes_the_job(api, train, capsys):
    wanted = {}

    def created(name):
        wanted.update(api.jobs[name])
        succeed(api, name)

    api.created = created
    train()
    assert [line for line in capsys.readouterr().err.splitlines() if "{" not in line] == ["one", "two", "three"]
    assert api.jobs == {}
    assert wanted["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert wanted["metadata"]["labels"]["noisy-student/run"] == "r"
    # As clients find pods that wait.
    (patch,) = wanted["spec"]["runtimePatches"]
    (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert job["template"]["spec"]["template"]["metadata"]["labels"]["pipeline/runid"] == "id-1"
    assert "other" not in wanted["metadata"]["labels"]
    assert wanted["metadata"]["ownerReferences"] == [{"apiVersion": "v1", "kind": "Pod", "name": "step", "uid": "uid-1"}]
    asked = wanted["spec"]["trainer"]
    assert (asked["numNodes"], asked["numProcPerNode"], asked["args"]) == (2, 4, ARGUMENTS)
    assert asked["resourcesPerNode"]["limits"] == {"memory": "64Gi", "nvidia.com/gpu": "4"}


def test_make_run_label_of_an_invalid_name():
    assert trainjob.make_run_label("digits-1a2b_3.4") == {"noisy-student/run": "digits-1a2b_3.4"}
    for name in ("", "a" * 64, "ends-", "two words", "é"):
        assert trainjob.make_run_label(name) == {}


def test_build_trainjob_is_valid_in_trainer(api):
    job = trainjob.build_trainjob(NAME, ARGUMENTS, NODES, {}, [])
    assert api.refuse(job) is None
    assert "RFC 1035" in api.refuse(job | {"metadata": job["metadata"] | {"name": "Name"}})
    # The field's name in Trainer 2.1.
    assert "spec.podTemplateOverrides" in api.refuse(job | {"spec": job["spec"] | {"podTemplateOverrides": []}})
    wrong = job["spec"]["trainer"] | {"numNodes": "2"}
    assert "invalid" in api.refuse(job | {"spec": job["spec"] | {"trainer": wrong}})


def test_nodes_read_the_keys_of_the_store_from_files():
    """In variables they would stay as they were when the training began, be in the environment of each process, and have no token."""
    job = trainjob.build_trainjob(NAME, ARGUMENTS, NODES, {}, [])
    (patch,) = job["spec"]["runtimePatches"]
    (nodes,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = nodes["template"]["spec"]["template"]["spec"]
    assert {"name": "store-keys", "secret": {"secretName": "store", "optional": True}} in pod["volumes"]
    mount = {"name": "store-keys", "mountPath": STORE_FOLDER, "readOnly": True}
    assert mount in pod["containers"][0]["volumeMounts"]
    assert {"name": "NS_S3_SECRETS", "value": STORE_FOLDER} in job["spec"]["trainer"]["env"]
    runtime = Path(__file__).parents[2] / "k8s" / "components" / "trainer" / "trainingruntime-noisy-student.yaml"
    assert "secretKeyRef" not in json.dumps(job) + runtime.read_text()


def test_placement_names_the_runtime_of_the_manifests():
    trainer = Path(__file__).parents[2] / "k8s" / "components" / "trainer"
    runtime = yaml.safe_load((trainer / "trainingruntime-noisy-student.yaml").read_text())
    assert (Placement().runtime, Placement().runtime_kind) == (runtime["metadata"]["name"], runtime["kind"])
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    assert (job["name"], container["name"]) == (trainjob.NODE_NAME, trainjob.NODE_NAME)
    allowed = yaml.safe_load((trainer / "role-noisy-student-trainer.yaml").read_text())["rules"]
    assert {"create", "get", "patch", "delete"} <= set(allowed[0]["verbs"])


def test_build_trainjob_without_gpus(api):
    plain = replace(NODES, gpus=0, selector={}, tolerations=[])
    job = trainjob.build_trainjob(NAME, ARGUMENTS, plain, {}, [])
    assert api.refuse(job) is None
    assert job["spec"]["trainer"]["numProcPerNode"] == 1
    assert "nvidia" not in json.dumps(job)
    assert "nodeSelector" not in json.dumps(job)


def test_create_job_adopts_the_existing_job(api, train, monkeypatch):
    owner = {"apiVersion": "v1", "kind": "Pod", "name": "before", "uid": "uid-0"}
    api.jobs[NAME] = trainjob.build_trainjob(NAME, ARGUMENTS, NODES, {}, [owner])
    owners = []
    monkeypatch.setattr(
        trainjob.TrainJob, "delete_job", lambda self: owners.extend(api.jobs[NAME]["metadata"]["ownerReferences"])
    )
    threading.Timer(0.02, succeed, (api, NAME)).start()
    train()
    assert [one["uid"] for one in owners] == ["uid-0", "uid-1"]
    assert [request for request in api.requests if request.startswith("POST")] == [f"POST {JOBS}"], "refused: it exists"


def test_create_job_replaces_a_failed_job(api, train):
    api.jobs[NAME] = trainjob.build_trainjob(NAME, ARGUMENTS, NODES, {}, [])
    api.end(NAME, "Failed")
    api.created = lambda name: succeed(api, name)
    train()
    assert api.requests.count(f"DELETE {JOBS}/{NAME}") == 2


def test_follow_job_resumes_the_log_and_waits_for_the_api(api, train, capsys):
    def created(name):
        pod = api.pod(name, 0)
        api.logs[pod] += ["one", "CUT", "three"]
        while "CUT" in api.logs[pod]:
            time.sleep(0.01)
        api.failing = 3
        api.pod(name, 0, "Succeeded", 0)
        api.end(name, "Complete")

    api.created = created
    train()
    assert [line for line in capsys.readouterr().err.splitlines() if "{" not in line] == ["one", "went on", "three"]


def failing(api, line, code=1, reason="Error"):
    def created(name):
        api.pod(name, 0)
        api.logs[api.pod(name, 1, "Failed", code, reason)] += ['{"event": "progress"}', line, "", "exit"]
        api.end(name, "Failed", "jobset failed due to one or more job failures")

    return created


def test_run_trainjob_raises_the_error_of_a_node(api, train):
    api.created = failing(api, json.dumps({"event": "failed", "error": "data.pool: gone", "exit_code": DataError.exit_code}))
    with pytest.raises(DataError, match=re.escape("data.pool: gone")):
        train()
    assert NAME in api.jobs, "kept, to be looked at, until it is tried again"


def test_run_trainjob_names_a_node_that_died(api, train):
    api.created = failing(api, "RuntimeError: no", 137, "OOMKilled")
    with pytest.raises(TrainingError) as caught:
        train()
    assert str(caught.value) == (
        f"TrainJob {NAME}: jobset failed due to one or more job failures; {NAME}-node-0-1 ran out of memory; "
        "the same command continues:\n  RuntimeError: no\n  exit"
    )


def test_run_trainjob_deletes_the_job_on_sigterm(api, train):
    def created(name):
        api.pod(name, 0)
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    api.created = created
    with pytest.raises(Interrupted):
        train()
    assert api.jobs == {}


def test_run_trainjob_fails_if_the_job_is_deleted(api, train):
    def created(name):
        time.sleep(0.02)
        del api.jobs[name]

    api.created = created
    with pytest.raises(RunError, match="was deleted"):
        train()


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (404, "has no TrainJobs .*; install Kubeflow Trainer"),
        (403, r"not allowed in namespace team \(no\).*k8s/components/trainer"),
        (400, "the cluster refuses it: no"),
    ],
)
def test_refusal_messages(api, train, status, said):
    api.refusing = (status, "no")
    with pytest.raises(ConfigError, match=said):
        train()


def test_call_with_retry_gives_up(api, train, monkeypatch):
    monkeypatch.setattr(trainjob, "PATIENCE_SECONDS", 0.05)
    api.failing = 10**6
    with pytest.raises(RunError, match="has not answered"):
        train()


def test_run_trainjob_needs_a_cluster(train, monkeypatch, tmp_path):
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="needs a cluster"):
        train()
