import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ns.core.digest import canonical_json, digest_code, digest_json
from ns.core.errors import DataError
from ns.storage import LocalStore
from ns.storage.documents import BlobKey, FileName, HashedDocument, JsonDocument

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda leaf: st.lists(leaf, max_size=4) | st.dictionaries(st.text(), leaf, max_size=4),
    max_leaves=20,
)


class Goat(JsonDocument):
    name: str


def test_documents_of_a_newer_version_are_read(tmp_path):
    store = LocalStore(tmp_path)
    store.put("goat.json", b'{"name": "Billy", "horns": 2}')
    assert Goat.load_file(store, "goat.json") == Goat(name="Billy")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"name": 3}', b"\0\0\0"])
def test_unreadable_document_is_passed_over_with_a_warning(tmp_path, capsys, content):
    store = LocalStore(tmp_path)
    store.put("a.json", b'{"name": "Billy"}')
    store.put("b.json", content)
    assert list(Goat.iterate_files(store, ["a.json", "b.json"])) == [Goat(name="Billy")]
    assert Goat.find_file(store, "b.json") is None
    assert Goat.find_file(store, "c.json") is None
    captured = capsys.readouterr()
    assert "b.json" in captured.out + captured.err


class Goods(JsonDocument):
    file: FileName
    key: BlobKey


OUTSIDE = ["", "/etc/passwd", "../secret", "a/../../secret", "a\0b"]


@pytest.mark.parametrize("name", [*OUTSIDE, "..", ".", ".hidden", "a/b", "a\n", "\x1b[2Ja", "x" * 256])
def test_file_name_stays_beside_its_manifest(name):
    with pytest.raises(DataError, match=r"goods\.json: file: "):
        Goods.validate_fields({"file": name, "key": "a"}, "goods.json")


@pytest.mark.parametrize("key", [*OUTSIDE, ".tmp-a"])
def test_blob_key_stays_below_its_root(key):
    with pytest.raises(DataError, match=r"goods\.json: key: .* not a key"):
        Goods.validate_fields({"file": "a", "key": key}, "goods.json")


class Sheep(HashedDocument):
    name: str
    legs: int = 4


@given(st.dictionaries(st.text(), JSON))
def test_digest_json_ignores_the_order_of_keys(value):
    assert digest_json(value) == digest_json(dict(reversed(value.items())))


@given(JSON)
def test_canonical_json_reads_back_equal(value):
    assert json.loads(canonical_json(value)) == value


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_canonical_json_refuses_nan_and_infinity(value):
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(value)


def test_digest_code_covers_its_parts_only():
    assert digest_code("modeling/factory.py") != digest_code("config/schema.py")
    assert digest_code("training") != digest_code("training", "modeling/factory.py")


def test_hashed_document_checks_its_digest(tmp_path):
    store = LocalStore(tmp_path)
    sheep = Sheep(name="Dolly")
    sheep.save_file(store, "sheep.json")
    assert Sheep.load_file(store, "sheep.json") == sheep
    edited = store.get("sheep.json").replace(b"Dolly", b"Molly")
    store.put("sheep.json", edited)
    with pytest.raises(DataError, match=r"sheep\.json: digest: .* the file was edited or damaged"):
        Sheep.load_file(store, "sheep.json")


def test_document_names_a_wrong_field_with_its_value():
    with pytest.raises(DataError, match=r"here: legs: .*got 'many'"):
        Sheep.parse(b'{"name": "a", "legs": "many"}', "here")


@given(st.binary(max_size=100))
def test_document_refuses_garbage(data):
    with pytest.raises(DataError, match=r"^here: "):
        Sheep.parse(data, "here")
