import pytest

from ns.data.importing.file_kinds import classify_document, escape_path, get_extension, is_left_by_program


@pytest.mark.parametrize(
    "path",
    [
        *[".DS_Store", "cat/._a.jpg", "__MACOSX/cat/._a.jpg", "Icon\r", ".git/HEAD", ".ipynb_checkpoints/a.jpg", ".dvc/config"],
        *[
            "Thumbs.db",
            "cat/thumbs.db",
            "ehthumbs_vista.db",
            "Desktop.ini",
            "$RECYCLE.BIN/a.jpg",
            "System Volume Information/x",
        ],
        *[
            "lost+found/a.jpg",
            "__pycache__/a.pyc",
            "a.jpg~",
            "~$a.docx",
            "@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg",
            "#recycle/a.jpg",
        ],
        *[
            "Picasa.ini",
            "_SUCCESS",
            "_temporary/0/a.jpg",
            "cat_$folder$",
            "_committed_123",
            "@Recycle/a.jpg",
            ".@__thumb/a.jpg",
        ],
    ],
)
def test_left_by_program(path):
    assert is_left_by_program(path)


@pytest.mark.parametrize(
    "path", ["a.jpg", "./a.jpg", "cat/a.b.jpg", "_cat/a.jpg", "thumbs/a.jpg", "success/a.jpg", "a..jpg", "@home/a.jpg", "c#/a"]
)
def test_not_left_by_program(path):
    assert not is_left_by_program(path)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        *[
            ("a.txt", ".txt"),
            ("cat/a.XML", ".xml"),
            ("README", "README"),
            ("LICENSE.dataset", "LICENSE"),
            ("SHA256SUMS", "SHA256SUMS"),
        ],
        *[("readme.png", None), ("a.jpg", None), ("a.heic", None), ("a", None), ("film.mp4", None), ("license_plate", None)],
    ],
)
def test_classify_document(path, kind):
    assert classify_document(path) == kind


def test_get_extension():
    assert [get_extension(name) for name in ("a.b/c.D.PNG", "a.b/c", "c.")] == ["png", "", ""]


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("é/👨\u200d👩.jpg", "é/👨\u200d👩.jpg"),
        ("a\x1b[31m\n", "a\\x1b[31m\\n"),
        ("a\udce9", "a\\xe9"),
        ("a\u2028b", "a\\u2028b"),
    ],
)
def test_escape_path(path, shown):
    assert escape_path(path) == shown
