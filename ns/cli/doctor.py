"""`ns doctor …`: find out beforehand what would stop a run."""

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

app = typer.Typer(help="Find out beforehand what would stop a run.", no_args_is_help=True)


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
    """Try all that the loop needs of a place for bytes, in a folder that is removed afterwards.

    Example: [cyan]ns doctor store s3://my-bucket/noisy-student[/]
    """
    from ns.storage.probe import probe_store

    findings = probe_store(uri)
    print_diagnostics(findings, as_json=as_json)
    if any(finding.is_fatal for finding in findings):
        raise typer.Exit(StoreError.exit_code)


@app.command("cluster")
def check_cluster(
    context: Annotated[str | None, typer.Option(help="Context of the kubeconfig; the current one if not given.")] = None,
    namespace: Annotated[
        str | None, typer.Option("--namespace", "-n", help="Namespace of runs' pods; Kubeflow Pipelines' own if not given.")
    ] = None,
    need: Annotated[
        list[NeededPart] | None, typer.Option(help="What must be there besides kfp, or it is a fault. Repeatable.")
    ] = None,
    store: Annotated[
        str | None, typer.Option(metavar="URI", help="Try this store too, with this shell's AWS_… variables.")
    ] = None,
    registry: Annotated[
        str | None,
        typer.Option(
            metavar="GIT",
            envvar="NS_LABEL_REGISTRY",
            help="Try this label registry too: whether versions can be pushed, and its data written.",
        ),
    ] = None,
    remote: Annotated[
        str | None,
        typer.Option(metavar="URI", envvar="NS_LABEL_REMOTE", help="Place of its data, while the registry is still empty."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look whether a Kubernetes cluster has all that runs need. Changes nothing in it.

    Versions and pairs of them that do not get on, storage, GPU nodes, queues, metrics, rights; each with its fix.

    Example: [cyan]ns doctor cluster --context production --need trainer --store s3://my-bucket/ns[/]
    """
    from k8s.doctor import Requirements, examine_cluster
    from k8s.kubectl import Kubectl
    from ns.storage.probe import probe_store

    findings = examine_cluster(
        Kubectl(context), Requirements(namespace, frozenset({"kfp", *(part.value for part in need or ())}))
    )
    if store:
        findings += _try_check("store", lambda: probe_store(store))
    if registry:
        findings += _try_check("git-push", lambda: _check_registry(registry, remote))
    print_diagnostics(findings, as_json=as_json)
    if any(finding.is_fatal for finding in findings):
        raise typer.Exit(ClusterError.exit_code)


def print_diagnostics(findings: "list[Diagnostic]", *, as_json: bool = False) -> None:
    """Prints findings, one a line, its fix below it."""
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
        return
    width = max([15, *(len(finding.name) for finding in findings)])
    for finding in findings:
        state = typer.style("ok", fg="green") if finding.ok else typer.style("NO", fg="red", bold=True)
        if finding.is_warning and not finding.ok:
            state = typer.style("??", fg="yellow")
        typer.echo(f"{state}  {finding.name:<{width}}  {finding.detail}")
        if not finding.ok:
            typer.echo(f"    {'':<{width}}  fix: {finding.fix}")


def _check_registry(git: str, remote: str | None) -> "list[Diagnostic]":
    from ns.core.diagnostics import Diagnostic
    from ns.core.git import redact_credentials
    from ns.labeling.registry import LabelRegistry
    from ns.storage.probe import probe_store

    data = LabelRegistry(git, remote).check_push_access()
    pushed = Diagnostic("git-push", True, f"{redact_credentials(git)}: versions can be pushed")
    return [pushed, *(replace(finding, name=f"dvc-{finding.name}") for finding in probe_store(data))]


def _try_check(name: str, check: "Callable[[], list[Diagnostic]]") -> "list[Diagnostic]":
    from ns.core.diagnostics import Diagnostic

    try:
        return [
            replace(diagnostic, name=f"{name}-{diagnostic.name}" if name == "store" else diagnostic.name)
            for diagnostic in check()
        ]
    except NsError as error:
        detail, _, fix = str(error).rpartition("; ")
        return [
            Diagnostic(
                name, False, detail or fix, fix if detail else "see that it exists, and that these credentials may write"
            )
        ]
