"""Versions of label sets, with real git and real dvc."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ns.cli import app as cli
from ns.config.loader import load_experiment
from ns.config.schema import RegistryConfig, SelectionConfig
from ns.core.digest import sha256_bytes
from ns.core.errors import ConfigError, DataError, RunError, StoreError
from ns.core.git import GitCommands
from ns.core.printable import redact_credentials
from ns.labeling.label_set import (
    LabelSet,
    LabelShard,
    build_histogram_table,
    build_row_schema,
    compute_histogram,
    read_label_rows,
)
from ns.labeling.registry import LabelRegistry, LabelVersion, VersionTag
from ns.labeling.registry.gc import SPARED_SECONDS, collect_garbage
from ns.labeling.registry.git import DvcCommands
from ns.labeling.registry.storage import find_missing_keys, object_key
from ns.labeling.selection import make_selection
from ns.runs.lifecycle import derive_run_name, open_run
from ns.runs.lookup import open_label_set
from ns.stages.context import RunRef
from ns.stages.label import label_shards, split_pool
from ns.stages.prepare import prepare_data
from ns.stages.select import commit_labels
from ns.stages.train import train_generation
from ns.storage import LocalStore
from tests.storage.faults import Proxy

CLASSES = ("a", "b", "c")


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """No settings of the machine's owner."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "NS_S3_", "NS_LABEL_", "GIT_", "DVC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def make_label_set(folder: Path, seed: int = 0, shards: int = 2, rows: int = 40) -> tuple[LocalStore, LabelSet]:
    """A label set as the loop leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    store = LocalStore(folder)
    generator = np.random.default_rng(seed)
    facts, counts = [], np.zeros((3, 1000), np.uint64)
    for number in range(shards):
        probabilities = -np.sort(-generator.dirichlet((0.3, 0.3, 0.3), rows).astype(np.float16), axis=1)
        order = np.stack([generator.permutation(3) for _ in range(rows)]).astype(np.uint16)
        confidence = probabilities[:, 0].astype(np.float32)
        table = pa.table(
            [
                [f"{number}-{row:04}" for row in range(rows)],
                confidence,
                pa.array(list(order), pa.list_(pa.uint16(), 3)),
                pa.array(list(probabilities), pa.list_(pa.float16(), 3)),
                pa.nulls(rows, pa.string()),
            ],
            schema=build_row_schema(3),
        )
        name = f"shard-{number:05}"
        pq.write_table(table, folder / f"{name}.parquet")
        data = (folder / f"{name}.parquet").read_bytes()
        shard = LabelShard(
            name=f"{name}.parquet", source="0" * 64, rows=rows, unreadable=0, bytes=len(data), sha256=sha256_bytes(data)
        )
        shard.save_file(store, f"{name}.json")
        facts.append(shard)
        counts += compute_histogram(order[:, 0], confidence, 3)
    pq.write_table(build_histogram_table(counts), folder / "histogram.parquet")
    label_set = LabelSet(dataset="1" * 64, teacher="2" * 64, code="3" * 64, classes=CLASSES, top_k=3, shards=tuple(facts))
    label_set.save_file(store, "labelset.json")
    return store, label_set


def make_test_selection(store: LocalStore, label_set: LabelSet):
    policy = SelectionConfig(per_class=10)
    return make_selection(store, label_set, policy, seed=0, label_set_key="store/labels/x")


def make_bare_repository(folder: Path) -> str:
    subprocess.run(["git", "init", "--quiet", "--bare", str(folder)], check=True)
    return str(folder)


def git(repository: str, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", repository, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("field", ["name", "sha256", "md5", "directory"])
@pytest.mark.parametrize("value", ["/etc/passwd", "../../etc/passwd", "a/../../b"])
def test_version_names_only_files_of_its_folder(field, value):
    file = {"name": "a.parquet", "bytes": 1, "sha256": "0" * 64, "md5": "0" * 32}
    fields = {"label_set": "1", "dataset": "2", "teacher": "3", "selection": None, "rows": 1, "kept": None, "images": None}
    fields |= {**VersionTag("p", "r", 1)._asdict(), "directory": f"{'0' * 32}.dir", "files": [file]}
    assert LabelVersion.validate_fields(fields, "version.json").files[0].name == "a.parquet"
    (fields if field in fields else file)[field] = value
    with pytest.raises(DataError, match=rf"version\.json: (files\.0\.)?{field}: "):
        LabelVersion.validate_fields(fields, "version.json")


def test_version_tag_refuses_invalid_names():
    assert str(VersionTag.parse("labels/digits/digits-0a1b/gen-2")) == "labels/digits/digits-0a1b/gen-2"
    for project in ("", "a b", "a..b", "x.lock", "-x", "ä", "a/b", "a~1", ".x", "x" * 101):
        with pytest.raises(DataError, match=r"project .* cannot be part of a tag"):
            VersionTag.from_parts(project, "run", 1)
    with pytest.raises(DataError, match="generations count from 1"):
        VersionTag.from_parts("p", "r", 0)
    for text in (
        "gen-1",
        "labels/p/r/gen-0",
        "labels/p/r/gen-1\n",
        "labels/p/gen-1",
        "labels/p/r/gen-1/x",
        "labels/p/../gen-1",
    ):
        with pytest.raises(DataError):
            VersionTag.parse(text)


def test_git_commands_use_login_of_environment(tmp_path, monkeypatch):
    question = "protocol=https\nhost=git.example\n\n"
    monkeypatch.setenv("NS_GIT_HOST", "git.example")
    for name, value, user in (("NS_GIT_PASSWORD", "to'k%n", "git"), ("NS_GIT_USERNAME", "robot", "robot")):
        monkeypatch.setenv(name, value)
        commands = GitCommands(tmp_path)
        told = commands.run_git("credential", "fill", data=question).splitlines()
        assert {f"username={user}", "password=to'k%n"} <= set(told)
    assert commands._find_reason("fatal: to'k%n was refused") == "fatal: … was refused"
    for elsewhere in ("protocol=https\nhost=evil.example\n\n", "protocol=http\nhost=git.example\n\n"):
        with pytest.raises(StoreError, match="git credential: fatal: could not read Username"):
            commands.run_git("credential", "fill", data=elsewhere)
    for host in ("", "git.example/x", "git.example\n"):
        monkeypatch.setenv("NS_GIT_HOST", host)
        with pytest.raises(ConfigError, match="NS_GIT_PASSWORD goes to one host only"):
            GitCommands(tmp_path)


def test_registry_refuses_invalid_uris(tmp_path):
    for remote in ("gs://x", "s3://", "s3://key:secret@bucket/x"):
        with pytest.raises(DataError, match="must be a folder or s3://bucket/prefix") as caught:
            LabelRegistry(str(tmp_path), remote)
        assert "secret" not in str(caught.value)
    with pytest.raises(DataError, match="URL or the path of a git repository"):
        LabelRegistry("--upload-pack=x")
    with pytest.raises(StoreError, match=r"git ls-remote: .*; for a new registry: git init --bare"):
        LabelRegistry(str(tmp_path / "none")).list_versions()
    with pytest.raises(DataError, match="is empty; say where its data shall lie"):
        LabelRegistry(make_bare_repository(tmp_path / "git")).list_versions()


def test_git_commands_name_failure_without_password(tmp_path):
    commands = GitCommands(tmp_path)
    with pytest.raises(StoreError, match=r"^git ls-remote: fatal: ") as caught:
        commands.run_git("ls-remote", "http://user:pass@word@127.0.0.1:9/x.git")
    assert "word" not in str(caught.value)
    assert "127.0.0.1" in str(caught.value)
    assert redact_credentials("to https://token@host/x failed") == "to https://…@host/x failed"
    slow = GitCommands(tmp_path, git_seconds=0.2)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StoreError, match=r"git hash-object: took longer than 0.2 s"):
        slow.run_git("hash-object", "pipe")


def test_registry_refuses_foreign_repository(tmp_path):
    git_uri = make_bare_repository(tmp_path / "git")
    work = tmp_path / "work"
    subprocess.run(["git", "clone", "--quiet", git_uri, str(work)], check=True, capture_output=True)
    git(str(work), "-c", "user.name=x", "-c", "user.email=x@y", "commit", "--quiet", "--allow-empty", "-m", "x")
    git(str(work), "push", "--quiet", "origin", "HEAD:refs/heads/main")
    with pytest.raises(DataError, match=r"not a label registry: no .dvc/config on main"):
        LabelRegistry(git_uri, str(tmp_path / "remote")).list_versions()


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """A registry with one version."""
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder / "home"))
        store, label_set = make_label_set(folder / "labels")
        git_uri = make_bare_repository(folder / "git")
        registry = LabelRegistry(git_uri, str(folder / "remote"))
        assert registry.commit_version(VersionTag("p", "r", 1), store, label_set, make_test_selection(store, label_set))
    return folder, git_uri, store, label_set


@pytest.mark.integration
def test_version_has_manifests_in_git_and_data_in_remote(committed):
    folder, git_uri, store, label_set = committed
    tag = "labels/p/r/gen-1"
    assert git(git_uri, "cat-file", "-t", tag) == "tag"
    assert git(git_uri, "ls-tree", "--name-only", tag).split() == [
        ".dvc", ".dvcignore", ".gitignore", "README.md", "labels.dvc", "labelset.json", "selection.json", "version.json",
    ]  # fmt: skip
    assert git(git_uri, "for-each-ref", "--format=%(refname)").split() == ["refs/heads/main", f"refs/tags/{tag}"]
    message = git(git_uri, "for-each-ref", "--format=%(contents)", f"refs/tags/{tag}")
    assert message == "Label set of r, generation 1"
    version = json.loads(git(git_uri, "show", f"{tag}:version.json"))
    assert {file["name"] for file in version["files"]} == {
        "histogram.parquet", "labelset.json", "selection.json",
        "shard-00000.json", "shard-00001.json", *(shard.name for shard in label_set.shards),
    }  # fmt: skip
    # By hand, without DVC.
    for file in version["files"]:
        data = (folder / "remote" / "files" / "md5" / file["md5"][:2] / file["md5"][2:]).read_bytes()
        assert sha256_bytes(data) == file["sha256"]
        assert hashlib.md5(data).hexdigest() == file["md5"]
        if file["name"] != "selection.json":
            assert data == store.get(file["name"])


@pytest.mark.integration
def test_versions_are_listed_found_and_downloaded(committed, tmp_path):
    folder, git_uri, _, label_set = committed
    registry = LabelRegistry(git_uri)
    ((version, _, current),) = registry.list_versions()
    assert (str(version.tag), version.label_set, version.rows, current) == ("labels/p/r/gen-1", label_set.digest, 80, False)
    destination = tmp_path / "there"
    shown = registry.download_version("labels/p/r/gen-1", destination)
    assert contents(folder / "labels").items() <= contents(destination).items()
    assert {file.name for file in shown.files} == set(contents(destination))
    with pytest.raises(RunError, match=r"labels/p/r/gen-2: no such version"):
        registry.find_version("labels/p/r/gen-2")


@pytest.mark.integration
def test_commands_name_what_they_lack(tmp_path, monkeypatch, capsys):
    assert cli.run_command_line(["labels", "list"]) == 2
    assert "no label registry: give --registry, the URL or path of its git repository" in capsys.readouterr().err
    monkeypatch.setattr("ns.labeling.registry.git.sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StoreError, match=r"dvc: is not installed; install it with: pip install 'noisy-student\[versions\]'"):
        DvcCommands(tmp_path, tmp_path / "config").run_dvc("push")


@pytest.mark.integration
def test_list_versions_sorts_across_time_zones(tmp_path, monkeypatch):
    registry = LabelRegistry(make_bare_repository(tmp_path / "git"), str(tmp_path / "remote"))
    for number, date in enumerate(("2026-01-01T10:00:00+0000", "2026-01-01T12:00:00+0900"), 1):
        monkeypatch.setenv("GIT_COMMITTER_DATE", date)
        registry.commit_version(VersionTag("p", "r", number), *make_label_set(tmp_path / f"labels{number}", seed=number))
    assert [str(summary.version.tag) for summary in registry.list_versions()] == ["labels/p/r/gen-2", "labels/p/r/gen-1"]


@pytest.mark.integration
def test_download_names_unwritable_destination(committed, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file/there: cannot write: a part of this path is a file, expected a folder"):
        LabelRegistry(committed[1]).download_version("labels/p/r/gen-1", tmp_path / "file" / "there")


@pytest.mark.integration
def test_list_versions_passes_over_a_foreign_tag_and_branch(committed):
    git_uri = committed[1]
    before = LabelRegistry(git_uri).list_versions()
    assert before
    refs = ("refs/tags/labels/p/mine/gen-1", "refs/heads/current/mine")
    try:
        for ref in refs:
            git(git_uri, "update-ref", ref, "refs/heads/main")
        assert LabelRegistry(git_uri).list_versions() == before
    finally:
        for ref in refs:
            git(git_uri, "update-ref", "-d", ref)


@pytest.mark.integration
def test_download_keeps_intact_files_and_refuses_foreign_folders(committed, tmp_path):
    folder, git_uri, _, label_set = committed
    destination = tmp_path / "there"
    (destination / ".tmp-get").mkdir(parents=True)
    whole, half = (destination / shard.name for shard in label_set.shards)
    shutil.copy(folder / "labels" / whole.name, destination)
    half.write_bytes(b"half")
    before = whole.stat().st_mtime_ns
    LabelRegistry(git_uri).download_version("labels/p/r/gen-1", destination)
    assert whole.stat().st_mtime_ns == before
    assert contents(folder / "labels").items() <= contents(destination).items()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "letter.txt").write_text("mine")
    with pytest.raises(DataError, match="is not empty; name an empty folder"):
        LabelRegistry(git_uri).download_version("labels/p/r/gen-1", foreign)
    make_label_set(tmp_path / "other", seed=9)
    with pytest.raises(DataError, match="holds label set"):
        LabelRegistry(git_uri).download_version("labels/p/r/gen-1", tmp_path / "other")


@pytest.mark.integration
def test_commit_again_succeeds_and_refuses_another_label_set(committed, tmp_path):
    _, git_uri, store, label_set = committed
    selection = make_test_selection(store, label_set)
    assert not LabelRegistry(git_uri).commit_version(VersionTag("p", "r", 1), store, label_set, selection)
    other, different = make_label_set(tmp_path / "other", seed=1)
    with pytest.raises(RunError, match=r"labels/p/r/gen-1: holds label set .* already, .*ns labels gc --drop labels/p/r/gen-1"):
        LabelRegistry(git_uri).commit_version(VersionTag("p", "r", 1), other, different)
    with pytest.raises(RunError, match="holds selection"):
        LabelRegistry(git_uri).commit_version(
            VersionTag("p", "r", 1), store, label_set, selection.model_copy(update={"seed": 5})
        )
    with pytest.raises(DataError, match=r"keeps its data in .*, not in .*; leave the remote out"):
        LabelRegistry(git_uri, str(tmp_path / "elsewhere")).list_versions()


@pytest.mark.integration
def test_plain_dvc_gets_version(committed, tmp_path):
    folder, git_uri, _, _ = committed
    dvc = Path(sys.executable).parent / "dvc"
    command = [dvc, "get", "--quiet", "--rev", "labels/p/r/gen-1", git_uri, "labels", "--out", tmp_path / "out"]
    subprocess.run(command, check=True, env={**os.environ, "DVC_NO_ANALYTICS": "1"})
    assert contents(folder / "labels").items() <= contents(tmp_path / "out").items()


@pytest.mark.integration
def test_download_replaces_damaged_files(committed, tmp_path):
    folder, git_uri, _, label_set = committed
    LabelRegistry(git_uri).download_version("labels/p/r/gen-1", tmp_path / "there")
    assert contents(folder / "labels").items() <= contents(tmp_path / "there").items()
    assert not (tmp_path / "there" / ".tmp-get").exists()
    # A damaged file is fetched again; a good folder needs no remote.
    shard = tmp_path / "there" / label_set.shards[1].name
    shard.write_bytes(b"x")
    LabelRegistry(git_uri).download_version("labels/p/r/gen-1", tmp_path / "there")
    assert contents(folder / "labels").items() <= contents(tmp_path / "there").items()
    (folder / "remote").rename(folder / "away")
    try:
        LabelRegistry(git_uri).download_version("labels/p/r/gen-1", tmp_path / "there")
        with pytest.raises((StoreError, DataError)):
            LabelRegistry(git_uri).download_version("labels/p/r/gen-1", tmp_path / "elsewhere")
        assert not (tmp_path / "elsewhere" / "labelset.json").exists()
    finally:
        (folder / "away").rename(folder / "remote")


@pytest.mark.integration
def test_commit_pushes_lost_data_again(tmp_path):
    store, label_set = make_label_set(tmp_path / "labels")
    registry = LabelRegistry(make_bare_repository(tmp_path / "git"), str(tmp_path / "remote"))
    registry.commit_version(VersionTag("p", "r", 1), store, label_set)
    version = registry.find_version("labels/p/r/gen-1")
    lost = next(file for file in version.files if file.name == label_set.shards[1].name)
    half = tmp_path / "remote" / object_key(lost.md5)
    half.chmod(0o644)
    half.write_bytes(b"half")
    with pytest.raises(DataError, match=rf"{lost.name} of labels/p/r/gen-1\): is missing or damaged"):
        registry.download_version("labels/p/r/gen-1", tmp_path / "there")
    (tmp_path / "remote" / object_key(version.files[0].md5)).unlink()
    with pytest.raises(DataError, match=r"labels/p/r/gen-1: .* and 0 more files are missing; nothing was deleted"):
        collect_garbage(registry, dry_run=False)
    assert not registry.commit_version(VersionTag("p", "r", 1), store, label_set)
    registry.download_version("labels/p/r/gen-1", tmp_path / "there")


@pytest.mark.integration
def test_set_current_promotes_and_rolls_back(tmp_path):
    git_uri = make_bare_repository(tmp_path / "git")
    registry = LabelRegistry(git_uri, str(tmp_path / "remote"))
    for number in (1, 2):
        registry.commit_version(VersionTag("p", "r", number), *make_label_set(tmp_path / f"labels{number}", seed=number))
    with pytest.raises(RunError, match="no version is in use yet"):
        registry.set_current(VersionTag("p", "r", 1), "", is_rollback=True)
    with pytest.raises(RunError, match=r"labels/p/r/gen-3: no such version"):
        registry.set_current(VersionTag("p", "r", 3), "")
    assert registry.set_current(VersionTag("p", "r", 2), "better") is None
    assert [str(summary.version.tag) for summary in registry.list_versions() if summary.current] == ["labels/p/r/gen-2"]
    assert registry.set_current(VersionTag("p", "r", 1), "4 and 9\nare confused", is_rollback=True) == VersionTag("p", "r", 2)
    assert registry.set_current(VersionTag("p", "r", 1), "again", is_rollback=True) == VersionTag("p", "r", 1)
    assert registry.find_version("current/p").generation == 1
    log = git(git_uri, "log", "--format=%s|%b", "--first-parent", "-2", "current/p")
    assert "Go back to labels/p/r/gen-1|4 and 9 are confused" in log
    registry.download_version("current/p", tmp_path / "there")
    assert contents(tmp_path / "labels1").items() <= contents(tmp_path / "there").items()
    with pytest.raises(RunError, match=r"is in use \(current/p\)"):
        collect_garbage(registry, [VersionTag("p", "r", 1)])


@pytest.mark.integration
def test_collect_garbage_deletes_only_unneeded_data(tmp_path):
    git_uri = make_bare_repository(tmp_path / "git")
    registry = LabelRegistry(git_uri, str(tmp_path / "remote"))
    first, common = make_label_set(tmp_path / "labels1", shards=1)
    second, longer = make_label_set(tmp_path / "labels2", shards=2)
    assert common.shards[0] == longer.shards[0]
    registry.commit_version(VersionTag("p", "r", 1), first, common)
    registry.commit_version(VersionTag("p", "r", 2), second, longer)
    files = contents(tmp_path / "remote")
    assert collect_garbage(registry, dry_run=False).keys == ()
    planned = collect_garbage(registry, [VersionTag("p", "r", 2)])
    assert contents(tmp_path / "remote") == files
    assert len(registry.list_versions()) == 2
    kept_files = {f"files/md5/{hashlib.md5(data).hexdigest()[:2]}" for data in contents(tmp_path / "labels1").values()}
    done = collect_garbage(registry, [VersionTag("p", "r", 2)], dry_run=False)
    assert done == planned
    left = contents(tmp_path / "remote")
    assert files.keys() - left.keys() == set(planned.keys)
    assert planned.bytes == sum(len(files[key]) for key in planned.keys)
    assert kept_files <= {key[:12] for key in left}
    # DVC is of the same opinion.
    work = tmp_path / "work"
    subprocess.run(["git", "clone", "--quiet", git_uri, str(work)], check=True)
    dvc = str(Path(sys.executable).parent / "dvc")
    subprocess.run([dvc, "gc", "--all-tags", "--cloud", "--force"], check=True, cwd=work, capture_output=True)
    assert contents(tmp_path / "remote") == left
    assert [str(summary.version.tag) for summary in registry.list_versions()] == ["labels/p/r/gen-1"]
    registry.download_version("labels/p/r/gen-1", tmp_path / "there")


@pytest.mark.integration
def test_collect_garbage_refuses_refs_with_other_data(tmp_path):
    git_uri, work = make_bare_repository(tmp_path / "git"), tmp_path / "work"
    registry = LabelRegistry(git_uri, str(tmp_path / "remote"))
    registry.commit_version(VersionTag("p", "r", 1), *make_label_set(tmp_path / "labels"))
    subprocess.run(["git", "clone", "--quiet", git_uri, str(work)], check=True)
    (work / "other.dvc").write_text("outs: []\n")
    git(str(work), "add", "other.dvc")
    git(str(work), "-c", "user.name=x", "-c", "user.email=x@y", "commit", "--quiet", "-m", "x")
    git(str(work), "tag", "mine")
    git(str(work), "push", "--quiet", "origin", "mine")
    files = contents(tmp_path / "remote")
    with pytest.raises(DataError, match=r"tags/mine: keeps data that `ns labels commit` did not put there \(other.dvc\)"):
        collect_garbage(registry, [VersionTag("p", "r", 1)], dry_run=False)
    assert contents(tmp_path / "remote") == files
    assert len(registry.list_versions()) == 1


@pytest.mark.integration
def test_registry_in_repository_with_work_tree(tmp_path):
    subprocess.run(["git", "init", "--quiet", str(tmp_path / "git")], check=True)
    registry = LabelRegistry(str(tmp_path / "git"), str(tmp_path / "remote"))
    registry.commit_version(VersionTag("p", "r", 1), *make_label_set(tmp_path / "labels"))
    assert git(str(tmp_path / "git"), "status", "--porcelain") == ""
    assert (tmp_path / "git" / "README.md").exists()
    registry.download_version("labels/p/r/gen-1", tmp_path / "there")


COMMIT = """
import sys
from ns.labeling.label_set import LabelSet
from ns.labeling.registry import LabelRegistry, VersionTag
from ns.storage import LocalStore
git_uri, remote, labels, tag = sys.argv[1:]
folder = LocalStore(__import__("pathlib").Path(labels))
print(LabelRegistry(git_uri, remote).commit_version(VersionTag.parse(tag), folder, LabelSet.load(folder)))
"""


def start_commit(git_uri: str, remote: Path | str, labels: Path, tag: str) -> subprocess.Popen:
    command = [sys.executable, "-c", COMMIT, git_uri, str(remote), str(labels), tag]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.integration
def test_concurrent_commits_all_succeed(tmp_path):
    """Into an empty repository: they set it up at once, too. Two of them commit the same."""
    git_uri, remote = make_bare_repository(tmp_path / "git"), tmp_path / "remote"
    for number in (1, 2):
        make_label_set(tmp_path / f"labels{number}", seed=number)
    jobs = [(1, "labels/p/a/gen-1"), (2, "labels/p/b/gen-1"), (2, "labels/p/b/gen-1")]
    processes = [start_commit(git_uri, remote, tmp_path / f"labels{number}", tag) for number, tag in jobs]
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert git(git_uri, "rev-list", "--count", "main") == "1"
    # By time, and nobody knows who was first.
    assert sorted(str(summary.version.tag) for summary in LabelRegistry(git_uri).list_versions()) == [
        "labels/p/a/gen-1",
        "labels/p/b/gen-1",
    ]
    for number, tag in jobs:
        LabelRegistry(git_uri).download_version(tag, tmp_path / "there" / tag)
        assert contents(tmp_path / f"labels{number}").items() <= contents(tmp_path / "there" / tag).items()


KILLED_COMMIT = (
    """
