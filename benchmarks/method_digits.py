"""Does self-training help on the quickstart's digits? The arms of `benchmarks.method_cifar10` on small images, with many seeds.

    python -m benchmarks.method_digits [--work FOLDER] [--results FOLDER] [--seeds 0 1 …] [--quick]

50 labeled images, 847 for the pool, 500 held out, which decide nothing here, and 400 for the test. The split is fixed; the 20 seeds draw
weights, order and noise. Settings are the quickstart's (`ns run quickstart`), whose students start from their teacher: 200 steps are too
few to start from random weights. --quick: one seed and few steps, less than a minute, shows that it works.

    arm        learns from the labels and …          starts from
    T          nothing else                          random weights
    S1         T's labels of the pool                T
    S1-quiet   the same, no noise on the pool        T
    S1-longer  T's labels of the pool                S1
    S2         S1's labels of the pool               S1
    C1         nothing else                          T
    C2         nothing else                          C1
    S1-pool-4  T's labels of a quarter of the pool   T
    S1-pool-16 T's labels of a sixteenth of it       T

All arms but T have 200 images per step, labeled or not, 200 steps, and the same learning rate at every step. Claims, tested together at
5 % (Holm): pool, iteration and noise as there; and pool size, S1 has fewer errors than S1-pool-16.

Intervals are for new seeds and new images, with these 50 labels (`benchmarks.contrasts`).
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.arm_pages import (
    Claim,
    contrast_arms,
    describe_results,
    draw_generations,
    reduce_error,
    render_arms,
    render_claims,
    render_cost,
    render_figures,
    render_seeds,
    write_results,
)
from benchmarks.arms import Arm, Measured, add_arm_options, run_arms, stack_arms
from benchmarks.method_cifar10 import replace_student
from ns.config.loader import load_experiment, resolve_preset
from ns.data.importing.digits import write_digits
from ns.data.index import ShardIndex
from ns.storage import LocalStore

SEEDS = tuple(range(20))
QUICK_SEEDS = (0,)
QUICK_EPOCHS = 4
LABELED = 50
POOL_SHARES = (16, 4)
ARMS = {
    "T": "teacher",
    "S1": "T, continued on T's labels",
    "S1-quiet": "the same without noise on the pool",
    "S1-longer": "S1, continued on T's labels",
    "S2": "S1, continued on S1's labels",
    "C1": "T, continued on labeled images only",
    "C2": "C1, continued",
    **{f"S1-pool-{share}": f"S1 with a pool of 1/{share}" for share in reversed(POOL_SHARES)},
}
LINES = {
    "noisy student": [(0, "T"), (1, "S1"), (2, "S2")],
    "continued on T's labels": [(1, "S1"), (2, "S1-longer")],
    "without noise on the pool": [(0, "T"), (1, "S1-quiet")],
    "control: labeled images only, as long": [(0, "T"), (1, "C1"), (2, "C2")],
}
CLAIMS = {
    "pool": Claim("S1", "C1"),
    "iteration": Claim("S2", "S1-longer"),
    "noise": Claim("S1", "S1-quiet"),
    "pool size": Claim("S1", "S1-pool-16"),
}


def make_digits_arms(seed: int, work: Path, epochs: float | None = None) -> dict[str, Arm]:
    """Name → arm. `work`: folder of the lists that `write_exclusions` writes; `epochs`: instead of the quickstart's."""
    quickstart = load_experiment(resolve_preset("quickstart")).model_dump(mode="json", exclude_unset=True, by_alias=True)
    base = {**quickstart, "seed": seed, "generations": 1, "labeling": {"tasks": 1}}
    (role,) = base.pop("students")
    # One process per core.
    changes = {"loader_workers": 0} | ({} if epochs is None else {"epochs": epochs})
    base["teacher"] = {**base["teacher"], "train": {**base["teacher"]["train"], **changes}}
    student = {**role["train"], **changes}
    if epochs is not None:
        # So short a teacher is sure of nothing.
        base["selection"] = {"min_confidence": 0.0}

    def make_student(**changes: Mapping[str, Any]) -> dict[str, Any]:
        return replace_student(base, student, **changes)

    # As many images per step, all of them labeled; epochs and rates are by labeled images.
    multiple = 1 + student["unlabeled_ratio"]
    optimizer = student["optimizer"]
    control = {
        **student,
        "labeled_batch": multiple * student["labeled_batch"],
        "epochs": multiple * student["epochs"],
        "optimizer": {
            **optimizer,
            "lr": optimizer["lr"] / multiple,
            "warmup_epochs": multiple * optimizer["warmup_epochs"],
        },
    }
    controls = replace_student(base, control)
    return {
        "T": Arm(base, 0),
        "S1": Arm(make_student(), 1, labels="T", start="T"),
        "S1-quiet": Arm(make_student(noise={"pool": "none"}), 1, labels="T", start="T"),
        "S1-longer": Arm(make_student(), 2, labels="T", start="S1"),
        "S2": Arm(make_student(), 2, labels="S1", start="S1"),
        "C1": Arm(controls, 1, start="T"),
        "C2": Arm(controls, 2, start="C1"),
        **{
            f"S1-pool-{share}": Arm(
                make_student(data={"exclude": str(locate_exclusions(work, share))}), 1, labels="T", start="T"
            )
            for share in POOL_SHARES
        },
    }


