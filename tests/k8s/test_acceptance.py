"""The table of `make acceptance`, its choices, and what its checks conclude from a cluster that plays a part."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from k8s import acceptance
from k8s.acceptance import AcceptanceRecord, Check, Observation, Platform, SkippedCheck, choose_checks, format_rows, try_checks
from k8s.workflow import MAX_PACKED_BYTES, measure_workflow
from ns.core.errors import ConfigError, RunError
from ns.runs.records import write_stage_failure
from ns.stages.label import split_pool
from ns.stages.prepare import prepare_data
from ns.storage import LocalStore
from pipelines.kfp_client import SubmittedRun, UploadedPipeline
from tests.loop import open_tiny_run


class Cluster:
    """kubectl and Kubeflow's client at once. A run lives through `acts`, one per poll; what they do is what the checks see."""

    def __init__(self, tmp_path, *acts, state="SUCCEEDED"):
        self.root = LocalStore(tmp_path / "root")
        self.acts, self.state = acts, state
        self.objects = {"nodes": [{"metadata": {"name": "one"}, "spec": {}}], "pods": [], "workflows.argoproj.io": []}
        self.commands, self.terminated = [], False

    @property
    def platform(self):
        pipeline = UploadedPipeline("p", "v", "noisy-student", "noisy-student-0123456789ab")
        return Platform(self, "kubeflow", self, pipeline, "", self.root, "0123456789ab", lambda text: None)

    def list_objects(self, kind, namespace=None, selector=""):
        return self.objects.get(kind, [])

    def run_command(self, *arguments, **options):
        self.commands.append(arguments)
        return ""

    def create_run(self, pipeline, arguments, *, name, experiment, excluded_states):
        self.run, self.arguments = SubmittedRun("id", name, "PENDING", "http://ui/id", new=True), arguments
        return self.run

    def terminate_run(self, run_id):
        self.terminated = True
        self.state = "CANCELED"

    def wait_for_run(self, run_id, after_poll):
        for act in self.acts:
            act(self)
            after_poll()
        return self.run._replace(state=self.state)

    def make_prediction(self, *, pods=1, drivers=0, size_ratio=1):
        """A simulator that predicts these numbers, and a Workflow of `size_ratio` × the size of the one that is here."""

        def predict_run(package, shape):
            share = size_ratio * measure_workflow(self.objects["workflows.argoproj.io"][0]).packed_bytes / MAX_PACKED_BYTES
            return SimpleNamespace(pods=pods, drivers=drivers, nodes=["one"], share=share)

        return predict_run

    # Acts.

    def train(self, step, updated_at, checkpoint, tries=1):
        """A training has reached `step`, its newest checkpoint is of step `checkpoint`, and `tries` pods have worked on it."""
        root = LocalStore(self.root.root / "acceptance" / self.run.name)
        progress = {"training": "0-train", "step": step, "updated_at": f"2026-01-01T00:00:{updated_at:02}+00:00"}
        root.put(f"{self.run.name}/progress.json", json.dumps(progress).encode())
        root.put(f"store/checkpoints/abc/step-{checkpoint:08}-0123456789abcdef.safetensors", b"")
        nodes = {
            f"node-{number}": {
                "id": f"node-{number}",
                "type": "Pod",
                "name": f"run(0).root(0).teacher(0).executor({number})",
                "phase": "Failed" if number + 1 < tries else "Running",
                "startedAt": f"2026-01-01T00:00:{20 * number:02}Z",
            }
            for number in range(tries)
        }
        times = {"startedAt": "2026-01-01T00:00:00Z", "finishedAt": "2026-01-01T00:02:00Z"}
        self.objects["workflows.argoproj.io"] = [{"status": {"nodes": nodes, **times}}]
        self.objects["pods"] = [
            {
                "metadata": {
                    "name": f"pod-{tries - 1}",
                    "annotations": {"workflows.argoproj.io/node-id": f"node-{tries - 1}"},
                    "labels": {"pipeline/runid": "id"},
                },
                "spec": {"nodeName": "one"},
                "status": {"phase": "Running"},
            }
        ]


def training(*arguments, **options):
    return lambda cluster: cluster.train(*arguments, **options)


def try_one(cluster, name):
    record = try_checks(cluster.platform, [name], LocalStore(cluster.root.root / "kept"), "one.json")
    return record, {row.what: row for row in record.list_rows()}


# The choice.


def test_choice_keeps_the_order_of_the_checks():
    assert choose_checks(["terminated", "smoke"], []) == ["smoke", "terminated"]
    assert choose_checks([], ["many-tasks"]) == [name for name in acceptance.CHECKS if name != "many-tasks"]


def test_unknown_check_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"there is no check smok; there are smoke, reuse"):
        choose_checks([], ["smok"])


# Resuming.


