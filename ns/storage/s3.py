import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar, cast

from minio import Minio
from minio.datatypes import Object
from minio.error import S3Error
from urllib3.exceptions import HTTPError
from urllib3.response import BaseHTTPResponse

from ns.core.digest import sha256_bytes
from ns.core.errors import StoreError
from ns.core.printable import holds_credentials
from ns.storage.base import BlobEntry, Store, check_prefix, check_range, key_parts
from ns.storage.cache import BlobCache
from ns.storage.endpoint import S3Endpoint
from ns.storage.local import os_errors_as_store_errors
from ns.storage.retry import RetryBudget, RetryingPool, RetryPolicy
from ns.storage.s3_errors import MISSING, s3_errors_as_store_errors

T = TypeVar("T")

BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
# The checksum of the whole content, kept as user metadata (x-amz-meta-sha256), because ETags are an MD5 for some objects only.
CHECKSUM = "sha256"
SHA256 = re.compile(r"[0-9a-f]{64}")
MD5 = re.compile(r"[0-9a-f]{32}")

# Larger blobs are uploaded in parts of this size, UPLOADS at a time; at most UPLOADS + 1 parts are in memory.
PART_BYTES = 16 << 20
MAX_PARTS = 10_000
UPLOADS = 4
DELETES = 8
CHUNK_BYTES = 1 << 20
# Number of downloads of a blob whose bytes do not match its checksum.
DOWNLOADS = 3


