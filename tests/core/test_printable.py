import re
from pathlib import Path

import pytest

from ns.core import log
from ns.core.printable import (
    escape_controls,
    escape_formula,
    holds_credentials,
    make_printable,
    redact_credentials,
    unescape_formula,
)

STEERING = ["\x1b[2J", "\x9b31m", "\r", "\b", "\x07", "\x85", "\u2028", "\u202e", "\u2066", "\x7f", "\0"]


@pytest.mark.parametrize("text", STEERING)
def test_escape_controls_leaves_nothing_that_steers_a_terminal(text):
    escaped = escape_controls(f"cat{text}.png")
    assert escaped.isprintable()
    assert escaped.startswith("cat\\")


def test_escape_controls_leaves_text_as_it_is():
    text = "Grüße 猫 👩\u200d🔬\tc:\\x1b"
    assert escape_controls(text) == text
    assert escape_controls("a\nb") == "a\nb"
    assert escape_controls("a\nb", keep_newlines=False) == r"a\nb"


@pytest.mark.parametrize("uri", ["https://me:secret@host/a", "s3://me:secret@bucket/a", "http://secret@host:9091"])
def test_make_printable_hides_passwords(uri):
    shown = make_printable(f"cannot reach {uri}: refused")
    assert "secret" not in shown
    assert shown.startswith(f"cannot reach {uri.partition('//')[0]}//…@")


def test_log_goes_to_stderr_and_is_printable_in_any_command(capsys):
    """Most commands log nothing but what they pass over; that must neither break their JSON nor steer the terminal."""
    log.get_logger().warning("passed over", file="s3://user:secret@host/\x1b[2J")
    out, err = capsys.readouterr()
    assert out == ""
    assert "s3://…@host/" in err
    assert "secret" not in err
    assert "\x1b" not in err


@pytest.mark.parametrize("uri", ["s3://AKIA:sec/ret@bucket/a", "https://me:a12/sec/ret@host/a?b=c@d"])
def test_make_printable_hides_passwords_with_slashes(uri):
    assert "ret" not in make_printable(f"cannot reach {uri}: refused")
    assert holds_credentials(uri)


@pytest.mark.parametrize(
    "text", ["http://host:9091/a@b", "file:///tmp/a:b@c", "s3://bucket/a:b@c", "//reg:5000/worker@sha256:ab", "// a@b.example"]
)
def test_redact_credentials_leaves_addresses_without_any(text):
    assert redact_credentials(text) == text
    assert not holds_credentials(text)


def test_log_shows_neither_passwords_nor_escapes(capsys):
    log.configure_logging()
    log.get_logger().warning("cannot \x1b[2J push", url="https://me:secret@gateway:9091", file="\x1b]0;title\x07.png")
    shown = capsys.readouterr().err
    assert "secret" not in shown
    assert "gateway" in shown
    assert not set(shown) & {"\x1b", "\x07"}


def test_escape_formula_leaves_no_cell_that_a_spreadsheet_computes():
    for text in ("=HYPERLINK(1)", "+1", "-1", "@SUM(A1)", "\t=1"):
        assert escape_formula(text) == f"'{text}"
        assert unescape_formula(f"'{text}") == text
    for text in ("cat/a=1", "'quoted'", "'", ""):
        assert escape_formula(text) == unescape_formula(text) == text


def test_all_that_writes_tables_escapes_formulas():
    writers = [
        file for file in Path("ns").rglob("*.py") if re.search(r"csv\.writer\(|write_csv\(|DictWriter\(", file.read_text())
    ]
    assert len(writers) >= 3
    for file in writers:
        assert "escape_formula(" in file.read_text() or "map(escape_formula" in file.read_text(), file
