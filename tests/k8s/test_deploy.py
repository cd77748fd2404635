"""Deploying to a cluster that is a stand-in, with a kubectl that records what it is told."""

import json
import re
import threading
import time

import pytest

from k8s import deploy, doctor, kubectl, manifests, pods, rollout
from k8s.__main__ import app
from k8s.deploy import DeployOptions, deploy_overlay, undeploy_overlay
from k8s.release import CONFIG_MAP_NAME
from ns.cli.app import run_app
from ns.core.errors import ClusterError, ConfigError, Interrupted, NsError, RunError, StoreError, TerminatedError
from ns.runs.records import write_stage_failure
from ns.storage import LocalStore
from pipelines import kfp_client, upload
from tests.k8s.conftest import node, thing, workload
from tests.k8s.fake_kubectl import Fake
from tests.pipelines.kfp_api import KfpApi

pytestmark = pytest.mark.integration

IMAGES = ("r.example/noisy-student/worker:1", "r.example/noisy-student/tools:1")


def job(image):
    spec = {"template": {"spec": {"containers": [{"name": "main", "image": image}], "restartPolicy": "Never"}}}
    return thing("Job", "set-up", "kubeflow", api="batch/v1", spec=spec)


def overlay():
    """What kustomize makes of it."""
    store = workload("seaweedfs", "ghcr.io/chrislusf/seaweedfs:4.34", "kubeflow", "StatefulSet")
    return [
        thing("Widget", "one", "kubeflow", api="example.com/v1"),
        job("r.example/noisy-student/tools:1"),
        workload("ml-pipeline", "ghcr.io/kubeflow/kfp-api-server:2.17.0", "kubeflow"),
        {**store, "status": {}},
        thing("ConfigMap", "noisy-student", "kubeflow", data={"AWS_REGION": "us-east-1"}),
        thing("ConfigMap", "noisy-student-pools", "kubeflow", data={"inputs.json": '{"label_gpus": "1"}'}),
        thing("CronJob", "upload-pipelines", "kubeflow", api="batch/v1", spec={}),
        thing("PersistentVolumeClaim", "mysql-pv-claim", "kubeflow", spec={}),
        thing("Namespace", "kubeflow"),
        thing(
            "CustomResourceDefinition",
            "widgets.example.com",
            api="apiextensions.k8s.io/v1",
            spec={"names": {"kind": "Widget", "plural": "widgets"}},
        ),
    ]


def bare():
    annotations = {"storageclass.kubernetes.io/is-default-class": "true"}
    return [node("one"), thing("StorageClass", "standard", api="storage.k8s.io/v1", annotations=annotations)]


class World:
    """A cluster, Kubeflow's API in it, and a checkout whose overlays render to `rendered`."""

    def __init__(self, tmp_path, monkeypatch):
        self.kfp = KfpApi()
        self.store = LocalStore(tmp_path / "store")
        monkeypatch.setattr(deploy, "open_store", lambda uri: self.store)
        self.cluster = Fake(tmp_path / "cluster", monkeypatch, bare(), contexts=["kind-test", "prod"], current="kind-test")
        self.cluster.state["port"] = int(self.kfp.url.rpartition(":")[2])
        self.render(overlay())
        self.said = []
        for name in ("kind", "dev"):
            (tmp_path / "overlays" / name).mkdir(parents=True)
            (tmp_path / "overlays" / name / "kustomization.yaml").write_text("resources: []\n")
        monkeypatch.setattr(manifests, "OVERLAYS", tmp_path / "overlays")
        monkeypatch.setattr(manifests, "CHECKOUT", tmp_path)
        monkeypatch.setattr(rollout, "POLL_SECONDS", 0.05)
        monkeypatch.setattr(kfp_client, "POLL_SECONDS", 0.05)
        monkeypatch.setattr(deploy, "RETRY_SECONDS", 0.05)
        # Filling in the other one, which tests/pipelines/test_upload.py does, would take half of the time here.
        monkeypatch.setattr(upload, "PACKAGES", [file for file in upload.PACKAGES if file.stem == "noisy_student"])

    def render(self, objects):
        if self.cluster.folder.joinpath("calls.jsonl").exists():
            self.cluster.load()
        self.cluster.state["rendered"] = objects
        self.cluster.save()

    def deploy(self, ask=None, **options):
        options = {"context": "kind-test", "images": IMAGES, "smoke": False, "ready_seconds": 60, **options}
        return deploy_overlay(DeployOptions(**options), self.said.append, ask, lambda findings: None)

    def undeploy(self, ask=None, *, delete_data=False, **options):
        return undeploy_overlay(
            DeployOptions(**{"context": "kind-test", **options}), self.said.append, ask, delete_data=delete_data
        )

    def record(self):
        found = next(item for item in self.cluster.load() if item["metadata"]["name"] == CONFIG_MAP_NAME)
        return json.loads(found["data"]["record"])

    def applied(self):
        """Kinds and names in the order in which they came."""
        lines = (self.cluster.folder / "calls.jsonl").read_text().splitlines()
        calls = [json.loads(line) for line in lines]
        return [
            f"{item['kind']}/{item['metadata']['name']}"
            for call in calls
            if "apply" in call["arguments"] and not any("dry-run" in word for word in call["arguments"])
            for item in json.loads(call["data"])["items"]
        ]


