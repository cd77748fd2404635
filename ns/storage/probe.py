"""Checks what a store can do by doing it, under a prefix that is removed afterwards."""

import json
import secrets
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from ns.core.diagnostics import Diagnostic
from ns.core.errors import StoreError
from ns.storage import Store, open_store
from ns.storage.local import LocalStore

if TYPE_CHECKING:
    from ns.storage.s3 import S3Store

# S3 lists 1,000 keys per request; more keys show whether the server continues a list.
PAGED_KEYS = 1_005
WRITERS = 16
# The smallest part that S3 accepts, but for the last one.
PART_BYTES = 5 << 20
# A server that does not answer should not delay the result.
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


ProbeCheck = Callable[[Any], str]
"""Takes the scratch store and returns a detail; raises _FailedError or StoreError."""


def probe_store(uri: str, *, paged_keys: int = PAGED_KEYS) -> list[Diagnostic]:
    """Tries all that the loop needs of the store at `uri`, and cleans up. Raises StoreError only if `uri` names no store.

    Writes about 12 MiB and `paged_keys` empty objects. If nothing can be written, only the diagnostics until then are returned.
    """
    store = _with_short_timeouts(open_store(uri))
    scratch = store.at(f"probe-{secrets.token_hex(8)}")
    is_local = isinstance(scratch, LocalStore)
    diagnostics = [] if is_local else [_run_check("endpoint", _check_endpoint, scratch)]
    diagnostics.append(_run_check("write", _check_write, scratch))
    if not diagnostics[-1].ok:
        return diagnostics
    checks: dict[str, ProbeCheck] = {
        "read-back": _check_read_back,
        "overwrite": _check_overwrite,
        "range": _check_ranges,
        "names": _check_names,
        "list-order": _check_list_order,
        "list-pages": partial(_check_list_pages, paged_keys=paged_keys),
        "create": _check_create,
        "missing": _check_missing,
    }
    if is_local:
        checks |= {"space": _check_space}
    else:
        checks |= {"multipart": _check_multipart, "metadata": _check_metadata, "clock": _check_clock}
    try:
        diagnostics += [_run_check(name, check, scratch) for name, check in (checks | {"delete": _check_delete}).items()]
    finally:
        with suppress(StoreError):
            scratch.delete_prefix("")
        if isinstance(scratch, LocalStore):
            shutil.rmtree(scratch.root, ignore_errors=True)
    return diagnostics


def _with_short_timeouts(store: Store) -> Store:
    if isinstance(store, LocalStore):
        return store
    from ns.storage.s3 import S3Service, S3Store

    assert isinstance(store, S3Store)
    retry_policy = replace(store.service.retry_policy, seconds=PATIENCE_SECONDS)
    return S3Store(store.uri, S3Service(store.service.endpoint, retry_policy=retry_policy, part_bytes=PART_BYTES))


def _run_check(name: str, check: ProbeCheck, store: Store) -> Diagnostic:
    try:
        return Diagnostic(name, True, check(store))
    except _FailedError as failure:
        detail, fix = failure.args
        return Diagnostic(name, False, detail, fix)
    except StoreError as error:
        # URI: cannot VERB: REASON[: CURE]
        detail, _, cure = str(error).rpartition(": ")
        if detail.rpartition(": ")[2].startswith("cannot "):
            return Diagnostic(name, False, str(error), "choose another URI")
        return Diagnostic(name, False, detail, cure)


def _check_endpoint(s3: "S3Store") -> str:
    endpoint = s3.service.endpoint
    transport = "TLS" if endpoint.url.startswith("https://") else "no TLS: keys and data are readable on the way"
    source = f"files in {endpoint.secrets}" if endpoint.secrets else "environment"
    return f"{endpoint.url}, region {endpoint.region}, {transport}, credentials from {source}"


def _check_write(store: Store) -> str:
    begun = time.monotonic()
    store.put("blob", b"0123456789")
    return f"{_format_milliseconds(begun)} for a small object"


def _check_read_back(store: Store) -> str:
    cure = "use a consistent store; is there a cache in between?"
    begun = time.monotonic()
    for number in range(20):
        store.put("fresh", b"%d" % number)
        _expect_equal(store.get("fresh"), b"%d" % number, "a read right after a write", cure)
    return f"what is written can be read at once ({_format_milliseconds(begun, 40)} per request)"


def _check_overwrite(store: Store) -> str:
    store.put("twice", b"old and longer")
    store.put("twice", b"new")
    cure = "allow objects to be replaced: no object lock, no write-once bucket"
    _expect_equal(store.get("twice"), b"new", "an object written twice", cure)
    return "the later bytes stay"


def _check_ranges(store: Store) -> str:
    cure = "look for a proxy between that changes range requests"
    _expect_equal(store.get_range("blob", 3, 4), b"3456", "bytes [3, 7)", cure)
    _expect_equal(store.get_range("blob", 8, 100), b"89", "a range over the end", cure)
    _expect_equal(store.get_range("blob", 100, 1), b"", "a range behind the end", cure)
    return "ranges are exact, also at the end"


def _check_names(store: Store) -> str:
    cure = "rename what the server cannot spell, or use another server"
    names = sorted([*NAMES, LONG], key=str.encode)
    for name in names:
        store.put(f"names/{name}", name.encode())
    for name in names:
        _expect_equal(store.get(f"names/{name}"), name.encode(), f"the object named {name[:40]!r}", cure)
        _expect_equal(list(store.list(f"names/{name}")), [f"names/{name}"], f"the list of what begins with {name[:40]!r}", cure)
    _expect_equal(list(store.list("names/")), [f"names/{name}" for name in names], "the list of odd names", cure)
    return f"spaces, signs, Unicode and keys of {len(LONG)} bytes are kept"


