"""One comment for each marker, on both hosts: against a server that keeps comments as they do."""

import importlib.util
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

pytestmark = pytest.mark.integration

CHECKOUT = Path(__file__).parents[2]
HOSTS = {
    "github": ("/repos/me/it", "number", "issues/7/comments", "issues/comments/{}", "PATCH", "Authorization", "Bearer t"),
    "gitlab": ("/projects/5", "iid", "merge_requests/7/notes", "merge_requests/7/notes/{}", "PUT", "PRIVATE-TOKEN", "t"),
}


def load():
    spec = importlib.util.spec_from_file_location("comment", CHECKOUT / ".ci" / "comment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=HOSTS)
def host(request, monkeypatch):
    """A host with request 7, of branch `topic`. Holds the comments and what was asked for."""
    base, number, listed, one, verb, header, token = HOSTS[request.param]

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, code, value):
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        def handle_any(self):
            address = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(address.query).items()}
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
            path = address.path.removeprefix(f"{base}/")
            if self.headers[header] != token:
                self.answer(401, {"message": "Bad credentials"})
            elif path in ("pulls", "merge_requests"):
                branch = query.get("source_branch") or query["head"].removeprefix("me:")
                self.answer(200, [{number: 7}] if branch == "topic" else [])
            elif path == listed and self.command == "GET":
                start = (int(query["page"]) - 1) * int(query["per_page"])
                self.answer(200, server.comments[start : start + int(query["per_page"])])
            elif path == listed and self.command == "POST":
                server.comments.append({"id": len(server.comments) + 1, **body})
                self.answer(201, server.comments[-1])
            elif self.command == verb:
                found = next(c for c in server.comments if path == one.format(c["id"]))
                found.update(body)
                self.answer(200, found)
            else:
                self.answer(404, {"message": f"{self.command} {path}"})

        do_GET = do_POST = do_PUT = do_PATCH = handle_any  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.comments = [{"id": number, "body": f"hello {number}"} for number in range(1, 131)]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    for name in ("CI_PROJECT_ID", "GITHUB_API_URL"):
        monkeypatch.delenv(name, raising=False)
    if request.param == "github":
        settings = {"GITHUB_API_URL": url, "GITHUB_REPOSITORY": "me/it", "GITHUB_TOKEN": "t"}
    else:
        settings = {"CI_API_V4_URL": url, "CI_PROJECT_ID": "5", "GITLAB_TOKEN": "t"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def comment(monkeypatch, tmp_path):
    module = load()

    def run(text, *options, marker="pipeline"):
        file = tmp_path / "text.md"
        file.write_text(text)
        monkeypatch.setattr(sys, "argv", ["comment.py", marker, str(file), *options])
        return module.main()

    run.module = module
    return run


def test_comment_is_written_once_and_then_changed(host, comment, capsys):
    assert comment("one\n", "--number", "7") == 0
    assert comment("two\n", "--branch", "topic") == 0
    assert comment("two\n", "--branch", "topic") == 0
    assert [line.rpartition(" ")[2] for line in capsys.readouterr().err.splitlines()] == ["new", "changed", "unchanged"]
    assert comment("other\n", "--number", "7", marker="promotion") == 0
    assert [made["body"] for made in host.comments[130:]] == [
        "<!-- noisy-student: pipeline -->\ntwo\n",
        "<!-- noisy-student: promotion -->\nother\n",
    ]
    assert host.comments[0]["body"] == "hello 1"


def test_comment_on_branch_without_request_is_no_error(host, comment, capsys):
    assert comment("text", "--branch", "elsewhere") == 0
    assert "no open request of branch elsewhere" in capsys.readouterr().err
    assert len(host.comments) == 130


def test_comment_that_is_refused_is_one_line(host, comment, monkeypatch):
    for name in ("GITHUB_TOKEN", "GITLAB_TOKEN"):
        monkeypatch.setenv(name, "wrong")
    with pytest.raises(SystemExit, match=r"^error: GET .*: 401 .*Bad credentials.*; may this token comment\?$"):
        comment("text", "--number", "7")


def test_comment_outside_of_a_job_names_missing_variable(comment, monkeypatch):
    for name in ("CI_PROJECT_ID", "GITHUB_API_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit, match="error: GITHUB_API_URL: is not set"):
        comment("text", "--number", "7")


def test_shorten_text_ends_with_a_whole_line(comment):
    module = comment.module
    text = module.shorten_text("a line\n" * 20_000)
    assert len(text) < 65_536
    assert text.splitlines()[-3] == "a line"
    assert "see the log" in text
    assert module.shorten_text("short") == "short"
