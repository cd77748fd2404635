"""What a check beforehand finds: `ns doctor`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Diagnostic:
    """One thing that was looked at."""

    name: str
    ok: bool
    """False: it will not work here, or, with `warning`, not as well. What can be done without is ok, and said in `detail`."""
    detail: str
    fix: str = ""
    """What to do where it is not ok."""
    is_warning: bool = False
    """Of what is not ok: nothing fails of it."""

    @property
    def is_fatal(self) -> bool:
        return not self.ok and not self.is_warning