@pytest.fixture
def played(monkeypatch):
    """Three checks of our own; each counts how often it was tried."""
    counts = dict.fromkeys(("good", "bad", "absent"), 0)

    def count_good(trial):
        counts["good"] += 1
        trial.add_row("it", "1", "1", ok=True)

    def count_bad(trial):
        counts["bad"] += 1
        raise RunError(f"{trial.run_name}: lost")

    def count_absent(trial):
        counts["absent"] += 1
        raise SkippedCheck("needs two nodes")

    checks = {"good": Check("", "", count_good), "bad": Check("", "", count_bad), "absent": Check("", "", count_absent)}
    monkeypatch.setattr(acceptance, "CHECKS", checks)
    return counts


def test_second_call_tries_what_is_missing_and_what_was_not_as_expected(tmp_path, played):
    platform, folder = Cluster(tmp_path).platform, LocalStore(tmp_path / "kept")
    first = try_checks(platform, ["good", "bad"], folder, "real.json")
    second = try_checks(platform, ["good", "bad", "absent"], folder, "real.json")
    assert played == {"good": 1, "bad": 2, "absent": 1}
    assert [row.ok for row in first.list_rows()] == [True, False]
    # A try that is repeated has a run of its own.
    assert "acceptance-bad-0123456789ab-0: lost" in first.list_rows()[1].seen
    assert "acceptance-bad-0123456789ab-1: lost" in second.list_rows()[1].seen
    assert AcceptanceRecord.load_file(folder, "real.json") == second


def test_all_is_tried_again_on_request_and_for_another_version(tmp_path, played):
    cluster, folder = Cluster(tmp_path), LocalStore(tmp_path / "kept")
    try_checks(cluster.platform, ["good"], folder, "real.json")
    try_checks(cluster.platform, ["good"], folder, "real.json", again=True)
    other = replace(cluster.platform, version="ba9876543210")
    try_checks(other, ["good"], folder, "real.json")
    assert played["good"] == 3


def test_interrupted_call_keeps_what_was_seen_before(tmp_path, played, monkeypatch):
    def interrupt(trial):
        raise KeyboardInterrupt

    monkeypatch.setitem(acceptance.CHECKS, "bad", Check("", "", interrupt))
    folder = LocalStore(tmp_path / "kept")
    with pytest.raises(KeyboardInterrupt):
        try_checks(Cluster(tmp_path).platform, ["good", "bad"], folder, "real.json")
    assert [row.check for row in AcceptanceRecord.load_file(folder, "real.json").list_rows()] == ["good"]


# The table.


def test_table_marks_what_differs_and_what_was_left_out(tmp_path, played):
    record = try_checks(Cluster(tmp_path).platform, ["good", "bad", "absent"], LocalStore(tmp_path / "kept"), "real.json")
    assert format_rows(record).splitlines() == [
        "    check   what       expected               seen",
        "ok  good    it         1                      1",
        "NO  bad     the check  ends without an error  acceptance-bad-0123456789ab-0: lost",
        "--  absent  left out                          needs two nodes",
    ]


# What the checks conclude.


def test_training_that_goes_on_from_its_checkpoint_after_its_pod_was_deleted(tmp_path):
    cluster = Cluster(tmp_path, training(40, 10, checkpoint=30), training(45, 12, 44, tries=2), training(60, 30, 44, tries=2))
    record, rows = try_one(cluster, "deleted-pod")
    assert cluster.commands == [("delete", "pod", "pod-0", "--namespace=kubeflow", "--wait=false")]
    assert rows["the second try goes on"].seen == "at step 60, after 40 with a checkpoint of 44"
    assert all(row.ok for row in record.list_rows())


def test_deleted_training_without_time_for_a_checkpoint_is_not_as_expected(tmp_path):
    cluster = Cluster(tmp_path, training(40, 10, checkpoint=30), training(40, 12, 30, tries=2), training(60, 30, 30, tries=2))
    _, rows = try_one(cluster, "deleted-pod")
    assert rows["the second try goes on"].ok
    assert (rows["steps that were lost"].seen, rows["steps that were lost"].ok) == ("10", False)


def test_training_that_begins_again_at_step_0_is_not_as_expected(tmp_path):
    cluster = Cluster(tmp_path, training(40, 10, checkpoint=30), training(3, 30, 30, tries=2))
    _, rows = try_one(cluster, "killed-trainer")
    assert not rows["the second try goes on"].ok
    assert rows["tries of its training"].ok
    assert "kill -9" in cluster.commands[0][-1]


def test_pod_is_hit_once_and_only_after_a_checkpoint(tmp_path):
    cluster = Cluster(tmp_path, training(5, 1, 0), training(40, 10, 30), training(41, 12, 30), state="FAILED")
    _, rows = try_one(cluster, "deleted-pod")
    assert len(cluster.commands) == 1
    assert not rows["the run"].ok
    assert rows["tries of its training"].seen == "1"


def test_node_takes_pods_again_even_if_the_run_is_lost(tmp_path):
    def lose(cluster):
        raise RunError("lost")

    cluster = Cluster(tmp_path, training(40, 10, checkpoint=30), lose)
    cluster.objects["nodes"] *= 2
    record, _ = try_one(cluster, "drained-node")
    assert [command[0] for command in cluster.commands] == ["cordon", "drain", "uncordon"]
    assert "--pod-selector=pipeline/runid=id" in cluster.commands[1]
    assert not record.checks["drained-node"].passed


