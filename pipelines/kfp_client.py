"""Client of the KFP API: uploads the compiled pipeline as a version named by its digest, creates runs of it and follows them.

Every call can be repeated: an existing version is used, and an existing run of the same name is returned instead of started twice.
KFP's API has no idempotency key, so two clients that create a run of one name at the same instant must be kept apart by the caller
(`pipelines.trigger`).

KFP 2.17 reports a run's stages as the nodes of Argo's workflow: without the generation, without the reason of a failure, and not at all
once the workflow's status is larger than 1 MiB. What is told of stages therefore comes from the records that they leave in the store
(`pipelines.remote_run`), and only the state of the whole run from KFP.
"""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import kfp_server_api as api
import urllib3
import yaml
from kfp_server_api.exceptions import ApiException
from pydantic import BaseModel, Field, ValidationError

from ns.core.digest import sha256_bytes
from ns.core.errors import ConfigError, DataError, Interrupted, NsError, RunError, StoreError
from ns.core.printable import redact_credentials
from ns.storage import read_uri
from ns.storage.documents import parse_json_object
from pipelines import load_yaml_documents

URL_VARIABLE = "NS_KFP_URL"
TOKEN_VARIABLE = "NS_KFP_TOKEN"
NAMESPACE_VARIABLE = "NS_KFP_NAMESPACE"
UI_VARIABLE = "NS_KFP_UI"
POD_TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")
"""Where Kubeflow mounts a token for its own API into pods that request one."""

REQUEST_SECONDS = 30.0
POLL_SECONDS = 5.0
RETRY_SECONDS = 2.0
PATIENCE_SECONDS = 300.0
"""An API server that restarts, or a port-forward that breaks, must not end the following of a run."""
PAGE_SIZE = 100
VERSIONS_PAGE_SIZE = 5

FINAL_STATES = frozenset({"SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"})
FAILED_STATES = frozenset({"FAILED", "CANCELED", "CANCELING"})
ENDED_STATES = FINAL_STATES | FAILED_STATES
NOT_KFP = "is it the URL of KFP 2.17 or newer?"
MAX_PARAMETER_BYTES = 10_000
"""KFP refuses runs whose parameters are longer than this as JSON."""


class UploadedPipeline(NamedTuple):
    """A version of a pipeline on the server."""

    pipeline_id: str
    version_id: str
    name: str
    version: str
    description: str = ""


class SubmittedRun(NamedTuple):
    """A run on the server."""

    run_id: str
    name: str
    state: str
    """RUNNING, SUCCEEDED, FAILED, …; PENDING if it was just submitted."""
    url: str
    """URL of its page in KFP's UI."""
    new: bool
    """Whether this call submitted the run; if not, it existed."""


# KFP's own client takes any JSON as an answer. What of it is read here is checked.

Identity = Annotated[str, Field(min_length=1)]


class _Answer(BaseModel, from_attributes=True):
    pass


class _Pipeline(_Answer):
    pipeline_id: Identity


class _Version(_Answer):
    pipeline_version_id: Identity
    display_name: str | None
    description: str | None


class _Experiment(_Answer):
    experiment_id: Identity


class _Task(_Answer):
    display_name: str | None
    state: str | None


class _RunDetails(_Answer):
    task_details: list[_Task] | None


class _RunStatus(_Answer):
    state: str | None


class _Run(_Answer):
    run_id: Identity
    display_name: str | None
    state: str | None
    state_history: list[_RunStatus] | None
    run_details: _RunDetails | None


AnswerType = TypeVar("AnswerType", bound=_Answer)


class KfpUnreachableError(RunError):
    """KFP did not answer, or failed itself; a later attempt may succeed."""


