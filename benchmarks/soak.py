"""Fault injection: five generations on real images, once undisturbed and twice with faults, must end with the same digests.

    python -m benchmarks.soak [--generations 5] [--seed 0] [--keep]

The undisturbed run, in a folder, is watched: memory and open files of its processes must not grow from generation to generation. Then
the same experiment runs twice more, restarted whenever it ends with an error, until it is done:

    on S3      processes of the run are SIGKILLed, and the server (OpenStack Swift, on this machine) is killed and started again
    on a disk  processes are SIGKILLed, and the disk, a small tmpfs, is filled for seconds (needs root, for mount)

Needs the CIFAR-10 images in ../shared/data/cifar10, and the Debian packages that .ci/packages installs.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import yaml
from minio import Minio
from rich.table import Table

from benchmarks.measure import CIFAR10, draw_tables, make_parser, write_benchmark
from tests.integration.outcome import results
from tests.storage.swift import Swift, reason_against

COUNTS = {"labeled": 40, "heldout": 60, "pool": 300}
"""Images per class."""
FAULT_INTERVAL = (0.05, 0.2)
"""Time between two faults, as shares of the undisturbed run's time, so that work gets done on any machine."""
DISK_MIB = 600
TRIES = 200
RUN = "soak"

Fault = tuple[str, Callable[[], None]]


def make_soak_experiment(tables: Path, generations: int) -> dict[str, Any]:
    role: dict[str, Any] = {
        "model": {"arch": "test_efficientnet", "resolution": 32, "crop": "pad", "inference_precision": "float32"},
        "noise": {"randaugment_magnitude": 4, "flip": True},
        "train": {
            "labeled_batch": 50,
            "epochs": 30,
            "precision": "float32",
            "processes": 1,
            "ema_decay": 0.98,
            "checkpoint_seconds": 1,
            "optimizer": {"name": "adamw", "lr": 0.005, "weight_decay": 0.01, "schedule": "cosine", "warmup_epochs": 2},
        },
    }
    student = {**role, "train": {**role["train"], "init": "teacher"}}
    return {
        "name": RUN,
        "generations": generations,
        "data": {part: str(tables / f"{part}.csv") for part in ("labeled", "pool", "heldout")},
        "teacher": role,
        "students": [student],
        "labeling": {"tasks": 2},
        "selection": {"min_confidence": 0.15, "per_class": COUNTS["pool"], "max_repeat": 3},
        # Accept every student: the loop is tested, not the method.
        "gate": {"min_gain": -1},
    }


def write_soak_tables(folder: Path) -> None:
    """Writes real images, a few hundred per class, and the tables of the parts."""
    with tarfile.open(CIFAR10) as archive:
        archive.extractall(folder, filter="data")
    for part, table in draw_tables(folder / "test", COUNTS, seed=0).items():
        (folder / f"{part}.csv").write_text(table)


def make_command(config: Path, root: str) -> list[str]:
    return [sys.executable, "-m", "ns", "run", str(config), "--root", root, "--run", RUN, "--json"]


def list_processes(pid: int) -> list[psutil.Process]:
    with suppress(psutil.Error):
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    return []


class ResourceWatcher(threading.Thread):
    """Records the peaks of memory (MiB, largest process) and of open files (all processes) per generation of a run."""

    def __init__(self, pid: int, steps: Path) -> None:
        super().__init__(daemon=True)
        self.peaks: dict[int, tuple[float, int]] = {}
        self._pid, self._stage_folder = pid, steps

    def run(self) -> None:
        while members := list_processes(self._pid):
            generation = len(list(self._stage_folder.glob("*-gate*.json"))) + 1
            sizes, files = [0.0], 0
            for member in members:
                with suppress(psutil.Error):
                    sizes.append(member.memory_info().rss / 2**20)
                    files += member.num_fds()
            memory, most_files = self.peaks.get(generation, (0.0, 0))
            self.peaks[generation] = (max(memory, *sizes), max(most_files, files))
            time.sleep(0.3)


