"""A component whose code is its first argument, so that a test can say what a stage does."""

import sys

exec(sys.argv[1])
component("f")  # type: ignore[name-defined]  # noqa: F821
