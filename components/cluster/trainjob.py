"""Training on several nodes: a TrainJob of Kubeflow Trainer v2, which a small stage creates, follows and deletes.

The job is named by the digest of the training, so that a repeated stage finds the job of its predecessor. The stage's pod owns the job,
which is therefore deleted with the run; a stage that is stopped deletes it. Every node runs torchrun, to which Trainer passes the node's
rank; results go to the store, as those of any other training.
"""

import json
import math
import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.config.config_exception import ConfigException
from kubernetes.watch.watch import iter_resp_lines
from urllib3.exceptions import HTTPError

from components import SETTINGS_VARIABLES, STAGE_USER, STORE_FOLDER
from components.cluster.nodes import TrainingNodes
from ns.core import log
from ns.core.errors import ConfigError, Interrupted, NsError, RunError, TrainingError, find_error_kind
from ns.core.printable import make_printable
from ns.core.process import handle_signals
from ns.storage.endpoint import SECRETS_VARIABLE

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
NODE_NAME = "node"
"""Trainer's name for the job of the nodes and for the container in each."""
MANAGER = "noisy-student/train-distributed"
NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
POLL_SECONDS = 5.0
QUIET_SECONDS = 60.0
"""A log that is silent this long is closed, to check the job."""
PATIENCE_SECONDS = 600.0
"""Time for the cluster's API to answer again: a training of days continues without it."""
DEADLINE_SECONDS = 168 * 3600
RUN_LABEL = "noisy-student/run"
KUBEFLOW_LABEL = "pipeline/runid"
"""Kubeflow's label on all pods of a run; clients look for what waits by it."""
LABEL_VALUE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")

Json = dict[str, Any]


def run_trainjob(run: str, nodes: TrainingNodes, training_id: str, arguments: Sequence[str]) -> None:
    """Runs `python -m ns.stages.train_worker ARGUMENTS` on several nodes until all of them have ended; `training_id` names the job.

    Raises ConfigError if there is no cluster or no Trainer, the training's own error if a node logs it, else TrainingError with the last
    lines of the node's log, RunError if the cluster stops answering, Interrupted after SIGINT or SIGTERM.
    """
    api = ClusterApi.from_environment()
    job = TrainJob(api, f"train-{training_id}")
    job_labels = {
        "app.kubernetes.io/part-of": "noisy-student",
        "app.kubernetes.io/component": "train",
        **make_run_label(run),
        **api.read_kubeflow_label(),
    }
    if nodes.queue:
        job_labels["kueue.x-k8s.io/queue-name"] = nodes.queue
    with _interrupt_on_sigterm():
        try:
            job.create_job(build_trainjob(job.name, arguments, nodes, job_labels, _owner_references()))
            job.follow_job()
        except (Interrupted, KeyboardInterrupt):
            job.delete_job()
            raise
    job.delete_job()


def make_run_label(run: str) -> dict[str, str]:
    """The label by which monitoring attributes nodes without metrics to the run; none if the run's name is not a valid label."""
    return {RUN_LABEL: run} if LABEL_VALUE.fullmatch(run) else {}


