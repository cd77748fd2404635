from argparse import Namespace

from rich.table import Table

from benchmarks import measure


def test_write_benchmark_writes_rows_without_markup(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    table = Table("what", "ours ÷ theirs")
    table.add_row("vs_peer\n[dim]the same by the peer[/]", "[bold]2.00[/]")
    measure.write_benchmark("data", {"vs_peer": 2.0}, Namespace(json=None, keep=True), table)
    assert "| vs_peer: the same by the peer | 2.00 |" in (tmp_path / "data.md").read_text().splitlines()


def test_draw_tables_shares_no_image(tmp_path):
    for category in ("cat", "dog"):
        (tmp_path / category).mkdir()
        for number in range(9):
            (tmp_path / category / f"{number}.png").touch()
    tables = measure.draw_tables(tmp_path, {"labeled": 2, "heldout": 1, "pool": 9}, seed=0)
    heads, rows = {}, {}
    for part, text in tables.items():
        heads[part], *rows[part] = text.splitlines()
    assert heads == {"labeled": "path,label", "heldout": "path,label", "pool": "path"}
    assert {part: len(lines) for part, lines in rows.items()} == {"labeled": 4, "heldout": 2, "pool": 12}
    paths = [line.partition(",")[0] for lines in rows.values() for line in lines]
    assert len(set(paths)) == len(paths) == 18
    assert all(line.split(",")[1] in line.split(",")[0] for line in rows["labeled"])
