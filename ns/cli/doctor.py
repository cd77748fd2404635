"""`ns doctor …`: find what would stop a run before it starts."""

from collections.abc import Callable
from dataclasses import asdict, replace
from enum import StrEnum
from typing import Annotated

import typer

from ns.cli.options import AsJson, RegistryOption, RemoteOption
from ns.cli.output import print_json, print_line
from ns.core.diagnostics import Diagnostic
from ns.core.errors import ClusterError, NsError, StoreError

app = typer.Typer(help="Find what would stop a run before it starts.", no_args_is_help=True)

NeededPart = StrEnum("NeededPart", ["kfp", "trainer", "kueue", "prometheus-operator", "dcgm", "gpu"])


@app.command("store")
def check_store(
    uri: Annotated[str, typer.Argument(metavar="URI", help="A folder, or s3://bucket/prefix.")], as_json: AsJson = False
) -> None:
    """Try every operation that runs need of a store, in a folder that is removed afterwards.

    Example: [cyan]ns doctor store s3://my-bucket/noisy-student[/]
    """
    from ns.storage.probe import probe_store

    _report_diagnostics(probe_store(uri), StoreError, as_json)


@app.command("cluster")
def check_cluster(
    context: Annotated[str | None, typer.Option(help="Context of the kubeconfig; default: the current one.")] = None,
    namespace: Annotated[str | None, typer.Option("--namespace", "-n", help="Namespace of runs; default: Kubeflow's.")] = None,
    need: Annotated[list[NeededPart] | None, typer.Option(help="A part that must be there besides kfp. Repeatable.")] = None,
    store: Annotated[str | None, typer.Option(metavar="URI", help="Try this store, with this shell's AWS_… variables.")] = None,
    registry: RegistryOption = None,
    remote: RemoteOption = None,
    as_json: AsJson = False,
) -> None:
    """Check that a Kubernetes cluster has all that runs need. It changes nothing, but starts a pod for a few seconds.

    Checks versions and their compatibility, storage, GPU nodes, queues, metrics and rights, and names a fix for each fault. A
    store and a label registry are tried if they are given.

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
    _report_diagnostics(diagnostics, ClusterError, as_json)


def _report_diagnostics(diagnostics: list[Diagnostic], error: type[NsError], as_json: bool) -> None:
    """Prints diagnostics, and ends the command with the exit code of `error` if one of them is fatal."""
    if as_json:
        print_json([asdict(diagnostic) for diagnostic in diagnostics])
    else:
        print_diagnostics(diagnostics)
    if any(diagnostic.is_fatal for diagnostic in diagnostics):
        raise typer.Exit(error.exit_code)


def print_diagnostics(diagnostics: list[Diagnostic]) -> None:
    """Prints diagnostics, one per line, with the fix of a fault below it."""
    width = max([15, *(len(diagnostic.name) for diagnostic in diagnostics)])
    for diagnostic in diagnostics:
        state = typer.style("ok", fg="green") if diagnostic.ok else typer.style("NO", fg="red", bold=True)
        if diagnostic.is_warning and not diagnostic.ok:
            state = typer.style("??", fg="yellow")
        print_line(f"  {diagnostic.name:<{width}}  {diagnostic.detail}", mark=state)
        if not diagnostic.ok:
            print_line(f"    {'':<{width}}  fix: {diagnostic.fix}")


def _check_registry(git: str, remote: str | None) -> list[Diagnostic]:
    from ns.core.printable import redact_credentials
    from ns.labeling.registry import LabelRegistry
    from ns.storage.probe import probe_store

    data_uri = LabelRegistry(git, remote).check_push_access()
    pushed = Diagnostic("git-push", True, f"{redact_credentials(git)}: versions can be pushed")
    return [pushed, *_prefix_names("dvc-", probe_store(data_uri))]


def _prefix_names(prefix: str, diagnostics: list[Diagnostic]) -> list[Diagnostic]:
    return [replace(diagnostic, name=f"{prefix}{diagnostic.name}") for diagnostic in diagnostics]


def _try_check(name: str, check: Callable[[], list[Diagnostic]]) -> list[Diagnostic]:
    """The check's diagnostics, or its error as one, under `name`."""
    try:
        return check()
    except NsError as error:
        return [Diagnostic.from_error(name, error, "check that it exists, and that these credentials may write")]
