"""All benchmarks' figures in one table, and a guard against large regressions.

    python -m benchmarks.summary            writes benchmarks/results/README.md, and the table in README.md, from what the benchmarks
                                            have kept in benchmarks/results
    python -m benchmarks.summary --quick    runs each benchmark, or those after --only, with --quick, and fails if a ratio is a quarter
                                            worse than in benchmarks/results/quick.json, twice in a row; --keep writes that file

Only ratios are compared, whose two sides were measured in turns in one run: seconds differ on every machine.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.measure import RESULTS, format_markdown_table

QUICK = "quick.json"
TOLERANCE = 0.25
"""Share by which a ratio may be worse than it was."""


class BenchmarkFigure(NamedTuple):
    name: str
    description: str
    target: float | None
    more_is_better: bool = True
    bound: str | None = None
    """The figure that compares us with the network alone: divided by it, this one is what the network alone would reach."""

    def meets_target(self, value: float) -> bool | None:
        if self.target is None:
            return None
        return value >= self.target if self.more_is_better else value <= self.target

    def has_regressed(self, value: float, before: float) -> bool:
        return value < before * (1 - TOLERANCE) if self.more_is_better else value > before * (1 + TOLERANCE)


FIGURES = {
    "data": (
        BenchmarkFigure("decode_ratio_32px", "reading and decoding small images ÷ the bare decoder", 0.85),
        BenchmarkFigure("decode_ratio_large", "the same, photographs of 98 kB", 0.85),
        BenchmarkFigure("vs_imagefolder", "÷ torchvision's ImageFolder and DataLoader", 2.0),
        BenchmarkFigure("vs_timm", "training's images ÷ timm's loader, both with RandAugment", 2.0),
        BenchmarkFigure("vs_webdataset", "÷ webdataset on the same tars", 2.0),
    ),
    "photos": (
        BenchmarkFigure("photo_train_vs_timm", "training's input of a photograph ÷ timm's transform, both with RandAugment", 2.2),
        BenchmarkFigure("photo_label_vs_timm", "labeling's ÷ timm's transform", 2.8),
        BenchmarkFigure("photo_label_share_of_decode", "labeling's ÷ the bare decoder", 0.55),
        BenchmarkFigure("photo_train_vs_today", "training's ÷ that of commit 904b801", 1.6),
    ),
    "train": (
        BenchmarkFigure("step_ratio_plain", "training, RandAugment off ÷ the bare step on a batch in memory", 0.90),
        BenchmarkFigure("step_ratio_randaugment", "training with the paper's RandAugment ÷ the same", 0.80),
        BenchmarkFigure("vs_timm_train", "÷ timm's train.py with its defaults", 2.5, bound="step_ratio_randaugment"),
    ),
    "finetune": (
        BenchmarkFigure("vs_timm_finetune", "fine-tuning on photographs of 224 px ÷ timm's train.py, loaders included", 1.5),
    ),
    "label": (
        BenchmarkFigure("forward_ratio", "labeling, from tars to Parquet ÷ the bare forward pass", 0.95),
        BenchmarkFigure("vs_timm_inference", "÷ timm's inference.py with its defaults", 5.0, bound="forward_ratio"),
    ),
    "select": (
        BenchmarkFigure("scan_ratio", "selecting from 50 million labels ÷ reading the two columns once", 2.5, more_is_better=False),
        BenchmarkFigure("vs_pandas", "the obvious solution in pandas ÷ ours, 10 million labels", None),
        BenchmarkFigure("vs_polars", "the same in polars", None),
        BenchmarkFigure("vs_duckdb", "the same in DuckDB", None),
        BenchmarkFigure("peak_mib", "MiB of memory, 50 million labels", 1024, more_is_better=False),
    ),
    "order": (
        BenchmarkFigure("seen_share", "share of kept images seen after three times as many positions", 0.90),
        BenchmarkFigure("mix_error", "deviation of a class's share in 50 steps from that in the selection", 0.10, more_is_better=False),
        BenchmarkFigure("mib_per_worker", "MiB that the order takes in a loader process", 16, more_is_better=False),
        BenchmarkFigure("order_throughput_ratio", "positions per second ÷ those of windows of 8 shards with all copies", 0.95),
    ),
    "duplicates": (
        BenchmarkFigure("copies_found", "share of copies, brighter and noisy, that are found in a pool", 0.95),
        BenchmarkFigure("cameras_mistaken", "share of fixed cameras' pictures that are taken for copies", 0.01, more_is_better=False),
        BenchmarkFigure("minutes_per_million", "minutes for a million images, a tenth of fixed cameras", None, more_is_better=False),
        BenchmarkFigure("peak_mib", "MiB of memory, a million images", 1024, more_is_better=False),
    ),
    "polluted_pool": (
        BenchmarkFigure("precision_lost", "points of precision that a half foreign pool loses, filtered", 3.0, more_is_better=False),
        BenchmarkFigure("kept_share", "share of the images of the classes that the foreign score lets through", None),
    ),
    "loop": (
        BenchmarkFigure("overhead_share", "quickstart: share of its time in which no stage runs", 0.15, more_is_better=False),
        BenchmarkFigure("help_seconds", "seconds until `ns --help`", 0.3, more_is_better=False),
    ),
    "kfp_status": (
        BenchmarkFigure("status_share_50x5", "Argo's status of 50 tasks x 5 generations ÷ its limit", 0.6, more_is_better=False),
        BenchmarkFigure("status_share_smoke", "raw status of the smoke run ÷ 1 MiB", 0.4, more_is_better=False),
        BenchmarkFigure("package_kb", "kB of the compiled pipeline", 100, more_is_better=False),
        BenchmarkFigure("pods_per_generation", "pods of a generation with three labeling tasks", 20, more_is_better=False),
        BenchmarkFigure("drivers_critical_path", "drivers that a generation waits for one by one", 8, more_is_better=False),
        BenchmarkFigure("pods_one_generation", "pods of a whole run of one generation, three labeling tasks", None),
    ),
    "quickstart": (
        BenchmarkFigure("quickstart_vs_plain_loop", "`ns run quickstart` ÷ a plain loop in one process", 2.5, more_is_better=False),
        BenchmarkFigure("finished_run_seconds", "seconds of `ns run` of a finished run", 3.0, more_is_better=False),
        BenchmarkFigure("accuracy_difference", "top-1 of the last student - the plain loop's, points", None),
    ),
    "walk": (
        BenchmarkFigure("install_minutes", "minutes until the wheel and all it needs are installed", None, more_is_better=False),
        BenchmarkFigure("walk_64px_minutes", "minutes from `ns init` to the export, images of 64 px", 60, more_is_better=False),
        BenchmarkFigure("walk_224px_minutes", "the same, images of 224 px", 60, more_is_better=False),
    ),
    "soak": (
        BenchmarkFigure("blows", "processes killed or stopped, blobs cut off, servers killed, under two clients at once", 200),
        BenchmarkFigure("equal", "share of the clients that end like an undisturbed run", 1.0),
        BenchmarkFigure("trained_twice", "trainings that were finished more than once", 0, more_is_better=False),
        BenchmarkFigure("garbage_files", "files that an undisturbed run does not leave", 0, more_is_better=False),
        BenchmarkFigure("bare_errors", "failures without a stage or a cure, or of several lines", 0, more_is_better=False),
    ),
    "method_cifar10": (
        BenchmarkFigure("teacher_error", "CIFAR-10, 2,000 labels: the teacher's test error", 0.33, more_is_better=False),
        BenchmarkFigure("clean_error_reduction_over_control", "errors avoided by the last student ÷ those of a control", 0.15),
        BenchmarkFigure("clean_error_reduction", "the same ÷ the teacher's errors", None),
        BenchmarkFigure("mce_reduction_over_control", "errors on corrupted images avoided ÷ the control's", 0.0),
        BenchmarkFigure("mfr_reduction_over_control", "flips on perturbed images avoided ÷ the control's", 0.0),
        BenchmarkFigure("pgd_reduction_over_control", "errors under PGD avoided ÷ the control's", 0.0),
    ),
    "method_digits": (
        BenchmarkFigure("clean_error_reduction_over_control", "digits, 50 labels: the same", None),
        BenchmarkFigure("clean_error_reduction", "the same ÷ the teacher's errors", None),
    ),
}  # fmt: skip
"""Benchmark → the figures in the summary, with our targets."""
GUARDED = {
    "data": "decode_",
    "photos": "photo_label_share",
    "train": "step_ratio",
    "label": "forward_ratio",
    "select": "scan_ratio",
    "order": "",
}
"""Prefix of the figures that a quick run measures well enough; "" for all. Not of ratios to other programs, which depend on the processor
(labeling with EfficientNet-B0 ÷ timm: 9.1 on one, 3.7 on another)."""
KEPT_OF = 3
"""Number of quick runs of which the least favorable figure is kept."""


README = Path(__file__).parents[1] / "README.md"
README_MARKS = re.compile(r"(<!-- measured: .* -->\n\n).*?(<!-- end -->)", re.DOTALL)
_REDUCTION = (
    "**{BENCHMARK[clean_error_reduction_over_control]:.1%}** fewer errors after two generations than as long a training on the labels "
    "alone (95 % interval: {BENCHMARK[clean_error_reduction_over_control low]:.1%} to "
    "{BENCHMARK[clean_error_reduction_over_control high]:.1%})"
)
README_ROWS = (
    (
        "self-training on CIFAR-10, 2,000 labels, five seeds",
        _REDUCTION.replace("BENCHMARK", "method_cifar10") + "; [the experiment](docs/method.md#what-it-does-on-cifar-10)",
        "make bench-method",
    ),
    (
        "self-training on handwritten digits, 50 labels, 20 seeds",
        _REDUCTION.replace("BENCHMARK", "method_digits"),
        "make bench-digits",
    ),
    (
        "selecting from 50 million labels",
        "{select[scan_ratio]:.1f} times as long as reading them once, in {select[peak_mib]:.0f} MiB; {select[vs_pandas]:.1f} times as fast "
        "as pandas on 10 million",
        "make bench-select",
    ),
    (
        "training",
        "{train[step_ratio_plain]:.2f} of the bare step on images in memory; {train[vs_timm_train]:.1f} to "
        "{train[vs_timm_train most]:.1f} times as fast as timm's `train.py`",
        "make bench-train",
    ),
    (
        "labeling",
        "{label[forward_ratio]:.3f} to {label[forward_ratio most]:.3f} of the network alone; {label[vs_timm_inference]:.1f} to "
        "{label[vs_timm_inference most]:.1f} times as fast as timm's `inference.py`",
        "make bench-label",
    ),
    (
        "reading images",
        "{data[decode_ratio_32px]:.2f} of the bare decoder at 32 px, {data[decode_ratio_large]:.2f} with photographs",
        "make bench-data",
    ),
    (
        "fault injection under two clients at once",
        "{soak[blows]:.0f} killed processes, stopped servers and damaged blobs: {soak[equal]:.0%} of the clients end like an "
        "undisturbed run",
        "python -m benchmarks.soak",
    ),
)
"""What was measured, with the figures of benchmarks (`most`: of the most favorable case), and the command that measures it.
A row whose benchmark has not been kept is left out."""


def render_readme(readme: str, by_benchmark: Mapping[str, Mapping[str, float]]) -> str:
    """The text of README.md with the table of what was measured."""
    figures = {
        name: {**values, **{f"{figure} most": value for figure, value in _find_most_favorable(values).items()}}
        for name, values in by_benchmark.items()
    }
    rows = [
        [what, text.format_map(figures), f"`{command}`"]
        for what, text, command in README_ROWS
        if set(re.findall(r"\{(\w+)\[", text)) <= figures.keys()
    ]
    table = format_markdown_table(["what", "figure", "measured by"], rows)
    return README_MARKS.sub(lambda marks: f"{marks[1]}{table}\n\n{marks[2]}", readme)


def _find_most_favorable(figures: Mapping[str, float]) -> dict[str, float]:
    """Figure → the greatest value of its cases."""
    most: dict[str, float] = {}
    for name, value in figures.items():
        figure = name.partition(".")[0]
        most[figure] = max(value, most.get(figure, value))
    return most


def load_kept(results: Path) -> dict[str, dict[str, float]]:
    """Benchmark → figure → value, of all kept results; `FIGURE low` and `FIGURE high` are the bounds of an interval."""
    kept = {}
    for name in FIGURES:
        if (results / f"{name}.json").exists():
            result = json.loads((results / f"{name}.json").read_text())
            bounds = {
                f"{figure} {bound}": interval[bound]
                for figure, interval in result.get("intervals", {}).items()
                for bound in ("low", "high")
            }
            kept[name] = result["figures"] | bounds
    return kept


def render_summary_page(by_benchmark: Mapping[str, Mapping[str, float]]) -> str:
    rows = []
    for name, figures in FIGURES.items():
        for figure in figures:
            if figure.name not in by_benchmark.get(name, {}):
                continue
            value, sign = by_benchmark[name][figure.name], "≥" if figure.more_is_better else "≤"
            target = "" if figure.target is None else f"{sign} {figure.target:g}"
            mark = {True: "reached", False: "not reached", None: ""}[figure.meets_target(value)]
            if mark == "not reached" and (limit := compute_limit(figure, by_benchmark[name])):
                mark += f"; the network alone, on a batch in memory: {limit:.2f}"
            rows.append([f"[{name}]({name}.md)", f"`{figure.name}`: {figure.description}", f"{value:,.4g}", target, mark])
    return (
        "# What was measured\n\n"
        "Medians of ratios whose sides took turns in one run, least favorable case each. The links lead to details, spread and machine.\n"
        "`make bench` repeats all measurements.\n\n"
        f"{format_markdown_table(['benchmark', 'figure', 'value', 'target', ''], rows)}\n"
    )


def compute_limit(figure: BenchmarkFigure, figures: Mapping[str, float]) -> float | None:
    """What the network alone would reach in the least favorable case; None if that was not measured."""
    cases = [name.removeprefix(f"{figure.name}.") for name in figures if name.startswith(f"{figure.name}.")]
    if figure.bound is None or not cases:
        return None
    return min(figures[f"{figure.name}.{case}"] / figures[f"{figure.bound}.{case}"] for case in cases)


def find_regressions(
    baseline: Mapping[str, Mapping[str, float]], measure: Callable[[str], Mapping[str, float]], table: Table
) -> list[str]:
    """Returns the guarded figures that are worse than the baseline in two measurements. `measure`: benchmark → its figures."""
    regressions = []
    for name, before in baseline.items():
        first = measure(name)
        suspects = _find_worse(name, first, before)
        second = measure(name) if suspects else first
        lasting = [figure for figure in suspects if figure in _find_worse(name, second, before)]
        for figure, value in before.items():
            now = f"{second[figure]:.3f}" if figure in second else "gone"
            table.add_row(name, figure, f"{value:.3f}", now, "worse" if figure in lasting else "")
            if figure in lasting:
                regressions.append(f"{name}: {figure}: {now}, was {value:.3f}")
    return regressions


def _find_worse(name: str, now: Mapping[str, float], before: Mapping[str, float]) -> list[str]:
    return [
        figure
        for figure, value in before.items()
        if figure not in now or _find_figure(name, figure).has_regressed(now[figure], value)
    ]


def _find_figure(name: str, figure: str) -> BenchmarkFigure:
    # A figure that is not in FIGURES is a ratio of which more is better.
    return next(
        (candidate for candidate in FIGURES[name] if candidate.name == figure.partition(".")[0]),
        BenchmarkFigure(figure, "", None),
    )


def least_favorable(name: str, runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns the least favorable value of each figure over several runs of a benchmark."""
    return {
        figure: (min if _find_figure(name, figure).more_is_better else max)(run[figure] for run in runs) for figure in runs[0]
    }


