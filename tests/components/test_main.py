"""How processes of stages end."""

import json
import sys
from contextlib import closing

import pytest
from kfp.local import subprocess_task_handler

from ns.stages.prepare import prepare_data
from pipelines import PACKAGE, load_yaml_documents
from pipelines.runners.fork_server import ForkServer
from pipelines.runners.local import COMPUTING_MODULES, STAGE_MODULES
from tests.loop import open_tiny_run


def make_teacher_command(run: str, data: str, folder) -> list[str]:
    """What the pod of a teacher runs."""
    artifacts = {
        name: {"artifacts": [{"name": name, "type": {"schemaTitle": kind}, "uri": str(folder / name), "metadata": {}}]}
        for name, kind in (("metrics", "system.Metrics"), ("classification", "system.ClassificationMetrics"))
    }
    executor_input = {
        "inputs": {
            "parameterValues": {"run": run, "data": data, "teacher": "", "gpus": "0", "cpu": "1", "memory": "1Gi", "nodes": {}}
        },
        "outputs": {
            "parameters": {"Output": {"outputFile": str(folder / "Output")}},
            "artifacts": artifacts,
            "outputFile": str(folder / "output.json"),
        },
    }
    spec = next(load_yaml_documents(PACKAGE.read_text()))
    command = spec["deploymentSpec"]["executors"]["exec-teacher"]["container"]["command"]
    arguments = ["--executor_input", json.dumps(executor_input), "--function_to_execute", "teacher"]
    return subprocess_task_handler.replace_python_executable([*command, *arguments], sys.executable)


def refuse(**_options) -> int:
    raise AssertionError("the server should have run it")


@pytest.mark.integration
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_200_evaluations_in_processes_of_their_own_end_well(finished_run, tmp_path, monkeypatch):
    """Each loads a model, evaluates it in threads, writes tables and metrics, and serves its metrics."""
    store, _ = finished_run
    ref = open_tiny_run(store)
    command = make_teacher_command(f"{ref.root}/{ref.run}", prepare_data(ref), tmp_path)
    monkeypatch.setenv("NS_METRICS_PORT", "0")
    ends = []
    with closing(ForkServer([*STAGE_MODULES, *COMPUTING_MODULES])) as server:
        for _ in range(200):
            for prefix in ("store/ledger/evaluate/", "store/evaluations/"):
                store.delete_prefix(prefix)
            ends.append(server.run_command(refuse, full_command=command))
            assert len(list(store.list("store/evaluations/"))) > 0
    assert ends == [0] * 200
