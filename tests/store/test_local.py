import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ns.errors import StoreError
from ns.store import LocalStore, open_store, read_uri, split_uri
from ns.store.local import TEMPORARY

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


@given(key=KEY, data=st.binary(max_size=1000))
def test_what_is_put_under_any_name_is_got_back(tmp_path_factory, key, data):
    store = LocalStore(tmp_path_factory.mktemp("store"))
    store.put(key, data)
    assert store.get(key) == store.path(key).read_bytes() == data
    assert store.size(key) == len(data)
    assert list(store.list()) == [key]


def test_a_blob_can_be_replaced_but_a_created_one_stays(store):
    store.put("a", b"1")
    store.put("a", b"2")
    assert store.get("a") == b"2"
    assert store.create("b", b"first")
    assert not store.create("b", b"second")
    assert store.get("b") == b"first"


def test_of_many_creators_one_wins_and_all_see_its_bytes(store):
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


def test_ranges_end_with_the_blob(store):
    store.put("a", b"0123456789")
    assert store.get_range("a", 2, 3) == b"234"
    assert store.get_range("a", 8, 99) == b"89"


def test_list_is_sorted_and_by_prefix(store):
    for key in ("b/2", "a", "b/10", "bc", "b/1/x"):
        store.put(key, b"")
    assert list(store.list()) == ["a", "b/1/x", "b/10", "b/2", "bc"]
    assert list(store.list("b/")) == ["b/1/x", "b/10", "b/2"]
    assert list(store.list("b/1")) == ["b/1/x", "b/10"]
    assert list(store.list("nothing/")) == []


def test_a_folder_of_a_store_is_a_store(store, tmp_path):
    store.at("x/y").put("z", b"1")
    assert store.get("x/y/z") == b"1"
    assert store.at(str(tmp_path / "other")).uri == (tmp_path / "other").as_uri()
    assert store.at((tmp_path / "other").as_uri()).uri == (tmp_path / "other").as_uri()


def test_files_are_put_without_being_moved(store, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"x" * 100_000)
    store.put_file("a", source)
    assert store.get("a") == source.read_bytes()


def test_deleting_twice_is_no_error(store):
    store.put("a", b"")
    store.delete("a")
    store.delete("a")
    assert not store.exists("a")


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../../x"])
def test_keys_that_lead_outside_are_refused(store, key):
    with pytest.raises(StoreError, match="not a key"):
        store.put(key, b"")


@pytest.mark.parametrize("call", [LocalStore.get, LocalStore.path, LocalStore.size])
def test_a_missing_blob_is_named(store, call):
    with pytest.raises(StoreError, match=r"store/nope: cannot read: no such file"):
        call(store, "nope")


def test_a_folder_in_the_way_is_named(store):
    store.put("a/b", b"")
    with pytest.raises(StoreError, match=r"store/a: cannot read: is a folder"):
        store.get("a")
    with pytest.raises(StoreError, match=r"a part of this path is a file"):
        store.put("a/b/c", b"")


def test_an_unknown_scheme_is_refused():
    with pytest.raises(StoreError, match="no store for scheme 'ftp'"):
        open_store("ftp://host/path")


def test_uris_are_split_into_folder_and_file(tmp_path):
    assert split_uri("file:///a/b.yaml") == ("file:///a", "b.yaml")
    assert split_uri("b.yaml") == (".", "b.yaml")
    assert split_uri("/b.yaml") == ("/", "b.yaml")
    (tmp_path / "ü x.txt").write_bytes(b"hi")
    assert read_uri((tmp_path / "ü x.txt").as_uri()) == b"hi"
    with pytest.raises(StoreError, match="must name a file"):
        split_uri("folder/")


def test_a_writer_killed_at_any_instant_leaves_the_old_blob_or_the_new_one(tmp_path):
    store = LocalStore(tmp_path)
    store.put("blob", b"a" * 1_000_000)
    program = (
        "import sys; from ns.store import LocalStore\n"
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
