"""The one exception family. Every message says what, where, the value seen and what to do; the CLI maps it to an exit code."""

from collections.abc import Iterator
from contextlib import contextmanager


class NsError(Exception):
    """Something a person can mend. `exit_code` is what the command line exits with."""

    exit_code = 1


class ConfigError(NsError):
    """The experiment cannot mean what it says: unknown key, wrong type, impossible combination."""

    exit_code = 2


class DataError(NsError):
    """Images, labels or manifests are missing, damaged or contradict each other."""

    exit_code = 3


class StoreError(NsError):
    """Bytes cannot be read or written: missing, denied, full, out of reach."""

    exit_code = 4


class TrainingError(NsError):
    """Training cannot go on: loss is not finite, memory is exhausted, the teacher is useless."""

    exit_code = 5


class RunError(NsError):
    """A run failed, does not exist, or is already under way."""

    exit_code = 6


class ClusterError(NsError):
    """A Kubernetes cluster is out of reach, forbids something, or lacks something."""

    exit_code = 7


class Interrupted(NsError):
    """Asked to stop (SIGINT, SIGTERM). Work done so far is kept; the same command continues."""

    exit_code = 130


@contextmanager
def prefix_errors(field: str, hint: str = "") -> Iterator[None]:
    """Puts the experiment's field in front of any NsError, and behind it what else can be done."""
    try:
        yield
    except NsError as error:
        raise type(error)(f"{field}: {error}{hint}") from error
