"""The package as a wheel: complete, runs from anywhere, on the oldest and the newest Python."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from benchmarks.walk import SHORT_HOURS, Walk, go_first_hour, install_wheel

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
PYTHONS = ("python3.14", "python3.13", "python3.12", "python3.11")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT)
    (path,) = folder.glob("*.whl")
    return path


def run(*command, **options) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=800, **options)
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def find_newest_python() -> str:
    """The newest Python of this machine that the package is for; pyenv's count, too."""
    for name in PYTHONS:
        versions = sorted(Path.home().glob(f".pyenv/versions/{name.removeprefix('python')}*/bin/{name}"))
        if versions or shutil.which(name):
            return str(versions[-1]) if versions else str(shutil.which(name))
    return sys.executable


def test_wheel_has_all_that_the_package_reads(wheel):
    tracked = run("git", "-C", ROOT, "ls-files", "ns", "components", "pipelines").splitlines()
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert [name for name in tracked if name not in names] == []
    assert {"ns/config/presets/quickstart.yaml", "pipelines/noisy_student.yaml", "ns/py.typed"} <= names
    assert not any(name.startswith(("tests/", "k8s/components/", "k8s/vendor/", "docs/")) for name in names)


def test_first_hour_works_with_the_wheel_alone(wheel, tmp_path):
    """The short form of `python -m benchmarks.walk`: from an environment of its own to an export."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    walk = Walk(tmp_path, environment)
    install_wheel(walk, wheel, tmp_path / ".venv", with_libraries=False)
    python = tmp_path / ".venv" / "bin" / "python"
    where = run(python, "-c", "import ns, pipelines, sys; print(ns.__file__, pipelines.PACKAGE)", cwd=tmp_path, env=environment)
    assert all(path.startswith(str(tmp_path)) for path in where.split())
    go_first_hour(walk, tmp_path, 64, hours=SHORT_HOURS, is_short=True)
    assert [name for name, *_ in walk.steps][2:] == [
        "first experiment",
        "check",
        "estimate",
        "run",
        "report",
        "predict",
        "export",
    ]
    assert (tmp_path / "export64" / "README.md").exists()
    assert list((tmp_path / "runs").glob("digits64-*/report.html"))


def test_newest_python_compiles_it(wheel, tmp_path):
    """A syntax or an import of the standard library that another version does not have."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    python = find_newest_python()
    run(python, "-W", "error", "-m", "compileall", "-q", tmp_path)
    script = (
        "import ast, pathlib, sys\n"
        "modules = {(node.module or '') if isinstance(node, ast.ImportFrom) else alias.name\n"
        "           for path in pathlib.Path('.').rglob('*.py') for node in ast.walk(ast.parse(path.read_text()))\n"
        "           if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, 'level', 0) for alias in node.names}\n"
        "import importlib.util\n"
        "for module in sorted(modules):\n"
        "    if module.partition('.')[0] in sys.stdlib_module_names:\n"
        "        assert importlib.util.find_spec(module), module\n"
    )
    run(python, "-c", script, cwd=tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("version", ["3.11", "3.14"])
def test_pins_have_wheels_for_the_oldest_and_the_newest_python(wheel, tmp_path, version):
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"] == ">=3.11"
    options = ["--dry-run", "--ignore-installed", "--only-binary=:all:", "--python-version", version, "--target", tmp_path]
    run(sys.executable, "-m", "pip", "install", "--quiet", *options, "--constraint", ROOT / "constraints.txt", wheel)
