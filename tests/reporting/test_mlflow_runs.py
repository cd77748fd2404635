"""What MLflow is told of a run, with its own server."""

import json
import os
import socket

import pytest
from structlog.testing import capture_logs

from ns.core import mlflow_client
from ns.core.mlflow_client import MetricPoint
from ns.reporting import mlflow_runs
from ns.reporting.artifacts import collect_generation_metrics
from tests.mlflow_server import run_mlflow_server
from tests.reporting.conftest import RUN

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with run_mlflow_server(tmp_path_factory.mktemp("mlflow")) as url:
        yield url


@pytest.fixture
def client(server, monkeypatch, request):
    from mlflow import MlflowClient  # takes a second, which no other test should wait for

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", request.node.name)
    monkeypatch.setattr(mlflow_client, "_gave_up_at", float("-inf"))
    return MlflowClient(server)


@pytest.fixture
def root(made_up):
    made_up.put(f"{RUN}/report.html", b"<h1>report</h1>")
    return made_up


def read_all(client):
    """Name → run, and all points of all metrics of all runs of the experiment."""
    experiment = client.get_experiment_by_name(os.environ["MLFLOW_EXPERIMENT_NAME"])
    runs = client.search_runs([experiment.experiment_id])
    points = {
        (run.info.run_id, name, metric.step, metric.value): metric.timestamp
        for run in runs
        for name in run.data.metrics
        for metric in client.get_metric_history(run.info.run_id, name)
    }
    count = sum(len(client.get_metric_history(run.info.run_id, name)) for run in runs for name in run.data.metrics)
    return {run.data.tags["mlflow.runName"]: run for run in runs}, points, count


def test_publish_report_logs_a_run_and_its_models_once(client, root):
    mlflow_runs.publish_mlflow_generation(root, RUN, 0)
    mlflow_runs.publish_mlflow_run(root, RUN)
    runs, points, count = read_all(client)
    assert set(runs) == {RUN, "teacher", "student-1"}
    main, student = runs[RUN], runs["student-1"]
    assert main.info.status == student.info.status == "FINISHED"
    assert main.data.params["selection.per_class"] == "10"
    assert student.data.params["train.optimizer.name"] == "rmsprop"
    assert student.data.tags["mlflow.parentRunId"] == main.info.run_id
    loss = client.get_metric_history(student.info.run_id, "loss")
    assert sorted((metric.step, metric.value) for metric in loss) == [(step, 1.0) for step in range(1, 5)]
    top1 = client.get_metric_history(main.info.run_id, "heldout_top1")
    assert [metric.value for metric in sorted(top1, key=lambda metric: metric.step)] == [
        collect_generation_metrics(root, RUN, generation)["heldout_top1"] for generation in (0, 1)
    ]
    assert {artifact.path for artifact in client.list_artifacts(main.info.run_id)} == {"config.yaml", "report.html"}
    # As after a stage that was killed at its end.
    mlflow_runs.publish_mlflow_generation(root, RUN, 1)
    mlflow_runs.publish_mlflow_run(root, RUN)
    assert read_all(client)[1:] == (points, count)
    assert len(points) == count
    assert client.get_run(main.info.run_id).info.status == "FINISHED"


def test_publish_failure_marks_the_run_until_it_goes_on(client, root):
    mlflow_runs.publish_mlflow_failure(root, RUN, "made-up")
    run = read_all(client)[0][RUN]
    assert run.info.status == "FAILED"
    mlflow_runs.publish_mlflow_generation(root, RUN, 0)
    assert client.get_run(run.info.run_id).info.status == "RUNNING"


def test_log_curves_continues_after_the_last_step(client, root, monkeypatch):
    history = [{"step": float(step), "loss": 1 / step, "lr": 0.1} for step in range(1, 1501)]
    parent = mlflow_runs.open_mlflow_run(root, RUN, "made-up")
    requests = []
    monkeypatch.setattr(mlflow_client, "METRICS_PER_REQUEST", 400)
    mlflow_runs.open_mlflow_model_run(parent, 1, "store/models/killed").log_curves(history[:700])
    # Another process, from a checkpoint before what was logged: the losses of the steps after it may differ.
    again = mlflow_runs.open_mlflow_model_run(parent, 1, "store/models/killed")
    sent = again._send_metrics
    again._send_metrics = lambda points: (requests.append(points := list(points)), sent(points))
    again.log_curves([*history[:600], *({**point, "loss": 0.5} for point in history[600:800])])
    again.log_curves(history)
    client_run = again.find_or_create()[1]
    loss = {metric.step: metric.value for metric in client.get_metric_history(client_run, "loss")}
    assert len(client.get_metric_history(client_run, "loss")) == len(loss) == 1500
    assert [loss[step] for step in (1, 700, 701, 800, 801, 1500)] == [1, 1 / 700, 0.5, 0.5, 1 / 801, 1 / 1500]
    # Whole points only, in few requests.
    assert max(map(len, requests)) <= 400
    assert all(len(request) % 2 == 0 for request in requests)
    assert len(requests) == 1 + 4


def test_publish_report_goes_on_without_a_server_and_tells_it_once(root, monkeypatch):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://robot:hidden@127.0.0.1:{nobody.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        monkeypatch.setattr(mlflow_client, "_gave_up_at", float("-inf"))
        with capture_logs() as logs:
            mlflow_runs.publish_mlflow_run(root, RUN)
    assert [entry["event"] for entry in logs] == ["nothing is logged to MLflow for now; work goes on"]
    assert "127.0.0.1" in logs[0]["reason"]
    assert "hidden" not in json.dumps(logs)


def test_log_metrics_is_tried_again_after_a_while(client, root, monkeypatch):
    parent = mlflow_runs.open_mlflow_run(root, RUN, "made-up")
    run = mlflow_runs.open_mlflow_model_run(parent, 1, "store/models/away")
    monkeypatch.setattr(mlflow_client, "make_client", lambda: (_ for _ in ()).throw(OSError("away")))
    with capture_logs() as logs:
        for _ in range(3):
            run.log_metrics([MetricPoint("top1", 0.5, 1)])
    assert [entry["reason"] for entry in logs] == ["away"]
    monkeypatch.undo()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    monkeypatch.setattr(mlflow_client, "RETRY_SECONDS", 0)
    run.log_metrics([MetricPoint("top1", 0.5, 1)])
    assert client.get_run(run.find_or_create()[1]).data.metrics == {"top1": 0.5}
