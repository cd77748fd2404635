"""Commit, list, fetch and promote versions of label sets."""

import shutil
from datetime import datetime
from pathlib import Path

from filelock import FileLock

from ns.core.errors import DataError, RunError, StoreError
from ns.labeling.label_set import LabelSet
from ns.labeling.registry.git import CURRENT_PREFIX, MAIN_REF, RegistryClone, RegistryRepository
from ns.labeling.registry.model import LabelVersion, VersionSummary, VersionTag, is_version_ref, resolve_version_ref
from ns.labeling.registry.storage import (
    LABELS_DIR,
    UNFINISHED_DIR,
    check_destination,
    find_damaged_keys,
    find_missing_keys,
    gather_files,
    is_intact,
    list_objects,
    object_key,
    read_directory_hash,
)
from ns.labeling.selection import Selection
from ns.storage import LocalStore, Store, open_store
from ns.storage.documents import JsonDocument
from ns.storage.local import os_errors_as_store_errors


class LabelRegistry(RegistryRepository):
    """The versions in a label registry."""

    def commit_version(
        self,
        tag: VersionTag,
        label_store: Store,
        label_set: LabelSet,
        selection: Selection | None = None,
        verdict: JsonDocument | None = None,
    ) -> bool:
        """Keeps the label set in `label_store` as version `tag`. Returns whether the tag is new.

        If the tag exists with the same label set, nothing changes, but data of it that the remote has lost is pushed again.
        Raises RunError if the tag holds another one, DataError if the files are not those of the manifest.
        """
        VersionTag.from_parts(*tag)
        with self.open_clone(tag.ref) as clone:
            existing = self._find_existing(clone, tag, label_set, selection)
            if existing and not find_missing_keys(clone.remote, existing):
                return False
            commands = clone.commands
            commands.run_git("checkout", "--quiet", "--detach", clone.refs[MAIN_REF])
            files = gather_files(label_store, label_set, selection, clone.path / LABELS_DIR)
            commands.run_dvc("add", LABELS_DIR)
            version = LabelVersion.build(tag, label_set, selection, files, read_directory_hash(clone.path))
            _push_data(clone, version)
            if existing:
                if find_missing_keys(clone.remote, existing):
                    raise RunError(
                        f"{tag}: some of its data is lost, and what is given is not all of it; give its selection too"
                    )
                return False
            clone_store = LocalStore(clone.path)
            for document in (version, label_set, selection, verdict):
                if document is not None:
                    document.save(clone_store)
            commands.run_git("add", "--all")
            commands.run_git("commit", "--quiet", f"--message={tag}")
            commands.run_git("tag", "--annotate", f"--message=Label set of {tag.run}, generation {tag.generation}", str(tag))
            try:
                commands.run_git("push", "--quiet", "origin", tag.ref)
            except StoreError:
                # Another process may have been faster with the same label set.
                if tag.ref not in self.list_refs(commands):
                    raise
                with self.open_clone(tag.ref) as newer_clone:
                    self._find_existing(newer_clone, tag, label_set, selection)
                return False
            if find_missing_keys(clone.remote, version):
                # `ns labels gc` took the data for garbage before the tag was there; now it sees the tag.
                _push_data(clone, version)
            return True

    def list_versions(self) -> list[VersionSummary]:
        """All versions, by project, the latest last."""
        with self.open_clone("refs/tags/labels/*", f"{CURRENT_PREFIX}*") as clone:
            current = clone.find_current_tags()
            lines = clone.commands.run_git("for-each-ref", "--format=%(refname) %(creatordate:iso-strict)", "refs/tags/labels")
            # Tags that commit_version did not make are people's own.
            dates = {ref: date for ref, _, date in (line.partition(" ") for line in lines.splitlines()) if is_version_ref(ref)}
            versions = [(version, dates[ref]) for ref, version in clone.iterate_versions(dates)]
        # By times and not by text, since committers live in different time zones.
        versions.sort(key=lambda pair: (pair[0].project, datetime.fromisoformat(pair[1]), pair[0].tag))
        return [VersionSummary(version, date, version.tag in current) for version, date in versions]

    def find_version(self, name: str) -> LabelVersion:
        """The version of a tag, or the one in use (`current/PROJECT`). Raises RunError if there is none."""
        ref = resolve_version_ref(name)
        with self.open_clone(ref) as clone:
            self.require_ref(clone, name, ref)
            return clone.read_version(ref)

    def download_version(self, name: str, destination: Path) -> LabelVersion:
        """Brings a version (a tag, or `current/PROJECT`) into a folder, and checks every file. Intact files there stay.

        Raises DataError if the folder holds something else, or a file is not what was committed.
        """
        ref = resolve_version_ref(name)
        with self.open_clone(ref) as clone:
            self.require_ref(clone, name, ref)
            version = clone.read_version(ref)
            check_destination(destination, version)
            unfinished = destination / UNFINISHED_DIR
            with os_errors_as_store_errors(destination, "write"):
                unfinished.mkdir(parents=True, exist_ok=True)
                with FileLock(unfinished / "lock"):
                    _download_files(clone, ref, version, destination)
                    shutil.rmtree(unfinished, ignore_errors=True)
        return version

    def set_current(self, tag: VersionTag, reason: str, *, is_rollback: bool = False) -> VersionTag | None:
        """Makes a version the one in use of its project: moves the branch `current/PROJECT`.

        Returns the tag in use before, None if there was none.

        Raises RunError if there is no such version, if another process moved the branch at the same time, or if a rollback
        finds no version in use.
        """
        VersionTag.from_parts(*tag)
        branch = f"{CURRENT_PREFIX}{tag.project}"
        with self.open_clone(tag.ref, branch) as clone:
            self.require_ref(clone, str(tag), tag.ref)
            clone.read_version(tag.ref)
            commands = clone.commands
            old = clone.refs.get(branch)
            if is_rollback and old is None:
                raise RunError(f"current/{tag.project}: no version is in use yet; choose one with `ns labels promote {tag}`")
            previous = clone.read_version(branch).tag if old else None
            if previous == tag:
                return previous
            message = f"{'Go back to' if is_rollback else 'Use'} {tag}\n\n{' '.join(reason.split())}\n"
            parent = old or f"{tag.ref}^{{commit}}"
            commit = commands.run_git("commit-tree", f"{tag.ref}^{{tree}}", "-p", parent, data=message).strip()
            lease = f"--force-with-lease={branch}:{old or ''}"
            try:
                commands.run_git("push", "--quiet", lease, "origin", f"{commit}:{branch}")
            except StoreError as error:
                if self.list_refs(commands).get(branch) == old:
                    raise
                raise RunError(f"current/{tag.project}: was moved concurrently; check `ns labels list` and retry") from error
            return previous

    def _find_existing(
        self, clone: RegistryClone, tag: VersionTag, label_set: LabelSet, selection: Selection | None
    ) -> LabelVersion | None:
        """The version that a tag holds already. Raises RunError if it is another one."""
        if tag.ref not in clone.refs:
            return None
        existing = clone.read_version(tag.ref)
        pairs: list[tuple[str, str | None, str]] = [("label set", existing.label_set, label_set.digest)]
        if selection:
            pairs.append(("selection", existing.selection, selection.digest))
        for what, old, new in pairs:
            if old != new:
                raise RunError(
                    f"{tag}: holds {what} {(old or 'none')[:16]} already, not {new[:16]}; versions never change: commit under "
                    f"another name (--tag), or delete this one with `ns labels gc --drop {tag} --yes`"
                )
        return existing


