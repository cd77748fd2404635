"""What runs of the compiled pipeline cost Kubeflow: their pods, and the status that Argo keeps of them in one object of 1 MiB.

Computed from the package by the rules of KFP and Argo (pipelines/run_size.py), which a real cluster agreed with; nothing is run.
"""

from rich.table import Table

from benchmarks.measure import parse_arguments, write_benchmark
from pipelines import PACKAGE
from pipelines.placement import STAGE_RETRIES, Placement, render_package
from pipelines.run_size import LIMIT_BYTES, RunShape, count_generation_pods, predict_run

SHAPES = {
    "1 generation, 3 tasks": RunShape(generations=1, tasks=3),
    "3 generations, 8 tasks": RunShape(generations=3, tasks=8),
    "5 generations, 50 tasks": RunShape(generations=5, tasks=50),
    "the same, every stage fails three times": RunShape(generations=5, tasks=50, retries=STAGE_RETRIES),
}


def main() -> None:
    options = parse_arguments(__doc__ or "")
    package = render_package(PACKAGE.read_text(), Placement())
    sizes = {"smoke run": predict_run(render_package(package, Placement(), generations=1), RunShape())}
    sizes |= {name: predict_run(package, shape) for name, shape in SHAPES.items()}
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
        "pods_smoke": sizes["smoke run"].pods,
        "status_share_all_retries": round(sizes["the same, every stage fails three times"].share, 3),
    }
    write_benchmark("kfp_status", figures, options, table)


if __name__ == "__main__":
    main()
