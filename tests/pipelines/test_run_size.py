"""What runs cost Kubeflow, held to what a real cluster did with an earlier package."""

import subprocess
from pathlib import Path

import pytest

from ns.config.schema import MAX_GENERATIONS, LabelingConfig
from pipelines import PACKAGE
from pipelines.run_size import LIMIT_BYTES, RunShape, count_generation_pods, predict_run

SEEN_REVISION = "1bf97b5"
"""The revision whose package was run on Kubeflow 2.17.0 with Argo 4.0.5."""


@pytest.fixture(scope="module")
def seen_package() -> str:
    show = ["git", "show", f"{SEEN_REVISION}:pipelines/noisy_student.yaml"]
    done = subprocess.run(show, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the history of this checkout does not reach back to {SEEN_REVISION}")
    return done.stdout


def test_predict_run_agrees_with_a_failed_run_on_a_cluster(seen_package):
    size = predict_run(seen_package, RunShape(generations=1, tasks=1, failed_task="commit-labels"))
    assert (size.pods, len(size.nodes)) == (28, 116)
    assert size.status_bytes == pytest.approx(714_000, rel=0.02)


def test_predict_run_agrees_with_a_whole_run_on_a_cluster(seen_package):
    """Three labeling tasks were asked for; the pool has two shards."""
    size = predict_run(seen_package, RunShape(generations=1, tasks=2))
    assert (size.pods, size.drivers, len(size.nodes)) == (56, 39, 192)
    assert size.status_bytes == pytest.approx(1_372_000, rel=0.02)
    assert size.compressed_bytes == pytest.approx(143_000, rel=0.02)


def test_predict_run_adds_a_pod_and_a_node_per_retry():
    once, again = (predict_run(PACKAGE.read_text(), RunShape(retries=retries)) for retries in (0, 1))
    stages = once.pods - once.drivers
    assert (again.pods - once.pods, len(again.nodes) - len(once.nodes)) == (stages, stages)


def test_generation_stays_within_its_pods():
    generation = count_generation_pods(PACKAGE.read_text(), tasks=3)
    assert (generation.pods, generation.critical_drivers) == (18, 8)
    assert predict_run(PACKAGE.read_text(), RunShape(generations=1, tasks=3)).pods == 40


def test_largest_run_that_an_experiment_may_ask_for_fits():
    """So no run that starts is ended by Argo for its size: the limit of `labeling.tasks` refuses what would not fit."""
    (limit,) = [rule.le for rule in LabelingConfig.model_fields["tasks"].metadata if hasattr(rule, "le")]
    assert predict_run(PACKAGE.read_text(), RunShape(generations=MAX_GENERATIONS, tasks=limit)).share < 1


def test_smoke_run_is_told_in_full():
    """Above 1 MiB of status, KFP's API tells no tasks."""
    assert predict_run(PACKAGE.read_text(), RunShape()).status_bytes < LIMIT_BYTES
