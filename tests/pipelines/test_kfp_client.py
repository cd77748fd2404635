"""The KFP client against a stand-in of KFP's API."""

import json
import threading
from http import HTTPStatus

import pytest
import yaml

from ns.core.errors import ConfigError, Interrupted, RunError
from pipelines import kfp_client
from pipelines.kfp_client import KfpClient, KfpUnreachableError, check_inputs, stage_names
from tests.pipelines.kfp_api import Refused


def make_package(name: str = "small", words: str = "hello") -> str:
    """A compiled pipeline as small as can be: one task in it, one in a pipeline within."""
    inputs = {
        "config_uri": {"parameterType": "STRING", "description": "the experiment"},
        "gpus": {"parameterType": "STRING", "defaultValue": "0", "isOptional": True, "literals": ["0", "1"]},
        "tries": {"parameterType": "NUMBER_INTEGER", "defaultValue": 1, "isOptional": True},
        "overrides": {"parameterType": "LIST", "defaultValue": [], "isOptional": True},
    }
    spec = {
        "pipelineInfo": {"name": name, "description": words},
        "schemaVersion": "2.1.0",
        "deploymentSpec": {"executors": {"exec-train": {"container": {"image": "worker"}}}},
        "components": {
            "comp-train": {"executorLabel": "exec-train"},
            "comp-generation": {"dag": {"tasks": {"gate": {"componentRef": {"name": "comp-train"}}}}},
        },
        "root": {
            "inputDefinitions": {"parameters": inputs},
            "dag": {
                "tasks": {
                    "train": {"componentRef": {"name": "comp-train"}},
                    "generation": {"componentRef": {"name": "comp-generation"}},
                }
            },
        },
    }
    return yaml.dump_all([spec, {"platforms": {}}])


@pytest.fixture
def server(kfp):
    return KfpClient()


def start(server, name="digits-1", **arguments):
    pipeline = server.upload_pipeline(make_package())
    return server.create_run(pipeline, {"config_uri": "quickstart", **arguments}, name=name, experiment="digits")


def test_upload_pipeline_once_per_content(server, kfp):
    first, again, changed = (
        server.upload_pipeline(make_package()),
        server.upload_pipeline(make_package()),
        server.upload_pipeline(make_package(words="bye")),
    )
    assert first == again
    assert changed.pipeline_id == first.pipeline_id
    assert first.version.startswith("small-")
    assert [one.name for one in kfp.all("pipeline_versions")] == [first.version, changed.version]
    assert len(kfp.all("pipelines")) == 1


