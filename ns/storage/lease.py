"""Leases: who is at work on what below a root, so that others wait for the result instead of doing the same.

store/leases/NAME-0001.json     the holder; it rewrites the file while it works, and removes it at the end
store/leases/NAME-0002.json     the next holder, which took over from one that was killed; the highest number counts

A lease saves work, and protects nothing: what is written stays right when two hold one, as after a pause of a whole machine.
"""

import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import NamedTuple, Self

from ns.core import log
from ns.core.errors import NsError, StoreError
from ns.core.process import ProcessId
from ns.storage.base import BlobEntry, Store
from ns.storage.documents import JsonDocument
from ns.storage.local import LocalStore

LEASES = "store/leases"
BEAT_SECONDS = 10.0
"""A holder rewrites its file so often."""
STALE_SECONDS = 60.0
"""A lease whose file did not change for so long, by the clock of who watches it, is taken over."""
POLL_SECONDS = (0.1, 2.0)
"""First and longest pause between two looks at a lease that another holds."""
RELEASE_SECONDS = 5.0
"""How long an error waits for its lease to be removed."""
ABANDONED_SECONDS = 24 * 3600
"""A lease on another machine that did not change for so long, by the store's clock, is removed: nobody waits for it."""


READ_ATTEMPTS = 5
"""Attempts to read a lease that comes and goes."""


class LeaseHolder(JsonDocument):
    """Who holds a lease."""

    token: str
    """Random: tells this lease from all others."""
    host: str
    process: ProcessId
    since: str
    """UTC, for people."""
    beats: int = 0

    @classmethod
    def make_own(cls) -> Self:
        return cls(
            token=secrets.token_hex(16),
            host=socket.gethostname(),
            process=ProcessId.from_pid(os.getpid()),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
        )


@contextmanager
def hold_lease(root: Store, name: str, what: str) -> Iterator[None]:
    """Holds the lease of some work inside the context. `what` names the work in the log.

    Waits while a living process holds it, and says so once. It is taken over at once if its holder was a process of this machine
    that is gone, and after STALE_SECONDS without a beat otherwise. Raises StoreError if the store cannot be read or written.
    """
    lease = _wait_for_lease(root, name, what)
    try:
        yield
    except BaseException:
        # If it is the store that fails, to try again and again would only delay the error. Others take the lease over.
        releasing = threading.Thread(target=lease.try_release, daemon=True)
        releasing.start()
        releasing.join(RELEASE_SECONDS)
        raise
    lease.try_release()


def sweep_leases(root: Store, now: float) -> None:
    """Removes what killed holders left. `now`: seconds since 1970, by the store's clock."""
    for entry in list(root.entries(f"{LEASES}/")):
        holder = _find_holder(root, entry.key)
        if (holder and holder.process.is_gone()) or now - entry.modified_at > ABANDONED_SECONDS:
            root.delete(entry.key)


def _wait_for_lease(root: Store, name: str, what: str) -> "_Lease":
    pause, most = POLL_SECONDS
    seen_stamp, seen_at, is_told = "", 0.0, False
    while True:
        latest = _find_latest(root, name)
        if latest is None:
            number = 1
        else:
            holder = _find_holder(root, latest.entry.key)
            now = time.monotonic()
            if (stamp := f"{latest.entry.key} {latest.entry.stamp}") != seen_stamp:
                seen_stamp, seen_at = stamp, now
            is_gone = holder is not None and holder.process.is_gone()
            if not is_gone and now - seen_at < STALE_SECONDS:
                if holder and not is_told:
                    is_told = True
                    log.get_logger().info(
                        "another process is at work on this: waiting for its result",
                        work=what,
                        holder=f"{holder.host}, process {holder.process.pid}",
                        since=holder.since,
                    )
                time.sleep(pause)
                pause = min(most, pause * 1.5)
                continue
            if holder:
                log.get_logger().warning(
                    "taking over from a process that was killed" if is_gone else "taking over from a process that is silent",
                    work=what,
                    holder=f"{holder.host}, process {holder.process.pid}",
                    since=holder.since,
                )
            number = latest.number + 1
        lease = _Lease(root, name, number)
        if lease.try_take():
            return lease
        # Another was faster.


class _NumberedLease(NamedTuple):
    number: int
    entry: BlobEntry


def _list_leases(root: Store, name: str) -> Iterator[_NumberedLease]:
    """The leases of some work; not those of other work whose name begins with this one, nor what else lies there."""
    pattern = re.compile(rf"{re.escape(f'{LEASES}/{name}')}-(\d{{1,18}})\.json")
    for entry in root.entries(f"{LEASES}/{name}-"):
        if match := pattern.fullmatch(entry.key):
            yield _NumberedLease(int(match[1]), entry)


def _find_latest(root: Store, name: str) -> _NumberedLease | None:
    return max(_list_leases(root, name), default=None, key=lambda lease: lease.number)


def _find_holder(root: Store, key: str) -> LeaseHolder | None:
    """The holder that a lease names; None if the lease is gone by now, or nothing readable."""
    for attempt in range(READ_ATTEMPTS):
        try:
            return LeaseHolder.find_file(root, key)
        except StoreError:
            if not root.exists(key):
                return None
            # It was released between two requests, and taken by another under the same key.
            if attempt == READ_ATTEMPTS - 1:
                raise
    return None


class _Lease:
    def __init__(self, root: Store, name: str, number: int) -> None:
        self._root = root
        self._name = name
        self._number = number
        self._key = f"{LEASES}/{name}-{number:04d}.json"
        self._holder = LeaseHolder.make_own()
        self._is_over = threading.Event()
        self._beating = threading.Thread(target=self._beat_until_over, name="lease", daemon=True)

    def try_take(self) -> bool:
        """Tries to become the holder; says whether it did."""
        data = self._holder.encode()
        if isinstance(self._root, LocalStore):
            taken = self._root.create(self._key, data)
        else:
            # The answer to a put may be lost, and some servers let two create the same.
            self._root.create(self._key, data)
            holder = _find_holder(self._root, self._key)
            taken = holder is not None and holder.token == self._holder.token
        if taken:
            self._beating.start()
        return taken

    def try_release(self) -> None:
        """Removes the lease, and those that it was taken over from; nothing of a later holder. What it cannot remove goes stale."""
        self._is_over.set()
        self._beating.join()
        with suppress(StoreError):
            for lease in list(_list_leases(self._root, self._name)):
                if lease.number <= self._number:
                    self._root.delete(lease.entry.key)

    def _beat_until_over(self) -> None:
        while not self._is_over.wait(BEAT_SECONDS):
            # A store that is away for a while costs a beat.
            with suppress(NsError):
                latest = _find_latest(self._root, self._name)
                if latest is not None and latest.number > self._number:
                    log.get_logger().warning(
                        "another process has taken over, because this one was silent; what is finished first counts",
                        work=self._name,
                    )
                    return
                self._holder = self._holder.model_copy(update={"beats": self._holder.beats + 1})
                self._holder.save_file(self._root, self._key)
