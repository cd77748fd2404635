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
from typing import Any, BinaryIO, Literal, NamedTuple, Self

import yaml
from filelock import FileLock
from pydantic import BaseModel, ConfigDict

from ns.core.digest import sha256_file
from ns.core.errors import DataError, RunError, StoreError
from ns.core.git import Commands, redacted
from ns.data.scratch import scratch, writing
from ns.labeling.label_set import HISTOGRAM, LabelSet, LabelShard, marker
from ns.labeling.label_set import MANIFEST as LABEL_SET
from ns.labeling.selection import MANIFEST as SELECTION
from ns.labeling.selection import Selection
from ns.storage import LocalStore, Store, open_store
from ns.storage.documents import Document
from ns.storage.local import explained

MAIN = "refs/heads/main"
FOLDER = "labels"
VERSION = "version.json"
VERDICT = "verdict.json"
OBJECTS = "files/md5/"
UNFINISHED = ".tmp-get"
"""In a destination: what is being downloaded. While it is there, the folder may be filled further."""
CHUNK = 1 << 20

README = """# Label registry

Versions of label sets, one tag each: `labels/PROJECT/RUN/gen-N`. `current/PROJECT` is the one in use.

    dvc get --rev labels/PROJECT/RUN/gen-1 THIS-REPOSITORY labels

A tag holds manifests and `labels.dvc`; the data is in the DVC remote (`.dvc/config`). `version.json` lists the files: the one with
md5 `abcdef…` is `files/md5/ab/cdef…` there. Kept by `ns labels`: push no data by hand, move no tag.
"""


class Tag(NamedTuple):
    """The name of a version."""

    project: str
    run: str
    generation: int

    def __str__(self) -> str:
        return f"labels/{self.project}/{self.run}/gen-{self.generation}"

    @classmethod
    def of(cls, project: str, run: str, generation: int) -> Self:
        """Raises DataError naming the part that cannot stand in a tag."""
        for what, name in (("project", project), ("run", run)):
            check_name(what, name)
        if generation < 1:
            raise DataError(f"generation {generation}: has no label set of its own; generations count from 1")
        return cls(project, run, generation)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises DataError for what is no version's name."""
        match = re.fullmatch(r"labels/([^/]+)/([^/]+)/gen-([1-9][0-9]{0,5})", text)
        if match is None:
            raise DataError(f"{text!r}: not a version; must look like labels/PROJECT/RUN/gen-1 (`ns labels list` has them)")
        return cls.of(match[1], match[2], int(match[3]))