def build_trainjob(
    name: str, arguments: Sequence[str], nodes: TrainingNodes, labels: Mapping[str, str], owners: Sequence[Json]
) -> Json:
    """Builds the TrainJob of a training. `arguments`: those of `ns.stages.train_worker`."""
    gpus = {nodes.gpu_type: str(nodes.gpus)} if nodes.gpus else {}
    # Keys stay in their files, as in the pods of stages: a training of days outlives them, and sees what takes their place.
    environment: list[Json] = [{"name": SECRETS_VARIABLE, "value": STORE_FOLDER}]
    environment += [
        {"name": name, "valueFrom": {"configMapKeyRef": {"name": nodes.settings, "key": name, "optional": True}}}
        for name in SETTINGS_VARIABLES
    ]
    pod = {
        "nodeSelector": dict(nodes.selector),
        "tolerations": list(nodes.tolerations),
        "securityContext": {"runAsUser": STAGE_USER, "runAsGroup": STAGE_USER, "runAsNonRoot": True},
        "volumes": [
            # Without a limit of its own, /dev/shm is as large as the pod's memory; loaders take at most half of it.
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
            {"name": "scratch", "emptyDir": {}},
            {"name": "store-keys", "secret": {"secretName": nodes.secret, "optional": True}},
        ],
        "containers": [
            {
                "name": NODE_NAME,
                "volumeMounts": [
                    {"name": "shared-memory", "mountPath": "/dev/shm"},
                    {"name": "scratch", "mountPath": "/tmp"},
                    {"name": "store-keys", "mountPath": STORE_FOLDER, "readOnly": True},
                ],
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            }
        ],
    }
    template = {"metadata": {"labels": dict(labels)}, "spec": {key: value for key, value in pod.items() if value}}
    job = {"name": NODE_NAME, "template": {"spec": {"template": template}}}
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {"name": name, "labels": dict(labels), "ownerReferences": list(owners)},
        "spec": {
            "runtimeRef": {"name": nodes.runtime, "kind": nodes.runtime_kind},
            "activeDeadlineSeconds": DEADLINE_SECONDS,
            "trainer": {
                "image": nodes.image,
                # torchrun; Trainer sets the node's rank and the address of the first node in variables (PET_…).
                "command": ["python3", "-m", "ns.modeling.torchrun", "-m", "ns.stages.train_worker"],
                "args": list(arguments),
                "numNodes": nodes.count,
                "numProcPerNode": max(1, nodes.gpus),
                "resourcesPerNode": {
                    "requests": {"cpu": nodes.cpu, "memory": nodes.memory, **gpus},
                    "limits": {"memory": nodes.memory, **gpus},
                },
                "env": environment,
            },
            "runtimePatches": [{"manager": MANAGER, "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [job]}}}}],
        },
    }


def _owner_references() -> list[Json]:
    """This stage's pod, from the variables that Kubeflow sets; empty outside Kubeflow."""
    name, uid = os.environ.get("KFP_POD_NAME"), os.environ.get("KFP_POD_UID")
    return [{"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid}] if name and uid else []


class ClusterApi:
    """The cluster's API in one namespace. Calls are repeated while it does not answer."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.jobs = client.CustomObjectsApi()
        self.core = client.CoreV1Api()

    @classmethod
    def from_environment(cls) -> "ClusterApi":
        """Connects to the cluster of this pod, or to that of KUBECONFIG. Raises ConfigError if there is none."""
        try:
            if NAMESPACE.exists():
                config.load_incluster_config()
                return cls(NAMESPACE.read_text().strip())
            config.load_kube_config()
            _, active = config.list_kube_config_contexts()
        except ConfigException as error:
            raise ConfigError(
                f"a training on several nodes needs a cluster ({error}); run it on Kubeflow, or set KUBECONFIG"
            ) from error
        return cls(active["context"].get("namespace", "default"))

    def read_kubeflow_label(self) -> dict[str, str]:
        """The label of this pod that names the run; empty outside Kubeflow."""
        name = os.environ.get("KFP_POD_NAME")
        if not name:
            return {}
        try:
            pod = self.call_with_retry(self.core.read_namespaced_pod, name, self.namespace)
        except ApiException:
            # The training needs it not.
            return {}
        return {key: value for key, value in (pod.metadata.labels or {}).items() if key == KUBEFLOW_LABEL}

    def call_with_retry(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Raises ApiException if the API refuses, RunError if it does not answer for PATIENCE_SECONDS."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return call(*arguments, **options)
            except (ApiException, HTTPError) as error:
                if isinstance(error, ApiException) and error.status and error.status < 500 and error.status != 429:
                    raise
                if time.monotonic() > deadline:
                    raise RunError(
                        f"the cluster's API has not answered for {PATIENCE_SECONDS:,.0f} s ({error}); the same command continues"
                    ) from error
            time.sleep(POLL_SECONDS)


class JobEnd(NamedTuple):
    succeeded: bool
    message: str


class TrainJob:
    """A TrainJob by its name."""

    def __init__(self, api: ClusterApi, name: str) -> None:
        self.name = name
        self._api = api
        self._resource_path = (GROUP, VERSION, api.namespace, PLURAL)
        self._logs = _NodeLogs(api, name)

    def create_job(self, manifest: Json) -> None:
        """Creates the job, or adopts the existing one unless that has failed or is being deleted."""
        while True:
            try:
                self._api.call_with_retry(self._api.jobs.create_namespaced_custom_object, *self._resource_path, manifest)
                log.get_logger().info("created", trainjob=self.name, nodes=manifest["spec"]["trainer"]["numNodes"])
                return
            except ApiException as error:
                if error.status != 409:
                    raise self._explain_refusal(error) from error
            existing = self._read_job()
            end = _find_end(existing) if existing else None
            if existing and "deletionTimestamp" not in existing["metadata"] and (end is None or end.succeeded):
                self._adopt_job(existing, manifest["metadata"]["ownerReferences"])
                log.get_logger().info("attached", trainjob=self.name)
                return
            self.delete_job()

    def follow_job(self) -> None:
        """Shows the first node's log until the job has ended. Raises the error that stopped it."""
        while True:
            job = self._read_job()
            if job is None:
                raise RunError(f"TrainJob {self.name}: was deleted; the same command starts it again from its last checkpoint")
            end = _find_end(job)
            had_output = self._logs.follow_first_node()
            if end is None:
                if not had_output:
                    time.sleep(POLL_SECONDS)
            elif end.succeeded:
                return
            else:
                raise self._explain_failure(end)

    def delete_job(self) -> None:
        """Deletes the job and waits until its nodes are gone."""
        while (job := self._read_job()) is not None:
            if "deletionTimestamp" in job["metadata"]:
                time.sleep(POLL_SECONDS)
            else:
                try:
                    self._api.call_with_retry(
                        self._api.jobs.delete_namespaced_custom_object,
                        *(*self._resource_path, self.name),
                        body=client.V1DeleteOptions(propagation_policy="Foreground"),
                    )
                except ApiException as error:
                    if error.status != 404:
                        raise self._explain_refusal(error) from error

    def _read_job(self) -> Json | None:
        try:
            return dict(self._api.call_with_retry(self._api.jobs.get_namespaced_custom_object, *self._resource_path, self.name))
        except ApiException as error:
            if error.status == 404:
                return None
            raise self._explain_refusal(error) from error

    def _adopt_job(self, existing: Json, owners: Sequence[Json]) -> None:
        """Adds owners: the predecessor's pod may be deleted, and an object is deleted when all its owners are gone."""
        current_owners = existing["metadata"].get("ownerReferences", [])
        missing_owners = [owner for owner in owners if owner["uid"] not in {current["uid"] for current in current_owners}]
        if missing_owners:
            patch = {"metadata": {"ownerReferences": [*current_owners, *missing_owners]}}
            self._api.call_with_retry(self._api.jobs.patch_namespaced_custom_object, *self._resource_path, self.name, patch)

    def _explain_refusal(self, error: ApiException) -> NsError:
        message = _parse_object(error.body or "").get("message") or error.reason
        if error.status == 404:
            cure = f"the cluster has no TrainJobs ({message}); install Kubeflow Trainer 2.2 or later"
        elif error.status in (401, 403):
            cure = (
                f"not allowed in namespace {self._api.namespace} ({message}); give the service account of the run's pods the role of "
                "k8s/components/trainer"
            )
        else:
            cure = f"the cluster refuses it: {message}"
        return ConfigError(f"TrainJob {self.name}: {cure}")

    def _explain_failure(self, end: JobEnd) -> NsError:
        """The error that a node logged, or the last lines of its log."""
        pod, reason, lines = self._logs.read_failed_node()
        for line in lines:
            event = _parse_object(line)
            if event.get("event") == "failed" and "error" in event:
                return find_error_kind(int(event.get("exit_code", 1)), TrainingError)(str(event["error"]))
        detail = f"; {pod} {reason}" if pod else ""
        return TrainingError(
            f"TrainJob {self.name}: {end.message}{detail}; the same command continues{log.format_last_lines(lines)}"
        )


class _NodeLogs:
    def __init__(self, api: ClusterApi, job: str) -> None:
        self._api = api
        self._selector = f"jobset.sigs.k8s.io/jobset-name={job},jobset.sigs.k8s.io/replicatedjob-name={NODE_NAME}"
        self._last = ""
        """Timestamp of the last line."""
        self._seen = 0.0
        self._lines: deque[str] = deque(maxlen=200)

    def follow_first_node(self) -> bool:
        """Copies the first node's log to stderr until it is silent. Returns whether there was a new line."""
        pods = [pod for pod in self._list_pods() if pod.metadata.labels.get("batch.kubernetes.io/job-completion-index") == "0"]
        begun = [pod for pod in pods if pod.status.phase in ("Running", "Succeeded", "Failed")]
        if not begun:
            return False
        newest = max(begun, key=lambda pod: pod.metadata.creation_timestamp)
        had_output = False
        # A log that is silent, cut off or gone: the caller checks the job and calls again.
        with suppress(ApiException, HTTPError):
            for line in self._stream_log(newest.metadata.name, follow=newest.status.phase == "Running"):
                at, _, text = line.partition(" ")
                # A log that is opened again repeats lines that were read before.
                if at > self._last:
                    self._last, self._seen, had_output = at, time.time(), True
                    self._lines.append(text)
                    sys.stderr.write(make_printable(text, keep_newlines=False) + "\n")
        return had_output

    def read_failed_node(self) -> tuple[str, str, list[str]]:
        """Returns the node that failed first, how, and the end of its log; without a failed node, the lines read from the first node."""
        failed = []
        for pod in self._list_pods():
            for status in pod.status.container_statuses or []:
                ended = status.state.terminated if status.state else None
                if status.name == NODE_NAME and ended and ended.exit_code:
                    failed.append((ended.finished_at, pod.metadata.name, ended))
        if not failed:
            return "", "", list(self._lines)
        _, name, ended = min(failed, key=lambda end: (end[0] is None, end[0], end[1]))
        reason = "ran out of memory" if ended.reason == "OOMKilled" else f"ended with exit code {ended.exit_code}"
        try:
            text = self._api.call_with_retry(
                self._api.core.read_namespaced_pod_log, name, self._api.namespace, container=NODE_NAME, tail_lines=200
            )
        except ApiException:
            return name, reason, list(self._lines)
        return name, reason, text.splitlines()

    def _list_pods(self) -> list[Any]:
        pods = self._api.call_with_retry(self._api.core.list_namespaced_pod, self._api.namespace, label_selector=self._selector)
        return list(pods.items)

    def _stream_log(self, pod: str, *, follow: bool) -> Iterator[str]:
        since = {"since_seconds": math.ceil(time.time() - self._seen) + 10} if self._seen else {}
        response = self._api.core.read_namespaced_pod_log(
            pod,
            self._api.namespace,
            container=NODE_NAME,
            follow=follow,
            timestamps=True,
            _preload_content=False,
            _request_timeout=(10, QUIET_SECONDS),
            **since,
        )
        with closing(response):
            yield from iter_resp_lines(response)


def _find_end(job: Json) -> JobEnd | None:
    for condition in job.get("status", {}).get("conditions", []):
        if condition["status"] == "True" and condition["type"] in ("Complete", "Failed"):
            return JobEnd(condition["type"] == "Complete", condition.get("message") or condition.get("reason") or "failed")
    return None


def _parse_object(text: str | bytes) -> Json:
    """Parses a JSON object; empty if the text is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


@contextmanager
def _interrupt_on_sigterm() -> Iterator[None]:
    def handle_sigterm(_number: int, _frame: FrameType | None) -> None:
        # A second signal must not interrupt the deletion of the nodes.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Interrupted("stopped together with its nodes; the same command continues from the last checkpoint")

    with handle_signals(handle_sigterm, [signal.SIGTERM]):
        yield
