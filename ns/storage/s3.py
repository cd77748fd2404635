import hashlib
import io
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from minio import Minio
from minio.datatypes import Object
from minio.error import S3Error
from urllib3.exceptions import HTTPError
from urllib3.response import BaseHTTPResponse

from ns.core.digest import sha256_bytes
from ns.core.errors import StoreError
from ns.storage import local
from ns.storage import s3_errors as reasons
from ns.storage.base import Listed, Store, check_prefix, check_range, key_parts, open_store
from ns.storage.cache import Cache
from ns.storage.endpoint import Endpoint
from ns.storage.retry import Patience, RetryingPool, Trial
from ns.storage.s3_errors import MISSING

BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
# The checksum of the whole content, kept as user metadata (x-amz-meta-sha256): ETags are an MD5 only for some objects.
CHECKSUM = "sha256"
SHA256 = re.compile(r"[0-9a-f]{64}")
MD5 = re.compile(r"[0-9a-f]{32}")

# Larger blobs are uploaded in parts of this size, UPLOADS at a time; so many parts are in memory at most, and one more.
PART_BYTES = 16 << 20
MAX_PARTS = 10_000
UPLOADS = 4
DELETES = 8
CHUNK_BYTES = 1 << 20
# How often a download that was whole, but not what its checksum says, is begun anew.
DOWNLOADS = 3


