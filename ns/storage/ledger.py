"""What has been done, keyed by the digest of what went into it, so that any step is skipped or resumed and none is done twice.

ledger/STEP/DIGEST.json     DIGEST = sha256(step, code, inputs); written once, after the outputs are in place
"""

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from ns.core.digest import digest
from ns.storage import Store
from ns.storage.documents import Document


class Entry(Document):
    """One finished step."""

    step: str
    digest: str
    inputs: dict[str, Any]
    outputs: dict[str, str]
    """Name → key, below the same root, of the manifest that was written last."""
    seconds: float
    """Wall time of the attempt that finished the work; not part of any digest."""
    finished_at: str


class Ledger:
    def __init__(self, root: Store) -> None:
        self._root = root

    def key(self, step: str, inputs: Mapping[str, Any]) -> str:
        """The digest under which a step with these inputs is recorded. Inputs hold digests and plain values, never places."""
        return digest({"step": step, "inputs": dict(inputs)})

    def lookup(self, step: str, key: str) -> Entry | None:
        """The entry, if the step is done and all its outputs are still there."""
        path = self._path(step, key)
        if not self._root.exists(path):
            return None
        entry = Entry.read(self._root, path)
        if all(self._root.exists(output) for output in entry.outputs.values()):
            return entry
        return None

    def record(self, step: str, inputs: Mapping[str, Any], outputs: Mapping[str, str], seconds: float) -> Entry:
        """Writes the entry. Call it when every output is in place."""
        entry = Entry(
            step=step,
            digest=self.key(step, inputs),
            inputs=dict(inputs),
            outputs=dict(outputs),
            seconds=seconds,
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        # Two workers may finish the same step; equal digests mean equal outputs, so the last entry is as good as the first.
        entry.write(self._root, self._path(step, entry.digest))
        return entry

    def once(self, step: str, inputs: Mapping[str, Any], work: Callable[[], Mapping[str, str]]) -> tuple[Entry, bool]:
        """Looks the step up; works and records only if it is not there. Returns the entry and whether it was reused."""
        entry = self.lookup(step, self.key(step, inputs))
        if entry is not None:
            return entry, True
        started = time.monotonic()
        outputs = work()
        return self.record(step, inputs, outputs, time.monotonic() - started), False

    def recorded(self, step: str) -> frozenset[str]:
        """Digests of a step's entries, without a look at whether their outputs are still there."""
        folder = self._path(step, "").removesuffix(".json")
        return frozenset(key.removeprefix(folder).removesuffix(".json") for key in self._root.list(folder))

    @staticmethod
    def _path(step: str, key: str) -> str:
        return f"store/ledger/{step}/{key}.json"
