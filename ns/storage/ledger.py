"""The ledger of finished work, keyed by the digest of its inputs: finished work is never repeated.

store/ledger/STAGE/DIGEST.json     DIGEST = sha256(stage, inputs); written once, after the outputs
"""

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from pydantic import Field

from ns.core.digest import describe_code, digest_json, shorten_digest
from ns.storage import Store
from ns.storage.documents import BlobKey, JsonDocument


class LedgerEntry(JsonDocument):
    """A finished piece of work."""

    stage: str
    digest: str
    inputs: dict[str, Any]
    outputs: dict[str, BlobKey]
    """Name → key, below the same root, of the manifest, which is written last."""
    seconds: float
    """Wall time of the attempt that finished the work."""
    finished_at: str
    code: dict[str, str] = Field(default_factory=dict)
    """What the code of the attempt was, as `describe_code` has it; `inputs` hold the digest of the part that decides."""


class Ledger:
    def __init__(self, root: Store) -> None:
        self._root = root

    def compute_digest(self, stage: str, inputs: Mapping[str, Any]) -> str:
        """The digest under which work with these inputs is recorded. Inputs hold digests and plain values, never URIs."""
        return digest_json({"stage": stage, "inputs": dict(inputs)})

    def derive_key(self, folder: str, stage: str, inputs: Mapping[str, Any]) -> str:
        """Key of the folder, in `store/FOLDER/`, for what comes of work with these inputs."""
        return f"store/{folder}/{shorten_digest(self.compute_digest(stage, inputs))}"

    def find_entry(self, stage: str, inputs: Mapping[str, Any]) -> LedgerEntry | None:
        """The entry, if work with these inputs is finished and all its outputs still exist."""
        entry = LedgerEntry.find_file(self._root, self._entry_key(stage, self.compute_digest(stage, inputs)))
        if entry and all(self._root.exists(output_key) for output_key in entry.outputs.values()):
            return entry
        return None

    def list_entries(self, stage: str) -> list[LedgerEntry]:
        """All entries of a kind of work, the latest last."""
        return sorted(
            LedgerEntry.iterate_files(self._root, self._root.list(f"store/ledger/{stage}/")),
            key=lambda entry: (entry.finished_at, entry.digest),
        )

    def record_entry(self, stage: str, inputs: Mapping[str, Any], outputs: Mapping[str, str], seconds: float) -> LedgerEntry:
        """Writes the entry. All outputs must have been written."""
        entry = LedgerEntry(
            stage=stage,
            digest=self.compute_digest(stage, inputs),
            inputs=dict(inputs),
            outputs=dict(outputs),
            seconds=seconds,
            finished_at=datetime.now(UTC).isoformat(timespec="microseconds"),
            code=describe_code(),
        )
        # Two workers may finish the same work; equal digests mean equal outputs, so the last entry is as good as the first.
        entry.save_file(self._root, self._entry_key(stage, entry.digest))
        return entry

    def get_or_run(
        self, stage: str, inputs: Mapping[str, Any], work: Callable[[], Mapping[str, str]]
    ) -> tuple[LedgerEntry, bool]:
        """The entry of finished work, or else of `work`, which is then run and recorded; and whether the entry was there."""
        entry = self.find_entry(stage, inputs)
        if entry is not None:
            return entry, True
        started = time.monotonic()
        outputs = work()
        return self.record_entry(stage, inputs, outputs, time.monotonic() - started), False

    @staticmethod
    def _entry_key(stage: str, entry_digest: str) -> str:
        return f"store/ledger/{stage}/{entry_digest}.json"
