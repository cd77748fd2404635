"""The label registry: versions of label sets, as tags of a git repository of its own; their data in a DVC remote.

    labels/PROJECT/RUN/gen-N      annotated tag of a commit with these files
        labels.dvc                the folder `labels/` as DVC knows it: the label set's files, and the selection
        version.json              every file of it with its size, sha256 and md5, and what it was made from
        labelset.json             and selection.json, verdict.json, where there are any: the manifests, readable in git
    current/PROJECT               branch: the version in use; its history says who moved it, when and why
    main                          branch: the settings of DVC; the parent of every version

A commit pushes data first and its tag last, so that a tag never names data that is not there; and it moves no branch, so that
committers never wait for each other. Every call works in a clone of its own: DVC's locks do not reach across machines.

Without DVC: the file with md5 `abcdef…` lies in the remote at `files/md5/ab/cdef…`.
"""

import configparser
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal, NamedTuple, Self

import yaml
from filelock import FileLock
from pydantic import BaseModel, ConfigDict

from ns.core.digest import sha256_file
from ns.core.errors import DataError, RunError, StoreError
from ns.core.git import GitCommands, redact_credentials
from ns.data.scratch import explain_scratch_errors, make_scratch_dir
from ns.labeling.label_set import HISTOGRAM, LabelSet, LabelShard, label_shard_key
from ns.labeling.selection import Selection
from ns.storage import LocalStore, Store, open_store
from ns.storage.documents import JsonDocument
from ns.storage.local import os_errors_as_store_errors

MAIN_REF = "refs/heads/main"
LABELS_DIR = "labels"
OBJECTS_PREFIX = "files/md5/"
UNFINISHED_DIR = ".tmp-get"
"""In a destination: what is being downloaded. While it is there, the folder may be filled further."""
CHUNK_BYTES = 1 << 20

README_TEXT = """# Label registry

Versions of label sets, one tag each: `labels/PROJECT/RUN/gen-N`. `current/PROJECT` is the one in use.

    dvc get --rev labels/PROJECT/RUN/gen-1 THIS-REPOSITORY labels

A tag holds manifests and `labels.dvc`; the data is in the DVC remote (`.dvc/config`). `version.json` lists the files: the one with
md5 `abcdef…` is `files/md5/ab/cdef…` there. Kept by `ns labels`: push no data by hand, move no tag.
"""


class VersionTag(NamedTuple):
    """The name of a version."""

    project: str
    run: str
    generation: int

    def __str__(self) -> str:
        return f"labels/{self.project}/{self.run}/gen-{self.generation}"

    @classmethod
    def from_parts(cls, project: str, run: str, generation: int) -> Self:
        """Raises DataError naming the part that cannot stand in a tag."""
        for what, name in (("project", project), ("run", run)):
            check_tag_part(what, name)
        if generation < 1:
            raise DataError(f"generation {generation}: has no label set of its own; generations count from 1")
        return cls(project, run, generation)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises DataError for what is no version's name."""
        match = re.fullmatch(r"labels/([^/]+)/([^/]+)/gen-([1-9][0-9]{0,5})", text)
        if match is None:
            raise DataError(f"{text!r}: not a version; must look like labels/PROJECT/RUN/gen-1 (`ns labels list` has them)")
        return cls.from_parts(match[1], match[2], int(match[3]))


