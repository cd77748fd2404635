import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ns.cli.app import app, run_command_line
from ns.config.schema import EvaluationConfig
from ns.core.errors import DataError
from ns.data.dataset import Dataset
from ns.evaluation.offline import evaluate_dataset
from ns.evaluation.robustness.suite import RobustnessSuite
from ns.storage import LocalStore

QUICK = ["--set", "severities=[3]", "--set", "corruptions=[contrast]", "--set", "pgd_steps=[2]", "--batch", "16"]


@pytest.fixture
def places(make_model, make_labeled_images, tmp_path):
    make_model(tmp_path / "model")
    make_labeled_images(tmp_path / "images")
    return [str(tmp_path / "model"), str(tmp_path / "images")], ["--out", str(tmp_path / "out")]


def test_evaluate_command_prints_tables(places):
    arguments, out = places
    result = CliRunner().invoke(app, ["evaluate", *arguments, *out, *QUICK, "--suite", "corruptions", "--suite", "attacks"])
    assert result.exit_code == 0, result.output
    for shown in ("images", "unreadable", "top-1", "calibration error (ECE)", "contrast", "FGSM", "PGD", "class "):
        assert shown in result.stdout


def test_evaluate_command_json(places):
    arguments, out = places
    options = [*out, *QUICK, "--suite", "corruptions", "--images", "10", "--json"]
    document = json.loads(CliRunner().invoke(app, ["evaluate", *arguments, *options]).stdout)
    assert document["evaluation"]["subsample"] == {"images": 10, "seed": 0}
    assert document["robustness"]["subsample"] == {"images": 10, "seed": 0}
    assert list(document["robustness"]["corruptions"]) == ["contrast"]
    assert document["scores"]["mce"] is None
    folder = document["uri"].removeprefix("file://")
    path = str(next(Path(folder).rglob("robustness.json")))
    document = json.loads(CliRunner().invoke(app, ["evaluate", *arguments, *options, "--reference", path]).stdout)
    assert document["scores"]["mce"] == pytest.approx(100)
    assert document["scores"]["mce_relative_to"] == "reference"


def test_evaluate_command_on_published_set(make_model, tmp_path):
    make_model(tmp_path / "model", classes=tuple("0123456789"))
    (tmp_path / "ready").mkdir()
    np.save(tmp_path / "ready/labels.npy", np.tile(np.arange(10), 5))
    np.save(tmp_path / "ready/snow.npy", np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), np.uint8))
    arguments = [str(tmp_path / "model"), str(tmp_path / "ready"), "--kind", "cifar10-c", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["evaluate", *arguments])
    assert result.exit_code == 0, result.output
    assert "snow" in result.stdout
    assert run_command_line(["evaluate", *arguments, "--classes", "own"]) == 2


def test_evaluate_dataset_reuses_results(places, monkeypatch):
    arguments, out = places
    config = EvaluationConfig(suites=("attacks",), pgd_steps=(1,))
    first = evaluate_dataset(*arguments, out[1], config, batch=16)
    monkeypatch.setattr(RobustnessSuite, "run_suite", lambda *_: pytest.fail("done again"))
    assert evaluate_dataset(*arguments, out[1], config, batch=16) == first


def test_evaluate_dataset_scores_named_or_own_classes(make_model, make_labeled_images, tmp_path):
    make_model(tmp_path / "model")
    make_labeled_images(tmp_path / "images", classes=("b", "d"))
    place = [str(tmp_path / name) for name in ("model", "images", "out")]
    own, named = (
        evaluate_dataset(*place, EvaluationConfig(), batch=16, classes=classes).evaluation
        for classes in (("own",), ("d", "a", "b"))
    )
    assert (own.scored_classes, named.scored_classes) == (("b", "d"), ("a", "b", "d"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: [a[0], a[0]], "no dataset.json here; import the images first: ns data import SOURCE"),
        (lambda a: [*a, "--set", "severity=3"], "severity: unknown field; did you mean 'severities'?"),
        (lambda a: [*a, "--classes", "a,z"], "class 'z' is none of the model's"),
        (lambda a: ["nothing", a[1]], "no runs here"),
    ],
)
def test_evaluate_command_errors(places, change, message, capsys, tmp_path):
    arguments, out = places
    assert run_command_line(["evaluate", *change(arguments), *out, "--root", str(tmp_path / "runs")]) > 0
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_evaluate_dataset_refuses_unlabeled_dataset(places, make_labeled_images, tmp_path):
    arguments, out = places
    make_labeled_images(tmp_path / "plain", classes=("a",))
    folder = LocalStore(tmp_path / "plain")
    Dataset.load(folder).model_copy(update={"classes": (), "role": "unlabeled"}).save(folder)
    with pytest.raises(DataError, match="has no labels"):
        evaluate_dataset(arguments[0], str(tmp_path / "plain"), out[1], EvaluationConfig(), batch=16)