def test_upload_pipeline_by_several_clients_at_once(server, kfp):
    # All have looked, and found nothing, before any of them makes it.
    gates = {request: threading.Barrier(3, timeout=10) for request in ("POST /pipelines", "POST /pipelines/upload_version")}
    kfp.before = lambda request: gates[request].wait() if request in gates else None
    found = []
    threads = [threading.Thread(target=lambda: found.append(KfpClient().upload_pipeline(make_package()))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(set(found)) == 1
    assert (len(kfp.all("pipelines")), len(kfp.all("pipeline_versions"))) == (1, 1)


def test_list_versions_with_descriptions(server, kfp):
    assert list(server.list_versions("small")) == []
    assert kfp.all("pipelines") == []
    first = server.upload_pipeline(make_package(), "code 1")
    second = server.upload_pipeline(make_package(words="other"), "code 2")
    server.upload_pipeline(make_package("another"), "code 3")
    assert sorted(server.list_versions("small")) == sorted([first, second])


def test_create_run_with_name_inputs_and_url(server, kfp, monkeypatch):
    run = start(server, overrides=["seed=1"])
    (made,) = kfp.all("runs")
    assert (run.run_id, run.name, run.state, run.new) == (made.run_id, "digits-1", "PENDING", True)
    assert run.url == f"{kfp.url}/#/runs/details/{made.run_id}"
    assert made.runtime_config.parameters == {"config_uri": "quickstart", "overrides": ["seed=1"]}
    assert [one.display_name for one in kfp.all("experiments")] == ["digits"]
    monkeypatch.setenv("NS_KFP_UI", "https://kubeflow.example/pipeline/")
    assert KfpClient().run_url("1") == "https://kubeflow.example/pipeline/#/runs/details/1"


@pytest.mark.parametrize(("state", "new"), [("RUNNING", False), ("SUCCEEDED", False), ("FAILED", True), ("CANCELED", True)])
def test_create_run_again_only_after_a_failed_one(server, kfp, state, new):
    first = start(server)
    kfp.end(first.run_id, state)
    second = start(server)
    assert second.new == new
    assert (second.run_id != first.run_id) == new
    assert start(server, name="another").new


def test_find_run_over_several_pages(server, kfp):
    first = start(server)
    for number in range(3):
        start(server, name=f"later-{number}")
    asked = len(kfp.requests)
    page_size, kfp_client.PAGE_SIZE = kfp_client.PAGE_SIZE, 1
    try:
        kfp.end(first.run_id, "FAILED")
        second = start(server)
        kfp.end(second.run_id, "FAILED")
        assert server.find_run("digits-1", "digits") is None
        assert kfp.requests[asked:].count("GET /runs") >= 3
    finally:
        kfp_client.PAGE_SIZE = page_size


def test_create_run_once_when_the_answer_is_lost(server, kfp):
    server.upload_pipeline(make_package())
    kfp.losing.add("POST /runs")
    run = start(server)
    assert run.new
    assert [one.run_id for one in kfp.all("runs")] == [run.run_id]


def test_wait_for_run_calls_after_each_poll_even_of_an_unreachable_server(server, kfp):
    run = start(server)
    answers = iter([Refused(HTTPStatus.SERVICE_UNAVAILABLE, 14, "upstream connect error"), None, None])

    def before(request):
        if answer := next(answers):
            raise answer

    kfp.before = before
    polls = []

    def after_poll():
        polls.append(1)
        if len(polls) == 2:
            kfp.end(run.run_id, "FAILED")

    assert server.wait_for_run(run.run_id, after_poll).state == "FAILED"
    assert len(polls) == 3


def test_patient_client_waits_for_a_server_that_restarts(server, kfp, monkeypatch):
    monkeypatch.setattr(kfp_client, "RETRY_SECONDS", 0.001)
    refused = set()

    def before(request):
        if request not in refused:
            refused.add(request)
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, 14, "upstream connect error")

    kfp.before = before
    patient = KfpClient(patience_seconds=60)
    assert start(patient).new
    assert (len(kfp.all("runs")), len(kfp.all("pipeline_versions"))) == (1, 1)
    assert "POST /runs" in refused
    refused.clear()
    with pytest.raises(KfpUnreachableError):
        start(server, name="another")


def test_terminate_run(server, kfp):
    run = start(server)
    server.terminate_run(run.run_id)
    assert kfp.all("runs")[0].state == "CANCELING"
    kfp.end(run.run_id, "FAILED")
    with pytest.raises(RunError, match="refused"):
        server.terminate_run(run.run_id)
    assert server.wait_for_run(run.run_id).state == "CANCELED"


def test_list_failed_tasks_are_stages(server, kfp):
    run = start(server)
    assert server.list_failed_tasks(run.run_id, {"train"}) == []
    for task, state in (("train", "FAILED"), ("gate", "SUCCEEDED"), ("other", "FAILED")):
        kfp.play_task(run.run_id, task, state)
    assert server.list_failed_tasks(run.run_id, stage_names(make_package())) == ["train"]


def test_wait_for_run_survives_a_short_outage(server, kfp):
    run = start(server)
    answers = iter([Refused(HTTPStatus.SERVICE_UNAVAILABLE, 14, "upstream connect error"), None, None])

    def before(request):
        answer = next(answers)
        if answer:
            raise answer
        kfp.end(run.run_id, "SUCCEEDED")

    kfp.before = before
    assert server.wait_for_run(run.run_id).state == "SUCCEEDED"


def test_wait_for_run_gives_up_after_a_long_outage(server, kfp, monkeypatch):
    run = start(server)
    kfp.close()
    monkeypatch.setattr(kfp_client, "PATIENCE_SECONDS", 0.01)
    with pytest.raises(KfpUnreachableError, match=f"cannot be reached.*the run continues: {run.url}"):
        server.wait_for_run(run.run_id)


def test_wait_for_run_interrupted_leaves_the_run(server, kfp, monkeypatch):
    run = start(server)
    monkeypatch.setattr(kfp_client.time, "sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(Interrupted, match=f"no longer followed; the run continues: {run.url}"):
        server.wait_for_run(run.run_id)
    assert [one.state for one in kfp.alive] == ["PENDING"]


def test_unreachable_server_message(server, kfp):
    kfp.close()
    with pytest.raises(
        KfpUnreachableError, match=rf"{kfp.url}: cannot be reached: .*; is it KFP's URL, and does the port-forward"
    ) as caught:
        start(server)
    assert caught.value.exit_code == 6
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (HTTPStatus.FORBIDDEN, "not allowed: no; set NS_KFP_TOKEN"),
        (HTTPStatus.NOT_FOUND, "not found: no; is it the URL of KFP"),
        (HTTPStatus.BAD_REQUEST, "refused: no"),
        (HTTPStatus.BAD_GATEWAY, "failed with 502: no; try again"),
        (HTTPStatus.IM_A_TEAPOT, "answered 418: no"),
    ],
)
def test_refusal_messages(server, kfp, status, words):
    def before(request):
        raise Refused(status, 13, "no")

    kfp.before = before
    with pytest.raises(RunError, match=words):
        server.find_run("digits-1", "digits")


