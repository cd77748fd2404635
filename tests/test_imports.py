"""What an import costs and what it drags in."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ns.core.process import OPENMP_VARIABLES, OWN_CORES_SPINS

ROOT = Path(__file__).parents[1]

HEAVY = {
    "kfp",
    "kubernetes",
    "torch",
    "timm",
    "torchvision",
    "matplotlib",
    "sklearn",
    "docker",
    "pandas",
    "components",
    "pipelines",
}


STAGES = [f"ns.stages.{name}" for name in ("prepare", "train", "label", "select", "evaluate", "gate", "report", "train_worker")]


LIGHT = ("ns", "ns.cli.app", "ns.runs.records", "ns.config.schema", *STAGES)
METHOD = (
    "ns.stages.train",
    "ns.training.runner",
    "ns.labeling.predict",
    "ns.evaluation.accuracy",
    "ns.modeling.predictor",
    "ns.reporting",
)
# In one process, one after the other: what is heavy is seen with the first module that loads it.
SCRIPT = """
import importlib, os, sys

def load(module):
    known, before = set(sys.modules), dict(os.environ)
    importlib.import_module(module)
    # torch's compiler, which timm loads, sets variables of its own.
    assert module == "timm" or dict(os.environ) == before, module
    print(module, *sorted({name.partition(".")[0] for name in sys.modules.keys() - known}))

for module in sys.argv[1:]:
    load(module)
"""


def run_script(script: str, *arguments: str) -> str:
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """Module → top-level modules that are loaded with it, and were not by those before it. None changes the environment."""
    lines = [line.split() for line in run_script(SCRIPT, *LIGHT, "timm", *METHOD).splitlines()]
    return {module: set(names) for module, *names in lines}


@pytest.mark.integration
@pytest.mark.parametrize("module", LIGHT)
def test_import_of_light_modules_loads_nothing_heavy_and_leaves_the_environment_alone(loaded, module):
    assert loaded[module] & HEAVY == set()


@pytest.mark.integration
def test_import_of_the_method_needs_no_kubeflow_and_leaves_the_environment_alone(loaded):
    modules = set().union(*loaded.values())
    assert modules & {"kfp", "kubernetes", "docker", "components", "pipelines"} == set()
    assert "torch" in modules


@pytest.mark.integration
@pytest.mark.parametrize(
    ("call", "spins"),
    [
        ("from ns.stages.context import announce_stage\nwith announce_stage('x', 0): pass", "0"),
        ("from ns.cli.app import run_command_line\nrun_command_line(['config', 'show', 'quickstart'])", str(OWN_CORES_SPINS)),
    ],
    ids=["stage in a pod", "command line"],
)
def test_torch_is_loaded_with_openmp_set_to_sleep(call, spins):
    script = (
        f"import os, sys\n{call}\nprint(os.environ['OMP_WAIT_POLICY'], os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if name not in OPENMP_VARIABLES}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"PASSIVE {spins} False"


def list_k8s_imports(file: Path) -> set[str]:
    """Modules of k8s that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "k8s":
            names |= {node.module.partition(".")[2]} if "." in node.module else {alias.name for alias in node.names}
    return names


def test_wheel_and_images_have_what_the_package_imports_of_k8s():
    needed, found = {"__init__"}, set()
    for file in ROOT.glob("ns/**/*.py"):
        found |= list_k8s_imports(file)
    while found - needed:
        needed |= found
        found = {name for module in needed for name in list_k8s_imports(ROOT / "k8s" / f"{module}.py")}
    assert len(needed) > 5
    excluded = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]["exclude"]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line.removeprefix("!/") for line in excluded if line.startswith("!")} == {f"k8s/{name}.py" for name in needed}
    assert {line.removeprefix("!") for line in ignored if line.startswith("!k8s")} == {f"k8s/{name}.py" for name in needed}
