"""`ns …`: the tree of commands, and what becomes of their errors.

Heavy libraries are imported by the commands that need them, so that help is instant.
"""

import os
import sys
import traceback
from functools import cache
from typing import Annotated, Any, NoReturn

import typer

from ns import __version__
from ns.cli import (
    config,
    data,
    doctor,
    evaluate,
    export,
    gate,
    init,
    labels,
    models,
    pipelines,
    plan,
    predict,
    promote,
    report,
    run,
    runs,
    trigger,
)
from ns.cli.options import make_program
from ns.cli.output import print_line
from ns.core.errors import ClusterError, ConfigError, Interrupted, NsError, RunError, TrainingError
from ns.core.printable import make_printable
from ns.core.process import OWN_CORES_SPINS, run_process, set_openmp_to_sleep

# Newer typers bring a click of their own, which is not the one that can be imported.
UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

START, DATA, MODELS, OPERATE = "Start", "Data and labels", "Runs and models", "Operate"

app = make_program("Train an image classifier from a few labeled images and a large unlabeled pool.")


def _print_version(value: bool) -> None:
    if value:
        print_line(f"ns {__version__}")
        raise typer.Exit


@app.callback()
def _set_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the stack trace of an error.")] = False,
) -> None:
    pass


# Help lists commands before groups of commands, each in this order.
app.command(rich_help_panel=START)(run.run)
app.command("init", rich_help_panel=START)(init.write_first_experiment)
app.command(rich_help_panel=START)(plan.plan)
app.command("label", rich_help_panel=DATA)(labels.label)
app.command(rich_help_panel=MODELS)(predict.predict)
app.command(rich_help_panel=MODELS)(evaluate.evaluate)
app.command(rich_help_panel=MODELS)(export.export)
app.command(rich_help_panel=OPERATE)(trigger.trigger)
app.command("watch", rich_help_panel=OPERATE)(trigger.watch_data)
app.add_typer(config.app, name="config", rich_help_panel=START)
app.add_typer(data.app, name="data", rich_help_panel=DATA)
app.add_typer(labels.app, name="labels", rich_help_panel=DATA)
app.add_typer(runs.app, name="runs", rich_help_panel=MODELS)
app.add_typer(models.app, name="models", rich_help_panel=MODELS)
app.add_typer(gate.app, name="gate", rich_help_panel=MODELS)
app.add_typer(report.app, name="report", rich_help_panel=MODELS)
app.add_typer(promote.app, name="promote", rich_help_panel=OPERATE)
app.add_typer(pipelines.app, name="pipelines", rich_help_panel=OPERATE)
app.add_typer(doctor.app, name="doctor", rich_help_panel=OPERATE)


SEVERAL_LINES = (ConfigError.exit_code, TrainingError.exit_code, RunError.exit_code, ClusterError.exit_code)
"""Exit codes of messages that may have a line per fault, or the end of a log; in all others a newline is part of a name."""


def main() -> NoReturn:
    """Entry point. Exits with the code of the error, 0 if there was none."""
    run_process(lambda: run_command_line(sys.argv[1:]))


def run_command_line(arguments: list[str]) -> int:
    """Runs a command line of `ns`, without the `ns`. Returns its exit code."""
    set_openmp_to_sleep(OWN_CORES_SPINS)
    return run_app(app, arguments, "ns")


@cache
def build_command(program: typer.Typer) -> Any:
    """A program's commands with all their parameters, built once for all command lines of a process."""
    return typer.main.get_command(program)


def run_app(program: typer.Typer, arguments: list[str], name: str) -> int:
    """Runs a command line. Returns its exit code: 0, or an error's own after its message, one line per fault, on standard error."""
    debug = "--debug" in arguments
    try:
        command = build_command(program)
        return int(command([a for a in arguments if a != "--debug"], standalone_mode=False, prog_name=name) or 0)
    except NsError as error:
        code, message, trace = error.exit_code, str(error), traceback.format_exc()
    except typer.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code, message, trace = Interrupted.exit_code, "interrupted", ""
    except UsageError as error:
        error.show()
        return int(error.exit_code)
    except BrokenPipeError:
        # The reader (head, less) has closed the pipe. Python would fail once more when it flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        message = f"{type(error).__name__}: {error} (this should not happen; --debug shows where)"
        code, trace = 1, traceback.format_exc()
    if debug:
        sys.stderr.write(trace)
    for line in make_printable(message, keep_newlines=code in SEVERAL_LINES).split("\n"):
        sys.stderr.write(f"{'' if code == Interrupted.exit_code else 'error: '}{line}\n")
    return code
