"""Where images come from: folders, tables, tars and archives, on disk or on S3, each as a stream of entries.

Nothing is unpacked under the names that an archive gives: its bytes go into one scratch file, and entries point into it.
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
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.dataset as pads

from ns.core.errors import DataError, StoreError
from ns.data.dataset import Role
from ns.data.importing.listing import EXTENSIONS, Entry
from ns.data.shards import LABEL, LABEL_BYTES, class_index, members, read_range, split_key
from ns.storage import Store, open_store, split_uri

HIDDEN = (".", "__MACOSX", "Thumbs.db", "desktop.ini")
MAX_FILE_BYTES = 1 << 30
"""A larger file among images is a film or an archive: too much to read to find out."""
TABLES = (".csv", ".tsv", ".parquet")
COMPRESSED: dict[str, Callable[..., Any]] = {
    ".tar": open, ".tar.gz": gzip.open, ".tgz": gzip.open, ".tar.bz2": bz2.open, ".tar.xz": lzma.open
}  # fmt: skip
UNPACKED = "unpacked.tar"
ARCHIVES = (*COMPRESSED, ".zip")
PATHS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path")
LABELS = ("label", "class", "class_name", "category", "target")
SPLITS = ("split", "subset", "set", "partition")
CHUNK_BYTES = 1 << 20
BATCH_ROWS = 10_000
"""Of a table, in memory at a time."""


def entries(source: str, role: Role, *, split: str | None, scratch: Path) -> Iterator[Entry]:
    """What `source` holds, in no order. `scratch` is an empty folder for what must be unpacked.

    A source is a folder or `s3://` prefix (of class folders; of images at any depth, for a pool; or of tar shards), a CSV, TSV
    or Parquet table with columns path, label and perhaps split, one tar shard or several (`shard-{000..127}.tar`), or an
    archive of class folders (tar, zip; also compressed, and with a tar for each class inside). Raises DataError for a source
    that is not there or cannot be meant.
    """
    if re.search(r"\{\d+\.\.\d+\}", source):
        return _tars(_expand(source), role)
    kind = _suffix(source)
    if split is not None and kind not in TABLES:
        raise DataError(f"--split {split}: {source} is no table; only tables have splits")
    if kind in TABLES:
        return _table(source, role, split)
    if kind in ARCHIVES:
        return _blaming(source, scratch, _archive(source, role, scratch))
    if not _is_local(source):
        return _remote_folder(open_store(source), role)
    folder = local_path(source)
    if not folder.is_dir():
        problem = "is a file of another kind" if folder.exists() else "no such folder"
        raise DataError(
            f"{source}: {problem}; name a folder of images, a table (.csv, .tsv, .parquet) or an archive (.tar, .zip, …)"
        )
    if tars := _shards_in(folder):
        return _tars(tars, role)
    return _folder(folder, role)


def local_path(source: str) -> Path:
    """The path that a `file://` URI or a path means."""
    path = Path(unquote(urlsplit(source).path) if source.startswith("file://") else source).expanduser()
    return path.absolute()


def walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Each folder at and below `root` with the sorted names of its folders and files, hidden ones left out.

    Links to folders are followed, as data sets are often linked into place, but not back into a folder that leads here.
    """
    for place, folders, names in os.walk(root, onerror=_unreadable, followlinks=True):
        parent = Path(place)
        leading = {folder.resolve() for folder in (parent, *parent.parents) if folder.is_relative_to(root)}
        folders[:] = sorted(
            name for name in folders if not name.startswith(HIDDEN) and (parent / name).resolve() not in leading
        )
        yield parent, list(folders), sorted(name for name in names if not name.startswith(HIDDEN))


