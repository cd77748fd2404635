"""A real Prometheus scrapes a real run and one whose labeling hangs, with our rules, and answers every query of the dashboards; a real
Pushgateway keeps the run's summary. What Kubernetes and GPUs would show is made up here (MADE_UP): there are none."""

import copy
import http.server
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from ns.data.prepared import PreparedData
from ns.runs.records import list_stage_notes
from ns.runs.summary import summarize_run
from ns.storage import LocalStore
from tests.k8s.test_dashboards import PANELS
from tests.k8s.test_rules import RULES, own_metrics

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1200)]

SETTINGS = (
    "generations=1",
    "teacher.train.epochs=60",
    "students.0.train.epochs=20",
    "selection.min_confidence=0.2",
    "gate.min_gain=-1",
    "gate.max_churn=1",
    "evaluation.suites=[clean,corruptions,perturbations,attacks]",
    "evaluation.images=10",
    "evaluation.perturbation_frames=3",
    "evaluation.pgd_steps=[2]",
    "evaluation.corruptions=[gaussian_noise,brightness]",
    "evaluation.severities=[3]",
    "evaluation.perturbations=[translate]",
    "evaluation.fgsm_epsilons=[8]",
    "labeling.tasks=1",
)
OURS = 'namespace="kubeflow",label_app_kubernetes_io_part_of="noisy-student",label_app_kubernetes_io_component'
MADE_UP = f"""
kube_node_labels{{node="n0",label_noisy_student_pool="gpu-spot"}} 1
kube_node_labels{{node="n1",label_noisy_student_pool="gpu"}} 1
kube_node_status_allocatable{{node="n0",resource="nvidia_com_gpu"}} 8
kube_pod_labels{{{OURS}="train",pod="step"}} 1
kube_pod_labels{{{OURS}="label",pod="hung"}} 1
kube_pod_labels{{{OURS}="train",pod="waits"}} 1
kube_pod_status_phase{{namespace="kubeflow",pod="step",phase="Running"}} 1
kube_pod_status_phase{{namespace="kubeflow",pod="hung",phase="Running"}} 1
kube_pod_status_phase{{namespace="kubeflow",pod="waits",phase="Pending"}} 1
kube_pod_container_resource_limits{{namespace="kubeflow",pod="step",node="n1",resource="nvidia_com_gpu"}} 1
kube_pod_container_resource_limits{{namespace="kubeflow",pod="hung",node="n0",resource="nvidia_com_gpu"}} 1
container_memory_working_set_bytes{{namespace="kubeflow",pod="hung",container="main"}} 1e9
DCGM_FI_PROF_GR_ENGINE_ACTIVE{{namespace="kubeflow",pod="step",Hostname="n1",gpu="0"}} 0.9
DCGM_FI_PROF_GR_ENGINE_ACTIVE{{namespace="kubeflow",pod="hung",Hostname="n0",gpu="0"}} 0.02
DCGM_FI_PROF_PIPE_TENSOR_ACTIVE{{Hostname="n1",gpu="0"}} 0.4
DCGM_FI_DEV_FB_USED{{Hostname="n1",gpu="0"}} 1000
DCGM_FI_DEV_POWER_USAGE{{Hostname="n1",gpu="0"}} 300
"""
UNSEEN = "nst_label_churn_ratio"
"""A second generation would take twice the time for this one; tests/reporting/test_run_metrics.py has it."""
HANG = """
import sys
from ns.stages.context import RunRef
from ns.stages.label import label_shards
config_uri, root, run, data, teacher, *ranges = sys.argv[1:]
for shards in ranges:
    label_shards(RunRef(config_uri, root, run), data=data, generation=1, teacher=teacher, shards=shards)
"""
VARIABLES = {
    "$__rate_interval": "15s",
    "$namespace": ".*",
    "$run": ".*",
    "$spot_pools": ".*spot.*",
    "$spot_price": "1",
    "$price": "2.5",
}


