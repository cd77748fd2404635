"""A job's identity becomes keys, at a stand-in of Amazon's service."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROLE = Path(__file__).parents[2] / ".ci" / "role.py"
ARN = "arn:aws:iam::123456789012:role/noisy-student"


@pytest.fixture(scope="module")
def service():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}/"
    server.stop()


def take(**settings):
    environment = {"PATH": os.environ["PATH"], **settings}
    return subprocess.run([sys.executable, str(ROLE)], env=environment, capture_output=True, text=True, timeout=60)


def test_role_prints_keys_as_shell(service):
    done = take(NS_AWS_ROLE=ARN, NS_ID_TOKEN="a.b.c", NS_STS_URL=service)
    assert done.returncode == 0, done.stderr
    script = done.stdout + 'printf "%s\\n" "$AWS_ACCESS_KEY_ID" "$AWS_SECRET_ACCESS_KEY" "$AWS_SESSION_TOKEN"'
    shown = subprocess.run(["sh", "-c", script], env={}, capture_output=True, text=True).stdout.splitlines()
    assert [bool(key) for key in shown] == [True, True, True]
    assert shown[0].startswith("ASIA")


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"NS_AWS_ROLE": ARN}, "error: NS_ID_TOKEN: is not set"),
        (
            {"NS_AWS_ROLE": ARN, "NS_ID_TOKEN": "a", "NS_STS_URL": "http://127.0.0.1:9/"},
            "Connection refused; NS_STS_URL is the URL",
        ),
    ],
)
def test_role_errors_are_one_line_without_keys(settings, what):
    done = take(**settings)
    assert done.returncode == 1
    assert what in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
