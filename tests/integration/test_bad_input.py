"""Bad input gets one line that says what is wrong, and leaves what was there before."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

pytestmark = pytest.mark.integration

NS = [sys.executable, "-m", "ns"]
TINY = {
    "model": {"arch": "test_efficientnet", "resolution": 32, "crop": "pad", "inference_precision": "float32"},
    "train": {
        "precision": "float32",
        "labeled_batch": 24,
        "epochs": 40,
        "unlabeled_ratio": 1,
        "ema_decay": 0.9,
        "optimizer": {"name": "adamw", "lr": 0.05, "warmup_epochs": 1, "schedule": "cosine"},
    },
    # Classes are colors, and some of RandAugment's operations turn one into another.
    "noise": {"randaugment_layers": 0},
}


def picture(label: int, rng: np.random.Generator) -> bytes:
    """A class is a color, so that a few steps learn it."""
    pixels = rng.integers(0, 60, (16, 16, 3), np.uint8)
    pixels[..., label] += 180
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def images(tmp_path) -> Path:
    """`labeled/`, `heldout/` with class folders, `pool/` with loose images."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    for part, count in (("labeled", 8), ("heldout", 20)):
        for label, name in enumerate(("blue", "green", "red")):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                (folder / part / name / f"{index}.png").write_bytes(picture(label, rng))
    (folder / "pool").mkdir()
    for index in range(60):
        (folder / "pool" / f"{index}.png").write_bytes(picture(index % 3, rng))
    return folder


@pytest.fixture
def experiment(tmp_path, images) -> Path:
    document = {
        "name": "colors",
        "generations": 1,
        "data": {part: str(images / part) for part in ("labeled", "pool", "heldout")},
        "teacher": TINY,
        "students": [TINY],
        "selection": {"per_class": 20, "min_confidence": 0.0},
        "labeling": {"tasks": 1},
        "gate": {"min_gain": -1},
    }
    path = tmp_path / "colors.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def ns(*arguments: object, root: Path) -> subprocess.CompletedProcess:
    command = [*NS, *map(str, arguments), "--root", str(root)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def error_of(done: subprocess.CompletedProcess) -> str:
    """The one line that says what is wrong."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


def test_run_names_bad_images_and_runs_once_they_are_fixed(tmp_path, experiment, images):
    whole = (images / "pool" / "7.png").read_bytes()
    (images / "pool" / "7.png").write_bytes(whole[: len(whole) // 2])
    (images / "labeled" / "yellow").mkdir()
    root = tmp_path / "runs"
    refused = ns("run", experiment, "--set", "data.max_rejected_share=0.01", root=root)
    assert refused.returncode == 3
    assert "class folder 'yellow' has no images; add some, or remove the folder" in error_of(refused)
    (images / "labeled" / "yellow").rmdir()
    refused = ns("run", experiment, "--set", "data.max_rejected_share=0.01", root=root)
    assert refused.returncode == 3
    assert "pool: 1 of 60 files cannot be read (1 truncated)" in error_of(refused)
    assert "7.png: truncated" in error_of(refused)
    allowed = ns("run", experiment, root=root)
    assert allowed.returncode == 0, allowed.stderr
    assert "59 in the pool" in allowed.stderr
    assert "7.png" in allowed.stderr
    predicted = ns("predict", images / "heldout" / "red" / "0.png", images / "pool" / "7.png", root=root)
    assert predicted.returncode == 3
    assert predicted.stdout.startswith(str(images / "heldout" / "red" / "0.png"))
    assert f"{images / 'pool' / '7.png'}: truncated" in predicted.stderr


def test_run_refuses_a_config_typo_before_writing(tmp_path, experiment):
    experiment.write_text(experiment.read_text().replace("min_gain", "min_gian"))
    done = ns("run", experiment, root=tmp_path / "runs")
    assert done.returncode == 2
    assert error_of(done).endswith("gate.min_gian: unknown field; did you mean 'min_gain'?")
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def small_disk(tmp_path):
    """The mount point of a file system of 3 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True).returncode
    ):
        pytest.skip("needs the right to mount a small file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_run_names_a_read_only_folder(experiment, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = ns("run", experiment, root=small_disk / "runs")
    assert done.returncode in (4, 6)
    assert "read-only" in error_of(done).lower()
    assert str(small_disk) in error_of(done)


def test_run_names_a_full_disk_and_keeps_earlier_results(experiment, small_disk):
    root = small_disk / "runs"
    first = ns("run", experiment, root=root)
    assert first.returncode == 0, first.stderr
    before = ns("runs", "show", "latest", "--json", root=root).stdout
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "ballast").write_bytes(b"x" * max(0, free - 200_000))
    done = ns("run", experiment, "--set", "seed=1", root=root)
    assert done.returncode == 4, done.stderr
    assert "the disk is full" in error_of(done)
    name = json.loads(before)["run"]
    assert ns("runs", "show", name, "--json", root=root).stdout == before
    (small_disk / "ballast").unlink()
