"""What only a folder does; what all stores do is in test_contract.py."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ns.core.errors import StoreError
from ns.core.process import ProcessId
from ns.storage import LocalStore, open_store, read_uri, split_uri
from ns.storage.base import TEMPORARY
from ns.storage.local import TEMPORARY_SECONDS

# Names that only a file system takes: control characters among them.
KEY = st.lists(
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
        lambda part: part not in (".", "..") and not part.startswith(TEMPORARY) and len(part.encode()) < 200
    ),
    min_size=1,
    max_size=3,
).map("/".join)


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "store")


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of one MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def files_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@given(key=KEY, data=st.binary(max_size=1000))
def test_put_and_get_any_key(tmp_path_factory, key, data):
    store = LocalStore(tmp_path_factory.mktemp("store"))
    store.put(key, data)
    assert store.get(key) == store.path(key).read_bytes() == data
    assert list(store.list()) == [key]


@pytest.mark.parametrize("links", [True, False])
def test_create_has_one_winner(store, links, monkeypatch):
    if not links:
        refuse_links(monkeypatch, errno.EPERM)
    won = []

    def create(number):
        if store.create("key", b"%d" % number):
            won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.get("key") == b"%d" % won[0]
    assert files_in(store.root) == ["key"]


@pytest.mark.parametrize("reason", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK])
def test_create_works_without_hard_links(store, monkeypatch, reason):
    refuse_links(monkeypatch, reason)
    assert store.create("key", b"first")
    assert not store.create("key", b"second")
    assert store.get("key") == b"first"
    assert files_in(store.root) == ["key"]


def refuse_links(monkeypatch, reason):
    def link(*_args, **_options):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(os, "link", link)


def test_open_store_takes_a_path_or_uri(store, tmp_path):
    assert store.at(str(tmp_path / "other")).uri == (tmp_path / "other").as_uri()
    assert open_store((tmp_path / "ä b").as_uri()).uri == (tmp_path / "ä b").as_uri()
    assert open_store(str(tmp_path / "50%#?")).at("x").uri == (tmp_path / "50%#?" / "x").as_uri()


def test_folder_in_the_way_is_named(store):
    store.put("a/b", b"")
    for call in (store.get, store.size, store.path, store.open, store.delete):
        with pytest.raises(StoreError, match=r"store/a: cannot (read|delete): (is a folder|permission denied)"):
            call("a")
    with pytest.raises(StoreError, match=r"a part of this path is a file"):
        store.put("a/b/c", b"")
    assert not store.exists("a/b/c")
    store.delete("a/b/c")


def test_long_file_name_is_explained(store):
    with pytest.raises(StoreError, match="255 bytes a part; shorten it"):
        store.put("x" * 300, b"")


@pytest.mark.parametrize("uri", ["ftp://host/path", "ftp://user:hidden@host/path", "S3://bucket"])
def test_open_store_refuses_an_unknown_scheme_without_quoting_the_rest(uri):
    with pytest.raises(StoreError, match=r"no store for scheme '(ftp|S3)'; use a folder path, file:///") as caught:
        open_store(uri)
    assert "hidden" not in str(caught.value)


def test_open_store_refuses_a_file_uri_with_a_host():
    with pytest.raises(StoreError, match="three slashes"):
        open_store("file://folder/file")


def test_split_uri_into_folder_and_file(tmp_path):
    assert split_uri("file:///a/b.yaml") == ("file:///a", "b.yaml")
    assert split_uri("s3://bucket/b%20c.yaml") == ("s3://bucket", "b%20c.yaml")
    assert split_uri("b.yaml") == (".", "b.yaml")
    assert split_uri("/b.yaml") == ("/", "b.yaml")
    (tmp_path / "ü x.txt").write_bytes(b"hi")
    assert read_uri((tmp_path / "ü x.txt").as_uri()) == b"hi"
    for uri in ("folder/", "s3://bucket"):
        with pytest.raises(StoreError, match="must name a file"):
            split_uri(uri)


@pytest.mark.integration
def test_put_survives_a_kill_at_any_instant(tmp_path):
    store = LocalStore(tmp_path)
    store.put("blob", b"a" * 1_000_000)
    program = (
        "import sys; from ns.storage import LocalStore\n"
        "store = LocalStore(sys.argv[1]); print('go', flush=True)\n"
        "while True:\n"
        "    for letter in b'bcd': store.put('blob', bytes([letter]) * 1_000_000)\n"
    )
    for attempt in range(10):
        writer = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
        writer.stdout.readline()
        time.sleep(0.003 * attempt)
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate()
        data = store.get("blob")
        assert len(data) == 1_000_000
        assert len(set(data)) == 1
        assert list(store.list()) == ["blob"]


def test_full_disk_keeps_the_old_blob(small_disk, tmp_path):
    store = LocalStore(small_disk)
    store.put("old", b"1" * 400_000)
    (tmp_path / "large").write_bytes(b"2" * 2_000_000)
    for write in (
        lambda: store.put("old", b"2" * 2_000_000),
        lambda: store.put_file("old", tmp_path / "large"),
        lambda: store.create("new", b"2" * 2_000_000),
    ):
        with pytest.raises(StoreError, match=r"cannot write: the disk is full: free some space") as caught:
            write()
        assert "\n" not in str(caught.value)
    assert files_in(small_disk) == ["old"]
    assert store.get("old") == b"1" * 400_000
    store.put("new", b"3" * 400_000)


def test_read_only_disk_is_explained(small_disk):
    store = LocalStore(small_disk)
    store.put("a/old", b"1")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for write in (
        lambda: store.put("new/b", b"2"),
        lambda: store.put("a/old", b"2"),
        lambda: store.create("b", b"2"),
        lambda: store.delete("a/old"),
    ):
        with pytest.raises(StoreError, match=r"cannot (write|delete): the file system is read-only: choose another folder"):
            write()
    assert store.get("a/old") == b"1"
    assert list(store.list()) == ["a/old"]


def test_folder_without_write_permission_is_explained(store):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    store.put("old", b"1")
    store.root.chmod(0o500)
    try:
        with pytest.raises(StoreError, match="permission denied: choose a folder that you may write to"):
            store.put("old", b"2")
        assert store.get("old") == b"1"
    finally:
        store.root.chmod(0o700)


def test_list_refuses_an_unreadable_folder(store, monkeypatch):
    store.put("a/b", b"1")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("/a"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StoreError, match="cannot list: permission denied"):
        list(store.list())


def test_file_size_limit_keeps_the_old_blob(store):
    store.put("old", b"1" * 1000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(StoreError, match="ulimit -f"):
            store.put("old", b"2" * 1_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert files_in(store.root) == ["old"]
    assert store.get("old") == b"1" * 1000


def test_unfinished_writes_are_not_listed(store):
    store.put("a/b", b"1")
    (store.root / "a" / f"{TEMPORARY}0123").write_bytes(b"half")
    (store.root / f"{TEMPORARY}4567").write_bytes(b"half")
    assert list(store.list()) == list(store.list("a/")) == ["a/b"]
    assert list(store.list(f"a/{TEMPORARY}")) == []
    store.put("a/b", b"2")
    assert store.delete_prefix("") == 1


def test_list_survives_a_vanishing_folder(store, monkeypatch):
    store.put("a/b", b"1")
    store.put("c", b"1")
    walk = os.walk

    def vanishing(*args, **options):
        for found in walk(*args, **options):
            shutil.rmtree(store.root / "a", ignore_errors=True)
            yield found

    monkeypatch.setattr(os, "walk", vanishing)
    assert list(store.list()) == ["c"]


def test_unfinished_files_of_killed_writers_are_swept(tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    own = ProcessId.from_pid(os.getpid())
    killed = own._replace(identity=f"{os.getpid()}:1")
    writers = {"elsewhere": "1.1@00000000", "alive": str(own), "killed": str(killed), "old": "1.1@00000000"}
    paths = {name: folder / f"{TEMPORARY}{writer}-{name}" for name, writer in writers.items()}
    for path in paths.values():
        path.write_bytes(b"half")
    os.utime(paths["old"], (time.time() - TEMPORARY_SECONDS - 1,) * 2)
    LocalStore(tmp_path).put("models/a", b"whole")
    assert [name for name, path in paths.items() if path.exists()] == ["elsewhere", "alive"]


@pytest.mark.parametrize("write", [lambda store: store.put("f/a", b"x"), lambda store: store.create("f/a", b"x")])
def test_names_are_flushed_to_disk_after_the_data(tmp_path, monkeypatch, write):
    flushed = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (flushed.append(str(Path(f"/proc/self/fd/{handle}").readlink())), real(handle))
    )
    write(LocalStore(tmp_path))
    assert len(flushed) == 2
    assert flushed[1] == str(tmp_path / "f")
