"""Sources of images: folders, tables, tars and archives, on disk or on S3, each as a stream of entries.

An archive is never unpacked under the names in it: its bytes go into one scratch file, and entries point into that file.
"""

import bz2
import gzip
import lzma
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.dataset as pads

from ns.core.errors import DataError, StoreError
from ns.data.dataset import DatasetRole
from ns.data.importing.listing import IMAGE_EXTENSIONS, SourceEntry
from ns.data.shards import CLASS_EXTENSION, iterate_members, read_class_id, read_range, split_key
from ns.storage import Store, open_parent, open_store, split_uri
from ns.storage.local import os_errors_as_store_errors
from ns.storage.scratch import make_scratch_error

HIDDEN = (".", "__MACOSX", "Thumbs.db", "desktop.ini")
MAX_FILE_BYTES = 1 << 30
"""Maximum size of a file that is read: a larger one is a film or an archive rather than an image."""
TABLES = (".csv", ".tsv", ".parquet")
COMPRESSED: dict[str, Callable[..., Any]] = {
    ".tar": open, ".tar.gz": gzip.open, ".tgz": gzip.open, ".tar.bz2": bz2.open, ".tar.xz": lzma.open
}  # fmt: skip
UNPACKED_TAR = "unpacked.tar"
ARCHIVES = (*COMPRESSED, ".zip")
PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path")
LABEL_COLUMNS = ("label", "class", "class_name", "category", "target")
SPLIT_COLUMNS = ("split", "subset", "set", "partition")
CHUNK_BYTES = 1 << 20
BATCH_ROWS = 10_000
"""Rows of a table in memory at a time."""


def list_entries(source: str, role: DatasetRole, *, split: str | None, scratch_dir: Path) -> Iterator[SourceEntry]:
    """The entries of `source`, in any order. `scratch_dir` is an empty folder for unpacking.

    A source is one of:
    - a folder or `s3://` prefix of class folders, of images at any depth (for a pool), or of tar shards,
    - a CSV, TSV or Parquet table with the columns path, label and optionally split,
    - one tar shard or several (`shard-{000..127}.tar`),
    - an archive of class folders: tar or zip, also compressed, also with one tar per class inside.

    Raises DataError for a source that does not exist or is none of these.
    """
    if re.search(r"\{\d+\.\.\d+\}", source):
        return _list_tars(_expand_braces(source), role)
    suffix = _detect_suffix(source)
    if split is not None and suffix not in TABLES:
        raise DataError(f"--split {split}: {source} is not a table; only tables have splits")
    if suffix in TABLES:
        return _list_table(source, role, split)
    if suffix in ARCHIVES:
        return _blame_source(source, scratch_dir, _list_archive(source, role, scratch_dir))
    if not _is_local(source):
        return _list_remote_folder(open_store(source), role)
    path = resolve_local_path(source)
    if not path.is_dir():
        problem = "is a file of another kind" if path.exists() else "no such folder"
        raise DataError(
            f"{source}: {problem}; name a folder of images, a table (.csv, .tsv, .parquet) or an archive (.tar, .zip, …)"
        )
    if tars := _find_shards(path):
        return _list_tars(tars, role)
    return _list_folder(path, role)


def resolve_local_path(source: str) -> Path:
    """The absolute path of a local path or `file://` URI."""
    path = Path(unquote(urlsplit(source).path) if source.startswith("file://") else source).expanduser()
    return path.absolute()


