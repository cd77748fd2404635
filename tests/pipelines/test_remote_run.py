"""Runs on Kubeflow as their client sees them: what is submitted, what is shown, what is said when something fails."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ns.cli import app as cli
from ns.config import schema as config
from ns.core.errors import ConfigError, Interrupted, RunError
from ns.runs import records as runs
from ns.runs.records import RunRecord
from ns.storage import LocalStore, open_store
from ns.storage.documents import encode_json
from pipelines import remote_run as cluster
from pipelines.kfp_client import KfpClient
from tests.pipelines.kfp_api import KfpApi
from tests.storage.conftest import environment, moto, store_at  # noqa: F401

NAME = "digits-1"


@pytest.fixture(scope="module")
def experiment():
    return config.load_experiment(config.resolve_preset("quickstart"))


@pytest.fixture
def root(tmp_path):
    return LocalStore(tmp_path)


@pytest.fixture
def started(kfp, root, experiment):
    server = KfpClient()
    given = cluster.build_inputs(f"{root.uri}/{NAME}/config.yaml", root, NAME)
    return server, cluster.submit_run(server, root, NAME, experiment, given)


def record(root) -> RunRecord:
    return RunRecord.load_file(root, f"store/runs/{NAME}.json")


def follow(started, root, events=None):
    server, submitted = started
    cluster.follow_run(server, submitted, root, NAME, (events if events is not None else []).append, poll=0.001)


@pytest.mark.integration
def test_a_run_is_submitted_with_its_experiment_in_the_store(started, kfp, root):
    (run,) = kfp.load_all("runs")
    given = run.runtime_config.parameters
    assert given == {"config": f"{root.uri}/{NAME}/config.yaml", "root": root.uri, "run": NAME}
    assert config.load_experiment(given["config"]).name == "quickstart"
    assert (record(root).state, run.display_name) == ("running", NAME)


@pytest.mark.integration
def test_a_run_that_is_under_way_is_not_submitted_again_and_one_that_ended_is(started, kfp, root, experiment):
    server, first = started
    assert cluster.submit_run(server, root, NAME, experiment, {}) == first._replace(new=False)
    kfp.end(first.run_id, "SUCCEEDED")
    given = cluster.build_inputs("c", root, NAME)
    assert cluster.submit_run(server, root, NAME, experiment, given).new


@pytest.mark.integration
def test_a_server_that_is_down_leaves_nothing_behind(kfp, root, experiment, tmp_path):
    kfp.close()
    with pytest.raises(RunError, match="cannot be reached"):
        cluster.submit_run(KfpClient(), root, NAME, experiment, {})
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.integration
def test_a_run_that_kfp_refuses_is_recorded_as_failed(kfp, root, experiment):
    with pytest.raises(RunError, match="refused"):
        cluster.submit_run(KfpClient(), root, NAME, experiment, {"unknown": 1})
    assert record(root).state == "failed"
    assert "unknown" in record(root).error


@pytest.mark.integration
def test_following_shows_states_from_kfp_and_all_else_from_the_store(started, kfp, root):
    run = started[1].run_id
    progress = {"training": "1-train", "step": 2, "steps": 10, "images": 64, "images_per_second": 9.5, "updated_at": "1"}

    def play():
        kfp.step(run, "train", "RUNNING")
        root.put(f"{NAME}/progress.json", encode_json(progress | {"latest": {"loss": 0.5}}))
        yield
        yield
        runs.write_stage_note(root, NAME, 1, "train", {"model": "m"}, 3.0, reused=False)
        runs.write_stage_note(root, NAME, 1, "label-shards-0-2", {}, 1.0, reused=True)
        kfp.step(run, "train", "SUCCEEDED")
        kfp.end(run, "SUCCEEDED")
        yield

    script, events = play(), []
    kfp.before = lambda request: next(script, None) if request.startswith("GET /runs/") else None
    follow(started, root, events)
    assert events == [
        {"event": "state", "step": "train", "state": "RUNNING"},
        {"event": "started", "step": "train", "generation": 1},
        {
            "event": "progress",
            "step": "train",
            "generation": 1,
            "done": 64,
            "total": 320,
            "per_second": 9.5,
            "unit": "images",
            "loss": 0.5,
        },
        {"event": "state", "step": "train", "state": "SUCCEEDED"},
        {"event": "noted", "step": "train", "generation": 1, "shards": "", "seconds": 3.0, "reused": False},
        {"event": "noted", "step": "label-shards", "generation": 1, "shards": "0-2", "seconds": 1.0, "reused": True},
    ]


@pytest.mark.integration
def test_a_run_that_failed_is_told_with_its_steps_and_their_reasons(started, kfp, root):
    submitted = started[1]
    runs.write_stage_failure(root, NAME, 2, "train", ConfigError("out of memory with 512 images; lower it"), note_name="train")
    for step, state in (("train", "FAILED"), ("label-shards", "FAILED"), ("gate", "SKIPPED")):
        kfp.step(submitted.run_id, step, state)
    kfp.end(submitted.run_id, "FAILED")
    with pytest.raises(RunError) as caught:
        follow(started, root)
    assert str(caught.value) == (
        "generation 2: train: out of memory with 512 images; lower it; "
        f"label-shards: ended without a word (killed? out of memory? too late?); logs: {submitted.url}"
    )
    assert record(root).state == "failed"
    assert "out of memory with 512 images" in record(root).error


@pytest.mark.integration
def test_a_run_that_was_cancelled_is_no_failure(started, kfp, root):
    kfp.end(started[1].run_id, "CANCELED")
    with pytest.raises(Interrupted, match=f"run {NAME}: was canceled; the same command continues"):
        follow(started, root)
    assert record(root).state == "interrupted"


@pytest.mark.integration
def test_a_store_that_cannot_be_read_for_a_moment_ends_no_following(started, kfp, root):
    root.put(f"{NAME}/steps/0-train.json", b"not json")
    kfp.end(started[1].run_id, "SUCCEEDED")
    follow(started, root)


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("data.pool=/home/me/pool", "data.pool"),
        ("data.exclude=keys.txt", "data.exclude"),
        ("labeling.ensemble=[models/b0]", "labeling.ensemble.0"),
        ("teacher.train.init=weights.safetensors", "teacher.train.init"),
        ("evaluation.sets={real: {place: s3://b/val, multi_label: real.json}}", "evaluation.sets.real.multi_label"),
    ],
)
def test_places_of_this_machine_are_refused(override, field):
    experiment = config.load_experiment(config.resolve_preset("quickstart"), [override])
    root = open_store("s3://bucket/runs")
    with pytest.raises(ConfigError, match=rf"{field}: invalid value .*: a cluster has no folders of this machine"):
        cluster.check_remote_uris(root, experiment)


def test_a_root_of_this_machine_is_refused(root, experiment):
    with pytest.raises(ConfigError, match=r"--root: invalid value .*; give s3://bucket/prefix"):
        cluster.check_remote_uris(root, experiment)


def test_inputs_are_read_as_the_pipeline_has_them(root):
    inputs = ["label_cpu=4", 'train_node_selector={"pool": "gpu"}', "generations=2"]
    given = cluster.build_inputs("c", root, NAME, image="worker@sha256:1", gpus=2, inputs=inputs)
    assert (given["worker_image"], given["tools_image"]) == ("worker@sha256:1", "worker@sha256:1")
    assert (given["train_gpus"], given["label_gpus"], given["label_cpu"]) == ("2", "2", "4")
    assert (given["train_node_selector"], given["generations"]) == ({"pool": "gpu"}, 2)


def test_the_image_that_commits_labels_is_the_steps_unless_there_is_a_registry(root):
    tools = ["tools_image=tools@sha256:2"]
    for registry in (False, True):
        given = cluster.build_inputs("c", root, NAME, image="worker@sha256:1", inputs=tools, registry=registry)
        assert (given["worker_image"], given["tools_image"]) == ("worker@sha256:1", "tools@sha256:2")
    with pytest.raises(ConfigError, match=r"--input tools_image: must be given beside --image"):
        cluster.build_inputs("c", root, NAME, image="worker@sha256:1", registry=True)


def test_an_image_that_is_named_goes_before_that_of_a_file(root, tmp_path):
    pools = tmp_path / "pools.json"
    pools.write_text('{"worker_image": "worker@sha256:1", "tools_image": "tools@sha256:1"}')
    given = cluster.build_inputs("c", root, NAME, image="worker@sha256:2", inputs=[f"@{pools}"], registry=True)
    assert (given["worker_image"], given["tools_image"]) == ("worker@sha256:2", "tools@sha256:1")
    given = cluster.build_inputs("c", root, NAME, inputs=["worker_image=worker@sha256:1"])
    assert given["tools_image"] == "worker@sha256:1"


def test_inputs_come_from_a_file_and_what_is_said_after_it_holds(root, tmp_path):
    pools = tmp_path / "pools.json"
    pools.write_text('{"label_gpus": "1", "train_gpus": "8", "label_tolerations": [{"key": "spot", "operator": "Exists"}]}')
    given = cluster.build_inputs("c", root, NAME, inputs=[f"@{pools}", "train_gpus=2"])
    assert (given["label_gpus"], given["train_gpus"]) == ("1", "2")
    assert given["label_tolerations"] == [{"key": "spot", "operator": "Exists"}]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["train_gpus"], "--input: invalid value 'train_gpus': must be NAME=VALUE"),
        (["train_gpus=3"], "train_gpus: invalid value '3': must be one of 0, 1, 2, 4, 8"),
        (["gpus=3"], "gpus: is no input of pipeline noisy-student"),
        (["@nowhere.json"], "--input @nowhere.json: .*/nowhere.json: cannot read: no such file"),
        ([f"@{__file__}"], "--input @.*: not JSON"),
        (["generations={"], "--input generations: invalid value '{': must be JSON or YAML"),
    ],
)
def test_inputs_that_are_wrong_are_named(root, given, words):
    with pytest.raises(ConfigError, match=words):
        cluster.build_inputs("c", root, NAME, inputs=given)


def ns(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.run_command_line(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--no-follow"], "--follow/--no-follow: means nothing to --runner local; add --runner kfp"),
        (["--memory", "4g", "--runner", "kfp"], "--memory: means nothing to --runner kfp; add --runner docker"),
        (["--gpus", "1"], "--gpus: means nothing to --runner local; add --runner docker or kfp"),
    ],
)
def test_options_of_another_runner_are_refused(capsys, tmp_path, options, words):
    code, _, err = ns(capsys, "run", "quickstart", "--root", str(tmp_path), *options)
    assert (code, err) == (2, f"error: {words}\n")


@pytest.fixture
def on_s3(kfp: KfpApi, moto, tmp_path, monkeypatch):  # noqa: F811
    """The command of a run on the cluster, as words, and its root."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    store = store_at(moto, tmp_path / "cache")
    return ["run", "quickstart", "--runner", "kfp", "--root", store.uri], store


