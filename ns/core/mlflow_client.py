"""Runs in MLflow: found by a tag or created, and logged to in a way that a repeated call adds nothing.

MLflow's own variables say where and with what credentials (MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME …). Whatever fails is told in one
line and never stops the work: after a failure nothing is tried for RETRY_SECONDS, and what is missing is logged later.
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ns.core import log
from ns.core.printable import redact_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient

URI_VARIABLE = "MLFLOW_TRACKING_URI"
EXPERIMENT_VARIABLE = "MLFLOW_EXPERIMENT_NAME"
RETRY_SECONDS = 300.0
"""After a failure, seconds until this process tries again."""
DEFAULT_VARIABLES = {
    # MLflow's own are 7 tries of 120 s, which a stage would wait for at its end.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    # Clusters without a way out.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Standard output is for results.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Variables of MLflow that are set unless the environment has them."""
IDENTITY_TAG = "noisy_student.id"
PARENT_TAG = "mlflow.parentRunId"
CURVE_METRIC = "loss"
"""The metric that every point of a training's curves has."""
METRICS_PER_REQUEST = 1000
PARAMS_PER_REQUEST = 100
PARAM_LENGTH = 6000
"""Characters of a parameter's value that MLflow keeps."""

_gave_up_at = float("-inf")


class MetricPoint(NamedTuple):
    """A value of a metric."""

    name: str
    value: float
    step: int


def is_tracked() -> bool:
    """Whether an MLflow server is configured."""
    return bool(os.environ.get(URI_VARIABLE))


def make_client() -> "MlflowClient":
    """A client of the server in MLFLOW_TRACKING_URI. Raises ImportError if MLflow is not installed."""
    for name, value in DEFAULT_VARIABLES.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    return MlflowClient()


def describe_failure(error: Exception) -> str:
    """One line without passwords."""
    if isinstance(error, ImportError):
        return f"{URI_VARIABLE} is set, but MLflow is not installed: pip install 'noisy-student[mlflow]'"
    return redact_credentials((str(error).splitlines() or [type(error).__name__])[0])


def _try_request(request: Callable[[], None]) -> None:
    """Sends something to MLflow, unless this process just failed to."""
    global _gave_up_at
    if not is_tracked() or time.monotonic() - _gave_up_at < RETRY_SECONDS:
        return
    try:
        request()
    # Servers, proxies and plugins of MLflow raise what they like.
    except Exception as error:
        _gave_up_at = time.monotonic()
        log.get_logger().warning("nothing is logged to MLflow for now; work goes on", reason=describe_failure(error))


