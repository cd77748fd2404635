import re

import pytest

from ns.cli import app as cli
from ns.core.errors import DataError
from ns.data.dataset import Dataset
from ns.data.importing.writer import ShardWriter
from ns.storage import LocalStore


@pytest.fixture
def folder(tmp_path, picture):
    store = LocalStore(tmp_path / "data")
    with ShardWriter(store, max_samples=10, max_bytes=1 << 24) as writer:
        for number in range(30):
            writer.add_image(f"<i>{number}", "jpg", picture(number, "JPEG", 200 if number % 2 else 16), number % 3)
        writer.add_image("bad", "jpg", b"\xff\xd8\xff", 0)
    Dataset(name="a & b", role="labeled", classes=("x", "<y>", "z"), shards=writer.shards).save(store)
    return tmp_path / "data"


def test_data_show_counts_classes_and_writes_contact_sheet(folder, tmp_path, capsys):
    assert cli.run_command_line(["data", "show", str(folder), "--sheet", str(tmp_path / "s.html"), "--images", "9"]) == 0
    out = capsys.readouterr().out
    assert "31 images" in out
    assert re.search(r"<y>\s+10\s+32\.3%", out)
    page = (tmp_path / "s.html").read_text()
    assert page.count("<figure>") == 9
    assert "<i>" not in page
    assert "&lt;y&gt;" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_contact_sheet_depends_on_seed(folder, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        cli.run_command_line(["data", "show", str(folder), "--sheet", str(tmp_path / name), "--images", "9", "--seed", seed])
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text() != (tmp_path / "c").read_text()


def test_contact_sheet_runs_and_loads_nothing(folder, tmp_path):
    sheet = tmp_path / "sheet.html"
    assert cli.run_command_line(["data", "show", str(folder), "--sheet", str(sheet)]) == 0
    policy, style = sheet.read_text().index("Content-Security-Policy"), sheet.read_text().index("<style>")
    assert "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\"" in sheet.read_text()[policy:style]


def test_contact_sheet_shows_reason_of_unreadable_image(folder, tmp_path):
    cli.run_command_line(["data", "show", str(folder), "--sheet", str(tmp_path / "s"), "--images", "2000"])
    assert "shard-00003.tar: bad:" in (tmp_path / "s").read_text()


def test_data_show_names_missing_manifest(tmp_path, capsys):
    assert cli.run_command_line(["data", "show", str(tmp_path)]) != 0
    assert "dataset.json" in capsys.readouterr().err
    assert DataError.exit_code == 3