@pytest.fixture
def world(tmp_path, monkeypatch):
    for variable in ("NS_KFP_URL", "NS_KFP_TOKEN", "NS_KFP_NAMESPACE", "NS_KFP_UI"):
        monkeypatch.delenv(variable, raising=False)
    made = World(tmp_path, monkeypatch)
    yield made
    made.kfp.close()


def test_deploy_applies_objects_in_order(world):
    record = world.deploy()
    assert record.state == "complete"
    order = world.applied()
    first = {name: order.index(name) for name in order}
    assert first["Namespace/kubeflow"] < first[f"ConfigMap/{CONFIG_MAP_NAME}"] < first["Deployment/ml-pipeline"]
    assert first["CustomResourceDefinition/widgets.example.com"] < first["PersistentVolumeClaim/mysql-pv-claim"]
    assert first["PersistentVolumeClaim/mysql-pv-claim"] < first["StatefulSet/seaweedfs"]
    # What a controller has to be there for, and what runs once, come last.
    assert max(first["Deployment/ml-pipeline"], first["StatefulSet/seaweedfs"]) < first["Widget/one"] < first["Job/set-up"]
    calls = world.cluster.calls()
    assert all("--context=kind-test" in call for call in calls if " view" not in call)
    assert all({"--server-side", "--field-manager=noisy-student"} <= set(call.split()) for call in calls if " apply " in call)
    keys = next(item for item in world.cluster.load() if item["kind"] == "Secret")["data"]
    assert set(keys) == {"accesskey", "secretkey"}
    assert "newTag: '1'" in (world.cluster.folder / "kustomization.yaml").read_text()
    assert list(record.pipelines) == [version.rpartition("-")[0] for version in record.pipelines.values()]
    assert world.kfp.requests.count("POST /pipelines/upload_version") == len(record.pipelines)


def test_deploy_sets_images_of_the_run_form(world):
    world.deploy()
    (pools,) = [item for item in world.cluster.load() if item["metadata"]["name"] == "noisy-student-pools"]
    assert json.loads(pools["data"]["inputs.json"]) == {
        "label_gpus": "1",
        "worker_image": IMAGES[0],
        "tools_image": IMAGES[1],
    }


def test_deploy_writes_the_queue_of_the_overlay_into_the_placement(world):
    queue = thing(
        "LocalQueue", "noisy-student", "kubeflow", api="kueue.x-k8s.io/v1beta2", spec={"clusterQueue": "noisy-student"}
    )
    world.render([*overlay(), queue])
    world.deploy(preflight=False)
    (pools,) = [item for item in world.cluster.load() if item["metadata"]["name"] == "noisy-student-pools"]
    assert json.loads(pools["data"]["inputs.json"])["queue"] == "noisy-student"