def spelled(path: str) -> str:
    """Names that are no UTF-8 get escapes for their bytes instead of lone surrogates, which no file could hold."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


class Reader:
    """Reads the bytes of entries, from any number of threads where they come from a server."""

    def __init__(self, source: str) -> None:
        if "{" in source or _suffix(source) in (*TABLES, *ARCHIVES):
            source = split_uri(source)[0]
        self.is_remote = not _is_local(source)
        self._source = open_store(source) if self.is_remote else local_path(source)
        self._open: tuple[str, IO[bytes]] | None = None

    def read(self, entry: Entry) -> bytes:
        """Raises DataError with the reason for a file that cannot be taken, StoreError when the source is out of reach."""
        if entry.size > MAX_FILE_BYTES:
            raise DataError("larger than 1 GiB")
        if entry.container:
            return self._from_container(entry)
        if "://" in entry.path:
            folder, name = split_uri(entry.path)
            return _read_remote(open_store(folder), name)
        if isinstance(self._source, Path):
            return _read_file(self._source / entry.path)
        return _read_remote(self._source, entry.path)

    def close(self) -> None:
        if self._open:
            self._open[1].close()
            self._open = None

    def _from_container(self, entry: Entry) -> bytes:
        if not _is_local(entry.container):
            folder, name = split_uri(entry.container)
            return open_store(folder).get_range(name, entry.offset, entry.size)
        if self._open is None or self._open[0] != entry.container:
            self.close()
            try:
                self._open = entry.container, Path(entry.container).open("rb")  # noqa: SIM115
            except OSError as error:
                raise StoreError(f"{entry.container}: cannot be read: {error.strerror or error}") from error
        return read_range(self._open[1], entry.offset, entry.size)


def _read_remote(store: Store, path: str) -> bytes:
    try:
        return store.get(path)
    except StoreError as error:
        if not store.exists(path):
            raise DataError("no such file") from error
        raise


def _read_file(path: Path) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            # Opening a pipe would wait for a writer for good.
            raise DataError("not a plain file")
        if status.st_size > MAX_FILE_BYTES:
            raise DataError("larger than 1 GiB")
        return path.read_bytes()
    except OSError as error:
        raise DataError((error.strerror or str(error)).lower()) from error


def _is_local(place: str) -> bool:
    return "://" not in place or place.startswith("file://")


def _suffix(source: str) -> str:
    name = source.lower()
    known = next((suffix for suffix in (*TABLES, *ARCHIVES) if name.endswith(suffix)), "")
    # A folder may be called anything.
    return "" if known and _is_local(source) and local_path(source).is_dir() else known


def _unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error


# Folders


def _folder(root: Path, role: Role) -> Iterator[Entry]:
    for parent, folders, names in walk(root):
        inner = parent.relative_to(root)
        if role != "unlabelled" and parent == root:
            _check_class_folders(root, folders)
        for name in names:
            path = str(inner / name)
            # A dangling link has no status of its own; reading it will say so.
            status = (parent / name).stat() if (parent / name).exists() else (parent / name).lstat()
            size = status.st_size if stat.S_ISREG(status.st_mode) else 0
            yield Entry(path, _class_of(str(root), path, role), size, str(status.st_mtime_ns))


def _check_class_folders(root: Path, folders: list[str]) -> None:
    for folder in folders:
        if spelled(folder) != folder:
            raise DataError(f"{root}: class folder '{spelled(folder)}': its name is not UTF-8; rename it")
        if not any(names for _, _, names in walk(root / folder)):
            raise DataError(f"{root}: class folder {folder!r} has no images; add some, or remove the folder")


def _remote_folder(store: Store, role: Role) -> Iterator[Entry]:
    for found in store.entries():
        if any(part.startswith(HIDDEN) for part in found.key.split("/")):
            continue
        if found.key.endswith(".tar"):
            yield from _tar(f"{store.uri}/{found.key}", role)
        else:
            yield Entry(found.key, _class_of(store.uri, found.key, role), found.size, found.stamp)


def _class_of(place: str, path: str, role: Role) -> str | None:
    if role == "unlabelled":
        return None
    label, slash, _ = path.partition("/")
    if not slash:
        raise DataError(
            f"{place}: {spelled(path)} lies outside any class folder; labelled images belong into one subfolder for each class"
        )
    return label


# Tables


def _table(source: str, role: Role, split: str | None) -> Iterator[Entry]:
    folder, name = split_uri(source)
    file = open_store(folder).path(name)
    base = local_path(folder) if _is_local(source) else None
    try:
        batches = _batches(file)
        columns = {column.lower(): column for column in batches.schema.names}
        path_column = _column(source, columns, PATHS, "the path of each image")
        label_column = None if role == "unlabelled" else _column(source, columns, LABELS, "its class")
        split_column = next((columns[known] for known in SPLITS if known in columns), None)
        if split is not None and split_column is None:
            raise DataError(f"--split {split}: {source} has no column named one of {', '.join(SPLITS)}")
        seen: set[str] = set()
        for batch in batches:
            table = batch.to_pydict()
            count = batch.num_rows
            splits = table[split_column] if split_column else [None] * count
            labels = table[label_column] if label_column else [None] * count
            seen.update(str(value) for value in splits if value is not None)
            if split is None and len(seen) > 1:
                raise DataError(f"{source}: has the splits {', '.join(sorted(seen))}; name one with --split")
            for path, label, of in zip(table[path_column], labels, splits, strict=True):
                if split is None or str(of) == split:
                    yield _row(base, path, label)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        # Arrow has errors of its own for some damage, the system's for other, and Python's for text that is no UTF-8.
        raise DataError(f"{source}: not a table that can be read: {(str(error) or 'damaged').splitlines()[0]}") from error


def _batches(file: Path) -> Any:
    if file.suffix.lower() == ".parquet":
        return (
            pads.dataset(file, format="parquet")
            .scanner(batch_size=BATCH_ROWS, batch_readahead=1, fragment_readahead=1)
            .to_reader()
        )
    separator = "\t" if file.suffix.lower() == ".tsv" else ","
    names = pacsv.open_csv(file, parse_options=pacsv.ParseOptions(delimiter=separator)).schema.names
    # All as text: a class called 007 is not the class 7.
    as_text = pacsv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=[""])
    return pacsv.open_csv(file, parse_options=pacsv.ParseOptions(delimiter=separator), convert_options=as_text)


def _column(source: str, columns: dict[str, str], known: tuple[str, ...], what: str) -> str:
    for name in known:
        if name in columns:
            return columns[name]
    raise DataError(
        f"{source}: has no column for {what}: its columns are {', '.join(columns.values())}; name one {' or '.join(known)}"
    )


def _row(base: Path | None, path: Any, label: Any) -> Entry:
    place, text = str(path or ""), None if label is None else str(label)
    if base is not None and "://" not in place:
        # What is not there is listed, read, and rejected with its reason as any other.
        with suppress(OSError, ValueError):
            status = (base / place).stat()
            return Entry(place, text, status.st_size if stat.S_ISREG(status.st_mode) else 0, str(status.st_mtime_ns))
    return Entry(place, text, 0)


# Tars in the WebDataset layout


def _shards_in(folder: Path) -> list[str]:
    """The tars of a folder that holds tars and no images."""
    names = [entry.name for entry in os.scandir(folder) if not entry.name.startswith(HIDDEN)]
    others = any((folder / name).is_dir() or PurePosixPath(name).suffix[1:].lower() in EXTENSIONS for name in names)
    return [] if others else [str(folder / name) for name in sorted(names) if name.endswith(".tar")]


def _expand(source: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", source)
    if match is None:
        return [source]
    first, last = match.groups()
    numbers = range(int(first), int(last) + 1)
    return [place for n in numbers for place in _expand(f"{source[: match.start()]}{n:0{len(first)}d}{source[match.end() :]}")]


def _tars(places: Iterable[str], role: Role) -> Iterator[Entry]:
    for place in places:
        yield from _tar(place, role)


def _tar(place: str, role: Role) -> Iterator[Entry]:
    """The images of one tar shard, with the labels beside them."""
    folder, name = split_uri(place)
    store = open_store(folder)
    path = store.path(name)
    container = str(path) if _is_local(place) else place
    yield from _paired(path, container, f"{PurePosixPath(name).stem}/", _stamp(store, name), role)


def _stamp(store: Store, name: str) -> str:
    return next((found.stamp for found in store.entries(name) if found.key == name), "")


def _paired(path: Path, container: str, prefix: str, stamp: str, role: Role) -> Iterator[Entry]:
    """WebDataset keeps the files of a key side by side, so no more than one key is held."""
    key = ""
    image: Entry | None = None
    label: int | None = None
    for name, offset, size in members(path):
        own, extension = split_key(name)
        if not own or own.endswith("/"):
            continue
        if own != key:
            if image is not None:
                yield image._replace(label=label)
            key, image, label = own, None, None
        if extension == LABEL and role != "unlabelled":
            label = _class_index(path, name, offset, size)
        elif extension in EXTENSIONS and image is None:
            image = Entry(prefix + name, None, size, f"{stamp}:{offset}", container, offset)
    if image is not None:
        yield image._replace(label=label)


def _class_index(path: Path, name: str, offset: int, size: int) -> int:
    with path.open("rb") as file:
        return class_index(f"{path}: {name}", read_range(file, offset, min(size, LABEL_BYTES + 1)))


# Archives


def _archive(source: str, role: Role, scratch: Path) -> Iterator[Entry]:
    folder, name = split_uri(source)
    store = open_store(folder)
    tar = _plain_tar(source, store.path(name), scratch / UNPACKED)
    if role != "unlabelled" and _has_labels(tar):
        yield from _paired(tar, str(tar), "", _stamp(store, name), role)
        return
    # Twice through the names: first for the folders that all are in, which say nothing.
    common: tuple[str, ...] | None = None
    deepest = 0
    for path, _, _ in _files_in(tar):
        folders = PurePosixPath(path).parts[:-1]
        deepest = max(deepest, len(folders))
        common = folders if common is None else tuple(_same(common, folders))
    depth = len(common or ())
    if role != "unlabelled" and depth == deepest:
        # All lie in one folder, which must then be a class.
        depth = max(0, depth - 1)
    stamp = _stamp(store, name)
    for path, offset, size in _files_in(tar):
        inside = "/".join(PurePosixPath(path).parts[depth:])
        yield Entry(inside, _class_of(source, inside, role), size, f"{stamp}:{offset}", str(tar), offset)


def _blaming(source: str, scratch: Path, entries: Iterator[Entry]) -> Iterator[Entry]:
    """What is wrong with the scratch file is wrong with the source."""
    try:
        yield from entries
    except DataError as error:
        raise DataError(str(error).replace(str(scratch / UNPACKED), source)) from error


def _files_in(tar: Path) -> Iterator[tuple[str, int, int]]:
    """Path, offset and size of all files but hidden ones; those of a tar in the tar lie in a folder of its name."""
    for name, offset, size in members(tar):
        if any(part.startswith(HIDDEN) for part in PurePosixPath(name).parts):
            continue
        if name.endswith(".tar"):
            for inner, at, length in members(tar, offset, size):
                yield f"{name.removesuffix('.tar')}/{inner}", at, length
        else:
            yield name, offset, size


def _same(first: tuple[str, ...], second: tuple[str, ...]) -> Iterator[str]:
    return (a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _has_labels(path: Path) -> bool:
    return any(split_key(name)[1] == LABEL for name, _, _ in members(path))


def _plain_tar(source: str, packed: Path, target: Path) -> Path:
    """The archive as a tar that is not compressed: itself, or written to `target`."""
    suffix = _suffix(source)
    if suffix == ".tar" and _is_local(source):
        return packed
    try:
        with target.open("wb") as sink:
            if suffix == ".zip":
                _from_zip(packed, sink)
            else:
                with COMPRESSED[suffix](packed, "rb") as unpacking:
                    shutil.copyfileobj(unpacking, sink, CHUNK_BYTES)
    except (EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, NotImplementedError) as error:
        raise DataError(f"{source}: not a whole archive: {error}") from error
    except OSError as error:
        if error.errno is None:
            # What gzip and bz2 say of damage.
            raise DataError(f"{source}: not a whole archive: {error}") from error
        raise StoreError(
            f"{target.parent}: cannot unpack {source}: {error.strerror}; free some space there, or set TMPDIR to another folder"
        ) from error
    return target


def _from_zip(packed: Path, sink: IO[bytes]) -> None:
    with zipfile.ZipFile(packed) as archive, tarfile.open(fileobj=sink, mode="w:", format=tarfile.PAX_FORMAT) as tar:
        for info in archive.infolist():
            if info.is_dir():
                continue
            if stat.S_ISLNK(info.external_attr >> 16):
                raise DataError(f"{packed}: {info.filename}: a link; only plain files belong in an archive")
            if info.flag_bits & 1:
                raise DataError(f"{packed}: {info.filename}: is encrypted; unpack the archive first")
            member = tarfile.TarInfo(info.filename)
            # Not worth unpacking: it is left out by its size.
            member.size = min(info.file_size, MAX_FILE_BYTES + 1)
            with archive.open(info) as content:
                tar.addfile(member, content)