def test_one_node_is_not_drained(tmp_path):
    record, rows = try_one(Cluster(tmp_path), "drained-node")
    assert not rows
    assert record.checks["drained-node"].skipped == "needs two nodes that take pods, and there is 1"


def test_run_of_many_tasks_has_as_many(tmp_path):
    ref = open_tiny_run(LocalStore(tmp_path), *(text for text in acceptance.LARGE if text.startswith(("labeling.", "data."))))
    assert len(split_pool(ref, data=prepare_data(ref))) == acceptance.LARGE_TASKS


def test_terminated_run_whose_pods_go(tmp_path, monkeypatch):
    monkeypatch.setattr(acceptance, "POLL_SECONDS", 0.02)

    def empty(cluster):
        cluster.objects["pods"] = []

    record, rows = try_one(Cluster(tmp_path, training(40, 10, 30), empty), "terminated")
    assert rows["state that the client tells"].seen == "canceled"
    assert record.checks["terminated"].passed


def test_pods_that_outlive_a_terminated_run(tmp_path, monkeypatch):
    monkeypatch.setattr(acceptance, "GONE_SECONDS", 0.05)
    monkeypatch.setattr(acceptance, "POLL_SECONDS", 0.02)
    _, rows = try_one(Cluster(tmp_path, training(40, 10, 30)), "terminated")
    assert not rows["its pods"].ok
    assert rows["its pods"].seen.startswith("1 left after")


def test_run_that_takes_too_long_is_terminated_and_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(acceptance, "RUN_SECONDS", -1.0)
    cluster = Cluster(tmp_path, training(40, 10, 30))
    _, rows = try_one(cluster, "smoke")
    assert cluster.terminated
    assert "had not ended after" in rows["the check"].seen


def test_reason_of_a_failed_stage_is_in_the_table(tmp_path, monkeypatch):
    def fail(cluster):
        root = LocalStore(cluster.root.root / "acceptance" / cluster.run.name)
        write_stage_failure(root, cluster.run.name, 1, "select", "no label is above 0.3", note_name="select")
        cluster.train(1, 1, 1)

    cluster = Cluster(tmp_path, fail, state="FAILED")
    monkeypatch.setattr(acceptance, "predict_run", cluster.make_prediction())
    _, rows = try_one(cluster, "smoke")
    assert rows["the run"].seen == "failed: generation 1: select: no label is above 0.3"


@pytest.mark.parametrize(
    ("predicted", "differing"),
    [
        ({}, set()),
        ({"pods": 3, "drivers": 2}, {"pods", "of which drivers"}),
        ({"size_ratio": 2}, {"its size, compressed"}),
    ],
)
def test_run_is_held_against_what_was_predicted_for_it(tmp_path, monkeypatch, predicted, differing):
    cluster = Cluster(tmp_path, training(40, 10, 30))
    monkeypatch.setattr(acceptance, "predict_run", cluster.make_prediction(**predicted))
    record, _ = try_one(cluster, "many-tasks")
    assert {row.what for row in record.list_rows() if not row.ok} == differing


def test_workflow_close_to_the_limit_is_not_as_expected(tmp_path, monkeypatch):
    cluster = Cluster(tmp_path, training(40, 10, 30))
    monkeypatch.setattr(acceptance, "predict_run", cluster.make_prediction())
    monkeypatch.setattr(acceptance, "MAX_SHARE", 0.0001)
    _, rows = try_one(cluster, "many-tasks")
    assert not rows["its size, compressed"].ok


def test_no_training_on_several_nodes_without_trainer(tmp_path):
    record, _ = try_one(Cluster(tmp_path), "several-nodes")
    assert record.checks["several-nodes"].skipped == "needs Kubeflow Trainer, and this cluster has no TrainJobs"


def test_train_job_that_outlives_its_run(tmp_path):
    def begin(cluster):
        cluster.objects[acceptance.TRAIN_JOBS] = [{"metadata": {"uid": "old"}}, {"metadata": {"uid": "ours"}}]

    cluster = Cluster(tmp_path, begin)
    cluster.objects["customresourcedefinitions"] = [{"metadata": {"name": acceptance.TRAIN_JOBS}}]
    cluster.objects[acceptance.TRAIN_JOBS] = [{"metadata": {"uid": "old"}}]
    _, rows = try_one(cluster, "several-nodes")
    assert rows["TrainJobs"].seen == rows["TrainJobs that outlive their run"].seen == "1"
    assert not rows["TrainJobs that outlive their run"].ok
    assert cluster.arguments["nodes"] == 2


def test_rows_are_read_back_as_they_were_written():
    row = Observation("smoke", "the run", "succeeded", "failed", ok=False)
    record = AcceptanceRecord(version="1", checks={"smoke": acceptance.CheckRecord(tries=1, rows=(row,))})
    assert AcceptanceRecord.model_validate_json(record.model_dump_json()).list_rows() == [row]
