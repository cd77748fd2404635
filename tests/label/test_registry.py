"""Versions of label sets, with real git and real dvc."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ns.config import SelectionConfig
from ns.digest import sha256_bytes
from ns.errors import DataError, RunError, StoreError
from ns.label.commands import Commands, redacted
from ns.label.labelset import LabelSet, LabelShard, all_rows, histogram, histogram_table, row_schema
from ns.label.registry import Registry, Tag, _absent
from ns.label.selection import select
from ns.store import LocalStore

CLASSES = ("a", "b", "c")


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """No settings of the machine's owner."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "NS_S3_", "NS_LABEL_", "GIT_", "DVC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def label_set(folder: Path, seed: int = 0, shards: int = 2, rows: int = 40) -> tuple[LocalStore, LabelSet]:
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
            schema=row_schema(3),
        )
        name = f"shard-{number:05}"
        pq.write_table(table, folder / f"{name}.parquet")
        data = (folder / f"{name}.parquet").read_bytes()
        shard = LabelShard(
            name=f"{name}.parquet", source="0" * 64, rows=rows, unreadable=0, bytes=len(data), sha256=sha256_bytes(data)
        )
        shard.write(store, f"{name}.json")
        facts.append(shard)
        counts += histogram(order[:, 0], confidence, 3)
    pq.write_table(histogram_table(counts), folder / "histogram.parquet")
    made = LabelSet(dataset="1" * 64, teacher="2" * 64, code="3" * 64, classes=CLASSES, top_k=3, shards=tuple(facts))
    made.write(store, "labelset.json")
    return store, made


def selected(store: LocalStore, made: LabelSet):
    policy = SelectionConfig(per_class=10)
    return select(all_rows(store, made), 3, policy, seed=0, label_set=made.digest, labels="store/labels/x")


def bare(folder: Path) -> str:
    subprocess.run(["git", "init", "--quiet", "--bare", str(folder)], check=True)
    return str(folder)


