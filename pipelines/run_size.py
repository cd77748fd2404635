"""Predicts what a run of a compiled pipeline costs Kubeflow: its pods, and the status that Argo keeps of it in one object.

Kubernetes stores objects of about 1 MiB; Argo compresses the status of a workflow that grows beyond it, and ends one that is still too
large. Rules of KFP 2.17 and Argo 4.0, with which a real cluster agreed (tests/pipelines/test_run_size.py):

- A task with a container, and each item of a loop over one, is a driver's pod and its own. A task with inner tasks, each item of a loop
  over one, and a loop itself, is a driver's pod.
- Each template that runs is two nodes, `Retry` and what it tries, since Kubeflow's defaults give all templates a retry strategy. Both keep
  all inputs; a pod's outputs too are kept by both. The container of a task is wrapped in one more template.
- A skipped task, and a task behind one that failed, is one node.
"""

import base64
import gzip
import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pipelines import load_yaml_documents

LIMIT_BYTES = 1024 * 1024
"""Argo's, for a whole workflow with its status."""
GO_LEVEL = 6
"""Go's default level of compression."""
STARTED, FINISHED = "2026-11-29T12:{:02}:{:02}Z", "2026-11-29T12:{:02}:{:02}Z"

Json = dict[str, Any]


class RunShape(NamedTuple):
    """What a run does of its pipeline."""

    generations: int = 1
    tasks: int = 1
    """Labeling tasks."""
    failed_task: str = ""
    """Task that fails for good in the first generation; what waits for it does not run."""
    retries: int = 0
    """Failed tries of each stage before the one that succeeds."""


@dataclass
class RunSize:
    """What Kubeflow keeps of a run."""

    pods: int = 0
    drivers: int = 0
    """Pods that only prepare others."""
    nodes: dict[str, Json] = field(default_factory=dict)
    """Argo's status of all nodes, by their id."""
    spec_bytes: int = 0
    """Size of the workflow without the status of its nodes."""
    paths: list[tuple[str, bool]] = field(default_factory=list)
    """Path of the task of each pod, and whether the pod is its driver."""

    @property
    def status_bytes(self) -> int:
        """Size of the nodes' status as JSON."""
        return len(_dump(self.nodes))

    @property
    def compressed_bytes(self) -> int:
        """Size of the nodes' status as Argo compresses it."""
        return len(base64.b64encode(gzip.compress(_dump(self.nodes).encode(), GO_LEVEL, mtime=0)))

    @property
    def share(self) -> float:
        """Size of the compressed workflow ÷ Argo's limit: above 1 the run ends."""
        return (self.spec_bytes + self.compressed_bytes) / LIMIT_BYTES


def predict_run(package: str, shape: RunShape, *, name: str = "noisy-student-x7k2p") -> RunSize:
    """Predicts a run of a compiled pipeline (YAML) as it is at its end."""
    return _Simulation(package, shape, name).run()


class GenerationPods(NamedTuple):
    """Pods of one generation after the first."""

    pods: int
    critical_drivers: int
    """Drivers that it waits for, one after the other, if its labeling tasks run side by side."""


def count_generation_pods(package: str, *, tasks: int) -> GenerationPods:
    """Counts the pods of a generation with so many labeling tasks."""
    pods, one_task = (
        [is_driver for path, is_driver in predict_run(package, RunShape(2, number)).paths if path.startswith("generation-2")]
        for number in (tasks, 1)
    )
    return GenerationPods(len(pods), sum(one_task))