def test_server_that_is_not_kfp_message(server, kfp, monkeypatch):
    with pytest.raises(RunError, match="not found: Not Found; is it the URL of KFP"):
        KfpClient(f"{kfp.url}/elsewhere").upload_pipeline(make_package())


def test_token_from_variable_or_renewed_pod_file(kfp, monkeypatch, tmp_path):
    kfp.token = "secret"
    with pytest.raises(RunError, match=r"not allowed: Unauthenticated.*NS_KFP_TOKEN"):
        KfpClient().upload_pipeline(make_package())
    monkeypatch.setenv("NS_KFP_TOKEN", "secret")
    assert KfpClient().upload_pipeline(make_package()).name == "small"
    monkeypatch.delenv("NS_KFP_TOKEN")
    monkeypatch.setattr(kfp_client, "POD_TOKEN", tmp_path / "token")
    (tmp_path / "token").touch()
    server = KfpClient()
    for token in ("secret", "renewed"):
        kfp.token = token
        (tmp_path / "token").write_text(f"{token}\n")
        server.upload_pipeline(make_package())


def test_namespace_is_sent_with_every_request(kfp, monkeypatch):
    monkeypatch.setenv("NS_KFP_NAMESPACE", "team")
    start(KfpClient())
    assert {one.namespace for one in [*kfp.all("pipelines"), *kfp.all("experiments")]} == {"team"}
    assert not start(KfpClient()).new


@pytest.mark.parametrize(
    ("url", "words"), [("", "no server is named; give its URL, or set NS_KFP_URL"), ("ml-pipeline:8888", "must be a URL")]
)
def test_client_needs_a_url(monkeypatch, url, words):
    monkeypatch.delenv("NS_KFP_URL", raising=False)
    with pytest.raises(ConfigError, match=words):
        KfpClient(url)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "config_uri: is missing: the experiment"),
        ({"config_uri": 3}, "config_uri: invalid value 3: must be string"),
        ({"config_uri": "c", "tries": True}, "tries: invalid value True: must be number integer"),
        ({"config_uri": "c", "gpus": "7"}, "gpus: invalid value '7': must be one of 0, 1"),
        (
            {"config_uri": "c", "gpu": "1"},
            "gpu: is not an input of pipeline small; its inputs are config_uri, gpus, overrides, tries",
        ),
        ({"config_uri": "c", "overrides": ["x" * 10_000]}, "bytes as JSON, and KFP accepts 10,000"),
    ],
)
def test_check_inputs_refuses_what_kfp_refuses(server, kfp, arguments, words):
    with pytest.raises(ConfigError, match=words):
        check_inputs(make_package(), arguments)
    # And KFP would.
    pipeline = server.upload_pipeline(make_package())
    with pytest.raises(RunError, match="refused"):
        server.create_run(pipeline, arguments, name="one", experiment="digits")
    assert kfp.all("runs") == []


def test_check_inputs_accepts_what_kfp_accepts(server, kfp):
    arguments = check_inputs(make_package(), {"config_uri": "c", "tries": 2, "gpus": "1", "overrides": ["a=b"]})
    assert server.create_run(server.upload_pipeline(make_package()), arguments, name="one", experiment="digits").new


@pytest.mark.parametrize("text", ["", "a: [", "just words", json.dumps({"pipelineInfo": {}})])
def test_check_inputs_refuses_other_yaml(text):
    with pytest.raises(ConfigError, match=r"not a compiled pipeline.*make compile"):
        check_inputs(text, {})


def test_stage_names_are_tasks_with_containers():
    assert stage_names(make_package()) == {"train", "gate"}
