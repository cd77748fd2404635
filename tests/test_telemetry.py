import re
import socket
import urllib.request

from prometheus_client import generate_latest
from structlog.testing import capture_logs

from ns import telemetry


def test_the_endpoint_shows_the_metrics_and_a_taken_port_is_only_logged(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        port = taken.getsockname()[1]
        monkeypatch.setenv(telemetry.PORT_VARIABLE, str(port))
        with capture_logs() as logs:
            telemetry.serve()
        assert [entry["event"] for entry in logs] == ["no metrics endpoint; work goes on without"]
    telemetry.serve()
    telemetry.checkpoint_saved()
    page = urllib.request.urlopen(f"http://localhost:{port}/metrics").read().decode()
    assert re.search(r"^nst_checkpoint_age_seconds 0\.\d+|^nst_checkpoint_age_seconds \d\.\d+e-", page, re.MULTILINE)
    assert 'nst_build_info{version="' in page


def test_a_port_that_is_none_is_only_logged(monkeypatch):
    for wrong in ("http", "99999"):
        monkeypatch.setenv(telemetry.PORT_VARIABLE, wrong)
        with capture_logs() as logs:
            telemetry.serve()
        assert logs[0]["port"] == wrong


def test_names_follow_the_conventions():
    page = generate_latest(telemetry.REGISTRY).decode()
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", page, re.MULTILINE))
    assert len(kinds) > 10
    for name, kind in kinds.items():
        assert name.startswith("nst_")
        assert name.endswith("_total") == (kind == "counter")
        assert not re.search(r"milli|percent|_ms\b", name)
    assert "_created" not in page
