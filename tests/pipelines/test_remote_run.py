"""Runs on Kubeflow as their client sees them: submission, progress, failures."""

import base64
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from k8s import pods
from ns.cli import app as cli
from ns.config.loader import load_experiment, resolve_preset
from ns.core.errors import ConfigError, Interrupted, RunError, StoreError, TerminatedError
from ns.runs.records import (
    RunRecord,
    delete_stage_failure,
    delete_stage_try,
    write_stage_failure,
    write_stage_note,
    write_stage_try,
)
from ns.storage import LocalStore, open_store
from ns.storage.documents import encode_json
from pipelines import remote_run
from pipelines.kfp_client import KfpClient
from tests.k8s.conftest import thing
from tests.k8s.fake_kubectl import Fake
from tests.pipelines.kfp_api import KfpApi
from tests.storage.conftest import KEYS, environment, moto, store_at  # noqa: F401

NAME = "digits-1"


@pytest.fixture(scope="module")
def experiment():
    return load_experiment(resolve_preset("quickstart"))


@pytest.fixture
def root(tmp_path):
    return LocalStore(tmp_path)


@pytest.fixture
def started(kfp, platform, root, experiment):
    server = KfpClient()
    request = remote_run.build_request(root, NAME)
    return server, remote_run.submit_run(server, root, NAME, experiment, request)


def record(root) -> RunRecord:
    return RunRecord.load_file(root, f"store/runs/{NAME}.json")


def follow(started, root, events=None, **options):
    server, submitted = started
    remote_run.follow_run(server, submitted, root, NAME, (events if events is not None else []).append, **options)


@pytest.mark.integration
def test_submit_run_with_its_experiment_in_the_store(started, kfp, root):
    (run,) = kfp.all("runs")
    given = run.runtime_config.parameters
    assert given == {"config": f"{root.uri}/{NAME}/config.yaml", "run": f"{root.uri}/{NAME}"}
    assert load_experiment(given["config"]).name == "quickstart"
    assert (record(root).state, run.display_name) == ("running", NAME)


@pytest.mark.integration
def test_submit_run_again_only_after_the_end(started, kfp, root, experiment):
    server, first = started
    request = remote_run.build_request(root, NAME)
    assert remote_run.submit_run(server, root, NAME, experiment, request) == first._replace(new=False)
    kfp.end(first.run_id, "SUCCEEDED")
    assert remote_run.submit_run(server, root, NAME, experiment, request).new


@pytest.mark.integration
def test_submit_run_to_unreachable_server_leaves_nothing(kfp, root, experiment, tmp_path):
    kfp.close()
    with pytest.raises(RunError, match="cannot be reached"):
        remote_run.submit_run(KfpClient(), root, NAME, experiment, remote_run.build_request(root, NAME))
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.integration
def test_submit_run_records_a_refusal_as_failure(kfp, platform, root, experiment):
    request = remote_run.build_request(root, NAME)._replace(inputs={"unknown": 1})
    with pytest.raises(RunError, match="refused"):
        remote_run.submit_run(KfpClient(), root, NAME, experiment, request)
    assert record(root).state == "failed"
    assert "unknown" in record(root).error


@pytest.mark.integration
def test_follow_run_tells_states_from_the_records_of_stages(started, kfp, root):
    """KFP shows no task here, as when a workflow's status is larger than 1 MiB."""
    run = started[1].run_id
    progress = {"training": "1-train", "step": 2, "steps": 10, "images": 64, "images_per_second": 9.5, "updated_at": "1"}

    def play():
        write_stage_try(root, NAME, 1, "label-0-2", 1, "pod-1")
        yield
        # It was killed, and is tried again.
        write_stage_try(root, NAME, 1, "label-0-2", 2, "pod-2")
        yield
        write_stage_note(root, NAME, 1, "label-0-2", {}, 1.0, reused=True)
        delete_stage_try(root, NAME, 1, "label-0-2")
        write_stage_try(root, NAME, 1, "train", 1, "pod-3")
        root.put(f"{NAME}/progress.json", encode_json(progress | {"latest": {"loss": 0.5}}))
        yield
        yield
        write_stage_failure(root, NAME, 1, "train", StoreError("s3://bucket: no answer"), note_name="train")
        delete_stage_try(root, NAME, 1, "train")
        yield
        delete_stage_failure(root, NAME, 1, note_name="train")
        write_stage_try(root, NAME, 1, "train", 2, "pod-4")
        yield
        write_stage_note(root, NAME, 1, "train", {"model": "m"}, 3.0, reused=False)
        delete_stage_try(root, NAME, 1, "train")
        kfp.end(run, "SUCCEEDED")
        yield

    script, events = play(), []
    kfp.before = lambda request: next(script, None) if request.startswith("GET /runs/") else None
    follow(started, root, events)
    label = {"stage": "label", "generation": 1, "shards": "0-2"}
    train = {"stage": "train", "generation": 1, "shards": ""}
    killed = "exited without an error message; try 2 is under way"
    assert events == [
        {"event": "started", **label},
        {"event": "failed", "exit_code": 1, "reason": killed, **label},
        {"event": "started", **label},
        {"event": "started", **train},
        {"event": "noted", "seconds": 1.0, "reused": True, **label},
        {"event": "progress", "done": 64, "total": 320, "per_second": 9.5, "unit": "images", "loss": 0.5, **train},
        {"event": "failed", "exit_code": 4, "reason": "s3://bucket: no answer", **train},
        {"event": "started", **train},
        {"event": "noted", "seconds": 3.0, "reused": False, **train},
    ]


