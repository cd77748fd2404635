import numpy as np
import pytest

from benchmarks.arm_pages import Claim, compute_claims, draw_generations, render_arms, render_claims, render_seeds
from benchmarks.arms import (
    Arm,
    Measured,
    Task,
    digest_arm,
    find_measured,
    format_minutes,
    list_tasks,
    locate_measured,
    stack_arms,
)

EMPTY = np.zeros((0, 0), np.uint8)


def make_measured(arms, name, wrong=3):
    return Measured(
        {"digest": digest_arm(arms, name), "cpu_seconds": 60.0}, np.ones(4, bool), np.arange(10) < wrong, *[EMPTY] * 3
    )


@pytest.fixture
def arms():
    document = {"name": "a", "data": {"pool": "here"}}
    return {
        "T": Arm(document, 0),
        "S1": Arm({**document, "seed": 1}, 1, labels="T"),
        "S2": Arm(document, 2, labels="S1", start="S1"),
    }


def test_list_tasks_puts_needed_arms_first(arms):
    assert list_tasks({0: arms, 5: arms}, ["S2", "T"]) == [Task(seed, name) for seed in (0, 5) for name in ("T", "S1", "S2")]


def test_digest_arm_depends_on_settings_of_needed_arms_and_on_no_path(arms):
    moved = {name: arm._replace(document={**arm.document, "data": {"pool": "there"}}) for name, arm in arms.items()}
    changed = arms | {"T": arms["T"]._replace(document={**arms["T"].document, "seed": 9})}
    assert [digest_arm(moved, name) for name in arms] == [digest_arm(arms, name) for name in arms]
    assert not {digest_arm(changed, name) for name in arms} & {digest_arm(arms, name) for name in arms}


def test_measured_is_found_again_unless_settings_changed(arms, tmp_path):
    measured = make_measured(arms, "S1")
    measured.save(locate_measured(tmp_path, 3, "S1"))
    found = find_measured(tmp_path, 3, "S1", arms)
    assert found.about == measured.about
    assert all(np.array_equal(*pair) for pair in zip(found[1:], measured[1:], strict=True))
    assert find_measured(tmp_path, 4, "S1", arms) is None
    changed = arms | {"S1": arms["S1"]._replace(generation=2)}
    assert find_measured(tmp_path, 3, "S1", changed) is None


def test_stack_arms_leaves_out_arms_that_a_seed_lacks(arms, tmp_path):
    for seed, name in ((0, "T"), (1, "T"), (0, "S1")):
        make_measured(arms, name, wrong=seed).save(locate_measured(tmp_path, seed, name))
    stacked = stack_arms(tmp_path, {0: arms, 1: arms}, ["T", "S1"])
    assert list(stacked) == ["T"]
    assert stacked["T"].test.sum(1).tolist() == [0, 1]


def test_format_minutes():
    assert [format_minutes(seconds) for seconds in (29, 125, 3600, 7501)] == ["0 min", "2 min", "1 h 00 min", "2 h 05 min"]


def test_pages_show_claims_and_arms(tmp_path):
    rng = np.random.default_rng(0)

    def make_arm(error):
        wrong = rng.random((5, 400)) < error
        counts = [rng.binomial(3, error, (5, 50, 2)).astype(np.uint8)] * 3
        return Measured({"seeds": [{"cpu_seconds": 360.0}] * 5}, wrong, wrong, *counts)

    arms = {"T": make_arm(0.5), "S1": make_arm(0.2), "C1": make_arm(0.5), "S2": make_arm(0.2)}
    suites = ("corruptions", "perturbations", "attacks")
    claims = compute_claims(
        arms, {"pool": Claim("S1", "C1"), "iteration": Claim("S2", "S1"), "robustness": Claim("S1", "C1", suites)}
    )
    assert {name: claim["holds"] for name, claim in claims.items()} == {"pool": True, "iteration": False, "robustness": True}
    assert list(claims["robustness"]["contrasts"]) == ["mCE", "mFR", "errors under attack"]
    text = render_claims(claims)
    assert text.count("| shown |") == 4
    assert text.count("| not shown |") == 1
    lines = render_arms(arms, dict.fromkeys(arms, "about"), "C1").splitlines()
    assert lines[0].count("(C1: 100)") == 3
    assert lines[4].endswith("| 100.0 | 100.0 | 100.0 |")
    assert render_seeds(arms, range(5)).count("\n| ") == 7
    pictures = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for path in pictures:
        draw_generations(arms, {"student": [(0, "T"), (1, "S1"), (2, "S2")], "none": [(1, "X")]}, path)
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
