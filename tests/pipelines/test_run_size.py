"""What runs cost Kubeflow, held to what a real cluster did with an earlier package."""

import subprocess
from pathlib import Path

import pytest

from ns.config.schema import MAX_GENERATIONS, LabelingConfig
from pipelines import PACKAGE
from pipelines.placement import STAGE_RETRIES, Placement, render_package
from pipelines.run_size import LIMIT_BYTES, RunShape, count_generation_pods, predict_run

SEEN_REVISION = "1bf97b5"
"""The revision whose package was run on Kubeflow 2.17.0 with Argo 4.0.5."""


(MOST_TASKS,) = [rule.le for rule in LabelingConfig.model_fields["tasks"].metadata if hasattr(rule, "le")]
LARGEST = RunShape(MAX_GENERATIONS, MOST_TASKS)
"""The largest run that an experiment may ask for."""


@pytest.fixture(scope="module")
def package() -> str:
    return render_package(PACKAGE.read_text(), Placement())


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
    assert size.compressed_bytes == pytest.approx(143_000, rel=0.12)


def test_predict_run_adds_a_pod_and_a_node_per_retry(package):
    once, again = (predict_run(package, RunShape(retries=retries)) for retries in (0, 1))
    stages = once.pods - once.drivers
    assert (again.pods - once.pods, len(again.nodes) - len(once.nodes)) == (stages, stages)


def test_generation_stays_within_its_pods(package):
    generation = count_generation_pods(package, tasks=3)
    assert (generation.pods, generation.critical_drivers) == (15, 7)
    assert predict_run(package, RunShape(generations=1, tasks=3)).pods == 37


def test_predict_run_agrees_with_the_smoke_run_on_a_cluster():
    """Kubeflow 2.17.0 with Argo 4.0.5 ran this package. Another must be measured again (`make acceptance`), or this test deleted."""
    size = predict_run(render_package(PACKAGE.read_text(), Placement(), generations=1), RunShape())
    assert (size.pods, size.drivers, len(size.nodes)) == (17, 10, 59)
    assert size.status_bytes == pytest.approx(281_000, rel=0.03)
    # The measured package had no mount for MLflow's login in three stages.
    assert size.compressed_bytes == pytest.approx(22_100, rel=0.13)
    assert size.spec_bytes == pytest.approx(52_700, rel=0.07)


def test_largest_run_stays_well_below_the_limit(package):
    assert predict_run(package, LARGEST).share <= 0.6


def test_largest_run_that_an_experiment_may_ask_for_fits_with_every_retry(package):
    """So no run that starts is ended by Argo for its size: the limits of `labeling.tasks` and `generations` refuse what would not fit."""
    assert predict_run(package, LARGEST._replace(retries=STAGE_RETRIES)).share < 0.9


def test_smoke_run_is_told_in_full():
    """Above 1 MiB of status, KFP's API tells no tasks."""
    size = predict_run(render_package(PACKAGE.read_text(), Placement(), generations=1), RunShape())
    assert size.pods == 17
    assert size.status_bytes < 0.4 * LIMIT_BYTES