@dataclass
class MlflowRun:
    """A run in MLflow. Nothing is sent before something is logged."""

    experiment: str
    """Name of MLflow's experiment, which is created if it is missing; MLFLOW_EXPERIMENT_NAME replaces it."""
    name: str
    identity: str
    """What the run is found by, letters and digits: the value of its tag IDENTITY_TAG."""
    parent: "MlflowRun | None" = None
    tags: Mapping[str, str] = field(default_factory=dict)
    _client: "MlflowClient | None" = None
    _run_id: str = ""
    _logged_step: int | None = None
    """Last step of the curves in MLflow; None before it is asked."""

    def log_params(self, params: Mapping[str, str]) -> None:
        """Logs the parameters that the run does not have: MLflow keeps the first value of each."""

        def send_params() -> None:
            from mlflow.entities import Param

            client, run_id = self.find_or_create()
            existing = client.get_run(run_id).data.params
            missing = [Param(name, value[:PARAM_LENGTH]) for name, value in params.items() if name not in existing]
            for batch in _split(missing, PARAMS_PER_REQUEST):
                client.log_batch(run_id, params=batch)

        _try_request(send_params)

    def log_metrics(self, points: Iterable[MetricPoint]) -> None:
        """Logs the points that the run does not have."""

        def send_points() -> None:
            client, run_id = self.find_or_create()
            by_name: dict[str, list[MetricPoint]] = {}
            for point in points:
                by_name.setdefault(point.name, []).append(point)
            missing: list[MetricPoint] = []
            existing_names = client.get_run(run_id).data.metrics
            for name, named_points in by_name.items():
                history = client.get_metric_history(run_id, name) if name in existing_names else []
                existing = {(metric.step, metric.value) for metric in history}
                missing += [point for point in named_points if (point.step, point.value) not in existing]
            self._send_metrics(missing)

        _try_request(send_points)

    def log_curves(self, history: Sequence[Mapping[str, float]]) -> None:
        """Logs the points of a training's history that come after what the run has; each has the keys `step` and CURVE_METRIC."""

        def send_curves() -> None:
            if self._logged_step is None:
                client, run_id = self.find_or_create()
                logged = client.get_metric_history(run_id, CURVE_METRIC)
                self._logged_step = max((metric.step for metric in logged), default=-1)
            points = [point for point in history if int(point["step"]) > self._logged_step]
            # A request holds whole points, and the server takes all of it or nothing: so one metric tells of all.
            for batch in _split(points, max(1, METRICS_PER_REQUEST // (max(map(len, points), default=2) - 1))):
                self._send_metrics(
                    MetricPoint(name, value, int(point["step"]))
                    for point in batch
                    for name, value in point.items()
                    if name != "step"
                )
                self._logged_step = int(batch[-1]["step"])

        _try_request(send_curves)

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """Logs a file as an artifact, in the place of one of the same name."""

        def upload_file() -> None:
            client, run_id = self.find_or_create()
            client.log_artifact(run_id, str(path), folder)

        _try_request(upload_file)

    def set_status(self, status: str) -> None:
        """`status`: MLflow's RUNNING, FINISHED or FAILED."""

        def change_status() -> None:
            client, run_id = self.find_or_create()
            if client.get_run(run_id).info.status == status:
                return
            if status == "RUNNING":
                client.update_run(run_id, status)
            else:
                client.set_terminated(run_id, status)

        _try_request(change_status)

    def find_or_create(self) -> tuple["MlflowClient", str]:
        """The client, and MLflow's id of the run. Raises what MLflow raises."""
        if self._client is None or not self._run_id:
            client = make_client()
            experiment_id = _find_or_create_experiment(client, os.environ.get(EXPERIMENT_VARIABLE) or self.experiment)
            runs = client.search_runs(
                [experiment_id], f"tags.`{IDENTITY_TAG}` = '{self.identity}'", order_by=["attributes.start_time"], max_results=1
            )
            if runs:
                self._run_id = runs[0].info.run_id
            else:
                tags: dict[str, Any] = {IDENTITY_TAG: self.identity, **self.tags}
                if self.parent:
                    tags[PARENT_TAG] = self.parent.find_or_create()[1]
                self._run_id = client.create_run(experiment_id, tags=tags, run_name=self.name).info.run_id
            self._client = client
        return self._client, self._run_id

    def _send_metrics(self, points: Iterable[MetricPoint]) -> None:
        from mlflow.entities import Metric

        client, run_id = self.find_or_create()
        now = int(time.time() * 1000)
        for batch in _split([Metric(point.name, point.value, now, point.step) for point in points], METRICS_PER_REQUEST):
            client.log_batch(run_id, metrics=batch)


def _find_or_create_experiment(client: "MlflowClient", name: str) -> str:
    if (experiment := client.get_experiment_by_name(name)) is not None:
        if experiment.lifecycle_stage != "active":
            client.restore_experiment(experiment.experiment_id)
        return str(experiment.experiment_id)
    from mlflow.exceptions import MlflowException

    try:
        return str(client.create_experiment(name))
    except MlflowException:
        # Another run has created it at the same time.
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            raise
        return str(experiment.experiment_id)


def _split(items: Sequence[Any], size: int) -> Iterable[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
