import re
import socket
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from structlog.testing import capture_logs

from ns.core import log, telemetry


def value(name, **labels):
    return telemetry.REGISTRY.get_sample_value(name, labels)


def test_metrics_endpoint_serves_and_only_logs_a_taken_port(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        port = taken.getsockname()[1]
        monkeypatch.setenv(telemetry.PORT_VARIABLE, str(port))
        with capture_logs() as logs:
            telemetry.serve_metrics()
        assert [entry["event"] for entry in logs] == ["no metrics endpoint; work continues without it"]
    with capture_logs() as logs:
        # As the stages of one process do.
        telemetry.serve_metrics()
        telemetry.serve_metrics()
    assert logs == []
    telemetry.begin_stage("train", 0, "served")
    telemetry.record_checkpoint()
    page = urllib.request.urlopen(f"http://localhost:{port}/metrics").read().decode()
    assert re.search(r"^nst_checkpoint_age_seconds 0\.\d+|^nst_checkpoint_age_seconds \d\.\d+e-", page, re.MULTILINE)
    assert 'nst_build_info{version="' in page


@pytest.mark.parametrize(
    ("variables", "address"),
    [
        ({}, "127.0.0.1"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "0.0.0.0"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "NS_METRICS_ADDRESS": "127.0.0.1"}, "127.0.0.1"),
        ({"NS_METRICS_ADDRESS": "0.0.0.0"}, "0.0.0.0"),
    ],
)
def test_metrics_endpoint_serves_other_machines_in_a_pod_only(monkeypatch, variables, address):
    served = []
    monkeypatch.setattr(telemetry, "_served_port", "")
    monkeypatch.setattr(telemetry, "start_http_server", lambda port, addr, registry: served.append((port, addr)))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    for name, value in {telemetry.PORT_VARIABLE: "9090", **variables}.items():
        monkeypatch.setenv(name, value)
    telemetry.serve_metrics()
    assert served == [(9090, address)]


def test_stage_that_waits_for_another_pod_is_scraped_and_not_at_work(monkeypatch):
    served = []
    monkeypatch.setattr(telemetry, "serve_metrics", lambda: served.append(True))
    telemetry.begin_stage("train", 1, "r")
    telemetry.serve_waiting()
    assert telemetry.REGISTRY.get_sample_value("nst_stage_running", {"stage": "train"}) == 0
    assert served


def test_metrics_endpoint_only_logs_an_invalid_port(monkeypatch):
    for wrong in ("http", "99999"):
        monkeypatch.setenv(telemetry.PORT_VARIABLE, wrong)
        with capture_logs() as logs:
            telemetry.serve_metrics()
        assert logs[0]["port"] == wrong


def test_metric_names_follow_the_conventions():
    families = [one for registry in (telemetry.REGISTRY, telemetry.SUMMARY) for one in registry._collector_to_names]
    kinds = {
        f"{family.name}_total" if family.type == "counter" else family.name: family.type
        for collector in families
        for family in collector.describe()
    }
    assert len(kinds) > 30
    for name, kind in kinds.items():
        assert name.startswith("nst_")
        assert name.endswith("_total") == (kind == "counter")
        assert not re.search(r"milli|percent|_ms\b", name)
    assert "_created" not in generate_latest(telemetry.REGISTRY).decode()


def test_images_processed_counts_for_the_current_stage():
    telemetry.begin_stage("label", 1, "counting", config_digest="abc", teacher="store/models/t")
    assert value("nst_run_info", run_id="counting", config_digest="abc", teacher="store/models/t") == 1
    assert value("nst_stage_running", stage="label") == 1
    before = value("nst_images_processed_total", stage="label")
    assert before is not None
    log.Progress(10, "images").update(3)
    assert value("nst_images_processed_total", stage="label") == before + 3

    telemetry.begin_stage("evaluate", 1, "next")
    log.Progress(10, "images").update(4)
    assert value("nst_images_processed_total", stage="label") == before + 3
    assert value("nst_run_info", run_id="counting", config_digest="abc", teacher="store/models/t") is None
    telemetry.end_stage(2.0)
    assert value("nst_stage_running", stage="evaluate") == 0
    assert value("nst_stage_duration_seconds_bucket", stage="evaluate", le="3.0") >= 1


def test_optional_gauge_has_no_value_before_it_is_set():
    registry = CollectorRegistry()
    fact = telemetry._OptionalGauge("nst_fact_ratio", "A share.", registry=registry)
    assert registry.get_sample_value("nst_fact_ratio") is None
    fact.set(0)
    assert registry.get_sample_value("nst_fact_ratio") == 0


def test_stage_lingers_only_where_it_is_scraped(monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setenv(telemetry.LINGER_VARIABLE, "60")
    telemetry.begin_stage("gate", 1, "r")
    telemetry.end_stage(1.0, linger=True)
    monkeypatch.setenv(telemetry.PORT_VARIABLE, "9464")
    telemetry.end_stage(1.0)
    assert slept == []
    telemetry.end_stage(1.0, linger=True)
    assert slept == [60]
    for wrong in ("a while", "-1", "1e9"):
        monkeypatch.setenv(telemetry.LINGER_VARIABLE, wrong)
        with capture_logs() as logs:
            telemetry.end_stage(1.0, linger=True)
        assert logs[0]["value"] == wrong
    assert sum(slept) == 60


def test_confidence_histogram_counts_up_to_each_bound():
    def buckets():
        return [
            value("nst_pseudo_label_confidence_bucket", le=bound) for bound in ("0.1", "0.9", "0.95", "0.99", "1.0", "+Inf")
        ]

    before, total = buckets(), value("nst_pseudo_label_confidence_sum")
    counts = [0] * 1000
    for place, images in {99: 1, 100: 2, 949: 4, 950: 8, 999: 16}.items():
        counts[place] = images
    telemetry.CONFIDENCE.add_counts(counts)
    assert [after - b for b, after in zip(before, buckets(), strict=True)] == [1, 3, 7, 15, 31, 31]
    middles = 0.0995 + 2 * 0.1005 + 4 * 0.9495 + 8 * 0.9505 + 16 * 0.9995
    assert value("nst_pseudo_label_confidence_sum") - total == pytest.approx(middles)


def test_selection_metrics_show_outcomes_and_class_coverage():
    before = value("nst_pseudo_labels_total", outcome="kept") or 0
    telemetry.record_selection({"kept": 60, "low_confidence": 3}, [0, *range(1, 11)])
    assert value("nst_pseudo_labels_total", outcome="kept") == before + 60
    assert value("nst_class_coverage_ratio") == pytest.approx(10 / 11)
    found = {name: value("nst_class_kept_images", statistic=name) for name in ("min", "p10", "median", "max")}
    assert found == {"min": 0, "p10": 1, "median": 5, "max": 10}


def test_push_run_metrics_replaces_and_only_logs_failures(monkeypatch):
    telemetry.push_run_metrics("nobody listens")  # without the variable
    requests = []

    class Gateway(BaseHTTPRequestHandler):
        def do_PUT(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            requests.append((self.path, body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Gateway)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv(telemetry.GATEWAY_VARIABLE, f"http://127.0.0.1:{server.server_port}")
    telemetry.LAST_ACCURACY.set(0.75)
    telemetry.push_run_metrics("digits")
    server.shutdown()
    server.server_close()
    ((path, body),) = requests
    assert path == "/metrics/job/noisy-student/pipeline/digits"
    assert "\nnst_last_run_accuracy_ratio 0.75\n" in body
    with capture_logs() as logs:
        telemetry.push_run_metrics("digits")
    assert logs[0]["log_level"] == "warning"