class S3Service:
    """An S3 server as a process uses it: connections, retries, cache. Threads, forks and pickles can share it."""

    def __init__(
        self,
        endpoint: S3Endpoint,
        *,
        retry_policy: RetryPolicy | None = None,
        cache: BlobCache | None = None,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self.endpoint = endpoint
        self.retry_policy = retry_policy or RetryPolicy()
        self.part_bytes = part_bytes
        self.known_buckets: set[str] = set()
        self.can_put_conditionally: bool | None = None
        """Whether the server honors `If-None-Match: *`; None until `create` has found out."""
        self._cache = cache
        self._connected: tuple[int, Minio, RetryingPool] | None = None

    @property
    def client(self) -> Minio:
        return self._get_connection()[1]

    @property
    def pool(self) -> RetryingPool:
        return self._get_connection()[2]

    @property
    def cache(self) -> BlobCache:
        return self._cache or BlobCache.from_environment()

    def _get_connection(self) -> tuple[int, Minio, RetryingPool]:
        # Parent and child must not use the same socket. Two threads may both connect, which is harmless; a lock could be inherited locked.
        if self._connected is None or self._connected[0] != os.getpid():
            self._connected = (os.getpid(), *self.endpoint.make_client(self.retry_policy))
        return self._connected

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connected": None}


@lru_cache(maxsize=16)
def get_service(endpoint: S3Endpoint) -> S3Service:
    return S3Service(endpoint)


class S3Store:
    """A prefix of a bucket, `s3://bucket/prefix`; the server and the credentials come from the environment (endpoint.py).

    It uses only requests that every S3 server knows: put, get with range, head, list (version 2), multipart, delete; `create` puts under
    a condition where the server knows conditions. Objects whose names are no keys (`folder/`, `a//b`) are not listed. A killed upload
    leaves its parts, which no reader sees, until the bucket's lifecycle rule for incomplete uploads removes them.
    """

    def __init__(self, uri: str, service: S3Service | None = None) -> None:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if "@" in bucket or holds_credentials(uri):
            raise StoreError(
                "s3://…@…: no credentials belong into a URI; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and write s3://bucket/prefix"
            )
        if not uri.startswith("s3://") or not BUCKET.fullmatch(bucket):
            raise StoreError(f"{uri}: no bucket {bucket!r}: must be s3://BUCKET/PREFIX, with 3 to 63 of a-z, 0-9, '.' and '-'")
        self.bucket = bucket
        self._root = "/".join(key_parts(prefix)) + "/" if prefix.strip("/") else ""
        self.uri = f"s3://{bucket}/{self._root}".rstrip("/")
        self.service = service or get_service(S3Endpoint.from_environment())

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Store, (self.uri, self.service)

    def at(self, key_or_uri: str) -> Store:
        if key_or_uri.startswith("s3://"):
            return S3Store(key_or_uri, self.service)
        if "://" in key_or_uri or key_or_uri.startswith("/"):
            from ns.storage import open_store

            return open_store(key_or_uri)
        return S3Store(f"s3://{self.bucket}/{self._object_name(key_or_uri)}", self.service)

    def put(self, key: str, data: bytes) -> None:
        self._upload_blob(key, io.BytesIO(data), len(data), sha256_bytes(data))

    def put_file(self, key: str, path: Path) -> None:
        with os_errors_as_store_errors(path, "read"), path.open("rb") as file:
            stable_file = _StableFile(file, path)
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
            self._upload_blob(key, cast(BinaryIO, stable_file), stable_file.size, checksum)

    def create(self, key: str, data: bytes) -> bool:
        if not self.service.can_put_conditionally and self.exists(key):
            return False
        if self.service.can_put_conditionally is False:
            self.put(key, data)
            return True
        wrote = self._put_if_new(key, data)
        if self.service.can_put_conditionally is None:
            # A server that does not know the condition writes the same bytes again.
            self.service.can_put_conditionally = not (wrote and self._put_if_new(key, data))
        return wrote

    def _put_if_new(self, key: str, data: bytes) -> bool:
        """Puts the blob under the condition that there is none. Returns whether the server took it."""
        headers = {"If-None-Match": "*", f"x-amz-meta-{CHECKSUM}": sha256_bytes(data)}
        with self._translate_errors(key, "write"):
            try:
                # `put_object` has no argument for a condition.
                self.service.client._put_object(self.bucket, self._object_name(key), data, headers)  # type: ignore[arg-type]
            except S3Error as error:
                if error.response.status in (409, 412):
                    return False
                if error.response.status != 501:
                    raise
                self.service.can_put_conditionally = False
                self.put(key, data)
        return True

    def get(self, key: str) -> bytes:
        return self._repeat_if_damaged(key, lambda: self._read_bytes(key))

    def get_range(self, key: str, start: int, length: int) -> bytes:
        check_range(self._blob_uri(key), start, length)
        if length == 0:
            self.size(key)
            return b""
        try:
            return self._repeat_if_damaged(key, lambda: self._read_bytes(key, start, length))
        except StoreError as error:
            # The range begins behind the end.
            if isinstance(error.__cause__, S3Error) and error.__cause__.response.status == 416:
                return b""
            raise

    def open(self, key: str) -> BinaryIO:
        with self._translate_errors(key, "read"):
            return cast(BinaryIO, io.BufferedReader(_DownloadFile(self, key, BlobDownload(self, key)), CHUNK_BYTES))

    def path(self, key: str) -> Path:
        return self._repeat_if_damaged(key, lambda: self._fetch_into_cache(key))

    def exists(self, key: str) -> bool:
        try:
            self._stat_object(key)
        except StoreError as error:
            if isinstance(error.__cause__, S3Error) and error.__cause__.code in MISSING:
                return False
            raise
        return True

    def size(self, key: str) -> int:
        return self._stat_object(key).size or 0

    def list(self, prefix: str = "") -> Iterator[str]:
        return (listed.key for listed in self.entries(prefix))

    def entries(self, prefix: str = "") -> Iterator[BlobEntry]:
        check_prefix(prefix)
        with s3_errors_as_store_errors(f"{self.uri}/{prefix}", "list", self.bucket, self.service.endpoint):
            for blob in self.service.client.list_objects(bucket_name=self.bucket, prefix=self._root + prefix, recursive=True):
                key = (blob.object_name or "").removeprefix(self._root)
                if _is_key(key):
                    modified_at = blob.last_modified.timestamp() if blob.last_modified else 0
                    yield BlobEntry(key, blob.size or 0, (blob.etag or "").strip('"'), modified_at)

    def delete(self, key: str) -> None:
        object_name = self._object_name(key)
        with self._translate_errors(key, "delete"):
            try:
                self.service.client.remove_object(bucket_name=self.bucket, object_name=object_name)
            except S3Error as error:
                if error.code not in MISSING:
                    raise

    def delete_prefix(self, prefix: str) -> int:
        # Single requests in parallel: bulk deletion is not part of portable S3.
        with ThreadPoolExecutor(DELETES) as pool:
            return sum(1 for _ in pool.map(self.delete, list(self.list(prefix))))

    def _repeat_if_damaged(self, key: str, read: Callable[[], T]) -> T:
        """What `read` returns, repeated if the bytes do not match their checksum."""
        for attempt in range(1, DOWNLOADS + 1):
            try:
                return read()
            except IntegrityError as error:
                if attempt == DOWNLOADS:
                    raise StoreError(f"{self._blob_uri(key)}: cannot read: {error}") from error
        raise AssertionError

    def _read_bytes(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        with self._translate_errors(key, "read"), closing(BlobDownload(self, key, start, length)) as download:
            return b"".join(download)

    def _fetch_into_cache(self, key: str) -> Path:
        object_name, head = self._object_name(key), self._stat_object(key)
        size, etag = head.size or 0, head.etag or ""
        identity = (self.service.endpoint.url, self.bucket, object_name, etag, str(size), str(head.last_modified))

        def write_blob(file: BinaryIO) -> None:
            with self._translate_errors(key, "read"), closing(BlobDownload(self, key)) as blob:
                if blob.etag != etag:
                    raise IntegrityError("was replaced while it was being read; read it again")
                for chunk in blob:
                    # A full disk here is no fault of the server.
                    file.write(chunk)

        return self.service.cache.fetch_blob(identity, size, PurePosixPath(object_name).suffix[:16], write_blob)

    def _upload_blob(self, key: str, data: BinaryIO, size: int, checksum: str) -> None:
        object_name = self._object_name(key)
        part_bytes = max(self.service.part_bytes, -(-size // MAX_PARTS))
        with self._translate_errors(key, "write"):
            try:
                data.seek(0)
                self.service.client.put_object(
                    bucket_name=self.bucket,
                    object_name=object_name,
                    data=data,
                    length=size,
                    metadata={CHECKSUM: checksum},
                    part_size=part_bytes,
                    num_parallel_uploads=UPLOADS,
                )
            except S3Error as error:
                # The parts are gone if the upload was completed, but the answer was lost, and the request was repeated.
                if error.code != "NoSuchUpload":
                    raise
        if size > part_bytes:
            # A server may fail to join the parts after it has answered 200.
            head = self._stat_object(key)
            if head.size != size or (head.metadata or {}).get(f"x-amz-meta-{CHECKSUM}", checksum) != checksum:
                raise StoreError(f"{self._blob_uri(key)}: cannot write: the server lost the upload: run the same command again")

    def _stat_object(self, key: str) -> Object:
        object_name = self._object_name(key)
        with self._translate_errors(key, "read"):
            try:
                head = self.service.client.stat_object(bucket_name=self.bucket, object_name=object_name)
            except S3Error as error:
                if error.code in MISSING and self.bucket in self.service.known_buckets:
                    raise
                # The answer to HEAD has no body that could name the error; the answer to GET has one.
                try:
                    self.service.client.get_object(bucket_name=self.bucket, object_name=object_name, offset=0, length=1).close()
                except S3Error as detailed:
                    if detailed.code in MISSING:
                        self.service.known_buckets.add(self.bucket)
                    raise detailed from None
                raise
        self.service.known_buckets.add(self.bucket)
        return head

    def _object_name(self, key: str) -> str:
        return "/".join(key_parts(self._root + "/".join(key_parts(key))))

    def _blob_uri(self, key: str) -> str:
        return f"{self.uri}/{key}"

    def _translate_errors(self, key: str, verb: str) -> AbstractContextManager[None]:
        return s3_errors_as_store_errors(self._blob_uri(key), verb, self.bucket, self.service.endpoint)


class IntegrityError(Exception):
    """The bytes that came cannot be those of the blob."""


class BlobDownload:
    """The bytes of a blob, or of [start, start + length), as chunks in order.

    A response that breaks off is continued where it stopped. Raises IntegrityError at the end of a whole blob if its bytes do not match
    its checksum.
    """

    def __init__(self, store: S3Store, key: str, start: int = 0, length: int | None = None) -> None:
        self._store = store
        self._object_name = store._object_name(key)
        self._position = start
        self._end = None if length is None else start + length
        self._retry_budget = RetryBudget(store.service.retry_policy, f"GET {store.uri}/{key}")
        self._response = self._send_request()
        headers = self._response.headers
        self.etag = headers.get("etag", "").strip('"')
        content_length = headers.get("content-length", "")
        if content_length.isdigit():
            end = int(content_length) + (start if self._response.status == 206 else 0)
            self._end = end if self._end is None else min(end, self._end)
        whole = start == 0 and length is None
        self._algorithm, self._expected = _read_checksum(self._response) if whole else ("", "")
        self._hash = hashlib.new(self._algorithm, usedforsecurity=False) if self._algorithm else None

    def __iter__(self) -> Iterator[bytes]:
        while True:
            try:
                for chunk in self._iter_chunks():
                    if self._hash:
                        self._hash.update(chunk)
                    self._retry_budget.reset_budget()
                    yield chunk
                if self._end is None or self._position >= self._end:
                    break
                broken: Exception = EOFError()
            except (HTTPError, OSError) as error:
                broken = error
            self.close()
            if not self._retry_budget.wait_for_retry(f"broke off at byte {self._position}: {type(broken).__name__}"):
                raise StoreError(
                    f"the connection with {self._store.service.endpoint.url} broke off at byte {self._position} of "
                    f"{self._end}, also after retries: look at the network, and run the same command again"
                ) from broken
            try:
                self._response = self._send_request()
            except S3Error as error:
                if error.response.status == 416:
                    raise IntegrityError("was replaced by a shorter one while it was being read: read it again") from error
                raise
            if self._response.headers.get("etag", "").strip('"') != self.etag:
                raise IntegrityError("was replaced while it was being read: read it again")
        if self._hash and self._hash.hexdigest() != self._expected:
            raise IntegrityError(
                f"the bytes do not match the checksum kept with them ({self._algorithm} {self._hash.hexdigest()}, expected "
                f"{self._expected}): write the object again"
            )

    def close(self) -> None:
        self._response.close()
        self._response.release_conn()

    def _send_request(self) -> BaseHTTPResponse:
        return self._store.service.client.get_object(
            bucket_name=self._store.bucket,
            object_name=self._object_name,
            offset=self._position,
            length=0 if self._end is None else self._end - self._position,
        )

    def _iter_chunks(self) -> Iterator[bytes]:
        # Some servers answer a range with the whole blob.
        skip = self._position if self._response.status == 200 else 0
        # The bytes as stored: an object that is marked as compressed is not unpacked.
        for chunk in self._response.stream(CHUNK_BYTES, decode_content=False):
            piece = chunk[skip:] if self._end is None else chunk[skip : skip + self._end - self._position]
            skip = max(0, skip - len(chunk))
            self._position += len(piece)
            if piece:
                yield piece


class _DownloadFile(io.RawIOBase):
    def __init__(self, store: S3Store, key: str, download: BlobDownload) -> None:
        self._store = store
        self._key = key
        self._download = download
        self._chunks = iter(download)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            with self._store._translate_errors(self._key, "read"):
                try:
                    self._rest = memoryview(next(self._chunks, b""))
                except IntegrityError as error:
                    raise StoreError(f"{self._store._blob_uri(self._key)}: cannot read: {error}") from error
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def close(self) -> None:
        if not self.closed:
            self._download.close()
        super().close()


class _StableFile:
    """A file that is read twice, for its checksum and for its bytes. Raises StoreError if it changes in between."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._stamp = self._read_stamp()
        self.size = self._stamp[0]

    def seek(self, offset: int) -> int:
        return self._file.seek(offset)

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        if self._read_stamp() != self._stamp:
            raise StoreError(f"{self._path} was changed while it was being uploaded: run the same command when it is finished")
        return data

    def _read_stamp(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns


def _read_checksum(response: BaseHTTPResponse) -> tuple[str, str]:
    """Algorithm and hex digest that the server keeps for the whole content; empty texts if there is no reliable one."""
    own_checksum = response.headers.get(f"x-amz-meta-{CHECKSUM}", "").lower()
    if SHA256.fullmatch(own_checksum):
        return "sha256", own_checksum
    etag = response.headers.get("etag", "").strip('"')
    # With customer keys or a key server, the ETag has 32 digits, but is no MD5 of the content.
    encrypted = "aws:kms" in response.headers.get("x-amz-server-side-encryption", "") or any(
        name.lower().startswith("x-amz-server-side-encryption-customer") for name in response.headers
    )
    return ("md5", etag) if MD5.fullmatch(etag) and not encrypted else ("", "")


def _is_key(name: str) -> bool:
    with suppress(StoreError):
        return "/".join(key_parts(name)) == name
    return False
