import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import method_digits
from benchmarks.arm_pages import compute_claims, render_cost
from benchmarks.arms import Measured, estimate_cost
from benchmarks.method_cifar10 import (
    BATCH,
    CLAIMS,
    FULL,
    FULL_ARMS,
    FULL_CONTRASTS,
    LINES,
    MAIN_ARMS,
    QUICK,
    RATES,
    Settings,
    choose_best,
    compute_cifar10_figures,
    make_cifar10_arms,
    render_cifar10_page,
    write_tables,
)
from benchmarks.polluted_pool import KNOWN_CLASSES
from ns.training.plan import plan_training

ROOT = Path(__file__).parents[2]
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def get_role(arm):
    return arm.experiment.get_student(arm.generation) if arm.generation else arm.experiment.teacher


def list_rates(arm, labeled):
    """The learning rate of each step of an arm."""
    plan = plan_training(get_role(arm), labeled)
    return [plan.lr_at(step) for step in range(plan.steps)]


@pytest.mark.parametrize("sizes", [FULL, QUICK])
def test_arms_need_arms_that_are_there_and_are_valid(sizes, tmp_path):
    arms = make_cifar10_arms(1, tmp_path, sizes, Settings())
    assert arms.keys() == {*MAIN_ARMS, *FULL_ARMS, *(f"T-{rate}" for rate in RATES)}
    assert estimate_cost(arms["S1-quiet"], sizes.labeled_images) == sizes.steps * BATCH
    for arm in arms.values():
        assert arm.experiment.seed == 1
        assert set(arm.needs) <= arms.keys()
    assert {name for pair in FULL_CONTRASTS.values() for name in pair} <= arms.keys()
    assert {name for points in LINES.values() for _, name in points} <= arms.keys()


@pytest.mark.parametrize(
    ("arms", "labeled", "first", "continued"),
    [
        (
            make_cifar10_arms(0, Path("tables"), FULL, Settings()),
            2_000,
            ["T", "S1", "S1-quiet", "S1-pool-4"],
            ["S1-longer", "S2", "T-longer"],
        ),
        (method_digits.make_digits_arms(0, Path("work")), 50, ["S1", "S1-quiet", "C1", "S1-pool-4"], ["S1-longer", "S2", "C2"]),
    ],
    ids=["cifar10", "digits"],
)
def test_arms_of_a_generation_have_equal_rates_and_images_at_every_step(arms, labeled, first, continued):
    for names in (first, continued):
        rates = [list_rates(arms[name], labeled) for name in names]
        assert len({len(of_arm) for of_arm in rates}) == 1
        assert np.allclose(rates, rates[0], rtol=1e-12)
        images = {
            role.train.labeled_batch + (role.train.pseudo_batch if arms[name].labels else 0)
            for name in names
            for role in [get_role(arms[name])]
        }
        assert len(images) == 1
    # A continued arm begins its schedule again, up to the same peak.
    peaks = [max(list_rates(arms[name], labeled)) for name in (first[0], continued[0])]
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)


def test_students_differ_in_what_they_are_compared_by_alone(tmp_path):
    arms = make_cifar10_arms(0, tmp_path, FULL, Settings())

    def drop_suites(arm):
        return {**arm.document, "evaluation": {**arm.document["evaluation"], "suites": None}}

    assert drop_suites(arms["S2"]) == drop_suites(arms["S1-longer"])
    quiet = get_role(arms["S1-quiet"])
    assert quiet.model_copy(update={"noise": quiet.noise.model_copy(update={"pool": "same"})}) == get_role(arms["S1"])
    assert (arms["S2"].labels, arms["S1-longer"].labels, arms["S2"].start) == ("S1", "T", arms["S1-longer"].start)


def test_settings_decide_rates_and_labels_of_all_arms(tmp_path):
    arms = make_cifar10_arms(0, tmp_path, FULL, Settings(0.012, "hard", 0.8))
    assert {name: max(list_rates(arms[name], 2_000)) for name in MAIN_ARMS} == pytest.approx(
        dict.fromkeys(MAIN_ARMS, 0.012), rel=0.01
    )
    students = [arms[name].experiment for name in ("S1", "S1-quiet", "S1-longer", "S2")]
    assert {(one.selection.min_confidence, one.get_student(1).train.pseudo_labels) for one in students} == {(0.8, "hard")}
    # The arm of the settings that were chosen has the training of the main one.
    for chosen, main in (("T-0.012", "T"), ("S1-hard-0.8", "S1")):
        assert get_role(arms[chosen]) == get_role(arms[main])
        assert arms[chosen].experiment.selection == arms[main].experiment.selection


