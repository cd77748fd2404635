"""Sources of images: folders, tables, tars and archives, on disk or on S3, each as a stream of entries.

An archive is never unpacked under the names in it: its bytes go into one scratch file, and entries point into that file.
"""

import bz2
import errno
import gzip
import lzma
import os
import re
import stat
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, Self
from urllib.parse import unquote, urlsplit

from ns.core.errors import DataError, NsError, StoreError
from ns.data.class_names import normalize_name
from ns.data.dataset import DatasetRole
from ns.data.importing.file_kinds import classify_document, escape_path, get_extension, is_left_by_program
from ns.data.importing.listing import SourceEntry
from ns.data.importing.tables import TABLES, list_table
from ns.data.importing.tars import LABEL_EXTENSIONS, TarMember, TarSource, list_images, list_members
from ns.data.key_list import IMAGE_EXTENSIONS
from ns.data.shards import CLASS_EXTENSION, read_range
from ns.storage import Store, open_parent, open_store, split_uri
from ns.storage.base import BlobEntry
from ns.storage.local import os_errors_as_store_errors
from ns.storage.scratch import make_scratch_error

MAX_FILE_BYTES = 1 << 30
"""Maximum size of a file that is read: a larger one is a film or an archive rather than an image."""
XZ_BYTES = 512 << 20
"""Memory for the dictionary of an xz archive: `xz -9` asks for 65 MiB, and a header may claim 4 GiB."""
CHUNK_BYTES = 1 << 20


class XzReader:
    """Reads an xz file with a limit on its memory, which `lzma.open` does not have. Raises LZMAError."""

    def __init__(self, path: Path, _mode: str) -> None:
        self._file = path.open("rb")
        self._stream: lzma.LZMADecompressor | None = None
        self._packed = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end. Streams may follow each other, with zeros between them."""
        while True:
            if self._stream is None:
                packed = self._packed.lstrip(b"\0")
                while not packed:
                    chunk = self._file.read(CHUNK_BYTES)
                    if not chunk:
                        return b""
                    packed = chunk.lstrip(b"\0")
                self._packed = packed
                self._stream = lzma.LZMADecompressor(memlimit=XZ_BYTES)
            elif self._stream.needs_input and not self._packed:
                self._packed = self._file.read(CHUNK_BYTES)
                if not self._packed:
                    raise EOFError("it ends before its end")
            unpacked = self._stream.decompress(self._packed, size)
            self._packed = b""
            if self._stream.eof:
                self._packed, self._stream = self._stream.unused_data, None
            if unpacked:
                return unpacked


COMPRESSED: dict[str, Callable[..., Any]] = {
    ".tar": open, ".tar.gz": gzip.open, ".tgz": gzip.open, ".tar.bz2": bz2.open, ".tar.xz": XzReader
}  # fmt: skip
UNPACKED_TAR = "unpacked.tar"
ARCHIVES = (*COMPRESSED, ".zip")
MAX_UNPACKED_RATIO, MIN_UNPACKED_LIMIT = 200, 1 << 30
"""An archive may unpack to so many times its size, and in any case to 1 GiB. Encoded images hardly shrink, raw ones by a factor of ten;
zeros shrink by a thousand."""
SCRATCH_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
"""What a disk says; all else is said by the archive."""
MAX_WAYS = 100
"""Ways by which links may lead to one folder: a few folders with links to each other make billions."""
LOOP = "link to a folder that holds it"


def list_entries(
    source: str, role: DatasetRole, *, split: str | None, scratch_dir: Path, passed_over: Counter[str]
) -> Iterator[SourceEntry]:
    """The entries of `source`, in any order. `scratch_dir` is an empty folder for unpacking.

    A source is one of:
    - a folder or `s3://` prefix of class folders, of images at any depth (for a pool), or of tar shards at any depth,
    - a CSV, TSV or Parquet table with the columns path, label and optionally split, or Label Studio's JSON,
    - one tar shard or several (`shard-{000..127}.tar`),
    - an archive of class folders: tar or zip, also compressed, also with one tar per class inside.

    What is no image by its name is passed over, and counted by its kind in `passed_over`. Raises DataError for a source that does
    not exist or is none of these.
    """
    if re.search(r"\{\d+\.\.\d+\}", source):
        return _list_tars(_expand_braces(source), role, scratch_dir, passed_over)
    suffix = _detect_suffix(source)
    if split is not None and suffix not in TABLES:
        raise DataError(f"--split {split}: {source} is not a table; only tables have splits")
    if suffix in TABLES:
        return list_table(source, role, split)
    if suffix in ARCHIVES:
        return _blame_source(source, scratch_dir, _list_archive(source, role, scratch_dir, passed_over))
    if not _is_local(source):
        store = open_store(source)
        return _list_blobs(store, store.entries(), role, scratch_dir, passed_over)
    path = resolve_local_path(source)
    if not path.is_dir():
        problem = "is a file of another kind" if path.exists() else "no such folder"
        raise DataError(
            f"{source}: {problem}; name a folder of images, a table (.csv, .tsv, .parquet), Label Studio's .json "
            "or an archive (.tar, .zip, …)"
        )
    if role != "unlabeled":
        _check_class_folders(path)
    return _list_blobs(path, _walk_files(path, passed_over), role, scratch_dir, passed_over)


def resolve_local_path(source: str) -> Path:
    """The absolute path of a local path or `file://` URI."""
    path = Path(unquote(urlsplit(source).path) if source.startswith("file://") else source).expanduser()
    return path.absolute()


def walk_folders(root: Path, passed_over: Counter[str] | None = None) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Each folder at and below `root` with the sorted names of its folders and files, without those that programs left there.

    Links to folders are followed, as datasets are often linked into place, except those back to a parent folder, which are counted in
    `passed_over`. Raises DataError for a folder that cannot be read, and for one to which links lead in more than 100 ways.
    """
    real_root = root.resolve()
    ways: Counter[Path] = Counter()
    for current, folders, names in os.walk(root, onerror=_raise_unreadable, followlinks=True):
        parent = Path(current)
        real = parent.resolve()
        if real != real_root / parent.relative_to(root):
            ways[real] += 1
            if ways[real] > MAX_WAYS:
                raise DataError(
                    f"{parent}: links lead to this folder in more than {MAX_WAYS} ways; remove links between folders"
                )
        leading = {folder.resolve() for folder in (parent, *parent.parents) if folder.is_relative_to(root)}
        kept = sorted(name for name in folders if not is_left_by_program(name))
        folders[:] = [name for name in kept if (parent / name).resolve() not in leading]
        if passed_over is not None and len(folders) < len(kept):
            passed_over[LOOP] += len(kept) - len(folders)
        yield parent, list(folders), sorted(name for name in names if not is_left_by_program(name))