def check_tag_part(what: str, name: str) -> None:
    """Raises DataError for a name that git would not take as part of a tag."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) or ".." in name or name.endswith((".", ".lock")):
        raise DataError(
            f"{what} {name!r}: cannot be part of a tag; must be at most 100 letters, digits, dots, dashes and underscores, "
            "begin with a letter or digit, hold no '..', and not end in '.' or '.lock'"
        )


class VersionFile(JsonDocument):
    """One file of a version."""

    name: str
    bytes: int
    sha256: str
    md5: str

    @property
    def remote_key(self) -> str:
        """Of its bytes in the remote."""
        return _object_key(self.md5)


class LabelVersion(JsonDocument):
    """`version.json`: what a tag holds."""

    filename: ClassVar[str] = "version.json"

    format: Literal[1] = 1
    project: str
    run: str
    generation: int
    label_set: str
    dataset: str
    teacher: str
    selection: str | None
    """Digests."""
    rows: int
    kept: int | None
    """Distinct images that the selection kept."""
    images: int | None
    """Images in an epoch."""
    directory: str
    """What DVC knows the folder by: md5 of the list of its files, and `.dir`."""
    files: tuple[VersionFile, ...]

    @property
    def tag(self) -> VersionTag:
        return VersionTag(self.project, self.run, self.generation)


class VersionSummary(BaseModel):
    """A version as `ns labels list` shows it."""

    model_config = ConfigDict(frozen=True)

    tag: str
    project: str
    run: str
    generation: int
    date: str
    """When it was committed, ISO 8601."""
    label_set: str
    teacher: str
    selection: str | None
    """Digests."""
    rows: int
    kept: int | None
    current: bool
    """Whether it is the version in use of its project."""


class RegistryGarbage(NamedTuple):
    """What no version needs."""

    dropped: tuple[VersionTag, ...]
    keys: tuple[str, ...]
    """In the remote."""
    bytes: int


class _RegistryClone(NamedTuple):
    commands: GitCommands
    remote: str
    refs: dict[str, str]
    """Name → hash, of what was asked for, as the registry had it when the clone was made."""

    @property
    def path(self) -> Path:
        return self.commands.path

    def read_document(self, ref: str, name: str) -> bytes:
        return self.commands.run_git("show", f"{ref}:{name}").encode()


class LabelRegistry:
    """A label registry, by the URL or path of its git repository. An empty repository is set up when it is first used.

    `remote` is a folder or `s3://bucket/prefix`; needed for the set-up, later the registry knows. Credentials come from the
    environment: those of S3 as for any store, those of git from its helpers and keys. All methods raise StoreError when a
    command fails or the data cannot be reached, DataError when the repository is no label registry.
    """

    def __init__(self, git_uri: str, remote: str | None = None) -> None:
        self._local = "://" not in git_uri and (Path(git_uri).exists() or not re.match(r"[\w.@-]+:", git_uri))
        if not git_uri or git_uri.startswith("-"):
            raise DataError(f"registry {git_uri!r}: must be the URL or the path of a git repository")
        self._git_uri = str(Path(git_uri).absolute()) if self._local else git_uri
        self._remote = _validate_remote(remote) if remote else None
        self.redacted_uri = redact_credentials(self._git_uri)

    def commit_version(
        self,
        tag: VersionTag,
        label_store: Store,
        label_set: LabelSet,
        selection: Selection | None = None,
        verdict: JsonDocument | None = None,
    ) -> bool:
        """Keeps the label set in the folder `labels` as version `tag`. Says whether the tag is new.

        A tag with the same label set is a success, and data of it that the remote has lost is pushed again. Raises RunError if
        the tag holds another one, DataError if the files are not those of the manifest.
        """
        VersionTag.from_parts(*tag)
        with self._open_clone(f"refs/tags/{tag}") as clone:
            existing = self._find_existing(clone, tag, label_set, selection)
            if existing and not _find_missing_keys(clone.remote, existing):
                return False
            commands = clone.commands
            commands.run_git("checkout", "--quiet", "--detach", clone.refs[MAIN_REF])
            files = _gather_files(label_store, label_set, selection, clone.path / LABELS_DIR)
            commands.run_dvc("add", LABELS_DIR)
            version = _build_version(
                tag, label_set, selection, files, _parse_dvc_hashes((clone.path / f"{LABELS_DIR}.dvc").read_bytes())[0]
            )
            self._push_data(clone, version)
            if existing:
                if _find_missing_keys(clone.remote, existing):
                    raise RunError(
                        f"{tag}: some of its data is lost, and what is given is not all of it; give its selection too"
                    )
                return False
            clone_store = LocalStore(clone.path)
            version.save(clone_store)
            label_set.save(clone_store)
            if selection:
                selection.save(clone_store)
            if verdict:
                verdict.save(clone_store)
            commands.run_git("add", "--all")
            commands.run_git("commit", "--quiet", f"--message={tag}")
            commands.run_git("tag", "--annotate", "--cleanup=verbatim", "--file=-", str(tag), data=_build_tag_message(version))
            try:
                commands.run_git("push", "--quiet", "origin", f"refs/tags/{tag}")
            except StoreError:
                # Somebody may have been faster with the same.
                if f"refs/tags/{tag}" not in self._list_refs(clone.commands):
                    raise
                with self._open_clone(f"refs/tags/{tag}") as other:
                    self._find_existing(other, tag, label_set, selection)
                return False
            return True

    def list_versions(self) -> list[VersionSummary]:
        """All versions, by project, the latest last."""
        with self._open_clone("refs/tags/labels/*", "refs/heads/current/*") as clone:
            current = {
                _parse_current_tag(message) for _, _, message in _describe_refs(clone.commands, "refs/remotes/origin/current")
            }
            summaries = []
            for name, date, message in _describe_refs(clone.commands, "refs/tags/labels"):
                trailers = _parse_trailers(message)
                if not {"Label-Set", "Teacher", "Rows"} <= trailers.keys():
                    # Somebody's own tag.
                    continue
                tag = VersionTag.parse(name.removeprefix("refs/tags/"))
                summaries.append(
                    VersionSummary(
                        tag=str(tag),
                        **tag._asdict(),
                        date=date,
                        label_set=trailers["Label-Set"],
                        teacher=trailers["Teacher"],
                        selection=trailers.get("Selection"),
                        rows=int(trailers["Rows"]),
                        kept=int(trailers["Kept"]) if "Kept" in trailers else None,
                        current=str(tag) in current,
                    )
                )
        # As times and not as text, since committers live in different time zones.
        return sorted(
            summaries,
            key=lambda summary: (summary.project, datetime.fromisoformat(summary.date), summary.run, summary.generation),
        )

    def find_version(self, name: str) -> LabelVersion:
        """The version of a tag, or the one in use (`current/PROJECT`). Raises RunError if there is none."""
        ref = _build_ref(name)
        with self._open_clone(ref) as clone:
            return self._read_version(clone, name, ref)

    def locate_data(self) -> str:
        """The folder or URI of the data."""
        with self._open_clone() as clone:
            return clone.remote

    def check_push_access(self) -> str:
        """Asks the git server whether a version might be pushed, and pushes nothing; an empty repository stays empty.

        Returns the folder or URI of the data. Raises as `commit` would.
        """
        with make_scratch_dir("registry") as scratch_dir:
            clone_path = scratch_dir / "clone"
            clone_path.mkdir()
            commands = GitCommands(clone_path, scratch_dir / "dvc", s3=False)
            commands.ensure_identity()
            commands.run_git("init", "--quiet")
            commands.run_git("remote", "add", "origin", self._git_uri)
            is_empty = not self._list_refs(commands)
            commands.run_git("commit", "--quiet", "--allow-empty", "--message=Nothing")
            commands.run_git("push", "--quiet", "--dry-run", "origin", "HEAD:refs/tags/labels/doctor")
        if not is_empty:
            return self.locate_data()
        if self._remote is None:
            raise DataError(self._explain_empty())
        return self._remote

    def download_version(self, name: str, destination: Path, *, with_dvc: bool = True) -> LabelVersion:
        """Brings a version (a tag, or `current/PROJECT`) into a folder, and checks every file. What is there and good stays.

        Without DVC files are fetched one by one, so an interrupted download continues at the next file. Raises DataError if
        the folder holds something else, or a file is not what was committed.
        """
        ref = _build_ref(name)
        with self._open_clone(ref) as clone:
            version = self._read_version(clone, name, ref)
            _check_destination(destination, version)
            unfinished = destination / UNFINISHED_DIR
            with os_errors_as_store_errors(destination, "write"):
                unfinished.mkdir(parents=True, exist_ok=True)
                with FileLock(unfinished / "lock"):
                    self._download_files(clone, ref, version, destination, unfinished, with_dvc=with_dvc)
                    shutil.rmtree(unfinished, ignore_errors=True)
        return version

    def _download_files(
        self, clone: _RegistryClone, ref: str, version: LabelVersion, destination: Path, unfinished: Path, *, with_dvc: bool
    ) -> None:
        # The manifest last: without it there is no label set in a folder.
        missing_files = sorted(version.files, key=lambda file: file.name == LabelSet.filename)
        missing_files = [file for file in missing_files if not _is_intact(destination / file.name, file)]
        if missing_files and with_dvc:
            shutil.rmtree(unfinished / LABELS_DIR, ignore_errors=True)
            clone.commands.run_dvc(
                "get", "--rev", clone.refs[ref], str(clone.path), LABELS_DIR, "--out", str(unfinished / LABELS_DIR)
            )
        store = open_store(clone.remote)
        for file in missing_files:
            source = unfinished / LABELS_DIR / file.name
            if not with_dvc:
                source.parent.mkdir(exist_ok=True)
                with store.open(file.remote_key) as blob, source.open("wb") as sink:
                    shutil.copyfileobj(blob, sink, CHUNK_BYTES)
            if not _is_intact(source, file):
                raise DataError(
                    f"{clone.remote}/{file.remote_key} ({file.name} of {version.tag}): is missing or damaged; "
                    "delete it, and commit the label set again"
                )
            source.replace(destination / file.name)

    def set_current(self, tag: VersionTag, reason: str, *, is_rollback: bool = False) -> str | None:
        """Makes a version the one in use of its project: moves the branch `current/PROJECT`. Returns the tag before.

        `back` wants a version in use to go back from. Raises RunError if there is no such version, or somebody moved the
        branch at the same time.
        """
        VersionTag.from_parts(*tag)
        branch = f"refs/heads/current/{tag.project}"
        with self._open_clone(f"refs/tags/{tag}", branch) as clone:
            commands = clone.commands
            self._read_version(clone, str(tag), f"refs/tags/{tag}")
            old = clone.refs.get(branch)
            if is_rollback and old is None:
                raise RunError(f"current/{tag.project}: no version is in use yet; choose one with `ns labels promote {tag}`")
            previous = _parse_current_tag(commands.run_git("log", "-1", "--format=%B", old)) if old else None
            if previous == str(tag):
                return previous
            trailers = {"Tag": str(tag), "Before": previous, "Why": " ".join(reason.split())}
            subject = f"{'Go back to' if is_rollback else 'Use'} {tag}"
            commit = commands.run_git(
                "commit-tree",
                f"refs/tags/{tag}^{{tree}}",
                "-p",
                old or f"refs/tags/{tag}^{{commit}}",
                data=_format_message(subject, trailers),
            ).strip()
            lease = f"--force-with-lease={branch}:{old or ''}"
            try:
                commands.run_git("push", "--quiet", lease, "origin", f"{commit}:{branch}")
            except StoreError as error:
                if self._list_refs(commands).get(branch) == old:
                    raise
                raise RunError(
                    f"current/{tag.project}: somebody moved it just now; look with `ns labels list`, and say again which to use"
                ) from error
            return previous

    def collect_garbage(self, drop: Iterable[VersionTag] = (), *, dry_run: bool = True) -> RegistryGarbage:
        """Deletes the versions in `drop`, and data that no tag needs: what `dvc gc --all-tags --cloud` would. With `dry` only
        says what that would be.

        Only for a remote that holds nothing else, at a time when nobody commits: data that is pushed, but not yet tagged,
        looks like garbage. Raises RunError for a version that is in use or does not exist, DataError if data of a version
        that stays is missing: what it needs is then not known.
        """
        dropped = tuple(VersionTag.from_parts(*tag) for tag in drop)
        with self._open_clone("refs/tags/*", "refs/heads/current/*") as clone:
            commands = clone.commands
            in_use = {_parse_current_tag(message) for _, _, message in _describe_refs(commands, "refs/remotes/origin/current")}
            for tag in dropped:
                if f"refs/tags/{tag}" not in clone.refs:
                    raise RunError(f"{tag}: no such version in {self.redacted_uri}; `ns labels list` has them")
                if str(tag) in in_use:
                    raise RunError(f"{tag}: is in use (current/{tag.project}); promote another version before dropping it")
                commands.run_git("tag", "--delete", str(tag))
            objects = _list_objects(clone.remote)
            dropped_refs = {f"refs/tags/{tag}" for tag in dropped}
            used_keys = _find_used_keys(clone, [ref for ref in clone.refs if ref not in dropped_refs], objects)
            keys = tuple(sorted(objects.keys() - used_keys))
            if not dry_run:
                for tag in dropped:
                    ref = f"refs/tags/{tag}"
                    # First the name, then the data.
                    commands.run_git("push", "--quiet", f"--force-with-lease={ref}:{clone.refs[ref]}", "origin", f":{ref}")
                tags = {ref for ref in self._list_refs(commands) if ref.startswith("refs/tags/")}
                if tags - clone.refs.keys():
                    raise RunError(f"{self.redacted_uri}: a version was committed meanwhile; no data was deleted; run it again")
                # One by one, and not by `dvc gc`: its multi-object delete is refused by S3 servers that want a Content-MD5,
                # and with --force, which it needs without a terminal, a list that it cannot read frees all files in it.
                store = open_store(clone.remote)
                for key in keys:
                    store.delete(key)
        if not dry_run:
            self._check_after_gc()
        return RegistryGarbage(dropped, keys, sum(objects[key] for key in keys))

    def _check_after_gc(self) -> None:
        with self._open_clone("refs/tags/labels/*") as clone:
            objects = _list_objects(clone.remote)
            for ref in (ref for ref in clone.refs if ref.startswith("refs/tags/")):
                if {file.remote_key for file in self._read_version(clone, ref, ref).files} - objects.keys():
                    raise DataError(f"{ref.removeprefix('refs/tags/')}: was committed meanwhile and lost data; commit it again")

    def _find_existing(
        self, clone: _RegistryClone, tag: VersionTag, label_set: LabelSet, selection: Selection | None
    ) -> LabelVersion | None:
        """The version that a tag holds already. Raises RunError if it is another one."""
        ref = f"refs/tags/{tag}"
        if ref not in clone.refs:
            return None
        existing = self._read_version(clone, str(tag), ref)
        pairs: list[tuple[str, str | None, str]] = [("label set", existing.label_set, label_set.digest)]
        if selection:
            pairs.append(("selection", existing.selection, selection.digest))
        for what, old, new in pairs:
            if old != new:
                raise RunError(
                    f"{tag}: holds {what} {(old or 'none')[:16]} already, not {new[:16]}; versions never change: commit under "
                    f"another run's name (--run), or delete this one with `ns labels gc --drop {tag} --yes`"
                )
        return existing

    def _read_version(self, clone: _RegistryClone, name: str, ref: str) -> LabelVersion:
        if ref not in clone.refs:
            raise RunError(f"{name}: no such version in {self.redacted_uri}; `ns labels list` has them")
        try:
            data = clone.read_document(clone.refs[ref], LabelVersion.filename)
        except StoreError as error:
            raise DataError(f"{name}: has no {LabelVersion.filename}; it was not made by `ns labels commit`") from error
        return LabelVersion.parse(data, f"{name}:{LabelVersion.filename}")

    def _push_data(self, clone: _RegistryClone, version: LabelVersion) -> None:
        """Pushes the data, and looks whether all of it has come."""
        store = open_store(clone.remote)
        objects = _list_objects(clone.remote)
        mismatched = [file.remote_key for file in version.files if objects.get(file.remote_key) != file.bytes]
        # DVC takes whatever has the right name for the right bytes, and a folder's list for the whole folder.
        for key in (*mismatched, _object_key(version.directory)) if mismatched else ():
            if key in objects:
                store.delete(key)
        clone.commands.run_dvc("push")
        missing = _find_missing_keys(clone.remote, version)
        if missing:
            raise StoreError(f"{clone.remote}/{missing[0]}: is not there after dvc push; no version was made; try again")

    @contextmanager
    def _open_clone(self, *patterns: str) -> Iterator[_RegistryClone]:
        """A clone with `main` and the refs wanted, as far as they exist. A pattern ends in `*`."""
        with make_scratch_dir("registry") as scratch_dir:
            clone_path = scratch_dir / "clone"
            clone_path.mkdir()
            commands = GitCommands(clone_path, scratch_dir / "dvc", s3=False)
            commands.run_git("init", "--quiet")
            commands.run_git("remote", "add", "origin", self._git_uri)
            refs = self._list_refs(commands)
            if not refs:
                self._set_up_repository(scratch_dir / "new")
                refs = self._list_refs(commands)
            matching = [ref for ref in refs if any(_matches_pattern(ref, pattern) for pattern in (MAIN_REF, *patterns))]
            if MAIN_REF not in refs:
                raise DataError(
                    f"{self.redacted_uri}: not a label registry: it has no branch main; name a repository of its own, or an empty one"
                )
            specs = [f"+{ref}:{ref.replace('refs/heads/', 'refs/remotes/origin/')}" for ref in matching]
            commands.run_git("fetch", "--quiet", "--depth=1", "--no-tags", "--stdin", "origin", data="\n".join(specs) + "\n")
            remote = self._read_remote(commands)
            commands = GitCommands(clone_path, scratch_dir / "dvc", s3=remote.startswith("s3://"))
            commands.ensure_identity()
            yield _RegistryClone(commands, remote, {ref: refs[ref] for ref in matching})

    def _list_refs(self, commands: GitCommands) -> dict[str, str]:
        try:
            lines = commands.run_git("ls-remote", "--heads", "--tags", "--refs", "origin").splitlines()
        except StoreError as error:
            hint = (
                f"; for a new registry: git init --bare {self._git_uri}"
                if self._local and not Path(self._git_uri).exists()
                else ""
            )
            raise StoreError(f"registry {self.redacted_uri}: {error}{hint}") from error
        return {name: value for value, _, name in (line.partition("\t") for line in lines)}

    def _read_remote(self, commands: GitCommands) -> str:
        """The remote that the registry knows. Raises DataError if it is not the one that was given."""
        try:
            text = commands.run_git("show", "refs/remotes/origin/main:.dvc/config")
        except StoreError as error:
            raise DataError(
                f"{self.redacted_uri}: not a label registry: no .dvc/config on main; name another repository"
            ) from error
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read_string(text)
            uri = parser[f"'remote \"{parser['core']['remote']}\"'"]["url"]
        except (configparser.Error, KeyError) as error:
            raise DataError(
                f"{self.redacted_uri}: .dvc/config names no default remote; set it with: dvc remote add -d storage URL"
            ) from error
        remote = _validate_remote(uri, f"{self.redacted_uri}: .dvc/config: remote", absolute=True)
        if self._remote and self._remote != remote:
            raise DataError(
                f"registry {self.redacted_uri}: keeps its data in {remote}, not in {self._remote}; leave the remote out "
                "(--remote, NS_LABEL_REMOTE, registry.remote), or use another registry"
            )
        return remote

    def _set_up_repository(self, path: Path) -> None:
        """Makes the first commit of an empty repository. If two do, the first one's holds."""
        if self._remote is None:
            raise DataError(self._explain_empty())
        path.mkdir()
        commands = GitCommands(path, path.parent / "dvc", s3=False)
        commands.ensure_identity()
        commands.run_git("init", "--quiet")
        commands.run_git("remote", "add", "origin", self._git_uri)
        commands.run_dvc("init")
        commands.run_dvc("remote", "add", "--default", "storage", self._remote)
        (path / "README.md").write_text(README_TEXT)
        (path / ".gitignore").write_text(f"/{LABELS_DIR}\n")
        commands.run_git("add", "--all")
        commands.run_git("commit", "--quiet", "--message=Set up the label registry")
        push = ["push", "--quiet"]
        if self._local:
            # A repository made by `git init` expects the branch that its owner's git starts with, and lets nobody push to it.
            commands.run_git("-C", self._git_uri, "symbolic-ref", "HEAD", MAIN_REF)
            push.append("--receive-pack=git -c receive.denyCurrentBranch=updateInstead receive-pack")
        try:
            commands.run_git(*push, "origin", f"HEAD:{MAIN_REF}")
        except StoreError:
            if MAIN_REF not in self._list_refs(commands):
                raise

    def _explain_empty(self) -> str:
        return (
            f"registry {self.redacted_uri}: is empty; say where its data shall lie, a folder or s3://bucket/prefix "
            "(--remote, NS_LABEL_REMOTE, registry.remote)"
        )


