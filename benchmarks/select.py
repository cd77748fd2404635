"""Time and memory of a selection, against reading the columns it needs, and against pandas, polars and DuckDB.

    python -m benchmarks.select [--quick] [--json FILE] [--keep]

Label sets of 1, 10 and 50 million generated rows of 1000 classes are written to a scratch folder (2.5 GB; TMPDIR moves it), and
selected from with the paper's policy. Each selection runs in its own process, whose peak memory the kernel reports.

    scan_ratio     selection ÷ reading key, confidence and classes of all rows, once; greatest case
    peak_mib       memory of a process that selects from the largest label set, all libraries included
    growth_10x     time for ten times the rows ÷ ten times the time; greatest case
    peak_growth    memory at the largest ÷ at the smallest
    vs_pandas …    their time ÷ ours at 10 million rows (at 1 million with --quick)
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.table import Table

from benchmarks.measure import parse_arguments, write_benchmark
from ns.config.schema import SelectionConfig
from ns.core.digest import sha256_bytes
from ns.labeling.label_set import LabelSet, LabelShard, build_row_schema
from ns.labeling.selection import make_selection
from ns.storage import LocalStore

CLASSES, TOP_K = 1000, 10
SHARD_ROWS = 10_000
PER_CLASS_SHARE = 0.4
"""Rows to select per class, as a share of the mean class: some classes have more rows, some fewer."""
MIN_CONFIDENCE = 0.3


def main() -> None:
    options = parse_arguments(__doc__ or "")
    sizes = [250_000, 1_000_000] if options.quick else [1_000_000, 10_000_000, 50_000_000]
    figures: dict[str, float] = {}
    table = Table("rows", "program", "seconds", "MiB", "÷ scan")
    times: dict[int, float] = {}
    peaks: dict[int, float] = {}
    ratios: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for size in sizes:
            grow_label_set(folder, size)
            names = ["scan", "ours"]
            if size == sizes[-1 if options.quick else 1]:
                names += ["pandas", "polars", "duckdb"]
            # The first reading fills the page cache for all.
            measure_once("scan", folder)
            measurements = {name: measure_best(name, folder, rounds=1 if size > 10_000_000 else 3) for name in names}
            times[size], peaks[size] = measurements["ours"]
            ratios.append(times[size] / measurements["scan"][0])
            for name, (seconds, peak) in measurements.items():
                table.add_row(f"{size:,}", name, f"{seconds:.2f}", f"{peak:,.0f}", f"{seconds / measurements['scan'][0]:.2f}")
                if name not in ("scan", "ours"):
                    figures[f"vs_{name}"] = round(seconds / times[size], 3)
    steps = list(pairwise(sizes))
    figures |= {
        "scan_ratio": round(max(ratios), 3),
        "peak_mib": round(peaks[sizes[-1]], 1),
        "peak_growth": round(peaks[sizes[-1]] / peaks[sizes[0]], 3),
        "growth_10x": round(max(times[b] / times[a] / (b / a) for a, b in steps), 3),
    }
    write_benchmark("select", figures, options, table)


def grow_label_set(folder: Path, rows: int) -> None:
    """Adds shards until there are so many rows, and writes the manifest."""
    shards = [LabelShard.load_file(LocalStore(folder), path.name) for path in sorted(folder.glob("shard-*.json"))]
    for number in range(len(shards), rows // SHARD_ROWS):
        rng = np.random.default_rng(number)
        # Classes of unequal size, and confidences near 1, as trained networks give them.
        class_ids = (CLASSES * rng.random(SHARD_ROWS) ** 1.5).astype(np.uint16)
        confidence = (1 - 0.95 * rng.random(SHARD_ROWS) ** 3).astype(np.float32)
        classes = (class_ids[:, None] + np.arange(TOP_K, dtype=np.uint16)) % CLASSES
        rest = (1 - confidence[:, None]) / TOP_K * np.ones((1, TOP_K - 1))
        probabilities = np.concatenate([confidence[:, None], rest], 1).astype(np.float16)
        keys = pc.utf8_lpad(pa.array(rng.permutation(SHARD_ROWS) + number * SHARD_ROWS).cast(pa.string()), 12, "0")
        table = pa.table(
            [
                keys,
                pa.array(confidence),
                pa.FixedSizeListArray.from_arrays(pa.array(classes.reshape(-1).astype(np.uint16)), TOP_K),
                pa.FixedSizeListArray.from_arrays(pa.array(probabilities.reshape(-1)), TOP_K),
                pa.nulls(SHARD_ROWS, pa.string()),
            ],
            schema=build_row_schema(TOP_K),
        )
        name = f"shard-{number:05d}"
        pq.write_table(table, folder / f"{name}.parquet", compression="zstd")
        data = (folder / f"{name}.parquet").read_bytes()
        shard = LabelShard(
            name=f"{name}.parquet",
            source="0" * 64,
            rows=SHARD_ROWS,
            unreadable=0,
            bytes=len(data),
            sha256=sha256_bytes(data),
        )
        shard.save_file(LocalStore(folder), f"{name}.json")
        shards.append(shard)
    zero = "0" * 64
    label_set = LabelSet(
        dataset=zero,
        teacher=zero,
        code=zero,
        classes=tuple(str(class_id) for class_id in range(CLASSES)),
        top_k=TOP_K,
        shards=tuple(shards),
    )
    label_set.save(LocalStore(folder))


def measure_best(name: str, folder: Path, *, rounds: int) -> tuple[float, float]:
    """Shortest time in seconds, and greatest memory in MiB."""
    measurements = [measure_once(name, folder) for _ in range(rounds)]
    return min(seconds for seconds, _ in measurements), max(peak for _, peak in measurements)


def measure_once(name: str, folder: Path) -> tuple[float, float]:
    """Runs in its own process. Returns seconds without imports, and MiB with them."""
    command = [sys.executable, "-m", "benchmarks.select", "--one", name, str(folder)]
    seconds, peak = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return float(seconds), float(peak)


def run_contestant(name: str, folder: Path) -> None:
    store = LocalStore(folder)
    label_set = LabelSet.load(store)
    per_class = int(PER_CLASS_SHARE * label_set.rows / CLASSES)
    contestant: Callable[[], int] = {
        "scan": lambda: scan_columns(folder, label_set),
        "ours": lambda: select_ours(store, label_set, per_class),
        "pandas": lambda: select_with_pandas(folder, per_class),
        "polars": lambda: select_with_polars(folder, per_class),
        "duckdb": lambda: select_with_duckdb(folder, per_class),
    }[name]
    started = time.perf_counter()
    kept = contestant()
    seconds = time.perf_counter() - started
    assert kept > 0
    # Not resource.getrusage: its maximum includes the parent process.
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    print(json.dumps([seconds, peak]))


def scan_columns(folder: Path, label_set: LabelSet) -> int:
    return sum(
        len(pq.read_table(folder / shard.name, columns=["key", "confidence", "top_class"])) for shard in label_set.shards
    )


def select_ours(store: LocalStore, label_set: LabelSet, per_class: int) -> int:
    policy = SelectionConfig(per_class=per_class, min_confidence=MIN_CONFIDENCE)
    return make_selection(store, label_set, policy, seed=0, label_set_key="").kept


def select_with_pandas(folder: Path, per_class: int) -> int:
    import pandas as pd

    table = pq.read_table(sorted(folder.glob("*.parquet")), columns=["key", "confidence", "top_class"])
    class_ids = table["top_class"].combine_chunks().flatten().to_numpy()[::TOP_K]
    frame = pd.DataFrame({"key": table["key"].to_pandas(), "confidence": table["confidence"].to_numpy(), "label": class_ids})
    del table
    frame = frame[frame["confidence"] > MIN_CONFIDENCE]
    frame["tie"] = pd.util.hash_array(frame["key"].to_numpy())
    ranked = frame.sort_values(["label", "confidence", "tie"], ascending=[True, False, True])
    return len(ranked.groupby("label").head(per_class))


def select_with_polars(folder: Path, per_class: int) -> int:
    import polars as pl

    return int(
        pl.scan_parquet(folder / "*.parquet")
        .filter(pl.col("confidence") > MIN_CONFIDENCE)
        .select("confidence", label=pl.col("top_class").arr.first(), tie=pl.col("key").hash(0))
        .sort("label", "confidence", "tie", descending=[False, True, False])
        .group_by("label", maintain_order=True)
        .head(per_class)
        .select(pl.len())
        .collect()
        .item()
    )


def select_with_duckdb(folder: Path, per_class: int) -> int:
    import duckdb

    query = f"""
        select count(*) from (
            select top_class[1] as label from read_parquet('{folder}/*.parquet') where confidence > {MIN_CONFIDENCE}
            qualify row_number() over (partition by label order by confidence desc, hash(key)) <= {per_class}
        )"""
    return int(duckdb.sql(query).fetchall()[0][0])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        run_contestant(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
