import unicodedata

import pytest

from ns.core.errors import DataError
from ns.data.key_list import make_key, make_key_suffix, read_keys


def write_list(tmp_path, text, encoding="utf-8"):
    (tmp_path / "keys.txt").write_bytes(text.encode(encoding))
    return read_keys(str(tmp_path / "keys.txt"))


@pytest.mark.parametrize(
    "line", ["cat/IMG_1", "cat/IMG.1.jpg", "./cat/IMG.1.jpg", "  cat/IMG.1.jpg\r", "s3://cat/IMG.1.jpg", "\ufeffcat/IMG.1.jpg"]
)
def test_key_list_takes_keys_and_paths(tmp_path, line):
    matched, unknown = write_list(tmp_path, line).match_keys(["cat/IMG_1", "cat/IMG_2"])
    assert (matched, unknown) == ({"cat/IMG_1"}, [])


def test_key_list_takes_decomposed_names(tmp_path):
    assert write_list(tmp_path, unicodedata.normalize("NFD", "café/ö.jpg")).match_keys(["café/ö"])[0] == {"café/ö"}


def test_key_list_takes_paths_of_keys_with_suffix(tmp_path):
    keys = [make_key(path) + make_key_suffix(path.encode()) for path in ("a.jpg", "a.png")]
    assert write_list(tmp_path, "a.png\n").match_keys(keys) == ({keys[1]}, [])


def test_key_list_tells_lines_without_image(tmp_path):
    assert write_list(tmp_path, "b.jpg\na\nc\n").match_keys(["a"]) == ({"a"}, ["b.jpg", "c"])


@pytest.mark.parametrize(("text", "reason"), [("\n \n", "has no keys"), ("ä", "not UTF-8")])
def test_read_keys_refuses_invalid_files(tmp_path, text, reason):
    with pytest.raises(DataError, match=reason):
        write_list(tmp_path, text, "latin-1")
