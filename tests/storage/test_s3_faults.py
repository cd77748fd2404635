"""Busy servers, broken connections, damaged bytes: nothing is lost, and nothing wrong is taken for right."""

import hashlib
import random
import tarfile
import threading

import pytest

from ns.core.errors import StoreError
from ns.storage.retry import RetryBudget, RetryPolicy
from ns.storage.s3 import S3Service, S3Store
from tests.storage.conftest import PART_BYTES
from tests.storage.faults import SLOW_DOWN, Fault

pytestmark = pytest.mark.integration

DATA = random.Random(1).randbytes(3_000_000)
READS = {
    "get": lambda store: store.get("a"),
    "range": lambda store: store.get_range("a", 0, len(DATA)),
    "path": lambda store: store.path("a").read_bytes(),
    "open": lambda store: store.open("a").read(),
}
read_calls = pytest.mark.parametrize("read", READS.values(), ids=READS)


@read_calls
@pytest.mark.parametrize(
    "fault",
    [
        Fault("GET", times=3, status=503),
        Fault("GET", times=3, status=500, body=b"<html>oops</html>", headers={"Content-Type": "text/html"}),
        Fault("GET", times=3, status=429),
        Fault("GET", times=3, reset="before"),
        Fault("GET", times=3, reset="after"),
        Fault("GET", times=3, truncate=1_000_000),
        Fault("GET", times=1, truncate=0),
        Fault("GET", times=3, truncate=1_000_000, whole=True),
        Fault("GET", delay=0.1),
    ],
    ids=lambda fault: "-".join(
        str(value) for value in (fault.status, fault.reset, fault.truncate, fault.whole, fault.delay) if value
    ),
)
def test_reads_are_retried(proxied, read, fault):
    store, proxy = proxied
    store.put("a", DATA)
    fault.times = min(fault.times, 3)
    proxy.faults = [Fault(**fault.__dict__)]
    assert read(store) == DATA


@pytest.mark.parametrize(
    "fault",
    [
        Fault("PUT", times=3, status=503),
        Fault("PUT", times=2, reset="before"),
        Fault("PUT", times=2, reset="after"),
        Fault("PUT", status=400, body=SLOW_DOWN.replace(b"SlowDown", b"RequestTimeout")),
        Fault("POST", times=2, status=503),
        Fault("POST", times=2, reset="before"),
        # The answer to a completed upload is lost: completing it again finds no parts.
        Fault("POST .*uploadId", reset="after"),
        Fault("HEAD", times=2, status=503),
    ],
    ids=lambda fault: f"{fault.match}-{fault.status or fault.reset}",
)
def test_writes_are_retried(proxied, fault, tmp_path):
    store, proxy = proxied
    source = tmp_path / "source"
    source.write_bytes(DATA * 4)
    proxy.faults = [Fault(**fault.__dict__)]
    store.put_file("big", source)
    store.put("small", DATA)
    assert all(fault.times == 0 for fault in proxy.faults)
    proxy.faults = []
    assert store.get("big") == DATA * 4
    assert store.get("small") == DATA
    assert list(store.list()) == ["big", "small"]


def test_other_calls_are_retried(proxied):
    store, proxy = proxied
    store.put("a", b"1")
    proxy.faults = [
        Fault("HEAD", status=503),
        Fault("GET .*list-type", times=2, reset="before"),
        Fault("DELETE", reset="after"),
        Fault("DELETE", status=503),
    ]
    assert store.exists("a")
    assert list(store.list()) == ["a"]
    assert store.delete_prefix("") == 1
    assert not store.exists("a")
    assert all(fault.times == 0 for fault in proxy.faults)


def test_broken_download_continues_where_it_stopped(proxied):
    store, proxy = proxied
    store.put("a", DATA)
    proxy.faults = [Fault("GET", times=2, truncate=1_300_000)]
    proxy.requests.clear()
    assert store.get("a") == DATA
    assert proxy.count("GET") == 3


def test_each_part_of_an_upload_has_its_own_retries(proxied, tmp_path):
    store, proxy = proxied
    source = tmp_path / "source"
    source.write_bytes(DATA * 6)
    proxy.faults = [Fault(f"partNumber={number}&", times=2, status=503) for number in (1, 2, 3)]
    store.put_file("a", source)
    assert proxy.count("partNumber") == 4 + 6
    assert store.get("a") == DATA * 6


def test_failed_upload_is_aborted(proxied, tmp_path):
    store, proxy = proxied
    store.put("a", b"old")
    source = tmp_path / "source"
    source.write_bytes(DATA * 6)
    proxy.faults = [Fault("partNumber=2", times=99, status=403, body=SLOW_DOWN.replace(b"SlowDown", b"AccessDenied"))]
    with pytest.raises(StoreError, match=r"/a: cannot write: access denied"):
        store.put_file("a", source)
    assert proxy.count("DELETE .*uploadId") == 1
    assert store.get("a") == b"old"


def test_put_file_refuses_a_changing_file(proxied, tmp_path):
    store, proxy = proxied
    source = tmp_path / "source"
    source.write_bytes(DATA * 6)
    proxy.faults = [Fault("POST", delay=0.3)]
    threading.Timer(0.15, lambda: source.write_bytes(DATA * 5)).start()
    with pytest.raises(StoreError, match=r"source was changed while it was being uploaded"):
        store.put_file("a", source)
    assert not store.exists("a")
    assert proxy.count("DELETE .*uploadId") == 1


