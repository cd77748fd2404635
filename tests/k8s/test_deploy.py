"""Deploying to a cluster that is a stand-in, with a kubectl that records what it is told."""

import json
import threading
import time

import pytest

from k8s import deploy as deploying
from k8s import manifests
from k8s import rollout as waiting
from k8s.__main__ import app
from k8s.deploy import DeployOptions
from k8s.release import CONFIG_MAP_NAME
from ns.cli.app import run_app
from ns.core.errors import ClusterError, ConfigError, Interrupted
from pipelines import upload
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
        self.cluster = Fake(tmp_path / "cluster", monkeypatch, bare(), contexts=["kind-test", "prod"], current="kind-test")
        self.cluster.state["port"] = int(self.kfp.url.rpartition(":")[2])
        self.render(overlay())
        self.said = []
        for name in ("kind", "dev"):
            (tmp_path / "overlays" / name).mkdir(parents=True)
            (tmp_path / "overlays" / name / "kustomization.yaml").write_text("resources: []\n")
        monkeypatch.setattr(manifests, "OVERLAYS", tmp_path / "overlays")
        monkeypatch.setattr(manifests, "CHECKOUT", tmp_path)
        monkeypatch.setattr(waiting, "POLL_SECONDS", 0.05)
        monkeypatch.setattr(deploying, "RETRY_SECONDS", 0.05)
        # Filling in the other one, which tests/pipelines/test_upload.py does, would take half of the time here.
        monkeypatch.setattr(upload, "PACKAGES", [file for file in upload.PACKAGES if file.stem == "noisy_student"])

    def render(self, objects):
        if self.cluster.folder.joinpath("calls.jsonl").exists():
            self.cluster.load()
        self.cluster.state["rendered"] = objects
        self.cluster.save()

    def deploy(self, ask=None, **options):
        options = {"context": "kind-test", "images": IMAGES, "smoke": False, "seconds": 60, **options}
        return deploying.deploy_overlay(DeployOptions(**options), self.said.append, ask, lambda findings: None)

    def undeploy(self, ask=None, *, delete_data=False, **options):
        return deploying.undeploy_overlay(
            DeployOptions(**{"context": "kind-test", **options}), self.said.append, ask, delete_data=delete_data
        )

    def record(self):
        found = next(one for one in self.cluster.load() if one["metadata"]["name"] == CONFIG_MAP_NAME)
        return json.loads(found["data"]["record"])

    def applied(self):
        """Kinds and names in the order in which they came."""
        lines = (self.cluster.folder / "calls.jsonl").read_text().splitlines()
        calls = [json.loads(line) for line in lines]
        return [
            f"{one['kind']}/{one['metadata']['name']}"
            for call in calls
            if "apply" in call["arguments"] and not any("dry-run" in word for word in call["arguments"])
            for one in json.loads(call["data"])["items"]
        ]


@pytest.fixture
def world(tmp_path, monkeypatch):
    for variable in ("NS_KFP_URL", "NS_KFP_TOKEN", "NS_KFP_NAMESPACE", "NS_KFP_UI"):
        monkeypatch.delenv(variable, raising=False)
    made = World(tmp_path, monkeypatch)
    yield made
    made.kfp.close()


def test_a_fresh_cluster_gets_everything_in_order(world):
    record = world.deploy()
    assert record.state == "whole"
    order = world.applied()
    first = {name: order.index(name) for name in order}
    assert first["Namespace/kubeflow"] < first[f"ConfigMap/{CONFIG_MAP_NAME}"] < first["Deployment/ml-pipeline"]
    assert first["CustomResourceDefinition/widgets.example.com"] < first["PersistentVolumeClaim/mysql-pv-claim"]
    assert first["PersistentVolumeClaim/mysql-pv-claim"] < first["StatefulSet/seaweedfs"]
    # What a controller has to be there for, and what runs once, come last.
    assert max(first["Deployment/ml-pipeline"], first["StatefulSet/seaweedfs"]) < first["Widget/one"] < first["Job/set-up"]
    calls = world.cluster.calls()
    assert all("--context=kind-test" in call for call in calls if " view" not in call)
    assert all(
        {"--server-side", "--field-manager=noisy-student"} <= set(call.split_batch()) for call in calls if " apply " in call
    )
    keys = next(one for one in world.cluster.load() if one["kind"] == "Secret")["data"]
    assert set(keys) == {"accesskey", "secretkey"}
    assert "newTag: '1'" in (world.cluster.folder / "kustomization.yaml").read_text()
    assert list(record.pipelines) == [version.rpartition("-")[0] for version in record.pipelines.values()]
    assert world.kfp.requests.count("POST /pipelines/upload_version") == len(record.pipelines)


