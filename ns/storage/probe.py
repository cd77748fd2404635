"""What a place for bytes can do: asked by doing it, under a prefix that is thrown away afterwards."""

import json
import secrets
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from ns.core.diagnostics import Finding
from ns.core.errors import StoreError
from ns.storage.base import Store, open_store
from ns.storage.local import LocalStore

if TYPE_CHECKING:
    from ns.storage.s3 import S3Store

# S3 lists a thousand keys at a time; more than that shows whether it goes on.
MANY = 1_005
WRITERS = 16
# The least that S3 takes for a part that is not the last.
PART_BYTES = 5 << 20
# A server that does not answer should not keep anybody waiting for a verdict.
PATIENCE_SECONDS = 15
# S3 refuses requests from a clock that differs by 15 minutes.
SKEW_SECONDS = 60
NAMES = (
    "a b",
    "plus+",
    "per%20cent",
    "amp&<tag>",
    "quote'\"",
    "hash#?query",
    "ünïcödé",
    "日本語",
    "emoji-😀",
    "tilde~",
    "=,;:@$!*()[]",
)
LONG = "/".join(["long" * 25] * 8)


class _FailedError(Exception):
    """(detail, fix)"""


Check = Callable[[], str]


def probe(uri: str, *, many: int = MANY) -> list[Finding]:
    """Tries all that the loop needs of the store at `uri`, and cleans up. Raises StoreError only for what is no URI of a store.

    Writes about 12 MiB and `many` empty objects. When nothing can be written, the one finding says why.
    """
    store, s3 = _impatient(open_store(uri))
    folder = store.at(f"probe-{secrets.token_hex(8)}")
    findings = [_try("endpoint", lambda: _endpoint(s3))] if s3 else []
    findings.append(_try("write", lambda: _write(folder)))
    if not findings[-1].ok:
        return findings
    try:
        findings += [_try(name, check) for name, check in _checks(folder, many).items()]
        findings.append(_try("delete", lambda: _delete(folder)))
    finally:
        with suppress(StoreError):
            folder.delete_prefix("")
        if isinstance(folder, LocalStore):
            shutil.rmtree(folder.root, ignore_errors=True)
    return findings


def _impatient(store: Store) -> "tuple[Store, S3Store | None]":
    if not store.uri.startswith("s3://"):
        return store, None
    from ns.storage.s3 import S3Store, Service

    assert isinstance(store, S3Store)
    service = store.service
    patience = replace(service.patience, seconds=PATIENCE_SECONDS)
    quick = S3Store(store.uri, Service(service.endpoint, patience=patience, part_bytes=PART_BYTES))
    return quick, quick


def _try(name: str, check: Check) -> Finding:
    try:
        return Finding(name, True, check())
    except _FailedError as failure:
        detail, fix = failure.args
        return Finding(name, False, detail, fix)
    except StoreError as error:
        # PLACE: cannot DO: REASON[: CURE]
        detail, _, cure = str(error).rpartition(": ")
        if detail.rpartition(": ")[2].startswith("cannot "):
            return Finding(name, False, str(error), "choose another place")
        return Finding(name, False, detail, cure)


def _checks(folder: Store, many: int) -> dict[str, Check]:
    checks: dict[str, Check] = {
        "read-back": lambda: _read_back(folder),
        "overwrite": lambda: _overwrite(folder),
        "range": lambda: _range(folder),
        "names": lambda: _names(folder),
        "list-order": lambda: _list_order(folder),
        "list-pages": lambda: _list_pages(folder, many),
        "create": lambda: _create(folder),
        "missing": lambda: _missing(folder),
    }
    if isinstance(folder, LocalStore):
        return {**checks, "space": lambda: _space(folder)}
    from ns.storage.s3 import S3Store

    assert isinstance(folder, S3Store)
    return {
        **checks,
        "multipart": lambda: _multipart(folder),
        "metadata": lambda: _metadata(folder),
        "clock": lambda: _clock(folder),
        "conditional-put": lambda: _conditional_put(folder),
    }