@read_calls
@pytest.mark.parametrize("length", [len(DATA), PART_BYTES + 1])
def test_damaged_bytes_are_refused(proxied, read, length):
    store, proxy = proxied
    data = (DATA * 2)[:length]
    store.put("a", data)
    proxy.faults = [Fault("GET", times=99, flip=True)]
    if read is READS["range"]:
        # No checksum belongs to a range.
        return
    with pytest.raises(
        StoreError, match=r"/a: cannot read: the bytes do not match the checksum kept with them \(sha256"
    ) as caught:
        read(store)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [READS["get"], READS["path"]], ids=["get", "path"])
def test_bytes_damaged_once_are_fetched_again(proxied, read):
    store, proxy = proxied
    store.put("a", DATA)
    proxy.faults = [Fault("GET", times=2, flip=True)]
    assert read(store) == DATA


def test_foreign_objects_are_checked_by_md5(proxied):
    store, proxy = proxied
    store.put("a", DATA)
    unsigned = ("x-amz-meta-sha256",)
    proxy.faults = [Fault("GET", drop=unsigned)]
    assert store.get("a") == DATA
    proxy.faults = [Fault("GET", times=99, drop=unsigned, flip=True)]
    with pytest.raises(StoreError, match=r"do not match the checksum kept with them \(md5"):
        store.get("a")
    # Of nothing but its size, where the server keeps no MD5.
    proxy.faults = [Fault("GET", drop=(*unsigned, "etag"), flip=True)]
    assert len(store.get("a")) == len(DATA)


def test_replaced_blob_is_read_again(proxied):
    store, proxy = proxied
    store.put("a", DATA)
    proxy.faults = [Fault("GET", truncate=1_300_000), Fault("GET", delay=0.2)]
    threading.Timer(0.1, lambda: S3Store(store.uri, store.service).put("a", b"new" * 1_000_000)).start()
    assert store.get("a") == b"new" * 1_000_000


def test_open_survives_resets(proxied, tmp_path):
    store, proxy = proxied
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(20):
            (tmp_path / "x").write_bytes(bytes([number]) * 200_000)
            tar.add(tmp_path / "x", str(number))
    store.put_file("a.tar", tmp_path / "a.tar")
    proxy.faults = [Fault("GET", times=4, truncate=900_000), Fault("GET", times=2, status=503)]
    with store.open("a.tar") as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        read = [tar.extractfile(member).read() for member in tar]
    assert read == [bytes([number]) * 200_000 for number in range(20)]


def test_retries_end_after_their_time(proxied):
    store, proxy = proxied
    store.put("a", b"1")
    now = [0.0]
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        now[0] += seconds

    patience = RetryPolicy(seconds=60, clock=lambda: now[0], sleep=sleep, uniform=lambda low, high: high)
    slow = S3Store(store.uri, S3Service(store.service.endpoint, retry_policy=patience))
    proxy.faults = [Fault("GET", times=99, status=503)]
    with pytest.raises(StoreError, match=r"still too busy or broken after retries \(503 SlowDown\)"):
        slow.get("a")
    # Twice as long each time, to the cap; with full jitter these are the upper bounds.
    assert waits == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10, 10, 10])
    assert now[0] <= 60


def test_permanent_error_is_not_retried(proxied):
    store, proxy = proxied
    store.put("a", b"1")
    proxy.requests.clear()
    proxy.faults = [Fault("GET", status=501, body=SLOW_DOWN.replace(b"SlowDown", b"NotImplemented"))]
    with pytest.raises(StoreError, match="the server says NotImplemented"):
        store.get("a")
    assert proxy.count("GET") == 1


def test_retry_budget_has_full_jitter_and_restarts_on_progress():
    now = [0.0]
    drawn = []

    def uniform(low, high):
        drawn.append((low, high))
        return high

    def sleep(seconds):
        now[0] += seconds

    trial = RetryBudget(RetryPolicy(seconds=1, base_seconds=0.3, clock=lambda: now[0], sleep=sleep, uniform=uniform), "x")
    assert [trial.wait_for_retry("y") for _ in range(3)] == [True, True, False]
    assert drawn == [(0, 0.3), (0, 0.6), (0, 1.2)]
    trial.reset_budget()
    assert trial.wait_for_retry("y")


def test_get_range_copes_with_whole_answers(proxied):
    store, proxy = proxied
    store.put("a", DATA)
    proxy.faults = [Fault("GET", times=99, whole=True)]
    assert store.get_range("a", 1_234_567, 1000) == DATA[1_234_567:][:1000]
    assert store.get_range("a", len(DATA) - 5, 1000) == DATA[-5:]
    assert store.get_range("a", len(DATA) + 5, 1000) == b""


def test_store_survives_random_faults(proxied, tmp_path):
    """Every third request fails, each time in another way."""
    store, proxy = proxied
    kinds = [{"status": 503}, {"reset": "before"}, {"truncate": 100}, {"reset": "after"}]
    chooser = random.Random(2)
    proxy.next_fault = lambda request: Fault(**chooser.choice(kinds)) if chooser.random() < 0.33 else Fault()
    expected = {}
    for number in range(40):
        data = chooser.randbytes(chooser.randrange(200_000))
        expected[f"k/{number:03}"] = hashlib.sha256(data).hexdigest()
        (tmp_path / "file").write_bytes(data)
        store.put_file(f"k/{number:03}", tmp_path / "file")
    assert list(store.list("k/")) == list(expected)
    for key, digest in expected.items():
        for data in (store.get(key), store.path(key).read_bytes(), store.open(key).read()):
            assert hashlib.sha256(data).hexdigest() == digest
