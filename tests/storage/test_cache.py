import errno
import mmap
import os
import shutil
import threading
import time
from collections import namedtuple
from multiprocessing import get_context

import pytest

from ns.core.errors import StoreError
from ns.storage import cache as cache_module
from ns.storage.base import TEMPORARY
from ns.storage.cache import ABANDONED_SECONDS, GRACE_SECONDS, BlobCache


class Clock:
    def __init__(self):
        self.now = time.time()

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def cache(tmp_path, clock):
    return BlobCache(tmp_path / "cache", 1000, clock)


def fetch(cache, name, size=300):
    return cache.fetch_blob((name,), size, ".bin", lambda file: file.write(name.encode()[:1] * size))


def names(cache):
    return {path.read_bytes()[:1].decode() for path in (cache.root / "blobs").iterdir()}


def test_cache_fetches_a_blob_once(cache):
    fetched = []

    def download(file):
        fetched.append(1)
        file.write(b"x")

    paths = {cache.fetch_blob(("a", "etag"), 1, ".tar", download) for _ in range(3)}
    assert len(fetched) == len(paths) == 1
    assert paths.pop().suffix == ".tar"
    cache.fetch_blob(("a", "another etag"), 1, ".tar", download)
    assert len(fetched) == 2


def test_cache_removes_the_least_recently_used(cache, clock):
    for name in "abc":
        fetch(cache, name)
        clock.now += 2 * GRACE_SECONDS
    fetch(cache, "a")
    clock.now += 2 * GRACE_SECONDS
    fetch(cache, "d")
    assert names(cache) == {"a", "c", "d"}
    clock.now += 2 * GRACE_SECONDS
    fetch(cache, "e", 700)
    assert names(cache) == {"d", "e"}


def test_cache_keeps_fresh_files(cache, clock):
    paths = [fetch(cache, name) for name in "abcd"]
    assert all(path.exists() for path in paths)
    clock.now += 2 * GRACE_SECONDS
    fetch(cache, "e")
    assert sum(path.stat().st_size for path in (cache.root / "blobs").iterdir()) <= 1000


def test_removed_file_stays_readable_while_open(cache, clock):
    path = fetch(cache, "a", 900)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        clock.now += 2 * GRACE_SECONDS
        fetch(cache, "b", 900)
        assert not path.exists()
        assert file.read() == mapped[:] == b"a" * 900


def test_cache_refuses_a_blob_that_does_not_fit(cache):
    with pytest.raises(StoreError, match="does not fit into the cache of 0 MiB: raise NS_CACHE_MIB"):
        fetch(cache, "a", 1001)


def test_cache_does_not_fill_the_disk(cache, clock, monkeypatch):
    fetch(cache, "a")
    clock.now += 2 * GRACE_SECONDS
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 100))
    fetch(cache, "b")
    assert names(cache) == {"b"}


def test_cache_fetches_a_truncated_file_again(cache):
    path = fetch(cache, "a")
    path.chmod(0o600)
    path.write_bytes(b"a" * 10)
    assert fetch(cache, "a").read_bytes() == b"a" * 300


def test_failed_download_leaves_nothing(cache):
    def download(file):
        file.write(b"half")
        raise StoreError("s3://b/k: cannot read")

    with pytest.raises(StoreError, match="s3://b/k: cannot read"):
        cache.fetch_blob(("a",), 8, "", download)
    assert list((cache.root / "blobs").iterdir()) == []


def test_cache_removes_abandoned_downloads(cache, clock):
    fetch(cache, "a")
    left = cache.root / "blobs" / f"{TEMPORARY}x"
    left.write_bytes(b"half")
    clock.now += ABANDONED_SECONDS / 2
    fetch(cache, "b")
    assert left.exists()
    clock.now += ABANDONED_SECONDS
    fetch(cache, "c")
    assert not left.exists()


def test_cache_explains_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        StoreError, match=r"file/cache: cannot keep copies of remote files: a part of this path is a file.*NS_CACHE_DIR"
    ):
        fetch(BlobCache(tmp_path / "file" / "cache", 1000), "a")


def test_cache_explains_a_full_disk(cache):
    def download(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StoreError, match=r"the disk is full.*set NS_CACHE_DIR to a folder with more room"):
        cache.fetch_blob(("a",), 8, "", download)


def test_cache_folder_and_limit_come_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("NS_CACHE_DIR", str(tmp_path))
    assert BlobCache.from_environment().root == tmp_path
    assert BlobCache.from_environment().limit_bytes == 20 << 30
    monkeypatch.delenv("NS_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("NS_CACHE_MIB", "3")
    assert BlobCache.from_environment().root == tmp_path / "xdg" / "noisy-student"
    assert BlobCache.from_environment().limit_bytes == 3 << 20
    for wrong in ("0", "-1", "1.5", "much", "²"):
        monkeypatch.setenv("NS_CACHE_MIB", wrong)
        with pytest.raises(StoreError, match="must be a whole number of MiB, at least 1"):
            BlobCache.from_environment()


def test_threads_fetch_the_same_blob_once(cache):
    fetched = []

    def download(file):
        fetched.append(1)
        time.sleep(0.1)
        file.write(b"x")

    threads = [threading.Thread(target=cache.fetch_blob, args=(("a",), 1, "", download)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1


def hammer(arguments):
    """Fetches in a cache that is too small; says how often bytes were wrong, and how many it fetched itself."""
    folder, seed = arguments
    cache_module.GRACE_SECONDS = 1
    cache = BlobCache(folder, 5000)
    wrong, fetched = 0, []
    for step in range(200):
        name = chr(97 + (seed * 7 + step * 5) % 26)
        path = cache.fetch_blob(
            (name,), 500, "", lambda file, name=name: (fetched.append(name), file.write(name.encode() * 500))
        )
        wrong += path.read_bytes() != name.encode() * 500
    return wrong, len(fetched)


def test_processes_share_a_small_cache(tmp_path):
    with get_context("fork").Pool(4) as pool:
        results = pool.map(hammer, [(tmp_path, seed) for seed in range(4)])
    assert [wrong for wrong, _ in results] == [0, 0, 0, 0]
    assert not [path for path in (tmp_path / "blobs").iterdir() if path.name.startswith(TEMPORARY)]