def _push_data(clone: RegistryClone, version: LabelVersion) -> None:
    """Pushes the data, and checks that all of it has arrived."""
    store, objects = open_store(clone.remote), list_objects(clone.remote)
    # DVC takes any file of the right name for the right bytes, and a folder's list for the whole folder.
    if damaged := find_damaged_keys(version, objects):
        for key in {*damaged, object_key(version.directory)} & objects.keys():
            store.delete(key)
    clone.commands.run_dvc("push")
    if missing := find_missing_keys(clone.remote, version):
        raise StoreError(f"{clone.remote}/{missing[0]}: is not there after dvc push; no version was made; try again")


def _download_files(clone: RegistryClone, ref: str, version: LabelVersion, destination: Path) -> None:
    missing_files = [file for file in version.files if not is_intact(destination / file.name, file)]
    if not missing_files:
        return
    fetched = destination / UNFINISHED_DIR / LABELS_DIR
    shutil.rmtree(fetched, ignore_errors=True)
    clone.commands.run_dvc("get", "--rev", clone.refs[ref], str(clone.path), LABELS_DIR, "--out", str(fetched))
    # The manifest last: without it there is no label set in a folder.
    for file in sorted(missing_files, key=lambda file: file.name == LabelSet.filename):
        if not is_intact(fetched / file.name, file):
            raise DataError(
                f"{clone.remote}/{object_key(file.md5)} ({file.name} of {version.tag}): is missing or damaged; "
                "delete it, and commit the label set again"
            )
        (fetched / file.name).replace(destination / file.name)
