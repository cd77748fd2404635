import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ns.data.shards import Sample, ShardWriter, check_shard, read_index, split_key
from ns.errors import DataError
from ns.store import LocalStore

KEYS = st.lists(
    st.text(st.characters(exclude_characters="./\0\\", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30),
    unique=True,
    max_size=12,
)
SAMPLE = st.tuples(st.sampled_from(["png", "jpg", "webp"]), st.binary(max_size=2000), st.none() | st.integers(0, 999))


def write(folder, samples, *, max_samples=100, max_bytes=1 << 20):
    with ShardWriter(folder, max_samples=max_samples, max_bytes=max_bytes) as writer:
        for sample in samples:
            writer.add(*sample)
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
def test_what_is_written_is_read_back_in_order(tmp_path_factory, keys, data, max_samples, max_bytes):
    folder = LocalStore(tmp_path_factory.mktemp("shards"))
    samples = [(key, *data.draw(SAMPLE)) for key in keys]
    shards = write(folder, samples, max_samples=max_samples, max_bytes=max_bytes)
    found = []
    for shard in shards:
        check_shard(folder.path(shard.name), shard)
        assert shard.samples <= max_samples
        for sample in read_index(folder.path(shard.name)):
            image = folder.get_range(shard.name, sample.offset, sample.size)
            found.append((sample.key, sample.extension, image, sample.label))
    assert found == samples
    assert sum(shard.samples for shard in shards) == len(samples)


def test_the_same_images_give_the_same_bytes(tmp_path):
    samples = [(f"k{i}", "png", bytes([i]) * 100, i) for i in range(10)]
    assert write(LocalStore(tmp_path / "a"), samples) == write(LocalStore(tmp_path / "b"), samples)


def test_shards_roll_over_at_their_limits(tmp_path):
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
        ([("a.png", b"x"), ("a.jpg", b"y")], {}, "a second image for key 'a'"),
        ([("a.png", b"x"), ("a.cls", b"dog")], {}, "must be a class index"),
        ([("a.png", b"x"), ("a.cls", b"-1")], {}, "must be a class index"),
        ([("a.png", b"x"), ("b.cls", b"1")], {}, "a label without an image"),
        ([("a.png", b"x"), ("a.cls", b"1"), ("a.cls", b"1")], {}, "is there twice"),
    ],
)
def test_what_does_not_belong_in_a_shard_is_refused_by_name(tmp_path, members, fields, reason):
    path = tar_of(tmp_path / "bad.tar", members, **fields)
    with pytest.raises(DataError, match=reason) as caught:
        read_index(path)
    assert str(path) in str(caught.value)


def test_other_files_of_a_sample_are_ignored(tmp_path):
    path = tar_of(tmp_path / "x.tar", [("d/a.png", b"xyz"), ("d/a.json", b"{}"), ("d/a.cls", b"7"), ("README", b"hi")])
    (sample,) = read_index(path)
    assert (sample.key, sample.extension, sample.size, sample.label) == ("d/a", "png", 3, 7)


def test_a_cut_off_tar_is_refused(tmp_path):
    folder = LocalStore(tmp_path)
    (shard,) = write(folder, [(f"k{i}", "png", bytes(5000), 1) for i in range(5)])
    whole = folder.get(shard.name)
    for length in (len(whole) // 2, 100, 6 * 512, 0):
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut\.tar"):
            check_shard(path, shard)


@given(st.binary(max_size=3000))
def test_garbage_is_a_data_error_or_an_index(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("garbage") / "x.tar"
    path.write_bytes(data)
    try:
        index = read_index(path)
    except DataError as error:
        index = []
        named = "x.tar" in str(error)
    else:
        named = True
    assert named
    assert all(isinstance(sample, Sample) for sample in index)


def test_a_wrong_checksum_is_refused(tmp_path):
    folder = LocalStore(tmp_path)
    (shard,) = write(folder, [("k", "png", b"abc", None)])
    data = bytearray(folder.get(shard.name))
    data[512] ^= 1
    folder.put(shard.name, bytes(data))
    with pytest.raises(DataError, match=r"sha256 is not that of dataset\.json"):
        check_shard(folder.path(shard.name), shard)


@pytest.mark.parametrize("key", ["a.b", "", "../a", "/a", "dir/a.b"])
def test_keys_that_would_not_come_back_are_refused(tmp_path, key):
    with ShardWriter(LocalStore(tmp_path), max_samples=1, max_bytes=1) as writer, pytest.raises(DataError, match="key"):
        writer.add(key, "png", b"x", None)


def test_a_failed_writer_leaves_no_shard(tmp_path):
    def twice() -> None:
        with ShardWriter(LocalStore(tmp_path), max_samples=9, max_bytes=1 << 20) as writer:
            writer.add("a", "png", b"x", None)
            writer.add("a", "png", b"x", None)

    with pytest.raises(DataError):
        twice()
    assert list(LocalStore(tmp_path).list()) == []


def test_keys_run_to_the_first_dot_of_the_base_name():
    assert split_key("a.b/c.d.PNG") == ("a.b/c", "d.png")
