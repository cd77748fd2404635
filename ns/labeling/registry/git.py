"""The git repository of a label registry: its setup, its clones, and DVC in them."""

import configparser
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from ns.core import log
from ns.core.errors import DataError, RunError, StoreError
from ns.core.git import GitCommands
from ns.core.printable import holds_credentials, redact_credentials
from ns.labeling.registry.model import LabelVersion, VersionTag
from ns.labeling.registry.storage import LABELS_DIR
from ns.storage.endpoint import S3Endpoint
from ns.storage.scratch import make_scratch_dir

MAIN_REF = "refs/heads/main"
CURRENT_PREFIX = "refs/heads/current/"
DVC_SECONDS = 12 * 3600
"""A limit for dvc, which moves the data."""

README_TEXT = """# Label registry

Versions of label sets, one tag each: `labels/PROJECT/RUN/gen-N`. `current/PROJECT` is the one in use.

    dvc get --rev labels/PROJECT/RUN/gen-1 THIS-REPOSITORY labels

A tag holds manifests and `labels.dvc`; the data is in the DVC remote (`.dvc/config`). `version.json` lists the files: the one with
md5 `abcdef…` is `files/md5/ab/cdef…` there. `ns labels` keeps this repository: push no data by hand, move no tag.
"""


class DvcCommands(GitCommands):
    """Runs git and dvc in one folder. All that dvc keeps beside its repository lies in `config_dir`."""

    def __init__(self, path: Path, config_dir: Path) -> None:
        super().__init__(path)
        self._config_dir = config_dir
        config_dir.mkdir(parents=True, exist_ok=True)
        # Files are moved into the cache and linked back; copies would take the space twice.
        (config_dir / "config").write_text(
            "[core]\n    analytics = false\n    check_update = false\n    autostage = false\n"
            '[cache]\n    type = "reflink,hardlink,copy"\n'
        )
        for name in [name for name in self._environment if name.startswith("DVC_")]:
            del self._environment[name]
        self._environment |= {
            "DVC_NO_ANALYTICS": "1",
            "DVC_GLOBAL_CONFIG_DIR": str(config_dir),
            "DVC_SYSTEM_CONFIG_DIR": str(config_dir / "system"),
            # dvc remembers here what it has seen in a remote, and another process may have deleted it since.
            "DVC_SITE_CACHE_DIR": str(config_dir / "site"),
        }

    def use_s3(self) -> None:
        """Gives dvc the server and the credentials of `ns.storage`. Raises StoreError when there are no credentials."""
        # The owner's profiles say another thing than the environment that `ns.storage` goes by.
        for name in ("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_SESSION_TOKEN"):
            self._environment.pop(name, None)
        empty_file = self._config_dir / "aws"
        empty_file.touch()
        self._environment |= S3Endpoint.from_environment().build_boto_environment(empty_file)

    def run_dvc(self, *arguments: str) -> str:
        """What dvc prints; never with --quiet, which would keep its errors back too. Raises StoreError."""
        beside_python = Path(sys.executable).parent / "dvc"
        executable = str(beside_python) if beside_python.exists() else shutil.which("dvc")
        if executable is None:
            raise StoreError("dvc: is not installed; install it with: pip install 'noisy-student[versions]'")
        return self._run_command([executable, *arguments], f"dvc {arguments[0]}", DVC_SECONDS, None)


class RegistryClone(NamedTuple):
    commands: DvcCommands
    remote: str
    """Folder or URI of the data."""
    refs: dict[str, str]
    """Name → hash of the refs asked for, as the registry had them when the clone was made."""

    @property
    def path(self) -> Path:
        return self.commands.path

    def list_files(self, ref: str) -> list[str]:
        return self.commands.run_git("ls-tree", "-r", "-z", "--name-only", self.refs[ref]).split("\0")[:-1]

    def read_version(self, ref: str) -> LabelVersion:
        """Raises DataError if the ref is no version."""
        name = ref.removeprefix("refs/tags/").removeprefix("refs/heads/")
        try:
            text = self.commands.run_git("show", f"{self.refs[ref]}:{LabelVersion.filename}")
        except StoreError as error:
            raise DataError(f"{name}: has no {LabelVersion.filename}; it was not made by `ns labels commit`") from error
        return LabelVersion.parse(text.encode(), f"{name}:{LabelVersion.filename}")

    def iterate_versions(self, refs: Iterable[str]) -> Iterator[tuple[str, LabelVersion]]:
        """Yields the refs that are versions. One that another program made is left out, with a warning: it must not hide the others."""
        for ref in refs:
            try:
                version = self.read_version(ref)
            except DataError as error:
                log.get_logger().warning("passed over", ref=ref, reason=str(error))
                continue
            yield ref, version

    def find_current_tags(self) -> set[VersionTag]:
        """The versions in use, in a clone with `current/*`."""
        refs = [ref for ref in self.refs if ref.startswith(CURRENT_PREFIX)]
        return {version.tag for _, version in self.iterate_versions(refs)}