def _endpoint(s3: "S3Store") -> str:
    endpoint = s3.service.endpoint
    transport = "TLS" if endpoint.url.startswith("https://") else "no TLS: keys and data are readable on the way"
    source = f"files in {endpoint.secrets}" if endpoint.secrets else "environment"
    return f"{endpoint.url}, region {endpoint.region}, {transport}, credentials from {source}"


def _write(folder: Store) -> str:
    begun = time.monotonic()
    folder.put("blob", b"0123456789")
    return f"{_milliseconds(begun)} for a small object"


def _read_back(folder: Store) -> str:
    begun = time.monotonic()
    for number in range(20):
        folder.put("fresh", b"%d" % number)
        found = folder.get("fresh")
        _expect(
            found, b"%d" % number, "a read right after a write", "use a store that is consistent: a cache stands in between?"
        )
    return f"what is written can be read at once ({_milliseconds(begun, 40)} a request)"


def _overwrite(folder: Store) -> str:
    folder.put("twice", b"old and longer")
    folder.put("twice", b"new")
    _expect(
        folder.get("twice"),
        b"new",
        "an object written twice",
        "allow objects to be replaced: no object lock, no write-once bucket",
    )
    return "the later bytes stay"


def _range(folder: Store) -> str:
    cure = "look for a proxy between that changes range requests"
    _expect(folder.get_range("blob", 3, 4), b"3456", "bytes [3, 7)", cure)
    _expect(folder.get_range("blob", 8, 100), b"89", "a range over the end", cure)
    _expect(folder.get_range("blob", 100, 1), b"", "a range behind the end", cure)
    return "ranges are exact, also at the end"


def _names(folder: Store) -> str:
    cure = "rename what the server cannot spell, or use another server"
    names = sorted([*NAMES, LONG], key=str.encode)
    for name in names:
        folder.put(f"names/{name}", name.encode())
    for name in names:
        _expect(folder.get(f"names/{name}"), name.encode(), f"the object named {name[:40]!r}", cure)
        _expect(list(folder.list(f"names/{name}")), [f"names/{name}"], f"the list of what begins with {name[:40]!r}", cure)
    _expect(list(folder.list("names/")), [f"names/{name}" for name in names], "the list of odd names", cure)
    return f"spaces, signs, Unicode and keys of {len(LONG)} bytes are kept"


def _list_order(folder: Store) -> str:
    keys = ["order/a", "order/b/1", "order/b-c", "order/b/10", "order/b/2", "order/B", "order/bc", "order/ä"]
    for key in keys:
        folder.put(key, b"")
    cure = "use a server that lists keys in the order of their UTF-8 bytes"
    _expect(list(folder.list("order/")), sorted(keys, key=str.encode), "the order of a list", cure)
    _expect(list(folder.list("order/b/1")), ["order/b/1", "order/b/10"], "a list by the beginning of a name", cure)
    return "in the order of UTF-8 bytes, by any beginning"


def _list_pages(folder: Store, many: int) -> str:
    keys = [f"many/{number:06}" for number in range(many)]
    begun = time.monotonic()
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(lambda key: folder.put(key, b""), keys))
    written = time.monotonic() - begun
    _expect(list(folder.list("many/")), keys, f"a list of {many}", "use a server whose ListObjectsV2 goes on after 1000 keys")
    return f"{many} keys, written at {many / max(written, 1e-3):.0f} a second"


def _create(folder: Store) -> str:
    cure = "make sure that a written object is seen at once"
    _expect([folder.create("once", b"1"), folder.create("once", b"2")], [True, False], "creating twice", cure)
    _expect(folder.get("once"), b"1", "what was created first", cure)
    return "an object that is there is not created again"


def _missing(folder: Store) -> str:
    cure = "allow these credentials to list the bucket: without, S3 says 'denied' for what is not there"
    try:
        there = folder.exists("nothing")
    except StoreError as error:
        raise _FailedError(str(error), cure) from error
    _expect(there, False, "whether a missing object exists", cure)
    return "what is not there is told from what is forbidden"