@pytest.mark.integration
def test_follow_run_ends_a_stage_that_found_its_own_earlier_work(started, kfp, root):
    """Such a stage leaves the note of the earlier try as it was."""
    write_stage_note(root, NAME, 0, "train", {"model": "m"}, 3.0, reused=False)

    def play():
        write_stage_try(root, NAME, 0, "train", 1, "")
        yield
        delete_stage_try(root, NAME, 0, "train")
        kfp.end(started[1].run_id, "SUCCEEDED")
        yield

    script, events = play(), []
    kfp.before = lambda request: next(script, None) if request.startswith("GET /runs/") else None
    follow(started, root, events)
    assert [(event["event"], event.get("reused")) for event in events] == [
        ("started", None),
        ("noted", True),
    ]


@pytest.mark.integration
def test_follow_run_fails_with_stages_and_reasons(started, kfp, root):
    submitted = started[1]
    write_stage_failure(root, NAME, 2, "train", ConfigError("out of memory with 512 images; lower it"), note_name="train")
    write_stage_try(root, NAME, 2, "label-0-2", 4, "pod-1")
    write_stage_try(root, NAME, 2, "evaluate", 4, "pod-2")
    kfp.end(submitted.run_id, "FAILED")
    with pytest.raises(RunError) as caught:
        follow(started, root, explain_pods=lambda: {"student": "OOMKilled; give it more memory", "select": "Evicted"})
    assert str(caught.value) == (
        "generation 2: train: out of memory with 512 images; lower it; "
        "generation 2: label: exited without an error message (killed? out of memory? timed out?); "
        f"generation 2: evaluate: OOMKilled; give it more memory; select: Evicted; logs: {submitted.url}"
    )
    assert record(root).state == "failed"
    assert "out of memory with 512 images" in record(root).error


@pytest.mark.integration
def test_follow_run_fails_with_tasks_of_kfp_that_did_not_begin(started, kfp, root):
    submitted = started[1]
    for stage, state in (("student", "FAILED"), ("gate", "SKIPPED")):
        kfp.play_task(submitted.run_id, stage, state)
    kfp.end(submitted.run_id, "FAILED")
    with pytest.raises(RunError, match=f"^student: failed before it began; logs: {submitted.url}"):
        follow(started, root)


@pytest.mark.integration
def test_follow_run_fails_with_the_reason_of_pods_where_the_store_cannot_be_read(started, kfp, root, monkeypatch):
    def away(*_):
        raise StoreError("s3://bucket: cannot be reached")

    for method in ("list", "entries", "put"):
        monkeypatch.setattr(LocalStore, method, away)
    kfp.end(started[1].run_id, "FAILED")
    with pytest.raises(RunError) as caught:
        follow(started, root, explain_pods=lambda: {"train": "OOMKilled"})
    assert str(caught.value).startswith(
        "train: OOMKilled; the stages' own records cannot be read: s3://bucket: cannot be reached; logs: "
    )


@pytest.mark.integration
@pytest.mark.parametrize("states", [["CANCELED"], ["RUNNING", "CANCELING", "FAILED"]], ids=["canceled", "failed"])
def test_follow_run_of_a_terminated_run_has_its_own_exit_code(started, kfp, root, states):
    """KFP 2.17 was seen to end a terminated run as FAILED, with CANCELING before it in its history."""
    for state in states:
        kfp.end(started[1].run_id, state)
    with pytest.raises(TerminatedError, match=f"run {NAME}: was terminated in Kubeflow; the same command continues") as caught:
        follow(started, root)
    assert caught.value.exit_code not in (RunError.exit_code, Interrupted.exit_code)
    assert record(root).state == "interrupted"


