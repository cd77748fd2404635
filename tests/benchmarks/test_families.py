"""Families of timm, from building to export."""

import json

import pytest
import timm

from benchmarks.families import PAGE, RECORD, STEPS, render_families_page, try_family


def test_page_shows_what_was_recorded():
    record = json.loads(RECORD.read_text())
    assert PAGE.read_text() == render_families_page(record)
    assert {row["family"] for row in record["families"]} <= set(timm.list_modules())
    assert all(row["failed"] in (None, *STEPS) for row in record["families"])


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
    row = try_family(family, recorded[family]["forms"])
    assert row["failed"] == recorded[family]["failed"], row["reason"]
