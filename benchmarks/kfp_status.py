"""What runs of the compiled pipeline cost Kubeflow: their pods, and the status that Argo keeps of them in one object of 1 MiB.

Computed from the package by the rules of KFP and Argo (pipelines/run_size.py), which a real cluster agreed with; nothing is run.
"""

from rich.table import Table

from benchmarks.measure import parse_arguments, write_benchmark
from pipelines import PACKAGE
from pipelines.run_size import LIMIT_BYTES, RunShape, count_generation_pods, predict_run

SHAPES = {
    "smoke run": RunShape(generations=1, tasks=1),
    "1 generation, 3 tasks": RunShape(generations=1, tasks=3),
    "3 generations, 8 tasks": RunShape(generations=3, tasks=8),
    "5 generations, 50 tasks": RunShape(generations=5, tasks=50),
}


def main() -> None:
    options = parse_arguments(__doc__ or "")
    package = PACKAGE.read_text()
    sizes = {name: predict_run(package, shape) for name, shape in SHAPES.items()}
    table = Table("run", "pods", "of these drivers", "nodes", "status, kB", "compressed, kB", "share of 1 MiB")
    for name, size in sizes.items():
        kilobytes = [f"{bytes_ / 1000:,.0f}" for bytes_ in (size.status_bytes, size.compressed_bytes)]
        table.add_row(name, str(size.pods), str(size.drivers), str(len(size.nodes)), *kilobytes, f"{size.share:.0%}")
    generation = count_generation_pods(package, tasks=3)
    figures = {
        "status_share_50x5": round(sizes["5 generations, 50 tasks"].share, 3),
        "status_share_smoke": round(sizes["smoke run"].status_bytes / LIMIT_BYTES, 3),
        "package_kb": round(len(package.encode()) / 1000, 1),
        "pods_per_generation": generation.pods,
        "drivers_critical_path": generation.critical_drivers,
        "pods_one_generation": sizes["1 generation, 3 tasks"].pods,
    }
    write_benchmark("kfp_status", figures, options, table)


if __name__ == "__main__":
    main()
