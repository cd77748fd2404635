"""What a check beforehand finds: `ns doctor`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    ok: bool
    """False: it will not work here, or, with `warning`, not as well. What can be done without is ok, and said in `detail`."""
    detail: str
    fix: str = ""
    """What to do where it is not ok."""
    warning: bool = False
    """Of what is not ok: nothing fails of it."""

    @property
    def fatal(self) -> bool:
        return not self.ok and not self.warning