def _gather_files(
    label_store: Store, label_set: LabelSet, selection: Selection | None, target: Path
) -> tuple[VersionFile, ...]:
    """Copies a label set's files. Raises DataError if one is not what the manifest says."""
    with explain_scratch_errors(target, "write"):
        target.mkdir()
        target_store = LocalStore(target)
        for shard in label_set.shards:
            _copy_file(label_store, shard.name, target)
            record_key = label_shard_key(shard.name.removesuffix(".parquet") + ".tar")
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
        shutil.copyfileobj(source, sink, CHUNK_BYTES)


def _hash_file(path: Path) -> VersionFile:
    md5 = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        _feed_hash(file, md5)
    return VersionFile(name=path.name, bytes=path.stat().st_size, sha256=sha256_file(path), md5=md5.hexdigest())


def _feed_hash(file: BinaryIO, hasher: Any) -> None:
    while chunk := file.read(CHUNK_BYTES):
        hasher.update(chunk)


def _build_version(
    tag: VersionTag, label_set: LabelSet, selection: Selection | None, files: tuple[VersionFile, ...], directory: str
) -> LabelVersion:
    return LabelVersion(
        **tag._asdict(),
        label_set=label_set.digest,
        dataset=label_set.dataset,
        teacher=label_set.teacher,
        selection=selection.digest if selection else None,
        rows=label_set.rows,
        kept=selection.kept if selection else None,
        images=selection.images if selection else None,
        directory=directory,
        files=files,
    )