import os, signal, sys, threading
kill, command, seconds = getattr(os, sys.argv.pop()), int(sys.argv.pop()), float(sys.argv.pop())
started = 0

def count_commands(event, _):
    global started
    if event == "subprocess.Popen":
        started += 1
        if started == command:
            threading.Timer(seconds, kill, (os.getpid(), signal.SIGKILL)).start()

sys.addaudithook(count_commands)
"""
    + COMMIT
    + "kill(os.getpid(), signal.SIGKILL)\n"
)
"""Is killed some seconds after it has started so many commands; at the latest when it is ready."""


@pytest.mark.integration
@pytest.mark.parametrize("kill", ["kill", "killpg"])
def test_killed_commit_leaves_no_tag_without_data(tmp_path, kill):
    """Alone, and together with the commands that it has started."""
    git_uri, remote = make_bare_repository(tmp_path / "git"), tmp_path / "remote"
    make_label_set(tmp_path / "labels", shards=20, rows=5000)
    generator = np.random.default_rng(len(kill))
    # The first commit starts 25 commands, later ones about 14; those of dvc take most of a second each.
    for generation, command in enumerate(generator.integers(1, 15, 5), start=1):
        tag = f"labels/p/r/gen-{generation}"
        arguments = [git_uri, remote, tmp_path / "labels", tag, generator.uniform(0, 0.5), command, kill]
        killed = subprocess.run(
            [sys.executable, "-c", KILLED_COMMIT, *map(str, arguments)], capture_output=True, timeout=60, start_new_session=True
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        if remote.exists():
            for summary in LabelRegistry(git_uri).list_versions():
                assert find_missing_keys(str(remote), summary.version) == []
        again = start_commit(git_uri, remote, tmp_path / "labels", tag)
        _, err = again.communicate(timeout=120)
        assert again.returncode == 0, err
        LabelRegistry(git_uri).download_version(tag, tmp_path / "there" / str(generation))
        # What was pushed before must not make the next attempt easier.
        if generation % 2:
            shutil.rmtree(remote)
            git(git_uri, "tag", "--delete", tag)


@pytest.fixture(params=["moto", "swift"])
def server(request, tmp_path_factory, monkeypatch):
    """A bucket on an S3 server that needs keys; its URI."""
    from minio import Minio

    if request.param == "moto":
        from moto.server import ThreadedMotoServer

        running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        running.start()
        host, port = running.get_host_and_port()
        url, stop = f"http://{host}:{port}", running.stop
    else:
        from tests.storage.swift import Swift, reason_against

        reason = reason_against()
        if reason:
            pytest.skip(reason)
        swift = Swift(tmp_path_factory.mktemp("swift"))
        swift.start()
        # This Swift ends its answers to HEAD with the end of a body that they do not have, which dvc's client takes for the
        # next answer. What stands between puts that right.
        between = Proxy(swift.url)
        url = between.url

        def stop():
            between.close()
            swift.kill()

    for name, value in {
        "AWS_ACCESS_KEY_ID": "test:tester",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_ENDPOINT_URL": url,
        "AWS_PROFILE": "another-profile",
        "NS_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
    }.items():
        monkeypatch.setenv(name, value)
    client = Minio(
        endpoint=url.removeprefix("http://"), access_key="test:tester", secret_key="testing", secure=False, region="us-east-1"
    )
    client.make_bucket(bucket_name="labels")
    yield "s3://labels/some/prefix"
    stop()


@pytest.mark.integration
def test_registry_data_in_s3(server, tmp_path, monkeypatch):
    store, label_set = make_label_set(tmp_path / "labels")
    git_uri = make_bare_repository(tmp_path / "git")
    registry = LabelRegistry(git_uri, server)
    assert registry.commit_version(VersionTag("p", "r", 1), store, label_set, make_test_selection(store, label_set))
    assert not registry.commit_version(VersionTag("p", "r", 1), store, label_set)
    assert b"testing" not in b"".join(contents(tmp_path / "git").values())
    assert "testing" not in git(git_uri, "show", "main:.dvc/config")
    registry.download_version("labels/p/r/gen-1", tmp_path / "there")
    assert contents(tmp_path / "labels").items() <= contents(tmp_path / "there").items()
    registry.commit_version(VersionTag("p", "r", 2), *make_label_set(tmp_path / "other", seed=1))
    done = collect_garbage(registry, [VersionTag("p", "r", 2)], dry_run=False)
    assert len(done.keys) == 7
    registry.download_version("labels/p/r/gen-1", tmp_path / "again")
    # Keys from files, as Kubernetes mounts them.
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "accesskey").write_text("test:tester")
    (secrets / "secretkey").write_text("testing")
    monkeypatch.setenv("NS_S3_SECRETS", str(secrets))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    registry.download_version("labels/p/r/gen-1", tmp_path / "with-files")
    monkeypatch.delenv("NS_S3_SECRETS")
    with pytest.raises(StoreError, match="no credentials: AWS_ACCESS_KEY_ID is not set"):
        registry.download_version("labels/p/r/gen-1", tmp_path / "without")


@pytest.mark.integration
def test_stages_and_commands_commit_versions(tmp_path, capsys, monkeypatch):
    from importlib.resources import files

    git_uri, remote, root = make_bare_repository(tmp_path / "git"), str(tmp_path / "remote"), str(tmp_path / "root")
    tiny = ["generations=1", "teacher.train.epochs=30", "students.0.train.epochs=1"]
    plain = load_experiment(str(files("ns.config.presets") / "quickstart.yaml"), tiny)
    experiment = load_experiment(
        str(files("ns.config.presets") / "quickstart.yaml"),
        [*tiny, f"registry.git={tmp_path / 'none'}", f"registry.remote={remote}"],
    )
    run = derive_run_name(experiment)
    assert run == derive_run_name(plain)
    store = LocalStore(Path(root))
    ref = RunRef(f"{store.uri}/{run}/config.yaml", store.uri, run)

    def labeled():
        data = prepare_data(ref)
        teacher = train_generation(ref, data=data, generation=0)
        for shards in split_pool(ref, data=data):
            label_shards(ref, data=data, generation=1, teacher=teacher, shards=shards)
        return commit_labels(ref, data=data, generation=1, teacher=teacher)

    open_run(store, run, experiment, "test")
    with pytest.raises(StoreError, match="git init --bare"):
        labeled()
    # Out of reach, then there: the run goes on, with another registry, and is the same run.
    settled = experiment.model_copy(update={"registry": RegistryConfig(git=git_uri, remote=remote)})
    open_run(store, run, settled, "test")
    assert labeled() == labeled()
    tag = f"labels/quickstart/{run}/gen-1"

    def ns(*arguments: str) -> tuple[int, str]:
        code = cli.run_command_line(["labels", *arguments])
        out, err = capsys.readouterr()
        return code, out + err

    monkeypatch.setenv("NS_LABEL_REGISTRY", git_uri)
    capsys.readouterr()
    (version,) = json.loads(ns("list", "--json")[1])
    assert (version["tag"], version["current"]) == (tag, False)
    assert ns("commit", "latest/gen-1", "--root", root) == (0, f"{tag}: is there already\n")
    assert ns("commit", "latest/gen-1", "--root", root, "--tag", f"labels/mine/{run}/gen-1") == (
        0,
        f"labels/mine/{run}/gen-1: committed\n",
    )
    code, said = ns("commit", "latest/gen-1", "--root", root, "--tag", "labels/mine/a..b/gen-1")
    assert (code, "run 'a..b': cannot be part of a tag" in said) == (3, True)
    code, said = ns("commit", root, "--root", root)
    assert (code, "must be a run's generation" in said) == (2, True)
    # A label set without some images is another version, under a name of its own.
    withdrawn, purged, selection = tmp_path / "withdrawn.txt", str(tmp_path / "purged"), str(tmp_path / "selection.json")
    labels = open_label_set(store, "latest/gen-1")
    withdrawn.write_text(read_label_rows(labels.store, labels.label_set.shards[0]).keys[3] + "\n")
    assert ns("purge", "latest/gen-1", "--keys", str(withdrawn), "--out", purged, "--root", root)[0] == 0
    assert ns("select", purged, "--out", selection)[0] == 0
    named = (purged, "--tag", "labels/mine/purged/gen-1", "--selection", selection)
    assert ns("commit", *named) == (0, "labels/mine/purged/gen-1: committed\n")
    assert ns("commit", *named) == (0, "labels/mine/purged/gen-1: is there already\n")
    found = LabelRegistry(git_uri).find_version("labels/mine/purged/gen-1")
    assert (found.label_set, found.rows) == (LabelSet.load_file(LocalStore(Path(purged)), "labelset.json").digest, 847)
    assert found.kept is not None
    code, said = ns("commit", labels.store.uri, "--tag", "labels/mine/stale/gen-1", "--selection", selection)
    assert (code, "make one: ns labels select" in said) == (3, True)
    assert ns("gc", "--drop", "labels/mine/purged/gen-1", "--yes")[0] == 0
    assert ns("promote", tag, "--why", "first")[1] == f"current/quickstart: {tag}, before: none\n"
    assert ns("rollback", tag)[1] == f"current/quickstart: {tag} (no change)\n"
    destination = tmp_path / "there"
    assert "all good" in ns("get", "current/quickstart", str(destination))[1]
    assert "good: 847 rows" in ns("verify", str(destination))[1]
    code, said = ns("version", tag)
    assert code == 0
    for line in said.splitlines()[-3:]:
        name, size, digest, at = line.split("\t")
        assert (Path(at).stat().st_size, sha256_bytes(Path(at).read_bytes())) == (int(size), digest), name
    monkeypatch.setenv("COLUMNS", "40")
    listed = ns("list")[1]
    assert (listed.count(tag), listed.count(f"labels/mine/{run}/gen-1"), listed.count("in use")) == (1, 1, 1)
    code, said = ns("gc", "--drop", tag)
    assert (code, "is in use (current/quickstart)" in said) == (6, True)
    code, said = ns("gc", "--drop", f"labels/mine/{run}/gen-1")
    assert said.endswith("1 versions, 0 files, 0 bytes would be deleted; --yes does it\n")
    assert len(json.loads(ns("list", "--json")[1])) == 2
    monkeypatch.delenv("NS_LABEL_REGISTRY")
    code, said = ns("list")
    assert (code, "set NS_LABEL_REGISTRY" in said) == (2, True)


class Overtaken(LabelRegistry):
    """A registry in which something happens between a clone and what is done with it."""

    def interfere(self, act) -> "Overtaken":
        self._act = act
        return self

    @contextlib.contextmanager
    def open_clone(self, *patterns: str):
        with super().open_clone(*patterns) as clone:
            act, self._act = self._act, lambda: None
            act()
            yield clone


@pytest.mark.integration
def test_data_without_a_tag_is_spared_for_a_day(tmp_path):
    """What a committer pushed a moment ago, and has not tagged yet."""
    git_uri = make_bare_repository(tmp_path / "git")
    registry = LabelRegistry(git_uri, str(tmp_path / "remote"))
    registry.commit_version(VersionTag("p", "r", 1), *make_label_set(tmp_path / "labels"))
    pushed = tmp_path / "remote" / "files" / "md5" / "ab" / ("c" * 30)
    pushed.parent.mkdir(exist_ok=True)
    pushed.write_bytes(b"rows")
    assert collect_garbage(registry, dry_run=False).keys == ()
    old = time.time() - SPARED_SECONDS - 1
    os.utime(pushed, (old, old))
    assert collect_garbage(registry, dry_run=False).keys == (f"files/md5/ab/{'c' * 30}",)
    assert not pushed.exists()


@pytest.mark.integration
def test_commit_pushes_data_that_vanished_before_its_tag(tmp_path, monkeypatch):
    git_uri = make_bare_repository(tmp_path / "git")
    remote = tmp_path / "remote"
    registry = LabelRegistry(git_uri, str(remote))
    real = GitCommands.run_git

    def lose_data(self, *arguments, **options):
        if arguments[0] == "push":
            shutil.rmtree(remote / "files", ignore_errors=True)
        return real(self, *arguments, **options)

    registry.commit_version(VersionTag("p", "r", 1), *make_label_set(tmp_path / "first", seed=1))
    with monkeypatch.context() as patch:
        patch.setattr(GitCommands, "run_git", lose_data)
        registry.commit_version(VersionTag("p", "r", 2), *make_label_set(tmp_path / "labels"))
    registry.download_version("labels/p/r/gen-2", tmp_path / "there")
    assert contents(tmp_path / "labels").items() <= contents(tmp_path / "there").items()


@pytest.mark.integration
def test_concurrent_changes_are_refused(tmp_path):
    git_uri = make_bare_repository(tmp_path / "git")
    registry = LabelRegistry(git_uri, str(tmp_path / "remote"))
    sets = [make_label_set(tmp_path / f"labels{number}", seed=number) for number in range(3)]
    first, second, third = (VersionTag("p", "r", number) for number in (1, 2, 3))
    registry.commit_version(first, *sets[0])
    same = Overtaken(git_uri).interfere(lambda: registry.commit_version(second, *sets[1]))
    same.commit_version(second, *sets[1])
    with pytest.raises(RunError, match=r"gen-3: holds label set .* already"):
        Overtaken(git_uri).interfere(lambda: registry.commit_version(third, *sets[1])).commit_version(third, *sets[2])
    with pytest.raises(RunError, match=r"current/p: was moved concurrently; check `ns labels list` and retry"):
        Overtaken(git_uri).interfere(lambda: registry.set_current(first, "")).set_current(second, "")
    assert registry.find_version("current/p").tag == first
    files = contents(tmp_path / "remote")
    overtaken = Overtaken(git_uri).interfere(lambda: registry.commit_version(VersionTag("p", "r", 4), *sets[2]))
    with pytest.raises(RunError, match=r"a version was committed concurrently; no data was deleted"):
        collect_garbage(overtaken, dry_run=False)
    assert contents(tmp_path / "remote").items() >= files.items()
