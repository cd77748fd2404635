"""The digest that tags an image covers what enters it, and nothing else."""

import shutil
from pathlib import Path

import pytest

from images import build

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path):
    for name in (".dockerignore", "LICENSE", "README.md", "constraints.txt", "pyproject.toml"):
        shutil.copy(CHECKOUT / name, tmp_path)
    for name in ("images", "ns", "components", "pipelines", "k8s"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "code.py").write_text("x = 1\n")
    for name in ("__init__", "doctor", "kubectl", "versions"):
        (tmp_path / "k8s" / f"{name}.py").write_text("x = 1\n")
    return tmp_path


def test_tag_does_not_depend_on_the_folder(checkout, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "checkout"
    shutil.copytree(checkout, other)
    assert build.compute_tag(checkout, "worker", {}) == build.compute_tag(other, "worker", {})


@pytest.mark.parametrize(
    "name", ["ns/code.py", "pipelines/code.py", "images/code.py", "constraints.txt", "ns/new.py", "k8s/doctor.py"]
)
def test_tag_changes_with_files_of_the_image(checkout, name):
    before = build.compute_tag(checkout, "worker", {})
    (checkout / name).write_text("x = 2\n")
    assert build.compute_tag(checkout, "worker", {}) != before


@pytest.mark.parametrize("name", ["tests/test_x.py", "k8s/base/x.yaml", "docs/x.md", "ns/__pycache__/code.pyc", "CHANGELOG.md"])
def test_tag_does_not_change_with_other_files(checkout, name):
    before = build.compute_tag(checkout, "worker", {})
    (checkout / name).parent.mkdir(exist_ok=True)
    (checkout / name).write_text("x = 2\n")
    assert build.compute_tag(checkout, "worker", {}) == before


def test_tag_depends_on_target_and_arguments(checkout):
    tags = {
        build.compute_tag(checkout, target, arguments)
        for target in ("worker", "worker-cuda")
        for arguments in ({}, {"PYTHON": "python:3.12"}, {"CPU_INDEX": "python:3.12"})
    }
    assert len(tags) == 6


def test_main_prints_names_of_images(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["build.py", "--print", "--registry", "registry.test/team/", "worker", "tools"])
    assert build.main() == 0
    worker, tools = capsys.readouterr().out.split()
    assert worker == f"registry.test/team/noisy-student/worker:{build.compute_tag(CHECKOUT, 'worker', {})}"
    assert tools.startswith("registry.test/team/noisy-student/tools:")


def test_default_image_of_stages_is_the_local_one():
    from components import WORKER_IMAGE

    assert f"{build.IMAGE_PREFIX}/worker:{build.read_version(CHECKOUT)}" == WORKER_IMAGE


def test_dockerfile_targets_have_a_numbered_user_and_no_compiler():
    """Steps run as a numbered user in every image, and no image brings a compiler."""
    stages = (CHECKOUT / "images" / "Dockerfile").read_text().split("\nFROM ")
    for target in build.TARGETS:
        (stage,) = (text for text in stages if text.split("\n")[0].endswith(f" AS {target}"))
        assert "\nUSER 10001:10001\n" in stage
    assert not any(word in " ".join(stages) for word in ("gcc", "build-essential", "ENTRYPOINT ["))


def test_stages_without_gpus_see_none():
    # NVIDIA's runtime gives a container that names all devices all of them, whatever its pod asked for.
    lines = (CHECKOUT / "images" / "Dockerfile").read_text().splitlines()
    named = [line for line in lines if line.startswith("ENV") and "NVIDIA_VISIBLE_DEVICES" in line]
    assert named
    assert all("NVIDIA_VISIBLE_DEVICES=void" in line for line in named)