def _build_tag_message(version: LabelVersion) -> str:
    trailers = {
        "Project": version.project,
        "Run": version.run,
        "Generation": version.generation,
        "Label-Set": version.label_set,
        "Teacher": version.teacher,
        "Rows": version.rows,
        "Selection": version.selection,
        "Kept": version.kept,
        "Images": version.images,
    }
    return _format_message(f"Label set of {version.run}, generation {version.generation}", trailers)


def _format_message(subject: str, trailers: dict[str, Any]) -> str:
    """A message in git's form: subject, blank line, `Name: value` lines."""
    lines = [f"{name}: {value}" for name, value in trailers.items() if value not in (None, "")]
    return "\n".join([subject, "", *lines]) + "\n"


def _parse_trailers(message: str) -> dict[str, str]:
    return dict(re.findall(r"^([A-Z][A-Za-z-]+): (.+)$", message, re.MULTILINE))


def _parse_current_tag(message: str) -> str | None:
    """The tag that a commit of `current/PROJECT` names."""
    return _parse_trailers(message).get("Tag")


def _describe_refs(commands: GitCommands, prefix: str) -> Iterator[tuple[str, str, str]]:
    """Name, date and message of each ref below a prefix."""
    text = commands.run_git("for-each-ref", "--format=%(refname)%00%(creatordate:iso-strict)%00%(contents)%00%00", prefix)
    for record in text.split("\0\0\n"):
        name, _, rest = record.partition("\0")
        if name:
            date, _, message = rest.partition("\0")
            yield name, date, message