class _Simulation:
    def __init__(self, package: str, shape: RunShape, name: str) -> None:
        self._spec, platform = load_yaml_documents(package)
        self._platform = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        self._shape, self._name = shape, name
        self._size = RunSize()
        self._generation = 0
        self._clock = 0
        self._children: dict[str, list[str]] = {}

    def run(self) -> RunSize:
        root = self._spec["root"]
        defaults = {key: definition.get("defaultValue") for key, definition in root["inputDefinitions"]["parameters"].items()}
        top = self._open_template(self._name, self._name, "entrypoint", "DAG", "", [])
        runtime = {"parameterValues": defaults, "gcsOutputDirectory": "minio://mlpipeline/v2/artifacts"}
        inputs = {
            "component": _dump(root),
            "runtime-config": _dump(runtime),
            "task": "",
            "task-name": "",
            "parent-dag-id": "0",
            "iteration-index": "-1",
            "driver-type": "ROOT_DAG",
        }
        self._add_dag_driver(top, "root-driver", inputs, "")
        self._run_dag(top, "root", "root", root, "")
        for identifier, children in self._children.items():
            self._size.nodes[identifier].setdefault("children", []).extend(children)
            # The last of a template's nodes, to which what comes after is joined; pods have none.
            self._size.nodes[identifier]["outboundNodes"] = children[-1:]
        self._size.spec_bytes = self._measure_spec()
        return self._size

    def _run_dag(self, parent: str, task_name: str, component_name: str, component: Json, path: str) -> bool:
        """Runs the tasks of a pipeline, an If or an item of a loop. Returns whether it succeeded."""
        inputs = [_parameter("parent-dag-id", "123")]
        boundary = self._open_template(parent, f"{parent}.{task_name}", component_name, "DAG", task_name, inputs)
        tasks = component["dag"]["tasks"]
        failed: set[str] = set()
        for name in _sort_tasks(tasks):
            task = tasks[name]
            inner = self._spec["components"][task["componentRef"]["name"]]
            if failed & set(task.get("dependentTasks", ())):
                failed.add(name)
                for node in (f"{name}-driver", name):
                    self._add_node(boundary, f"{boundary}.{node}", node, "Skipped", "Omitted", [], {})
                continue
            if not self._run_task(boundary, name, task, inner, f"{path}/{name}".strip("/")):
                failed.add(name)
        return not failed

    def _run_task(self, parent: str, name: str, task: Json, component: Json, path: str) -> bool:
        shown = task["taskInfo"]["name"]
        if shown.startswith(("generation", "attempt")) and "dag" in component and "triggerPolicy" not in task:
            digits = "".join(character for character in shown if character.isdigit())
            self._generation = int(digits) if digits else self._generation or 1
        if "parameterIterator" in task:
            return self._run_loop(parent, name, task, component, path)
        inputs = self._driver_inputs(name, task, component)
        if "dag" in component:
            self._add_dag_driver(parent, f"{name}-driver", inputs, path)
            if not self._is_taken(task):
                self._add_node(parent, f"{parent}.{name}", name, "Skipped", "Skipped", [], {})
                return True
            return self._run_dag(parent, name, task["componentRef"]["name"], component, path)
        return self._run_container(parent, name, task, component, path)

    def _run_loop(self, parent: str, name: str, task: Json, component: Json, path: str) -> bool:
        component_name = task["componentRef"]["name"]
        identifier = [_parameter("parent-dag-id", "123")]
        loop = self._open_template(parent, f"{parent}.{name}", f"{component_name}-{name}-iterator", "DAG", name, identifier)
        inputs = self._driver_inputs(name, task, component)
        self._add_dag_driver(loop, "iteration-driver", inputs, path)
        group = f"{loop}.iteration-iterations"
        self._add_node(loop, group, "iteration-iterations", "TaskGroup", "Succeeded", [], {})
        succeeded = True
        for index in range(self._shape.tasks):
            shown = f"iteration-iterations({index}:{index})"
            item_inputs = [*identifier, _parameter("iteration-index", str(index))]
            template = f"{component_name}-iteration"
            item = self._open_template(loop, f"{loop}.{shown}", template, "DAG", shown, item_inputs)
            item_path, item_index = f"{path}/{index}", {"iteration-index": str(index)}
            if "dag" in component:
                self._add_dag_driver(item, "iteration-item-driver", {**inputs, **item_index}, item_path)
                succeeded &= self._run_dag(item, "iteration-item", component_name, component, item_path)
            else:
                succeeded &= self._run_container(
                    item, "iteration-item", task, component, item_path, {"task-name": name, **item_index}
                )
        return succeeded

    def _run_container(
        self, parent: str, name: str, task: Json, component: Json, path: str, item_inputs: Mapping[str, str] | None = None
    ) -> bool:
        executor = self._spec["deploymentSpec"]["executors"][component["executorLabel"]]["container"]
        platform = self._platform.get(component["executorLabel"], {})
        inputs = self._driver_inputs(name, task, component)
        inputs |= {"container": _dump(executor), "kubernetes-config": _dump(platform), **(item_inputs or {})}
        order = ("component", "task", "container", "task-name", "parent-dag-id", "iteration-index", "kubernetes-config")
        defaults = {"iteration-index": "-1", "kubernetes-config": ""}
        patch = _dump(_build_pod_patch(component, executor, platform, task, path))
        outputs = {
            "pod-spec-patch": (patch, "", None),
            "cached-decision": ("false", "false", "false"),
            "condition": ("true", "true", None),
        }
        given = [_parameter(key, inputs.get(key, defaults.get(key, "")), defaults.get(key)) for key in order]
        self._add_pod(parent, f"{name}-driver", "system-container-driver", given, _outputs(outputs), path)
        labels = [item for pair in sorted(platform.get("podMetadata", {}).get("labels", {}).items()) for item in pair]
        metadata = [
            _parameter(f"pod-metadata-label-{'key' if index % 2 == 0 else 'val'}-{index // 2 + 1}", value)
            for index, value in enumerate(labels)
        ]
        retry = task.get("retryPolicy", {})
        retries = [
            ("retry-max-count", str(retry.get("maxRetryCount", 0))),
            ("retry-backoff-duration", str(retry.get("backoffDuration", "0")).rstrip("s")),
            ("retry-backoff-factor", str(retry.get("backoffFactor", 0))),
            ("retry-backoff-max-duration", str(retry.get("backoffMaxDuration", "0")).rstrip("s")),
        ]
        shared = [*metadata, *(_parameter(key, value, "0") for key, value in retries)] if retry else metadata
        wrapped = [_parameter("pod-spec-patch", patch), _parameter("cached-decision", "false", "false"), *shared]
        template = f"metadata-0-{len(labels) // 2}-retry-system-container"
        boundary = self._open_template(parent, f"{parent}.{name}", f"{template}-executor", "DAG", name, wrapped)
        pod_inputs = [_parameter("pod-spec-patch", patch), *(_parameter(item["name"], item["value"]) for item in shared)]
        failed = task["taskInfo"]["name"] == self._shape.failed_task
        self._add_pod(boundary, "executor", f"{template}-impl", pod_inputs, _outputs({}), path, failed=failed)
        return not failed

    def _driver_inputs(self, name: str, task: Json, component: Json) -> dict[str, str]:
        return {
            "component": _dump(component),
            "task": _dump(task),
            "task-name": name,
            "parent-dag-id": "123",
            "iteration-index": "-1",
        }

    def _is_taken(self, task: Json) -> bool:
        """Whether an If is: one in a generation, if the run has that generation."""
        condition = task.get("triggerPolicy", {}).get("condition", "")
        if "stop" in condition:
            return self._generation <= self._shape.generations
        return "dry_run" not in condition or condition.startswith("!")

    def _add_dag_driver(self, parent: str, name: str, inputs: Mapping[str, str], path: str) -> None:
        order = ("component", "runtime-config", "task", "task-name", "parent-dag-id", "iteration-index", "driver-type")
        defaults = {
            "runtime-config": "",
            "task": "",
            "task-name": "",
            "parent-dag-id": "0",
            "iteration-index": "-1",
            "driver-type": "DAG",
        }
        given = [_parameter(key, inputs.get(key, defaults.get(key, "")), defaults.get(key)) for key in order]
        outputs = {
            "execution-id": ("124", None, None),
            "iteration-count": ("0", "0", None),
            "condition": ("true", "true", None),
        }
        self._add_pod(parent, name, "system-dag-driver", given, _outputs(outputs), path)

    def _add_pod(
        self, parent: str, name: str, template: str, inputs: list[Json], outputs: Json, path: str, *, failed: bool = False
    ) -> None:
        is_driver = template.endswith("-driver")
        tries = 1 if is_driver else 1 + self._shape.retries
        self._size.pods += tries
        self._size.drivers += is_driver
        self._size.paths.append((path, is_driver))
        node_name = f"{parent}.{name}"
        phase = "Failed" if failed else "Succeeded"
        pod_name = f"{self._name}-{template}-{_hash(node_name)}"
        logs = {"name": "main-logs", "s3": {"key": f"private-artifacts/kubeflow/{self._name}/2026/11/29/{pod_name}/main.log"}}
        kept = {**outputs, "artifacts": [logs], "exitCode": "1" if failed else "0"}
        retry = self._add_node(parent, node_name, name, "Retry", phase, inputs, kept, template)
        for number in range(tries):
            child = self._add_node(
                parent, f"{node_name}({number})", f"{name}({number})", "Pod", phase, inputs, kept, template, is_retried=True
            )
            self._children.setdefault(retry, []).append(child)

    def _open_template(self, parent: str, node_name: str, template: str, kind: str, shown: str, inputs: list[Json]) -> str:
        """Adds the two nodes of a template of tasks. Returns the name of the one that holds the tasks' nodes."""
        retry = self._add_node(parent, node_name, shown or self._name, "Retry", "Succeeded", inputs, {}, template)
        child = self._add_node(
            parent, f"{node_name}(0)", f"{shown or self._name}(0)", kind, "Succeeded", inputs, {}, template, is_retried=True
        )
        self._children.setdefault(retry, []).append(child)
        return f"{node_name}(0)"

    def _add_node(
        self,
        parent: str,
        name: str,
        shown: str,
        kind: str,
        phase: str,
        inputs: list[Json],
        outputs: Json,
        template: str = "",
        *,
        is_retried: bool = False,
    ) -> str:
        """Adds a node as Argo writes it. Returns its id."""
        identifier = f"{self._name}-{_hash(name)}"
        self._clock += 4
        node: Json = {"id": identifier, "name": name, "displayName": shown, "type": kind}
        if template:
            node |= {"templateName": template}
        node |= {"templateScope": f"local/{self._name}", "phase": phase}
        if name != self._name:
            node |= {"boundaryID": f"{self._name}-{_hash(parent)}"}
        at = divmod(self._clock, 60)
        node |= {"startedAt": STARTED.format(at[0] % 60, at[1]), "finishedAt": FINISHED.format((at[0] + 1) % 60, at[1])}
        node |= {"progress": "1/1", "resourcesDuration": {"cpu": self._clock % 7, "memory": self._clock % 97}}
        if is_retried:
            node |= {"nodeFlag": {"retried": True}}
        if inputs:
            node |= {"inputs": {"parameters": inputs}}
        if outputs:
            node |= {"outputs": outputs}
        if kind == "Pod":
            node |= {"hostNodeName": "node-1", "taskResultSynced": True}
        if parent and name != self._name:
            # A node is the child of what opened it, or of a task that it waits for.
            self._children.setdefault(f"{self._name}-{_hash(parent)}", []).append(identifier)
        self._size.nodes[identifier] = node
        return identifier

    def _measure_spec(self) -> int:
        """Size of the workflow's metadata, arguments and templates."""
        components = {**self._spec["components"], "root": self._spec["root"]}
        executors = self._spec["deploymentSpec"]["executors"]
        arguments = [_dump(component) for component in components.values()]
        arguments += [_dump(executor["container"]) for executor in executors.values()]
        arguments += [
            _dump(self._platform.get(component["executorLabel"], {}))
            for component in components.values()
            if "executorLabel" in component
        ]
        # A name, and the digest in it, for each; and a task of a template, with its JSON, for each task.
        tasks = [task for component in components.values() for task in component.get("dag", {}).get("tasks", {}).values()]
        templates = sum(len(json.dumps(_dump(task))) + 1500 for task in tasks)
        return sum(len(json.dumps(argument)) + 120 for argument in arguments) + templates + FIXED_SPEC_BYTES


