"""The exceptions of the project. Every message says what, where, the value seen and what to do; the CLI maps each to an exit code."""

from collections.abc import Iterator
from contextlib import contextmanager


class NsError(Exception):
    """An error that a person can fix. `exit_code` is the exit code of the command line."""

    exit_code = 1
    is_permanent = False
    """Whether the same work on the same inputs fails again, so that only a person can help."""


class ConfigError(NsError):
    """The experiment is wrong: unknown key, wrong type, impossible combination."""

    exit_code = 2
    is_permanent = True


class DataError(NsError):
    """Images, labels or manifests are missing, damaged or contradict each other."""

    exit_code = 3
    is_permanent = True


class StoreError(NsError):
    """Bytes cannot be read or written: missing file, no permission, full disk, no connection."""

    exit_code = 4


class TrainingError(NsError):
    """Training cannot go on: loss is not finite, memory is exhausted, the teacher is useless."""

    exit_code = 5
    is_permanent = True


class RunError(NsError):
    """A run failed, does not exist, or is already active."""

    exit_code = 6


class ClusterError(NsError):
    """A Kubernetes cluster cannot be reached, forbids something, or lacks something."""

    exit_code = 7


class TerminatedError(NsError):
    """A person ended the run in Kubeflow. Finished work is kept; the same command continues."""

    exit_code = 8


class Interrupted(NsError):
    """The process was asked to stop (SIGINT, SIGTERM). Finished work is kept; the same command continues."""

    exit_code = 130


def find_error_kind(exit_code: int, default: type[NsError]) -> type[NsError]:
    """The kind of error that ended another process. `default`: for codes that are none of ours, as of a later version."""
    return next((kind for kind in NsError.__subclasses__() if kind.exit_code == exit_code), default)


@contextmanager
def prefix_errors(field: str, hint: str = "") -> Iterator[None]:
    """Puts the experiment's field in front of the message of any NsError, and `hint` behind it."""
    try:
        yield
    except NsError as error:
        raise type(error)(f"{field}: {error}{hint}") from error
