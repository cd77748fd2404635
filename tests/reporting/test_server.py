import threading
import urllib.error
import urllib.request

import pytest

from ns.core.errors import ConfigError
from ns.reporting.server import ReportServer
from tests.reporting.conftest import RUN

pytestmark = pytest.mark.integration


@pytest.fixture
def server(unchanged):
    with ReportServer(unchanged, RUN, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetch(url: str, **headers: str):
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)


def test_server_renders_the_report_and_follows_a_run_that_is_under_way(server, monkeypatch):
    with fetch(server.url) as answer:
        page = answer.read().decode()
        assert answer.headers["Refresh"] is None, "nothing drives this run"
    assert '<h2 id="h-loop">The loop</h2>' in page
    monkeypatch.setattr("ns.runs.summary.is_run_driven", lambda *_: True)
    monkeypatch.setattr("ns.reporting.server.render_report", lambda _: "rendered once more")
    with fetch(server.url) as answer:
        assert answer.headers["Refresh"] == "30"


@pytest.mark.parametrize(("path", "host"), [("/other", None), ("/", "elsewhere.example"), ("/", "elsewhere.example:80")])
def test_server_shows_nothing_else_and_nothing_to_pages_from_elsewhere(server, path, host):
    with pytest.raises(urllib.error.HTTPError, match="404"):
        fetch(f"{server.url}{path}", **({"Host": host} if host else {}))


def test_port_that_is_taken_is_told(server):
    with pytest.raises(ConfigError, match=rf"--port {server.server_port}: Address already in use; choose another port"):
        ReportServer(server.root, server.run, server.server_port)


def test_server_says_what_failed_in_a_line_and_nothing_of_browsers_that_went_away(server, monkeypatch, capsys):
    def fail_with(error: Exception) -> None:
        def fail(_context: object) -> str:
            raise error

        monkeypatch.setattr("ns.reporting.server.render_report", fail)
        with pytest.raises(ConnectionError):
            fetch(server.url)

    fail_with(BrokenPipeError())
    assert capsys.readouterr().err == ""
    fail_with(ZeroDivisionError("by\nzero"))
    (line,) = capsys.readouterr().err.splitlines()
    assert "the report could not be shown" in line
    assert "ZeroDivisionError: by" in line
