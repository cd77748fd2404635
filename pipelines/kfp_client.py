"""Runs on a cluster: the compiled pipeline is uploaded as a version named by its digest, and runs of it are submitted and followed.

Everything can be said again: a version that is there is used, a run of that name that is under way or done is found, not started twice.
KFP's API has no key that makes a request happen once: two clients that submit one name at the same instant are kept apart by whoever
calls this (`pipelines.trigger`), not here.

What KFP 2.17 says of a run's steps are the nodes of Argo's workflow: beside each task its driver and an `executor`, none with a
generation, none with the reason why it failed. So states come from here, and all else from what the steps leave in the store.
"""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import kfp_server_api as api
import urllib3
import yaml
from kfp_server_api.exceptions import ApiException

from ns.core.digest import sha256_bytes
from ns.core.errors import ConfigError, DataError, Interrupted, NsError, RunError, StoreError
from ns.storage import read_uri
from ns.storage.documents import parse_object
from pipelines import documents

URL_VARIABLE = "NS_KFP_URL"
TOKEN_VARIABLE = "NS_KFP_TOKEN"
NAMESPACE_VARIABLE = "NS_KFP_NAMESPACE"
UI_VARIABLE = "NS_KFP_UI"
POD_TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")
"""Where Kubeflow mounts a token for its own API into pods that ask for one."""

REQUEST_SECONDS = 30.0
POLL_SECONDS = 5.0
PATIENCE_SECONDS = 300.0
"""An API server that is being restarted, or a port-forward that broke, ends nobody's run."""
VERSION_LETTERS = 12
PAGE = 100

DONE = frozenset({"SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"})
CAME_TO_NOTHING = frozenset({"FAILED", "CANCELED", "CANCELING"})
ENDED = DONE | CAME_TO_NOTHING
MAX_PARAMETER_BYTES = 10_000
"""KFP refuses runs whose parameters are longer as JSON."""


class Pipeline(NamedTuple):
    """A compiled pipeline as the server knows it."""

    pipeline_id: str
    version_id: str
    name: str
    version: str


class Submitted(NamedTuple):
    """A run on the server."""

    run_id: str
    name: str
    state: str
    """RUNNING, SUCCEEDED, FAILED, …; PENDING for one that is just submitted."""
    url: str
    """Its page in KFP's UI."""
    new: bool
    """Whether this call submitted it; else it was there."""


class Task(NamedTuple):
    """A step of a run."""

    key: str
    name: str
    state: str
    error: str


class Unreachable(RunError):
    """KFP did not answer, or failed itself: later it may be well again."""