def test_run_forms_are_filled_in_with_the_images_that_were_deployed(world):
    world.deploy()
    (pools,) = [one for one in world.cluster.load() if one["metadata"]["name"] == "noisy-student-pools"]
    assert json.loads(pools["data"]["inputs.json"]) == {
        "label_gpus": "1",
        "worker_image": IMAGES[0],
        "tools_image": IMAGES[1],
    }


def test_deploying_again_changes_nothing(world):
    first = world.deploy()
    before = world.cluster.load()
    uploads = world.kfp.requests.count("POST /pipelines/upload_version")
    again = world.deploy()
    after = {json.dumps(one, sort_keys=True) for one in world.cluster.load() if one["metadata"]["name"] != CONFIG_MAP_NAME}
    assert after == {json.dumps(one, sort_keys=True) for one in before if one["metadata"]["name"] != CONFIG_MAP_NAME}
    assert (again.pipelines, again.objects) == (first.pipelines, first.objects)
    assert world.kfp.requests.count("POST /pipelines/upload_version") == uploads
    assert world.cluster.calls(r" delete ") == []


def test_a_deployment_that_failed_half_way_is_known_and_goes_on(world):
    world.cluster.rule(r"apply --server-side --field-manager", stderr="error: etcd is full", times=1, after=3)
    # Two objects go before, and the record: this is in the middle of the rest.
    with pytest.raises(ClusterError, match="etcd is full"):
        world.deploy()
    assert world.record()["state"] == "under way"
    assert "StatefulSet/seaweedfs" not in world.cluster.names()

    assert world.deploy().state == "whole"
    assert any("did not come to its end" in line for line in world.said)
    assert {"StatefulSet/seaweedfs", "Widget/one", "Job/set-up"} <= set(world.cluster.names())


def test_what_was_left_of_a_failed_deployment_can_be_taken_away(world):
    world.cluster.rule(r"apply --server-side --field-manager", stderr="error: etcd is full", times=1, after=4)
    with pytest.raises(ClusterError):
        world.deploy()
    assert world.undeploy()
    left = [one["kind"] for one in world.cluster.load() if one["metadata"].get("namespace") == "kubeflow"]
    assert "Deployment" not in left


def test_a_webhook_that_is_starting_is_waited_for(world):
    world.cluster.rule(
        r"apply --server-side --field-manager",
        stderr='Error from server (InternalError): failed calling webhook "w.example.com": connection refused',
        times=1,
        after=2,
    )
    assert world.deploy().state == "whole"
    assert any("once more" in line for line in world.said)


def test_without_permission_nothing_is_changed(world):
    world.cluster.load()
    world.cluster.state["denied"] = ["create namespaces", "patch widgets"]
    world.cluster.save()
    with pytest.raises(ClusterError, match="nothing was changed: rights"):
        world.deploy()
    assert world.cluster.calls(r" (apply|delete) ") == []
    assert not [call for call in world.cluster.calls(" create ") if "--raw" not in call]


def test_permission_that_is_refused_on_the_way_is_said_and_the_rest_stays(world):
    world.cluster.rule(r"apply .*", stderr='Error from server (Forbidden): namespaces is forbidden: User "eve"', times=1)
    with pytest.raises(ClusterError, match="ask for that right"):
        world.deploy(preflight=False)
    assert world.deploy().state == "whole"


def test_fields_that_others_manage_are_taken_over_only_when_asked_for(world):
    others = thing("ConfigMap", "noisy-student", "kubeflow", data={"AWS_REGION": "eu"})
    others["metadata"]["foreign"] = True
    world.cluster.load().append(others)
    world.cluster.save()
    with pytest.raises(ClusterError, match="--force-conflicts"):
        world.deploy()
    assert world.deploy(force_conflicts=True).state == "whole"


