import pytest

from ns.core.errors import DataError
from ns.data.importing.digits import write_digits
from ns.data.importing.listing import Listing
from ns.data.locate import classify_uri, open_data
from ns.storage import LocalStore


@pytest.fixture
def folder(tmp_path, picture):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(picture(0))
    return tmp_path / "images"


def test_classify_uri(tmp_path, folder):
    write_digits("digits:heldout", LocalStore(tmp_path / "dataset"))
    assert classify_uri("digits:pool") == "digits"
    assert classify_uri(str(tmp_path / "dataset")) == "dataset"
    assert classify_uri(str(folder)) == "source"
    assert classify_uri(str(tmp_path / "missing")) == "source"


def test_open_data_of_dataset_and_digits_is_the_same_dataset(tmp_path):
    expected = write_digits("digits:heldout", LocalStore(tmp_path / "dataset"))
    for uri in (str(tmp_path / "dataset"), "digits:heldout"):
        with open_data(uri, "evaluation") as data:
            assert not isinstance(data, Listing)
            store, dataset = data
            assert dataset == expected
            assert store.exists(expected.shards[0].name)


def test_open_data_of_source_is_its_listing(folder):
    with open_data(str(folder), "unlabeled") as data:
        assert isinstance(data, Listing)
        assert [entry.path for entry in data.read_entries(0, len(data))] == ["a.png"]


@pytest.mark.parametrize(
    ("uri", "reason"), [("digits:training", "digits:training: no such part"), ("nowhere", "no such folder")]
)
def test_open_data_names_missing_data(uri, reason):
    with pytest.raises(DataError, match=reason), open_data(uri, "evaluation"):
        pass