def test_deploy_again_changes_nothing(world):
    first = world.deploy()
    before = world.cluster.load()
    uploads = world.kfp.requests.count("POST /pipelines/upload_version")
    again = world.deploy()
    after = {json.dumps(item, sort_keys=True) for item in world.cluster.load() if item["metadata"]["name"] != CONFIG_MAP_NAME}
    assert after == {json.dumps(item, sort_keys=True) for item in before if item["metadata"]["name"] != CONFIG_MAP_NAME}
    assert (again.pipelines, again.objects) == (first.pipelines, first.objects)
    assert world.kfp.requests.count("POST /pipelines/upload_version") == uploads
    assert world.cluster.calls(r" delete ") == []


def test_deploy_continues_after_a_failure(world):
    world.cluster.rule(r"apply --server-side --field-manager", stderr="error: etcd is full", times=1, after=3)
    # Two objects go before, and the record: this is in the middle of the rest.
    with pytest.raises(ClusterError, match="etcd is full"):
        world.deploy()
    assert world.record()["state"] == "under way"
    assert "StatefulSet/seaweedfs" not in world.cluster.names()

    assert world.deploy().state == "complete"
    assert any("did not finish" in line for line in world.said)
    assert {"StatefulSet/seaweedfs", "Widget/one", "Job/set-up"} <= set(world.cluster.names())


def test_undeploy_removes_a_failed_deployment(world):
    world.cluster.rule(r"apply --server-side --field-manager", stderr="error: etcd is full", times=1, after=4)
    with pytest.raises(ClusterError):
        world.deploy()
    assert world.undeploy()
    left = [item["kind"] for item in world.cluster.load() if item["metadata"].get("namespace") == "kubeflow"]
    assert "Deployment" not in left


def test_deploy_retries_while_a_webhook_starts(world):
    world.cluster.rule(
        r"apply --server-side --field-manager",
        stderr='Error from server (InternalError): failed calling webhook "w.example.com": connection refused',
        times=1,
        after=2,
    )
    assert world.deploy().state == "complete"
    assert any("retry in" in line for line in world.said)


def test_deploy_without_permission_changes_nothing(world):
    world.cluster.load()
    world.cluster.state["denied"] = ["create namespaces", "patch widgets"]
    world.cluster.save()
    with pytest.raises(ClusterError, match="nothing was changed: permissions"):
        world.deploy()
    assert world.cluster.calls(r" (apply|delete) ") == []
    assert not [call for call in world.cluster.calls(" create ") if "--raw" not in call]


def test_deploy_continues_after_a_refused_permission(world):
    world.cluster.rule(
        r"apply --server-side", stderr='Error from server (Forbidden): namespaces is forbidden: User "eve"', times=1
    )
    with pytest.raises(ClusterError, match="ask for that right"):
        world.deploy(preflight=False)
    assert world.deploy().state == "complete"


def test_deploy_takes_over_fields_only_with_force_conflicts(world):
    others = thing("ConfigMap", "noisy-student", "kubeflow", data={"AWS_REGION": "eu"})
    others["metadata"]["foreign"] = True
    world.cluster.load().append(others)
    world.cluster.save()
    with pytest.raises(ClusterError, match="--force-conflicts"):
        world.deploy()
    assert world.deploy(force_conflicts=True).state == "complete"


def test_deploy_tries_everything_before_it_changes_anything(world):
    world.deploy()
    world.cluster.forget()
    foreign = [item for item in world.cluster.load() if item["metadata"]["name"] in ("mysql-pv-claim", "noisy-student")]
    for item in foreign:
        item["metadata"]["foreign"] = True
    world.cluster.save()
    with pytest.raises(ClusterError) as refused:
        world.deploy()
    lines = str(refused.value).splitlines()
    assert lines[0] == "nothing was changed: the cluster refuses"
    assert {line.split(": Apply failed")[0].strip() for line in lines[1:]} == {
        "PersistentVolumeClaim kubeflow/mysql-pv-claim",
        "ConfigMap kubeflow/noisy-student",
    }
    assert "--force-conflicts" in lines[1]
    assert world.applied() == []
    assert world.cluster.calls(r" (delete|patch) ") == []


def claim(size, class_name="standard"):
    spec = {"storageClassName": class_name, "resources": {"requests": {"storage": size}}}
    return thing("PersistentVolumeClaim", "data-seaweedfs-0", "kubeflow", spec=spec)


