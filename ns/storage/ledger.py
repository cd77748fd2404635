"""What has been done, keyed by the digest of what went into it, so that any step is skipped or resumed and none is done twice.

ledger/STEP/DIGEST.json     DIGEST = sha256(step, code, inputs); written once, after the outputs are in place
"""

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from ns.core.digest import digest_json
from ns.storage import Store
from ns.storage.documents import JsonDocument


class LedgerEntry(JsonDocument):
    """One finished step."""

    stage: str
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

    def compute_digest(self, stage: str, inputs: Mapping[str, Any]) -> str:
        """The digest under which a step with these inputs is recorded. Inputs hold digests and plain values, never places."""
        return digest_json({"stage": stage, "inputs": dict(inputs)})

    def find_entry(self, stage: str, entry_digest: str) -> LedgerEntry | None:
        """The entry, if the step is done and all its outputs are still there."""
        entry_key = self._entry_key(stage, entry_digest)
        if not self._root.exists(entry_key):
            return None
        entry = LedgerEntry.load_file(self._root, entry_key)
        if all(self._root.exists(output_key) for output_key in entry.outputs.values()):
            return entry
        return None

    def record_entry(self, stage: str, inputs: Mapping[str, Any], outputs: Mapping[str, str], seconds: float) -> LedgerEntry:
        """Writes the entry. Call it when every output is in place."""
        entry = LedgerEntry(
            stage=stage,
            digest=self.compute_digest(stage, inputs),
            inputs=dict(inputs),
            outputs=dict(outputs),
            seconds=seconds,
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        # Two workers may finish the same step; equal digests mean equal outputs, so the last entry is as good as the first.
        entry.save_file(self._root, self._entry_key(stage, entry.digest))
        return entry

    def get_or_run(
        self, stage: str, inputs: Mapping[str, Any], work: Callable[[], Mapping[str, str]]
    ) -> tuple[LedgerEntry, bool]:
        """Looks the step up; works and records only if it is not there. Returns the entry and whether it was reused."""
        entry = self.find_entry(stage, self.compute_digest(stage, inputs))
        if entry is not None:
            return entry, True
        started = time.monotonic()
        outputs = work()
        return self.record_entry(stage, inputs, outputs, time.monotonic() - started), False

    def list_digests(self, stage: str) -> frozenset[str]:
        """Digests of a step's entries, without a look at whether their outputs are still there."""
        prefix = self._entry_key(stage, "").removesuffix(".json")
        return frozenset(key.removeprefix(prefix).removesuffix(".json") for key in self._root.list(prefix))

    @staticmethod
    def _entry_key(stage: str, entry_digest: str) -> str:
        return f"store/ledger/{stage}/{entry_digest}.json"
