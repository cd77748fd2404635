"""`python -m k8s …`, as the Makefile's targets call it."""

import json
import shutil
import subprocess
import sys
import time
import webbrowser
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from k8s.deploy import (
    KIND_CONTEXT_PREFIX,
    UI_PORT,
    UI_SERVICE,
    Ask,
    DeployOptions,
    choose_target,
    deploy_overlay,
    diff_overlay,
    fetch_status,
    undeploy_overlay,
)
from k8s.kubectl import Kubectl
from ns.cli.doctor import print_diagnostics
from ns.cli.options import AsJson, make_program
from ns.core.errors import ClusterError

CLUSTER = "noisy-student"
KIND_FILE = Path(__file__).with_name("kind.yaml")

app = make_program("The platform on a Kubernetes cluster.")

Overlay = Annotated[str, typer.Option(help="Overlay in k8s/overlays, or a folder. Default: the deployed one, or kind or dev.")]
Context = Annotated[str, typer.Option(help="Context of the kubeconfig. Default: the current one, after a question.")]
Registry = Annotated[str, typer.Option(help="Registry to push images to, as registry.example/team.")]
Image = Annotated[list[str] | None, typer.Option(help="Full name of an existing image; builds none. Repeatable.")]
Worker = Annotated[
    str,
    typer.Option(help="Image of the stages. Default: worker on local clusters, worker-cuda on others."),
]
Without = Annotated[list[str] | None, typer.Option(help="Part of the overlay to leave out: cluster or kubeflow. Repeatable.")]
Build = Annotated[list[str] | None, typer.Option(help="Option for images/build.py, as --build=--python=…. Repeatable.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing.")]


@app.command()
def deploy(
    overlay: Overlay = "",
    context: Context = "",
    registry: Registry = "",
    image: Image = None,
    worker: Worker = "",
    without: Without = None,
    build: Build = None,
    yes: Yes = False,
    preflight: Annotated[bool, typer.Option(help="Check the cluster first (ns doctor cluster).")] = True,
    smoke: Annotated[bool, typer.Option(help="Run the quickstart at the end.")] = True,
    force_conflicts: Annotated[bool, typer.Option("--force-conflicts", help="Take over fields of other managers.")] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds until all workloads must be ready.")] = 1200,
) -> None:
    """Deploy or update the platform on a cluster. The same command continues after an interruption.

    Example: [cyan]make deploy OVERLAY=dev KUBE_CONTEXT=my-cluster REGISTRY=registry.example/team ARGS=--no-smoke[/]
    """
    options = DeployOptions(overlay, context, registry, image or (), worker, without or (), build or (), yes)
    options = replace(options, preflight=preflight, smoke=smoke, force_conflicts=force_conflicts, ready_seconds=timeout)
    release = deploy_overlay(options, print_progress, _make_ask(), print_diagnostics)
    print_progress(
        f"deployed: {release.overlay}, version {release.version}, pipelines {', '.join(release.pipelines.values())}; next: make ui"
    )


@app.command()
def undeploy(
    overlay: Overlay = "",
    context: Context = "",
    yes: Yes = False,
    delete_data: Annotated[bool, typer.Option("--delete-data", help="Delete volumes, namespaces, kinds and keys too.")] = False,
) -> None:
    """Remove the platform, and keep the data.

    Example: [cyan]make undeploy KUBE_CONTEXT=my-cluster[/]
    """
    undeploy_overlay(DeployOptions(overlay, context, yes=yes), print_progress, _make_ask(), delete_data=delete_data)


@app.command()
def diff(
    overlay: Overlay = "",
    context: Context = "",
    registry: Registry = "",
    image: Image = None,
    worker: Worker = "",
    without: Without = None,
    build: Build = None,
    yes: Yes = False,
) -> None:
    """Show what a deployment would change. Changes nothing.

    Example: [cyan]make diff KUBE_CONTEXT=my-cluster REGISTRY=registry.example/team[/]
    """
    options = DeployOptions(overlay, context, registry, image or (), worker, without or (), build or (), yes)
    changes = diff_overlay(options, print_progress, _make_ask())
    typer.echo(changes or "no differences", nl=not changes)