def overlay_with_claim(size):
    template = {"metadata": {"name": "data"}, "spec": {"resources": {"requests": {"storage": size}}}}
    objects = overlay()
    (store,) = [item for item in objects if item["kind"] == "StatefulSet"]
    store["spec"]["volumeClaimTemplates"] = [template]
    return objects


@pytest.mark.parametrize(
    ("size", "expandable", "result", "note"),
    [
        ("100Gi", True, "100Gi", "is enlarged from 10Gi to 100Gi"),
        ("100Gi", False, "10Gi", "keeps its 10Gi, not 100Gi: storage class standard does not enlarge volumes"),
        ("5Gi", True, "10Gi", "keeps its 10Gi: a volume cannot be made smaller"),
    ],
)
def test_stateful_set_is_made_again_around_its_volumes(world, capsys, size, expandable, result, note):
    world.render(overlay_with_claim("10Gi"))
    world.deploy()
    world.cluster.load().append(claim("10Gi"))
    next(item for item in world.cluster.state["objects"] if item["kind"] == "StorageClass")["allowVolumeExpansion"] = expandable
    world.cluster.save()
    world.render(overlay_with_claim(size))
    world.cluster.forget()
    assert run_app(app, ["diff", "--context=kind-test", *(f"--image={name}" for name in IMAGES)], "make") == 0
    shown = capsys.readouterr().out
    assert "! StatefulSet kubeflow/seaweedfs: is made again around its pods and volumes" in shown
    assert f"! PersistentVolumeClaim kubeflow/data-seaweedfs-0: {note}\n" in shown
    assert world.cluster.calls(r" (delete|patch) ") == []
    assert world.deploy().state == "complete"
    assert f"PersistentVolumeClaim kubeflow/data-seaweedfs-0: {note}" in world.said
    (deleted,) = world.cluster.calls(r" delete ")
    assert "delete statefulset.apps seaweedfs" in deleted
    assert "--cascade=orphan" in deleted
    found = {item["metadata"]["name"]: item for item in world.cluster.load()}
    assert found["data-seaweedfs-0"]["spec"]["resources"]["requests"]["storage"] == result
    assert found["seaweedfs"]["spec"]["volumeClaimTemplates"][0]["spec"]["resources"]["requests"]["storage"] == size


def test_deploy_tells_names_that_runs_cannot_look_up(world, monkeypatch):
    objects = overlay()
    server = next(item for item in objects if item["metadata"]["name"] == "ml-pipeline")
    server["spec"]["template"]["spec"]["initContainers"] = [{"name": "wait", "image": "docker.io/alpine:3.23"}]
    world.render(objects)
    monkeypatch.setattr(doctor, "find_unresolved_names", lambda *arguments: ["ml-pipeline.kubeflow"])
    with pytest.raises(ClusterError, match="deployed, but runs would fail"):
        world.deploy()
    assert world.record()["state"] == "under way"
    assert world.kfp.requests.count("POST /pipelines/upload_version") == 0
    monkeypatch.setattr(doctor, "find_unresolved_names", lambda *arguments: [])
    assert world.deploy().state == "complete"


def test_deploy_outlives_a_restart_of_the_api_server(world, monkeypatch):
    monkeypatch.setattr(kubectl, "RETRY_SECONDS", 0.05)
    refused = "The connection to the server was refused - did you specify the right host or port?"
    world.cluster.rule(r"apply --server-side", stderr=refused, times=1, after=3)
    world.cluster.rule(r"get .*statefulsets", stderr=refused, times=2)
    assert world.deploy().state == "complete"
    assert any("retry in" in line for line in world.said)


@pytest.mark.parametrize(
    ("options", "question"),
    [
        ({"context": ""}, "KUBE_CONTEXT is not given, and kind-test (https://kind-test.example) is the current one"),
        ({"context": "prod", "overlay": "kind"}, "overlay kind is for local clusters, and prod is not one"),
    ],
)
def test_deploy_asks_about_a_doubtful_context(world, options, question):
    with pytest.raises(ConfigError, match="no terminal to ask on: give KUBE_CONTEXT"):
        world.deploy(**options)
    asked = []
    with pytest.raises(Interrupted):
        world.deploy(lambda text: bool(asked.append(text)), **options)
    assert asked[0].startswith(question)
    assert world.cluster.calls(r" (apply|delete|create) ") == []
    assert world.deploy(lambda text: True, **options).state == "complete"
    assert world.deploy(**options, yes=True).state == "complete"