def check_name(what: str, name: str) -> None:
    """Raises DataError for a name that git would not take as part of a tag."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) or ".." in name or name.endswith((".", ".lock")):
        raise DataError(
            f"{what} {name!r}: cannot be part of a tag; must be at most 100 letters, digits, dots, dashes and underscores, "
            "begin with a letter or digit, hold no '..', and not end in '.' or '.lock'"
        )


class File(Document):
    """One file of a version."""

    name: str
    bytes: int
    sha256: str
    md5: str

    @property
    def key(self) -> str:
        """Of its bytes in the remote."""
        return _object(self.md5)


class Version(Document):
    """`version.json`: what a tag holds."""

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
    files: tuple[File, ...]

    @property
    def tag(self) -> Tag:
        return Tag(self.project, self.run, self.generation)


class Listed(BaseModel):
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


class Garbage(NamedTuple):
    """What no version needs."""

    dropped: tuple[Tag, ...]
    keys: tuple[str, ...]
    """In the remote."""
    bytes: int


class _Clone(NamedTuple):
    commands: Commands
    remote: str
    refs: dict[str, str]
    """Name → hash, of what was asked for, as the registry had it when the clone was made."""

    @property
    def folder(self) -> Path:
        return self.commands.folder

    def document(self, ref: str, name: str) -> bytes:
        return self.commands.git("show", f"{ref}:{name}").encode()


class Registry:
    """A label registry, by the URL or path of its git repository. An empty repository is set up when it is first used.

    `remote` is a folder or `s3://bucket/prefix`; needed for the set-up, later the registry knows. Credentials come from the
    environment: those of S3 as for any store, those of git from its helpers and keys. All methods raise StoreError when a
    command fails or the data cannot be reached, DataError when the repository is no label registry.
    """

    def __init__(self, git: str, remote: str | None = None) -> None:
        self._local = "://" not in git and (Path(git).exists() or not re.match(r"[\w.@-]+:", git))
        if not git or git.startswith("-"):
            raise DataError(f"registry {git!r}: must be the URL or the path of a git repository")
        self._url = str(Path(git).absolute()) if self._local else git
        self._remote = _checked_remote(remote) if remote else None
        self.place = redacted(self._url)

    def commit(
        self, tag: Tag, labels: Store, label_set: LabelSet, selection: Selection | None = None, verdict: Document | None = None
    ) -> bool:
        """Keeps the label set in the folder `labels` as version `tag`. Says whether the tag is new.

        A tag with the same label set is a success, and data of it that the remote has lost is pushed again. Raises RunError if
        the tag holds another one, DataError if the files are not those of the manifest.
        """
        Tag.of(*tag)
        with self._clone(f"refs/tags/{tag}") as clone:
            known = self._known(clone, tag, label_set, selection)
            if known and not _absent(clone.remote, known):
                return False
            commands = clone.commands
            commands.git("checkout", "--quiet", "--detach", clone.refs[MAIN])
            files = _gather(labels, label_set, selection, clone.folder / FOLDER)
            commands.dvc("add", FOLDER)
            version = _version(tag, label_set, selection, files, _tracked((clone.folder / f"{FOLDER}.dvc").read_bytes())[0])
            self._push(clone, version)
            if known:
                if _absent(clone.remote, known):
                    raise RunError(
                        f"{tag}: some of its data is lost, and what is given is not all of it; give its selection too"
                    )
                return False
            tree = LocalStore(clone.folder)
            version.write(tree, VERSION)
            label_set.write(tree, LABEL_SET)
            if selection:
                selection.write(tree, SELECTION)
            if verdict:
                verdict.write(tree, VERDICT)
            commands.git("add", "--all")
            commands.git("commit", "--quiet", f"--message={tag}")
            commands.git("tag", "--annotate", "--cleanup=verbatim", "--file=-", str(tag), data=_message(version))
            try:
                commands.git("push", "--quiet", "origin", f"refs/tags/{tag}")
            except StoreError:
                # Somebody may have been faster with the same.
                if f"refs/tags/{tag}" not in self._refs(clone.commands):
                    raise
                with self._clone(f"refs/tags/{tag}") as other:
                    self._known(other, tag, label_set, selection)
                return False
            return True

    def versions(self) -> list[Listed]:
        """All versions, by project, the latest last."""
        with self._clone("refs/tags/labels/*", "refs/heads/current/*") as clone:
            current = {_pointer(message) for _, _, message in _described(clone.commands, "refs/remotes/origin/current")}
            found = []
            for name, date, message in _described(clone.commands, "refs/tags/labels"):
                facts = _facts(message)
                if not {"Label-Set", "Teacher", "Rows"} <= facts.keys():
                    # Somebody's own tag.
                    continue
                tag = Tag.parse(name.removeprefix("refs/tags/"))
                found.append(
                    Listed(
                        tag=str(tag),
                        **tag._asdict(),
                        date=date,
                        label_set=facts["Label-Set"],
                        teacher=facts["Teacher"],
                        selection=facts.get("Selection"),
                        rows=int(facts["Rows"]),
                        kept=int(facts["Kept"]) if "Kept" in facts else None,
                        current=str(tag) in current,
                    )
                )
        # As times and not as text, since committers live in different time zones.
        return sorted(found, key=lambda one: (one.project, datetime.fromisoformat(one.date), one.run, one.generation))

    def show(self, name: str) -> Version:
        """The version of a tag, or the one in use (`current/PROJECT`). Raises RunError if there is none."""
        ref = _ref(name)
        with self._clone(ref) as clone:
            return self._version(clone, name, ref)

    def where(self) -> str:
        """The folder or URI of the data."""
        with self._clone() as clone:
            return clone.remote

    def rehearse(self) -> str:
        """Asks the git server whether a version might be pushed, and pushes nothing; an empty repository stays empty.

        Returns the folder or URI of the data. Raises as `commit` would.
        """
        with scratch("registry") as place:
            folder = place / "clone"
            folder.mkdir()
            commands = Commands(folder, place / "dvc", s3=False)
            commands.identify()
            commands.git("init", "--quiet")
            commands.git("remote", "add", "origin", self._url)
            is_empty = not self._refs(commands)
            commands.git("commit", "--quiet", "--allow-empty", "--message=Nothing")
            commands.git("push", "--quiet", "--dry-run", "origin", "HEAD:refs/tags/labels/doctor")
        if not is_empty:
            return self.where()
        if self._remote is None:
            raise DataError(self._is_empty())
        return self._remote

    def get(self, name: str, destination: Path, *, with_dvc: bool = True) -> Version:
        """Brings a version (a tag, or `current/PROJECT`) into a folder, and checks every file. What is there and good stays.

        Without DVC files are fetched one by one, so an interrupted download continues at the next file. Raises DataError if
        the folder holds something else, or a file is not what was committed.
        """
        ref = _ref(name)
        with self._clone(ref) as clone:
            version = self._version(clone, name, ref)
            _check_destination(destination, version)
            unfinished = destination / UNFINISHED
            with explained(destination, "write"):
                unfinished.mkdir(parents=True, exist_ok=True)
                with FileLock(unfinished / "lock"):
                    self._fill(clone, ref, version, destination, unfinished, with_dvc=with_dvc)
                    shutil.rmtree(unfinished, ignore_errors=True)
        return version

    def _fill(self, clone: _Clone, ref: str, version: Version, destination: Path, unfinished: Path, *, with_dvc: bool) -> None:
        # The manifest last: without it there is no label set in a folder.
        wanted = sorted(version.files, key=lambda file: file.name == LABEL_SET)
        wanted = [file for file in wanted if not _is_good(destination / file.name, file)]
        if wanted and with_dvc:
            shutil.rmtree(unfinished / FOLDER, ignore_errors=True)
            clone.commands.dvc("get", "--rev", clone.refs[ref], str(clone.folder), FOLDER, "--out", str(unfinished / FOLDER))
        store = open_store(clone.remote)
        for file in wanted:
            source = unfinished / FOLDER / file.name
            if not with_dvc:
                source.parent.mkdir(exist_ok=True)
                with store.open(file.key) as blob, source.open("wb") as sink:
                    shutil.copyfileobj(blob, sink, CHUNK)
            if not _is_good(source, file):
                raise DataError(
                    f"{clone.remote}/{file.key} ({file.name} of {version.tag}): is missing or damaged; "
                    "delete it, and commit the label set again"
                )
            source.replace(destination / file.name)

    def use(self, tag: Tag, why: str, *, back: bool = False) -> str | None:
        """Makes a version the one in use of its project: moves the branch `current/PROJECT`. Returns the tag before.

        `back` wants a version in use to go back from. Raises RunError if there is no such version, or somebody moved the
        branch at the same time.
        """
        Tag.of(*tag)
        pointer = f"refs/heads/current/{tag.project}"
        with self._clone(f"refs/tags/{tag}", pointer) as clone:
            commands = clone.commands
            self._version(clone, str(tag), f"refs/tags/{tag}")
            old = clone.refs.get(pointer)
            if back and old is None:
                raise RunError(f"current/{tag.project}: no version is in use yet; choose one with `ns labels promote {tag}`")
            before = _pointer(commands.git("log", "-1", "--format=%B", old)) if old else None
            if before == str(tag):
                return before
            facts = {"Tag": str(tag), "Before": before, "Why": " ".join(why.split())}
            subject = f"{'Go back to' if back else 'Use'} {tag}"
            commit = commands.git(
                "commit-tree",
                f"refs/tags/{tag}^{{tree}}",
                "-p",
                old or f"refs/tags/{tag}^{{commit}}",
                data=_with_facts(subject, facts),
            ).strip()
            lease = f"--force-with-lease={pointer}:{old or ''}"
            try:
                commands.git("push", "--quiet", lease, "origin", f"{commit}:{pointer}")
            except StoreError as error:
                if self._refs(commands).get(pointer) == old:
                    raise
                raise RunError(
                    f"current/{tag.project}: somebody moved it just now; look with `ns labels list`, and say again which to use"
                ) from error
            return before

    def gc(self, drop: Iterable[Tag] = (), *, dry: bool = True) -> Garbage:
        """Deletes the versions in `drop`, and data that no tag needs: what `dvc gc --all-tags --cloud` would. With `dry` only
        says what that would be.

        Only for a remote that holds nothing else, at a time when nobody commits: data that is pushed, but not yet tagged,
        looks like garbage. Raises RunError for a version that is in use or does not exist, DataError if data of a version
        that stays is missing: what it needs is then not known.
        """
        dropped = tuple(Tag.of(*tag) for tag in drop)
        with self._clone("refs/tags/*", "refs/heads/current/*") as clone:
            commands = clone.commands
            in_use = {_pointer(message) for _, _, message in _described(commands, "refs/remotes/origin/current")}
            for tag in dropped:
                if f"refs/tags/{tag}" not in clone.refs:
                    raise RunError(f"{tag}: no such version in {self.place}; `ns labels list` has them")
                if str(tag) in in_use:
                    raise RunError(f"{tag}: is in use (current/{tag.project}); promote another version before dropping it")
                commands.git("tag", "--delete", str(tag))
            there = _objects(clone.remote)
            gone = {f"refs/tags/{tag}" for tag in dropped}
            used = _used(clone, [ref for ref in clone.refs if ref not in gone], there)
            keys = tuple(sorted(there.keys() - used))
            if not dry:
                for tag in dropped:
                    ref = f"refs/tags/{tag}"
                    # First the name, then the data.
                    commands.git("push", "--quiet", f"--force-with-lease={ref}:{clone.refs[ref]}", "origin", f":{ref}")
                tags = {ref for ref in self._refs(commands) if ref.startswith("refs/tags/")}
                if tags - clone.refs.keys():
                    raise RunError(f"{self.place}: a version was committed meanwhile; no data was deleted; run it again")
                # One by one, and not by `dvc gc`: its multi-object delete is refused by S3 servers that want a Content-MD5,
                # and with --force, which it needs without a terminal, a list that it cannot read frees all files in it.
                store = open_store(clone.remote)
                for key in keys:
                    store.delete(key)
        if not dry:
            self._check_after_gc()
        return Garbage(dropped, keys, sum(there[key] for key in keys))

    def _check_after_gc(self) -> None:
        with self._clone("refs/tags/labels/*") as clone:
            there = _objects(clone.remote)
            for ref in (ref for ref in clone.refs if ref.startswith("refs/tags/")):
                if {file.key for file in self._version(clone, ref, ref).files} - there.keys():
                    raise DataError(f"{ref.removeprefix('refs/tags/')}: was committed meanwhile and lost data; commit it again")

    def _known(self, clone: _Clone, tag: Tag, label_set: LabelSet, selection: Selection | None) -> Version | None:
        """The version that a tag holds already. Raises RunError if it is another one."""
        ref = f"refs/tags/{tag}"
        if ref not in clone.refs:
            return None
        known = self._version(clone, str(tag), ref)
        pairs: list[tuple[str, str | None, str]] = [("label set", known.label_set, label_set.digest)]
        if selection:
            pairs.append(("selection", known.selection, selection.digest))
        for what, old, new in pairs:
            if old != new:
                raise RunError(
                    f"{tag}: holds {what} {(old or 'none')[:16]} already, not {new[:16]}; versions never change: commit under "
                    f"another run's name (--run), or delete this one with `ns labels gc --drop {tag} --yes`"
                )
        return known

    def _version(self, clone: _Clone, name: str, ref: str) -> Version:
        if ref not in clone.refs:
            raise RunError(f"{name}: no such version in {self.place}; `ns labels list` has them")
        try:
            data = clone.document(clone.refs[ref], VERSION)
        except StoreError as error:
            raise DataError(f"{name}: has no {VERSION}; it was not made by `ns labels commit`") from error
        return Version.parse(data, f"{name}:{VERSION}")

    def _push(self, clone: _Clone, version: Version) -> None:
        """Pushes the data, and looks whether all of it has come."""
        store = open_store(clone.remote)
        there = _objects(clone.remote)
        wrong = [file.key for file in version.files if there.get(file.key) != file.bytes]
        # DVC takes whatever has the right name for the right bytes, and a folder's list for the whole folder.
        for key in (*wrong, _object(version.directory)) if wrong else ():
            if key in there:
                store.delete(key)
        clone.commands.dvc("push")
        absent = _absent(clone.remote, version)
        if absent:
            raise StoreError(f"{clone.remote}/{absent[0]}: is not there after dvc push; no version was made; try again")

    @contextmanager
    def _clone(self, *wanted: str) -> Iterator[_Clone]:
        """A clone with `main` and the refs wanted, as far as they exist. A pattern ends in `*`."""
        with scratch("registry") as place:
            folder = place / "clone"
            folder.mkdir()
            commands = Commands(folder, place / "dvc", s3=False)
            commands.git("init", "--quiet")
            commands.git("remote", "add", "origin", self._url)
            refs = self._refs(commands)
            if not refs:
                self._set_up(place / "new")
                refs = self._refs(commands)
            matching = [ref for ref in refs if any(_matches(ref, pattern) for pattern in (MAIN, *wanted))]
            if MAIN not in refs:
                raise DataError(
                    f"{self.place}: not a label registry: it has no branch main; name a repository of its own, or an empty one"
                )
            specs = [f"+{ref}:{ref.replace('refs/heads/', 'refs/remotes/origin/')}" for ref in matching]
            commands.git("fetch", "--quiet", "--depth=1", "--no-tags", "--stdin", "origin", data="\n".join(specs) + "\n")
            remote = self._configured(commands)
            commands = Commands(folder, place / "dvc", s3=remote.startswith("s3://"))
            commands.identify()
            yield _Clone(commands, remote, {ref: refs[ref] for ref in matching})

    def _refs(self, commands: Commands) -> dict[str, str]:
        try:
            lines = commands.git("ls-remote", "--heads", "--tags", "--refs", "origin").splitlines()
        except StoreError as error:
            hint = f"; for a new registry: git init --bare {self._url}" if self._local and not Path(self._url).exists() else ""
            raise StoreError(f"registry {self.place}: {error}{hint}") from error
        return {name: value for value, _, name in (line.partition("\t") for line in lines)}

    def _configured(self, commands: Commands) -> str:
        """The remote that the registry knows. Raises DataError if it is not the one that was given."""
        try:
            text = commands.git("show", "refs/remotes/origin/main:.dvc/config")
        except StoreError as error:
            raise DataError(f"{self.place}: not a label registry: no .dvc/config on main; name another repository") from error
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read_string(text)
            found = parser[f"'remote \"{parser['core']['remote']}\"'"]["url"]
        except (configparser.Error, KeyError) as error:
            raise DataError(
                f"{self.place}: .dvc/config names no default remote; set it with: dvc remote add -d storage URL"
            ) from error
        remote = _checked_remote(found, f"{self.place}: .dvc/config: remote", absolute=True)
        if self._remote and self._remote != remote:
            raise DataError(
                f"registry {self.place}: keeps its data in {remote}, not in {self._remote}; leave the remote out "
                "(--remote, NS_LABEL_REMOTE, registry.remote), or use another registry"
            )
        return remote

    def _set_up(self, folder: Path) -> None:
        """Makes the first commit of an empty repository. If two do, the first one's holds."""
        if self._remote is None:
            raise DataError(self._is_empty())
        folder.mkdir()
        commands = Commands(folder, folder.parent / "dvc", s3=False)
        commands.identify()
        commands.git("init", "--quiet")
        commands.git("remote", "add", "origin", self._url)
        commands.dvc("init")
        commands.dvc("remote", "add", "--default", "storage", self._remote)
        (folder / "README.md").write_text(README)
        (folder / ".gitignore").write_text(f"/{FOLDER}\n")
        commands.git("add", "--all")
        commands.git("commit", "--quiet", "--message=Set up the label registry")
        push = ["push", "--quiet"]
        if self._local:
            # A repository made by `git init` expects the branch that its owner's git starts with, and lets nobody push to it.
            commands.git("-C", self._url, "symbolic-ref", "HEAD", MAIN)
            push.append("--receive-pack=git -c receive.denyCurrentBranch=updateInstead receive-pack")
        try:
            commands.git(*push, "origin", f"HEAD:{MAIN}")
        except StoreError:
            if MAIN not in self._refs(commands):
                raise

    def _is_empty(self) -> str:
        return (
            f"registry {self.place}: is empty; say where its data shall lie, a folder or s3://bucket/prefix "
            "(--remote, NS_LABEL_REMOTE, registry.remote)"
        )