@pytest.mark.integration
def test_the_command_submits_once_and_gives_the_link(capsys, kfp, on_s3):
    command, _ = on_s3
    code, out, err = ns(capsys, *command, "--no-follow", "--json")
    submitted = json.loads(out)
    assert (code, submitted["url"]) == (0, f"{kfp.url}/#/runs/details/{kfp.load_all('runs')[0].run_id}")
    assert f"submitted: {submitted['url']}" in err
    code, _, err = ns(capsys, *command, "--no-follow")
    assert (code, len(kfp.load_all("runs"))) == (0, 1)
    assert "is under way" in err


@pytest.mark.integration
def test_a_server_that_is_down_has_its_exit_code(capsys, kfp, on_s3):
    command, store = on_s3
    kfp.close()
    code, _, err = ns(capsys, *command)
    assert code == 6
    assert "cannot be reached" in err
    assert list(store.list("")) == []


@pytest.mark.integration
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_client_that_is_stopped_leaves_the_run(kfp, on_s3, number):
    command, _ = on_s3
    client = subprocess.Popen([sys.executable, "-m", "ns", *command], stderr=subprocess.PIPE, text=True, env=os.environ)
    # It follows when it asks for the run.
    until = time.monotonic() + 240
    while sum(request.startswith("GET /runs/") for request in kfp.requests) < 1 and time.monotonic() < until:
        time.sleep(0.05)
    client.send_signal(number)
    _, err = client.communicate(timeout=60)
    assert client.returncode == 130, err
    assert err.splitlines()[-1].startswith("no longer followed; the run goes on: http")
    assert [run.state for run in kfp.alive] == ["PENDING"]


@pytest.mark.integration
def test_a_run_that_fails_ends_the_command_with_the_step_and_its_reason(capsys, kfp, on_s3, monkeypatch):
    command, store = on_s3
    monkeypatch.setattr(cluster, "POLL_SECONDS", 0.01)

    def play():
        while not kfp.load_all("runs"):
            time.sleep(0.01)
        (run,) = kfp.load_all("runs")
        kfp.step(run.run_id, "train", "RUNNING")
        runs.write_stage_failure(store, run.display_name, 0, "train", "the loss is nan", note_name="train")
        kfp.step(run.run_id, "train", "FAILED")
        kfp.end(run.run_id, "FAILED")

    player = threading.Thread(target=play)
    player.start()
    code, _, err = ns(capsys, *command)
    player.join()
    assert code == 6
    assert "✗ train" in err
    assert err.splitlines()[-1].startswith("error: train: the loss is nan; logs: http")