def test_deploy_asks_about_another_overlay(world):
    world.deploy()
    with pytest.raises(ConfigError, match="overlay kind is deployed in kubeflow on kind-test, not dev"):
        world.deploy(overlay="dev")
    # Not said, it is the one that is there.
    assert world.deploy().overlay == "kind"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": "nope"}, "KUBE_CONTEXT=nope: there is no such context; choose one of kind-test, prod"),
        (
            {"overlay": "nope"},
            "OVERLAY 'nope': is no folder with a kustomization.yaml, and no overlay in overlays; choose one of dev, kind",
        ),
        ({"context": "prod", "images": ()}, "REGISTRY is not given"),
        ({"images": ("worker:1",)}, "--image worker:1: must end in /worker:TAG"),
    ],
)
def test_deploy_refuses_unusable_options(world, options, message):
    with pytest.raises(ConfigError, match=message):
        world.deploy(**options)
    assert world.cluster.calls(r" apply ") == []


def test_deploy_deletes_removed_objects_except_data(world):
    world.deploy()
    world.render([item for item in overlay() if item["kind"] not in ("Widget", "PersistentVolumeClaim")])
    world.deploy()
    names = world.cluster.names()
    assert "Widget/one" not in names
    assert "PersistentVolumeClaim/mysql-pv-claim" in names
    # It is still known, and goes with the data.
    world.undeploy(delete_data=True, yes=True)
    assert "PersistentVolumeClaim/mysql-pv-claim" not in world.cluster.names()


def test_deploy_runs_a_changed_job_again(world):
    world.deploy()
    world.render([item if item["kind"] != "Job" else job("r.example/noisy-student/tools:2") for item in overlay()])
    world.deploy()
    assert len(world.cluster.calls(r" delete job\.batch set-up ")) == 1
    made = next(item for item in world.cluster.load() if item["kind"] == "Job")
    assert made["spec"]["template"]["spec"]["containers"][0]["image"].endswith("tools:2")


def test_undeploy_keeps_data_and_preexisting_objects(world):
    world.cluster.load().append(thing("CustomResourceDefinition", "widgets.example.com", api="apiextensions.k8s.io/v1"))
    world.cluster.save()
    world.deploy()
    claim = thing("PersistentVolumeClaim", "data-seaweedfs-0", "kubeflow", spec={})
    world.cluster.load().append(claim)
    world.cluster.save()
    assert world.undeploy()
    kinds = [item["kind"] for item in world.cluster.load() if item["metadata"].get("namespace") == "kubeflow"]
    assert sorted(kinds) == ["ConfigMap", "PersistentVolumeClaim", "PersistentVolumeClaim", "Secret"]
    assert world.record()["state"] == "removed"
    order = [call.split()[2] for call in world.cluster.calls(r" delete ")]
    assert order.index("widget.example.com") < order.index("deployment.apps")

    # Twice is once, and deploying again finds the data and its keys.
    keys = [item for item in world.cluster.load() if item["kind"] == "Secret"]
    assert world.undeploy()
    world.deploy()
    assert [item for item in world.cluster.load() if item["kind"] == "Secret"] == keys


def test_undeploy_deletes_data_only_after_confirmation(world):
    world.deploy()
    world.cluster.load().append(thing("PersistentVolumeClaim", "data-seaweedfs-0", "kubeflow", spec={}))
    world.cluster.save()
    with pytest.raises(ConfigError, match="ALL DATA in kubeflow would be deleted; there is no terminal to ask on"):
        world.undeploy(delete_data=True)
    assert world.cluster.calls(r" delete ") == []
    world.undeploy(delete_data=True, yes=True)
    assert [item["kind"] for item in world.cluster.load()] == ["Node", "StorageClass"]
    assert not world.undeploy()
    assert world.said[-1] == "nothing is deployed on kind-test"


def test_undeploy_asks_about_active_runs(world):
    world.deploy()
    world.cluster.load().append(thing("Workflow", "run-1", "kubeflow", api="argoproj.io/v1alpha1", status={"phase": "Running"}))
    world.cluster.save()
    with pytest.raises(ConfigError, match="1 runs are active"):
        world.undeploy()
    assert world.cluster.calls(r" delete ") == []


