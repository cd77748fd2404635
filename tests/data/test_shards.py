import errno
import gzip
import io
import os
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ns.core.errors import DataError, StoreError
from ns.data.importing.writer import ShardWriter
from ns.data.shards import ShardSample, check_shard_file, read_samples, split_key
from ns.storage import LocalStore

KEYS = st.lists(
    st.text(st.characters(exclude_characters="./\0\\", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30),
    unique=True,
    max_size=12,
)
SAMPLE = st.tuples(st.sampled_from(["png", "jpg", "webp"]), st.binary(max_size=2000), st.none() | st.integers(0, 999))


def write(folder, samples, *, max_samples=100, max_bytes=1 << 20):
    with ShardWriter(folder, max_samples=max_samples, max_bytes=max_bytes) as writer:
        for sample in samples:
            writer.add_image(*sample)
    return writer.shards


def tar_of(path, members, **fields):
    """A tar with the given (name, data) members; `fields` set attributes of the last one."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if (name, data) == members[-1]:
                for field, value in fields.items():
                    setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return path


@settings(max_examples=60, deadline=None)
@given(keys=KEYS, data=st.data(), max_samples=st.integers(1, 5), max_bytes=st.integers(1024, 12_000))
def test_shards_are_read_back_in_order(tmp_path_factory, keys, data, max_samples, max_bytes):
    folder = LocalStore(tmp_path_factory.mktemp("shards"))
    samples = [(key, *data.draw(SAMPLE)) for key in keys]
    shards = write(folder, samples, max_samples=max_samples, max_bytes=max_bytes)
    found = []
    for shard in shards:
        check_shard_file(folder.path(shard.name), shard, shard.name)
        assert shard.samples <= max_samples
        for sample in read_samples(folder.path(shard.name)):
            image = folder.get_range(shard.name, sample.offset, sample.size)
            found.append((sample.key, sample.extension, image, sample.class_id))
    assert found == samples
    assert sum(shard.samples for shard in shards) == len(samples)


def test_writer_gives_same_bytes_for_same_images(tmp_path):
    samples = [(f"k{i}", "png", bytes([i]) * 100, i) for i in range(10)]
    assert write(LocalStore(tmp_path / "a"), samples) == write(LocalStore(tmp_path / "b"), samples)


def test_writer_starts_new_shard_at_limits(tmp_path):
    samples = [(f"k{i}", "png", b"x" * 3000, None) for i in range(10)]
    by_count = write(LocalStore(tmp_path / "a"), samples, max_samples=4)
    assert [shard.samples for shard in by_count] == [4, 4, 2]
    by_bytes = write(LocalStore(tmp_path / "b"), samples, max_bytes=10_000)
    assert [shard.samples for shard in by_bytes] == [2] * 5
    assert [shard.name for shard in by_count] == ["shard-00000.tar", "shard-00001.tar", "shard-00002.tar"]


@pytest.mark.parametrize(
    ("members", "fields", "reason"),
    [
        ([("../out.png", b"x")], {}, "leads outside"),
        ([("/etc/passwd.png", b"x")], {}, "leads outside"),
        ([("a.png", b"")], {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "a link or device"),
        ([("a.png", b"")], {"type": tarfile.LNKTYPE, "linkname": "b.png"}, "a link or device"),
        ([("a.png", b"")], {"type": tarfile.CHRTYPE}, "a link or device"),
        ([("a.png", b"")], {"type": tarfile.FIFOTYPE}, "a link or device"),
        ([("a.png", b"x")], {"type": tarfile.GNUTYPE_SPARSE}, "a sparse file"),
        ([("a/../../b.png", b"x")], {}, "leads outside"),
        ([("caf\udce9.png", b"x")], {}, "not UTF-8"),
        ([("a.png", b"x"), ("a.jpg", b"y")], {}, "a second image for key 'a'"),
        ([("a.png", b"x"), ("a.cls", b"dog")], {}, "must be a class index"),
        ([("a.png", b"x"), ("a.cls", b"-1")], {}, "must be a class index"),
        ([("a.png", b"x"), ("a.cls", b"")], {}, "must be a class index"),
        ([("a.png", b"x"), ("a.cls", b"1_0")], {}, "must be a class index"),
        ([("a.png", b"x"), ("a.cls", b"7" * 30)], {}, "must be a class index"),
        ([("a.png", b"x"), ("b.cls", b"1")], {}, "a label without an image"),
        ([("a.png", b"x"), ("a.cls", b"1"), ("a.cls", b"1")], {}, "is there twice"),
    ],
)
def test_read_samples_refuses_foreign_members(tmp_path, members, fields, reason):
    path = tar_of(tmp_path / "bad.tar", members, **fields)
    with pytest.raises(DataError, match=reason) as caught:
        read_samples(path)
    assert str(path) in str(caught.value)


def test_read_samples_skips_other_files(tmp_path):
    path = tar_of(tmp_path / "x.tar", [("d/a.png", b"xyz"), ("d/a.json", b"{}"), ("d/a.cls", b"7"), ("README", b"hi")])
    (sample,) = read_samples(path)
    assert (sample.key, sample.extension, sample.size, sample.class_id) == ("d/a", "png", 3, 7)


def test_check_shard_file_refuses_cut_tar(tmp_path):
    folder = LocalStore(tmp_path)
    (shard,) = write(folder, [(f"k{i}", "png", bytes(5000), 1) for i in range(5)])
    whole = folder.get(shard.name)
    for length in (len(whole) // 2, 100, 6 * 512, 0):
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut\.tar"):
            check_shard_file(path, shard, path.name)


def three(tmp_path) -> bytes:
    """Three samples, 2560 bytes each: two headers, two blocks of image, one of label."""
    folder = LocalStore(tmp_path)
    (shard,) = write(folder, [(f"k{i}", "png", bytes(600), i) for i in range(3)])
    return folder.get(shard.name)


SAMPLE_BYTES = 2560


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda tar: tar[:SAMPLE_BYTES] + b"\xff" * 512 + tar[SAMPLE_BYTES + 512 :], "at byte 2560: a damaged header"),
        (lambda tar: tar[: SAMPLE_BYTES + 150] + b"7" + tar[SAMPLE_BYTES + 151 :], "at byte 2560: a damaged header"),
        (lambda tar: tar[: 2 * SAMPLE_BYTES], "at byte 5120: no end mark"),
        (lambda tar: tar[: 2 * SAMPLE_BYTES + 200], "at byte 5120: it is cut off in a header"),
        (lambda tar: tar[: 2 * SAMPLE_BYTES + 900], "at byte 5120: a member of 600 bytes is cut off"),
        (lambda tar: tar[:SAMPLE_BYTES] + bytes(1024) + tar[SAMPLE_BYTES + 1024 :], "more data follows its end mark"),
        (lambda tar: tar + tar, "more data follows its end mark"),
        (lambda tar: b"", "no end mark"),
    ],
)
def test_read_samples_notices_hidden_images(tmp_path, spoil, reason):
    path = tmp_path / "bad.tar"
    path.write_bytes(spoil(three(tmp_path)))
    with pytest.raises(DataError, match=reason):
        read_samples(path)


def test_read_samples_refuses_compressed_tar(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(gzip.compress(three(tmp_path)))
    with pytest.raises(DataError, match="not a whole tar file"):
        read_samples(path)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@settings(max_examples=20, deadline=None)
@given(names=KEYS, depth=st.integers(0, 5), data=st.binary(max_size=1500))
def test_read_samples_equals_tarfile_for_all_formats(tmp_path_factory, form, names, depth, data):
    path = tmp_path_factory.mktemp("forms") / "x.tar"
    names = [f"{'folder/' * 9 * depth}{name}.png" for name in names]
    with tarfile.open(path, "w", format=form) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            try:
                tar.addfile(info, io.BytesIO(data))
            except ValueError:  # too long a name for USTAR
                continue
    with tarfile.open(path) as tar:
        expected = [(*split_key(member.name), member.offset_data, member.size) for member in tar]
    assert [sample[:4] for sample in read_samples(path)] == expected


def test_read_samples_skips_folders_and_hidden_files(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("d/._a.png", "d/.png", ".cls", "d/a.png"):
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"xy"))
    (sample,) = read_samples(path)
    assert sample.key == "d/a"


@given(place=st.integers(0, 3 * SAMPLE_BYTES - 1), value=st.integers(0, 255))
def test_flipped_byte_is_data_error_or_harmless(tmp_path_factory, place, value):
    tmp_path = tmp_path_factory.mktemp("flipped")
    tar = bytearray(three(tmp_path))
    tar[place] = value
    path = tmp_path / "x.tar"
    path.write_bytes(tar)
    try:
        index = read_samples(path)
    except DataError:
        return
    whole = read_samples(tmp_path / "shard-00000.tar")
    # Labels have no checksum of their own: that is what the shard's sha256 is for.
    assert [sample[:4] for sample in index] == [sample[:4] for sample in whole]


@given(st.binary(max_size=3000))
def test_garbage_tar_is_data_error_or_index(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("garbage") / "x.tar"
    path.write_bytes(data)
    try:
        index = read_samples(path)
    except DataError as error:
        index = []
        named = "x.tar" in str(error)
    else:
        named = True
    assert named
    assert all(isinstance(sample, ShardSample) for sample in index)


def test_check_shard_file_refuses_wrong_checksum(tmp_path):
    folder = LocalStore(tmp_path)
    (shard,) = write(folder, [("k", "png", b"abc", None)])
    data = bytearray(folder.get(shard.name))
    data[512] ^= 1
    folder.put(shard.name, bytes(data))
    with pytest.raises(DataError, match=r"sha256 is not that of dataset\.json"):
        check_shard_file(folder.path(shard.name), shard, shard.name)


@pytest.mark.parametrize("key", ["a.b", "a.", ".a", "", "../a", "/a", "dir/", "dir/a.b", "a\0", "caf\udce9"])
def test_writer_refuses_unreadable_keys(tmp_path, key):
    with ShardWriter(LocalStore(tmp_path), max_samples=1, max_bytes=1) as writer, pytest.raises(DataError, match="key"):
        writer.add_image(key, "png", b"x", None)


def test_failed_writer_leaves_no_shard(tmp_path):
    def twice() -> None:
        with ShardWriter(LocalStore(tmp_path), max_samples=9, max_bytes=1 << 20) as writer:
            writer.add_image("a", "png", b"x", None)
            writer.add_image("a", "png", b"x", None)

    with pytest.raises(DataError):
        twice()
    assert list(LocalStore(tmp_path).list()) == []


def test_split_key_splits_at_first_dot():
    assert split_key("a.b/c.d.PNG") == ("a.b/c", "d.png")


def test_writer_error_names_full_disk(tmp_path, monkeypatch):
    def full(*_args) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StoreError, match=r"cannot write a shard: No space left on device; free some space"):
        add_one(tmp_path, lambda: monkeypatch.setattr(tarfile.TarFile, "addfile", full))
    assert list(LocalStore(tmp_path / "out").list()) == []


def add_one(tmp_path, before) -> None:
    with ShardWriter(LocalStore(tmp_path / "out"), max_samples=9, max_bytes=1 << 20) as writer:
        before()
        writer.add_image("a", "png", b"x", None)


def test_writer_keeps_no_owners_times_or_modes(tmp_path):
    folder = LocalStore(tmp_path)
    (shard,) = write(folder, [("ü" * 80, "png", b"x", 3)])
    with tarfile.open(folder.path(shard.name)) as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == ["ü" * 80 + ".png", "ü" * 80 + ".cls"]
    for member in members:
        assert (member.mtime, member.uid, member.gid, member.uname, member.gname, member.mode) == (0, 0, 0, "", "", 0o644)