def run_undisturbed(config: Path, root: Path) -> tuple[dict[str, Any], dict[int, tuple[float, int]], float]:
    started = time.monotonic()
    process = subprocess.Popen(make_command(config, str(root)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    watcher = ResourceWatcher(process.pid, root / RUN / "stages")
    watcher.start()
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the undisturbed run failed: {' '.join(make_command(config, str(root)))}")
    return results(json.loads(out)), watcher.peaks, time.monotonic() - started


def run_chaotic(
    config: Path,
    root: str,
    environment: Mapping[str, str],
    faults: Sequence[Fault],
    between: tuple[float, float],
    chance: random.Random,
    log: Path,
) -> tuple[dict[str, Any], dict[str, int]]:
    """Returns the run's digests, and how often each fault happened.

    `between`: least and greatest seconds between two faults; a fault must be over when its function returns.
    """
    counts = {"killed": 0, "started": 0, **{name: 0 for name, _ in faults}}
    while True:
        if counts["started"] == TRIES:
            raise SystemExit(f"{root}: not done after {TRIES} starts; see {log}")
        counts["started"] += 1
        with log.open("ab") as file:
            process = subprocess.Popen(
                make_command(config, root), env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=file
            )
        printed: list[bytes] = []
        reader = threading.Thread(target=_collect_output, args=(process, printed), daemon=True)
        reader.start()
        while reader.is_alive():
            reader.join(chance.uniform(*between))
            if not reader.is_alive():
                break
            kind, fault = chance.choice([("killed", None), *faults])
            if fault is None:
                members = list_processes(process.pid)
                if not members:
                    continue
                with suppress(psutil.Error):
                    chance.choice(members).send_signal(signal.SIGKILL)
            else:
                fault()
            counts[kind] += 1
        if process.returncode == 0:
            return results(json.loads(printed[0])), counts


def _collect_output(process: subprocess.Popen[bytes], printed: list[bytes]) -> None:
    printed.append(process.communicate()[0])


@contextmanager
def mount_small_disk(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill_disk(disk: Path, chance: random.Random) -> None:
    """Fills the disk completely, for seconds."""
    filler = disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))
    time.sleep(chance.uniform(1, 3))
    filler.unlink()


def main() -> None:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--generations", type=int, default=5, help="number of generations (5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults")
    options = parser.parse_args()
    for missing in ("" if CIFAR10.exists() else f"needs the images in {CIFAR10.parent}", reason_against()):
        if missing:
            raise SystemExit(missing)
    os.environ["OMP_NUM_THREADS"] = "1"
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="ns-soak-") as scratch:
        folder = Path(scratch)
        write_soak_tables(folder)
        config = folder / "soak.yaml"
        config.write_text(yaml.safe_dump(make_soak_experiment(folder, options.generations), sort_keys=False))
        calm, peaks, seconds = run_undisturbed(config, folder / "calm")
        growth = Table("generation", "largest process, MiB", "open files")
        for generation, (memory, files) in sorted(peaks.items()):
            growth.add_row(str(generation), f"{memory:,.0f}", str(files))
        table = Table("root", "ends as the undisturbed run", "started", "faults")
        table.add_row("folder, undisturbed", "", "1", f"{seconds:.0f} s")
        between = (FAULT_INTERVAL[0] * seconds, FAULT_INTERVAL[1] * seconds)
        figures = {
            "memory_growth": _peak_growth(peaks, 0, options.generations),
            "files_growth": _peak_growth(peaks, 1, options.generations),
        }

        def run_with_faults(name: str, root: str, environment: Mapping[str, str], *faults: Fault) -> None:
            started = time.monotonic()
            outcome, counts = run_chaotic(config, root, environment, faults, between, chance, folder / f"{name}.log")
            figures[f"{name}_equal"] = float(outcome == calm)
            times = counts.pop("started")
            what = ", ".join(f"{kind} {count}×" for kind, count in counts.items())
            table.add_row(name, "yes" if outcome == calm else "NO", str(times), f"{what}, {time.monotonic() - started:.0f} s")

        with mount_small_disk(folder / "disk") as disk:
            root = str(disk / "runs")
            run_with_faults("disk", root, {}, ("disk full", lambda: fill_disk(disk, chance)))
        (folder / "swift").mkdir()
        server = Swift(folder / "swift")
        server.start()

        def restart_server() -> None:
            server.kill()
            time.sleep(chance.uniform(0.5, 3))
            server.start()

        access_key, secret_key = "test:tester", "testing"
        endpoint = server.url.removeprefix("http://")
        client = Minio(endpoint=endpoint, access_key=access_key, secret_key=secret_key, secure=False, region="us-east-1")
        client.make_bucket(bucket_name=RUN)
        environment = {
            "AWS_ENDPOINT_URL": server.url,
            "AWS_ACCESS_KEY_ID": access_key,
            "AWS_SECRET_ACCESS_KEY": secret_key,
            "AWS_REGION": "us-east-1",
            "NS_CACHE_DIR": str(folder / "cache"),
        }
        try:
            run_with_faults("s3", f"s3://{RUN}/runs", environment, ("server killed", restart_server))
        finally:
            server.kill()
    write_benchmark("soak", figures, options, growth, table)
    if not all(figures[name] for name in ("disk_equal", "s3_equal")):
        raise SystemExit("the result differs from that of the undisturbed run")


def _peak_growth(peaks: Mapping[int, tuple[float, int]], which: int, generations: int) -> float:
    """The last generation's peak ÷ the first one's. `which`: 0 for memory, 1 for files."""
    return round(peaks[generations][which] / peaks[1][which], 3)


if __name__ == "__main__":
    main()
