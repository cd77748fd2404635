"""What a check beforehand finds: `ns doctor`."""

from dataclasses import dataclass
from typing import Self


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

    @classmethod
    def from_error(cls, name: str, error: Exception, fix: str) -> Self:
        """A failed check from an error of ours, which ends with `; FIX`; `fix` is for one that does not."""
        detail, _, own_fix = str(error).rpartition("; ")
        return cls(name, False, detail, own_fix) if detail else cls(name, False, own_fix, fix)

    @property
    def is_fatal(self) -> bool:
        return not self.ok and not self.is_warning
