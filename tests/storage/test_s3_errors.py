"""What a person reads when S3 cannot be used: one line with the URI, the reason and the cure, and no secret."""

import datetime
import errno
import ipaddress
import os
import ssl
import time

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from ns.core.errors import StoreError
from ns.storage import open_store
from ns.storage.endpoint import S3Endpoint
from ns.storage.s3 import S3Service, S3Store
from tests.storage.conftest import IMPATIENT, store_at
from tests.storage.faults import Fault, Proxy

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def secret(environment, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")


def calls(store):
    return {
        "get": lambda: store.get("k"),
        "get_range": lambda: store.get_range("k", 0, 1),
        "open": lambda: store.open("k"),
        "path": lambda: store.path("k"),
        "size": lambda: store.size("k"),
        "exists": lambda: store.exists("k"),
        "list": lambda: list(store.list("k")),
        "put": lambda: store.put("k", b""),
        "create": lambda: store.create("k", b""),
        "delete": lambda: store.delete("k"),
    }


def complaints(store, only=None):
    """What each method says, each checked for form."""
    for name, call in calls(store).items():
        if only is None or name in only:
            with pytest.raises(StoreError) as caught:
                call()
            message = str(caught.value)
            assert message.startswith(f"{store.uri}/k: cannot "), message
            assert "\n" not in message
            assert "hidden" not in message
            yield name, message


def store_for(url, monkeypatch, **environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return S3Store(
        "s3://bucket/p", S3Service(S3Endpoint.from_environment({**os.environ, "AWS_ENDPOINT_URL": url}), retry_policy=IMPATIENT)
    )


def error_body(code, **elements):
    rest = "".join(f"<{name}>{value}</{name}>" for name, value in elements.items())
    return f"<Error><Code>{code}</Code><Message>m</Message>{rest}</Error>".encode()


@pytest.fixture
def denying(moto):
    """Proxy and function: from now on every request fails with this code."""
    proxy = Proxy(moto)

    def deny(status, code, **elements):
        body = error_body(code, **elements)
        # As servers do: HEAD tells no more than the status.
        proxy.faults = [Fault("^HEAD", 99, status, b""), Fault("", 99, status, body)]
        return proxy.url

    yield deny
    proxy.close()


def test_missing_bucket_is_explained(moto, monkeypatch):
    store = store_for(moto, monkeypatch)
    for name, message in complaints(store):
        assert f"no bucket 'bucket' at {moto}: create it, or correct the URI" in message, name


def test_missing_key_takes_one_request(proxied):
    store, proxy = proxied
    assert not store.exists("k")
    proxy.requests.clear()
    assert not store.exists("k")
    assert len(proxy.requests) == 1


@pytest.mark.parametrize(
    ("status", "code", "elements", "expected"),
    [
        (403, "AccessDenied", {}, "access denied (AccessDenied): these credentials may not "),
        (403, "InvalidAccessKeyId", {}, "the server does not know the access key: correct AWS_ACCESS_KEY_ID"),
        (403, "SignatureDoesNotMatch", {}, "the secret key does not belong to the access key: correct AWS_SECRET_ACCESS_KEY"),
        (400, "ExpiredToken", {}, "the session token is not valid any more: get new credentials"),
        (
            403,
            "RequestTimeTooSkewed",
            {"RequestTime": "20260101T000000Z", "ServerTime": "2026-01-01T01:00:00Z"},
            "the clocks differ too much: this machine says 20260101T000000Z, the server 2026-01-01T01:00:00Z: set the clock",
        ),
        (
            400,
            "AuthorizationHeaderMalformed",
            {"Region": "eu-west-9"},
            "the bucket is not in region us-east-1: set AWS_REGION=eu-west-9",
        ),
        (301, "PermanentRedirect", {}, "the bucket is not in region us-east-1: set AWS_REGION, and AWS_ENDPOINT_URL"),
        (507, "QuotaExceeded", {}, "the server's storage is full ("),
        (405, "MethodNotAllowed", {}, "the server says MethodNotAllowed: m (HTTP 405)"),
    ],
)
def test_server_error_is_explained(denying, monkeypatch, status, code, elements, expected):
    url = denying(status, code, **elements)
    for name, message in complaints(store_for(url, monkeypatch)):
        assert expected in message, name


def test_wrong_secret_names_the_secret_files(denying, monkeypatch, tmp_path):
    (tmp_path / "accesskey").write_text("key\n")
    (tmp_path / "secretkey").write_text("hidden\n")
    store = store_for(denying(403, "SignatureDoesNotMatch"), monkeypatch, NS_S3_SECRETS=str(tmp_path))
    (_, message), *_ = complaints(store, {"get"})
    assert f"correct NS_S3_SECRETS ({tmp_path}/secretkey, accesskey)" in message


def test_missing_credentials_are_explained(moto, monkeypatch):
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for name, message in complaints(store_for(moto, monkeypatch)):
        assert "no credentials: AWS_SECRET_ACCESS_KEY is not set; set AWS_ACCESS_KEY_ID and" in message, name


def test_refused_connection_is_explained(monkeypatch):
    begun = time.monotonic()
    for name, message in complaints(store_for("http://127.0.0.1:9", monkeypatch)):
        assert (
            "nothing answers at http://127.0.0.1:9 (Connection refused): start the server, or correct AWS_ENDPOINT_URL"
            in message
        ), name
    # An address that never answered gets less patience than a server that went away.
    assert time.monotonic() - begun < 10 * IMPATIENT.seconds / 2


def test_unknown_host_is_explained(monkeypatch):
    (_, message), *_ = complaints(store_for("http://nowhere.invalid:9000", monkeypatch), {"get"})
    assert "the host of http://nowhere.invalid:9000 has no address (DNS): correct AWS_ENDPOINT_URL" in message


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (200, b"<html>Welcome</html>", "not in the words of S3; correct AWS_ENDPOINT_URL"),
        (404, b"not found", "answers HTTP 404, but not in the words of S3; correct AWS_ENDPOINT_URL"),
        (503, b"upstream down", "is still too busy or broken after retries (HTTP 503)"),
        (400, b"Client sent an HTTP request to an HTTPS server.", "if it speaks TLS, write https:// in AWS_ENDPOINT_URL"),
    ],
)
def test_other_server_is_explained(moto, monkeypatch, status, body, expected):
    proxy = Proxy(moto)
    proxy.faults = [Fault("", 999, status, body, {"Content-Type": "text/html"})]
    (_, message), *_ = complaints(store_for(proxy.url, monkeypatch), {"list"})
    assert expected in message
    proxy.close()