def test_deploy_names_workloads_that_are_not_ready(world):
    never = {
        **workload("mysql", "mysql:8", "kubeflow"),
        "metadata": {"name": "mysql", "namespace": "kubeflow", "generation": 2},
    }
    waits = {"state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such\nimage"}}}
    world.cluster.load().append(thing("Pod", "mysql-1", "kubeflow", status={"containerStatuses": [waits]}))
    world.cluster.save()
    world.render([*overlay(), never])
    with pytest.raises(ClusterError, match=r"kubeflow/mysql: not seen yet: ImagePullBackOff: no such image"):
        world.deploy(ready_seconds=0.2)
    assert world.record()["state"] == "under way"


def test_smoke_run_runs_once_per_version(world):
    def play():
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            for run in world.kfp.alive:
                world.kfp.end(run.run_id, "SUCCEEDED")
                return
            time.sleep(0.05)

    player = threading.Thread(target=play, daemon=True)
    player.start()
    world.deploy(smoke=True)
    player.join()
    assert any(line.endswith(": succeeded") for line in world.said)
    world.deploy(smoke=True)
    assert any("succeeded earlier" in line for line in world.said)
    assert world.kfp.requests.count("POST /runs") == 1


def play_smoke_run(world, play):
    """Deploys with a smoke run, which `play` plays; returns the error."""

    def wait_and_play():
        deadline = time.monotonic() + 120
        while not world.kfp.alive and time.monotonic() < deadline:
            time.sleep(0.05)
        play(world.kfp.alive[0])

    player = threading.Thread(target=wait_and_play, daemon=True)
    player.start()
    with pytest.raises(NsError) as caught:
        world.deploy(smoke=True)
    player.join()
    return caught.value


def test_failed_smoke_run_is_told_with_stage_reason_and_cure(world):
    def play(run):
        reason = "no image is kept: lower selection.min_confidence"
        write_stage_failure(world.store, run.display_name, 1, "select", reason, note_name="select")
        world.kfp.end(run.run_id, "FAILED")

    error = play_smoke_run(world, play)
    assert type(error) is RunError
    assert re.fullmatch(
        r"smoke run smoke-\S+: generation 1: select: no image is kept: lower selection\.min_confidence; "
        r"logs: http://localhost:8080/#/runs/details/\S+; `make ui` opens its pages; then deploy again",
        str(error),
    )


def test_terminated_smoke_run_is_told_as_terminated(world):
    def play(run):
        for state in ("CANCELING", "FAILED"):
            world.kfp.end(run.run_id, state)

    error = play_smoke_run(world, play)
    assert type(error) is TerminatedError
    assert "was terminated in Kubeflow" in str(error)