@pytest.mark.parametrize(
    ("options", "question"),
    [
        ({"context": ""}, "KUBE_CONTEXT is not given, and kind-test (https://kind-test.example) is the current one"),
        ({"context": "prod", "overlay": "kind"}, "overlay kind is for local clusters, and prod is none"),
    ],
)
def test_a_doubtful_context_asks_first(world, options, question):
    with pytest.raises(ConfigError, match="nobody can be asked: give KUBE_CONTEXT"):
        world.deploy(**options)
    asked = []
    with pytest.raises(Interrupted):
        world.deploy(lambda text: bool(asked.append(text)), **options)
    assert asked[0].startswith(question)
    assert world.cluster.calls(r" (apply|delete|create) ") == []
    assert world.deploy(lambda text: True, **options).state == "whole"
    assert world.deploy(**options, yes=True).state == "whole"


def test_another_overlay_than_the_deployed_one_asks_first(world):
    world.deploy()
    with pytest.raises(ConfigError, match="overlay kind is deployed in kubeflow on kind-test, not dev"):
        world.deploy(overlay="dev")
    # Not said, it is the one that is there.
    assert world.deploy().overlay == "kind"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": "nope"}, "KUBE_CONTEXT=nope: there is no such context; there are kind-test, prod"),
        (
            {"overlay": "nope"},
            "OVERLAY 'nope': is no folder with a kustomization.yaml, and none in overlays; there are dev, kind",
        ),
        ({"context": "prod", "images": ()}, "REGISTRY is not given"),
        ({"images": ("worker:1",)}, "--image worker:1: must end in /worker:TAG"),
    ],
)
def test_what_cannot_be_meant_is_refused(world, options, message):
    with pytest.raises(ConfigError, match=message):
        world.deploy(**options)
    assert world.cluster.calls(r" apply ") == []


def test_what_an_overlay_no_longer_has_goes_unless_it_is_data(world):
    world.deploy()
    world.render([one for one in overlay() if one["kind"] not in ("Widget", "PersistentVolumeClaim")])
    world.deploy()
    names = world.cluster.names()
    assert "Widget/one" not in names
    assert "PersistentVolumeClaim/mysql-pv-claim" in names
    # It is still known, and goes with the data.
    world.undeploy(delete_data=True, yes=True)
    assert "PersistentVolumeClaim/mysql-pv-claim" not in world.cluster.names()


def test_a_job_that_changed_runs_anew(world):
    world.deploy()
    world.render([one if one["kind"] != "Job" else job("r.example/noisy-student/tools:2") for one in overlay()])
    world.deploy()
    assert len(world.cluster.calls(r" delete job\.batch set-up ")) == 1
    made = next(one for one in world.cluster.load() if one["kind"] == "Job")
    assert made["spec"]["template"]["spec"]["containers"][0]["image"].endswith("tools:2")


def test_undeploying_keeps_data_and_what_was_there_before(world):
    world.cluster.load().append(thing("CustomResourceDefinition", "widgets.example.com", api="apiextensions.k8s.io/v1"))
    world.cluster.save()
    world.deploy()
    claim = thing("PersistentVolumeClaim", "data-seaweedfs-0", "kubeflow", spec={})
    world.cluster.load().append(claim)
    world.cluster.save()
    assert world.undeploy()
    kinds = [one["kind"] for one in world.cluster.load() if one["metadata"].get("namespace") == "kubeflow"]
    assert sorted(kinds) == ["ConfigMap", "PersistentVolumeClaim", "PersistentVolumeClaim", "Secret"]
    assert world.record()["state"] == "taken away"
    order = [call.split_batch()[2] for call in world.cluster.calls(r" delete ")]
    assert order.index("widget.example.com") < order.index("deployment.apps")

    # Twice is once, and deploying again finds the data and its keys.
    keys = [one for one in world.cluster.load() if one["kind"] == "Secret"]
    assert world.undeploy()
    world.deploy()
    assert [one for one in world.cluster.load() if one["kind"] == "Secret"] == keys


