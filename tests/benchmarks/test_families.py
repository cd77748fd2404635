"""Families of timm, from building to export."""

import json
import os

import pytest
import timm

from benchmarks import families
from benchmarks.families import PAGE, RECORD, STEPS, render_families_page, try_family, try_in_process


def test_page_shows_what_was_recorded():
    record = json.loads(RECORD.read_text())
    assert PAGE.read_text() == render_families_page(record)
    assert {row["family"] for row in record["families"]} <= set(timm.list_modules())
    assert all(row["failed"] in (None, *STEPS) for row in record["families"])


@pytest.mark.integration
@pytest.mark.parametrize(
    ("try_it", "reason"),
    [
        (lambda *_: os._exit(3), "ended with 3"),
        (lambda *_: sum(iter(int, 1)), "takes more than 1 s of the processor"),
    ],
)
def test_a_family_that_ends_its_process_is_told(monkeypatch, try_it, reason):
    monkeypatch.setattr(families, "try_family", try_it)
    monkeypatch.setattr(families, "CPU_SECONDS", 1)
    assert try_in_process("resnet", ["timm"]) == {"family": "resnet", "network": "", "failed": "build", "reason": reason}


def test_what_was_tried_with_other_versions_is_tried_again(tmp_path, monkeypatch):
    versions = families.get_versions()
    rows = [
        {"family": "a", "forms": ["timm", "onnx"], **versions},
        {"family": "b", "forms": ["timm"], **versions},
        {"family": "c", "forms": ["timm", "onnx"], **versions, "timm": "0"},
        {"family": "d", "forms": ["timm", "onnx"]},
    ]
    monkeypatch.setattr(families, "RECORD", tmp_path / "record.json")
    assert families.find_tried_families(["timm"]) == set()
    (tmp_path / "record.json").write_text(json.dumps({"families": rows}))
    assert families.find_tried_families(["timm"]) == {"a", "b"}
    assert families.find_tried_families(["timm", "onnx"]) == {"a"}


@pytest.mark.integration
@pytest.mark.parametrize("family", ["vision_transformer"])
def test_small_network_of_a_family_is_built_trained_labels_and_is_exported(family):
    row = try_family(family, ["timm"])
    assert (row["failed"], row["reason"]) == (None, "")


@pytest.mark.integration
@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", timm.list_modules())
def test_every_family_does_what_the_page_says(family):
    recorded = {row["family"]: row for row in json.loads(RECORD.read_text())["families"]}
    if family not in recorded:
        pytest.skip("is not on the page yet")
    row = try_in_process(family, recorded[family]["forms"])
    assert row["failed"] == recorded[family]["failed"], row["reason"]