class KfpClient:
    """KFP's API. Every call raises RunError, one line with its cure, if KFP answers with an error."""

    def __init__(self, url: str = "", *, patience_seconds: float = 0) -> None:
        """`patience_seconds`: for a server that does not answer, as one behind a port-forward that is made again.

        `url`: of the UI, or of the service `ml-pipeline` (NS_KFP_UI then is the base of links); NS_KFP_URL if not given.

        The token is in NS_KFP_TOKEN, or in the file that Kubeflow mounts; the namespace, which a multi-user Kubeflow needs, in
        NS_KFP_NAMESPACE. Sends no request yet. Raises ConfigError if there is no URL.
        """
        host = (url or os.environ.get(URL_VARIABLE, "")).rstrip("/")
        # For messages and links, which are printed and kept in records.
        self.url = redact_credentials(host)
        if not host:
            raise ConfigError(
                f"--kfp: no server is named; give its URL, or set {URL_VARIABLE}, e.g. to http://localhost:8080 after "
                "kubectl -n kubeflow port-forward svc/ml-pipeline-ui 8080:80"
            )
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"--kfp: invalid value {self.url!r}: must be a URL, http://… or https://…")
        self.ui = redact_credentials(os.environ.get(UI_VARIABLE, "").rstrip("/")) or self.url
        self.namespace = os.environ.get(NAMESPACE_VARIABLE, "")
        self._patience_seconds = patience_seconds
        settings = api.Configuration(host=host)
        # Retries are ours: KFP's client would also repeat requests that were answered with an error.
        settings.retries = urllib3.Retry(0)
        # The variable by which curl and Python find a company's own certificate authority.
        settings.ssl_ca_cert = os.environ.get("SSL_CERT_FILE")
        token = os.environ.get(TOKEN_VARIABLE, "")
        if token or POD_TOKEN.exists():
            settings.api_key = {"authorization": token}
            settings.api_key_prefix = {"authorization": "Bearer"}
        if not token:
            # Kubernetes renews the token every hour, and a run may be followed for days.
            settings.refresh_api_key_hook = _renew_token
        client = api.ApiClient(settings)
        self._pipelines = api.PipelineServiceApi(client)
        self._uploads = api.PipelineUploadServiceApi(client)
        self._experiments = api.ExperimentServiceApi(client)
        self._runs = api.RunServiceApi(client)

    def upload_pipeline(self, package: str, description: str = "") -> UploadedPipeline:
        """Uploads a compiled pipeline (YAML) as a version named by its digest, unless that version exists."""
        name = pipeline_name(package)
        # Where KFP keeps pipelines in Kubernetes, the versions of all pipelines share one namespace.
        version = f"{name}-{sha256_bytes(package.encode())[:12]}"
        pipeline_id = self._ensure_pipeline(name)
        version_id = self._find_version(pipeline_id, version)
        if version_id is None:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / f"{name}.yaml"
                file.write_text(package, encoding="utf-8")
                # Another client may upload it at the same moment; then the version exists.
                with contextlib.suppress(_ConflictError):
                    self._call_api(
                        self._uploads.upload_pipeline_version,
                        str(file),
                        name=version,
                        pipelineid=pipeline_id,
                        description=description,
                    )
            version_id = self._find_version(pipeline_id, version)
        if version_id is None:
            raise RunError(f"{self.url}: accepted version {version} of pipeline {name} but does not list it; try again")
        return UploadedPipeline(pipeline_id, version_id, name, version, description)

    def list_versions(self, name: str) -> Iterator[UploadedPipeline]:
        """Yields the versions of a pipeline, the newest first; none if there is no such pipeline."""
        options: dict[str, Any] = {"namespace": self.namespace} if self.namespace else {}
        listing = self._pipelines.pipeline_service_list_pipelines
        for pipeline in self._iterate_pages(_Pipeline, "pipelines", listing, filter=_equals_filter("name", name), **options):
            listing = self._pipelines.pipeline_service_list_pipeline_versions
            pipeline_id = pipeline.pipeline_id
            # Each comes with its specification, 100 kB, and the newest ones are most asked for.
            for entry in self._iterate_pages(
                _Version, "pipeline_versions", listing, pipeline_id, page_size=VERSIONS_PAGE_SIZE, sort_by="created_at desc"
            ):
                yield UploadedPipeline(
                    pipeline_id, entry.pipeline_version_id, name, entry.display_name or "", entry.description or ""
                )

    def find_run(self, name: str, experiment: str, *, excluded_states: Collection[str] = FAILED_STATES) -> SubmittedRun | None:
        """Finds the latest run of that name that is not in one of `excluded_states`."""
        experiment_id = self._ensure_experiment(experiment)
        filters = _equals_filter("display_name", name)
        for run in self._iterate_pages(
            _Run,
            "runs",
            self._runs.run_service_list_runs,
            experiment_id=experiment_id,
            filter=filters,
            sort_by="created_at desc",
        ):
            if run.state not in excluded_states:
                return self._to_submitted_run(run, new=False)
        return None

    def create_run(
        self,
        pipeline: UploadedPipeline,
        arguments: Mapping[str, Any],
        *,
        name: str,
        experiment: str,
        excluded_states: Collection[str] = FAILED_STATES,
    ) -> SubmittedRun:
        """Starts a run, or returns the run that `find_run` finds."""
        if (existing := self.find_run(name, experiment, excluded_states=excluded_states)) is not None:
            return existing
        run = api.V2beta1Run(
            display_name=name,
            experiment_id=self._ensure_experiment(experiment),
            pipeline_version_reference=api.V2beta1PipelineVersionReference(pipeline.pipeline_id, pipeline.version_id),
            runtime_config=api.V2beta1RuntimeConfig(parameters=dict(arguments)),
        )
        started = time.monotonic()
        while True:
            try:
                answer = self._call_once(self._runs.run_service_create_run, run)
                return self._to_submitted_run(self._parse_answer(_Run, answer), new=True)
            except KfpUnreachableError:
                # Perhaps only the answer was lost.
                with contextlib.suppress(KfpUnreachableError):
                    if (existing := self.find_run(name, experiment, excluded_states=excluded_states)) is not None:
                        return existing._replace(new=True)
                if time.monotonic() - started >= self._patience_seconds:
                    raise
                time.sleep(RETRY_SECONDS)

    def terminate_run(self, run_id: str) -> None:
        """Ends a run, whose stages are told to stop. Raises RunError for a run that has ended."""
        self._call_api(self._runs.run_service_terminate_run, run_id)

    def wait_for_run(self, run_id: str, after_poll: Callable[[], None] = lambda: None) -> SubmittedRun:
        """Waits for the end of a run, in whatever state, and returns the run.

        Raises Interrupted on Ctrl-C, and KfpUnreachableError if the server has not answered for five minutes; the run continues in
        both cases.
        """
        answered = time.monotonic()
        try:
            while True:
                run = None
                try:
                    run = self._parse_answer(_Run, self._call_once(self._runs.run_service_get_run, run_id))
                    answered = time.monotonic()
                except KfpUnreachableError as error:
                    if time.monotonic() - answered > PATIENCE_SECONDS:
                        raise KfpUnreachableError(f"{error}; the run continues: {self.run_url(run_id)}") from error
                # What stages leave in the store can be read without KFP.
                after_poll()
                if run is not None and run.state in FINAL_STATES:
                    return self._to_submitted_run(run, new=False)
                time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            raise Interrupted(f"no longer followed; the run continues: {self.run_url(run_id)}") from None

    def list_failed_tasks(self, run_id: str, stages: Collection[str]) -> list[str]:
        """Names of those `stages` that KFP shows as failed; none if the run's status is too large for KFP."""
        run = self._parse_answer(_Run, self._call_api(self._runs.run_service_get_run, run_id))
        nodes = (run.run_details.task_details if run.run_details else None) or ()
        failed = [str(node.display_name) for node in nodes if node.state == "FAILED" and node.display_name in stages]
        return list(dict.fromkeys(failed))

    def run_url(self, run_id: str) -> str:
        """URL of the run's page in KFP's UI."""
        return f"{self.ui}/#/runs/details/{run_id}"

    def _ensure_pipeline(self, name: str) -> str:
        service, body = self._pipelines, api.V2beta1Pipeline(name=name, display_name=name, namespace=self.namespace or None)
        listing, create = service.pipeline_service_list_pipelines, service.pipeline_service_create_pipeline
        return self._find_or_create(_Pipeline, "pipelines", listing, _equals_filter("name", name), create, body).pipeline_id

    def _find_version(self, pipeline: str, version: str) -> str | None:
        entries = self._iterate_pages(
            _Version,
            "pipeline_versions",
            self._pipelines.pipeline_service_list_pipeline_versions,
            pipeline,
            filter=_equals_filter("name", version),
        )
        return next((entry.pipeline_version_id for entry in entries), None)

    def _ensure_experiment(self, name: str) -> str:
        service, body = self._experiments, api.V2beta1Experiment(display_name=name, namespace=self.namespace or None)
        listing, create = service.experiment_service_list_experiments, service.experiment_service_create_experiment
        filters = _equals_filter("display_name", name)
        return self._find_or_create(_Experiment, "experiments", listing, filters, create, body).experiment_id

    def _find_or_create(
        self,
        kind: type[AnswerType],
        field: str,
        listing: Callable[..., Any],
        filters: str,
        create: Callable[..., Any],
        body: Any,
    ) -> AnswerType:
        """Returns the object that the filters find, or creates it; another client may create it in between."""
        options: dict[str, Any] = {"namespace": self.namespace} if self.namespace else {}
        for _ in range(2):
            for existing in self._iterate_pages(kind, field, listing, filter=filters, **options):
                return existing
            with contextlib.suppress(_ConflictError):
                return self._parse_answer(kind, self._call_api(create, body))
        raise RunError(
            f"{self.url}: says that {body.display_name} exists but does not list it among the {field}; check NS_KFP_NAMESPACE"
        )

    def _to_submitted_run(self, run: _Run, *, new: bool) -> SubmittedRun:
        state = run.state or "PENDING"
        # KFP 2.17 ends a terminated run as FAILED; that it was terminated is in its history only.
        earlier = [status.state for status in run.state_history or () if status.state != "FAILED"]
        if state == "FAILED" and earlier[-1:] == ["CANCELING"]:
            state = "CANCELED"
        return SubmittedRun(run.run_id, run.display_name or "", state, self.run_url(run.run_id), new)

    def _iterate_pages(
        self,
        kind: type[AnswerType],
        field: str,
        call: Callable[..., Any],
        *args: Any,
        page_size: int | None = None,
        **options: Any,
    ) -> Iterator[AnswerType]:
        token, tokens = "", set[str]()
        while token not in tokens:
            tokens.add(token)
            page = self._call_api(call, *args, page_size=page_size or PAGE_SIZE, page_token=token, **options)
            for entry in getattr(page, field, None) or ():
                yield self._parse_answer(kind, entry)
            token = getattr(page, "next_page_token", None) or ""
            if not token:
                return
        raise RunError(f"{self.url}: its pages of {field} never end; {NOT_KFP}")

    def _parse_answer(self, kind: type[AnswerType], answer: Any) -> AnswerType:
        try:
            return kind.model_validate(answer)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "it"
            raise RunError(f"{self.url}: gave an answer that cannot be read: {field}: {first['msg']}; {NOT_KFP}") from error

    def _call_api(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Calls until there is an answer, or the patience is over: for calls that may be repeated."""
        started = time.monotonic()
        while True:
            try:
                return self._call_once(call, *args, **options)
            except KfpUnreachableError:
                if time.monotonic() - started >= self._patience_seconds:
                    raise
                time.sleep(RETRY_SECONDS)

    def _call_once(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        try:
            return call(*args, _request_timeout=REQUEST_SECONDS, **options)
        except ApiException as error:
            raise self._explain_error(error) from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            reason = getattr(error, "reason", None) or error
            raise KfpUnreachableError(
                f"{self.url}: cannot be reached: {reason}; is it KFP's URL, and does the port-forward still run?"
            ) from error
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            # KFP's client takes the answer apart without a look at it.
            raise RunError(f"{self.url}: gave an answer that cannot be read: {type(error).__name__}; {NOT_KFP}") from error

    def _explain_error(self, error: ApiException) -> NsError:
        message = _extract_message(error)
        match error.status:
            case 401 | 403:
                return RunError(
                    f"{self.url}: not allowed: {message}; set {TOKEN_VARIABLE}, and on a multi-user Kubeflow {NAMESPACE_VARIABLE}"
                )
            case 409:
                return _ConflictError(f"{self.url}: {message}")
            case 404:
                return RunError(f"{self.url}: not found: {message}; {NOT_KFP}")
            case 400 | 422:
                return RunError(f"{self.url}: refused: {message}")
            case status if status is not None and status >= 500:
                return KfpUnreachableError(f"{self.url}: failed with {status}: {message}; try again")
        return RunError(f"{self.url}: answered {error.status}: {message}")


class _ConflictError(RunError):
    """What is to be created exists already."""


def pipeline_name(package: str) -> str:
    """Name of a compiled pipeline (YAML). Raises ConfigError if the text is not one."""
    return str(_load_spec(package)["pipelineInfo"]["name"])


@lru_cache(maxsize=4)
def _load_spec(package: str) -> Any:
    """Reads the pipeline's part of the YAML; the other part is for Kubernetes."""
    try:
        spec = next(load_yaml_documents(package))
        if {"pipelineInfo", "root", "components"} <= set(spec):
            return spec
    except (StopIteration, TypeError, yaml.YAMLError):
        pass
    raise ConfigError("this is not a compiled pipeline: pipelineInfo, root or components is missing; run `make compile`")


def _input_definitions(package: str) -> Any:
    """Inputs of a compiled pipeline: name → parameterType, defaultValue, literals, description, isOptional."""
    return _load_spec(package)["root"].get("inputDefinitions", {}).get("parameters", {})


def parse_inputs(package: str, inputs: Sequence[str], texts: Collection[str] = ()) -> dict[str, Any]:
    """Parses NAME=VALUE by the input's type: text stays as it is, other types are YAML. `@FILE` is a JSON object of several inputs.

    `texts`: further names whose values are text. Of two values of one input the later one holds. Raises ConfigError naming the argument
    that cannot be read.
    """
    definitions = _input_definitions(package)
    values: dict[str, Any] = {}
    for argument in inputs:
        if argument.startswith("@"):
            try:
                values |= parse_json_object(read_uri(argument[1:]), argument[1:])
            except (DataError, StoreError) as error:
                raise ConfigError(f"--input {argument}: {error}") from error
            continue
        name, equals, text = argument.partition("=")
        if not equals:
            raise ConfigError(f"--input: invalid value {argument!r}: must be NAME=VALUE, e.g. gpus_train=1, or @FILE")
        try:
            is_text = name in texts or definitions.get(name, {}).get("parameterType") == "STRING"
            values[name] = text if is_text else yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
            # What looks like a date and is none (2026-99-01), keys that cannot be hashed, too many brackets.
            raise ConfigError(f"--input {name}: invalid value {text!r:.80}: must be JSON or YAML") from error
    return values


def check_inputs(package: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments if the pipeline accepts them: known, of the right type, among the listed values, none missing.

    Raises ConfigError naming the input.
    """
    inputs = _input_definitions(package)
    for name, value in arguments.items():
        if name not in inputs:
            raise ConfigError(
                f"{name}: is not an input of pipeline {pipeline_name(package)}; its inputs are {', '.join(sorted(inputs))}"
            )
        definition = inputs[name]
        types = _PARAMETER_TYPES[definition["parameterType"]]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise ConfigError(
                f"{name}: invalid value {value!r}: must be {definition['parameterType'].lower().replace('_', ' ')}"
            )
        if definition.get("literals") and value not in definition["literals"]:
            raise ConfigError(f"{name}: invalid value {value!r}: must be one of {', '.join(map(str, definition['literals']))}")
    for name, definition in inputs.items():
        if name not in arguments and "defaultValue" not in definition and not definition.get("isOptional"):
            raise ConfigError(f"{name}: is missing: {definition.get('description', 'an input of the pipeline')}")
    size = len(json.dumps(dict(arguments)).encode())
    if size > MAX_PARAMETER_BYTES:
        raise ConfigError(
            f"the inputs are {size:,} bytes as JSON, and KFP accepts {MAX_PARAMETER_BYTES:,}; give URIs of files in place of long values"
        )
    return dict(arguments)


_PARAMETER_TYPES: dict[str, tuple[type, ...]] = {
    "STRING": (str,),
    "NUMBER_INTEGER": (int,),
    "NUMBER_DOUBLE": (int, float),
    "BOOLEAN": (bool,),
    "LIST": (list,),
    "STRUCT": (dict,),
}


def _equals_filter(key: str, value: str) -> str:
    return json.dumps({"predicates": [{"key": key, "operation": "EQUALS", "string_value": value}]})


def stage_names(package: str) -> frozenset[str]:
    """Names of a compiled pipeline's tasks that run a container, also in its inner pipelines."""
    spec = _load_spec(package)
    components = spec["components"]
    return frozenset(
        name
        for component in [spec["root"], *components.values()]
        for name, task in component.get("dag", {}).get("tasks", {}).items()
        if "executorLabel" in components[task["componentRef"]["name"]]
    )


def _extract_message(error: ApiException) -> str:
    """The server's message in one line."""
    text = error.body or error.reason or ""
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        body = json.loads(text)
        text = body.get("message") or body.get("error_message") or body.get("error") or text
    return " ".join(str(text).split())[:300] or "no reason given"


def _renew_token(settings: Any) -> None:
    with contextlib.suppress(OSError):
        settings.api_key["authorization"] = POD_TOKEN.read_text().strip()