def test_smoke_run_tells_pods_that_wait_and_why_they_ended_where_the_store_cannot_be_read(world, monkeypatch):
    def away(*_):
        raise StoreError("s3://mlpipeline: cannot be reached")

    for method in ("list", "entries", "put"):
        monkeypatch.setattr(LocalStore, method, away)
    monkeypatch.setattr(pods, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(pods, "PENDING_SECONDS", 0.0)

    def play(run):
        labels = {"pipeline/runid": run.run_id, "app.kubernetes.io/component": "train"}
        reason = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "1 Insufficient cpu"}
        pod = thing("Pod", "train-1", "kubeflow", labels=labels, status={"phase": "Pending", "conditions": [reason]})
        world.cluster.load().append(pod)
        world.cluster.save()
        deadline = time.monotonic() + 60
        while not any("waits" in line for line in world.said) and time.monotonic() < deadline:
            time.sleep(0.05)
        ended = {"name": "main", "state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}
        pod["status"] = {"phase": "Failed", "containerStatuses": [ended]}
        world.cluster.save()
        world.kfp.end(run.run_id, "FAILED")

    error = play_smoke_run(world, play)
    assert "train: OOMKilled: it needs more memory than its limit" in str(error)
    waiting = [line for line in world.said if "waits" in line]
    assert len(waiting) == 1
    assert waiting[0].startswith("  train: pod train-1 waits: Unschedulable: 1 Insufficient cpu")


def test_diff_shows_changes_and_changes_nothing(world, capsys):
    options = ["diff", "--context=kind-test", *(f"--image={name}" for name in IMAGES)]
    assert run_app(app, options, "make") == 0
    assert "+ Deployment kubeflow/ml-pipeline" in capsys.readouterr().out
    world.deploy()
    world.cluster.forget()
    assert run_app(app, options, "make") == 0
    assert capsys.readouterr().out == "no differences\n"
    changed = [item for item in overlay() if item["kind"] != "Widget"]
    changed[3]["data"] = {"AWS_REGION": "eu-west-1"}
    world.render(changed)
    assert run_app(app, options, "make") == 0
    assert capsys.readouterr().out == "+ ConfigMap/noisy-student\n- Widget kubeflow/one\n"
    assert not [call for call in world.cluster.calls(r" (apply|delete|create) ") if "--dry-run=server" not in call]


def test_diff_tells_conflicts_among_the_differences(world, capsys):
    world.deploy()
    changed = overlay()
    changed[4]["data"] = {"AWS_REGION": "eu-west-1"}
    world.render([*changed, thing("ConfigMap", "new", "team")])
    next(item for item in world.cluster.load() if item["metadata"]["name"] == "mysql-pv-claim")["metadata"]["foreign"] = True
    world.cluster.save()
    world.cluster.forget()
    assert run_app(app, ["diff", "--context=kind-test", *(f"--image={name}" for name in IMAGES)], "make") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "+ ConfigMap/noisy-student" in lines
    assert (
        '! PersistentVolumeClaim kubeflow/mysql-pv-claim: Apply failed with 1 conflict: conflict with "other": .spec.replicas'
        in lines
    )
    assert "+ ConfigMap team/new" in lines
    assert not [call for call in world.cluster.calls(r" (apply|delete|create|patch) ") if "--dry-run=server" not in call]


def test_status_shows_release_and_workloads(world, capsys):
    assert run_app(app, ["status", "--context=kind-test"], "make") == 0
    assert "nothing is deployed" in capsys.readouterr().out
    world.deploy()
    assert run_app(app, ["status", "--context=kind-test"], "make") == 0
    out = capsys.readouterr().out
    assert "kind-test: kind, complete" in out
    assert "ok  kubeflow/ml-pipeline" in out
    next(item for item in world.cluster.load() if item["metadata"]["name"] == "ml-pipeline")["status"] = {}
    world.cluster.save()
    assert run_app(app, ["status", "--context=kind-test", "--json"], "make") == 0
    seen = json.loads(capsys.readouterr().out)
    assert [row["ready"] for row in seen["workloads"] if row["name"] == "kubeflow/ml-pipeline"] == [False]
    assert run_app(app, ["status", "--context=kind-test"], "make") == ClusterError.exit_code


def test_team_namespace_is_deployed_beside_the_platform(world):
    world.deploy()
    team = [
        {**item, "metadata": {**item["metadata"], "namespace": "team"}} for item in overlay() if item["kind"] == "ConfigMap"
    ]
    world.cluster.load().append(thing("Secret", "mlpipeline-minio-artifact", "team", data={"accesskey": "a", "secretkey": "b"}))
    world.cluster.save()
    world.render([*team, thing("Namespace", "team")])
    assert world.deploy(overlay="dev").pipelines == {}
    # Nothing of the platform went.
    assert "Deployment/ml-pipeline" in world.cluster.names()
    with pytest.raises(ConfigError, match="several are deployed on kind-test: dev, kind"):
        world.undeploy()
    world.undeploy(overlay="dev", delete_data=True, yes=True)
    assert "Namespace/team" not in world.cluster.names()
    assert "Deployment/ml-pipeline" in world.cluster.names()


def test_deploy_refuses_unknown_pool_inputs(world):
    bad = overlay()
    bad[5]["data"] = {"inputs.json": '{"lable_gpus": "1"}'}
    world.render(bad)
    with pytest.raises(
        ConfigError, match=r"ConfigMap kubeflow/noisy-student-pools: inputs\.json: lable_gpus: is no field of the placement"
    ):
        world.deploy()
