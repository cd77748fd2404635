"""`ns doctor …`: find what would stop a run before it starts."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from ns.cli.options import AsJson
from ns.core.errors import ClusterError, NsError, StoreError

if TYPE_CHECKING:
    from ns.core.diagnostics import Diagnostic

app = typer.Typer(help="Find what would stop a run before it starts.", no_args_is_help=True)


class NeededPart(StrEnum):
    kfp = "kfp"
    trainer = "trainer"
    kueue = "kueue"
    prometheus = "prometheus-operator"
    dcgm = "dcgm"
    gpu = "gpu"


@app.command("store")
def check_store(
    uri: Annotated[str, typer.Argument(metavar="URI", help="A folder, or s3://bucket/prefix.")], as_json: AsJson = False
) -> None:
    """Try every operation that runs need of a store, in a folder that is removed afterwards.

    Example: [cyan]ns doctor store s3://my-bucket/noisy-student[/]
    """
    from ns.storage.probe import probe_store

    diagnostics = probe_store(uri)
    print_diagnostics(diagnostics, as_json=as_json)
    if any(diagnostic.is_fatal for diagnostic in diagnostics):
        raise typer.Exit(StoreError.exit_code)


@app.command("cluster")
def check_cluster(
    context: Annotated[str | None, typer.Option(help="Context of the kubeconfig; default: the current one.")] = None,
    namespace: Annotated[
        str | None, typer.Option("--namespace", "-n", help="Namespace of the runs' pods; default: Kubeflow's.")
    ] = None,
    need: Annotated[
        list[NeededPart] | None, typer.Option(help="A part that must be installed besides kfp. Repeatable.")
    ] = None,
    store: Annotated[
        str | None, typer.Option(metavar="URI", help="Try this store too, with this shell's AWS_… variables.")
    ] = None,
    registry: Annotated[
        str | None, typer.Option(metavar="GIT", envvar="NS_LABEL_REGISTRY", help="Try this label registry too.")
    ] = None,
    remote: Annotated[
        str | None, typer.Option(metavar="URI", envvar="NS_LABEL_REMOTE", help="Store of its data, while it is empty.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check that a Kubernetes cluster has all that runs need. Changes nothing in it.

    Checks versions and their compatibility, storage, GPU nodes, queues, metrics and rights, and names a fix for each fault.

    Example: [cyan]ns doctor cluster --context production --need trainer --store s3://my-bucket/ns[/]
    """
    from k8s.doctor import Requirements, examine_cluster
    from k8s.kubectl import Kubectl
    from ns.storage.probe import probe_store

    diagnostics = examine_cluster(Kubectl(context), Requirements(namespace, frozenset({"kfp", *(need or ())})))
    if store:
        diagnostics += _try_check("store", lambda: _prefix_names("store-", probe_store(store)))
    if registry:
        diagnostics += _try_check("git-push", lambda: _check_registry(registry, remote))
    print_diagnostics(diagnostics, as_json=as_json)
    if any(diagnostic.is_fatal for diagnostic in diagnostics):
        raise typer.Exit(ClusterError.exit_code)


def print_diagnostics(diagnostics: "list[Diagnostic]", *, as_json: bool = False) -> None:
    """Prints diagnostics, one per line, with the fix of a fault below it."""
    if as_json:
        typer.echo(json.dumps([asdict(diagnostic) for diagnostic in diagnostics], indent=1))
        return
    width = max([15, *(len(diagnostic.name) for diagnostic in diagnostics)])
    for diagnostic in diagnostics:
        state = typer.style("ok", fg="green") if diagnostic.ok else typer.style("NO", fg="red", bold=True)
        if diagnostic.is_warning and not diagnostic.ok:
            state = typer.style("??", fg="yellow")
        typer.echo(f"{state}  {diagnostic.name:<{width}}  {diagnostic.detail}")
        if not diagnostic.ok:
            typer.echo(f"    {'':<{width}}  fix: {diagnostic.fix}")


def _check_registry(git: str, remote: str | None) -> "list[Diagnostic]":
    from ns.core.diagnostics import Diagnostic
    from ns.core.git import redact_credentials
    from ns.labeling.registry import LabelRegistry
    from ns.storage.probe import probe_store

    data_uri = LabelRegistry(git, remote).check_push_access()
    pushed = Diagnostic("git-push", True, f"{redact_credentials(git)}: versions can be pushed")
    return [pushed, *_prefix_names("dvc-", probe_store(data_uri))]


def _prefix_names(prefix: str, diagnostics: "list[Diagnostic]") -> "list[Diagnostic]":
    return [replace(diagnostic, name=f"{prefix}{diagnostic.name}") for diagnostic in diagnostics]


def _try_check(name: str, check: "Callable[[], list[Diagnostic]]") -> "list[Diagnostic]":
    """The check's diagnostics, or its error as one, under `name`."""
    from ns.core.diagnostics import Diagnostic

    try:
        return check()
    except NsError as error:
        return [Diagnostic.from_error(name, error, "check that it exists, and that these credentials may write")]
