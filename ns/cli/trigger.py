"""`ns trigger`, `ns watch`: runs on Kubeflow when there is a reason for one."""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ns.cli.options import AsJson, ConfigArgument, Inputs, Kfp, Overrides
from ns.core.errors import ConfigError, NsError

if TYPE_CHECKING:
    from ns.config.schema import Experiment
    from ns.storage import Store
    from pipelines.trigger import Outlook, TriggerDecision

Root = Annotated[str, typer.Option("--root", metavar="s3://…", help="The store that holds runs, models, labels and data.")]
Image = Annotated[str | None, typer.Option(help="Image of the steps, best by its digest: another one is a reason for a run.")]
Gpus = Annotated[int, typer.Option(min=0, help="GPUs of each labeling task and each training.")]
MinChange = Annotated[
    float,
    typer.Option(
        min=0, max=1, help="Share of the labeled images, or of the pool, that must be new if nothing else is; 0: any change."
    ),
]


def trigger(
    config: ConfigArgument,
    root: Root,
    overrides: Overrides = None,
    image: Image = None,
    gpus: Gpus = 0,
    inputs: Inputs = None,
    kfp: Kfp = None,
    min_change: MinChange = 0.0,
    again: Annotated[
        bool, typer.Option("--again", help="Start a run although one of these very things was started and has ended.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the decision and what a run would do and cost.")] = False,
    prices: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Speeds and prices of GPUs, instead of ns/planning/prices.yaml.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Start a run on Kubeflow if labels, pool, settings or image changed since the last one; say why, or why not.

    The same call again, or by two at once, starts nothing twice.

    Example: [cyan]ns trigger my.yaml --root s3://bucket/runs --min-change 0.02[/],
    [cyan]ns trigger my.yaml --root s3://bucket/runs --dry-run[/]
    """
    from pipelines import trigger as triggers

    call = _TriggerCall(config, overrides, root, image, gpus, inputs, kfp)
    decision = call.decide_start(min_change, again=again)
    if dry_run:
        from ns.planning.prices import read_prices

        outlook = triggers.foresee(call.store, call.experiment, decision.trigger, read_prices(str(prices) if prices else None))
        if as_json:
            typer.echo(json.dumps(_decision_to_json(decision) | {"outlook": outlook._asdict()}, indent=1))
        else:
            typer.echo(f"{_DRY_RUN_MESSAGES[decision.action]}: {decision.reason}")
            _show(outlook)
        return
    answer = call.carry_out(decision, again=again)
    typer.echo(json.dumps(answer, indent=1) if as_json else _describe_answer(answer))


def watch(
    config: ConfigArgument,
    root: Root,
    overrides: Overrides = None,
    image: Image = None,
    gpus: Gpus = 0,
    inputs: Inputs = None,
    kfp: Kfp = None,
    min_change: MinChange = 0.0,
    every: Annotated[float, typer.Option(min=0.01, metavar="MINUTES", help="How often to look.")] = 15.0,
) -> None:
    """Look for new data every so often, and start a run on Kubeflow when there is a reason: `ns trigger`, again and again.

    Prints a line for each look. Ends well on SIGTERM and Ctrl-C. What fails is tried again at the next look.

    Example: [cyan]ns watch my.yaml --root s3://bucket/runs --every 60 --min-change 0.05[/]
    """
    from pipelines import trigger as triggers

    call = _TriggerCall(config, overrides, root, image, gpus, inputs, kfp)

    def check_once() -> None:
        try:
            message = _describe_answer(call.carry_out(call.decide_start(min_change)))
        except ConfigError:
            # Looking again would not mend it.
            raise
        except NsError as error:
            message = f"error: {error}; again in {every:g} min"
        typer.echo(f"{datetime.now(UTC).isoformat(timespec='seconds')} {message}")
        sys.stdout.flush()

    triggers.poll_until_stopped(check_once, every * 60)


class _TriggerCall:
    """What both commands are told, checked."""

    def __init__(
        self,
        config: str,
        overrides: list[str] | None,
        root: str,
        image: str | None,
        gpus: int,
        inputs: list[str] | None,
        kfp: str | None,
    ) -> None:
        from ns.cli.options import load_experiment_argument
        from ns.storage import open_store
        from pipelines import kfp_client as submit
        from pipelines import remote_run as cluster

        self.experiment: Experiment = load_experiment_argument(config, overrides)
        self.store: Store = open_store(root)
        cluster.check_remote_uris(self.store, self.experiment)
        self._image, self._gpus, self._inputs = image, gpus, inputs or []
        # Wrong ones are found before anything is looked at. The image, which is a reason for a run, may be one of the inputs.
        self._image = self._build_inputs("check").get("worker_image")
        self._client = submit.KfpClient(kfp) if kfp else None

    def decide_start(self, min_change: float, *, again: bool = False) -> "TriggerDecision":
        from pipelines import trigger as triggers

        current = triggers.propose_trigger(self.experiment, self._image)
        return triggers.decide_trigger(self.store, self.experiment.name, current, min_change=min_change, again=again)

    def carry_out(self, decision: "TriggerDecision", *, again: bool = False) -> dict[str, Any]:
        """Does what was decided. Returns the decision, and the run if there is one, as JSON has it."""
        from pipelines import kfp_client as submit
        from pipelines import trigger as triggers

        if decision.action == "nothing":
            return _decision_to_json(decision)
        self._client = self._client or submit.KfpClient()
        run = triggers.start_triggered_run(self._client, self.store, self.experiment, decision, self._build_inputs, again=again)
        return _decision_to_json(decision) | run._asdict()

    def _build_inputs(self, run: str) -> dict[str, Any]:
        from ns.runs.records import CONFIG
        from pipelines import remote_run as cluster

        uri = f"{self.store.uri}/{run}/{CONFIG}"
        registry = self.experiment.registry is not None
        return cluster.build_inputs(
            uri, self.store, run, image=self._image, gpus=self._gpus, inputs=self._inputs, registry=registry
        )


_DRY_RUN_MESSAGES = {"start": "would start a run", "known": "would start nothing", "nothing": "would start nothing"}


def _decision_to_json(decision: "TriggerDecision") -> dict[str, Any]:
    return {"action": decision.action, "why": decision.reason, "digest": decision.trigger.digest, "run": decision.trigger.run}


def _describe_answer(answer: dict[str, Any]) -> str:
    if "url" not in answer:
        return f"nothing to do: {answer['why']}"
    if answer["new"]:
        return f"started {answer['run']}: {answer['why']}: {answer['url']}"
    return f"nothing to do: {answer['why']}: run {answer['run']} is {answer['state'].lower()}: {answer['url']}"


def _show(outlook: "Outlook") -> None:
    from rich.console import Console
    from rich.filesize import decimal

    from ns.cli.progress import outlook_tables

    console = Console()
    for table in outlook_tables(outlook.steps, outlook.costs):
        console.print(table)
    console.print(
        f"storage: {decimal(outlook.storage_bytes)} at most · every generation is counted, and rounded up", highlight=False
    )