class Service:
    """An S3 server as this process uses it: connections, patience, cache. Safe to share by threads, forks and pickles."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        patience: Patience | None = None,
        cache: Cache | None = None,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self.endpoint = endpoint
        self.patience = patience or Patience()
        self.part_bytes = part_bytes
        self.known_buckets: set[str] = set()
        self._cache = cache
        self._connected: tuple[int, Minio, RetryingPool] | None = None

    @property
    def client(self) -> Minio:
        return self._connection()[1]

    @property
    def pool(self) -> RetryingPool:
        return self._connection()[2]

    @property
    def cache(self) -> Cache:
        return self._cache or Cache.from_environment()

    def _connection(self) -> tuple[int, Minio, RetryingPool]:
        # Parent and child must not talk over the same socket. Two threads may both connect: harmless, and no lock to inherit.
        if self._connected is None or self._connected[0] != os.getpid():
            self._connected = (os.getpid(), *self.endpoint.connect(self.patience))
        return self._connected

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connected": None}


@lru_cache(maxsize=16)
def service_at(endpoint: Endpoint) -> Service:
    return Service(endpoint)


class S3Store:
    """A prefix of a bucket, `s3://bucket/prefix`; the server and the credentials come from the environment (endpoint.py).

    Only what every S3 server knows: put, get with range, head, list (version 2), multipart, delete. Objects whose names are
    no keys (`folder/`, `a//b`) are not listed. An upload that was killed leaves its parts, which no reader sees, until the
    bucket's lifecycle rule for incomplete uploads removes them.
    """

    def __init__(self, uri: str, service: Service | None = None) -> None:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if "@" in bucket:
            raise StoreError(
                "s3://…@…: no credentials belong into a URI; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and write s3://bucket/prefix"
            )
        if not uri.startswith("s3://") or not BUCKET.fullmatch(bucket):
            raise StoreError(f"{uri}: no bucket {bucket!r}: must be s3://BUCKET/PREFIX, with 3 to 63 of a-z, 0-9, '.' and '-'")
        self.bucket = bucket
        self._root = "/".join(key_parts(prefix)) + "/" if prefix.strip("/") else ""
        self.uri = f"s3://{bucket}/{self._root}".rstrip("/")
        self.service = service or service_at(Endpoint.from_environment())

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Store, (self.uri, self.service)

    def at(self, ref: str) -> Store:
        if ref.startswith("s3://"):
            return S3Store(ref, self.service)
        if "://" in ref or ref.startswith("/"):
            return open_store(ref)
        return S3Store(f"s3://{self.bucket}/{self._name(ref)}", self.service)

    def put(self, key: str, data: bytes) -> None:
        self._upload(key, io.BytesIO(data), len(data), sha256_bytes(data))

    def put_file(self, key: str, path: Path) -> None:
        with local.explained(path, "read"), path.open("rb") as file:
            source = _Steady(file, path)
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
            self._upload(key, cast(BinaryIO, source), source.size, checksum)

    def create(self, key: str, data: bytes) -> bool:
        if self.exists(key):
            return False
        self.put(key, data)
        return True

    def get(self, key: str) -> bytes:
        name = self._name(key)
        for attempt in range(1, DOWNLOADS + 1):
            with self._explained(key, "read"), closing(Download(self, key, name)) as download:
                try:
                    return b"".join(download)
                except SpoiledError as error:
                    if attempt == DOWNLOADS:
                        raise StoreError(f"{self._where(key)}: cannot read: {error}") from error
        raise AssertionError

    def get_range(self, key: str, start: int, length: int) -> bytes:
        name = self._name(key)
        check_range(self._where(key), start, length)
        if length == 0:
            self.size(key)
            return b""
        for attempt in range(1, DOWNLOADS + 1):
            try:
                with self._explained(key, "read"), closing(Download(self, key, name, start, length)) as download:
                    return b"".join(download)
            except SpoiledError as error:
                if attempt == DOWNLOADS:
                    raise StoreError(f"{self._where(key)}: cannot read: {error}") from error
            except StoreError as error:
                # The range begins beyond the end.
                if isinstance(error.__cause__, S3Error) and error.__cause__.response.status == 416:
                    return b""
                raise
        raise AssertionError

    def open(self, key: str) -> BinaryIO:
        with self._explained(key, "read"):
            return cast(BinaryIO, io.BufferedReader(_Raw(self, key, Download(self, key, self._name(key))), CHUNK_BYTES))

    def path(self, key: str) -> Path:
        name = self._name(key)
        for attempt in range(1, DOWNLOADS + 1):
            head = self._head(key)
            size = head.size or 0
            identity = (self.service.endpoint.url, self.bucket, name, head.etag or "", str(size), str(head.last_modified))

            def download(file: BinaryIO, etag: str = head.etag or "") -> None:
                with self._explained(key, "read"), closing(Download(self, key, name)) as blob:
                    if blob.etag != etag:
                        raise SpoiledError("was replaced while it was being read; read it again")
                    for chunk in blob:
                        # A full disk here must not be taken for a fault of the server.
                        file.write(chunk)

            try:
                return self.service.cache.fetch(identity, size, PurePosixPath(name).suffix[:16], download)
            except SpoiledError as error:
                if attempt == DOWNLOADS:
                    raise StoreError(f"{self._where(key)}: cannot read: {error}") from error
        raise AssertionError

    def exists(self, key: str) -> bool:
        try:
            self._head(key)
        except StoreError as error:
            if isinstance(error.__cause__, S3Error) and error.__cause__.code in MISSING:
                return False
            raise
        return True

    def size(self, key: str) -> int:
        return self._head(key).size or 0

    def list(self, prefix: str = "") -> Iterator[str]:
        return (listed.key for listed in self.entries(prefix))

    def entries(self, prefix: str = "") -> Iterator[Listed]:
        check_prefix(prefix)
        with reasons.explained(f"{self.uri}/{prefix}", "list", self.bucket, self.service.endpoint):
            for found in self.service.client.list_objects(bucket_name=self.bucket, prefix=self._root + prefix, recursive=True):
                key = (found.object_name or "").removeprefix(self._root)
                if _is_key(key):
                    yield Listed(key, found.size or 0, (found.etag or "").strip('"'))

    def delete(self, key: str) -> None:
        name = self._name(key)
        with self._explained(key, "delete"):
            try:
                self.service.client.remove_object(bucket_name=self.bucket, object_name=name)
            except S3Error as error:
                if error.code not in MISSING:
                    raise

    def delete_prefix(self, prefix: str) -> int:
        # One by one, at the same time: bulk deletion is not in the portable subset.
        with ThreadPoolExecutor(DELETES) as pool:
            return sum(1 for _ in pool.map(self.delete, list(self.list(prefix))))

    def _upload(self, key: str, data: BinaryIO, size: int, checksum: str) -> None:
        name = self._name(key)
        part = max(self.service.part_bytes, -(-size // MAX_PARTS))
        with self._explained(key, "write"):
            try:
                data.seek(0)
                self.service.client.put_object(
                    bucket_name=self.bucket,
                    object_name=name,
                    data=data,
                    length=size,
                    metadata={CHECKSUM: checksum},
                    part_size=part,
                    num_parallel_uploads=UPLOADS,
                )
            except S3Error as error:
                # The parts are gone where a completed upload is completed once more, since the first answer was lost.
                if error.code != "NoSuchUpload":
                    raise
        if size > part:
            # A server may find only after saying 200 that it cannot put the parts together.
            head = self._head(key)
            if head.size != size or (head.metadata or {}).get(f"x-amz-meta-{CHECKSUM}", checksum) != checksum:
                raise StoreError(f"{self._where(key)}: cannot write: the server lost the upload: run the same command again")

    def _head(self, key: str) -> Object:
        name = self._name(key)
        with self._explained(key, "read"):
            try:
                head = self.service.client.stat_object(bucket_name=self.bucket, object_name=name)
            except S3Error as error:
                if error.code in MISSING and self.bucket in self.service.known_buckets:
                    raise
                # The answer to HEAD has no body, so it cannot say what is wrong; the answer to GET does.
                try:
                    self.service.client.get_object(bucket_name=self.bucket, object_name=name, offset=0, length=1).close()
                except S3Error as detailed:
                    if detailed.code in MISSING:
                        self.service.known_buckets.add(self.bucket)
                    raise detailed from None
                raise
        self.service.known_buckets.add(self.bucket)
        return head

    def _name(self, key: str) -> str:
        return "/".join(key_parts(self._root + "/".join(key_parts(key))))

    def _where(self, key: str) -> str:
        return f"{self.uri}/{key}"

    def _explained(self, key: str, verb: str) -> AbstractContextManager[None]:
        return reasons.explained(self._where(key), verb, self.bucket, self.service.endpoint)


class SpoiledError(Exception):
    """The bytes came, but cannot be those of the blob."""


class Download:
    """The bytes of a blob, or of [start, start + length), as chunks in order, from as many responses as it takes.

    A response that breaks off is continued where it stopped. At the end the bytes of a whole blob are checked: SpoiledError.
    """

    def __init__(self, store: S3Store, key: str, name: str, start: int = 0, length: int | None = None) -> None:
        self._store = store
        self._name = name
        self._position = start
        self._end = None if length is None else start + length
        self._trial = Trial(store.service.patience, f"GET {store.uri}/{key}")
        self._response = self._request()
        headers = self._response.headers
        self.etag = headers.get("etag", "").strip('"')
        sent = headers.get("content-length", "")
        if sent.isdigit():
            end = int(sent) + (start if self._response.status == 206 else 0)
            self._end = end if self._end is None else min(end, self._end)
        whole = start == 0 and length is None
        self._algorithm, self._expected = _checksum(self._response) if whole else ("", "")
        self._hash = hashlib.new(self._algorithm, usedforsecurity=False) if self._algorithm else None

    def __iter__(self) -> Iterator[bytes]:
        while True:
            try:
                for chunk in self._chunks():
                    if self._hash:
                        self._hash.update(chunk)
                    self._trial.restart()
                    yield chunk
                if self._end is None or self._position >= self._end:
                    break
                broken: Exception = EOFError()
            except (HTTPError, OSError) as error:
                broken = error
            self.close()
            if not self._trial.again(f"broke off at byte {self._position}: {type(broken).__name__}"):
                raise StoreError(
                    f"the connection with {self._store.service.endpoint.url} broke off at byte {self._position} of "
                    f"{self._end}, also after retries: look at the network, and run the same command again"
                ) from broken
            try:
                self._response = self._request()
            except S3Error as error:
                if error.response.status == 416:
                    raise SpoiledError("was replaced by a shorter one while it was being read: read it again") from error
                raise
            if self._response.headers.get("etag", "").strip('"') != self.etag:
                raise SpoiledError("was replaced while it was being read: read it again")
        if self._hash and self._hash.hexdigest() != self._expected:
            raise SpoiledError(
                f"the bytes do not match the checksum kept with them ({self._algorithm} {self._hash.hexdigest()}, expected "
                f"{self._expected}): write the object again"
            )

    def close(self) -> None:
        self._response.close()
        self._response.release_conn()

    def _request(self) -> BaseHTTPResponse:
        return self._store.service.client.get_object(
            bucket_name=self._store.bucket,
            object_name=self._name,
            offset=self._position,
            length=0 if self._end is None else self._end - self._position,
        )

    def _chunks(self) -> Iterator[bytes]:
        # Some servers answer a range with the whole.
        skip = self._position if self._response.status == 200 else 0
        # As stored: an object marked as compressed is not unpacked on the way.
        for chunk in self._response.stream(CHUNK_BYTES, decode_content=False):
            wanted = chunk[skip:] if self._end is None else chunk[skip : skip + self._end - self._position]
            skip = max(0, skip - len(chunk))
            self._position += len(wanted)
            if wanted:
                yield wanted


class _Raw(io.RawIOBase):
    """A download as a file."""

    def __init__(self, store: S3Store, key: str, download: Download) -> None:
        self._store = store
        self._key = key
        self._download = download
        self._chunks = iter(download)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            with self._store._explained(self._key, "read"):
                try:
                    self._rest = memoryview(next(self._chunks, b""))
                except SpoiledError as error:
                    raise StoreError(f"{self._store._where(self._key)}: cannot read: {error}") from error
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def close(self) -> None:
        if not self.closed:
            self._download.close()
        super().close()


class _Steady:
    """A file that is read twice, for its checksum and for its bytes, and must not change in between."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._stamp = self._now()
        self.size = self._stamp[0]

    def seek(self, offset: int) -> int:
        return self._file.seek(offset)

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        if self._now() != self._stamp:
            raise StoreError(f"{self._path} was changed while it was being uploaded: run the same command when it is finished")
        return data

    def _now(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns


def _checksum(response: BaseHTTPResponse) -> tuple[str, str]:
    """(algorithm, hex digest) that the server keeps for the whole content; empty if none that can be relied on."""
    ours = response.headers.get(f"x-amz-meta-{CHECKSUM}", "").lower()
    if SHA256.fullmatch(ours):
        return "sha256", ours
    etag = response.headers.get("etag", "").strip('"')
    # With keys of one's own or of a key server, the ETag is 32 digits, but no MD5 of the content.
    encrypted = "aws:kms" in response.headers.get("x-amz-server-side-encryption", "") or any(
        name.lower().startswith("x-amz-server-side-encryption-customer") for name in response.headers
    )
    return ("md5", etag) if MD5.fullmatch(etag) and not encrypted else ("", "")


def _is_key(name: str) -> bool:
    with suppress(StoreError):
        return "/".join(key_parts(name)) == name
    return False
