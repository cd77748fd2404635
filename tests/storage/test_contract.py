"""What every store promises. The same tests for a folder, for moto's S3 server, and for one that keeps its objects on disk."""

import hashlib
import pickle
import random
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ns.core.errors import StoreError
from ns.storage.base import TEMPORARY
from tests.storage.conftest import numbers

# What XML 1.0 cannot spell is left out: S3 lists keys in XML, and not every server knows how to escape it.
CHARACTERS = st.characters(min_codepoint=0x20, exclude_characters="/\x7f", exclude_categories=["Cs", "Cn", "Cc"])
KEY = st.lists(
    st.text(CHARACTERS, min_size=1, max_size=20).filter(
        lambda part: part not in (".", "..") and not part.startswith(TEMPORARY) and len(part.encode()) < 200 and part.strip()
    ),
    min_size=1,
    max_size=3,
).map("/".join)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=KEY, data=st.binary(max_size=1000))
def test_put_and_get_any_key(any_store, key, data):
    store = any_store.at(f"names-{next(numbers)}")
    store.put(key, data)
    assert store.get(key) == store.path(key).read_bytes() == store.open(key).read() == data
    assert store.get_range(key, 1, 5) == data[1:6]
    assert store.size(key) == len(data)
    assert store.exists(key)
    assert list(store.list()) == [key]
    assert list(store.list(key)) == [key]
    store.delete(key)
    assert not store.exists(key)


def test_key_has_several_spellings(store):
    store.put("a//b/./c/", b"1")
    assert store.get("a/b/c") == b"1"
    assert list(store.list()) == ["a/b/c"]


def test_put_replaces_and_create_does_not(store):
    store.put("a", b"1")
    assert store.path("a").read_bytes() == b"1"
    store.put("a", b"2")
    assert store.get("a") == store.path("a").read_bytes() == b"2"
    assert store.create("b", b"first")
    assert not store.create("b", b"second")
    assert not store.create("a", b"second")
    assert store.get("b") == b"first"


def test_one_of_many_creates_at_once_wins(store, request):
    with ThreadPoolExecutor(8) as threads:
        won = list(threads.map(lambda number: store.create("once", b"%d" % number), range(24)))
    # Swift looks at the condition, but not in the same instant as it writes.
    assert sum(won) == 1 or (request.node.callspec.params["any_store"] == "swift" and sum(won) > 1)
    assert won[int(store.get("once"))]
    assert not store.create("once", b"late")
    assert store.create("next", b"")


def test_get_range_ends_with_the_blob(store):
    store.put("a", b"0123456789")
    assert store.get_range("a", 0, 1) == b"0"
    assert store.get_range("a", 2, 3) == b"234"
    assert store.get_range("a", 8, 99) == b"89"
    assert store.get_range("a", 10, 1) == b""
    assert store.get_range("a", 99, 1) == b""
    assert store.get_range("a", 3, 0) == b""
    store.put("empty", b"")
    assert store.get("empty") == store.get_range("empty", 0, 1) == b""
    for start, length in ((-1, 3), (0, -1)):
        with pytest.raises(StoreError, match="must not be negative"):
            store.get_range("a", start, length)


def test_list_is_in_byte_order_and_by_prefix(store):
    keys = ["b/2", "a", "b/10", "bc", "b-c/x", "b/1/x", "ä", "Z", "😀", "\uffee", "b/1.x", "b/1 x", "b+c", "b%20c", "b&<c>"]
    for key in keys:
        store.put(key, b"")
    ordered = sorted(keys, key=str.encode)
    assert list(store.list()) == ordered
    assert list(store.list("b/")) == [key for key in ordered if key.startswith("b/")]
    assert list(store.list("b/1")) == ["b/1 x", "b/1.x", "b/1/x", "b/10"]
    assert list(store.list("ä")) == ["ä"]
    assert list(store.list("nothing/")) == []
    for prefix in ("/a", "../", "a/../b"):
        with pytest.raises(StoreError, match="not a prefix"):
            list(store.list(prefix))


def test_at_opens_a_folder_as_a_store(store):
    store.at("x/y").put("z", b"1")
    assert store.get("x/y/z") == b"1"
    assert store.at("x").at("y").uri == store.at("x/y/").uri == store.uri + "/x/y"
    assert list(store.at("x").list()) == ["y/z"]
    again = store.at(store.at("x").uri)
    assert again.get("y/z") == b"1"


