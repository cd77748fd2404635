"""Where the bytes of versions lie: in the clone, in DVC's remote, and in a folder that they are brought into.

DVC keeps the file with md5 `abcdef…` in the remote at `files/md5/ab/cdef…`. It writes and fetches them; this module knows the
layout only to tell whether data is there, and which of it no version needs.
"""

import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from ns.core.digest import sha256_file
from ns.core.errors import DataError
from ns.labeling.label_set import HISTOGRAM, LabelSet, LabelShard, label_shard_key
from ns.labeling.registry.model import LabelVersion, VersionFile
from ns.labeling.selection import Selection
from ns.storage import LocalStore, Store, open_store
from ns.storage.base import BlobEntry
from ns.storage.scratch import explain_scratch_errors

LABELS_DIR = "labels"
"""The folder of a label set in the clone; DVC keeps its hash in `labels.dvc`."""
OBJECTS_PREFIX = "files/md5/"
UNFINISHED_DIR = ".tmp-get"
"""In a destination: what is being downloaded. While it is there, the folder may be filled further."""


def object_key(md5: str) -> str:
    """Key of a file below the remote."""
    return f"{OBJECTS_PREFIX}{md5[:2]}/{md5[2:]}"


def version_object_keys(version: LabelVersion) -> set[str]:
    """Keys of all that a version needs: its files, and DVC's list of them."""
    return {object_key(version.directory), *(object_key(file.md5) for file in version.files)}


def list_objects(remote: str) -> dict[str, int]:
    """Key and bytes of all that DVC keeps in the remote."""
    return {entry.key: entry.size for entry in iterate_objects(remote)}


def iterate_objects(remote: str) -> Iterator[BlobEntry]:
    """Yields all that DVC keeps in the remote."""
    for entry in open_store(remote).entries(OBJECTS_PREFIX):
        if re.fullmatch(r"[0-9a-f]{2}/[0-9a-f]{30}(\.dir)?", entry.key[len(OBJECTS_PREFIX) :]):
            yield entry


def find_damaged_keys(version: LabelVersion, objects: Mapping[str, int]) -> list[str]:
    """Keys of a version's files that are missing among the objects, or have another length."""
    return [object_key(file.md5) for file in version.files if objects.get(object_key(file.md5)) != file.bytes]


def find_missing_keys(remote: str, version: LabelVersion) -> list[str]:
    """Keys of a version's data that the remote does not have, or has in another length."""
    objects = list_objects(remote)
    return find_damaged_keys(version, objects) + sorted({object_key(version.directory)} - objects.keys())


def read_directory_hash(clone_path: Path) -> str:
    """The hash that DVC gave the folder of labels."""
    content = yaml.safe_load((clone_path / f"{LABELS_DIR}.dvc").read_bytes())
    return str(content["outs"][0]["md5"])


def gather_files(label_store: Store, label_set: LabelSet, selection: Selection | None, target: Path) -> tuple[VersionFile, ...]:
    """Copies a label set's files. Raises DataError if one is not what the manifest says."""
    with explain_scratch_errors(target, "write"):
        target.mkdir()
        target_store = LocalStore(target)
        for shard in label_set.shards:
            _copy_file(label_store, shard.name, target)
            record_key = label_shard_key(shard.name)
            if label_store.exists(record_key):
                if LabelShard.load_file(label_store, record_key) != shard:
                    raise DataError(
                        f"{label_store.uri}/{record_key}: not what {LabelSet.filename} says of {shard.name}; label the pool again"
                    )
                _copy_file(label_store, record_key, target)
        _copy_file(label_store, HISTOGRAM, target)
        label_set.save(target_store)
        if selection:
            selection.save(target_store)
        files = tuple(_hash_file(target / key) for key in sorted(target_store.list()))
    hashes = {file.name: file.sha256 for file in files}
    for shard in label_set.shards:
        if hashes[shard.name] != shard.sha256:
            raise DataError(f"{label_store.uri}/{shard.name}: sha256 differs from {LabelSet.filename}; label the pool again")
    return files


def _copy_file(label_store: Store, key: str, target: Path) -> None:
    with label_store.open(key) as source, (target / key).open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)


def _hash_file(path: Path) -> VersionFile:
    with path.open("rb") as file:
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    return VersionFile(name=path.name, bytes=path.stat().st_size, sha256=sha256_file(path), md5=md5)


def is_intact(path: Path, file: VersionFile) -> bool:
    return path.is_file() and path.stat().st_size == file.bytes and sha256_file(path) == file.sha256


def check_destination(destination: Path, version: LabelVersion) -> None:
    """Raises DataError unless the folder is empty, being filled, or holds this label set."""
    if not destination.exists():
        return
    if not destination.is_dir():
        raise DataError(f"{destination}: is a file; name a folder")
    if (destination / LabelSet.filename).exists():
        present = LabelSet.load(LocalStore(destination)).digest
        if present != version.label_set:
            raise DataError(
                f"{destination}: holds label set {present[:16]}, not {version.label_set[:16]}; name an empty folder"
            )
    elif any(destination.iterdir()) and not (destination / UNFINISHED_DIR).exists():
        raise DataError(f"{destination}: is not empty; name an empty folder, or a new one")
