import itertools
import logging
import os
import shutil
import threading
from collections.abc import Iterator

import pytest
from minio import Minio

from ns.storage import LocalStore
from ns.storage.cache import BlobCache
from ns.storage.endpoint import S3Endpoint
from ns.storage.retry import RetryPolicy
from ns.storage.s3 import S3Service, S3Store
from tests.storage.faults import Proxy

KEYS = {"AWS_ACCESS_KEY_ID": "test:tester", "AWS_SECRET_ACCESS_KEY": "testing"}
# No test waits long: not for a server that will not come, nor between two attempts.
IMPATIENT = RetryPolicy(seconds=1.5, first_contact_seconds=0.1, base_seconds=0.005, cap_seconds=0.05)
PART_BYTES = 5 << 20
numbers = itertools.count()


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path_factory):
    """Nothing from the machine that runs the tests, and no cache of its user's."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "NS_S3_")) or name == "SSL_CERT_FILE"]:
        monkeypatch.delenv(name)
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NS_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """The address of a server that speaks S3 and forgets."""
    from moto.moto_server.werkzeug_app import MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    # S3 alone: a server of all services lists the folders of its package, twice, to find the one that a request is for.
    server = make_server("127.0.0.1", 0, create_backend_app("s3"), threaded=True, request_handler=MotoRequestHandler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def swift(tmp_path_factory):
    """A server that keeps its objects on disk, and can be killed and started again."""
    from tests.storage.swift import Swift, reason_against

    reason = reason_against()
    if reason:
        pytest.skip(reason)
    server = Swift(tmp_path_factory.mktemp("swift"))
    server.start()
    yield server
    server.kill()


def store_at(url: str, cache, bucket: str | None = None) -> S3Store:
    """A store in a new bucket of the server at `url`."""
    endpoint = S3Endpoint.from_environment({"AWS_ENDPOINT_URL": url})
    if bucket is None:
        bucket = f"bucket-{os.getpid()}-{next(numbers)}"
        parts = url.removeprefix("http://")
        keys = {"access_key": KEYS["AWS_ACCESS_KEY_ID"], "secret_key": KEYS["AWS_SECRET_ACCESS_KEY"]}
        Minio(endpoint=parts, secure=False, region="us-east-1", **keys).make_bucket(bucket_name=bucket)
    service = S3Service(endpoint, retry_policy=IMPATIENT, cache=BlobCache(cache, 1 << 30), part_bytes=PART_BYTES)
    return S3Store(f"s3://{bucket}/some/prefix", service)


@pytest.fixture(
    scope="module",
    params=[
        "folder",
        pytest.param("moto", marks=pytest.mark.integration),
        pytest.param("swift", marks=[pytest.mark.integration, pytest.mark.timeout(300)]),
    ],
)
def any_store(request, tmp_path_factory):
    """An empty store of each kind, for the tests of one module."""
    folder = tmp_path_factory.mktemp("store")
    if request.param == "folder":
        return LocalStore(folder / "store")
    server = request.getfixturevalue(request.param)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        return store_at(server if request.param == "moto" else server.url, folder / "cache")


@pytest.fixture
def store(any_store):
    """A folder of its own for each test."""
    return any_store.at(f"test-{next(numbers)}")


@pytest.fixture
def proxied(moto, tmp_path) -> Iterator[tuple[S3Store, Proxy]]:
    """A store behind a proxy that can be told to misbehave."""
    proxy = Proxy(moto)
    yield store_at(proxy.url, tmp_path / "cache"), proxy
    proxy.close()
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
