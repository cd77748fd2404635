"""Submitting to KFP: once each, with words for whatever goes wrong, against a stand-in of its API."""

import json
import threading
from http import HTTPStatus

import pytest
import yaml

from ns.core.errors import ConfigError, Interrupted, RunError
from pipelines import kfp_client as submit
from pipelines.kfp_client import KfpClient, KfpUnreachableError, check_inputs, stage_names
from tests.pipelines.kfp_api import Refused


def package(name: str = "small", words: str = "hello") -> str:
    """A compiled pipeline as small as can be: one task in it, one in a pipeline within."""
    inputs = {
        "config": {"parameterType": "STRING", "description": "the experiment"},
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
    pipeline = server.upload_pipeline(package())
    return server.submit(pipeline, {"config": "quickstart", **arguments}, name=name, experiment="digits")


def test_the_same_pipeline_is_uploaded_once_and_a_changed_one_is_another_version(server, kfp):
    first, again, changed = (
        server.upload_pipeline(package()),
        server.upload_pipeline(package()),
        server.upload_pipeline(package(words="bye")),
    )
    assert first == again
    assert changed.pipeline_id == first.pipeline_id
    assert first.version.startswith("small-")
    assert [one.name for one in kfp.load_all("pipeline_versions")] == [first.version, changed.version]
    assert len(kfp.load_all("pipelines")) == 1


def test_uploads_at_the_same_instant_end_with_one_pipeline_and_one_version(server, kfp):
    # All have looked, and found nothing, before any of them makes it.
    gates = {request: threading.Barrier(3, timeout=10) for request in ("POST /pipelines", "POST /pipelines/upload_version")}
    kfp.before = lambda request: gates[request].wait() if request in gates else None
    found = []
    threads = [threading.Thread(target=lambda: found.append(KfpClient().upload_pipeline(package()))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(set(found)) == 1
    assert (len(kfp.load_all("pipelines")), len(kfp.load_all("pipeline_versions"))) == (1, 1)


def test_a_run_has_its_name_arguments_and_a_link(server, kfp, monkeypatch):
    run = start(server, overrides=["seed=1"])
    (made,) = kfp.load_all("runs")
    assert (run.run_id, run.name, run.state, run.new) == (made.run_id, "digits-1", "PENDING", True)
    assert run.url == f"{kfp.url}/#/runs/details/{made.run_id}"
    assert made.runtime_config.parameters == {"config": "quickstart", "overrides": ["seed=1"]}
    assert [one.display_name for one in kfp.load_all("experiments")] == ["digits"]
    monkeypatch.setenv("NS_KFP_UI", "https://kubeflow.example/pipeline/")
    assert KfpClient().run_url("1") == "https://kubeflow.example/pipeline/#/runs/details/1"


@pytest.mark.parametrize(("state", "new"), [("RUNNING", False), ("SUCCEEDED", False), ("FAILED", True), ("CANCELED", True)])
def test_a_run_is_started_again_only_if_the_one_of_its_name_came_to_nothing(server, kfp, state, new):
    first = start(server)
    kfp.end(first.run_id, state)
    second = start(server)
    assert second.new == new
    assert (second.run_id != first.run_id) == new
    assert start(server, name="another").new


def test_a_run_is_found_however_many_there_are(server, kfp):
    first = start(server)
    for number in range(3):
        start(server, name=f"later-{number}")
    asked = len(kfp.requests)
    submit_page, submit.PAGE_SIZE = submit.PAGE_SIZE, 1
    try:
        kfp.end(first.run_id, "FAILED")
        second = start(server)
        kfp.end(second.run_id, "FAILED")
        assert server.find("digits-1", "digits") is None
        assert kfp.requests[asked:].count("GET /runs") >= 3
    finally:
        submit.PAGE_SIZE = submit_page


def test_an_answer_that_is_lost_leaves_one_run(server, kfp):
    server.upload_pipeline(package())
    kfp.losing.add("POST /runs")
    run = start(server)
    assert run.new
    assert [one.run_id for one in kfp.load_all("runs")] == [run.run_id]


def test_following_tells_each_step_once_and_none_of_its_helpers(server, kfp):
    run = start(server)
    script = [
        lambda: kfp.step(run.run_id, "train", "RUNNING"),
        lambda: kfp.step(run.run_id, "train", "RUNNING", retries=1),
        lambda: (kfp.step(run.run_id, "train", "SUCCEEDED"), kfp.step(run.run_id, "gate", "RUNNING")),
        lambda: (kfp.step(run.run_id, "gate", "FAILED"), kfp.end(run.run_id, "FAILED")),
    ]
    kfp.before = lambda request: script.pop(0)() if request.startswith("GET /runs/") else None
    told = []
    ended = server.follow(run.run_id, told.append, steps=stage_names(package()), poll=0.001)
    assert [(task.name, task.state) for task in told] == [
        ("train", "RUNNING"),
        ("train", "SUCCEEDED"),
        ("gate", "RUNNING"),
        ("gate", "FAILED"),
    ]
    assert ended.state == "FAILED"


def test_a_server_that_is_away_for_a_moment_ends_no_following(server, kfp):
    run = start(server)
    answers = iter([Refused(HTTPStatus.SERVICE_UNAVAILABLE, 14, "upstream connect error"), None, None])

    def before(request):
        answer = next(answers)
        if answer:
            raise answer
        kfp.end(run.run_id, "SUCCEEDED")

    kfp.before = before
    assert server.follow(run.run_id, print, steps=(), poll=0.001).state == "SUCCEEDED"


def test_a_server_that_stays_away_ends_following_with_the_link(server, kfp, monkeypatch):
    run = start(server)
    kfp.close()
    monkeypatch.setattr(submit, "PATIENCE_SECONDS", 0.01)
    with pytest.raises(KfpUnreachableError, match=f"cannot be reached.*the run goes on: {run.url}"):
        server.follow(run.run_id, print, steps=(), poll=0.02)


def test_ctrl_c_ends_following_and_not_the_run(server, kfp, monkeypatch):
    run = start(server)
    monkeypatch.setattr(submit.time, "sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(Interrupted, match=f"no longer followed; the run goes on: {run.url}"):
        server.follow(run.run_id, print, steps=())
    assert [one.state for one in kfp.alive] == ["PENDING"]


def test_a_server_that_is_down_is_named_with_what_to_do(server, kfp):
    kfp.close()
    with pytest.raises(KfpUnreachableError, match=rf"{kfp.url}: cannot be reached: .*; is it KFP's URL") as caught:
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
def test_every_refusal_is_one_line_that_says_what_to_do(server, kfp, status, words):
    def before(request):
        raise Refused(status, 13, "no")

    kfp.before = before
    with pytest.raises(RunError, match=words):
        server.find("digits-1", "digits")


def test_what_answers_and_is_not_kfp_is_said(server, kfp, monkeypatch):
    with pytest.raises(RunError, match="not found: Not Found; is it the URL of KFP"):
        KfpClient(f"{kfp.url}/elsewhere").upload_pipeline(package())


def test_the_token_comes_from_the_environment_or_from_the_pod_as_it_is_now(kfp, monkeypatch, tmp_path):
    kfp.token = "secret"
    with pytest.raises(RunError, match=r"not allowed: Unauthenticated.*NS_KFP_TOKEN"):
        KfpClient().upload_pipeline(package())
    monkeypatch.setenv("NS_KFP_TOKEN", "secret")
    assert KfpClient().upload_pipeline(package()).name == "small"
    monkeypatch.delenv("NS_KFP_TOKEN")
    monkeypatch.setattr(submit, "POD_TOKEN", tmp_path / "token")
    (tmp_path / "token").touch()
    server = KfpClient()
    for token in ("secret", "renewed"):
        kfp.token = token
        (tmp_path / "token").write_text(f"{token}\n")
        server.upload_pipeline(package())


def test_a_namespace_goes_into_every_question(kfp, monkeypatch):
    monkeypatch.setenv("NS_KFP_NAMESPACE", "team")
    start(KfpClient())
    assert {one.namespace for one in [*kfp.load_all("pipelines"), *kfp.load_all("experiments")]} == {"team"}
    assert not start(KfpClient()).new


@pytest.mark.parametrize("url", ["", "ml-pipeline:8888"])
def test_a_server_must_be_named(monkeypatch, url):
    monkeypatch.delenv("NS_KFP_URL", raising=False)
    with pytest.raises(ConfigError, match=r"NS_KFP_URL|must be a URL"):
        KfpClient(url)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "config: must be given: the experiment"),
        ({"config": 3}, "config: invalid value 3: must be string"),
        ({"config": "c", "tries": True}, "tries: invalid value True: must be number integer"),
        ({"config": "c", "gpus": "7"}, "gpus: invalid value '7': must be one of 0, 1"),
        ({"config": "c", "gpu": "1"}, "gpu: is no input of pipeline small; its inputs are config, gpus, overrides, tries"),
        ({"config": "c", "overrides": ["x" * 10_000]}, "bytes as JSON, KFP takes 10,000"),
    ],
)
def test_arguments_that_kfp_would_refuse_are_refused_before(server, kfp, arguments, words):
    with pytest.raises(ConfigError, match=words):
        check_inputs(package(), arguments)
    # And KFP would.
    pipeline = server.upload_pipeline(package())
    with pytest.raises(RunError, match="refused"):
        server.submit(pipeline, arguments, name="one", experiment="digits")
    assert kfp.load_all("runs") == []


def test_arguments_that_pass_here_pass_there(server, kfp):
    arguments = check_inputs(package(), {"config": "c", "tries": 2, "gpus": "1", "overrides": ["a=b"]})
    assert server.submit(server.upload_pipeline(package()), arguments, name="one", experiment="digits").new


@pytest.mark.parametrize("text", ["", "a: [", "just words", json.dumps({"pipelineInfo": {}})])
def test_what_is_no_compiled_pipeline_is_refused(text):
    with pytest.raises(ConfigError, match=r"no compiled pipeline.*make compile"):
        check_inputs(text, {})


def test_the_steps_of_a_pipeline_are_those_that_run_a_container():
    assert stage_names(package()) == {"train", "gate"}
