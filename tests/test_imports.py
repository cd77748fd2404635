"""What an import costs and what it drags in."""

import os
import subprocess
import sys

import pytest

HEAVY = {"kfp", "kubernetes", "torch", "timm", "torchvision", "matplotlib", "sklearn", "docker", "components", "pipelines"}


STAGES = [f"ns.stages.{name}" for name in ("prepare", "train", "label", "select", "evaluate", "gate", "report", "train_worker")]


def loaded(statement: str) -> set[str]:
    """Top-level modules that are loaded after `statement`, in a fresh process."""
    script = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["ns", "ns.cli.app", "ns.runs.records", "ns.config.schema", *STAGES])
def test_import_of_light_modules_loads_nothing_heavy(module):
    assert loaded(f"import {module}") & HEAVY == set()


def test_import_of_the_method_needs_no_kubeflow():
    modules = loaded(
        "import ns.stages.train, ns.training.runner, ns.labeling.predict, ns.evaluation.accuracy, ns.modeling.predictor, ns.reporting"
    )
    assert modules & {"kfp", "kubernetes", "docker", "components", "pipelines"} == set()
    assert "torch" in modules


def test_import_leaves_the_environment_alone():
    script = "import os; before = dict(os.environ); import ns.cli.app, ns.training.runner; assert dict(os.environ) == before"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_stages_load_torch_with_openmp_set_to_sleep():
    script = "import os\nfrom ns.stages.context import announce_stage\nwith announce_stage('x', 0): print(os.environ['OMP_WAIT_POLICY'])"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "PASSIVE\n"