def test_choose_best_looks_at_heldout_errors():
    def measure(heldout, test):
        empty = np.zeros((1, 0, 0), np.uint8)
        return Measured({}, np.arange(100)[None] < heldout, np.arange(100)[None] < test, empty, empty, empty)

    assert choose_best({"a": measure(40, 10), "b": measure(20, 90), "c": measure(30, 50)}) == "b"


def test_page_shows_main_and_further_arms():
    rng = np.random.default_rng(0)

    def measure(error):
        wrong = rng.random((2, 300)) < error
        counts = [rng.binomial(3, error, (2, 40, 2)).astype(np.uint8)] * 3
        return Measured({"seeds": [{"cpu_seconds": 3600.0}] * 2}, wrong, wrong, *counts)

    arms = {name: measure(0.3) for name in MAIN_ARMS} | {"S1": measure(0.2), "S2": measure(0.1)}
    figures = compute_cifar10_figures(arms)
    assert figures["clean_error_reduction_over_control"].value == pytest.approx(0.67, abs=0.1)
    result = {
        "command": "make",
        "sizes": FULL._asdict(),
        "seeds": [0, 1],
        "settings": Settings(0.012, "hard", 0.8)._asdict(),
        "tried": {"T-0.012": 0.25},
        "claims": compute_claims(arms, CLAIMS),
        "intervals": {name: contrast._asdict() for name, contrast in figures.items()},
        "further": {"wider": figures["clean_error_reduction"]._asdict()},
        "machine": {"cpu": "any", "torch": "2"},
    }
    text = render_cifar10_page(result, arms, {"S1-wide": measure(0.2)}, render_cost(arms.values(), result))
    assert "a peak rate of 0.012, hard labels above a confidence of 0.8. Its held-out errors: T-0.012 25.0 %." in text
    assert (
        "12.0 hours of a processor, 6 h 00 min on 2 cores (any), interrupted tries not counted; torch 2. Made by `make`."
        in text
    )
    assert "| S1-wide | S1, 1.5 times as wide, as many steps |" in text
    assert "| pool | S1 against T | errors, points |" in text


def test_write_tables_draws_parts_without_overlap(tmp_path):
    for part, count in (("train", 100), ("test", 12)):
        for name in CLASSES:
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                (tmp_path / part / name / f"{number}.jpg").touch()
    write_tables(tmp_path, 3, QUICK, full=True)

    def read_paths(name):
        return [row.partition(",")[0] for row in (tmp_path / f"{name}.csv").read_text().splitlines()[1:]]

    parts = [read_paths(f"{part}-3") for part in ("labeled", "heldout", "pool")]
    assert [len(part) for part in parts] == [200, 200, 600]
    assert len(set().union(*parts)) == 1000
    assert len(read_paths("test")) == 10 * QUICK.test
    assert [len(read_paths(f"pool-{share}-3")) for share in (4, 16)] == [150, 38]
    assert set(read_paths("pool-16-3")) < set(read_paths("pool-3"))
    known = read_paths("known-pool-3")
    assert {Path(path).parent.name for path in known} == set(KNOWN_CLASSES)
    polluted = read_paths("polluted-3")
    assert polluted[: len(known)] == known
    assert len(polluted) == 2 * len(known)
    assert all(Path(path).exists() for path in polluted)


@pytest.mark.data
@pytest.mark.long
def test_quick_experiment_writes_its_results(cifar10, tmp_path):
    command = [sys.executable, "-m", "benchmarks.method_cifar10", "--quick", "--seeds", "0", "--images", str(cifar10)]
    places = ["--work", str(tmp_path / "work"), "--results", str(tmp_path)]
    subprocess.run([*command, *places], cwd=ROOT, check=True, capture_output=True)
    result = json.loads((tmp_path / "method_cifar10.json").read_text())
    assert result["figures"].keys() >= {"clean_error_reduction_over_control", "mce_reduction_over_control", "teacher_error"}
    assert result["claims"].keys() == {"pool", "iteration", "noise", "robustness"}
    assert "| S1-longer | S1, continued on T's labels |" in (tmp_path / "method_cifar10.md").read_text()
    assert "<svg" in (tmp_path / "method_cifar10.svg").read_text()
