"""`python -m k8s …`, as the Makefile's targets call it."""

import contextlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import webbrowser
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from k8s.acceptance import choose_checks, format_rows, open_platform, try_checks
from k8s.access import (
    KEY_VARIABLES,
    KUBEFLOW_NAMESPACE,
    LOCAL_STORE_PORT,
    LOCAL_UI_PORT,
    UI_PORT,
    UI_SERVICE,
    open_store_access,
)
from k8s.deploy import (
    KIND_CONTEXT_PREFIX,
    PATIENCE_SECONDS,
    Ask,
    DeployOptions,
    choose_target,
    deploy_overlay,
    diff_overlay,
    fetch_status,
    undeploy_overlay,
)
from k8s.doctor import STORAGE_SECRET
from k8s.kubectl import Kubectl
from k8s.port_forward import PortForward
from ns.cli.doctor import print_diagnostics
from ns.cli.options import AsJson, make_program
from ns.cli.output import print_json, print_line, print_text
from ns.core.errors import ClusterError, ConfigError
from ns.core.process import handle_signals
from ns.storage import LocalStore
from pipelines.kfp_client import URL_VARIABLE as KFP_VARIABLE

CLUSTER = "noisy-student"
ACCEPTANCE_FOLDER = Path("runs/acceptance")
"""What `acceptance` has seen, a file per cluster."""
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
    print_text(changes or "no differences\n")


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
        print_json(value)
        return
    if platform.release is None:
        print_line(f"{platform.context}: nothing is deployed; run `make deploy`")
        return
    release = platform.release
    version = f"version {release.version} {release.revision[:12]}".rstrip()
    print_line(f"{platform.context}: {release.overlay}, {release.state}, {release.changed_at}, {version}")
    for name, version in release.pipelines.items():
        print_line(f"pipeline {name}: {version}")
    for row in platform.workloads:
        state = typer.style("ok", fg="green") if row.ready else typer.style("NO", fg="red", bold=True)
        print_line(f"  {row.name:<48}  {row.summary}{f': {row.reason}' if row.reason else ''}", mark=state)
    runs = ", ".join(f"{count} {phase.lower()}" for phase, count in sorted(platform.runs.items()))
    print_line(f"runs: {runs or 'none'}")
    if not all(row.ready for row in platform.workloads):
        raise typer.Exit(ClusterError.exit_code)


@app.command()
def ui(
    context: Context = "",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of Kubeflow's pages on this machine.")] = LOCAL_UI_PORT,
    store_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the store on this machine.")] = LOCAL_STORE_PORT,
    browser: Annotated[bool, typer.Option(help="Open a browser.")] = True,
) -> None:
    """Forward Kubeflow's pages and the store to this machine until Ctrl-C, and print the environment for `ns`.

    Example: [cyan]make ui KUBE_CONTEXT=my-cluster ARGS="--port 8081"[/]
    """
    target = choose_target(DeployOptions(context=context, yes=True), "Look at", None)
    namespace = target.find_release()[1] or KUBEFLOW_NAMESPACE
    pages = PortForward(target.kubectl, KUBEFLOW_NAMESPACE, UI_SERVICE, UI_PORT, local_port=port, say=print_progress)
    # SIGTERM, too, must end kubectl, which is in a group of its own.
    with (
        contextlib.suppress(KeyboardInterrupt),
        handle_signals(signal.default_int_handler),
        pages,
        open_store_access(target.kubectl, namespace, print_progress, store_port) as store,
    ):
        url = f"http://localhost:{port}"
        print_progress(f"{url}: Kubeflow on {target.context}; Ctrl-C to stop; for `ns` in another terminal:")
        print_text(_format_environment({KFP_VARIABLE: url} | store, target.context, namespace) + "\n")
        if browser:
            webbrowser.open(url)
        signal.pause()


def _format_environment(variables: dict[str, str], context: str, namespace: str) -> str:
    """Lines for a shell. The store's keys are asked of the cluster there, and not shown here."""
    secret = f"kubectl --context={shlex.quote(context)} --namespace={namespace} get secret {STORAGE_SECRET}"
    lines = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    lines += [
        f"export {name}=\"$({secret} --output=jsonpath='{{.data.{key}}}' | base64 --decode)\""
        for key, name in KEY_VARIABLES.items()
    ]
    return "\n".join(lines)


@app.command("acceptance")
def run_acceptance(
    overlay: Overlay = "",
    context: Annotated[str, typer.Option(help="Context of the kubeconfig. Runs are hit by faults there.")] = "",
    registry: Registry = "",
    image: Image = None,
    worker: Worker = "",
    without: Without = None,
    build: Build = None,
    only: Annotated[list[str] | None, typer.Option(help="Check to try; others are not. Repeatable.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Check to leave out. Repeatable.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Try what was as expected before, too.")] = False,
    deployed: Annotated[bool, typer.Option("--deployed", help="Deploy nothing: try what is deployed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Deploy, try the platform with real faults, and print a table of what was expected and what was seen.

    Example: [cyan]make acceptance KUBE_CONTEXT=my-cluster ARGS="--deployed --skip many-tasks"[/]
    """
    if not context:
        raise ConfigError("KUBE_CONTEXT must be given: runs on that cluster are killed and its nodes drained")
    names = choose_checks(only or (), skip or ())
    options = DeployOptions(overlay, context, registry, image or (), worker, without or (), build or (), yes=True, smoke=False)
    if not deployed:
        deploy_overlay(options, print_progress, None, print_diagnostics)
    target = choose_target(options, "Try", None)
    target.kubectl.patience_seconds = PATIENCE_SECONDS
    release, namespace = target.find_release()
    if release is None:
        raise ClusterError(f"nothing is deployed on {context}; leave out --deployed")
    key = f"{re.sub(r'[^A-Za-z0-9]+', '-', context)}.json"
    with open_platform(target.kubectl, namespace, print_progress) as platform:
        record = try_checks(platform, names, LocalStore(ACCEPTANCE_FOLDER), key, again=again)
    rows = record.list_rows()
    if as_json:
        print_json([row._asdict() for row in rows])
    else:
        print_text(f"{format_rows(record)}\n")
    if not all(row.ok for row in rows):
        raise typer.Exit(1)


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
    print_text(f"{text}\n", err=True)


def _make_ask() -> Ask | None:
    return (lambda question: typer.confirm(question, err=True)) if sys.stdin.isatty() else None


def main() -> None:
    """Entry point. Exits with the code of the error, or 0."""
    from ns.cli.app import run_app

    sys.exit(run_app(app, sys.argv[1:], "make"))


if __name__ == "__main__":
    main()
