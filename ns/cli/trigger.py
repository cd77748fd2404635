"""`ns trigger`, `ns watch`: runs on Kubeflow when something has changed."""

import functools
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ns.cli.kubeflow import KubeContext, KubeflowAccess, make_warning_printer, open_kubeflow
from ns.cli.options import AsJson, ConfigArgument, Inputs, Kfp, Overrides, Root, load_experiment_argument
from ns.cli.output import make_console, print_json, print_line
from ns.core.errors import ConfigError, NsError
from ns.storage import open_store

if TYPE_CHECKING:
    from pipelines.kfp_client import KfpClient, SubmittedRun
    from pipelines.remote_run import RunRequest
    from pipelines.trigger import TriggerDecision

Image = Annotated[str | None, typer.Option(help="Image of the stages, best by digest. A new one is a reason for a run.")]
Gpus = Annotated[int, typer.Option(min=0, help="GPUs of each labeling task and each training.")]
MinChange = Annotated[float, typer.Option(min=0, max=1, help="Start at this share of new labeled or pool images; 0: any.")]


def trigger(
    config: ConfigArgument,
    root: Root,
    overrides: Overrides = None,
    image: Image = None,
    gpus: Gpus = 0,
    inputs: Inputs = None,
    kfp: Kfp = None,
    context: KubeContext = None,
    min_change: MinChange = 0.0,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the run to its end; the exit code is that of the run.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Start a run even if one of the same inputs has ended.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the decision and its reason; start nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Start a run on Kubeflow only if data, settings or image changed since the last one.

    Repeated or simultaneous calls start one run, not several.

    Example: [cyan]ns trigger my.yaml --root s3://bucket/runs --min-change 0.02[/],
    [cyan]ns trigger my.yaml --root s3://bucket/runs --dry-run[/]
    """
    console = make_console(sys.stderr)
    with open_kubeflow(kfp, context, console) as access:
        call = _TriggerCall(config, overrides, root, image, gpus, inputs, access)
        decision = call.decide_start(min_change, again=again)
        run = None if dry_run else call.carry_out(decision, again=again)
        answer = _decision_to_json(decision) | (run._asdict() if run else {})
        if as_json:
            print_json(answer)
        elif dry_run:
            print_line(f"would start {'a run' if decision.action == 'start' else 'nothing'}: {decision.reason}")
        else:
            print_line(_describe_answer(answer))
        sys.stdout.flush()
        if wait and run:
            access.follow_run(call.client, run, call.store, run.name, console)


def watch_data(
    config: ConfigArgument,
    root: Root,
    overrides: Overrides = None,
    image: Image = None,
    gpus: Gpus = 0,
    inputs: Inputs = None,
    kfp: Kfp = None,
    context: KubeContext = None,
    min_change: MinChange = 0.0,
    every: Annotated[float, typer.Option(min=0.01, metavar="MINUTES", help="Minutes between two polls.")] = 15.0,
) -> None:
    """Poll for changes, and start a run on Kubeflow when something changed.

    Prints one line per poll. Ends cleanly on SIGTERM and Ctrl-C. What fails is tried again at the next poll.

    Example: [cyan]ns watch my.yaml --root s3://bucket/runs --every 60 --min-change 0.05[/]
    """
    from pipelines.trigger import poll_until_stopped

    with open_kubeflow(kfp, context, make_console(sys.stderr)) as access:
        call = _TriggerCall(config, overrides, root, image, gpus, inputs, access)

        def check_once() -> None:
            try:
                decision = call.decide_start(min_change)
                run = call.carry_out(decision)
                message = _describe_answer(_decision_to_json(decision) | (run._asdict() if run else {}))
            except ConfigError:
                # Another poll would find the same error.
                raise
            except NsError as error:
                message = f"error: {error}; next try in {every:g} min"
            print_line(f"{datetime.now(UTC).isoformat(timespec='seconds')} {message}")
            sys.stdout.flush()

        poll_until_stopped(check_once, every * 60)


class _TriggerCall:
    """The checked arguments of both commands."""

    def __init__(
        self,
        config: str,
        overrides: list[str] | None,
        root: str,
        image: str | None,
        gpus: int,
        inputs: list[str] | None,
        access: KubeflowAccess,
    ) -> None:
        from pipelines.remote_run import check_remote_uris

        self.experiment = load_experiment_argument(config, overrides, root)
        self.store = open_store(root)
        check_remote_uris(self.store, self.experiment)
        self._image, self._gpus, self._inputs = image, gpus, inputs or []
        # Wrong inputs are found before any data is read. The image, which is a reason for a run, may be one of the inputs.
        self._image = self._build_request("check").image
        self._access = access

    @functools.cached_property
    def client(self) -> "KfpClient":
        return self._access.make_client()

    def decide_start(self, min_change: float, *, again: bool = False) -> "TriggerDecision":
        from pipelines.trigger import decide_trigger, propose_trigger

        current = propose_trigger(self.experiment, self._image or self._find_platform_image())
        return decide_trigger(self.store, self.experiment.name, current, min_change=min_change, again=again)

    def carry_out(self, decision: "TriggerDecision", *, again: bool = False) -> "SubmittedRun | None":
        """Starts a run if that was decided. Returns the run, if there is one."""
        from pipelines.trigger import start_triggered_run

        if decision.action == "nothing":
            return None
        return start_triggered_run(
            *(self.client, self.store, self.experiment, decision, self._build_request),
            again=again,
            say=make_warning_printer(make_console(sys.stderr)),
        )

    def _find_platform_image(self) -> str:
        """The image that a run without one of its own takes: if the platform is deployed with another one, that is a reason for a run."""
        from pipelines import PACKAGE
        from pipelines.versions import require_platform_version

        return require_platform_version(self.client, PACKAGE.read_text()).placement.worker_image

    def _build_request(self, run: str) -> "RunRequest":
        from pipelines.remote_run import build_request

        registry = self.experiment.registry is not None
        return build_request(self.store, run, image=self._image, gpus=self._gpus, inputs=self._inputs, registry=registry)


def _decision_to_json(decision: "TriggerDecision") -> dict[str, Any]:
    proposed = decision.trigger
    return {"action": decision.action, "reason": decision.reason, "digest": proposed.digest, "run": proposed.run}


def _describe_answer(answer: dict[str, Any]) -> str:
    if "url" not in answer:
        return f"nothing to do: {answer['reason']}"
    if answer["new"]:
        return f"started {answer['run']}: {answer['reason']}: {answer['url']}"
    return f"nothing to do: {answer['reason']}: run {answer['run']} is {answer['state'].lower()}: {answer['url']}"
