"""When a report is drawn again, and when not."""

import pytest

from ns.core import digest
from ns.reporting import page
from ns.reporting.report_record import ReportRecord, _digest_drawing_code, digest_report_inputs, provide_report
from ns.runs.lifecycle import finish_run
from ns.runs.records import list_stage_notes
from tests.reporting.conftest import RUN


@pytest.fixture
def drawn(made_up, monkeypatch):
    """The store of a run with a report, and a list of the pages that are drawn from then on: short ones, for the time that it takes."""
    pages = []

    def draw(context):
        pages.append(context.summary.run)
        return f"<html>page of {context.experiment.report.pictures} pictures</html>"

    monkeypatch.setattr(page, "render_report", draw)
    assert provide_report(made_up, RUN) == (f"{RUN}/report.html", False)
    pages.clear()
    return made_up, pages


def test_unchanged_report_is_not_drawn_again(drawn):
    store, pages = drawn
    assert provide_report(store, RUN) == (f"{RUN}/report.html", True)
    # Nor after the run was finished, and begun again with nothing to do.
    finish_run(store, RUN, "running")
    assert provide_report(store, RUN)[1]
    assert pages == []


def shorten(data: bytes) -> bytes:
    return data[:-5]


def flip_byte(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


@pytest.mark.parametrize("damage", [None, shorten, flip_byte])
@pytest.mark.parametrize("file", ["report.html", ReportRecord.filename])
def test_lost_or_damaged_report_is_drawn_again(drawn, file, damage):
    store, pages = drawn
    whole = store.get(f"{RUN}/report.html")
    if damage is None:
        store.delete(f"{RUN}/{file}")
    else:
        store.put(f"{RUN}/{file}", damage(store.get(f"{RUN}/{file}")))
    assert not provide_report(store, RUN)[1]
    assert len(pages) == 1
    assert store.get(f"{RUN}/report.html") == whole
    assert provide_report(store, RUN)[1]


def test_report_is_drawn_again_if_what_it_shows_has_changed(drawn):
    store, pages = drawn
    run = store.at(RUN)
    changes = {
        "config.yaml": run.get("config.yaml").replace(b"pictures: 5", b"pictures: 4"),
        # The same key, and other content: made again elsewhere.
        list_stage_notes(store, RUN, "evaluate")[0].outputs["evaluation"]: b"",
    }
    for number, (key, data) in enumerate(changes.items(), 1):
        place = run if key == "config.yaml" else store
        place.put(key, data or place.get(key).replace(b'"seconds": 1', b'"seconds": 2') + b"\n")
        assert not provide_report(store, RUN)[1], key
        assert len(pages) == number
    note = list_stage_notes(store, RUN, "gate")[0]
    run.put("stages/1-gate.json", note.model_copy(update={"seconds": 77.0}).encode())
    assert not provide_report(store, RUN)[1]
    finish_run(store, RUN, "failed", "the disk is full")
    assert not provide_report(store, RUN)[1]
    assert provide_report(store, RUN)[1]


@pytest.mark.parametrize("file", ["reporting/templates/report.css", "labeling/diff.py"])
def test_report_depends_on_all_files_of_the_package(unchanged, monkeypatch, file):
    before = digest_report_inputs(unchanged, RUN)
    hash_file = digest.sha256_file
    monkeypatch.setattr(digest, "sha256_file", lambda path: "0" if path == digest.PACKAGE / file else hash_file(path))
    _digest_drawing_code.cache_clear()
    assert digest_report_inputs(unchanged, RUN) != before
    _digest_drawing_code.cache_clear()


def test_report_of_lost_outputs_is_not_kept(drawn):
    store, _ = drawn
    store.delete(list_stage_notes(store, RUN, "select")[0].outputs["selection"])
    assert digest_report_inputs(store, RUN) is None