class SourceReader:
    """Reads the bytes of entries. Safe in threads if `is_remote`."""

    def __init__(self, source: str) -> None:
        if "{" in source or _detect_suffix(source) in (*TABLES, *ARCHIVES):
            source = split_uri(source)[0]
        self.is_remote = not _is_local(source)
        self._source = open_store(source) if self.is_remote else resolve_local_path(source)
        self._open: tuple[str, IO[bytes]] | None = None

    def read_entry(self, entry: SourceEntry) -> bytes:
        """Raises DataError with the reason for an unusable file, StoreError when the source is out of reach."""
        if entry.problem:
            raise DataError(entry.problem)
        if entry.size > MAX_FILE_BYTES:
            raise DataError("larger than 1 GiB")
        if entry.container:
            return self._read_container(entry)
        if "://" in entry.path:
            try:
                parent = open_parent(entry.path)
            except NsError as error:
                raise DataError(str(error)) from error
            return _read_remote(*parent)
        if isinstance(self._source, Path):
            return _read_file(self._source / entry.path)
        return _read_remote(self._source, entry.path)

    def close(self) -> None:
        if self._open:
            self._open[1].close()
            self._open = None

    def _read_container(self, entry: SourceEntry) -> bytes:
        if not _is_local(entry.container):
            store, name = open_parent(entry.container)
            return store.get_range(name, entry.offset, entry.size)
        if self._open is None or self._open[0] != entry.container:
            self.close()
            with os_errors_as_store_errors(entry.container, "read"):
                self._open = entry.container, Path(entry.container).open("rb")  # noqa: SIM115
        return read_range(self._open[1], entry.offset, entry.size)


def _read_remote(store: Store, key: str) -> bytes:
    try:
        return store.get(key)
    except StoreError as error:
        if not store.exists(key):
            raise DataError("no such file") from error
        raise


def _read_file(path: Path) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            # Opening a pipe would wait for a writer forever.
            raise DataError("not a plain file")
        if status.st_size > MAX_FILE_BYTES:
            raise DataError("larger than 1 GiB")
        return path.read_bytes()
    except OSError as error:
        raise DataError((error.strerror or str(error)).lower()) from error
    except ValueError as error:
        raise DataError("a name that no file has: it has a NUL byte") from error


def _is_local(uri: str) -> bool:
    return "://" not in uri or uri.startswith("file://")


