"""The package as a wheel: complete, runs from anywhere, on the oldest and the newest Python."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

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


def test_wheel_works_in_an_environment_of_its_own(wheel, tmp_path):
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check", wheel)
    # The libraries of this environment, whose link to the checkout is not followed from a path.
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_paths()["purelib"]}
    where = run(python, "-c", "import ns, pipelines, sys; print(ns.__file__, pipelines.PACKAGE)", cwd=tmp_path, env=environment)
    assert all(path.startswith(str(tmp_path)) for path in where.split())
    ns = tmp_path / "venv" / "bin" / "ns"
    options = [
        "--set=generations=1",
        "--set=teacher.train.epochs=60",
        "--set=students.0.train.epochs=10",
        "--set=gate.min_gain=-1",
    ]
    output = run(ns, "run", "quickstart", *options, cwd=tmp_path, env=environment)
    assert "best model: runs/store/models/" in output
    assert list((tmp_path / "runs").glob("quickstart-*/report.html"))


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