def _gather(labels: Store, label_set: LabelSet, selection: Selection | None, target: Path) -> tuple[File, ...]:
    """Copies a label set's files. Raises DataError if one is not what the manifest says."""
    with writing(target, "write"):
        target.mkdir()
        tree = LocalStore(target)
        for shard in label_set.shards:
            _copy(labels, shard.name, target)
            facts = marker(shard.name.removesuffix(".parquet") + ".tar")
            if labels.exists(facts):
                if LabelShard.read(labels, facts) != shard:
                    raise DataError(f"{labels.uri}/{facts}: not what {LABEL_SET} says of {shard.name}; label the pool again")
                _copy(labels, facts, target)
        _copy(labels, HISTOGRAM, target)
        label_set.write(tree, LABEL_SET)
        if selection:
            selection.write(tree, SELECTION)
        files = tuple(_hashed(target / key) for key in sorted(tree.list()))
    known = {file.name: file.sha256 for file in files}
    for shard in label_set.shards:
        if known[shard.name] != shard.sha256:
            raise DataError(f"{labels.uri}/{shard.name}: sha256 differs from {LABEL_SET}; label the pool again")
    return files


def _copy(labels: Store, key: str, target: Path) -> None:
    with labels.open(key) as source, (target / key).open("wb") as sink:
        shutil.copyfileobj(source, sink, CHUNK)