def _check_list_order(store: Store) -> str:
    keys = ["order/a", "order/b/1", "order/b-c", "order/b/10", "order/b/2", "order/B", "order/bc", "order/ä"]
    for key in keys:
        store.put(key, b"")
    cure = "use a server that lists keys in the order of their UTF-8 bytes"
    _expect_equal(list(store.list("order/")), sorted(keys, key=str.encode), "the order of a list", cure)
    _expect_equal(list(store.list("order/b/1")), ["order/b/1", "order/b/10"], "a list by the beginning of a name", cure)
    return "in the order of UTF-8 bytes, by any beginning"


def _check_list_pages(store: Store, paged_keys: int) -> str:
    keys = [f"many/{number:06}" for number in range(paged_keys)]
    begun = time.monotonic()
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(lambda key: store.put(key, b""), keys))
    written = time.monotonic() - begun
    cure = "use a server whose ListObjectsV2 goes on after 1000 keys"
    _expect_equal(list(store.list("many/")), keys, f"a list of {paged_keys}", cure)
    return f"{paged_keys} keys, written at {paged_keys / max(written, 1e-3):.0f} per second"


def _check_create(store: Store) -> str:
    cure = "make sure that a written object is seen at once"
    _expect_equal([store.create("once", b"1"), store.create("once", b"2")], [True, False], "creating twice", cure)
    _expect_equal(store.get("once"), b"1", "what was created first", cure)
    with ThreadPoolExecutor(WRITERS) as pool:
        creators = sum(pool.map(lambda number: store.create("race", b"%d" % number), range(WRITERS)))
    if creators != 1:
        return f"an object that is there is not created again, but {creators} of {WRITERS} at once did: equal work may be done twice"
    return f"an object that is there is not created again; of {WRITERS} at once, one did"


def _check_missing(store: Store) -> str:
    cure = "allow these credentials to list the bucket: without, S3 says 'denied' for what is not there"
    try:
        exists = store.exists("nothing")
    except StoreError as error:
        raise _FailedError(str(error), cure) from error
    _expect_equal(exists, False, "whether a missing object exists", cure)
    return "what is not there is told from what is forbidden"


def _check_delete(store: Store) -> str:
    store.delete("blob")
    store.delete("blob")
    count = store.delete_prefix("") + 1
    cure = "allow these credentials to delete; remove what is left by hand"
    _expect_equal(list(store.list()), [], "what is left after deleting all", cure)
    return f"{count} objects removed"


def _check_space(store: LocalStore) -> str:
    return f"{shutil.disk_usage(store.root).free / (1 << 30):.1f} GiB free"


def _check_multipart(store: "S3Store") -> str:
    data = secrets.token_bytes(1 << 20) * 11
    begun = time.monotonic()
    store.put("large", data)
    seconds = time.monotonic() - begun
    cure = "allow multipart uploads, also through proxies: bodies of 16 MiB and more"
    _expect_equal(store.size("large"), len(data), "the size of an object in parts", cure)
    begun = time.monotonic()
    _expect_equal(store.get("large") == data, True, "whether an object in parts comes back as it was", cure)
    mib = len(data) / (1 << 20)
    return f"3 parts; {mib / seconds:.0f} MiB/s up, {mib / (time.monotonic() - begun):.0f} MiB/s down, one object at a time"


def _check_metadata(store: "S3Store") -> str:
    from ns.storage.s3 import CHECKSUM

    prefix = store.uri.removeprefix(f"s3://{store.bucket}/")
    with _translate_probe_errors(store):
        head = store.service.client.stat_object(bucket_name=store.bucket, object_name=f"{prefix}/blob")
    header_names = {name.lower() for name in head.metadata or {}}
    if f"x-amz-meta-{CHECKSUM}" not in header_names:
        return "NOT kept: checksums of our own are lost, so reads are checked by the server's MD5 or by size only"
    return "checksums of our own are kept, and checked on every whole read"


def _check_clock(store: "S3Store") -> str:
    # Every answer has the time, also a refusal.
    with _translate_probe_errors(store):
        response = store.service.pool.request("HEAD", store.service.endpoint.url)
    server_date = response.headers.get("date")
    if not server_date:
        return "the server does not tell its time; it accepts ours"
    skew = (parsedate_to_datetime(server_date) - datetime.now(UTC)).total_seconds()
    if abs(skew) > SKEW_SECONDS:
        raise _FailedError(
            f"the server's clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this machine's; at 900 s it refuses",
            "set the clocks by NTP, here and there",
        )
    return f"{abs(skew):.0f} s apart"


def _translate_probe_errors(store: "S3Store") -> AbstractContextManager[None]:
    from ns.storage.s3_errors import s3_errors_as_store_errors

    return s3_errors_as_store_errors(store.uri, "probe", store.bucket, store.service.endpoint)


def _expect_equal(actual: object, expected: object, what: str, fix: str) -> None:
    if actual != expected:
        raise _FailedError(f"{what} is {_format_value(actual)}, expected {_format_value(expected)}", fix)


def _format_value(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, bytes) else repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _format_milliseconds(begun: float, requests: int = 1) -> str:
    return f"{(time.monotonic() - begun) / requests * 1000:.0f} ms"