def run_quick(name: str) -> dict[str, float]:
    """Returns the guarded figures of a benchmark's quick run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        subprocess.run(
            [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json", str(path)], check=True, stdout=sys.stderr
        )
        figures: dict[str, float] = json.loads(path.read_text())["figures"]
    return {figure: value for figure, value in figures.items() if figure.startswith(GUARDED[name])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="compare quick runs with the recorded ones")
    parser.add_argument(
        "--only", nargs="+", choices=list(GUARDED), default=list(GUARDED), help="with --quick: these benchmarks"
    )
    parser.add_argument("--keep", action="store_true", help="with --quick: record the measured ratios")
    options = parser.parse_args()
    console = Console(width=160)
    if not options.quick:
        text = render_summary_page(load_kept(RESULTS))
        (RESULTS / "README.md").write_text(text)
        README.write_text(render_readme(README.read_text(), load_kept(RESULTS)))
        console.print(text, markup=False)
        return
    if options.keep:
        by_benchmark = {name: least_favorable(name, [run_quick(name) for _ in range(KEPT_OF)]) for name in GUARDED}
        (RESULTS / QUICK).write_text(json.dumps(by_benchmark, indent=1) + "\n")
        return
    if not (RESULTS / QUICK).exists():
        raise SystemExit(
            f"{RESULTS / QUICK}: does not exist; record ratios to compare with: python -m benchmarks.summary --quick --keep"
        )
    table = Table("benchmark", "ratio", "was", "is", "")
    baseline = json.loads((RESULTS / QUICK).read_text())
    worse = find_regressions({name: baseline[name] for name in options.only}, run_quick, table)
    console.print(table)
    if worse:
        raise SystemExit("\n".join(["a quarter worse than recorded, twice:", *worse]))


if __name__ == "__main__":
    main()
