"""What a team does that begins with a pretrained model, few labels, MLflow and Label Studio: the whole way, on CIFAR-10 at 64 px."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import pytest
import yaml

from benchmarks.measure import draw_tables
from ns.config.loader import load_experiment
from ns.modeling.manifest import ModelManifest
from ns.runs.lifecycle import open_run
from ns.runs.lookup import open_run_label_set
from ns.runs.summary import summarize_run
from ns.stages.context import RunRef
from ns.stages.prepare import prepare_data
from ns.stages.train import train_generation
from ns.storage import LocalStore
from tests.mlflow_server import run_mlflow_server

pytestmark = [pytest.mark.integration, pytest.mark.data, pytest.mark.slow, pytest.mark.long]


class WalkSizes(NamedTuple):
    labeled: int
    """Images per class, here and in the next three."""
    pool: int
    heldout: int
    pretraining: int
    """Images per class that the pretrained model has seen; none of the others."""
    px: int
    epochs: float
    pretraining_epochs: float
    corrected: int
    """Images that a person labels in Label Studio."""


SHORT = WalkSizes(30, 30, 30, 60, px=32, epochs=12, pretraining_epochs=12, corrected=20)
LONG = WalkSizes(100, 900, 200, 1_000, px=64, epochs=8, pretraining_epochs=3, corrected=200)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with run_mlflow_server(tmp_path_factory.mktemp("mlflow")) as url:
        yield url


@pytest.mark.parametrize("sizes", [SHORT, LONG], ids=["short", "long"])
def test_walk_from_a_pretrained_model_to_a_registered_one(sizes, server, cifar10, tmp_path, monkeypatch):
    import mlflow  # takes a second, which no other test should wait for

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", f"walk-{sizes.px}")
    monkeypatch.chdir(tmp_path)
    images = extract_images(cifar10 / "train.tar.gz", tmp_path / "images", sizes)
    parts = {"labeled": sizes.labeled, "pool": sizes.pool, "heldout": sizes.heldout, "pretraining": sizes.pretraining}
    for part, table in draw_tables(images, parts, seed=0).items():
        (tmp_path / f"{part}.csv").write_text(table)

    # Weights as a hub would have them: of a training that has seen other images.
    experiment = make_experiment(sizes, labeled="pretraining.csv", weights=None)
    experiment["teacher"]["train"] = experiment["teacher"]["train"] | {"epochs": sizes.pretraining_epochs}
    (tmp_path / "pretrain.yaml").write_text(yaml.safe_dump(experiment | {"name": "pretrain"}))
    root = LocalStore(tmp_path / "runs")
    pretrained = root.at(train_alone(root, tmp_path / "pretrain.yaml"))
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(pretrained.get(ModelManifest.load(pretrained).weights_key))

    # The run, with MLflow and the baseline.
    experiment = make_experiment(sizes, labeled="labeled.csv", weights=str(weights)) | {"baseline": "labeled_only"}
    (tmp_path / "walk.yaml").write_text(yaml.safe_dump(experiment))
    run_ns("run", "walk.yaml", "--run", "first")
    client = mlflow.MlflowClient(server)
    first = list_mlflow_runs(client, sizes)
    assert set(first) == {"first", "teacher", "student-1", "labeled-only"}
    assert {run.info.status for run in first.values()} == {"FINISHED"}
    assert first["first"].data.params["teacher.model.pretrained"] == str(weights)
    summary = summarize_run(root, "first")
    assert first["first"].data.metrics["heldout_top1"] == pytest.approx(summary.generations[0].student_top1)
    assert {file.path for file in client.list_artifacts(first["first"].info.run_id)} == {"config.yaml", "report.html"}
    assert "Labeled images only" in (tmp_path / "runs/first/report.html").read_text()
    steps = {metric.step for metric in client.get_metric_history(first["student-1"].info.run_id, "loss")}
    assert max(steps) == ModelManifest.load(root.at(summary.generations[0].model)).steps

    # A person corrects in Label Studio what the teacher knows least, and a label set for a second run comes back.
    run_ns("labels", "next", "first/gen-1", "--count", str(sizes.corrected), "--out", "to-label")
    (tasks_file,) = [path for path in (tmp_path / "to-label").rglob("*.json") if isinstance(json.loads(path.read_text()), list)]
    tasks = json.loads(tasks_file.read_text())
    assert len(tasks) == sizes.corrected
    truth = {f"{path.parent.name}/{path.stem}": path.parent.name for path in images.rglob("*.jpg")}
    for task in tasks:
        answer = dict(task["predictions"][0]["result"][0], value={"choices": [find_truth(task["data"]["key"], truth)]})
        task["annotations"] = [{"result": [answer], "was_cancelled": False, "updated_at": "2026-01-01T00:00:00Z"}]
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    labels = open_run_label_set(root, "first", 1)
    pool_store, _ = labels.open_pool(root)
    (tmp_path / "classes.txt").write_text("\n".join(labels.label_set.classes))
    run_ns("labels", "import", "export.json", str(pool_store.root), "corrected", "--classes", "classes.txt", "--source", "Ada")
    experiment |= {"labeling": {"label_set": "corrected"}}
    (tmp_path / "second.yaml").write_text(yaml.safe_dump(experiment))
    run_ns("run", "second.yaml", "--run", "second")
    second = open_run_label_set(root, "second", 1)
    assert second.label_set.rows - second.label_set.left_out == sizes.corrected
    assert "imported from" in (tmp_path / "runs/second/report.html").read_text()

    # The model in use.
    answer = json.loads(run_ns("promote", "first", "--to", "production.yaml", "--json"))
    assert answer["mlflow_version"] == "1"
    assert json.loads(run_ns("promote", "first", "--to", "production.yaml", "--json"))["mlflow_version"] == "1"
    version = client.get_model_version_by_alias(f"walk-{sizes.px}", "production")
    model = Path(mlflow.artifacts.download_artifacts(f"models:/walk-{sizes.px}/{version.version}", tracking_uri=server))
    signature = mlflow.models.Model.load(model).signature
    assert [tuple(spec.shape) for spec in signature.inputs.inputs] == [(-1, sizes.px, sizes.px, 3)]
    session = onnxruntime.InferenceSession(model / "model.onnx")
    (logits,) = session.run(None, {signature.inputs.inputs[0].name: np.zeros((2, sizes.px, sizes.px, 3), np.uint8)})
    assert logits.shape == (2, 10)
    assert not [path for path in model.rglob("*") if path.suffix in (".pkl", ".pth", ".pt")]


def extract_images(archive: Path, folder: Path, sizes: WalkSizes) -> Path:
    """Class folders with as many images as the walk needs."""
    needed = sizes.labeled + sizes.pool + sizes.heldout + sizes.pretraining
    counts: dict[str, int] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if not member.isfile() or not member.name.lower().endswith((".png", ".jpg", ".jpeg")):
                continue
            name = Path(member.name).parent.name
            if counts.get(name, 0) < needed:
                counts[name] = counts.get(name, 0) + 1
                target = folder / name / f"{counts[name]:05d}{Path(member.name).suffix}"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(tar.extractfile(member).read())
            elif len(counts) == 10 and min(counts.values()) == needed:
                break
    return folder


def make_experiment(sizes: WalkSizes, *, labeled: str, weights: str | None) -> dict:
    role = {
        "model": {
            "arch": "test_efficientnet",
            "resolution": sizes.px,
            "crop": "pad",
            "reduce_stride": 2,
            "inference_precision": "float32",
        },
        "noise": {"randaugment_magnitude": 4, "dropout": 0.1, "stochastic_depth": 0.1},
        "train": {
            "precision": "float32",
            "labeled_batch": 50,
            "epochs": sizes.epochs,
            "unlabeled_ratio": 2,
            "ema_decay": 0.99,
            "optimizer": {"name": "adamw", "lr": 0.005, "weight_decay": 0.05, "schedule": "cosine", "warmup_epochs": 1},
        },
    }
    if weights:
        role["model"]["pretrained"] = weights
    return {
        "name": f"walk-{sizes.px}",
        "generations": 1,
        "data": {"labeled": labeled, "pool": "pool.csv", "heldout": "heldout.csv"},
        "teacher": role,
        "students": [role],
        "selection": {"min_confidence": 0.1},
        # The short form has no time to get better.
        "gate": {"min_gain": -0.9},
    }


def train_alone(root: LocalStore, config: Path) -> str:
    """Trains the first teacher of an experiment, and nothing else. Returns the key of its folder."""
    open_run(root, "pretrain", load_experiment(str(config)), "test")
    ref = RunRef.from_uri(root.at("pretrain").uri)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI")
        return train_generation(ref, data=prepare_data(ref), generation=0)


def find_truth(key: str, truth: dict[str, str]) -> str:
    return next(name for stem, name in truth.items() if key.endswith(stem) or stem in key)


def list_mlflow_runs(client, sizes):
    experiment = client.get_experiment_by_name(f"walk-{sizes.px}")
    return {run.data.tags["mlflow.runName"]: run for run in client.search_runs([experiment.experiment_id])}


def run_ns(*arguments: str) -> str:
    """Runs a command; returns its standard output."""
    done = subprocess.run([sys.executable, "-m", "ns", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