def _build_ref(name: str) -> str:
    """The full name of a version's ref."""
    project = name.removeprefix("current/")
    if project != name:
        check_tag_part("project", project)
        return f"refs/heads/{name}"
    return f"refs/tags/{VersionTag.parse(name)}"


def _matches_pattern(ref: str, pattern: str) -> bool:
    return ref.startswith(pattern[:-1]) if pattern.endswith("*") else ref == pattern


def _parse_dvc_hashes(dvc_file: bytes) -> list[str]:
    """Hashes of what a .dvc file keeps."""
    return [out["md5"] for out in yaml.safe_load(dvc_file).get("outs", []) if "md5" in out]


def _find_used_keys(clone: _RegistryClone, refs: list[str], objects: Mapping[str, int]) -> set[str]:
    """Keys in the remote that some ref needs. Raises DataError if one is missing."""
    store = open_store(clone.remote)
    used_keys: set[str] = set()
    for ref in refs:
        names = clone.commands.run_git("ls-tree", "-r", "-z", "--name-only", clone.refs[ref]).split("\0")
        files = [clone.read_document(clone.refs[ref], name) for name in names if name.endswith(".dvc")]
        needed_keys = {_object_key(md5) for data in files for md5 in _parse_dvc_hashes(data)} - used_keys
        for directory_key in sorted(key for key in needed_keys if key.endswith(".dir") and key in objects):
            needed_keys.update(_object_key(entry["md5"]) for entry in json.loads(store.get(directory_key)))
        missing = sorted(needed_keys - objects.keys())
        if missing:
            raise DataError(
                f"{ref.removeprefix('refs/')}: {clone.remote}/{missing[0]} is missing, and {len(missing) - 1} files more; nothing "
                "was deleted; commit this label set again, or drop it"
            )
        used_keys |= needed_keys
    return used_keys


