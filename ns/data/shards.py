"""Tar shards in the WebDataset layout: `KEY.png` (or jpg, jpeg, webp), and `KEY.cls` where labelled."""

import io
import shutil
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import NamedTuple, Self

from ns.data.dataset import Shard
from ns.digest import sha256_file
from ns.errors import DataError
from ns.store import Store

IMAGES = ("jpg", "jpeg", "png", "webp")
LABEL = "cls"


class Sample(NamedTuple):
    """One image inside a tar."""

    key: str
    extension: str
    """One of IMAGES."""
    offset: int
    """Of the image's first byte in the tar file."""
    size: int
    """Bytes."""
    label: int | None
    """Class index, where the tar has one."""


def split_key(name: str) -> tuple[str, str]:
    """`a/b.c.png` → (`a/b`, `c.png`): WebDataset's key runs to the first dot of the base name."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def read_index(path: Path) -> list[Sample]:
    """The images of a tar, in its order.

    Raises DataError naming tar and member for what does not belong in a shard: names that lead outside, links, devices, two
    images of one key, labels without an image or that are no class index, and damaged or truncated tars.
    """
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    try:
        # "r:" takes plain tars only: a compressed one has no byte ranges to read images from.
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                _check_member(path, member)
                key, extension = split_key(member.name)
                if member.isdir():
                    continue
                if extension == LABEL:
                    if key in labels:
                        raise DataError(f"{path}: {member.name}: is there twice")
                    labels[key] = _read_label(path, tar, member)
                elif extension in IMAGES:
                    if key in images:
                        raise DataError(f"{path}: {member.name}: a second image for key {key!r}")
                    images[key] = (extension, member.offset_data, member.size)
        _check_end(path, images)
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: not a whole tar file: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if orphans := labels.keys() - images.keys():
        raise DataError(f"{path}: {min(orphans)}.{LABEL}: a label without an image")
    return [Sample(key, *place, labels.get(key)) for key, place in images.items()]


def check_shard(path: Path, shard: Shard) -> None:
    """Raises DataError unless the file is the one that the manifest describes."""
    if sha256_file(path) != shard.sha256:
        raise DataError(f"{path}: sha256 is not that of dataset.json: the shard is damaged or was replaced")
    if (found := len(read_index(path))) != shard.samples:
        raise DataError(f"{path}: {found} images, dataset.json says {shard.samples}")


class ShardWriter:
    """Writes shards of at most `max_samples` images and about `max_bytes` bytes into a store folder: `shard-00000.tar` …

    The same samples in the same order give the same bytes: no times, owners or modes of the machine are kept.
    """

    def __init__(self, folder: Store, *, max_samples: int, max_bytes: int) -> None:
        self._folder = folder
        self._max_samples = max_samples
        self._max_bytes = max_bytes
        self._done: list[Shard] = []
        self._keys: set[str] = set()
        self._count = 0
        self._scratch = Path(tempfile.mkdtemp(prefix="ns-shards-"))
        self._tar: tarfile.TarFile | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            if kind is None:
                self._roll()
        finally:
            if self._tar is not None:
                self._tar.close()
            shutil.rmtree(self._scratch, ignore_errors=True)

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The finished shards; all of them once the writer is closed."""
        return tuple(self._done)

    def add(self, key: str, extension: str, data: bytes, label: int | None) -> None:
        """Appends one image. The key has no dot in its base name and was not used before."""
        if split_key(key)[1] or key in self._keys or not _is_inside(key):
            raise DataError(f"key {key!r}: must be new, relative, and without a dot in its last part")
        if extension not in IMAGES:
            raise DataError(f"{key}.{extension}: must be one of {', '.join(IMAGES)}")
        self._keys.add(key)
        # 512-byte header and padding for each member.
        if self._tar is not None and (
            self._count >= self._max_samples or self._tar.offset + len(data) + 2048 > self._max_bytes
        ):
            self._roll()
        if self._tar is None:
            self._tar = tarfile.open(self._path, "w:", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        self._member(f"{key}.{extension}", data)
        if label is not None:
            self._member(f"{key}.{LABEL}", str(label).encode())
        self._count += 1

    def _member(self, name: str, data: bytes) -> None:
        assert self._tar is not None
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))

    def _roll(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        self._tar = None
        name = f"shard-{len(self._done):05d}.tar"
        shard = Shard(name=name, samples=self._count, bytes=self._path.stat().st_size, sha256=sha256_file(self._path))
        self._folder.put_file(name, self._path)
        self._done.append(shard)
        self._count = 0

    @property
    def _path(self) -> Path:
        return self._scratch / "shard.tar"


def _is_inside(name: str) -> bool:
    return bool(name) and not name.startswith("/") and ".." not in PurePosixPath(name).parts and "\0" not in name


def _check_member(path: Path, member: tarfile.TarInfo) -> None:
    if not _is_inside(member.name):
        raise DataError(f"{path}: {member.name!r}: a name that leads outside the shard")
    if not (member.isreg() or member.isdir()):
        raise DataError(f"{path}: {member.name}: a link or device; only plain files belong in a shard")


def _read_label(path: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    file = tar.extractfile(member)
    text = file.read(32) if file else b""
    # int() would also take " 1_0 " and other digits than ours.
    if not text.strip().isdigit():
        raise DataError(f"{path}: {member.name}: {text[:16]!r}: must be a class index, 0 or above")
    return int(text)


def _check_end(path: Path, images: dict[str, tuple[str, int, int]]) -> None:
    # tarfile seeks over data and so does not notice that the last member is cut off.
    size = path.stat().st_size
    for key, (extension, offset, length) in images.items():
        if offset + length > size:
            raise DataError(f"{path}: {key}.{extension}: cut off: the tar ends at byte {size}")
