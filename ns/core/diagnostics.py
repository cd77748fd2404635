"""Results of `ns doctor` and of probing a store."""

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Diagnostic:
    """The result of one check."""

    name: str
    ok: bool
    """False if something will not work here or, with `is_warning`, not as well. What can be done without is ok, and named in `detail`."""
    detail: str
    fix: str = ""
    """What to do if it is not ok."""
    is_warning: bool = False
    """Whether everything works although the check is not ok."""

    @classmethod
    def from_error(cls, name: str, error: Exception, fix: str) -> Self:
        """A failed check. Our errors end with `; FIX`; `fix` is used if this one does not."""
        detail, _, own_fix = str(error).rpartition("; ")
        return cls(name, False, detail, own_fix) if detail else cls(name, False, own_fix, fix)

    @property
    def is_fatal(self) -> bool:
        return not self.ok and not self.is_warning
