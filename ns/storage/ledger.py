"""The ledger of finished work, keyed by the digest of its inputs: finished work is never repeated.

store/ledger/STAGE/DIGEST.json     DIGEST = sha256(stage, inputs); written once, after the outputs
"""

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Any

from pydantic import Field

from ns.core import log
from ns.core.digest import describe_code, digest_json, shorten_digest
from ns.storage import Store, parent_key
from ns.storage.documents import BlobKey, JsonDocument
from ns.storage.lease import hold_lease

LISTED_FROM = 4
"""So many blobs are looked up faster by listing their folder."""


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
    files: dict[BlobKey, int] = Field(default_factory=dict)
    """Size in bytes of each blob that the work made, by its key. A blob that is missing or of another size was lost or cut off."""
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
        """The entry, if work with these inputs is finished and all that it made is still whole.

        Of damaged work the manifests are removed, with a warning: what has no manifest does not exist, and is made again.
        """
        entry = LedgerEntry.find_file(self._root, self._entry_key(stage, self.compute_digest(stage, inputs)))
        if entry is None or not all(self._root.exists(output_key) for output_key in entry.outputs.values()):
            return None
        damaged = self._find_damaged(entry.files)
        if damaged is None:
            return entry
        log.get_logger().warning("damaged, and made again", stage=stage, file=f"{self._root.uri}/{damaged}")
        for output_key in entry.outputs.values():
            if parent_key(output_key) == parent_key(damaged):
                self._root.delete(output_key)
        return None

    def list_entries(self, stage: str) -> list[LedgerEntry]:
        """All entries of a kind of work, the latest last."""
        return sorted(
            LedgerEntry.iterate_files(self._root, self._root.list(f"store/ledger/{stage}/")),
            key=lambda entry: (entry.finished_at, entry.digest),
        )

    def list_digests(self, stage: str) -> set[str]:
        """Digests of all entries of a kind of work."""
        prefix = f"store/ledger/{stage}/"
        return {key.removeprefix(prefix).removesuffix(".json") for key in self._root.list(prefix)}

    def record_entry(
        self,
        stage: str,
        inputs: Mapping[str, Any],
        outputs: Mapping[str, str],
        seconds: float,
        *,
        files: Iterable[str] | None = None,
    ) -> LedgerEntry:
        """Writes the entry. All outputs must have been written.

        `files`: keys of the blobs that the work made; if not given, all in the folder that `derive_key` gives for these inputs.
        """
        digest = self.compute_digest(stage, inputs)
        if files is None:
            own_name = f"/{shorten_digest(digest)}/"
            folders = {key.partition(own_name)[0] + own_name for key in outputs.values() if own_name in key}
            sizes = {blob.key: blob.size for folder in folders for blob in self._root.entries(folder)}
        else:
            sizes = {key: self._root.size(key) for key in files}
        entry = LedgerEntry(
            stage=stage,
            digest=digest,
            inputs=dict(inputs),
            outputs=dict(outputs),
            seconds=seconds,
            finished_at=datetime.now(UTC).isoformat(timespec="microseconds"),
            files=dict(sorted(sizes.items())),
            code=describe_code(),
        )
        # Two workers may finish the same work, if one was silent for long. Each has written, or found, what the manifests name.
        entry.save_file(self._root, self._entry_key(stage, entry.digest))
        return entry

    def get_or_run(
        self, stage: str, inputs: Mapping[str, Any], work: Callable[[], Mapping[str, str]]
    ) -> tuple[LedgerEntry, bool]:
        """The entry of finished work, or else of `work`, which is then run and recorded; and whether the entry was there.

        Waits while another process is at work on the same, and then finds its entry (`hold_lease`).
        """
        entry = self.find_entry(stage, inputs)
        if entry is not None:
            return entry, True
        with self.hold_lease(stage, inputs):
            entry = self.find_entry(stage, inputs)
            if entry is not None:
                return entry, True
            started = time.monotonic()
            outputs = work()
            return self.record_entry(stage, inputs, outputs, time.monotonic() - started), False

    def hold_lease(self, stage: str, inputs: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Holds the lease of work with these inputs; see `lease.hold_lease`."""
        return hold_lease(self._root, f"{stage}-{shorten_digest(self.compute_digest(stage, inputs))}", stage)

    def _find_damaged(self, files: Mapping[str, int]) -> str | None:
        """Key of the first blob that is missing or has another size; None if all are whole."""
        listed_sizes: dict[str, int] = {}
        for folder in {f"{parent_key(key)}/" for key in files} if len(files) > LISTED_FROM else ():
            listed_sizes |= {blob.key: blob.size for blob in self._root.entries(folder)}
        for key, size in files.items():
            if listed_sizes.get(key) != size and (not self._root.exists(key) or self._root.size(key) != size):
                return key
        return None

    @staticmethod
    def _entry_key(stage: str, entry_digest: str) -> str:
        return f"store/ledger/{stage}/{entry_digest}.json"