def locate_exclusions(work: Path, share: int) -> Path:
    return work / f"exclude-{share}.txt"


def write_exclusions(work: Path) -> None:
    """Writes for each smaller pool the keys of the other images: every `share`-th one stays."""
    store = LocalStore(work / "pool")
    pool = write_digits("digits:pool", store)
    keys = [key for shard in pool.shards for key in ShardIndex.load(store, shard).keys]
    for share in POOL_SHARES:
        left_out = [key for number, key in enumerate(keys) if number % share]
        locate_exclusions(work, share).write_text("\n".join(left_out) + "\n")


def render_digits_page(result: Mapping[str, Any], arms: Mapping[str, Measured]) -> str:
    seeds = result["seeds"]
    return (
        "\n\n".join([
            "# Noisy Student on handwritten digits",
            f"50 labeled images, 847 in the pool, 400 for the test; {len(seeds)} seeds. `benchmarks/method_digits.py` says what the arms "
            "and claims are.",
            "![errors by generation](method_digits.svg)",
            render_arms(arms, ARMS, "C1"),
            render_claims(result["claims"]),
            render_figures(result["intervals"]),
            render_seeds(arms, seeds),
            render_cost(arms.values(), result),
        ])
        + "\n"
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arm_options(parser, "method_digits", "runs/method-digits")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds that are run and reported (0 … 19)")
    parser.add_argument("--quick", action="store_true", help="one seed, few steps: shows that it works, measures nothing")
    options = parser.parse_args()
    seeds = options.seeds or (QUICK_SEEDS if options.quick else SEEDS)
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    write_exclusions(work)
    arms_by_seed = {seed: make_digits_arms(seed, work, QUICK_EPOCHS if options.quick else None) for seed in seeds}
    run_arms(work, arms_by_seed, list(ARMS), labeled=LABELED, cores=options.cores)
    arms = stack_arms(work, arms_by_seed, list(ARMS))
    intervals = {
        "clean_error_reduction_over_control": reduce_error(arms["S2"], arms["C2"]),
        "clean_error_reduction": reduce_error(arms["S2"], arms["T"]),
        "pool_of_1/4_over_1/16": contrast_arms(arms["S1-pool-4"], arms["S1-pool-16"]).change_unit(0.01),
        "whole_pool_over_1/4": contrast_arms(arms["S1"], arms["S1-pool-4"]).change_unit(0.01),
        "quiet_student_over_control": contrast_arms(arms["S1-quiet"], arms["C1"]).change_unit(0.01),
    }
    command = "python -m benchmarks.method_digits" + (" --quick" if options.quick else "")
    result = describe_results(command, seeds, arms, intervals, CLAIMS)
    options.results.mkdir(parents=True, exist_ok=True)
    draw_generations(arms, LINES, options.results / "method_digits.svg")
    write_results(options.results, "method_digits", result, render_digits_page(result, arms))


if __name__ == "__main__":
    main()
