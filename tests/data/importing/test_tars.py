"""Which label belongs to which image of a tar."""

import io
import tarfile
from collections import Counter

import pytest

from ns.data.importing.tars import TarSource, list_images


@pytest.fixture
def list_labels(tmp_path):
    """Function: path → label or problem, of a tar with these members in this order; and what was passed over."""

    def list_tar(*members, role="labeled", folder_class=None):
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        passed_over = Counter()
        source = TarSource(tmp_path / "a.tar", "c", "a/", "s")
        entries = list(list_images(source, role, tmp_path, passed_over, folder_class))
        return [(entry.path, entry.problem or entry.class_label) for entry in entries], dict(passed_over)

    return list_tar


@pytest.mark.parametrize(
    "members",
    [
        [("1.jpg", b"x"), ("1.cls", b"3"), ("2.jpg", b"x"), ("2.cls", b"4")],
        [("1.jpg", b"x"), ("2.jpg", b"x"), ("1.cls", b"3"), ("2.cls", b"4\n")],
        [("2.cls", b"4"), ("1.cls", b"3"), ("1.jpg", b"x"), ("2.jpg", b"x")],
        [("./1.jpg", b"x"), ("1.cls", b"3"), ("2.jpg", b"x"), ("./2.CLS", b"\xef\xbb\xbf4")],
        [("1.jpg", b"x"), ("1.json", b'{"Label": 3}'), ("2.jpg", b"x"), ("2.json", b"4")],
        [("1.jpg", b"x"), ("1.txt", b"3"), ("2.jpg", b"x"), ("2.json", b'{"label": null, "class": "4"}')],
        [("1.jpg", b"x"), ("1.cls", b"3"), ("1.json", b'{"label": "three"}'), ("2.jpg", b"x"), ("2.jpg.cls", b"4")],
        [("1.jpg", b"x"), ("1.json", b'{"label": 3.0}'), ("1.txt", b"5"), ("2.jpg", b"x"), ("2.json", b'{"cls": 4}')],
    ],
)
def test_labels_are_found_wherever_they_are(list_labels, members):
    assert list_labels(*members)[0] == [("a/1.jpg", 3), ("a/2.jpg", 4)]


def test_labels_may_be_names(list_labels):
    found, _ = list_labels(
        ("1.jpg", b"x"), ("1.cls", " Zoë\n".encode()), ("2.jpg", b"x"), ("2.json", b'{"class_name": "ox, bull"}')
    )
    assert found == [("a/1.jpg", "Zoë"), ("a/2.jpg", "ox, bull")]


def test_images_of_one_sample_share_its_label(list_labels):
    found, _ = list_labels(("1.left.jpg", b"x"), ("1.right.png", b"x"), ("1.cls", b"3"))
    assert found == [("a/1.left.jpg", 3), ("a/1.right.png", 3)]


def test_dots_in_names_do_not_mix_labels(list_labels):
    days = [(f"2024.06.{day:02d}_cam.jpg", f"2024.06.{day:02d}_cam.cls", day) for day in range(1, 4)]
    found, _ = list_labels(*[(image, b"x") for image, _, _ in days], *[(label, str(day).encode()) for _, label, day in days])
    assert found == [(f"a/{image}", day) for image, _, day in days]


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ([("1.jpg", b"x"), ("1.cls", b"0"), ("1.jpg", b"y"), ("1.cls", b"1")], "1.cls says both 0 and 1"),
        ([("1.jpg", b"x"), ("1.cls", b"0"), ("1.jpg", b"y")], "the tar has 2 images of this name, and 1 files 1.cls"),
        ([("1.jpg", b"x"), ("1.cls", b"0"), ("1.json", b'{"label": 1}')], "1.cls says 0, 1.json says 1"),
        ([("1.jpg", b"x"), ("1.cls", b"-1")], "1.cls: '-1': must be a class index, 0 or above, or a class name"),
        ([("1.jpg", b"x"), ("1.cls", b"")], "1.cls: '': must be a class index"),
        ([("1.jpg", b"x"), ("1.cls", b"\xff")], "1.cls: not UTF-8"),
        ([("1.jpg", b"x"), ("1.json", b"{")], "1.json: not JSON"),
        ([("1.jpg", b"x"), ("1.json", b"[" * 100_000)], "1.json: not JSON"),
        ([("1.jpg", b"x"), ("1.json", b'{"label": [1, 2]}')], "1.json: '[1, 2]': must be a class index"),
        ([("1.jpg", b"x"), ("1.json", b'{"label": true}')], "1.json: 'True': must be a class index"),
    ],
)
def test_labels_that_cannot_be_believed_are_told(list_labels, members, problem):
    found, _ = list_labels(*members)
    assert found
    assert all(str(told).startswith(problem) for _, told in found)


def test_equal_names_with_equal_labels_are_all_imported(list_labels):
    found, _ = list_labels(("1.jpg", b"x"), ("1.cls", b"2"), ("1.jpg", b"y"), ("1.cls", b"2"))
    assert found == [("a/1.jpg", 2), ("a/1.jpg", 2)]


def test_each_member_is_accounted_for(list_labels):
    found, passed_over = list_labels(
        *[("1.jpg", b"x"), ("1.cls", b"2"), ("2.cls", b"3"), ("3.heic", b"x"), ("3.cls", b"1"), ("4", b"x"), ("._1.jpg", b"x")],
        *[("1.txt", b"a caption\nof two lines"), ("1.json", b'{"width": 3}'), ("README", b"x"), ("5.txt", b"an orphan")],
    )
    assert found == [("a/1.jpg", 2), ("a/3.heic", 1), ("a/4", None), ("a/2.cls", "a label without an image")]
    assert passed_over == {".txt": 2, ".json": 1, "README": 1}


def test_folder_class_counts_only_without_labels(list_labels):
    assert list_labels(("1.jpg", b"x"), folder_class="cat")[0] == [("a/1.jpg", "cat")]
    assert list_labels(("1.jpg", b"x"), ("2.jpg", b"x"), ("2.cls", b"0"), folder_class="cat")[0] == [
        ("a/1.jpg", None),
        ("a/2.jpg", 0),
    ]


def test_pool_needs_no_labels(list_labels):
    found, passed_over = list_labels(("1.jpg", b"x"), ("1.cls", b"\xff"), ("1.jpg", b"y"), role="unlabeled")
    assert found == [("a/1.jpg", None), ("a/1.jpg", None)]
    assert passed_over == {".cls": 1}