@pytest.mark.integration
def test_follow_run_of_a_run_whose_workflow_was_deleted_ends(started, kfp, root):
    def lose():
        raise RunError("its Workflow in kubeflow was deleted")

    with pytest.raises(RunError, match=f"run {NAME}: its Workflow in kubeflow was deleted; logs: "):
        follow(started, root, after_poll=lose)
    assert record(root).state == "failed"


@pytest.mark.integration
def test_follow_run_of_a_run_that_failed_after_a_retry_is_failed(started, kfp, root):
    for state in ("CANCELING", "FAILED", "RUNNING", "FAILED"):
        kfp.end(started[1].run_id, state)
    with pytest.raises(RunError):
        follow(started, root)
    assert record(root).state == "failed"


@pytest.mark.integration
def test_follow_run_survives_an_unreadable_record(started, kfp, root):
    root.put(f"{NAME}/stages/0-train.json", b"not json")
    kfp.end(started[1].run_id, "SUCCEEDED")
    follow(started, root)


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("data.pool=/home/me/pool", "data.pool"),
        ("data.exclude=keys.txt", "data.exclude"),
        ("labeling.ensemble=[models/b0]", "labeling.ensemble.0"),
        ("teacher.model.pretrained=weights.safetensors", "teacher.model.pretrained"),
        ("evaluation.sets={real: {uri: s3://b/val, multi_label: real.json}}", "evaluation.sets.real.multi_label"),
    ],
)
def test_check_remote_uris_refuses_local_paths(override, field):
    experiment = load_experiment(resolve_preset("quickstart"), [override])
    root = open_store("s3://bucket/runs")
    with pytest.raises(ConfigError, match=rf"{field}: invalid value .*: a cluster cannot read folders of this machine"):
        remote_run.check_remote_uris(root, experiment)


def test_check_remote_uris_refuses_a_local_root(root, experiment):
    with pytest.raises(ConfigError, match=r"--root: invalid value .*; give s3://bucket/prefix"):
        remote_run.check_remote_uris(root, experiment)


def test_build_request_tells_inputs_from_the_placement(root):
    inputs = ["label_cpu=4", 'train_node_selector={"pool": "gpu"}', "generations=2"]
    request = remote_run.build_request(root, NAME, image="worker@sha256:1", gpus=2, inputs=inputs)
    folder = f"{root.uri}/{NAME}"
    assert request.inputs == {
        "config": f"{folder}/config.yaml",
        "run": folder,
        "gpus_label": "2",
        "gpus_train": "2",
        "generations": 2,
    }
    assert request.image == "worker@sha256:1"
    assert request.placed == {
        "worker_image": "worker@sha256:1",
        "tools_image": "worker@sha256:1",
        "label_cpu": "4",
        "train_node_selector": {"pool": "gpu"},
    }
    assert remote_run.build_request(root, NAME).placed == {}


def test_build_request_needs_tools_image_with_a_registry(root):
    tools = ["tools_image=tools@sha256:2"]
    for registry in (False, True):
        request = remote_run.build_request(root, NAME, image="worker@sha256:1", inputs=tools, registry=registry)
        assert request.placed == {"worker_image": "worker@sha256:1", "tools_image": "tools@sha256:2"}
    with pytest.raises(ConfigError, match=r"--input tools_image: must be given beside --image"):
        remote_run.build_request(root, NAME, image="worker@sha256:1", registry=True)


def test_build_request_image_option_wins_over_file(root, tmp_path):
    pools = tmp_path / "pools.json"
    pools.write_text('{"worker_image": "worker@sha256:1", "tools_image": "tools@sha256:1"}')
    request = remote_run.build_request(root, NAME, image="worker@sha256:2", inputs=[f"@{pools}"], registry=True)
    assert request.placed == {"worker_image": "worker@sha256:2", "tools_image": "tools@sha256:1"}
    request = remote_run.build_request(root, NAME, inputs=["worker_image=worker@sha256:1"])
    assert request.image == request.placed["tools_image"] == "worker@sha256:1"


