"""A Kubernetes API server in memory, for TrainJobs and the pods of their nodes.

What is created is checked with the models that Kubeflow Trainer generates from its API (`kubeflow-trainer-api`, Apache-2.0): a field that
they do not know, or one of another type, is refused, as the CRD's schema would, and so are names that its rules do not allow.
"""

import json
import re
import threading
import time
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pydantic import ValidationError

JOBS = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/team/trainjobs"
PODS = "/api/v1/namespaces/team/pods"


class KubernetesApi:
    """`created` is called, in a thread, with the name of each job that is created: it plays the nodes."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.pods: dict[str, dict[str, Any]] = {}
        self.logs: dict[str, list[str]] = {}
        self.requests: list[str] = []
        self.created: Callable[[str], None] = lambda name: None
        self.failing = 0
        """Requests that get no proper answer yet."""
        self.refusing: tuple[int, str] | None = None
        """Status and message of every answer."""
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"api": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def pod(self, job: str, index: int, phase: str = "Running", code: int | None = None, reason: str = "Error") -> str:
        """Makes or changes the pod of a node."""
        name = f"{job}-node-0-{index}"
        ended = {"exitCode": code, "reason": reason, "finishedAt": f"2026-01-01T00:00:0{index}Z"}
        state = {"running": {}} if code is None else {"terminated": ended}
        labels = {
            "jobset.sigs.k8s.io/jobset-name": job,
            "jobset.sigs.k8s.io/replicatedjob-name": "node",
            "batch.kubernetes.io/job-completion-index": str(index),
        }
        status = {"name": "node", "image": "i", "imageID": "i", "ready": False, "restartCount": 0, "state": state}
        self.pods[name] = {
            "metadata": {"name": name, "labels": labels, "creationTimestamp": "2026-01-01T00:00:00Z"},
            "status": {"phase": phase, "containerStatuses": [status]},
        }
        self.logs.setdefault(name, [])
        return name

    def end(self, job: str, kind: str, message: str = "") -> None:
        condition = {"type": kind, "status": "True", "reason": kind, "message": message}
        self.jobs[job]["status"] = {"conditions": [condition]}

    def refuse(self, job: dict[str, Any]) -> str | None:
        """Why a TrainJob is not accepted."""
        # Takes half a second, which no other test should wait for.
        from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

        try:
            known = TrainerV1alpha1TrainJob.from_dict(job).to_dict()
        except (ValidationError, ValueError, TypeError) as error:
            return f"TrainJob is invalid: {error}"
        if known != job:
            return f"TrainJob is invalid: unknown field: {_lost(job, known)}"
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", job["metadata"]["name"]):
            return "metadata.name must match RFC 1035 DNS label format"
        return None


def _lost(given: Any, known: Any, place: str = "") -> str:
    """The first place where a document lost something."""
    if isinstance(given, dict) and isinstance(known, dict):
        for key, value in given.items():
            if key not in known:
                return f"{place}.{key}"
            if value != known[key]:
                return _lost(value, known[key], f"{place}.{key}")
    if isinstance(given, list) and isinstance(known, list):
        for number, (one, other) in enumerate(zip(given, known, strict=False)):
            if one != other:
                return _lost(one, other, f"{place}[{number}]")
    return place


class _Handler(BaseHTTPRequestHandler):
    api: KubernetesApi
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, document: Any) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _problem(self, status: int, message: str) -> None:
        self._answer(status, {"kind": "Status", "status": "Failure", "message": message, "code": status})

    def _body(self) -> Any:
        return json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"null")

    def _serve(self, work: Callable[[str, dict[str, str]], None]) -> None:
        parts = urlsplit(self.path)
        with self.api.lock:
            self.api.requests.append(f"{self.command} {parts.path}")
            refused, self.api.failing = self.api.failing > 0, max(0, self.api.failing - 1)
        if refused:
            self._body()
            self._problem(503, "the server is not there yet")
        elif self.api.refusing:
            self._body()
            self._problem(*self.api.refusing)
        else:
            work(parts.path, {key: values[0] for key, values in parse_qs(parts.query).items()})

    def do_GET(self) -> None:
        def work(path: str, query: dict[str, str]) -> None:
            if path.startswith(f"{JOBS}/"):
                with self.api.lock:
                    job = self.api.jobs.get(path.rpartition("/")[2])
                self._answer(200, job) if job else self._problem(404, "trainjob not found")
            elif path == PODS:
                wanted = dict(pair.split("=") for pair in query["labelSelector"].split(","))
                with self.api.lock:
                    found = [pod for pod in self.api.pods.values() if wanted.items() <= pod["metadata"]["labels"].items()]
                self._answer(200, {"apiVersion": "v1", "kind": "PodList", "items": found})
            elif match := re.fullmatch(f"{PODS}/([^/]+)/log", path):
                self._log(match[1], query)
            elif path == f"{PODS}/step":
                self._answer(200, {"metadata": {"name": "step", "labels": {"pipeline/runid": "id-1", "other": "x"}}})
            else:
                self._problem(404, f"no such path: {path}")

        self._serve(work)

    def _log(self, pod: str, query: dict[str, str]) -> None:
        """The lines so far, and then those that come, until the pod is no longer running."""
        assert query["container"] == "node"
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        sent = 0
        while True:
            with self.api.lock:
                running = pod in self.api.pods and self.api.pods[pod]["status"]["phase"] == "Running"
                lines = list(self.api.logs[pod])
            for number, line in enumerate(lines[sent:], sent):
                if line == "CUT":
                    # The connection breaks here, once.
                    with self.api.lock:
                        self.api.logs[pod][number] = "went on"
                    return
                stamp = f"2026-01-01T00:00:00.{number:09d}Z " if query.get("timestamps", "").lower() == "true" else ""
                self.wfile.write(f"{stamp}{line}\n".encode())
            sent = len(lines)
            if query.get("follow", "").lower() != "true" or not running:
                return
            self.wfile.flush()
            time.sleep(0.01)

    def do_POST(self) -> None:
        def work(path: str, _query: dict[str, str]) -> None:
            assert path == JOBS, path
            job = self._body()
            name = job["metadata"]["name"]
            with self.api.lock:
                if name in self.api.jobs:
                    self._problem(409, f"trainjobs {name} already exists")
                    return
                if why := self.api.refuse(job):
                    self._problem(422, why)
                    return
                job["metadata"]["uid"] = str(uuid.uuid4())
                self.api.jobs[name] = job
            self._answer(201, job)
            threading.Thread(target=self.api.created, args=(name,), daemon=True).start()

        self._serve(work)

    def do_PATCH(self) -> None:
        def work(path: str, _query: dict[str, str]) -> None:
            change = self._body()
            # Strategic merges are not for custom resources.
            if self.headers["Content-Type"] != "application/merge-patch+json":
                self._problem(415, "the body of the request was in an unknown format")
                return
            assert list(change) == ["metadata"]
            with self.api.lock:
                job = self.api.jobs[path.rpartition("/")[2]]
                job["metadata"].update(change["metadata"])
            self._answer(200, job)

        self._serve(work)

    def do_DELETE(self) -> None:
        def work(path: str, _query: dict[str, str]) -> None:
            options = self._body()
            assert options["propagationPolicy"] == "Foreground"
            name = path.rpartition("/")[2]
            with self.api.lock:
                job = self.api.jobs.get(name)
                if job is None:
                    self._problem(404, "trainjob not found")
                    return
                job["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"

            def gone() -> None:
                with self.api.lock:
                    self.api.jobs.pop(name, None)
                    for pod in [pod for pod in self.api.pods if pod.startswith(f"{name}-")]:
                        del self.api.pods[pod]

            # Its nodes take a moment to stop.
            threading.Timer(0.03, gone).start()
            self._answer(200, job)

        self._serve(work)