@pytest.fixture
def certificate(tmp_path):
    """PEM files of a certificate for 127.0.0.1 that nobody has signed but itself, and of its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (tmp_path / "cert.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    encryption = serialization.NoEncryption()
    kind = serialization.PrivateFormat.PKCS8
    (tmp_path / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, kind, encryption))
    return tmp_path / "cert.pem", tmp_path / "key.pem"


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "AWS_CA_BUNDLE"])
def test_tls_needs_a_trusted_certificate(moto, monkeypatch, certificate, variable):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    proxy = Proxy(moto, context)
    bucket = store_at(moto, None).bucket
    for name, message in complaints(store_for(proxy.url, monkeypatch)):
        assert f"TLS: the certificate of {proxy.url} is not trusted (self-signed certificate" in message, name
        assert "set SSL_CERT_FILE or AWS_CA_BUNDLE" in message
    monkeypatch.setenv(variable, str(certificate[0]))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    store = open_store(f"s3://{bucket}/p")
    store.put("k", b"over TLS")
    assert store.get("k") == b"over TLS"
    assert any("bucket" in request for request in proxy.requests)
    proxy.close()


def test_tls_with_a_plain_http_server_is_explained(moto, monkeypatch):
    url = moto.replace("http:", "https:")
    (_, message), *_ = complaints(store_for(url, monkeypatch), {"get"})
    assert f"TLS: {url} does not speak it: write http:// in AWS_ENDPOINT_URL" in message


def test_full_disk_under_the_cache_is_explained(proxied, monkeypatch, tmp_path):
    store, _ = proxied
    store.put("k", b"1" * 1000)

    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"the disk is full: free some space .*, or set NS_CACHE_DIR") as caught:
        store.path("k")
    assert str(caught.value).startswith(str(tmp_path / "cache"))
    assert not list((tmp_path / "cache" / "blobs").iterdir())
    # Reading without the cache goes on.
    assert store.get("k") == b"1" * 1000
