"""A real server that is killed and comes back, and that knows who is who."""

import concurrent.futures
import datetime
import hashlib
import random
import threading
import time

import minio.time
import pytest

from ns.core.errors import StoreError
from ns.storage.retry import RetryPolicy
from ns.storage.s3 import S3Service, S3Store
from tests.storage.conftest import PART_BYTES, store_at
from tests.storage.faults import Fault, Proxy

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

DATA = random.Random(3).randbytes(4_000_000)


@pytest.fixture
def patient(swift, tmp_path):
    """A store that waits for a server to come back."""
    store = store_at(swift.url, tmp_path / "cache")
    patience = RetryPolicy(seconds=60, first_contact_seconds=1, cap_seconds=0.5)
    return S3Store(
        store.uri, S3Service(store.service.endpoint, retry_policy=patience, cache=store.service.cache, part_bytes=PART_BYTES)
    )


@pytest.fixture
def outages(swift):
    """Function: kills the server `times` times, for a second each, while the test goes on."""
    threads = []

    def begin(times=3, after=0.3, between=1.0):
        def run():
            for _ in range(times):
                time.sleep(after)
                swift.kill()
                time.sleep(between)
                swift.start()

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return threads[-1]

    yield begin
    for thread in threads:
        thread.join()


def test_writes_survive_a_killed_server(patient, outages, tmp_path):
    patient.put("warm", b"1")
    trouble = outages(times=3)
    digests = {}
    number = 0
    # For as long as the server comes and goes, small blobs and large ones, several at a time.
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        while trouble.is_alive() or number < 12:
            writes = []
            for _ in range(3):
                data = DATA[number:] * (5 if number % 4 == 0 else 1)
                source = tmp_path / f"{number}"
                source.write_bytes(data)
                digests[f"blob/{number:05}"] = hashlib.sha256(data).hexdigest()
                writes.append(pool.submit(patient.put_file, f"blob/{number:05}", source))
                number += 1
            for write in writes:
                write.result()
    assert list(patient.list("blob/")) == list(digests)
    for key, digest in digests.items():
        assert hashlib.sha256(patient.get(key)).hexdigest() == digest


def test_reads_survive_a_killed_server(patient, outages):
    patient.put("a", DATA * 5)
    digest = hashlib.sha256(DATA * 5).hexdigest()
    trouble = outages(times=3)
    rounds = 0
    while trouble.is_alive() or rounds < 3:
        rounds += 1
        assert hashlib.sha256(patient.get("a")).hexdigest() == digest
        with patient.open("a") as stream:
            hasher = hashlib.sha256()
            while chunk := stream.read(700_000):
                hasher.update(chunk)
                time.sleep(0.01)
        assert hasher.hexdigest() == digest
        assert patient.get_range("a", 3_999_990, 20) == DATA[-10:] + DATA[:10]
        assert patient.path("a").stat().st_size == len(DATA) * 5
        assert list(patient.list()) == ["a"]


def test_failed_write_leaves_the_old_blob(swift, tmp_path):
    store = store_at(swift.url, tmp_path / "cache")
    store.put("a", b"old")
    source = tmp_path / "source"
    source.write_bytes(DATA * 10)
    proxy = Proxy(swift.url)
    proxy.faults = [Fault("partNumber=2", times=999, reset="before")]
    with pytest.raises(StoreError, match="broke off, also after retries"):
        store_at(proxy.url, tmp_path / "cache", store.bucket).put_file("a", source)
    proxy.close()
    swift.kill()
    with pytest.raises(StoreError, match="nothing answers at"):
        store.get("a")
    swift.start()
    assert store.get("a") == b"old"
    assert list(store.list()) == ["a"]


def test_denied_access_is_explained(swift, tmp_path, monkeypatch):
    store = store_at(swift.url, tmp_path / "cache")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    for call in (lambda: store.get("a"), lambda: store.exists("a"), lambda: store.put("a", b""), lambda: list(store.list())):
        with pytest.raises(StoreError, match="correct AWS_SECRET_ACCESS_KEY") as caught:
            call()
        assert "hidden" not in str(caught.value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody:nowhere")
    with pytest.raises(StoreError, match="or AWS_ACCESS_KEY_ID"):
        store.exists("a")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test:guest")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "guessing")
    for call in (lambda: store.get("a"), lambda: store.exists("a"), lambda: store.put("a", b""), lambda: list(store.list())):
        with pytest.raises(StoreError, match="access denied"):
            call()


def test_missing_bucket_is_explained_on_swift(swift, tmp_path):
    store = store_at(swift.url, tmp_path / "cache", "no-such-bucket")
    for call in (lambda: store.get("a"), lambda: store.exists("a"), lambda: store.put("a", b""), lambda: list(store.list())):
        with pytest.raises(StoreError, match="no bucket 'no-such-bucket' at"):
            call()


def test_clock_skew_is_explained(swift, tmp_path, monkeypatch):
    store = store_at(swift.url, tmp_path / "cache")
    now = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)
    monkeypatch.setattr(minio.time, "utcnow", lambda: now)
    for call in (lambda: store.get("a"), lambda: store.exists("a")):
        with pytest.raises(StoreError, match=r"the clocks differ too much: this machine says .*, the server .*: set the clock"):
            call()