def _delete(folder: Store) -> str:
    folder.delete("blob")
    folder.delete("blob")
    count = folder.delete_prefix("") + 1
    _expect(
        list(folder.list()),
        [],
        "what is left after deleting all",
        "allow these credentials to delete; remove what is left by hand",
    )
    return f"{count} objects removed"


def _space(folder: LocalStore) -> str:
    return f"{shutil.disk_usage(folder.root).free / (1 << 30):.1f} GiB free"


def _multipart(folder: "S3Store") -> str:
    data = secrets.token_bytes(1 << 20) * 11
    begun = time.monotonic()
    folder.put("large", data)
    seconds = time.monotonic() - begun
    cure = "allow multipart uploads, also through proxies: bodies of 16 MiB and more"
    _expect(folder.size("large"), len(data), "the size of an object in parts", cure)
    begun = time.monotonic()
    _expect(folder.get("large") == data, True, "whether an object in parts comes back as it was", cure)
    mib = len(data) / (1 << 20)
    return f"3 parts; {mib / seconds:.0f} MiB/s up, {mib / (time.monotonic() - begun):.0f} MiB/s down, one object at a time"


def _metadata(folder: "S3Store") -> str:
    from ns.storage.s3 import CHECKSUM

    with _explained(folder):
        head = folder.service.client.stat_object(bucket_name=folder.bucket, object_name=f"{_prefix(folder)}/blob")
    found = {name.lower() for name in head.metadata or {}}
    if f"x-amz-meta-{CHECKSUM}" not in found:
        return "NOT kept: checksums of our own are lost, so reads are checked by the server's MD5 or by size only"
    return "checksums of our own are kept, and checked on every whole read"


def _clock(folder: "S3Store") -> str:
    # Any answer tells the time, also one that says no.
    with _explained(folder):
        response = folder.service.pool.request("HEAD", folder.service.endpoint.url)
    said = response.headers.get("date")
    if not said:
        return "the server does not tell its time; it accepts ours"
    skew = (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds()
    if abs(skew) > SKEW_SECONDS:
        raise _FailedError(
            f"the server's clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this machine's; at 900 s it refuses",
            "set the clocks by NTP, here and there",
        )
    return f"{abs(skew):.0f} s apart"


def _conditional_put(folder: "S3Store") -> str:
    """Information only: nothing relies on it, since too many servers do it wrong."""
    client, pool = folder.service.client, folder.service.pool
    name = f"{_prefix(folder)}/conditional"
    with _explained(folder):
        url = client.get_presigned_url(method="PUT", bucket_name=folder.bucket, object_name=name, expires=timedelta(minutes=5))
        headers = {"If-None-Match": "*"}
        answers = [pool.request("PUT", url, body=body, headers=headers).status for body in (b"first", b"second")]
    kept = folder.get("conditional") if folder.exists("conditional") else b""
    if answers[0] in (200, 201) and answers[1] in (409, 412) and kept == b"first":
        return "works (not used)"
    if answers == [200, 200]:
        return "ignored by the server (not used)"
    return f"refused or odd: HTTP {answers[0]} and {answers[1]} (not used)"


def _prefix(folder: "S3Store") -> str:
    return folder.uri.removeprefix(f"s3://{folder.bucket}/")


def _explained(folder: "S3Store") -> AbstractContextManager[None]:
    from ns.storage import s3_errors as reasons

    return reasons.explained(folder.uri, "probe", folder.bucket, folder.service.endpoint)


def _expect(found: object, expected: object, what: str, fix: str) -> None:
    if found != expected:
        raise _FailedError(f"{what} is {_shown(found)}, expected {_shown(expected)}", fix)


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, bytes) else repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _milliseconds(begun: float, requests: int = 1) -> str:
    return f"{(time.monotonic() - begun) / requests * 1000:.0f} ms"
