import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks import method_cifar10
from benchmarks.method_cifar10 import (
    FULL,
    QUICK,
    compute_seed_figures,
    make_control_experiment,
    make_method_experiment,
    mean_interval,
    paired_interval,
)
from ns.config.schema import Experiment

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("sizes", [FULL, QUICK])
def test_experiments_are_valid(sizes, tmp_path):
    document = make_method_experiment(1, tmp_path, sizes)
    for one in (document, make_control_experiment(document, "store/models/teacher")):
        assert Experiment.model_validate(yaml.safe_load(yaml.safe_dump(one))).seed == 1


def test_control_has_steps_and_images_of_all_students(tmp_path):
    document = make_method_experiment(0, tmp_path, FULL)
    student, control = document["students"][0]["train"], make_control_experiment(document, "teacher")["teacher"]["train"]
    labeled = 10 * FULL.labeled
    assert control["labeled_batch"] == student["labeled_batch"] * (1 + student["unlabeled_ratio"])
    steps = method_cifar10.GENERATIONS * student["epochs"] * labeled / student["labeled_batch"]
    assert control["epochs"] * labeled / control["labeled_batch"] == pytest.approx(steps)
    assert control["optimizer"]["warmup_epochs"] / control["epochs"] == pytest.approx(
        student["optimizer"]["warmup_epochs"] / student["epochs"] / method_cifar10.GENERATIONS
    )


def test_mean_interval_is_students_t():
    # t(0.975, 2) = 4.3027; the standard deviation of 1, 2, 3 is 1.
    middle, half = mean_interval([1.0, 2.0, 3.0])
    assert (middle, half) == (2.0, pytest.approx(4.3027 / 3**0.5, abs=1e-4))
    assert mean_interval([5.0]) == (5.0, 0.0)


def test_paired_interval_is_narrower_than_an_unpaired_one():
    teacher = np.arange(1000) % 2 == 0
    student = teacher.copy()
    student[1:101:2] = True
    low, high = paired_interval(teacher, student)
    assert (low + high) / 2 == pytest.approx(0.05)
    assert high - low == pytest.approx(2 * 1.96 * (0.05 * 0.95 / 999) ** 0.5, rel=1e-3)


def test_compute_seed_figures():
    def model(error, mce, mfr, fgsm):
        return {"clean error": error, "mCE": mce, "mFR": mfr, "fgsm-1": fgsm, "fgsm-2": fgsm, "fgsm-4": fgsm}

    models = {
        "teacher": model(40.0, 100.0, 100.0, 20.0),
        "student 1": model(38.0, 97.0, 95.0, 21.0),
        "student 2": model(36.0, 94.0, 90.0, 23.0),
        "control": model(40.0, 100.0, 90.0, 20.0),
    }
    found = compute_seed_figures([models])
    assert found["clean_error_reduction"] == [pytest.approx(0.1)]
    assert found["mce_ratio"] == [pytest.approx(0.94)]
    assert found["mfr_ratio"] == [pytest.approx(0.9)]
    assert found["fgsm_gain"] == [pytest.approx(3.0)]
    assert found["clean_error_reduction_over_control"] == [pytest.approx(0.1)]
    assert found["mfr_ratio_over_control"] == [pytest.approx(1.0)]


@pytest.mark.data
@pytest.mark.long
def test_quick_experiment_writes_its_results(cifar10, tmp_path):
    command = [sys.executable, "-m", "benchmarks.method_cifar10", "--quick", "--images", str(cifar10)]
    places = ["--work", str(tmp_path / "work"), "--results", str(tmp_path)]
    subprocess.run([*command, *places], cwd=ROOT, check=True, capture_output=True)
    result = json.loads((tmp_path / "method_cifar10.json").read_text())
    # Of so small a teacher it is a matter of luck whether it wavers in every kind of sequence.
    assert result["figures"].keys() >= {"clean_error_reduction", "mce_ratio", "fgsm_gain", "fgsm_gain_over_control"}
    assert list(result["seeds"][0]["models"]) == ["teacher", "student 1", "student 2", "control"]
    assert "| clean error, % |" in (tmp_path / "method_cifar10.md").read_text()