def git(repository: str, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", repository, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_names_that_git_would_not_take_are_refused():
    assert str(Tag.parse("labels/digits/digits-0a1b/gen-2")) == "labels/digits/digits-0a1b/gen-2"
    for project in ("", "a b", "a..b", "x.lock", "-x", "ä", "a/b", "a~1", ".x", "x" * 101):
        with pytest.raises(DataError, match="project .* cannot be part of a tag"):
            Tag.of(project, "run", 1)
    with pytest.raises(DataError, match="generations count from 1"):
        Tag.of("p", "r", 0)
    for text in ("gen-1", "labels/p/r/gen-0", "labels/p/r/gen-1\n", "labels/p/gen-1", "labels/p/r/gen-1/x", "labels/p/../gen-1"):
        with pytest.raises(DataError):
            Tag.parse(text)


def test_places_that_cannot_be_are_refused(tmp_path):
    for remote in ("gs://x", "s3://", "s3://key:secret@bucket/x"):
        with pytest.raises(DataError, match="must be a folder or s3://bucket/prefix") as caught:
            Registry(str(tmp_path), remote)
        assert "secret" not in str(caught.value)
    with pytest.raises(DataError, match="URL or the path of a git repository"):
        Registry("--upload-pack=x")
    with pytest.raises(StoreError, match=r"git ls-remote: .*; for a new registry: git init --bare"):
        Registry(str(tmp_path / "none")).versions()
    with pytest.raises(DataError, match="is empty; say where its data shall lie"):
        Registry(bare(tmp_path / "git")).versions()


def test_a_failing_command_is_named_and_shows_no_password(tmp_path):
    commands = Commands(tmp_path, tmp_path / "own", s3=False, git_seconds=60, data_seconds=60)
    with pytest.raises(StoreError, match=r"^git ls-remote: fatal: ") as caught:
        commands.git("ls-remote", "http://user:pass@word@127.0.0.1:9/x.git")
    assert "word" not in str(caught.value)
    assert "127.0.0.1" in str(caught.value)
    assert redacted("to https://token@host/x failed") == "to https://…@host/x failed"
    slow = Commands(tmp_path, tmp_path / "own", s3=False, git_seconds=0.2, data_seconds=60)
    with pytest.raises(StoreError, match=r"git hash-object: took longer than 0.2 s"):
        os.mkfifo(tmp_path / "pipe")
        slow.git("hash-object", "pipe")


def test_a_repository_of_something_else_is_refused(tmp_path):
    place = bare(tmp_path / "git")
    work = tmp_path / "work"
    subprocess.run(["git", "clone", "--quiet", place, str(work)], check=True, capture_output=True)
    git(str(work), "-c", "user.name=x", "-c", "user.email=x@y", "commit", "--quiet", "--allow-empty", "-m", "x")
    git(str(work), "push", "--quiet", "origin", "HEAD:refs/heads/main")
    with pytest.raises(DataError, match=r"not a label registry: no .dvc/config on main"):
        Registry(place, str(tmp_path / "remote")).versions()


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A registry with one version."""
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder / "home"))
        store, made = label_set(folder / "labels")
        place = bare(folder / "git")
        registry = Registry(place, str(folder / "remote"))
        assert registry.commit(Tag("p", "r", 1), store, made, selected(store, made))
    return folder, place, store, made


def test_a_version_is_a_tag_with_manifests_in_git_and_data_in_the_remote(kept):
    folder, place, store, made = kept
    tag = "labels/p/r/gen-1"
    assert git(place, "cat-file", "-t", tag) == "tag"
    assert git(place, "ls-tree", "--name-only", tag).split() == [
        ".dvc", ".dvcignore", ".gitignore", "README.md", "labels.dvc", "labelset.json", "selection.json", "version.json",
    ]  # fmt: skip
    assert git(place, "for-each-ref", "--format=%(refname)").split() == ["refs/heads/main", f"refs/tags/{tag}"]
    message = git(place, "for-each-ref", "--format=%(contents)", f"refs/tags/{tag}")
    chosen = selected(store, made)
    for fact in (f"Label-Set: {made.digest}", "Run: r", "Generation: 1", f"Teacher: {made.teacher}", f"Kept: {chosen.kept}"):
        assert fact in message
    version = json.loads(git(place, "show", f"{tag}:version.json"))
    assert {file["name"] for file in version["files"]} == {
        "histogram.parquet", "labelset.json", "selection.json",
        "shard-00000.json", "shard-00000.parquet", "shard-00001.json", "shard-00001.parquet",
    }  # fmt: skip
    # By hand, without DVC.
    for file in version["files"]:
        data = (folder / "remote" / "files" / "md5" / file["md5"][:2] / file["md5"][2:]).read_bytes()
        assert sha256_bytes(data) == file["sha256"]
        assert hashlib.md5(data).hexdigest() == file["md5"]
        if file["name"] != "selection.json":
            assert data == store.get(file["name"])


def test_versions_are_listed_shown_and_fetched_without_dvc(kept, tmp_path):
    folder, place, store, made = kept
    registry = Registry(place)
    (version,) = registry.versions()
    assert (version.tag, version.label_set, version.rows, version.current) == ("labels/p/r/gen-1", made.digest, 80, False)
    there = tmp_path / "there"
    shown = registry.get("labels/p/r/gen-1", there, with_dvc=False)
    assert contents(folder / "labels").items() <= contents(there).items()
    assert {file.name for file in shown.files} == set(contents(there))
    with pytest.raises(RunError, match=r"labels/p/r/gen-2: no such version"):
        registry.show("labels/p/r/gen-2")


def test_a_download_continues_at_the_next_file_and_touches_nothing_else(kept, tmp_path):
    folder, place, _, _ = kept
    there = tmp_path / "there"
    (there / ".tmp-get").mkdir(parents=True)
    shutil.copy(folder / "labels" / "shard-00000.parquet", there)
    (there / "shard-00001.parquet").write_bytes(b"half")
    before = (there / "shard-00000.parquet").stat().st_mtime_ns
    Registry(place).get("labels/p/r/gen-1", there, with_dvc=False)
    assert (there / "shard-00000.parquet").stat().st_mtime_ns == before
    assert contents(folder / "labels").items() <= contents(there).items()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "letter.txt").write_text("mine")
    with pytest.raises(DataError, match="is not empty; name an empty folder"):
        Registry(place).get("labels/p/r/gen-1", foreign, with_dvc=False)
    label_set(tmp_path / "other", seed=9)
    with pytest.raises(DataError, match="holds label set"):
        Registry(place).get("labels/p/r/gen-1", tmp_path / "other", with_dvc=False)


def test_the_same_again_is_a_success_and_another_label_set_is_refused(kept, tmp_path):
    _, place, store, made = kept
    chosen = selected(store, made)
    assert not Registry(place).commit(Tag("p", "r", 1), store, made, chosen)
    other, different = label_set(tmp_path / "other", seed=1)
    with pytest.raises(RunError, match=r"labels/p/r/gen-1: holds label set .* already, .*ns labels gc --drop labels/p/r/gen-1"):
        Registry(place).commit(Tag("p", "r", 1), other, different)
    with pytest.raises(RunError, match="holds selection"):
        Registry(place).commit(Tag("p", "r", 1), store, made, chosen.model_copy(update={"seed": 5}))
    with pytest.raises(DataError, match=r"keeps its data in .*, not in .*; leave the remote out"):
        Registry(place, str(tmp_path / "elsewhere")).versions()


def test_plain_dvc_gets_it(kept, tmp_path):
    folder, place, _, _ = kept
    dvc = Path(sys.executable).parent / "dvc"
    command = [dvc, "get", "--quiet", "--rev", "labels/p/r/gen-1", place, "labels", "--out", tmp_path / "out"]
    subprocess.run(command, check=True, env={**os.environ, "DVC_NO_ANALYTICS": "1"})
    assert contents(folder / "labels").items() <= contents(tmp_path / "out").items()