def test_build_request_later_value_wins_over_file(root, tmp_path):
    pools = tmp_path / "pools.json"
    pools.write_text('{"label_gpus": "1", "train_gpus": "8", "label_tolerations": [{"key": "spot", "operator": "Exists"}]}')
    placed = remote_run.build_request(root, NAME, inputs=[f"@{pools}", "train_gpus=2"]).placed
    assert (placed["label_gpus"], placed["train_gpus"]) == ("1", "2")
    assert placed["label_tolerations"] == [{"key": "spot", "operator": "Exists"}]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["gpus_train"], "--input: invalid value 'gpus_train': must be NAME=VALUE"),
        (["gpus_train=3"], "gpus_train: invalid value '3': must be one of 0, 1, 2, 4, 8"),
        (["train_gpus=3"], "--input: train_gpus: invalid value '3': must be one of 0, 1, 2, 4, 8"),
        (["gpus=3"], "gpus: is not an input of pipeline noisy-student"),
        (["@nowhere.json"], "--input @nowhere.json: .*/nowhere.json: cannot read: no such file"),
        ([f"@{__file__}"], "--input @.*: not JSON"),
        (["generations={"], "--input generations: invalid value '{': must be JSON or YAML"),
        (["generations=2026-99-01"], "--input generations: invalid value '2026-99-01': must be JSON or YAML"),
        (["generations=" + 1000 * "["], "--input generations: invalid value '\\[\\["),
    ],
)
def test_build_request_names_wrong_input(root, given, words):
    with pytest.raises(ConfigError, match=words):
        remote_run.build_request(root, NAME, inputs=given)


def ns(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.run_command_line(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--no-follow"], "--follow/--no-follow: has no effect with --runner local; add --runner kfp"),
        (["--memory", "4g", "--runner", "kfp"], "--memory: has no effect with --runner kfp; add --runner docker"),
        (["--gpus", "1"], "--gpus: has no effect with --runner local; add --runner docker or kfp"),
    ],
)
def test_run_refuses_options_of_another_runner(capsys, tmp_path, options, words):
    code, _, err = ns(capsys, "run", "quickstart", "--root", str(tmp_path), *options)
    assert (code, err) == (2, f"error: {words}\n")


