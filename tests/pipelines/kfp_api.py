"""A stand-in for KFP's API server: REST v2beta1 as of 2.17, as much of it as this project's client uses.

Requests and answers are read into the models of kfp-server-api; unknown fields and wrong types are refused as the server refuses them,
lists have its filters, orders and page tokens, and runs are checked against the pipeline's inputs. The stages of a run are shown as the
server shows them: as the nodes of Argo's workflow, each task with its driver and its executor, without the reason of a failure.
Nothing is executed: tests play the runs (`play_task`, `end`).
"""

import base64
import contextlib
import json
import operator
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.parser import BytesParser
from functools import lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kfp_server_api as models
import yaml

ROOT = "/apis/v2beta1"
MAX_PARAMETER_BYTES = 10_000
DEFAULT_PAGE, MAX_PAGE = 20, 200
PIPELINE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,127}")

FIELDS = {
    "pipelines": {"pipeline_id": "pipeline_id", "id": "pipeline_id", "name": "name", "display_name": "display_name"},
    "pipeline_versions": {
        "pipeline_version_id": "pipeline_version_id",
        "id": "pipeline_version_id",
        "name": "name",
        "display_name": "display_name",
    },
    "experiments": {
        "experiment_id": "experiment_id",
        "id": "experiment_id",
        "name": "display_name",
        "display_name": "display_name",
    },
    "runs": {"run_id": "run_id", "id": "run_id", "name": "display_name", "display_name": "display_name", "state": "state"},
}
"""What can be filtered and sorted by → the field."""
for _fields in FIELDS.values():
    _fields |= {name: name for name in ("created_at", "description", "namespace", "storage_state")}

OPERATIONS: dict[str, Callable[[Any, Any], bool]] = {
    "EQUALS": operator.eq,
    "NOT_EQUALS": operator.ne,
    "GREATER_THAN": operator.gt,
    "GREATER_THAN_EQUALS": operator.ge,
    "LESS_THAN": operator.lt,
    "LESS_THAN_EQUALS": operator.le,
    "IN": lambda value, values: value in values,
    "IS_SUBSTRING": lambda value, part: part in value,
}
ALIVE = ("RUNTIME_STATE_UNSPECIFIED", "PENDING", "RUNNING", "PAUSED")
PARAMETER_TYPES: dict[str, tuple[type, ...]] = {
    "STRING": (str,),
    "NUMBER_INTEGER": (int, float),
    "NUMBER_DOUBLE": (int, float),
    "BOOLEAN": (bool,),
    "LIST": (list,),
    "STRUCT": (dict,),
}