class Server:
    """KFP's API. Raises RunError, in one line with its mend, for whatever it answers that is no success."""

    def __init__(self, url: str = "", *, token: str = "", namespace: str = "") -> None:
        """`url`: of the UI, or of the service `ml-pipeline` (then NS_KFP_UI may say where links lead); from NS_KFP_URL if empty, as
        the token from NS_KFP_TOKEN, or from the file that Kubeflow mounts, and the namespace, of several users', from NS_KFP_NAMESPACE.

        Asks nothing yet. Raises ConfigError if no server is named.
        """
        self.url = (url or os.environ.get(URL_VARIABLE, "")).rstrip("/")
        if not self.url:
            raise ConfigError(
                f"--kfp: no server is named; give its URL, or set {URL_VARIABLE}, e.g. to http://localhost:8080 after "
                "kubectl -n kubeflow port-forward svc/ml-pipeline-ui 8080:80"
            )
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"--kfp: invalid value {self.url!r}: must be a URL, http://… or https://…")
        self.ui = os.environ.get(UI_VARIABLE, "").rstrip("/") or self.url
        self.namespace = namespace or os.environ.get(NAMESPACE_VARIABLE, "")
        settings = api.Configuration(host=self.url)
        # Ours is the patience: theirs repeats what was answered with a failure.
        settings.retries = urllib3.Retry(0)
        # As curl and Python have it: where a company's own authority is known.
        settings.ssl_ca_cert = os.environ.get("SSL_CERT_FILE")
        token = token or os.environ.get(TOKEN_VARIABLE, "")
        if token or POD_TOKEN.exists():
            settings.api_key = {"authorization": token}
            settings.api_key_prefix = {"authorization": "Bearer"}
        if not token:
            # Kubernetes renews it every hour, and a run may be followed for days.
            settings.refresh_api_key_hook = _renew
        client = api.ApiClient(settings)
        self._pipelines = api.PipelineServiceApi(client)
        self._uploads = api.PipelineUploadServiceApi(client)
        self._experiments = api.ExperimentServiceApi(client)
        self._runs = api.RunServiceApi(client)

    def upload(self, package: str) -> Pipeline:
        """Makes sure that a compiled pipeline (YAML) is there, as a version named by its digest. The same bytes are uploaded once."""
        name = pipeline_name(package)
        # Where pipelines are kept in Kubernetes, versions of all of them share one namespace.
        version = f"{name}-{sha256_bytes(package.encode())[:VERSION_LETTERS]}"
        pipeline = self._pipeline(name)
        found = self._version(pipeline, version)
        if found is None:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / f"{name}.yaml"
                file.write_text(package, encoding="utf-8")
                # Somebody else may upload it at this moment: then it is there.
                with _conflicts_allowed():
                    self._ask(self._uploads.upload_pipeline_version, str(file), name=version, pipelineid=pipeline)
            found = self._version(pipeline, version)
        if found is None:
            raise RunError(f"{self.url}: took version {version} of pipeline {name}, and does not list it; try again")
        return Pipeline(pipeline, found, name, version)

    def find(self, name: str, experiment: str, *, besides: Collection[str] = CAME_TO_NOTHING) -> Submitted | None:
        """The latest run of that name in any state but these."""
        place = self._experiment(experiment)
        filters = _equal("display_name", name)
        for run in self._pages(
            "runs", self._runs.run_service_list_runs, experiment_id=place, filter=filters, sort_by="created_at desc"
        ):
            if run.state not in besides:
                return self._submitted(run, new=False)
        return None

    def submit(
        self,
        pipeline: Pipeline,
        arguments: Mapping[str, Any],
        *,
        name: str,
        experiment: str,
        service_account: str = "",
        besides: Collection[str] = CAME_TO_NOTHING,
    ) -> Submitted:
        """Starts a run, unless one of that name is there, as `find` finds it: then that is it."""
        if (there := self.find(name, experiment, besides=besides)) is not None:
            return there
        run = api.V2beta1Run(
            display_name=name,
            experiment_id=self._experiment(experiment),
            pipeline_version_reference=api.V2beta1PipelineVersionReference(pipeline.pipeline_id, pipeline.version_id),
            runtime_config=api.V2beta1RuntimeConfig(parameters=dict(arguments)),
            service_account=service_account or None,
        )
        try:
            return self._submitted(self._ask(self._runs.run_service_create_run, run), new=True)
        except Unreachable:
            # It may be that only the answer was lost.
            with contextlib.suppress(Unreachable):
                if (there := self.find(name, experiment, besides=besides)) is not None:
                    return there._replace(new=True)
            raise

    def follow(
        self,
        run_id: str,
        on_change: Callable[[Task], None],
        *,
        steps: Collection[str],
        poll: float = POLL_SECONDS,
        after_look: Callable[[], None] = lambda: None,
    ) -> Submitted:
        """Waits for the end of a run; `on_change` is called with each of `steps` whose state changed.

        A run that is retried or cloned has the same steps again, under the same names: each is told. Returns the run when it has
        ended, however it did. Raises Interrupted on Ctrl-C, and Unreachable if the server has not answered for five minutes: the run
        goes on without us.
        """
        states: dict[str, str] = {}
        answered = time.monotonic()
        try:
            while True:
                try:
                    run = self._ask(self._runs.run_service_get_run, run_id)
                except Unreachable as error:
                    if time.monotonic() - answered > PATIENCE_SECONDS:
                        raise Unreachable(f"{error}; the run goes on: {self.run_url(run_id)}") from error
                else:
                    answered = time.monotonic()
                    for task in _tasks(run, steps):
                        if states.get(task.key) != task.state:
                            states[task.key] = task.state
                            on_change(task)
                    after_look()
                    if run.state in DONE:
                        return self._submitted(run, new=False)
                time.sleep(poll)
        except KeyboardInterrupt:
            raise Interrupted(f"no longer followed; the run goes on: {self.run_url(run_id)}") from None

    def run_url(self, run_id: str) -> str:
        """Its page in KFP's UI."""
        return f"{self.ui}/#/runs/details/{run_id}"

    def _pipeline(self, name: str) -> str:
        """The id of the pipeline of that name, which is made if it is not there."""
        for _ in range(2):
            for pipeline in self._pages(
                "pipelines", self._pipelines.pipeline_service_list_pipelines, filter=_equal("name", name), **self._place()
            ):
                return str(pipeline.pipeline_id)
            with _conflicts_allowed():
                about = api.V2beta1Pipeline(name=name, display_name=name, namespace=self.namespace or None)
                made = self._ask(self._pipelines.pipeline_service_create_pipeline, about)
                return str(made.pipeline_id)
        raise RunError(f"{self.url}: says that pipeline {name} exists, and does not list it; look at its namespace")

    def _version(self, pipeline: str, version: str) -> str | None:
        listed = self._pages(
            "pipeline_versions",
            self._pipelines.pipeline_service_list_pipeline_versions,
            pipeline,
            filter=_equal("name", version),
        )
        return next((str(one.pipeline_version_id) for one in listed), None)

    def _experiment(self, name: str) -> str:
        for _ in range(2):
            for one in self._pages(
                "experiments",
                self._experiments.experiment_service_list_experiments,
                filter=_equal("display_name", name),
                **self._place(),
            ):
                return str(one.experiment_id)
            with _conflicts_allowed():
                about = api.V2beta1Experiment(display_name=name, namespace=self.namespace or None)
                return str(self._ask(self._experiments.experiment_service_create_experiment, about).experiment_id)
        raise RunError(f"{self.url}: says that experiment {name} exists, and does not list it; look at its namespace")

    def _place(self) -> dict[str, str]:
        return {"namespace": self.namespace} if self.namespace else {}

    def _submitted(self, run: Any, *, new: bool) -> Submitted:
        return Submitted(run.run_id, run.display_name, run.state or "PENDING", self.run_url(run.run_id), new)

    def _pages(self, field: str, call: Callable[..., Any], *args: Any, **options: Any) -> Iterator[Any]:
        token = ""
        while True:
            page = self._ask(call, *args, page_size=PAGE, page_token=token, **options)
            yield from getattr(page, field) or ()
            token = page.next_page_token or ""
            if not token:
                return

    def _ask(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        try:
            return call(*args, _request_timeout=REQUEST_SECONDS, **options)
        except ApiException as error:
            raise self._explained(error) from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            reason = getattr(error, "reason", None) or error
            raise Unreachable(
                f"{self.url}: cannot be reached: {reason}; is it KFP's URL, and does the port-forward still run?"
            ) from error

    def _explained(self, error: ApiException) -> NsError:
        said = _message(error)
        match error.status:
            case 401 | 403:
                return RunError(
                    f"{self.url}: not allowed: {said}; set {TOKEN_VARIABLE}, and {NAMESPACE_VARIABLE} where there are several users"
                )
            case 409:
                return _Conflict(f"{self.url}: {said}")
            case 404:
                return RunError(f"{self.url}: not found: {said}; is it the URL of KFP 2.17 or newer?")
            case 400 | 422:
                return RunError(f"{self.url}: refused: {said}")
            case status if status is not None and status >= 500:
                return Unreachable(f"{self.url}: failed with {status}: {said}; try again")
        return RunError(f"{self.url}: answered {error.status}: {said}")


class _Conflict(RunError):
    """It is there already."""


@contextlib.contextmanager
def _conflicts_allowed() -> Iterator[None]:
    with contextlib.suppress(_Conflict):
        yield


def pipeline_name(package: str) -> str:
    """Of a compiled pipeline. Raises ConfigError if the text is none."""
    return str(_spec(package)["pipelineInfo"]["name"])


@lru_cache(maxsize=4)
def _spec(package: str) -> Any:
    """The pipeline's part of the YAML; the other one is for Kubernetes."""
    try:
        spec = next(documents(package))
        if {"pipelineInfo", "root", "components"} <= set(spec):
            return spec
    except (StopIteration, TypeError, yaml.YAMLError):
        pass
    raise ConfigError("this is no compiled pipeline: it has no pipelineInfo, root and components; run `make compile`")


def parsed(package: str, inputs: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` as the pipeline's inputs have it: text as it is, all else as YAML. `@FILE` stands for all that a JSON object names.

    Of two values of one input the later one holds. Raises ConfigError naming what cannot be read.
    """
    about = _spec(package)["root"].get("inputDefinitions", {}).get("parameters", {})
    values: dict[str, Any] = {}
    for given in inputs:
        if given.startswith("@"):
            try:
                values |= parse_object(read_uri(given[1:]), given[1:])
            except (DataError, StoreError) as error:
                raise ConfigError(f"--input {given}: {error}") from error
            continue
        name, equals, text = given.partition("=")
        if not equals:
            raise ConfigError(f"--input: invalid value {given!r}: must be NAME=VALUE, e.g. train_gpus=1, or @FILE")
        try:
            values[name] = text if about.get(name, {}).get("parameterType") == "STRING" else yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--input {name}: invalid value {text!r}: must be JSON or YAML") from error
    return values


def checked(package: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, if the pipeline takes them: all are known, of the right type, one of the values that it lists, none is missing.

    Raises ConfigError naming the input.
    """
    inputs = _spec(package)["root"].get("inputDefinitions", {}).get("parameters", {})
    for name, value in arguments.items():
        if name not in inputs:
            raise ConfigError(
                f"{name}: is no input of pipeline {pipeline_name(package)}; its inputs are {', '.join(sorted(inputs))}"
            )
        about = inputs[name]
        kinds = _KINDS[about["parameterType"]]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ConfigError(f"{name}: invalid value {value!r}: must be {about['parameterType'].lower().replace('_', ' ')}")
        if about.get("literals") and value not in about["literals"]:
            raise ConfigError(f"{name}: invalid value {value!r}: must be one of {', '.join(map(str, about['literals']))}")
    for name, about in inputs.items():
        if name not in arguments and "defaultValue" not in about and not about.get("isOptional"):
            raise ConfigError(f"{name}: must be given: {about.get('description', 'an input of the pipeline')}")
    size = len(json.dumps(dict(arguments)).encode())
    if size > MAX_PARAMETER_BYTES:
        raise ConfigError(
            f"the inputs are {size:,} bytes as JSON, KFP takes {MAX_PARAMETER_BYTES:,}; give places (URIs) for what is long"
        )
    return dict(arguments)


_KINDS: dict[str, tuple[type, ...]] = {
    "STRING": (str,),
    "NUMBER_INTEGER": (int,),
    "NUMBER_DOUBLE": (int, float),
    "BOOLEAN": (bool,),
    "LIST": (list,),
    "STRUCT": (dict,),
}


def _equal(key: str, value: str) -> str:
    return json.dumps({"predicates": [{"key": key, "operation": "EQUALS", "string_value": value}]})


def step_names(package: str) -> frozenset[str]:
    """The tasks of a compiled pipeline that run a container, in it or in a pipeline within."""
    spec = _spec(package)
    components = spec["components"]
    return frozenset(
        name
        for component in [spec["root"], *components.values()]
        for name, task in component.get("dag", {}).get("tasks", {}).items()
        if "executorLabel" in components[task["componentRef"]["name"]]
    )


def _tasks(run: Any, steps: Collection[str]) -> Iterator[Task]:
    """Those nodes that are steps."""
    for node in (run.run_details.task_details if run.run_details else None) or ():
        if node.display_name in steps:
            error = str(getattr(node.error, "message", "") or "") if node.error else ""
            yield Task(str(node.task_id), node.display_name, str(node.state or "PENDING"), " ".join(error.split())[:300])


def _message(error: ApiException) -> str:
    """What the server said, in one line."""
    text = error.body or error.reason or ""
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        body = json.loads(text)
        text = body.get("message") or body.get("error_message") or body.get("error") or text
    return " ".join(str(text).split())[:300] or "no reason is given"


def _renew(settings: Any) -> None:
    with contextlib.suppress(OSError):
        settings.api_key["authorization"] = POD_TOKEN.read_text().strip()
