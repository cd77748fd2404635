"""`ns pipelines`: the compiled pipelines on Kubeflow."""

import json
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ns.cli.kubeflow import KubeContext, open_kubeflow
from ns.cli.options import AsJson, Kfp
from ns.cli.output import make_console, print_json, print_line

if TYPE_CHECKING:
    from k8s.kubectl import Kubectl

app = typer.Typer(no_args_is_help=True, help="The compiled pipelines on Kubeflow.")

PlacementInputs = Annotated[
    list[str] | None,
    typer.Option("--input", metavar="NAME=VALUE|@FILE", help="Field of the placement, or a JSON file of several. Repeatable."),
]


@app.callback()
def _make_group() -> None:
    """Makes a group of one command."""


@app.command("upload")
def upload(kfp: Kfp = None, context: KubeContext = None, inputs: PlacementInputs = None, as_json: AsJson = False) -> None:
    """Upload the pipelines of this checkout as the platform's newest versions; content that is there is not uploaded twice.

    Images, node pools, secrets and the store are those in the cluster's ConfigMap noisy-student-pools (with --context, or in the
    variable NS_PIPELINE_INPUTS), and what --input changes.

    Example: [cyan]ns pipelines upload --context my-cluster --input train_memory=32Gi[/]
    """
    from pipelines import PACKAGE
    from pipelines.kfp_client import parse_inputs
    from pipelines.placement import TEXT_FIELDS
    from pipelines.upload import INPUTS_VARIABLE, load_packages, upload_package

    with open_kubeflow(kfp, context, make_console(sys.stderr)) as access:
        text = _read_cluster_inputs(access.kubectl) if access.kubectl else os.environ.get(INPUTS_VARIABLE, "")
        source = "ConfigMap noisy-student-pools" if access.kubectl else INPUTS_VARIABLE
        changes = parse_inputs(PACKAGE.read_text(), inputs or (), TEXT_FIELDS)
        client = access.make_client()
        versions = [upload_package(client, package) for package in load_packages(text, source, changes)]
    if as_json:
        print_json({version.name: version.version for version in versions})
        return
    for version in versions:
        print_line(version.version)


def _read_cluster_inputs(kubectl: "Kubectl") -> str:
    from k8s.access import read_run_namespace

    config_map: dict[str, Any] = kubectl.get_object("configmap", "noisy-student-pools", read_run_namespace()) or {}
    return str((config_map.get("data") or {}).get("inputs.json") or json.dumps({}))