def test_at_separates_stores_with_a_common_prefix(store):
    store.at("run").put("a", b"1")
    store.at("run-2").put("b", b"2")
    assert list(store.at("run").list()) == ["a"]


def test_put_file_takes_any_size(store, tmp_path):
    # Larger than two parts of the tests' multipart uploads, with a rest.
    source = tmp_path / "source.tar"
    source.write_bytes(random.Random(0).randbytes(12_345_678))
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    store.put_file("big.tar", source)
    assert source.exists()
    assert store.size("big.tar") == 12_345_678
    assert hashlib.sha256(store.get("big.tar")).hexdigest() == digest
    path = store.path("big.tar")
    assert path.suffix == ".tar"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    assert store.get_range("big.tar", 5 * (1 << 20) - 3, 6) == source.read_bytes()[5 * (1 << 20) - 3 :][:6]
    store.put("big", source.read_bytes())
    with store.open("big") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == digest
    (tmp_path / "empty").touch()
    store.put_file("empty", tmp_path / "empty")
    assert store.get("empty") == b""


def test_open_streams_a_tar(store, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(3):
            (tmp_path / str(number)).write_bytes(bytes([number]) * 100_000)
            tar.add(tmp_path / str(number), str(number))
    store.put_file("a.tar", tmp_path / "a.tar")
    with store.open("a.tar") as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        assert [tar.extractfile(member).read(1) for member in tar] == [b"\0", b"\1", b"\2"]


def test_put_file_names_a_missing_source(store, tmp_path):
    with pytest.raises(StoreError, match=r"nope: cannot read: no such file"):
        store.put_file("a", tmp_path / "nope")
    assert not store.exists("a")


def test_delete_twice_is_no_error(store):
    store.put("a", b"")
    store.delete("a")
    store.delete("a")
    assert not store.exists("a")


def test_delete_prefix_deletes_nothing_else(store):
    for key in ("a/1", "a/2", "ab", "b"):
        store.put(key, b"")
    assert store.delete_prefix("a/") == 2
    assert list(store.list()) == ["ab", "b"]
    assert store.delete_prefix("a/") == 0


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../../x", ".", "a\0b", ".tmp-x", "a/.tmp-x", "\udc80"])
def test_invalid_key_is_refused(store, key):
    for call in (store.get, store.path, store.exists, store.delete, lambda key: store.put(key, b"")):
        with pytest.raises(StoreError, match="not a key"):
            call(key)


@pytest.mark.parametrize("call", ["get", "path", "size", "open"])
def test_missing_blob_is_named(store, call):
    with pytest.raises(
        StoreError, match=r"nope/x: cannot read: no such (file|object: check the key, and whether the stage)"
    ) as caught:
        getattr(store, call)("nope/x")
    assert "\n" not in str(caught.value)
    for length in (0, 1):
        with pytest.raises(StoreError, match=r"nope/x: cannot read: no such (file|object)"):
            store.get_range("nope/x", 0, length)
    assert not store.exists("nope/x")


def test_long_key_is_refused(store):
    with pytest.raises(StoreError, match="too long"):
        store.put("x" * 2000, b"")


def test_store_can_be_pickled_and_forked(store):
    store.put("a", b"1")
    assert pickle.loads(pickle.dumps(store)).get("a") == b"1"
    for method in ("fork", "spawn"):
        with get_context(method).Pool(2) as pool:
            assert pool.map(store.get, ["a"] * 8) == [b"1"] * 8
    assert store.get("a") == b"1"


def test_put_is_atomic_for_readers(store, request):
    # Swift lists an object's folder, then opens the newest file. If that was replaced, another replica answers; here is one.
    alone = request.node.callspec.params["any_store"] == "swift"
    store.put("blob", b"a" * 300_000)
    program = (
        "import pickle, sys\n"
        "store = pickle.loads(bytes.fromhex(sys.argv[1])); print('go', flush=True)\n"
        "for round in range(10):\n"
        "    for letter in b'bcd': store.put('blob', bytes([letter]) * 300_000)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", program, pickle.dumps(store).hex()], stdout=subprocess.PIPE)
    try:
        writer.stdout.readline()
        while writer.poll() is None:
            try:
                data = store.get("blob")
            except StoreError as error:
                if alone and "no such object" in str(error):
                    continue
                raise
            assert len(data) == 300_000
            assert len(set(data)) == 1
    finally:
        writer.communicate()
    assert writer.returncode == 0
    assert set(store.get("blob")) == set(b"d")
