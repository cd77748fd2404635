"""Names of files, classes and runs that would steer a terminal, break a line, or be markup, through every command that shows them."""

import io
import json
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from ns.cli.app import run_command_line
from ns.config.loader import load_with_overrides
from ns.core.printable import CONTROLS
from ns.data.dataset import Dataset
from ns.data.importing.writer import ShardWriter
from ns.runs.lifecycle import finish_run, open_run
from ns.stages.context import RunRef
from ns.stages.report import report_run
from ns.storage import LocalStore
from tests.loop import TINY, find_pool_key, run_loop

pytestmark = pytest.mark.integration

CLASSES = (
    "\x1b[2J\x9b31mcat",
    "dog\nerror: all is lost\r",
    "[red]ox[/nothing]:cat:",
    "<script>alert(1)</script>\u202e&amp;'\">",
    "$\\frac$ {0} %s",
)
FILE = "\x1b]0;title\x07 [bold]\n<img src=x onerror=alert(1)>"
FOLDER = "[red] \x1b[2J<u>"


def write_dataset(store, name, role, count):
    """A dataset as a stranger may write it: an import refuses names with control characters."""
    rng = np.random.default_rng(count)
    with ShardWriter(store, max_samples=100, max_bytes=1 << 30) as writer:
        for number in range(count * len(CLASSES)):
            class_id = number % len(CLASSES)
            sink = io.BytesIO()
            Image.fromarray(rng.integers(0, 60, (8, 8, 3), np.uint8) + np.uint8(60 * class_id)).save(sink, "PNG")
            writer.add_image(f"{name} {number} {FILE}", "png", sink.getvalue(), None if role == "unlabeled" else class_id)
    classes = () if role == "unlabeled" else CLASSES
    Dataset(name=f"{name} {FOLDER}", role=role, classes=classes, shards=writer.shards).save(store)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A finished run whose data, classes and files have such names."""
    folder = tmp_path_factory.mktemp("names") / FOLDER
    store = LocalStore(folder / "root")
    roles = {"labeled": "labeled", "pool": "unlabeled", "heldout": "evaluation"}
    for count, (name, role) in enumerate(roles.items(), 4):
        write_dataset(store.at(name), name, role, count)
    data = [f"data.{name}={store.at(name).uri}" for name in roles]
    experiment = load_with_overrides("quickstart", [*TINY, "teacher.train.labeled_batch=16", "data.test=null", *data])
    open_run(store, "run", experiment, "test")
    ref = RunRef(f"{store.uri}/run/config.yaml", store.uri, "run")
    run_loop(ref)
    report_run(ref)
    finish_run(store, "run", "succeeded")
    return folder / "root"


class Tags(HTMLParser):
    """Names of tags, and the attributes that run scripts."""

    def __init__(self, page):
        super().__init__()
        self.names, self.handlers = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


SHOWING_CLASSES = [
    "data show {labeled} --sheet {out}/sheet.html",
    "labels show run/gen-1 --root {root}",
    "labels select run/gen-1 --dry-run --root {root}",
]
SHOWING_NAMES = [
    "data verify {pool}",
    "data check {labeled} {pool} {heldout} --out {out}/check --allow-overlap",
    "data import {source} {out}/imported --role unlabeled --max-rejected-share 1",
    "runs list --root {root}",
    "runs show run --root {root}",
    "runs explain train run --root {root}",
    "gate explain run --root {root}",
    "labels verify run/gen-1 --root {root}",
    "labels trace {key} --root {root}",
    "labels diff run/gen-1 run/gen-1 --html {out}/diff.html --root {root}",
    "labels diff run/gen-1 run/gen-1 --root {root}",
    "labels diff run/gen-1 run/gen-1 --markdown --root {root}",
    "labels audit page run/gen-1 --out {out}/audit.html --root {root}",
    "labels next run/gen-1 --count 3 --out {out}/next --root {root}",
    "labels export run/gen-1 --out {out}/labels.csv --root {root}",
    "labels commit run/gen-1 --registry {registry} --remote {out}/remote --root {root}",
    "labels list --registry {registry}",
    "predict {file} --run run --root {root}",
    "evaluate run {heldout} --out {out}/evaluated --root {root}",
    "report run --markdown --root {root}",
    "report run --root {root}",
    "export run --out {out}/model --count 2 --root {root}",
    "doctor store {out}",
]
REFUSING = [
    "data show {out}/none",
    "data import {out} {out}/empty --role labeled",
    "labels purge run/gen-1 --keys {keys} --out {out}/purged --root {root}",
    "labels show {out} --root {root}",
    "predict {source}/none\x1b[2J --run run --root {root}",
    "config check {out}/none.yaml",
    "runs show none\x1b[2J --root {root}",
    "gate explain none\x1b[2J --root {root}",
    "doctor store {source}/0\x1b[2J",
]
WITH_JSON = (
    *("data show", "data check", "runs ", "gate ", "labels show", "labels trace", "labels list"),
    *("labels diff run/gen-1 run/gen-1 --root", "predict", "evaluate", "export run", "doctor"),
)


def test_no_command_does_what_a_name_says(root, tmp_path, capsys, monkeypatch, recwarn):
    monkeypatch.setenv("COLUMNS", "300")
    out, source = tmp_path / FOLDER, tmp_path / "source"
    out.mkdir()
    source.mkdir()
    Image.new("RGB", (8, 8)).save(source / f"{FILE}.png")
    (source / f"broken {FILE}.png").write_bytes(b"")
    (source / "0\x1b[2J").write_bytes(b"")
    (tmp_path / "keys").write_text("none \x1b[2J\n")
    subprocess.run(["git", "init", "-q", "--bare", "-b", "main", tmp_path / "registry"], check=True)
    words = {name: root / name for name in ("labeled", "pool", "heldout")}
    words |= {"root": root, "out": out, "source": source, "file": source / f"{FILE}.png", "keys": tmp_path / "keys"}
    words |= {"registry": tmp_path / "registry", "key": find_pool_key(LocalStore(root), "run")}

    def run(line, *options):
        code = run_command_line([*(word.format(**words) for word in line.split()), *options])
        shown = capsys.readouterr()
        for text in shown:
            assert not CONTROLS.search(text), (line, text)
            assert "\nerror: all is lost" not in text, (line, text)
        return code, shown

    for line in [*SHOWING_CLASSES, *SHOWING_NAMES]:
        code, shown = run(line)
        assert code == 0, (line, shown.err[-500:])
        if line in SHOWING_CLASSES:
            assert CLASSES[2] in shown.out, line
        if line.startswith(tuple(WITH_JSON)):
            code, shown = run(line, "--json")
            assert code == 0, (line, shown.err)
            json.loads(shown.out)
    for line in REFUSING:
        code, shown = run(line)
        assert code, line
        assert shown.out + shown.err, line
    assert not [warning for warning in recwarn if CONTROLS.search(str(warning.message))]
    pages = [*out.glob("*.html"), *root.rglob("report.html")]
    assert len(pages) == 4
    for page in pages:
        tags = Tags(page.read_text())
        assert "u" not in tags.names, page
        assert not tags.handlers, page
        assert "alert(1)</script>" not in page.read_text(), page