@pytest.fixture
def on_s3(kfp: KfpApi, platform, moto, tmp_path, monkeypatch):  # noqa: F811
    """The command of a run on the cluster, as words, and its root."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    store = store_at(moto, tmp_path / "cache")
    return ["run", "quickstart", "--runner", "kfp", "--root", store.uri], store


@pytest.mark.integration
def test_run_on_kfp_submits_once_and_prints_the_url(capsys, kfp, on_s3):
    command, _ = on_s3
    code, out, err = ns(capsys, *command, "--no-follow", "--json")
    submitted = json.loads(out)
    assert (code, submitted["url"]) == (0, f"{kfp.url}/#/runs/details/{kfp.all('runs')[0].run_id}")
    assert f"submitted: {submitted['url']}" in err
    code, _, err = ns(capsys, *command, "--no-follow")
    assert (code, len(kfp.all("runs"))) == (0, 1)
    assert "is under way" in err


@pytest.mark.integration
def test_run_on_unreachable_kfp_exit_code(capsys, kfp, on_s3):
    command, store = on_s3
    kfp.close()
    code, _, err = ns(capsys, *command)
    assert code == 6
    assert "cannot be reached" in err
    assert list(store.list("")) == []


@pytest.mark.integration
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_on_kfp_continues_without_its_client(kfp, on_s3, number):
    command, _ = on_s3
    client = subprocess.Popen([sys.executable, "-m", "ns", *command], stderr=subprocess.PIPE, text=True, env=os.environ)
    # It follows when it asks for the run.
    until = time.monotonic() + 240
    while sum(request.startswith("GET /runs/") for request in kfp.requests) < 1 and time.monotonic() < until:
        time.sleep(0.05)
    client.send_signal(number)
    _, err = client.communicate(timeout=60)
    assert client.returncode == 130, err
    assert err.splitlines()[-1].startswith("no longer followed; the run continues: http")
    assert [run.state for run in kfp.alive] == ["PENDING"]


@pytest.mark.integration
def test_run_on_kfp_that_fails_prints_stage_and_reason(capsys, kfp, on_s3):
    command, store = on_s3

    def play():
        while not kfp.all("runs"):
            time.sleep(0.01)
        (run,) = kfp.all("runs")
        write_stage_failure(store, run.display_name, 0, "train", "the loss is nan", note_name="train")
        kfp.end(run.run_id, "FAILED")

    player = threading.Thread(target=play)
    player.start()
    code, _, err = ns(capsys, *command)
    player.join()
    assert code == 6
    assert re.search("✗ teacher · train +the loss is nan +failed", err)
    assert err.splitlines()[-1].startswith("error: train: the loss is nan; logs: http")


@pytest.fixture
def by_context(kfp, on_s3, monkeypatch, tmp_path):
    """The command of a run by a context of the kubeconfig: port-forwards of its own, and the keys of the cluster's store."""
    command, store = on_s3
    moto_port = int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])
    for variable in ("AWS_ENDPOINT_URL", *KEYS, "NS_KFP_URL"):
        monkeypatch.delenv(variable)
    keys = {
        key: base64.b64encode(value.encode()).decode()
        for key, value in zip(("accesskey", "secretkey"), KEYS.values(), strict=True)
    }
    objects = [
        thing("ConfigMap", "noisy-student", "kubeflow", data={"AWS_ENDPOINT_URL": "http://seaweedfs.kubeflow:9000"}),
        thing("Service", "seaweedfs", "kubeflow"),
        thing("Secret", "mlpipeline-minio-artifact", "kubeflow", data=keys),
    ]
    cluster = Fake(tmp_path / "cluster", monkeypatch, objects)
    kfp_port = int(kfp.url.rpartition(":")[2])
    cluster.state["ports"] = {"service/ml-pipeline": kfp_port, "service/seaweedfs": moto_port}
    cluster.save()
    monkeypatch.setattr(pods, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(pods, "PENDING_SECONDS", 0.0)
    return [*command, "--context", "kind-test"], store, cluster


@pytest.mark.integration
def test_run_by_a_context_tells_pending_pods_and_why_stages_ended(capsys, kfp, by_context):
    command, _, cluster = by_context

    def play():
        while not kfp.all("runs"):
            time.sleep(0.01)
        (run,) = kfp.all("runs")
        labels = {"pipeline/runid": run.run_id, "app.kubernetes.io/component": "train"}
        reason = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "1 Insufficient cpu"}
        pod = thing("Pod", "train-1", "kubeflow", labels=labels, status={"phase": "Pending", "conditions": [reason]})
        cluster.load().append(pod)
        cluster.save()
        polls = len(cluster.calls("get pods"))
        while len(cluster.calls("get pods")) < polls + 2:
            time.sleep(0.01)
        ended = {"name": "main", "state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}
        pod["status"] = {"phase": "Failed", "containerStatuses": [ended]}
        cluster.save()
        kfp.end(run.run_id, "FAILED")

    player = threading.Thread(target=play)
    player.start()
    code, _, err = ns(capsys, *command)
    player.join()
    assert code == 6
    assert "submitted: http://localhost:8080/#/runs/details/" in err
    assert err.count("! train: pod train-1 waits: Unschedulable: 1 Insufficient cpu; no node has so much free") == 1
    assert "error: train: OOMKilled: it needs more memory than its limit" in err


@pytest.mark.integration
def test_run_by_a_context_leaves_no_port_forward_behind(kfp, by_context):
    command, _, cluster = by_context
    client = subprocess.Popen([sys.executable, "-m", "ns", *command], stderr=subprocess.PIPE, text=True, env=os.environ)
    until = time.monotonic() + 240
    while sum(request.startswith("GET /runs/") for request in kfp.requests) < 1 and time.monotonic() < until:
        time.sleep(0.05)
    client.send_signal(signal.SIGTERM)
    _, err = client.communicate(timeout=60)
    assert client.returncode == 130, err
    assert len(cluster.calls("port-forward")) == 2
    # A question that was under way ends by itself; forwarding would last ten minutes.
    until = time.monotonic() + 20
    while (left := list_programs(cluster.folder)) and time.monotonic() < until:
        time.sleep(0.05)
    assert left == []


def list_programs(folder):
    """Command lines of the running processes that name a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes())
    return [program for program in found if str(folder).encode() in program]


def test_run_refuses_url_and_context_together(capsys):
    options = ["--runner", "kfp", "--kfp", "http://kfp", "--context", "one", "--root", "s3://b/c"]
    code, _, err = ns(capsys, "run", "quickstart", *options)
    assert (code, err) == (
        2,
        "error: --kfp: has no effect with --context, which finds Kubeflow by itself; leave one of them out\n",
    )