@app.command()
def status(overlay: Overlay = "", context: Context = "", as_json: AsJson = False) -> None:
    """Show what is deployed, and whether it is healthy.

    Example: [cyan]make status KUBE_CONTEXT=my-cluster ARGS=--json[/]
    """
    platform = fetch_status(DeployOptions(overlay, context))
    if as_json:
        fields = platform.release.model_dump(mode="json", exclude={"objects", "preexisting"}) if platform.release else None
        value = {
            "context": platform.context,
            "deployment": fields,
            "workloads": [row._asdict() for row in platform.workloads],
            "runs": platform.runs,
        }
        typer.echo(json.dumps(value, indent=1))
        return
    if platform.release is None:
        typer.echo(f"{platform.context}: nothing is deployed; run `make deploy`")
        return
    release = platform.release
    version = f"version {release.version} {release.revision[:12]}".rstrip()
    typer.echo(f"{platform.context}: {release.overlay}, {release.state}, {release.changed_at}, {version}")
    for name, version in release.pipelines.items():
        typer.echo(f"pipeline {name}: {version}")
    for row in platform.workloads:
        state = typer.style("ok", fg="green") if row.ready else typer.style("NO", fg="red", bold=True)
        typer.echo(f"{state}  {row.name:<48}  {row.summary}{f': {row.reason}' if row.reason else ''}")
    runs = ", ".join(f"{count} {phase.lower()}" for phase, count in sorted(platform.runs.items()))
    typer.echo(f"runs: {runs or 'none'}")
    if not all(row.ready for row in platform.workloads):
        raise typer.Exit(ClusterError.exit_code)


@app.command()
def ui(
    context: Context = "",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on this machine.")] = 8080,
    browser: Annotated[bool, typer.Option(help="Open a browser.")] = True,
) -> None:
    """Forward Kubeflow's pages to this machine until Ctrl-C.

    Example: [cyan]make ui KUBE_CONTEXT=my-cluster ARGS="--port 8081"[/]
    """
    target = choose_target(DeployOptions(context=context, yes=True), "Look at", None)
    _, namespace = target.find_release()
    url, first_started = f"http://localhost:{port}", time.monotonic()
    while True:
        lines = target.kubectl.stream_lines(
            "port-forward", f"service/{UI_SERVICE}", f"{port}:{UI_PORT}", f"--namespace={namespace or 'kubeflow'}", stdin=""
        )
        started = time.monotonic()
        try:
            for line in lines:
                if "Forwarding" in line and browser:
                    browser = False
                    webbrowser.open(url)
                if "127.0.0.1" in line:
                    print_progress(f"{url}: Kubeflow on {target.context}; Ctrl-C to stop")
        except ClusterError:
            # A first attempt that fails will not work later; a later one loses its connection when the pod moves.
            if started - first_started < 1 and time.monotonic() - started < 10:
                raise
        time.sleep(1)


@app.command()
def cluster(
    name: Annotated[str, typer.Option(help="Name of the local cluster.")] = CLUSTER,
    node_image: Annotated[str, typer.Option(help="Image of its node, as kindest/node:v1.34.0. Default: kind's own.")] = "",
    build: Build = None,
    smoke: Annotated[bool, typer.Option(help="Run the quickstart at the end.")] = True,
    delete: Annotated[bool, typer.Option("--delete", help="Delete it with all its data.")] = False,
) -> None:
    """Create a kind cluster on this machine and deploy to it. The same command continues after an interruption.

    Example: [cyan]make cluster[/]
    """
    if shutil.which("kind") is None:
        raise ClusterError(
            "kind: is not installed; https://kind.sigs.k8s.io/docs/user/quick-start/#installation, with docker or podman"
        )
    exists = name in _run_kind("get", "clusters").split()
    if delete:
        if exists:
            _run_kind("delete", "cluster", f"--name={name}")
        print_progress(f"cluster {name}: {'deleted' if exists else 'does not exist'}")
        return
    if not exists:
        print_progress(f"cluster {name}: creating")
        image_options = [f"--image={node_image}"] if node_image else []
        _run_kind("create", "cluster", f"--name={name}", f"--config={KIND_FILE}", "--wait=180s", *image_options)
    context = f"{KIND_CONTEXT_PREFIX}{name}"
    # kind also lists a cluster whose container was stopped.
    Kubectl(context).run_command("version", "--output=json")
    deploy(overlay="kind", context=context, build=build, smoke=smoke)


def _run_kind(*arguments: str) -> str:
    """Returns what kind prints; its progress goes to standard error."""
    process = subprocess.run(["kind", *arguments], stdout=subprocess.PIPE, text=True)
    if process.returncode:
        raise ClusterError(f"kind {' '.join(arguments[:2])}: ended with code {process.returncode}; fix what it prints above")
    return process.stdout


def print_progress(text: str) -> None:
    """Prints a line of progress to standard error; results go to standard output."""
    typer.echo(text, err=True)


def _make_ask() -> Ask | None:
    return (lambda question: typer.confirm(question, err=True)) if sys.stdin.isatty() else None


def main() -> None:
    """Entry point. Exits with the code of the error, or 0."""
    from ns.cli.app import run_app

    sys.exit(run_app(app, sys.argv[1:], "make"))


if __name__ == "__main__":
    main()
