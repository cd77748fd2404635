"""A real MLflow server, for tests of what it is told."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

PACKAGES = Path(__file__).parents[1] / ".venv-mlflow"
"""What the server has beside our own packages (`make test-integration` installs it)."""


@contextmanager
def run_mlflow_server(folder: Path) -> Iterator[str]:
    """Runs a server with its database and artifacts in a folder. Yields its URL. Skips the test if the server is not installed."""
    if not (PACKAGES / "mlflow" / "server").is_dir():
        pytest.skip("needs MLflow's server in .venv-mlflow: make test-integration installs it")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = os.environ | {
        "PYTHONPATH": str(PACKAGES),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    environment.pop("MLFLOW_TRACKING_URI", None)
    store = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts")]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", *store]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                if requests.get(f"{url}/health", timeout=5).ok:
                    break
            except requests.RequestException:
                pass
            assert server.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < deadline, (folder / "server.log").read_text()
            time.sleep(0.3)
        yield url
    finally:
        os.killpg(server.pid, 15)
        server.wait()