class Watched:
    """A Prometheus that has seen it all."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.started = time.time()
        self.run: dict[str, Any] = {}

    def ask(self, expression: str) -> list[dict[str, Any]]:
        """Each series with its values, from the beginning until now."""
        span = {"query": expression, "start": self.started, "end": time.time(), "step": "1s"}
        with urllib.request.urlopen(f"{self.url}/api/v1/query_range", urllib.parse.urlencode(span).encode()) as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return found

    def values(self, expression: str) -> set[float]:
        return {float(value) for series in self.ask(expression) for _, value in series["values"]}


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_for(what: str, there: Callable[[], Any], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if there():
                return
        except OSError:
            pass
        time.sleep(0.2)
    pytest.fail(f"waited {seconds} s for {what}")


@contextmanager
def running(*command: str, log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | environment, start_new_session=True)
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def exporter(port: int) -> Iterator[None]:
    class MadeUp(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            with suppress(BrokenPipeError):  # a scrape that took too long
                self.wfile.write(MADE_UP.lstrip().encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), MadeUp)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield
    server.shutdown()
    server.server_close()


def configure(folder: Path, step: int, hung: int, others: int, gateway: int) -> None:
    """Every second, and a stall is one after seconds; everything else is what a cluster gets."""
    rules = copy.deepcopy(RULES)
    for group in rules["groups"]:
        group["interval"] = "1s"
        for rule in group["rules"]:
            if rule.get("alert") == "NstStalled":
                rule["expr"], rule["for"] = rule["expr"].replace("[5m]", "[5s]"), "30s"
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules))

    def job(name: str, targets: dict[str, int], **more: Any) -> dict[str, Any]:
        labels = {pod: {"namespace": "kubeflow", "pod": pod} if name.endswith("noisy-student") else {} for pod in targets}
        static = [{"targets": [f"127.0.0.1:{port}"], "labels": labels[pod]} for pod, port in targets.items()]
        return {"job_name": name, "static_configs": static, **more}

    jobs = [
        job("kubeflow/noisy-student", {"step": step, "hung": hung}),
        job("others", {"made up": others}, honor_labels=True),
        job("kubeflow/noisy-student-pushgateway", {"gateway": gateway}, honor_labels=True),
    ]
    often = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    (folder / "prometheus.yaml").write_text(
        yaml.safe_dump({"global": often, "rule_files": ["rules.yaml"], "scrape_configs": jobs})
    )


def copied(root: Path, target: Path) -> None:
    """What labeling needs of a root that is in use."""
    wanted = [root / "watched", root / "store" / "prepared", root / "store" / "datasets", root / "store" / "models"]
    for folder in wanted:
        if folder.exists():
            shutil.copytree(folder, target / folder.relative_to(root), ignore=shutil.ignore_patterns(".*", "*progress*"))


def hang_in_labeling(root: Path) -> list[str]:
    """Makes the last shard of the pool a file that nobody writes, as a store that does not answer. Returns what labels it."""
    store = LocalStore(root)
    notes = {(note.generation, note.stage): note for note in list_stage_notes(store, "watched")}
    data = notes[0, "prepare"].outputs["data"]
    folder, pool = PreparedData.load_file(store, data).pool.open_dataset(store)
    assert isinstance(folder, LocalStore)
    assert len(pool.shards) > 1
    last = folder.root / pool.shards[-1].name
    last.unlink()
    os.mkfifo(last)
    teacher = notes[1, "select"].outputs["teacher"].rpartition("/")[0]
    return [
        f"{store.uri}/watched/config.yaml",
        store.uri,
        "watched",
        data,
        teacher,
        f"0-{len(pool.shards) - 1}",
        f"0-{len(pool.shards)}",
    ]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    if not (shutil.which("prometheus") and shutil.which("prometheus-pushgateway")):
        pytest.skip("needs the packages prometheus and prometheus-pushgateway")
    folder = tmp_path_factory.mktemp("watched")
    root = folder / "root"
    web, step, hung, others, gateway = free_ports(5)
    configure(folder, step, hung, others, gateway)
    with ExitStack() as stack:

        def start(name: str, *command: str, **environment: str) -> subprocess.Popen[bytes]:
            return stack.enter_context(running(*command, log=folder / f"{name}.log", **environment))

        start(
            "gateway",
            "prometheus-pushgateway",
            f"--web.listen-address=127.0.0.1:{gateway}",
            # Debian's own is the machine's.
            f"--persistence.file={folder / 'pushed'}",
        )
        stack.enter_context(exporter(others))
        start(
            "prometheus",
            "prometheus",
            f"--config.file={folder / 'prometheus.yaml'}",
            f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{web}",
        )
        found = Watched(f"http://127.0.0.1:{web}")
        wait_for("Prometheus", lambda: found.ask("up"))
        run = start(
            "run",
            *(sys.executable, "-m", "ns", "run", "quickstart", "--run", "watched", "--root", str(root)),
            *(f"--set={setting}" for setting in SETTINGS),
            NS_METRICS_PORT=str(step),
            NS_METRICS_LINGER_SECONDS="3",
            NS_PUSHGATEWAY_URL=f"http://127.0.0.1:{gateway}",
        )
        log = folder / "run.log"
        labeled = root / "watched" / "stages" / "1-select.json"
        wait_for("the first label set", lambda: labeled.exists() or run.poll() is not None)
        assert labeled.exists(), log.read_text()
        copied(root, folder / "hung")
        start("hung", sys.executable, "-c", HANG, *hang_in_labeling(folder / "hung"), NS_METRICS_PORT=str(hung))
        wait_for("the end of the run", lambda: run.poll() is not None)
        assert run.returncode == 0, log.read_text()
        wait_for("the alert", lambda: found.ask('ALERTS{alertname="NstStalled", alertstate="firing"}'))
        wait_for("the summary", lambda: found.ask("nst_last_success_timestamp_seconds"))
        found.run = summarize_run(LocalStore(root), "watched").model_dump()
        yield found


def test_every_metric_is_set_by_a_stage(watched):
    assert {name for name in own_metrics() if not watched.ask(f"last_over_time({name}[10m])")} == {UNSEEN}


def test_metrics_equal_the_summary_of_the_run(watched):
    (generation,) = watched.run["generations"]
    of_run = '* on (namespace, pod) group_left (run_id) nst:pod:run{run_id="watched"}'
    assert watched.values(f'nst_loop_gain_ratio{{bound="value"}} {of_run}') == {generation["gain"]}
    assert watched.values('nst_pseudo_labels_total{outcome="kept"}') == {generation["kept"]}
    accuracies = {watched.run["teacher_top1"], generation["student_top1"]}
    assert watched.values('nst_eval_accuracy_ratio{split="heldout"}') <= accuracies
    assert generation["student_top1"] in watched.values('nst_eval_accuracy_ratio{split="heldout"}')
    assert watched.values("nst_gate_passed") == {1}
    assert {0, 1} <= watched.values("nst_generation")


def test_pushgateway_keeps_the_summary(watched):
    (series,) = watched.ask("nst_last_run_accuracy_ratio")
    assert series["metric"]["job"] == "noisy-student"
    assert series["metric"]["pipeline"] == "quickstart"
    assert float(series["values"][-1][1]) == watched.run["best_top1"]
    assert watched.values("nst_last_run_promotions") == {1}


def test_stalled_labeling_fires_the_only_alert(watched):
    (alert,) = watched.ask('ALERTS{alertstate="firing"}')
    found = {name: alert["metric"][name] for name in ("alertname", "namespace", "pod", "stage", "run_id")}
    wanted = {"alertname": "NstStalled", "namespace": "kubeflow", "pod": "hung", "stage": "label", "run_id": "watched"}
    assert found == wanted


def test_gpu_metrics_are_joined_with_the_run(watched):
    busy = {series["metric"]["pod"]: series for series in watched.ask('nst:run_gpu:active_ratio{run_id="watched"}')}
    assert {pod: float(series["values"][-1][1]) for pod, series in busy.items()} == {"step": 0.9, "hung": 0.02}
    pools = {series["metric"]["pool"] for series in watched.ask('nst:run_gpus:count{run_id="watched"}')}
    assert pools == {"gpu", "gpu-spot"}


@pytest.mark.parametrize(("dashboard", "title", "expression"), PANELS)
def test_dashboard_queries_return_data(watched, dashboard, title, expression):
    for variable, value in VARIABLES.items():
        expression = expression.replace(variable, value)
    expression = expression.replace("$__range", "600s")
    # Steps of a minute would fall between the pods of a run that takes one.
    expression = re.sub(r":(1m|30s)\]", ":1s]", expression)
    assert "$" not in expression
    values = watched.values(expression)
    assert bool([value for value in values if math.isfinite(value)]) == (UNSEEN not in expression), expression
