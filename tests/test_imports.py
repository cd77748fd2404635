"""What an import costs and what it drags in."""

import subprocess
import sys

import pytest

HEAVY = {"kfp", "kubernetes", "torch", "timm", "torchvision", "matplotlib", "sklearn", "docker", "components", "pipelines"}


def loaded(statement: str) -> set[str]:
    """Top-level modules that are loaded after `statement`, in a fresh process."""
    script = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split_batch())


@pytest.mark.parametrize("module", ["ns", "ns.cli.app", "ns.stages.steps", "ns.runs.records", "ns.config.schema"])
def test_light_modules_load_nothing_heavy(module):
    assert loaded(f"import {module}") & HEAVY == set()


def test_a_worker_needs_no_kubeflow():
    modules = loaded(
        "import ns.stages.steps, ns.training.runner, ns.labeling.predict, ns.evaluation.accuracy, ns.modeling.predictor, ns.reporting"
    )
    assert modules & {"kfp", "kubernetes", "docker", "components", "pipelines"} == set()
    assert "torch" in modules
