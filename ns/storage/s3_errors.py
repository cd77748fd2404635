"""Errors of S3 servers in one line, with the cure, and without secrets."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from minio.error import InvalidResponseError, MinioException, S3Error, ServerError
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    NameResolutionError,
    NewConnectionError,
    ProtocolError,
    ReadTimeoutError,
    SSLError,
)

from ns.core.errors import StoreError
from ns.storage.endpoint import SECRETS_VARIABLE, S3Endpoint
from ns.storage.retry import BUSY

MISSING = frozenset({"NoSuchKey", "NoSuchObject"})


@contextmanager
def s3_errors_as_store_errors(uri: str, verb: str, bucket: str, endpoint: S3Endpoint) -> Iterator[None]:
    """Turns any failure of a request inside the context into a StoreError that begins with the blob's URI."""
    try:
        yield
    except StoreError as error:
        # Errors of the credentials do not name the blob.
        if str(error).startswith(uri):
            raise
        raise StoreError(f"{uri}: cannot {verb}: {error}") from error
    except (MinioException, HTTPError, ValueError, ET.ParseError) as error:
        raise StoreError(f"{uri}: cannot {verb}: {explain_s3_failure(error, verb, bucket, endpoint)}") from error


def explain_s3_failure(error: Exception, verb: str, bucket: str, endpoint: S3Endpoint) -> str:
    if isinstance(error, S3Error):
        return _explain_s3_error(error, verb, bucket, endpoint)
    if isinstance(error, ServerError | InvalidResponseError):
        return _explain_bad_response(error, endpoint)
    if isinstance(error, ET.ParseError) or "XML element" in str(error):
        return f"{endpoint.url} answers, but not in the words of S3; correct AWS_ENDPOINT_URL"
    if isinstance(error, HTTPError):
        return _explain_no_response(error, endpoint)
    return f"{_to_single_line(error)}; correct the URI"


def _explain_s3_error(error: S3Error, verb: str, bucket: str, endpoint: S3Endpoint) -> str:
    code = error.code or "unknown error"
    status = error.response.status
    if code in MISSING:
        return "no such object: check the key, and whether the stage that writes it has run"
    if code == "NoSuchBucket":
        return f"no bucket {bucket!r} at {endpoint.url}: create it, or correct the URI"
    if code in ("InvalidAccessKeyId", "InvalidAccessKey"):
        cure = f"{SECRETS_VARIABLE} ({endpoint.secrets}/accesskey)" if endpoint.secrets else "AWS_ACCESS_KEY_ID"
        return f"the server does not know the access key: correct {cure}"
    if code == "SignatureDoesNotMatch":
        keys = "AWS_SECRET_ACCESS_KEY or AWS_ACCESS_KEY_ID"
        cure = f"{SECRETS_VARIABLE} ({endpoint.secrets}/secretkey, accesskey)" if endpoint.secrets else keys
        return f"the secret key does not belong to the access key: correct {cure} (or AWS_REGION, now {endpoint.region})"
    if code in ("ExpiredToken", "InvalidToken", "TokenRefreshRequired"):
        return "the session token is not valid any more: get new credentials and set AWS_SESSION_TOKEN with them"
    if code == "RequestTimeTooSkewed":
        return _explain_clock_skew(error)
    region = error.response.headers.get("x-amz-bucket-region") or _find_element(error, "Region")
    if region or code in ("PermanentRedirect", "TemporaryRedirect", "Redirect", "AuthorizationHeaderMalformed"):
        cure = f"set AWS_REGION={region}" if region else "set AWS_REGION, and AWS_ENDPOINT_URL to where the bucket lives"
        return f"the bucket is not in region {endpoint.region}: {cure}"
    if code in ("AccessDenied", "AllAccessDisabled", "AccountProblem") or status == 403:
        return f"access denied ({code}): these credentials may not {verb} here; allow it in the bucket's policy, or use others"
    if code in ("BadDigest", "XAmzContentSHA256Mismatch", "InvalidDigest"):
        return f"the bytes were damaged on the way ({code}): run the same command again, and look at the network between"
    if code in ("KeyTooLongError", "KeyTooLong"):
        return "the key is too long: S3 takes 1024 bytes with the prefix; shorten it"
    if code in ("QuotaExceeded", "QuotaExceededException", "XMinioStorageFull", "InsufficientStorage") or status == 507:
        return f"the server's storage is full ({code}): free some space there and run the same command again"
    if status in BUSY:
        return f"the server is still too busy or broken after retries ({status} {code}): run the same command again later"
    return f"the server says {code}{f': {_to_single_line(error.message)}' if error.message else ''} (HTTP {status})"


