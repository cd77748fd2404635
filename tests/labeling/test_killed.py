import json
import subprocess
import sys

import pytest


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_labeling_and_commits_survive_200_kills(tmp_path):
    """Of four workers that label and commit, at random instants: no label set is another than the undisturbed one, and no tag
    of the registry lacks data."""
    subprocess.run(["git", "init", "-q", "--bare", "-b", "main", tmp_path / "git"], check=True)
    command = [sys.executable, "-m", "tests.labeling.killed", str(tmp_path), "200"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
    facts = json.loads(found.stdout.splitlines()[-1])
    assert facts["killed"] >= 200
    assert facts["digests"] == [facts["wanted"]]
    assert facts["label_sets"] >= 1, facts
    assert min(facts["rounds"].values()) >= 1, facts