RUN_URI = "s3://mlpipeline/noisy-student/noisy-student-20261129-1200-5f1f5d3c"
RUN_ID = "5c0ac0b5-7a84-4b0a-8d5a-5f1f5d3c9a11"
FIXED_SPEC_BYTES = 16_000
"""Metadata of a workflow, and the templates of drivers and containers, of which every pipeline has the same."""


def _build_pod_patch(component: Json, executor: Json, platform: Json, task: Json, path: str) -> Json:
    """What a driver adds to the pod of a stage."""
    # Tasks of a generation have the same inputs but for their item of a loop.
    generation = path.partition("/")[0]
    given = {
        name: f"store/models/{_draw_hex(f'{generation}{name}', 16)}" for name in task.get("inputs", {}).get("parameters", {})
    }
    values = given | ({"run": RUN_URI} if "run" in given else {})
    if "parameterIterator" in task:
        del values[task["parameterIterator"]["items"]["inputParameter"]]
        values[task["parameterIterator"]["itemInput"]] = path.rpartition("/")[2]
    definitions = component.get("outputDefinitions", {})
    folder = f"mlpipeline/v2/artifacts/noisy-student/{RUN_ID}/{path}/{_draw_uuid(path)}"
    artifacts = {name: artifact["artifactType"] for name, artifact in definitions.get("artifacts", {}).items()}
    artifacts["executor-logs"] = {"schemaTitle": "system.Artifact"}
    outputs = {
        "artifacts": {
            name: {"artifacts": [{"name": name, "type": kind, "uri": f"minio://{folder}/{name}"}]}
            for name, kind in artifacts.items()
        },
        "parameters": {name: {"outputFile": f"/tmp/kfp/outputs/{name}"} for name in definitions.get("parameters", {})},
        "outputFile": f"/minio/{folder}/output_metadata.json",
    }
    executor_input = {"inputs": {"parameterValues": values}, "outputs": outputs}
    launcher = ["/kfp-launcher/launch", "--pipeline_name", "noisy-student", "--run_id", RUN_ID]
    launcher += [
        "--execution_id",
        str(_hash(path) % 10_000),
        "--executor_input",
        _dump(executor_input),
        "--component_spec",
        _dump(component),
    ]
    launcher += ["--pod_name", "$(KFP_POD_NAME)", "--pod_uid", "$(KFP_POD_UID)"]
    launcher += ["--ml_pipeline_server_address", "ml-pipeline.kubeflow.svc.cluster.local", "--ml_pipeline_server_port", "8887"]
    launcher += ["--mlmd_server_address", "metadata-grpc-service.kubeflow.svc.cluster.local", "--mlmd_server_port", "8080"]
    launcher += ["--publish_logs", "true", "--"]
    references = {"secretAsEnv": ("secretKeyRef", "secretKey"), "configMapAsEnv": ("configMapKeyRef", "configMapKey")}
    environment = [
        {"name": key["envVar"], "valueFrom": {reference: {"name": "noisy-student", "key": key[key_name], "optional": True}}}
        for kind, (reference, key_name) in references.items()
        for source in platform.get(kind, ())
        for key in source["keyToEnv"]
    ]
    folders = [
        (mount["volumeName"], mount["mountPath"], {"emptyDir": {"medium": mount["medium"]} if "medium" in mount else {}})
        for mount in platform.get("emptyDirMounts", ())
    ]
    for kind, source, name_key in (("secretAsVolume", "secret", "secretName"), ("configMapAsVolume", "configMap", "name")):
        for mount in platform.get(kind, ()):
            name = mount[f"{source}NameParameter"]["runtimeValue"]["constant"]
            folders.append((name, mount["mountPath"], {source: {name_key: name, "optional": True}}))
    main = {
        "name": "main",
        "image": "registry.example.com/noisy-student/worker-cuda:0123456789abcdef",
        "command": launcher,
        "args": [*executor["command"], *executor.get("args", ())],
        "env": environment,
        "resources": {"limits": {"memory": "16Gi"}, "requests": {"cpu": "2", "memory": "16Gi"}},
        "volumeMounts": [{"name": name, "mountPath": folder} for name, folder, _ in folders],
        "securityContext": {"capabilities": {"drop": ["ALL"]}, "runAsUser": 10001, "runAsGroup": 10001, "runAsNonRoot": True},
    }
    volumes = [{"name": name, **volume} for name, _, volume in folders]
    return {"volumes": volumes, "containers": [main], "activeDeadlineSeconds": 3600}