def _explain_bad_response(error: ServerError | InvalidResponseError, endpoint: S3Endpoint) -> str:
    """Explains an HTTP error without S3's XML, which most often comes from a proxy in front of the server."""
    status = (
        error.status_code if isinstance(error, ServerError) else int(error.args[0].split("Response code: ")[1].split(",")[0])
    )
    if status in BUSY:
        return f"{endpoint.url} is still too busy or broken after retries (HTTP {status}): run the same command again later"
    if status == 507:
        return "the server's storage is full (HTTP 507): free some space there and run the same command again"
    if status == 400 and endpoint.url.startswith("http://"):
        return f"{endpoint.url} does not understand plain HTTP (HTTP 400): if it speaks TLS, write https:// in AWS_ENDPOINT_URL"
    return f"{endpoint.url} answers HTTP {status}, but not in the words of S3; correct AWS_ENDPOINT_URL"


def _explain_no_response(error: HTTPError, endpoint: S3Endpoint) -> str:
    url = endpoint.url
    if isinstance(error, NameResolutionError):
        return f"the host of {url} has no address (DNS): correct AWS_ENDPOINT_URL, or look at the network"
    if isinstance(error, SSLError):
        text = str(error)
        if "CERTIFICATE_VERIFY_FAILED" in text or "doesn't match" in text:
            detail = re.search(r"certificate verify failed: ([^(\"']+)", text)
            why = f" ({detail[1].strip()})" if detail else ""
            return (
                f"TLS: the certificate of {url} is not trusted{why}: set SSL_CERT_FILE or AWS_CA_BUNDLE to the file of its CA"
            )
        if "WRONG_VERSION_NUMBER" in text or "RECORD_LAYER_FAILURE" in text:
            return f"TLS: {url} does not speak it: write http:// in AWS_ENDPOINT_URL if plain HTTP is what you want"
        return f"TLS: no connection with {url} ({_to_single_line(text)}): look at the server's certificate and TLS versions"
    if isinstance(error, NewConnectionError):
        cause = error.__cause__
        cause_text = cause.strerror if isinstance(cause, OSError) and cause.strerror else "no connection"
        return f"nothing answers at {url} ({cause_text}): start the server, or correct AWS_ENDPOINT_URL"
    if isinstance(error, ConnectTimeoutError):
        return f"no connection with {url} in time: look at the network and its policies, or correct AWS_ENDPOINT_URL"
    if isinstance(error, ReadTimeoutError):
        return f"{url} took too long to answer, also after retries: run the same command again later"
    if isinstance(error, ProtocolError):
        return f"the connection with {url} broke off, also after retries: look at the network, and run the same command again"
    return f"{url}: {_to_single_line(error)}"


def _explain_clock_skew(error: S3Error) -> str:
    # Swift and others leave the times out of the message; the Date header is always there.
    server = _find_element(error, "ServerTime") or error.response.headers.get("date") or "unknown"
    here = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    ours = _find_element(error, "RequestTime") or here
    return f"the clocks differ too much: this machine says {ours}, the server {server}: set the clock here (NTP), or there"


def _find_element(error: S3Error, name: str) -> str | None:
    try:
        return ET.fromstring(error.response.data).findtext(f"{{*}}{name}")
    except (ET.ParseError, HTTPError, ValueError):
        return None


def _to_single_line(value: object) -> str:
    return " ".join(str(value).split())