class Refused(Exception):
    """An error as the server answers it: HTTP status, gRPC code, message."""

    def __init__(self, status: HTTPStatus, code: int, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def invalid(message: str) -> Refused:
    return Refused(HTTPStatus.BAD_REQUEST, 3, f"Invalid input error: {message}")


def missing(kind: str, name: str) -> Refused:
    return Refused(HTTPStatus.NOT_FOUND, 5, f"ResourceNotFoundError: {kind} {name} not found")


def exists(message: str) -> Refused:
    return Refused(HTTPStatus.CONFLICT, 6, f"Already exist error: {message}")


class KfpApi:
    """Serves on a port of its own until it is closed."""

    def __init__(self, *, token: str = "") -> None:
        self.token = token
        self.requests: list[str] = []
        """`POST /runs`, in the order in which they came."""
        self.before: Callable[[str], None] = lambda request: None
        """Called with each request before it is looked at; may wait, or raise Refused."""
        self.losing: set[str] = set()
        """Requests that are done, but whose answers are lost."""
        self.connections: list[socket.socket] = []
        self._client = models.ApiClient()
        self._lock = threading.RLock()
        self._things: dict[str, dict[str, Any]] = {kind: {} for kind in FIELDS}
        self._packages: dict[str, list[Any]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"api": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        """Is gone, as a server that was killed: open connections break too."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    # What tests look at and play.

    def all(self, kind: str) -> list[Any]:
        """Everything of a kind, the oldest first."""
        with self._lock:
            return list(self._things[kind].values())

    @property
    def alive(self) -> list[Any]:
        """Runs that are not ended or being ended."""
        return [run for run in self.all("runs") if run.state in (*ALIVE, "SUCCEEDED")]

    def play_task(self, run_id: str, name: str, state: str, *, retries: int = 0) -> None:
        """Puts a task into a state: driver, task and executor, which has a child for each try."""
        with self._lock:
            run = self._things["runs"][run_id]
            run.state = "RUNNING"
            if run.run_details is None:
                workflow = f"{run.display_name}-{run_id[:5]}"
                nodes = [(workflow, "RUNNING"), ("root-driver", "SUCCEEDED"), ("root", "RUNNING")]
                run.run_details = models.V2beta1RunDetails(task_details=[self._node(run, *node) for node in nodes])
            nodes = run.run_details.task_details
            node = next((node for node in nodes if node.display_name == name), None)
            if node is None:
                executor = self._node(run, "executor", state)
                node = self._node(run, name, state, [f"{run_id[:5]}-{executor.task_id[:8]}"])
                nodes += [self._node(run, f"{name}-driver", "SUCCEEDED"), node, executor]
            node.state = state
            nodes += [self._node(run, f"executor({number})", state) for number in range(retries)]

    def end(self, run_id: str, state: str) -> None:
        with self._lock:
            run = self._things["runs"][run_id]
            run.state, run.finished_at = state, _now()
            run.state_history = [*(run.state_history or ()), models.V2beta1RuntimeStatus(update_time=_now(), state=state)]

    def _node(self, run: Any, name: str, state: str, children: list[str] | None = None) -> Any:
        return models.V2beta1PipelineTaskDetail(
            run_id=run.run_id,
            task_id=str(uuid.uuid4()),
            display_name=name,
            create_time=run.created_at,
            start_time=_now(),
            state=state,
            child_tasks=[models.PipelineTaskDetailChildTask(pod_name=child) for child in children or []] or None,
        )

    # What clients ask.

    def answer(self, method: str, path: str, query: dict[str, str], headers: Any, body: bytes) -> Any:
        """The answer's JSON. Raises Refused."""
        if self.token and headers.get("authorization") != f"Bearer {self.token}":
            raise Refused(
                HTTPStatus.UNAUTHORIZED, 16, "Unauthenticated: request header error: there is no user identity header."
            )
        match method, path.removeprefix("/").split("/"):
            case "GET", ["healthz"]:
                return {"multi_user": False}
            case "GET", ["pipelines", "names", name]:
                return self._one("pipelines", "name", name)
            case "GET", ["pipelines" | "experiments" | "runs" as kind, name]:
                return self._get(kind, name)
            case "GET", ["pipelines", pipeline, "versions"]:
                self._get("pipelines", pipeline)
                return self._list("pipeline_versions", query, lambda one: one.pipeline_id == pipeline)
            case "GET", ["pipelines", _, "versions", name]:
                return self._get("pipeline_versions", name)
            case "GET", ["runs"]:
                experiment = query.get("experiment_id")
                if experiment:
                    self._get("experiments", experiment)
                return self._list("runs", query, lambda one: experiment in (None, one.experiment_id))
            case "GET", ["pipelines" | "experiments" as kind]:
                return self._list(kind, query, lambda one: query.get("namespace", "") == (one.namespace or ""))
            case "POST", ["pipelines"]:
                return self._create_pipeline(self._read(body, "V2beta1Pipeline"))
            case "POST", ["pipelines", "upload_version"]:
                return self._upload_version(query, headers, body)
            case "POST", ["experiments"]:
                return self._create_experiment(self._read(body, "V2beta1Experiment"))
            case "POST", ["runs", name] if name.endswith(":terminate"):
                return self._terminate(name.removesuffix(":terminate"))
            case "POST", ["runs"]:
                return self._create_run(self._read(body, "V2beta1Run"))
        raise Refused(HTTPStatus.NOT_FOUND, 5, "Not Found")

    def shown(self, thing: Any) -> Any:
        return self._client.sanitize_for_serialization(thing)

    def _get(self, kind: str, name: str) -> Any:
        if name not in self._things[kind]:
            raise missing(kind[:-1].title().replace("_v", "V"), name)
        return self._things[kind][name]

    def _one(self, kind: str, field: str, value: str) -> Any:
        for thing in self._things[kind].values():
            if getattr(thing, field) == value:
                return thing
        raise missing(kind[:-1].title(), value)

    def _create_pipeline(self, asked: Any) -> Any:
        if not asked.name and not asked.display_name:
            raise invalid("name is required")
        name = asked.name or asked.display_name
        if any((one.name, one.namespace or "") == (name, asked.namespace or "") for one in self._things["pipelines"].values()):
            raise exists(f"Failed to create a new pipeline. The name {name} already exists. Please specify a new name")
        made = models.V2beta1Pipeline(
            pipeline_id=str(uuid.uuid4()),
            name=name,
            display_name=asked.display_name or name,
            description=asked.description,
            namespace=asked.namespace,
            created_at=_now(),
        )
        self._things["pipelines"][made.pipeline_id] = made
        return made

    def _upload_version(self, query: dict[str, str], headers: Any, body: bytes) -> Any:
        name, file = _uploaded(headers, body)
        pipeline = query.get("pipelineid", "")
        if file is None or pipeline not in self._things["pipelines"]:
            raise _UploadRefused(HTTPStatus.BAD_REQUEST, "Failed to create a pipeline version")
        documents = _package(file)
        name = query.get("name") or name
        versions = self._things["pipeline_versions"]
        if any((one.pipeline_id, one.name) == (pipeline, name) for one in versions.values()):
            raise _UploadRefused(HTTPStatus.CONFLICT, "Failed to create a pipeline version")
        made = models.V2beta1PipelineVersion(
            pipeline_id=pipeline,
            pipeline_version_id=str(uuid.uuid4()),
            name=name,
            display_name=query.get("display_name") or name,
            description=query.get("description"),
            created_at=_now(),
            pipeline_spec=dict(zip(("pipeline_spec", "platform_spec"), documents, strict=False)),
        )
        versions[made.pipeline_version_id] = made
        self._packages[made.pipeline_version_id] = documents
        return made

    def _create_experiment(self, asked: Any) -> Any:
        if not asked.display_name:
            raise invalid("name is required")
        same = (asked.display_name, asked.namespace or "")
        if any((one.display_name, one.namespace or "") == same for one in self._things["experiments"].values()):
            raise exists(
                f"Failed to create a new experiment. The name {asked.display_name} already exists. Please specify a new name"
            )
        made = models.V2beta1Experiment(
            experiment_id=str(uuid.uuid4()),
            display_name=asked.display_name,
            description=asked.description,
            namespace=asked.namespace,
            created_at=_now(),
            storage_state="AVAILABLE",
        )
        self._things["experiments"][made.experiment_id] = made
        return made

    def _create_run(self, asked: Any) -> Any:
        if not asked.display_name:
            raise invalid("The run name is empty. Please specify a valid name")
        self._get("experiments", asked.experiment_id or "")
        reference = asked.pipeline_version_reference
        if reference is None:
            raise invalid("Failed to parse the pipeline source")
        self._get("pipeline_versions", reference.pipeline_version_id or "")
        self._check_inputs(reference.pipeline_version_id, (asked.runtime_config and asked.runtime_config.parameters) or {})
        made = models.V2beta1Run(
            run_id=str(uuid.uuid4()),
            experiment_id=asked.experiment_id,
            display_name=asked.display_name,
            description=asked.description,
            pipeline_version_reference=reference,
            runtime_config=asked.runtime_config,
            service_account=asked.service_account or "pipeline-runner",
            storage_state="AVAILABLE",
            state="PENDING",
            created_at=_now(),
        )
        self._things["runs"][made.run_id] = made
        return made

    def _terminate(self, name: str) -> Any:
        run = self._get("runs", name)
        if run.state not in (*ALIVE, "CANCELING"):
            raise invalid(f"Run {name} is not terminable")
        self.end(name, "CANCELING")
        return {}

    def _check_inputs(self, version: str, given: dict[str, Any]) -> None:
        if len(json.dumps(given)) > MAX_PARAMETER_BYTES:
            raise invalid(f"The input parameter length exceed maximum size of {MAX_PARAMETER_BYTES}")
        inputs = self._packages[version][0]["root"].get("inputDefinitions", {}).get("parameters", {})
        for name, about in inputs.items():
            if name not in given:
                if not about.get("isOptional") and "defaultValue" not in about:
                    raise invalid(f"parameter {name} is not optional, yet has neither default value nor user provided value")
                continue
            value, kinds = given[name], PARAMETER_TYPES[about["parameterType"]]
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                kind = about["parameterType"].lower()
                raise invalid(
                    f"input parameter {name} requires type {kind}, but the input parameter is not of {kind} value type"
                )
            if about.get("literals") and value not in about["literals"]:
                raise invalid(f"input parameter {name} value {value} is not one of the allowed literals {about['literals']}")
        if extra := sorted(set(given) - set(inputs)):
            raise invalid(f"parameter(s) provided are not required by pipeline: {', '.join(extra)}")

    def _list(self, kind: str, query: dict[str, str], belongs: Callable[[Any], bool]) -> Any:
        size = int(query.get("page_size", "0"))
        if size < 0:
            raise invalid(f"The page size should be greater than 0. Got {size}")
        size = min(size or DEFAULT_PAGE, MAX_PAGE)
        key, descending = self._order(kind, query.get("sort_by", ""))
        keep = self._filter(kind, query.get("filter", ""))
        found = [one for one in self._things[kind].values() if belongs(one) and keep(one)]
        found.sort(key=lambda one: (_comparable(getattr(one, key, None)), self._identity(kind, one)), reverse=descending)
        start = 0
        criteria = [query.get("sort_by", ""), query.get("filter", "")]
        if token := query.get("page_token"):
            start, *theirs = _token(token)
            if theirs != criteria:
                raise invalid("page token does not match the supplied sort by and/or filtering criteria.")
        page = {kind: found[start : start + size], "total_size": len(found)}
        if start + size < len(found):
            page["next_page_token"] = base64.b64encode(json.dumps([start + size, *criteria]).encode()).decode()
        return page

    def _identity(self, kind: str, thing: Any) -> str:
        return str(getattr(thing, FIELDS[kind]["id"]))

    def _order(self, kind: str, asked: str) -> tuple[str, bool]:
        words = asked.lower().split()
        if len(words) > 2 or (len(words) == 2 and words[1] not in ("asc", "desc")):
            raise invalid(f"Received invalid sort by format {json.dumps(asked)}.")
        if words and words[0] not in FIELDS[kind]:
            raise invalid(f"Invalid sorting field: {json.dumps(words[0])}")
        return FIELDS[kind][words[0]] if words else "created_at", words[1:] == ["desc"]

    def _filter(self, kind: str, asked: str) -> Callable[[Any], bool]:
        if not asked:
            return lambda one: True
        tests = []
        for predicate in self._read(asked.encode(), "V2beta1Filter").predicates or []:
            if predicate.key not in FIELDS[kind]:
                raise invalid(f"no support for filtering on unrecognized field {json.dumps(predicate.key)}")
            values = {name: value for name, value in predicate.to_dict().items() if "_value" in name and value is not None}
            if len(values) != 1 or predicate.operation not in OPERATIONS:
                raise invalid(f"invalid predicate operation: {predicate.operation}")
            (value,) = values.values()
            wanted = value["values"] if isinstance(value, dict) else value
            tests.append((FIELDS[kind][predicate.key], OPERATIONS[predicate.operation], wanted))
        return lambda one: all(holds(_comparable(getattr(one, field, None)), wanted) for field, holds, wanted in tests)

    def _read(self, body: bytes, model: str) -> Any:
        """A body as its model. Raises Refused for what protobuf would not take."""
        try:
            value = json.loads(body)
        except ValueError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, 3, f"syntax error: {error}") from error
        _check(value, model, model)
        return self._client.deserialize(SimpleNamespace(data=json.dumps(value)), model)


class _UploadRefused(Exception):
    """Uploads have errors of their own form."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    api: KfpApi
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.api.connections.append(self.connection)

    def do_GET(self) -> None:
        self._respond("GET")

    def do_POST(self) -> None:
        self._respond("POST")

    def log_message(self, *_: Any) -> None:
        pass

    def _respond(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        parts = urlsplit(self.path)
        request = f"{method} {parts.path.removeprefix(ROOT)}"
        status: HTTPStatus = HTTPStatus.OK
        try:
            self.api.requests.append(request)
            self.api.before(request)
            if not parts.path.startswith(ROOT):
                raise Refused(HTTPStatus.NOT_FOUND, 5, "Not Found")
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            with self.api._lock:
                answer = self.api.shown(self.api.answer(method, parts.path.removeprefix(ROOT), query, self.headers, body))
        except Refused as error:
            status, answer = error.status, {"code": error.code, "message": str(error), "details": []}
        except _UploadRefused as error:
            status, answer = error.status, {"error_message": str(error), "error_details": str(error)}
        if request in self.api.losing:
            self.close_connection = True
            return
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _check(value: Any, kind: str, place: str) -> None:
    """Whether JSON has the form of a model, as protobuf sees it: no unknown field, no value of another type."""
    if value is None:
        return
    if part := re.fullmatch(r"list\[(.*)\]", kind):
        _demand(isinstance(value, list), value, place)
        for number, item in enumerate(value):
            _check(item, part[1], f"{place}[{number}]")
    elif part := re.fullmatch(r"dict\((\w+), (.*)\)", kind):
        _demand(isinstance(value, dict), value, place)
        for name, item in value.items():
            _check(item, part[2], f"{place}.{name}")
    elif kind in ("str", "datetime"):
        _demand(isinstance(value, str), value, place)
    elif kind in ("int", "bool", "float"):
        _demand(isinstance(value, (int, float)) and isinstance(value, bool) == (kind == "bool"), value, place)
    elif kind != "object":
        model = getattr(models, kind)
        if not model.openapi_types:
            _demand(value in model.allowable_values, value, place)
            return
        _demand(isinstance(value, dict), value, place)
        names = {json_name: field for field, json_name in model.attribute_map.items()}
        for name, item in value.items():
            if name not in names:
                raise Refused(HTTPStatus.BAD_REQUEST, 3, f"proto: (line 1:2): unknown field {json.dumps(name)}")
            _check(item, model.openapi_types[names[name]], f"{place}.{name}")


def _demand(holds: bool, value: Any, place: str) -> None:
    if not holds:
        raise Refused(HTTPStatus.BAD_REQUEST, 3, f"proto: invalid value for {place}: {json.dumps(value)[:80]}")


def _uploaded(headers: Any, body: bytes) -> tuple[str, bytes | None]:
    """File name and bytes of the form's `uploadfile`."""
    message = BytesParser().parsebytes(b"content-type: " + headers.get("content-type", "").encode() + b"\r\n\r\n" + body)
    for part in message.walk():
        if part.get_param("name", header="content-disposition") == "uploadfile":
            return part.get_filename() or "", part.get_payload(decode=True)
    return "", None


@lru_cache(maxsize=8)
def _package(file: bytes) -> list[Any]:
    """The documents of a compiled pipeline. Raises _UploadRefused if there is none."""
    try:
        documents = list(yaml.load_all(file, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
        name = documents[0]["pipelineInfo"]["name"]
        whole = {"schemaVersion", "root", "components", "deploymentSpec"} <= set(documents[0])
    except (yaml.YAMLError, IndexError, KeyError, TypeError) as error:
        raise _UploadRefused(HTTPStatus.BAD_REQUEST, "Failed to create a pipeline version: invalid v2 pipeline spec") from error
    if not whole or not PIPELINE_NAME.fullmatch(name):
        raise _UploadRefused(HTTPStatus.BAD_REQUEST, "Failed to create a pipeline version: invalid v2 pipeline spec")
    return documents


def _token(token: str) -> Iterator[Any]:
    try:
        return iter(json.loads(base64.b64decode(token)))
    except ValueError as error:
        raise invalid("Invalid package token.") from error


def _comparable(value: Any) -> Any:
    return value.timestamp() if isinstance(value, datetime) else value or ""


def _now() -> datetime:
    """The server's clock shows whole seconds."""
    return datetime.fromtimestamp(int(time.time()), UTC)
