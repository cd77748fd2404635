"""Import from S3 and to S3, also with errors of the server."""

import threading
import time

import pytest

from ns.config.schema import ImportConfig
from ns.data.importing.ingest import import_images
from ns.data.index import build_index_key
from ns.data.shards import check_shard_file
from ns.storage import LocalStore
from ns.storage.retry import RetryPolicy
from ns.storage.s3 import S3Service, S3Store
from tests.storage.conftest import PART_BYTES, environment, moto, proxied, store_at, swift  # noqa: F401
from tests.storage.faults import Fault

pytestmark = pytest.mark.integration

CONFIG = ImportConfig(max_rejected_share=0.5, shard_samples=20, shard_mib=1)


@pytest.fixture
def folder(tmp_path, picture):
    for number in range(60):
        path = tmp_path / "source" / ("cat" if number % 2 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number, size=24))
    (tmp_path / "source" / "cat" / "bad.png").write_bytes(b"no image")
    return tmp_path / "source"


def upload(folder, store):
    for path in folder.rglob("*.png"):
        store.put(path.relative_to(folder).as_posix(), path.read_bytes())


def run(source, out, **options):
    return import_images(source, out, name="n", role="labeled", config=CONFIG, workers=1, **options)


@pytest.mark.usefixtures("environment")
def test_import_from_s3_equals_import_from_folder(moto, tmp_path, folder, monkeypatch):  # noqa: F811
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    expected = run(str(folder), LocalStore(tmp_path / "local"))
    store = store_at(moto, tmp_path / "cache")
    upload(folder, store.at("source"))
    out = store.at("out")
    assert run(f"{store.uri}/source", out) == expected
    for shard in expected.shards:
        check_shard_file(out.path(shard.name), shard, shard.name)
    assert sorted(out.list()) == [
        "dataset.json",
        "rejected.parquet",
        *(name for shard in expected.shards for name in (build_index_key(shard), shard.name)),
    ]
    # Shards on S3 are a source too.
    again = run(f"{store.uri}/out/shard-{{00000..00003}}.tar", store.at("again"), classes=expected.classes)
    assert again.samples == expected.samples == 60


@pytest.mark.usefixtures("environment")
def test_table_on_s3_equals_table_on_disk(moto, tmp_path, folder, monkeypatch):  # noqa: F811
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    rows = ["cat/1.png,cat", r"cat\3.png,cat", r".\dog\0.png,dog", "./dog/2.png,dog", r"cat\1.png,cat", "cat/none.png,cat"]
    (folder / "t.csv").write_text("\n".join(["path,label", *rows]))
    expected = run(str(folder / "t.csv"), LocalStore(tmp_path / "local"))
    assert (expected.samples, expected.rejected) == (4, 1)
    store = store_at(moto, tmp_path / "cache")
    upload(folder, store.at("source"))
    store.put("source/t.csv", (folder / "t.csv").read_bytes())
    assert run(f"{store.uri}/source/t.csv", store.at("out")) == expected


@pytest.mark.usefixtures("environment")
def test_import_survives_s3_errors(proxied, tmp_path, folder, monkeypatch):  # noqa: F811
    store, proxy = proxied
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    expected = run(str(folder), LocalStore(tmp_path / "local"))
    upload(folder, store.at("source"))
    proxy.faults = [
        Fault("GET .*7.png", 2, 503, b"<Error><Code>SlowDown</Code></Error>"),
        Fault("GET .*8.png", 1, truncate=100),
        Fault("PUT .*shard-00001", 2, 500, b""),
        Fault("PUT .*parts", 1, 503, b""),
    ]
    assert run(f"{store.uri}/source", store.at("out")) == expected
    assert not any(fault.times for fault in proxy.faults)


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("environment")
def test_import_survives_server_restarts(swift, tmp_path, folder, monkeypatch):  # noqa: F811
    expected = run(str(folder), LocalStore(tmp_path / "local"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", swift.url)
    found = store_at(swift.url, tmp_path / "cache")
    patience = RetryPolicy(seconds=60, first_contact_seconds=60, cap_seconds=0.5)
    store = S3Store(
        found.uri, S3Service(found.service.endpoint, retry_policy=patience, cache=found.service.cache, part_bytes=PART_BYTES)
    )
    upload(folder, store.at("source"))

    def trouble():
        for _ in range(3):
            time.sleep(0.3)
            swift.kill()
            time.sleep(0.7)
            swift.start()

    thread = threading.Thread(target=trouble)
    thread.start()
    try:
        for number in range(4):
            assert run(f"{store.uri}/source", store.at(f"out-{number}")) == expected
    finally:
        thread.join()
