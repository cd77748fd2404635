import json
import shutil
import sys

import pytest

from benchmarks import method_digits
from benchmarks.arms import run_arms, stack_arms
from ns.data.importing.digits import write_digits
from ns.data.index import ShardIndex
from ns.storage import LocalStore


def test_write_exclusions_leaves_a_share_of_the_pool(tmp_path):
    method_digits.write_exclusions(tmp_path)
    store = LocalStore(tmp_path / "again")
    keys = {key for shard in write_digits("digits:pool", store).shards for key in ShardIndex.load(store, shard).keys}
    for share in method_digits.POOL_SHARES:
        left_out = set(method_digits.locate_exclusions(tmp_path, share).read_text().splitlines())
        assert left_out < keys
        assert len(keys - left_out) == -(-len(keys) // share)


@pytest.mark.integration
def test_quick_digits_are_measured_once_and_their_files_serve_elsewhere(tmp_path, monkeypatch, capsys):
    here, there = tmp_path / "here", tmp_path / "there"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(
        sys, "argv", ["method_digits", "--quick", "--cores", "1", "--work", str(here), "--results", str(tmp_path)]
    )
    method_digits.main()
    assert "9 arms" in capsys.readouterr().out
    result = json.loads((tmp_path / "method_digits.json").read_text())
    assert result["claims"].keys() == {"pool", "iteration", "noise", "pool size"}
    page = (tmp_path / "method_digits.md").read_text()
    assert "| S1-pool-16 | S1 with a pool of 1/16 |" in page
    assert "<svg" in (tmp_path / "method_digits.svg").read_text()
    arms = {0: method_digits.make_digits_arms(0, here, method_digits.QUICK_EPOCHS)}
    stacked = stack_arms(here, arms, list(method_digits.ARMS))
    assert {measured.test.shape for measured in stacked.values()} == {(1, 400)}
    abouts = [measured.about["seeds"][0] for measured in stacked.values()]
    assert {about["steps"] for about in abouts} == {method_digits.QUICK_EPOCHS}
    assert min(about["cpu_seconds"] for about in abouts) > 0

    # As if the second machine had been given the first one's measurements: nothing is trained there.
    shutil.copytree(here / "measured", there / "measured")
    moved = {0: method_digits.make_digits_arms(0, there, method_digits.QUICK_EPOCHS)}
    run_arms(there, moved, list(method_digits.ARMS), labeled=method_digits.LABELED, cores=1)
    assert not (there / "runs").exists()