def walk_folders(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Each folder at and below `root` with the sorted names of its folders and files, without hidden ones.

    Links to folders are followed, as datasets are often linked into place, except those back to a parent folder.
    """
    for current, folders, names in os.walk(root, onerror=_raise_unreadable, followlinks=True):
        parent = Path(current)
        leading = {folder.resolve() for folder in (parent, *parent.parents) if folder.is_relative_to(root)}
        folders[:] = sorted(
            name for name in folders if not name.startswith(HIDDEN) and (parent / name).resolve() not in leading
        )
        yield parent, list(folders), sorted(name for name in names if not name.startswith(HIDDEN))


def escape_path(path: str) -> str:
    """Replaces bytes that are not UTF-8 by escapes; Python's lone surrogates could not be written to a file."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


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
        if entry.size > MAX_FILE_BYTES:
            raise DataError("larger than 1 GiB")
        if entry.container:
            return self._read_container(entry)
        if "://" in entry.path:
            return _read_remote(*open_parent(entry.path))
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


def _list_folder(root: Path, role: DatasetRole) -> Iterator[SourceEntry]:
    for parent, folders, names in walk_folders(root):
        inner = parent.relative_to(root)
        if role != "unlabeled" and parent == root:
            _check_class_folders(root, folders)
        for name in names:
            path = str(inner / name)
            # A dangling link is listed by the link's own status; reading it fails with the reason.
            status = (parent / name).stat() if (parent / name).exists() else (parent / name).lstat()
            size = status.st_size if stat.S_ISREG(status.st_mode) else 0
            yield SourceEntry(path, _extract_class_name(str(root), path, role), size, str(status.st_mtime_ns))


def _check_class_folders(root: Path, folders: list[str]) -> None:
    for folder in folders:
        if escape_path(folder) != folder:
            raise DataError(f"{root}: class folder '{escape_path(folder)}': its name is not UTF-8; rename it")
        if not any(names for _, _, names in walk_folders(root / folder)):
            raise DataError(f"{root}: class folder {folder!r} has no images; add some, or remove the folder")


def _list_remote_folder(store: Store, role: DatasetRole) -> Iterator[SourceEntry]:
    for blob in store.entries():
        if any(part.startswith(HIDDEN) for part in blob.key.split("/")):
            continue
        if blob.key.endswith(".tar"):
            yield from _list_tars([f"{store.uri}/{blob.key}"], role)
        else:
            yield SourceEntry(blob.key, _extract_class_name(store.uri, blob.key, role), blob.size, blob.stamp)


def _extract_class_name(root: str, path: str, role: DatasetRole) -> str | None:
    if role == "unlabeled":
        return None
    class_name, slash, _ = path.partition("/")
    if not slash:
        raise DataError(
            f"{root}: {escape_path(path)} lies outside any class folder; labeled images belong in one subfolder per class"
        )
    return class_name


# Tables


def _list_table(source: str, role: DatasetRole, split: str | None) -> Iterator[SourceEntry]:
    store, name = open_parent(source)
    table_path = store.path(name)
    base = table_path.parent if _is_local(source) else None
    try:
        batches = _open_batches(table_path)
        columns = {column.lower(): column for column in batches.schema.names}
        path_column = _find_column(source, columns, PATH_COLUMNS, "the path of each image")
        label_column = None if role == "unlabeled" else _find_column(source, columns, LABEL_COLUMNS, "its class")
        split_column = next((columns[candidate] for candidate in SPLIT_COLUMNS if candidate in columns), None)
        if split is not None and split_column is None:
            raise DataError(f"--split {split}: {source} has no column named one of {', '.join(SPLIT_COLUMNS)}")
        seen: set[str] = set()
        for batch in batches:
            table = batch.to_pydict()
            count = batch.num_rows
            splits = table[split_column] if split_column else [None] * count
            class_labels = table[label_column] if label_column else [None] * count
            seen.update(str(value) for value in splits if value is not None)
            if split is None and len(seen) > 1:
                raise DataError(f"{source}: has the splits {', '.join(sorted(seen))}; name one with --split")
            for path, class_label, row_split in zip(table[path_column], class_labels, splits, strict=True):
                if split is None or str(row_split) == split:
                    yield _make_entry(base, path, class_label)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        # Arrow raises its own errors for some damage, OSError for other, and UnicodeDecodeError for text that is not UTF-8.
        raise DataError(f"{source}: not a readable table: {(str(error) or 'damaged').splitlines()[0]}") from error


def _open_batches(path: Path) -> Any:
    if path.suffix.lower() == ".parquet":
        dataset = pads.dataset(path, format="parquet")
        return dataset.scanner(batch_size=BATCH_ROWS, batch_readahead=1, fragment_readahead=1).to_reader()
    parse_options = pacsv.ParseOptions(delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    names = pacsv.open_csv(path, parse_options=parse_options).schema.names
    # All columns are read as text: the class 007 is not the class 7.
    as_text = pacsv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=[""])
    return pacsv.open_csv(path, parse_options=parse_options, convert_options=as_text)


def _find_column(source: str, columns: dict[str, str], candidates: tuple[str, ...], description: str) -> str:
    for name in candidates:
        if name in columns:
            return columns[name]
    raise DataError(
        f"{source}: has no column for {description}: its columns are {', '.join(columns.values())}; name one {' or '.join(candidates)}"
    )


def _make_entry(base: Path | None, path: Any, raw_label: Any) -> SourceEntry:
    image_uri, class_label = str(path or ""), None if raw_label is None else str(raw_label)
    if base is not None and "://" not in image_uri:
        # A missing file is listed too, so that reading it rejects it with its reason.
        with suppress(OSError, ValueError):
            status = (base / image_uri).stat()
            return SourceEntry(
                image_uri, class_label, status.st_size if stat.S_ISREG(status.st_mode) else 0, str(status.st_mtime_ns)
            )
    return SourceEntry(image_uri, class_label, 0)


# Tars in the WebDataset layout


def _find_shards(folder: Path) -> list[str]:
    """The tars of a folder that holds tars and no images; otherwise none."""
    names = [entry.name for entry in os.scandir(folder) if not entry.name.startswith(HIDDEN)]
    others = any((folder / name).is_dir() or PurePosixPath(name).suffix[1:].lower() in IMAGE_EXTENSIONS for name in names)
    return [] if others else [str(folder / name) for name in sorted(names) if name.endswith(".tar")]


def _expand_braces(source: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", source)
    if match is None:
        return [source]
    first, last = match.groups()
    numbers = range(int(first), int(last) + 1)
    return [
        uri for n in numbers for uri in _expand_braces(f"{source[: match.start()]}{n:0{len(first)}d}{source[match.end() :]}")
    ]


def _list_tars(uris: Iterable[str], role: DatasetRole) -> Iterator[SourceEntry]:
    """The images of tar shards, with the class indices beside them."""
    for uri in uris:
        store, name = open_parent(uri)
        path = store.path(name)
        container = str(path) if _is_local(uri) else uri
        yield from _pair_images(path, container, f"{PurePosixPath(name).stem}/", _read_stamp(store, name), role)


def _read_stamp(store: Store, name: str) -> str:
    return next((blob.stamp for blob in store.entries(name) if blob.key == name), "")


def _pair_images(path: Path, container: str, prefix: str, stamp: str, role: DatasetRole) -> Iterator[SourceEntry]:
    """Pairs images and class indices. WebDataset keeps the files of a key side by side, so one key is held at a time."""
    key = ""
    image: SourceEntry | None = None
    class_id: int | None = None
    for name, offset, size in iterate_members(path):
        member_key, extension = split_key(name)
        if not member_key or member_key.endswith("/"):
            continue
        if member_key != key:
            if image is not None:
                yield image._replace(class_label=class_id)
            key, image, class_id = member_key, None, None
        if extension == CLASS_EXTENSION and role != "unlabeled":
            class_id = read_class_id(path, name, offset, size)
        elif extension in IMAGE_EXTENSIONS and image is None:
            image = SourceEntry(prefix + name, None, size, f"{stamp}:{offset}", container, offset)
    if image is not None:
        yield image._replace(class_label=class_id)


# Archives


def _list_archive(source: str, role: DatasetRole, scratch_dir: Path) -> Iterator[SourceEntry]:
    store, name = open_parent(source)
    tar = _unpack_tar(source, store.path(name), scratch_dir / UNPACKED_TAR)
    if role != "unlabeled" and any(split_key(path)[1] == CLASS_EXTENSION for path, _, _ in iterate_members(tar)):
        yield from _pair_images(tar, str(tar), "", _read_stamp(store, name), role)
        return
    # The first of two passes finds the folders that all files share, which name no class.
    common: str | None = None
    deepest = 0
    for path, _, _ in _list_files(tar):
        folder = PurePosixPath(path).parent
        deepest = max(deepest, len(folder.parts))
        common = str(folder) if common is None else os.path.commonpath([common, str(folder)])
    depth = len(PurePosixPath(common or "").parts)
    if role != "unlabeled" and depth == deepest:
        # All files lie in one folder, which must then be a class.
        depth = max(0, depth - 1)
    stamp = _read_stamp(store, name)
    for path, offset, size in _list_files(tar):
        inner_path = "/".join(PurePosixPath(path).parts[depth:])
        yield SourceEntry(
            inner_path, _extract_class_name(source, inner_path, role), size, f"{stamp}:{offset}", str(tar), offset
        )


def _blame_source(source: str, scratch_dir: Path, source_entries: Iterator[SourceEntry]) -> Iterator[SourceEntry]:
    """Names the source instead of the scratch file in errors."""
    try:
        yield from source_entries
    except DataError as error:
        raise DataError(str(error).replace(str(scratch_dir / UNPACKED_TAR), source)) from error


def _list_files(tar: Path) -> Iterator[tuple[str, int, int]]:
    """Path, offset and size of all files that are not hidden. A tar in the tar counts as a folder of its name."""
    for name, offset, size in iterate_members(tar):
        if any(part.startswith(HIDDEN) for part in PurePosixPath(name).parts):
            continue
        if name.endswith(".tar"):
            for inner, at, length in iterate_members(tar, offset, size):
                yield f"{name.removesuffix('.tar')}/{inner}", at, length
        else:
            yield name, offset, size


def _unpack_tar(source: str, packed: Path, target: Path) -> Path:
    """The archive as an uncompressed tar: the archive itself, or one written to `target`."""
    suffix = _detect_suffix(source)
    if suffix == ".tar" and _is_local(source):
        return packed
    try:
        with target.open("wb") as sink:
            if suffix == ".zip":
                _repack_zip(packed, sink)
            else:
                with COMPRESSED[suffix](packed, "rb") as unpacking:
                    shutil.copyfileobj(unpacking, sink, CHUNK_BYTES)
    except (EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, NotImplementedError) as error:
        raise DataError(f"{source}: not a whole archive: {error}") from error
    except OSError as error:
        if error.errno is None:
            # gzip and bz2 raise OSError without an errno for damage.
            raise DataError(f"{source}: not a whole archive: {error}") from error
        raise make_scratch_error(target.parent, f"unpack {source}", error) from error
    return target


def _repack_zip(packed: Path, sink: IO[bytes]) -> None:
    with zipfile.ZipFile(packed) as archive, tarfile.open(fileobj=sink, mode="w:", format=tarfile.PAX_FORMAT) as tar:
        for info in archive.infolist():
            if info.is_dir():
                continue
            if stat.S_ISLNK(info.external_attr >> 16):
                raise DataError(f"{packed}: {info.filename}: a link; only plain files belong in an archive")
            if info.flag_bits & 1:
                raise DataError(f"{packed}: {info.filename}: is encrypted; unpack the archive first")
            member = tarfile.TarInfo(info.filename)
            # Larger files are left out by their size, so they need not be unpacked whole.
            member.size = min(info.file_size, MAX_FILE_BYTES + 1)
            with archive.open(info) as content:
                tar.addfile(member, content)
