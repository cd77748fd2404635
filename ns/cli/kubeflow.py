"""How commands reach Kubeflow: by its URL, or through port-forwards by a context of the kubeconfig."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ns.cli.output import escape_text
from ns.core.errors import ConfigError
from ns.storage import Store

if TYPE_CHECKING:
    from k8s.kubectl import Kubectl
    from pipelines.kfp_client import KfpClient, SubmittedRun

KubeContext = Annotated[
    str | None,
    typer.Option(
        "--context", metavar="NAME", help="Context of the kubeconfig: reaches Kubeflow and the store, says why pods wait."
    ),
]
PATIENCE_SECONDS = 300.0
"""A port-forward is made again when the API server is back."""


@dataclass(frozen=True)
class KubeflowAccess:
    """A Kubeflow that can be reached."""

    url: str
    """Empty: NS_KFP_URL."""
    kubectl: "Kubectl | None" = None
    """For the pods of runs; None without a context."""

    def make_client(self) -> "KfpClient":
        from pipelines.kfp_client import KfpClient

        return KfpClient(self.url, patience_seconds=PATIENCE_SECONDS if self.kubectl else 0)

    def follow_run(self, client: "KfpClient", submitted: "SubmittedRun", store: Store, run: str, console: Console) -> None:
        """Shows a run until it has ended; raises what `pipelines.remote_run.follow_run` raises."""
        from ns.cli.progress import RunView
        from pipelines import remote_run

        with RunView(console) as view:
            if self.kubectl is None:
                remote_run.follow_run(client, submitted, store, run, view.on_event)
                return
            from k8s.access import read_run_namespace
            from k8s.pods import RunPods

            pods = RunPods(self.kubectl, read_run_namespace(), submitted.run_id, make_warning_printer(console))
            remote_run.follow_run(
                *(client, submitted, store, run, view.on_event),
                after_poll=pods.report_waiting,
                explain_pods=pods.explain_failures,
            )


@contextlib.contextmanager
def open_kubeflow(url: str | None, context: str | None, console: Console) -> Iterator[KubeflowAccess]:
    """Reaches Kubeflow, and with a context also the cluster's store: open stores inside.

    Raises ConfigError if both are given, ClusterError if the cluster refuses.
    """
    if context is None:
        yield KubeflowAccess(url or "")
        return
    if url:
        raise ConfigError("--kfp: has no effect with --context, which finds Kubeflow by itself; leave one of them out")
    from k8s.access import open_cluster_access, read_run_namespace
    from k8s.kubectl import Kubectl

    kubectl = Kubectl(context or None)
    with open_cluster_access(kubectl, read_run_namespace(), make_warning_printer(console)) as forwarded:
        yield KubeflowAccess(forwarded, kubectl)


def make_warning_printer(console: Console) -> Callable[[str], None]:
    """Prints what is told of a cluster, one line each, also while progress is drawn."""

    def print_warning(text: str) -> None:
        console.print(f"[yellow]![/] {escape_text(text)}", soft_wrap=True)

    return print_warning