class RegistryRepository:
    """The git repository of a label registry, by its URL or path. An empty repository is set up when it is first used.

    `remote` is a folder or `s3://bucket/prefix`; needed for the setup, later the registry knows. Credentials come from the
    environment: those of S3 as for any store, those of git from its helpers and keys. All methods raise StoreError when a
    command fails or the data cannot be reached, DataError when the repository is no label registry.
    """

    def __init__(self, git_uri: str, remote: str | None = None) -> None:
        if not git_uri or git_uri.startswith("-"):
            raise DataError(f"registry {git_uri!r}: must be the URL or the path of a git repository")
        self._local = "://" not in git_uri and (Path(git_uri).exists() or not re.match(r"[\w.@-]+:", git_uri))
        self._git_uri = str(Path(git_uri).absolute()) if self._local else git_uri
        self._remote = _validate_remote(remote) if remote else None
        self.redacted_uri = redact_credentials(self._git_uri)

    def locate_data(self) -> str:
        """The folder or URI of the data."""
        with self.open_clone() as clone:
            return clone.remote

    def check_push_access(self) -> str:
        """Asks the git server whether a version might be pushed, and pushes nothing; an empty repository stays empty.

        Returns the folder or URI of the data. Raises what `LabelRegistry.commit_version` raises.
        """
        with make_scratch_dir("registry") as scratch_dir:
            commands = self._init_repository(scratch_dir / "clone")
            commands.ensure_identity()
            is_empty = not self.list_refs(commands)
            commands.run_git("commit", "--quiet", "--allow-empty", "--message=Nothing")
            commands.run_git("push", "--quiet", "--dry-run", "origin", "HEAD:refs/tags/labels/doctor")
        return self._require_remote() if is_empty else self.locate_data()

    @contextmanager
    def open_clone(self, *patterns: str) -> Iterator[RegistryClone]:
        """A clone with `main` and those of the refs wanted that exist. A pattern is a ref, or a prefix and `*`."""
        with make_scratch_dir("registry") as scratch_dir:
            commands = self._init_repository(scratch_dir / "clone")
            refs = self.list_refs(commands)
            if not refs:
                self._set_up_repository(scratch_dir / "new")
                refs = self.list_refs(commands)
            if MAIN_REF not in refs:
                raise DataError(
                    f"{self.redacted_uri}: not a label registry: it has no branch main; name a repository of its own, or an empty one"
                )
            matching = [ref for ref in refs if any(fnmatchcase(ref, pattern) for pattern in (MAIN_REF, *patterns))]
            specs = [f"+{ref}:{ref.replace('refs/heads/', 'refs/remotes/origin/')}" for ref in matching]
            commands.run_git("fetch", "--quiet", "--depth=1", "--no-tags", "--stdin", "origin", data="\n".join(specs) + "\n")
            remote = self._read_remote(commands)
            if remote.startswith("s3://"):
                commands.use_s3()
            commands.ensure_identity()
            yield RegistryClone(commands, remote, {ref: refs[ref] for ref in matching})

    def list_refs(self, commands: GitCommands) -> dict[str, str]:
        """Name → hash of the branches and tags that the registry has now."""
        try:
            lines = commands.run_git("ls-remote", "--heads", "--tags", "--refs", "origin").splitlines()
        except StoreError as error:
            is_missing = self._local and not Path(self._git_uri).exists()
            hint = f"; for a new registry: git init --bare {self._git_uri}" if is_missing else ""
            raise StoreError(f"registry {self.redacted_uri}: {error}{hint}") from error
        return {name: value for value, _, name in (line.partition("\t") for line in lines)}

    def require_ref(self, clone: RegistryClone, name: str, ref: str) -> None:
        """Raises RunError unless the clone has the ref of a version."""
        if ref not in clone.refs:
            raise RunError(f"{name}: no such version in {self.redacted_uri}; `ns labels list` has them")

    def _init_repository(self, path: Path) -> DvcCommands:
        path.mkdir()
        commands = DvcCommands(path, path.parent / "dvc")
        commands.run_git("init", "--quiet")
        commands.run_git("remote", "add", "origin", self._git_uri)
        return commands

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
        """Makes the first commit of an empty repository. If two processes do, the first commit stays."""
        remote = self._require_remote()
        commands = self._init_repository(path)
        commands.ensure_identity()
        commands.run_dvc("init")
        commands.run_dvc("remote", "add", "--default", "storage", remote)
        (path / "README.md").write_text(README_TEXT)
        (path / ".gitignore").write_text(f"/{LABELS_DIR}\n")
        commands.run_git("add", "--all")
        commands.run_git("commit", "--quiet", "--message=Set up the label registry")
        push = ["push", "--quiet"]
        if self._local:
            # A repository made by `git init` expects the branch that its owner's git starts with, and takes no push to it.
            commands.run_git("-C", self._git_uri, "symbolic-ref", "HEAD", MAIN_REF)
            push.append("--receive-pack=git -c receive.denyCurrentBranch=updateInstead receive-pack")
        try:
            commands.run_git(*push, "origin", f"HEAD:{MAIN_REF}")
        except StoreError:
            if MAIN_REF not in self.list_refs(commands):
                raise

    def _require_remote(self) -> str:
        if self._remote is None:
            raise DataError(
                f"registry {self.redacted_uri}: is empty; say where its data shall lie, a folder or s3://bucket/prefix "
                "(--remote, NS_LABEL_REMOTE, registry.remote)"
            )
        return self._remote


def _validate_remote(remote: str, what: str = "remote", *, absolute: bool = False) -> str:
    """A folder's absolute path, or an S3 URI. Raises DataError for anything else."""
    scheme, separator, rest = remote.partition("://")
    if separator and (scheme != "s3" or not rest.strip("/") or holds_credentials(remote)):
        raise DataError(
            f"{what} {redact_credentials(remote)}: must be a folder or s3://bucket/prefix; credentials come from the environment"
        )
    if not separator and absolute and not Path(remote).is_absolute():
        raise DataError(f"{what} {remote}: must be an absolute path: every process works in a clone of its own")
    return remote.rstrip("/") if separator else str(Path(remote).absolute())
