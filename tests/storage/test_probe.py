from dataclasses import replace

import pytest

from ns.core.diagnostics import Diagnostic
from ns.core.errors import StoreError
from ns.storage.probe import PAGED_KEYS, probe_store
from tests.storage.conftest import store_at
from tests.storage.faults import Fault, Proxy

COMMON = ["write", "read-back", "overwrite", "range", "names", "list-order", "list-pages", "create", "missing"]
S3 = ["endpoint", *COMMON, "multipart", "metadata", "clock", "delete"]


@pytest.fixture
def through(moto, monkeypatch, tmp_path):
    """Proxy and URI of a bucket behind it, as the environment says."""
    proxy = Proxy(moto)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield proxy, store_at(moto, tmp_path).uri
    proxy.close()


def by_name(findings: list[Diagnostic]) -> dict[str, Diagnostic]:
    for finding in findings:
        assert "\n" not in finding.detail + finding.fix
        assert finding.detail
        assert bool(finding.fix) != finding.ok, finding
    return {finding.name: finding for finding in findings}


def test_probe_of_a_folder_passes_and_leaves_nothing(tmp_path):
    (tmp_path / "mine").write_bytes(b"1")
    findings = probe_store(str(tmp_path), paged_keys=20)
    assert [finding.name for finding in findings] == [*COMMON, "space", "delete"]
    assert all(finding.ok for finding in by_name(findings).values()), findings
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_probe_says_why_a_folder_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    (finding,) = probe_store(f"{tmp_path}/file/x")
    assert (finding.name, finding.ok) == ("write", False)
    assert finding.detail.endswith("cannot write: a part of this path is a file, expected a folder")
    assert finding.fix == "choose another URI"


@pytest.mark.integration
def test_probe_of_a_server_passes_and_leaves_nothing(through, tmp_path, moto):
    _, uri = through
    findings = by_name(probe_store(uri, paged_keys=30))
    assert list(findings) == S3
    assert all(finding.ok for finding in findings.values()), findings
    assert "no TLS" in findings["endpoint"].detail
    assert "are kept" in findings["metadata"].detail
    bucket = uri.removeprefix("s3://").partition("/")[0]
    assert list(store_at(moto, tmp_path, bucket).list()) == []


@pytest.mark.integration
def test_probe_stops_where_nothing_can_be_written(through):
    proxy, uri = through
    proxy.faults = [Fault("PUT", 99, 403, b"<Error><Code>AccessDenied</Code></Error>")]
    endpoint, write = probe_store(uri)
    assert endpoint.ok
    assert (write.name, write.ok) == ("write", False)
    assert "access denied (AccessDenied)" in write.detail
    assert "allow it in the bucket's policy" in write.fix


FAULTS = {
    "multipart": (Fault("POST", 99, 501, b"<Error><Code>NotImplemented</Code></Error>"), "NotImplemented"),
    "list-order": (
        Fault("GET .*list-type.*order%2F$", 99, 200, b"<ListBucketResult><Name>b</Name></ListBucketResult>"),
        "is []",
    ),
    "delete": (Fault("DELETE .*blob", 99, 403, b"<Error><Code>AccessDenied</Code></Error>"), "access denied"),
    "missing": (Fault("nothing", 99, 403, b"<Error><Code>AccessDenied</Code></Error>"), "access denied"),
    "read-back": (
        Fault("GET .*/fresh", 5, 200, b"stale", {"ETag": "x"}),
        "a read right after a write is b'stale', expected b'0'",
    ),
    "clock": (Fault("HEAD /$", 1, 200, b"", {"Date": "Thu, 01 Jan 2026 00:00:00 GMT"}), "the server's clock is "),
}


@pytest.mark.integration
@pytest.mark.parametrize("broken", [("read-back", "list-order", "multipart"), ("missing", "clock", "delete")], ids="-".join)
def test_probe_finds_all_faults_and_tries_the_rest(through, broken):
    proxy, uri = through
    proxy.faults = [replace(FAULTS[name][0]) for name in broken]
    findings = by_name(probe_store(uri, paged_keys=3))
    assert list(findings) == S3
    assert tuple(finding.name for finding in findings.values() if not finding.ok) == broken
    for name in broken:
        assert FAULTS[name][1] in findings[name].detail


@pytest.mark.integration
def test_probe_accepts_a_server_that_drops_metadata(through):
    proxy, uri = through
    proxy.faults = [Fault("HEAD .*blob", 99, drop=("x-amz-meta-sha256",))]
    metadata = by_name(probe_store(uri, paged_keys=3))["metadata"]
    assert metadata.ok
    assert "NOT kept" in metadata.detail


def test_probe_refuses_an_unknown_scheme():
    with pytest.raises(StoreError, match="no store for scheme"):
        probe_store("ftp://x")


@pytest.mark.integration
@pytest.mark.timeout(300)
def test_probe_of_swift_passes(swift, monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_ENDPOINT_URL", swift.url)
    store = store_at(swift.url, tmp_path)
    findings = by_name(probe_store(store.uri))
    assert list(findings) == S3
    assert all(finding.ok for finding in findings.values()), findings
    assert findings["list-pages"].detail.startswith(f"{PAGED_KEYS} keys")
    assert list(store.list()) == []