def test_data_is_deleted_only_when_that_is_said_twice(world):
    world.deploy()
    world.cluster.load().append(thing("PersistentVolumeClaim", "data-seaweedfs-0", "kubeflow", spec={}))
    world.cluster.save()
    with pytest.raises(ConfigError, match="ALL DATA in kubeflow would be deleted; nobody can be asked"):
        world.undeploy(delete_data=True)
    assert world.cluster.calls(r" delete ") == []
    world.undeploy(delete_data=True, yes=True)
    assert [one["kind"] for one in world.cluster.load()] == ["Node", "StorageClass"]
    assert not world.undeploy()
    assert world.said[-1] == "nothing is deployed on kind-test"


def test_runs_under_way_are_not_stopped_unasked(world):
    world.deploy()
    world.cluster.load().append(
        thing("Workflow", "run-1", "kubeflow", api="argoproj.io/v1alpha1", fetch_status={"phase": "Running"})
    )
    world.cluster.save()
    with pytest.raises(ConfigError, match="1 runs are under way"):
        world.undeploy()
    assert world.cluster.calls(r" delete ") == []


def test_workloads_that_do_not_come_up_are_named_with_their_reason(world):
    never = {
        **workload("mysql", "mysql:8", "kubeflow"),
        "metadata": {"name": "mysql", "namespace": "kubeflow", "generation": 2},
    }
    waits = {"state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such\nimage"}}}
    world.cluster.load().append(thing("Pod", "mysql-1", "kubeflow", fetch_status={"containerStatuses": [waits]}))
    world.cluster.save()
    world.render([*overlay(), never])
    with pytest.raises(ClusterError, match=r"kubeflow/mysql: not seen yet: ImagePullBackOff: no such image"):
        world.deploy(seconds=0.2)
    assert world.record()["state"] == "under way"


def test_the_smoke_run_is_run_once_for_each_version(world):
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
    assert any("has succeeded before" in line for line in world.said)
    assert world.kfp.requests.count("POST /runs") == 1


def test_diff_shows_what_would_change_and_changes_nothing(world, capsys):
    options = ["diff", "--context=kind-test", *(f"--image={name}" for name in IMAGES)]
    assert run_app(app, options, "make") == 0
    assert "+ Deployment kubeflow/ml-pipeline" in capsys.readouterr().out
    world.deploy()
    world.cluster.forget()
    assert run_app(app, options, "make") == 0
    assert capsys.readouterr().out == "no differences\n"
    changed = [one for one in overlay() if one["kind"] != "Widget"]
    changed[3]["data"] = {"AWS_REGION": "eu-west-1"}
    world.render(changed)
    assert run_app(app, options, "make") == 0
    assert capsys.readouterr().out == "+ ConfigMap/noisy-student\n- Widget kubeflow/one\n"
    assert world.cluster.calls(r" (apply|delete|create) ") == []


def test_status_says_what_is_deployed_and_how_it_is(world, capsys):
    assert run_app(app, ["status", "--context=kind-test"], "make") == 0
    assert "nothing is deployed" in capsys.readouterr().out
    world.deploy()
    assert run_app(app, ["status", "--context=kind-test"], "make") == 0
    out = capsys.readouterr().out
    assert "kind-test: kind, whole" in out
    assert "ok  kubeflow/ml-pipeline" in out
    next(one for one in world.cluster.load() if one["metadata"]["name"] == "ml-pipeline")["status"] = {}
    world.cluster.save()
    assert run_app(app, ["status", "--context=kind-test", "--json"], "make") == 0
    seen = json.loads(capsys.readouterr().out)
    assert [row["ready"] for row in seen["workloads"] if row["name"] == "kubeflow/ml-pipeline"] == [False]
    assert run_app(app, ["status", "--context=kind-test"], "make") == ClusterError.exit_code


def test_a_teams_namespace_stands_beside_the_platform(world):
    world.deploy()
    team = [{**one, "metadata": {**one["metadata"], "namespace": "team"}} for one in overlay() if one["kind"] == "ConfigMap"]
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


def test_a_pools_input_that_no_pipeline_has_is_refused(world):
    bad = overlay()
    bad[5]["data"] = {"inputs.json": '{"lable_gpus": "1"}'}
    world.render(bad)
    with pytest.raises(ConfigError, match=r"ConfigMap kubeflow/noisy-student-pools: inputs\.json: lable_gpus: is no input"):
        world.deploy()