def _list_objects(remote: str) -> dict[str, int]:
    """Key and bytes of all that DVC keeps in the remote."""
    entries = open_store(remote).entries(OBJECTS_PREFIX)
    return {
        entry.key: entry.size
        for entry in entries
        if re.fullmatch(r"[0-9a-f]{2}/[0-9a-f]{30}(\.dir)?", entry.key[len(OBJECTS_PREFIX) :])
    }


def _find_missing_keys(remote: str, version: LabelVersion) -> list[str]:
    """Keys of a version's data that the remote does not have, or has in another length."""
    objects = _list_objects(remote)
    missing = [file.remote_key for file in version.files if objects.get(file.remote_key) != file.bytes]
    return missing + [key for key in [_object_key(version.directory)] if key not in objects]


def _object_key(md5: str) -> str:
    return f"{OBJECTS_PREFIX}{md5[:2]}/{md5[2:]}"


def _is_intact(path: Path, file: VersionFile) -> bool:
    return path.is_file() and path.stat().st_size == file.bytes and sha256_file(path) == file.sha256


def _check_destination(destination: Path, version: LabelVersion) -> None:
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


def _validate_remote(remote: str, what: str = "remote", *, absolute: bool = False) -> str:
    """A folder's absolute path, or an S3 URI. Raises DataError for anything else."""
    scheme, separator, rest = remote.partition("://")
    if separator and (scheme != "s3" or not rest.strip("/") or "@" in rest.partition("/")[0]):
        raise DataError(
            f"{what} {redact_credentials(remote)}: must be a folder or s3://bucket/prefix; credentials come from the environment"
        )
    if not separator and absolute and not Path(remote).is_absolute():
        raise DataError(f"{what} {remote}: must be an absolute path: every process works in a clone of its own")
    return remote.rstrip("/") if separator else str(Path(remote).absolute())