def _detect_suffix(source: str) -> str:
    name = source.lower()
    matched = next((suffix for suffix in (*TABLES, *ARCHIVES) if name.endswith(suffix)), "")
    # A folder may be called anything.
    return "" if matched and _is_local(source) and resolve_local_path(source).is_dir() else matched


def _raise_unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error


# Folders


def _walk_files(root: Path, passed_over: Counter[str]) -> Iterator[BlobEntry]:
    for parent, _, names in walk_folders(root, passed_over):
        for name in names:
            try:
                status = (parent / name).stat()
                size, stamp = status.st_size if stat.S_ISREG(status.st_mode) else 0, str(status.st_mtime_ns)
            except OSError:
                # A dangling link, say, or a folder that may be listed and not entered. Reading the file fails with the reason.
                size, stamp = 0, ""
            yield BlobEntry(str((parent / name).relative_to(root)), size, stamp)


def _check_class_folders(root: Path) -> None:
    for folder in next(walk_folders(root))[1]:
        if escape_path(folder) != folder:
            raise DataError(
                f"{root}: class folder '{escape_path(folder)}': its name is not UTF-8, or has control characters; rename it"
            )
        if not any(names for _, _, names in walk_folders(root / folder)):
            raise DataError(f"{root}: class folder {folder!r} has no images; add some, or remove the folder")


def _list_blobs(
    root: Path | Store, blobs: Iterator[BlobEntry], role: DatasetRole, scratch_dir: Path, passed_over: Counter[str]
) -> Iterator[SourceEntry]:
    """The images of a folder or prefix, and those in its tars, as if each tar were a folder of its name."""
    for blob in blobs:
        if is_left_by_program(blob.key):
            continue
        if kind := classify_document(blob.key):
            passed_over[kind] += 1
        elif get_extension(blob.key) == "tar" and blob.size:
            path = root / blob.key if isinstance(root, Path) else root.path(blob.key)
            container = str(path) if isinstance(root, Path) else f"{root.uri}/{blob.key}"
            folder_class = normalize_name(blob.key.partition("/")[0]) if "/" in blob.key else None
            tar = TarSource(path, container, f"{blob.key[:-4]}/", blob.stamp)
            yield from list_images(tar, role, scratch_dir, passed_over, folder_class)
        else:
            class_name, problem = _find_class_folder(str(getattr(root, "uri", root)), blob.key, role)
            if any(blob.key.lower().endswith(suffix) for suffix in ARCHIVES):
                problem = "an archive in a folder; unpack it, or import it by itself"
            yield SourceEntry(blob.key, class_name, blob.size, blob.stamp, problem=problem)


def _find_class_folder(root: str, path: str, role: DatasetRole) -> tuple[str | None, str]:
    """The class of a file by its folder, and why there is none. Raises DataError for an image outside any folder."""
    if role == "unlabeled":
        return None, ""
    class_name, slash, _ = path.partition("/")
    if slash:
        return normalize_name(class_name), ""
    if get_extension(path) in IMAGE_EXTENSIONS:
        raise DataError(
            f"{root}: {escape_path(path)} lies outside any class folder; labeled images belong in one subfolder per class"
        )
    return None, "lies outside any class folder"


# Tars in the WebDataset layout