def _parameter(name: str, value: str, default: str | None = None) -> Json:
    return {"name": name, **({} if default is None else {"default": default}), "value": value}


def _outputs(values: Mapping[str, tuple[str, str | None, str | None]]) -> Json:
    """Outputs of a driver: name → value, default of the file, default of the parameter."""
    parameters = []
    for name, (value, file_default, default) in values.items():
        source = {"path": f"/tmp/outputs/{name}", **({} if file_default is None else {"default": file_default})}
        parameters.append({**_parameter(name, value, default), "valueFrom": source})
    return {"parameters": parameters} if parameters else {}


def _sort_tasks(tasks: Mapping[str, Json]) -> list[str]:
    """Tasks after those that they wait for."""
    ordered: list[str] = []

    def visit_task(name: str) -> None:
        if name not in ordered:
            for earlier in sorted(tasks[name].get("dependentTasks", ())):
                visit_task(earlier)
            ordered.append(name)

    for name in sorted(tasks):
        visit_task(name)
    return ordered


def _draw_hex(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def _draw_uuid(text: str) -> str:
    return str(uuid.UUID(_draw_hex(text, 32)))


def _hash(text: str) -> int:
    """FNV-1a of 32 bits, by which Argo names nodes."""
    value = 0x811C9DC5
    for byte in text.encode():
        value = (value ^ byte) * 0x01000193 & 0xFFFFFFFF
    return value


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True)
