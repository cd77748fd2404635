"""`ns run`: the whole loop, on this machine or on Kubeflow."""

import contextlib
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from ns import __version__
from ns.cli.kubeflow import KubeContext, KubeflowAccess, make_warning_printer, open_kubeflow
from ns.cli.options import AsJson, Inputs, Kfp, Overrides, Root, load_experiment_argument
from ns.cli.output import escape_text, make_console, print_json
from ns.cli.plan import announce_time
from ns.cli.runs import print_run
from ns.core.errors import ConfigError, Interrupted, NsError, RunError
from ns.storage import LocalStore, Store, open_store

if TYPE_CHECKING:
    from ns.config.schema import Experiment

Runner = Literal["local", "docker", "kfp"]
LIBRARIES: dict[Runner, tuple[str, ...]] = {"local": ("kfp",), "docker": ("kfp", "docker")}
"""What runners need that `pip install noisy-student` alone does not bring."""


def run(
    config: Annotated[str | None, typer.Argument(metavar="CONFIG", help="A YAML file, or the preset quickstart.")] = None,
    overrides: Overrides = None,
    root: Root = "runs",
    name: Annotated[str | None, typer.Option("--run", help="Name of the run; default: derived from the experiment.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the latest run that is not finished.")] = False,
    runner: Annotated[Runner, typer.Option(help="Run stages as processes, in Docker or Podman, or on Kubeflow.")] = "local",
    image: Annotated[
        str | None, typer.Option(help="Image of the stages; default: the last of `make images`, on Kubeflow the pipeline's.")
    ] = None,
    memory: Annotated[str | None, typer.Option(metavar="4g", help="Memory limit of each container; default: none.")] = None,
    gpus: Annotated[int, typer.Option(min=-1, help="GPUs of each container, -1 for all; on Kubeflow of each GPU stage.")] = 0,
    stage_timeout: Annotated[float | None, typer.Option(help="Time limit per container, s; default: the pipeline's.")] = None,
    kfp: Kfp = None,
    context: KubeContext = None,
    inputs: Inputs = None,
    follow: Annotated[
        bool | None, typer.Option("--follow/--no-follow", help="On Kubeflow: follow the run; default: yes.")
    ] = None,
    agreed: Annotated[bool, typer.Option("--yes", help="Do not ask before a run of more than a day.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the whole loop, here or on Kubeflow. The same command continues a stopped run and repeats no finished work.

    Example: [cyan]ns run quickstart --set seed=1[/], [cyan]ns run quickstart --runner docker --memory 4g[/],
    [cyan]ns run my.yaml --runner kfp --root s3://bucket/runs --input gpus_train=1[/]
    """
    runner_options: list[tuple[str, Any, tuple[Runner, ...]]] = [
        ("--image", image, ("docker", "kfp")),
        ("--memory", memory, ("docker",)),
        ("--gpus", gpus or None, ("docker", "kfp")),
        ("--stage-timeout", stage_timeout, ("docker",)),
        ("--kfp", kfp, ("kfp",)),
        ("--context", context, ("kfp",)),
        ("--input", inputs, ("kfp",)),
        ("--follow/--no-follow", follow, ("kfp",)),
    ]
    for option, value, runners in runner_options:
        if value is not None and runner not in runners:
            raise ConfigError(f"{option}: has no effect with --runner {runner}; add --runner {' or '.join(runners)}")
    missing = [library for library in LIBRARIES.get(runner, ()) if find_spec(library) is None]
    if missing:
        raise ConfigError(f"--runner {runner}: {' and '.join(missing)} not installed; pip install 'noisy-student[pipelines]'")
    if resume == (config is not None):
        raise ConfigError("give a CONFIG, or --resume to continue the latest unfinished run (and not both)")
    if resume and overrides:
        raise ConfigError("--set: has no effect with --resume, which continues a run as it was started; give its CONFIG")
    # Taken now: while KFP runs, sys.stderr is its log.
    console = make_console(sys.stderr)
    # With a context the store, too, is reached through a port-forward.
    with open_kubeflow(kfp, context, console) as access:
        store = open_store(root)
        name, experiment = _choose_run(store, config, overrides, name)
        if runner == "kfp":
            input_options = {"image": image, "gpus": gpus, "inputs": inputs or ()}
            submitted = _run_on_kubeflow(store, name, experiment, console, access, follow is not False, input_options)
            if follow is False:
                if as_json:
                    print_json(submitted)
                return
        else:
            options = {"image": image, "memory": memory, "gpus": gpus, "stage_seconds": stage_timeout}
            _run_here(store, name, experiment, console, options if runner == "docker" else None, agreed=agreed)
        from ns.runs.summary import summarize_run

        summary = summarize_run(store, name)
        if as_json:
            print_json(summary)
        else:
            print_run(summary, store, make_console())


def _choose_run(store: Store, config: str | None, overrides: list[str] | None, name: str | None) -> tuple[str, "Experiment"]:
    """The name and the experiment of the run to start, or without a config of the one to continue."""
    from ns.runs.lifecycle import derive_run_name

    if config is None:
        return _find_unfinished(store, name)
    experiment = load_experiment_argument(config, overrides, store.uri)
    return name or derive_run_name(experiment), experiment


def _run_here(
    store: Store,
    name: str,
    experiment: "Experiment",
    console: Console,
    container_options: dict[str, Any] | None,
    *,
    agreed: bool,
) -> None:
    """Runs the pipeline on this machine, in containers if there are options for them."""
    from ns.runs.lifecycle import lock_run, open_run
    from ns.runs.records import RECORDS_PREFIX

    with lock_run(store, name):
        if not store.exists(f"{RECORDS_PREFIX}{name}.json"):
            announce_time(experiment, console, agreed=agreed)
        state = open_run(store, name, experiment, __version__)
        if container_options is not None:
            from pipelines.runners import docker

            container = docker.ContainerOptions(**container_options)
            run_pipeline = partial(docker.run_in_containers, root=store, experiment=experiment, container=container)
        else:
            from pipelines.runners import local

            run_pipeline = partial(local.run_locally, root=store.uri, expect_work=state != "succeeded")
        _run_recorded(store, name, console, run_pipeline)


def _run_on_kubeflow(
    store: Store,
    name: str,
    experiment: "Experiment",
    console: Console,
    access: KubeflowAccess,
    follow: bool,
    input_options: dict[str, Any],
) -> dict[str, Any]:
    """Submits a run, or finds the one that is under way, and follows it to its end if `follow`. Returns what was submitted as JSON."""
    from pipelines import remote_run

    remote_run.check_remote_uris(store, experiment)
    client = access.make_client()
    registry = experiment.registry is not None
    request = remote_run.build_request(store, name, **input_options, registry=registry)
    submitted = remote_run.submit_run(client, store, name, experiment, request, make_warning_printer(console))
    message = f"run {name}: {'submitted' if submitted.new else 'is under way'}: {submitted.url}"
    console.print(escape_text(message), soft_wrap=True)
    if follow:
        access.follow_run(client, submitted, store, name, console)
    return submitted._asdict()


def _run_recorded(store: Store, name: str, console: Console, run_pipeline: Callable[..., None]) -> None:
    """Runs the pipeline and records how it ended, whatever happens."""
    from ns.cli.progress import RunView
    from ns.runs.lifecycle import finish_run
    from ns.runs.records import CONFIG_FILE

    log = store.root / name / "pipeline.log" if isinstance(store, LocalStore) else None
    try:
        with RunView(console) as view:
            run_pipeline(config_uri=f"{store.uri}/{name}/{CONFIG_FILE}", run=name, log=log, on_event=view.on_event)
    except BaseException as error:
        # The store may be what failed: its own message matters, not that the record could not be written either.
        with contextlib.suppress(NsError):
            state: Any = "interrupted" if isinstance(error, Interrupted) else "failed"
            finish_run(store, name, state, str(error) or type(error).__name__)
        if log is not None and log.exists() and isinstance(error, NsError) and not isinstance(error, Interrupted):
            console.print(f"[dim]log: {escape_text(str(log))}[/]", soft_wrap=True)
        raise
    finish_run(store, name, "succeeded")


def _find_unfinished(store: Store, name: str | None) -> tuple[str, "Experiment"]:
    from ns.config.loader import load_experiment
    from ns.runs.lookup import list_runs
    from ns.runs.records import CONFIG_FILE

    unfinished = [record.run for record in list_runs(store) if record.state != "succeeded" and name in (None, record.run)]
    if not unfinished:
        raise RunError(f"{store.uri}: no unfinished run{f' {name}' if name else ''} to resume; `ns runs list` shows all")
    return unfinished[-1], load_experiment(f"{store.uri}/{unfinished[-1]}/{CONFIG_FILE}")