def _hashed(path: Path) -> File:
    md5 = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        _feed(file, md5)
    return File(name=path.name, bytes=path.stat().st_size, sha256=sha256_file(path), md5=md5.hexdigest())


def _feed(file: BinaryIO, sink: Any) -> None:
    while chunk := file.read(CHUNK):
        sink.update(chunk)


def _version(tag: Tag, label_set: LabelSet, selection: Selection | None, files: tuple[File, ...], directory: str) -> Version:
    return Version(
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


def _message(version: Version) -> str:
    facts = {
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
    return _with_facts(f"Label set of {version.run}, generation {version.generation}", facts)


def _with_facts(subject: str, facts: dict[str, Any]) -> str:
    """A message in git's form: subject, blank line, `Name: value` lines."""
    lines = [f"{name}: {value}" for name, value in facts.items() if value not in (None, "")]
    return "\n".join([subject, "", *lines]) + "\n"


def _facts(message: str) -> dict[str, str]:
    return dict(re.findall(r"^([A-Z][A-Za-z-]+): (.+)$", message, re.MULTILINE))


def _pointer(message: str) -> str | None:
    """The tag that a commit of `current/PROJECT` names."""
    return _facts(message).get("Tag")


def _described(commands: Commands, prefix: str) -> Iterator[tuple[str, str, str]]:
    """Name, date and message of each ref below a prefix."""
    text = commands.git("for-each-ref", "--format=%(refname)%00%(creatordate:iso-strict)%00%(contents)%00%00", prefix)
    for record in text.split("\0\0\n"):
        name, _, rest = record.partition("\0")
        if name:
            date, _, message = rest.partition("\0")
            yield name, date, message


def _ref(name: str) -> str:
    """The full name of a version's ref."""
    project = name.removeprefix("current/")
    if project != name:
        check_name("project", project)
        return f"refs/heads/{name}"
    return f"refs/tags/{Tag.parse(name)}"


def _matches(ref: str, pattern: str) -> bool:
    return ref.startswith(pattern[:-1]) if pattern.endswith("*") else ref == pattern


def _tracked(dvc_file: bytes) -> list[str]:
    """Hashes of what a .dvc file keeps."""
    return [out["md5"] for out in yaml.safe_load(dvc_file).get("outs", []) if "md5" in out]


def _used(clone: _Clone, refs: list[str], there: Mapping[str, int]) -> set[str]:
    """Keys in the remote that some ref needs. Raises DataError if one is missing."""
    store = open_store(clone.remote)
    used: set[str] = set()
    for ref in refs:
        names = clone.commands.git("ls-tree", "-r", "-z", "--name-only", clone.refs[ref]).split("\0")
        files = [clone.document(clone.refs[ref], name) for name in names if name.endswith(".dvc")]
        new = {_object(md5) for data in files for md5 in _tracked(data)} - used
        for folder in sorted(key for key in new if key.endswith(".dir") and key in there):
            new.update(_object(entry["md5"]) for entry in json.loads(store.get(folder)))
        lost = sorted(new - there.keys())
        if lost:
            raise DataError(
                f"{ref.removeprefix('refs/')}: {clone.remote}/{lost[0]} is missing, and {len(lost) - 1} files more; nothing "
                "was deleted; commit this label set again, or drop it"
            )
        used |= new
    return used


def _objects(remote: str) -> dict[str, int]:
    """Key and bytes of all that DVC keeps in the remote."""
    entries = open_store(remote).entries(OBJECTS)
    return {
        entry.key: entry.size
        for entry in entries
        if re.fullmatch(r"[0-9a-f]{2}/[0-9a-f]{30}(\.dir)?", entry.key[len(OBJECTS) :])
    }


def _absent(remote: str, version: Version) -> list[str]:
    """Keys of a version's data that the remote does not have, or has in another length."""
    there = _objects(remote)
    absent = [file.key for file in version.files if there.get(file.key) != file.bytes]
    return absent + [key for key in [_object(version.directory)] if key not in there]


def _object(md5: str) -> str:
    return f"{OBJECTS}{md5[:2]}/{md5[2:]}"


def _is_good(path: Path, file: File) -> bool:
    return path.is_file() and path.stat().st_size == file.bytes and sha256_file(path) == file.sha256


def _check_destination(destination: Path, version: Version) -> None:
    """Raises DataError unless the folder is empty, being filled, or holds this label set."""
    if not destination.exists():
        return
    if not destination.is_dir():
        raise DataError(f"{destination}: is a file; name a folder")
    if (destination / LABEL_SET).exists():
        there = LabelSet.read(LocalStore(destination), LABEL_SET).digest
        if there != version.label_set:
            raise DataError(f"{destination}: holds label set {there[:16]}, not {version.label_set[:16]}; name an empty folder")
    elif any(destination.iterdir()) and not (destination / UNFINISHED).exists():
        raise DataError(f"{destination}: is not empty; name an empty folder, or a new one")


def _checked_remote(remote: str, what: str = "remote", *, absolute: bool = False) -> str:
    """A folder's absolute path, or an S3 URI. Raises DataError for anything else."""
    scheme, separator, rest = remote.partition("://")
    if separator and (scheme != "s3" or not rest.strip("/") or "@" in rest.partition("/")[0]):
        raise DataError(
            f"{what} {redacted(remote)}: must be a folder or s3://bucket/prefix; credentials come from the environment"
        )
    if not separator and absolute and not Path(remote).is_absolute():
        raise DataError(f"{what} {remote}: must be an absolute path: every process works in a clone of its own")
    return remote.rstrip("/") if separator else str(Path(remote).absolute())
