"""Deletes versions, and data in the remote that no version needs.

Not by `dvc gc`: its multi-object delete is refused by S3 servers that want a Content-MD5 (Swift's), and with --force, which it
needs without a terminal, a list of files that it cannot read makes all files in it garbage.
"""

import time
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ns.core.errors import DataError, RunError
from ns.labeling.registry.git import CURRENT_PREFIX, RegistryClone
from ns.labeling.registry.model import LabelVersion, VersionTag
from ns.labeling.registry.registry import LabelRegistry
from ns.labeling.registry.storage import LABELS_DIR, find_missing_keys, iterate_objects, version_object_keys
from ns.storage import open_store

SPARED_SECONDS = 24 * 3600
"""Who pushed data so lately may still be about to tag it."""


class RegistryGarbage(NamedTuple):
    """What no version needs."""

    dropped: tuple[VersionTag, ...]
    keys: tuple[str, ...]
    """Keys in the remote."""
    bytes: int


def collect_garbage(registry: LabelRegistry, drop: Iterable[VersionTag] = (), *, dry_run: bool = True) -> RegistryGarbage:
    """Deletes the versions in `drop`, and data that no tag needs. With `dry_run` only says what that would be.

    Only for a remote that holds nothing else. Data that is pushed, but not yet tagged, looks like garbage: what is younger than a day
    is spared, unless a dropped version has it. Raises RunError for a version that is in use or does not exist, DataError if data of a
    version that stays is missing, or if a ref holds data that `ns labels commit` did not put there.
    """
    dropped = tuple(VersionTag.from_parts(*tag) for tag in drop)
    dropped_refs = {tag.ref for tag in dropped}
    with registry.open_clone("refs/tags/*", f"{CURRENT_PREFIX}*") as clone:
        in_use = clone.find_current_tags()
        for tag in dropped:
            registry.require_ref(clone, str(tag), tag.ref)
            if tag in in_use:
                raise RunError(f"{tag}: is in use (current/{tag.project}); promote another version before dropping it")
        entries = list(iterate_objects(clone.remote))
        objects = {entry.key: entry.size for entry in entries}
        unused_keys = objects.keys() - _find_used_keys(clone, clone.refs.keys() - dropped_refs, objects)
        dropped_keys = {key for ref in dropped_refs for key in version_object_keys(clone.read_version(ref))}
        spared_from = time.time() - SPARED_SECONDS
        young_keys = {entry.key for entry in entries if entry.modified_at > spared_from}
        keys = sorted(unused_keys - (young_keys - dropped_keys))
        if not dry_run:
            for ref in dropped_refs:
                # First the name, then the data.
                lease = f"--force-with-lease={ref}:{clone.refs[ref]}"
                clone.commands.run_git("push", "--quiet", lease, "origin", f":{ref}")
            new_refs = registry.list_refs(clone.commands).keys() - clone.refs.keys()
            if any(ref.startswith("refs/tags/") for ref in new_refs):
                raise RunError(
                    f"{registry.redacted_uri}: a version was committed concurrently; no data was deleted; run it again"
                )
            store = open_store(clone.remote)
            for key in keys:
                store.delete(key)
    if not dry_run:
        with registry.open_clone("refs/tags/labels/*") as clone:
            for ref in clone.refs:
                version = _read_kept_version(clone, ref)
                if version and find_missing_keys(clone.remote, version):
                    name = ref.removeprefix("refs/tags/")
                    raise DataError(f"{name}: was committed concurrently and lost data; commit it again")
    return RegistryGarbage(dropped, tuple(keys), sum(objects[key] for key in keys))


def _find_used_keys(clone: RegistryClone, refs: Iterable[str], objects: Mapping[str, int]) -> set[str]:
    """Keys in the remote that some ref needs."""
    used_keys: set[str] = set()
    for ref in sorted(refs):
        version = _read_kept_version(clone, ref)
        if version is None:
            continue
        keys = version_object_keys(version)
        if missing := sorted(keys - objects.keys()):
            raise DataError(
                f"{ref.removeprefix('refs/')}: {clone.remote}/{missing[0]} and {len(missing) - 1} more files are missing; "
                "nothing was deleted; commit this label set again, or drop it"
            )
        used_keys |= keys
    return used_keys


def _read_kept_version(clone: RegistryClone, ref: str) -> LabelVersion | None:
    """The version that a ref holds; None if it holds no data, as `main`."""
    files = clone.list_files(ref)
    data_files = [name for name in files if name.endswith(".dvc")]
    if not data_files:
        return None
    if data_files != [f"{LABELS_DIR}.dvc"] or LabelVersion.filename not in files:
        raise DataError(
            f"{ref.removeprefix('refs/')}: keeps data that `ns labels commit` did not put there ({data_files[0]}); nothing was "
            "deleted; delete this tag or branch, or keep its data in another remote"
        )
    return clone.read_version(ref)
