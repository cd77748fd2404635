"""A newcomer's walk: the commands of the README and of the first hour, word for word and in their order, on images of their own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from tests.docs.test_docs import BLOCK, ROOT, commands

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]

# Of a size that is trained in seconds. The page's experiment stays what it is but for this.
SMALL = {
    "model": {"arch": "test_efficientnet", "resolution": 32, "inference_precision": "float32"},
    "train": {"labeled_batch": 40, "epochs": 30, "precision": "float32", "ema_decay": 0.98, "loader_workers": 0},
}
QUICKSTART_OPTIONS = ("--set=generations=1", "--set=teacher.train.epochs=60", "--set=students.0.train.epochs=20")
OPTIMIZER = {"name": "adamw", "lr": 0.01, "schedule": "cosine", "warmup_epochs": 2}


def write_images(folder: Path, labeled: int, pool: int, heldout: int) -> None:
    """Handwritten digits as PNGs, so small that none counts as nearly another: so many of each class in class folders, and loose ones."""
    digits = load_digits()
    left = {label: list(np.flatnonzero(digits.target == label)) for label in range(10)}

    def write(path: Path, index: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[index] * 15.9).astype(np.uint8)).resize((24, 24)).convert("RGB").save(path)

    for label, images in left.items():
        for part, count in (("labeled", labeled), ("heldout", heldout)):
            for _ in range(count):
                index = images.pop()
                write(folder / part / str(label) / f"{index}.png", index)
        for _ in range(pool):
            index = images.pop()
            write(folder / "pool" / f"{index}.png", index)


def experiment_of(page: Path) -> dict:
    """The page's own experiment, made small."""
    text = next(body for language, body in BLOCK.findall(page.read_text()) if language == "yaml" and "name: animals" in body)
    document = yaml.safe_load(text)
    document["generations"] = 1
    for role in (document["teacher"], *document["students"]):
        role.pop("preset", None)
        role["model"] = SMALL["model"]
        role["train"] = {**SMALL["train"], "optimizer": OPTIMIZER}
        role.setdefault("noise", {})["randaugment_magnitude"] = 4
    # So small a student may well be worse; the walk goes on with it.
    return {
        **document,
        "selection": {"min_confidence": 0.2, "per_class": 30},
        "labeling": {"tasks": 1},
        "gate": {"min_gain": -1},
    }


def walk(page: Path, folder: Path) -> None:
    """Does what the page says, line by line."""
    environment = {**os.environ, "BROWSER": "true", "XDG_CACHE_HOME": str(folder / "cache"), "COLUMNS": "200"}
    environment |= {f"GIT_{who}_{what}": "ada@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
    for words in commands(page.read_text()):
        if words == ["make", "run"]:
            words = ["ns", "run", "quickstart", *QUICKSTART_OPTIONS]
        # What else make does, containers and clusters have tests of their own.
        if words[0] != "ns" or {"docker", "kfp", "trigger", "watch"} & set(words):
            continue
        # The pages' animals-1a2b is the first of all runs; a name's digest says nothing of the order.
        begun = sorted((folder / "runs").glob("animals-*"), key=lambda run: (run / "config.yaml").stat().st_mtime_ns)
        words = [begun[0].name if word == "animals-1a2b" else word for word in words[1:]]
        if words[0] == "plan":
            words += ["--seconds", "5"]
        done = subprocess.run([sys.executable, "-m", "ns", *words], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{page.name}: ns {' '.join(words)}:\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize(
    ("page", "folder"), [("README.md", "images"), pytest.param("docs/quickstart.md", "photos", marks=pytest.mark.long)]
)
def test_every_command_of_a_page_works(tmp_path, page, folder):
    write_images(tmp_path / folder, labeled=8, pool=60, heldout=30)
    Image.open(next((tmp_path / folder / "pool").iterdir())).save(tmp_path / "photo.jpg")
    (tmp_path / "animals.yaml").write_text(yaml.safe_dump(experiment_of(ROOT / page)))
    walk(ROOT / page, tmp_path)