def _expand_braces(source: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", source)
    if match is None:
        return [source]
    first, last = match.groups()
    numbers = range(int(first), int(last) + 1)
    return [
        uri for n in numbers for uri in _expand_braces(f"{source[: match.start()]}{n:0{len(first)}d}{source[match.end() :]}")
    ]


def _list_tars(uris: list[str], role: DatasetRole, scratch_dir: Path, passed_over: Counter[str]) -> Iterator[SourceEntry]:
    columns = zip(*(uri.split("/") for uri in uris), strict=False)
    shared = next((depth for depth, parts in enumerate(columns) if len(set(parts)) > 1), uris[0].count("/"))
    for uri in uris:
        store, name = open_parent(uri)
        path = store.path(name)
        own_part = "/".join(uri.split("/")[shared:]).removesuffix(".tar")
        prefix = f"{unquote(own_part) if uri.startswith('file:') else own_part}/"
        tar = TarSource(path, str(path) if _is_local(uri) else uri, prefix, _read_stamp(store, name))
        yield from list_images(tar, role, scratch_dir, passed_over)


def _read_stamp(store: Store, name: str) -> str:
    return next((blob.stamp for blob in store.entries(name) if blob.key == name), "")


# Archives


def _list_archive(source: str, role: DatasetRole, scratch_dir: Path, passed_over: Counter[str]) -> Iterator[SourceEntry]:
    store, name = open_parent(source)
    tar = TarSource(_unpack_tar(source, store.path(name), scratch_dir / UNPACKED_TAR), "", "", _read_stamp(store, name))
    tar = tar._replace(container=str(tar.tar))
    common, is_one_folder, label_extensions = _survey_archive(tar.tar)
    depth = len(common.parts)
    if role != "unlabeled" and (CLASS_EXTENSION in label_extensions or (is_one_folder and label_extensions)):
        yield from list_images(tar, role, scratch_dir, passed_over, normalize_name(common.name) or None)
        return
    if role != "unlabeled" and is_one_folder:
        # The one folder must then be a class.
        depth = max(0, depth - 1)
    for member in list_members(tar.tar):
        if kind := classify_document(member.name):
            passed_over[kind] += 1
            continue
        inner = TarMember("/".join(PurePosixPath(member.name).parts[depth:]), member.offset, member.size)
        yield tar.make_entry(inner, *_find_class_folder(source, inner.name, role))


def _survey_archive(tar: Path) -> tuple[PurePosixPath, bool, set[str]]:
    """The folder that all images share, whose parents name no class; whether all lie in it; and the extensions of labels beside them."""
    common: str | None = None
    deepest = 0
    label_extensions: set[str] = set()
    for member in list_members(tar):
        extension = get_extension(member.name)
        if extension in LABEL_EXTENSIONS:
            label_extensions.add(extension)
        if classify_document(member.name):
            continue
        folder = PurePosixPath(member.name).parent
        deepest = max(deepest, len(folder.parts))
        common = str(folder) if common is None else os.path.commonpath([common, str(folder)])
    shared = PurePosixPath(common or "")
    return shared, len(shared.parts) == deepest, label_extensions


def _blame_source(source: str, scratch_dir: Path, source_entries: Iterator[SourceEntry]) -> Iterator[SourceEntry]:
    """Names the source instead of the scratch file in errors."""
    try:
        yield from source_entries
    except DataError as error:
        raise DataError(str(error).replace(str(scratch_dir / UNPACKED_TAR), source)) from error


def _unpack_tar(source: str, packed: Path, target: Path) -> Path:
    """The archive as an uncompressed tar: the archive itself, or one written to `target`."""
    suffix = _detect_suffix(source)
    if suffix == ".tar" and _is_local(source):
        return packed
    limit = max(MIN_UNPACKED_LIMIT, MAX_UNPACKED_RATIO * packed.stat().st_size)
    try:
        with target.open("wb") as sink:
            if suffix == ".zip":
                _repack_zip(source, packed, sink, limit)
            else:
                with COMPRESSED[suffix](packed, "rb") as unpacking:
                    while chunk := unpacking.read(CHUNK_BYTES):
                        sink.write(chunk)
                        _check_unpacked(source, sink.tell(), limit)
    except DataError:
        raise
    except Exception as error:
        # For damage, gzip and bz2 raise an OSError without an errno, zipfile some for places in the file that are none, and others raise
        # EOFError, BadZipFile, zlib.error, UnicodeDecodeError and more.
        if isinstance(error, OSError) and error.errno in SCRATCH_ERRORS:
            raise make_scratch_error(target.parent, f"unpack {source}", error) from error
        raise DataError(f"{source}: not a whole archive: {escape_path(str(error) or type(error).__name__)}") from error
    return target


def _check_unpacked(source: str, size: int, limit: int) -> None:
    if size > limit:
        raise DataError(
            f"{source}: decompression bomb: it unpacks to more than {limit:,} bytes; if it is none, unpack it, and import the folder"
        )


def _repack_zip(source: str, packed: Path, sink: IO[bytes], limit: int) -> None:
    with zipfile.ZipFile(packed) as archive, tarfile.open(fileobj=sink, mode="w:", format=tarfile.PAX_FORMAT) as tar:
        _check_unpacked(source, sum(min(info.file_size, MAX_FILE_BYTES + 1) for info in archive.infolist()), limit)
        for info in archive.infolist():
            if info.is_dir():
                continue
            if stat.S_ISLNK(info.external_attr >> 16):
                raise DataError(f"{source}: {info.filename}: a link; only plain files belong in an archive")
            if info.flag_bits & 1:
                raise DataError(f"{source}: {info.filename}: is encrypted; unpack the archive first")
            # Old programs of Windows write its own separator.
            windows = info.create_system == 0 and "/" not in info.filename
            member = tarfile.TarInfo(info.filename.replace("\\", "/") if windows else info.filename)
            # Larger files are left out by their size, so they need not be unpacked whole.
            member.size = min(info.file_size, MAX_FILE_BYTES + 1)
            with archive.open(info) as content:
                tar.addfile(member, content)
