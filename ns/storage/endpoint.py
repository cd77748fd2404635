"""The S3 server and its credentials, from the environment and Kubernetes secret files; never from a config or a URI."""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import certifi
import urllib3
from minio import Minio
from minio.credentials.credentials import Credentials
from minio.credentials.providers import Provider

from ns.core.errors import StoreError
from ns.storage.retry import RetryingPool, RetryPolicy

SECRETS_VARIABLE = "NS_S3_SECRETS"
CA_VARIABLES = ("SSL_CERT_FILE", "AWS_CA_BUNDLE")
SET_ENDPOINT = "set AWS_ENDPOINT_URL to http(s)://HOST[:PORT]"

CONNECT_SECONDS = 10
READ_SECONDS = 60
# Connections that a process keeps open, for this many threads at a time.
CONNECTIONS = 16


@dataclass(frozen=True)
class S3Endpoint:
    url: str
    region: str
    ca_file: str
    secrets: str | None = None
    """A folder with the files accesskey, secretkey and optionally sessiontoken; None for the environment."""

    @staticmethod
    def from_environment(environment: Mapping[str, str] = os.environ) -> "S3Endpoint":
        url = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL") or "https://s3.amazonaws.com"
        return S3Endpoint(
            url=_check_url(url),
            region=environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or "us-east-1",
            ca_file=_find_ca_file(environment),
            secrets=_find_secrets(environment),
        )

    def make_client(self, retry_policy: RetryPolicy) -> tuple[Minio, RetryingPool]:
        """A client and its pool of connections. Sends nothing yet. Neither may be used after a fork."""
        pool = RetryingPool(
            retry_policy,
            timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS),
            maxsize=CONNECTIONS,
            cert_reqs="CERT_REQUIRED",
            ca_certs=self.ca_file,
        )
        parts = urlsplit(self.url)
        try:
            client = Minio(
                endpoint=parts.netloc,
                secure=parts.scheme == "https",
                region=self.region,
                credentials=self._make_credentials(),
                http_client=pool,
            )
        except ValueError as error:
            raise StoreError(f"{self.url}: no S3 endpoint: {error}; {SET_ENDPOINT}, and AWS_REGION to its region") from error
        return client, pool

    def build_boto_environment(self, empty_file: Path) -> dict[str, str]:
        """The environment in which a program that uses boto finds this server, and no other settings than these.

        `empty_file` is an empty file in the place of the owner's. Raises StoreError when there are no credentials.
        """
        keys = self._make_credentials().retrieve()
        return {
            "AWS_ACCESS_KEY_ID": keys.access_key,
            "AWS_SECRET_ACCESS_KEY": keys.secret_key,
            **({"AWS_SESSION_TOKEN": keys.session_token} if keys.session_token else {}),
            "AWS_ENDPOINT_URL_S3": self.url,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_CA_BUNDLE": self.ca_file,
            "AWS_CONFIG_FILE": str(empty_file),
            "AWS_SHARED_CREDENTIALS_FILE": str(empty_file),
            "AWS_EC2_METADATA_DISABLED": "true",
            # Servers other than Amazon's refuse the checksums that boto adds by itself (dvc #10695).
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        }

    def _make_credentials(self) -> Provider:
        return FileCredentials(Path(self.secrets)) if self.secrets else EnvironmentCredentials()


class EnvironmentCredentials(Provider):
    def retrieve(self) -> Credentials:
        access, secret = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
        if not access or not secret:
            missing = "AWS_SECRET_ACCESS_KEY" if access else "AWS_ACCESS_KEY_ID"
            raise StoreError(
                f"no credentials: {missing} is not set; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                f"or {SECRETS_VARIABLE} to a folder with the files accesskey and secretkey"
            )
        return Credentials(access_key=access, secret_key=secret, session_token=os.environ.get("AWS_SESSION_TOKEN") or None)


class FileCredentials(Provider):
    """Secret files as Kubernetes mounts them, read again when they change.

    The kubelet swaps the whole folder at once by a symbolic link: if the files are the same before and after reading, key and secret
    belong together.
    """

    def __init__(self, secrets_path: Path) -> None:
        self._secrets_path = secrets_path
        self._cached: tuple[object, Credentials] | None = None

    def retrieve(self) -> Credentials:
        while True:
            stamp = self._read_stamps()
            if self._cached and self._cached[0] == stamp:
                return self._cached[1]
            credentials = Credentials(
                access_key=self._read_secret("accesskey"),
                secret_key=self._read_secret("secretkey"),
                session_token=self._read_secret("sessiontoken") if (self._secrets_path / "sessiontoken").exists() else None,
            )
            if self._read_stamps() == stamp:
                self._cached = stamp, credentials
                return credentials

    def _read_stamps(self) -> object:
        stamps = {}
        for name in ("accesskey", "secretkey", "sessiontoken"):
            with suppress(OSError):
                status = (self._secrets_path / name).stat()
                stamps[name] = status.st_ino, status.st_mtime_ns, status.st_size
        return stamps

    def _read_secret(self, name: str) -> str:
        path = self._secrets_path / name
        try:
            value = path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "is no text"
            raise StoreError(f"no credentials: {path}: {reason}; {SECRETS_VARIABLE} must name a folder with {name}") from error
        if not value:
            raise StoreError(f"no credentials: {path}: is empty; write the key into it")
        return value


def _check_url(url: str) -> str:
    # Messages quote the URL, but must not quote a secret in it.
    shown = re.sub(r"^(.*?//)?[^/]*@", r"\1…@", url)
    try:
        parts = urlsplit(url)
        port_is_valid = parts.port is None or parts.port > 0
    except ValueError:
        raise StoreError(f"{shown}: no S3 endpoint; {SET_ENDPOINT}") from None
    if parts.username is not None:
        raise StoreError(f"{shown}: no credentials belong into an endpoint; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    rest = parts.path.rstrip("/") or parts.query or parts.fragment
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_valid or rest:
        raise StoreError(f"{shown}: no S3 endpoint; {SET_ENDPOINT}")
    return f"{parts.scheme}://{parts.netloc}"


def _find_secrets(environment: Mapping[str, str]) -> str | None:
    """The folder of the secret files. Where a Secret is missing, Kubernetes mounts an empty one: then keys in the environment count."""
    folder = environment.get(SECRETS_VARIABLE) or None
    is_empty = folder is not None and not any((Path(folder) / name).exists() for name in ("accesskey", "secretkey"))
    return None if is_empty and environment.get("AWS_ACCESS_KEY_ID") else folder


def _find_ca_file(environment: Mapping[str, str]) -> str:
    for variable in CA_VARIABLES:
        path = environment.get(variable)
        if path:
            if not Path(path).is_file():
                raise StoreError(f"{variable}={path}: no such file; set it to a file of CA certificates (PEM), or unset it")
            return path
    return certifi.where()
