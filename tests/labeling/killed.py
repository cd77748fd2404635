"""Workers that are killed all the time, for a test to start: python -m tests.labeling.killed PATH KILLS

Four workers label one pool, each its part; the worker that finds all of it labeled joins it, and commits it to a registry. They are forked
from this process, which has imported everything, and killed at instants that follow from a seed. Prints the result as JSON.
"""

import io
import json
import os
import signal
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import minio
import numpy as np
import pyarrow.dataset
import timm
import torch
from PIL import Image

from ns.config.schema import LabelingConfig, ModelConfig, NoiseConfig
from ns.data.dataset import Dataset
from ns.data.importing.writer import ShardWriter
from ns.labeling.label_set import LabelSet
from ns.labeling.offline import label_dataset
from ns.labeling.registry import LabelRegistry, VersionTag
from ns.labeling.registry.storage import find_missing_keys
from ns.modeling import factory as models
from ns.modeling import predictor as inference
from ns.modeling.manifest import Lineage
from ns.storage import LocalStore

IMPORTED = (inference, minio, pyarrow.dataset, timm)
"""What workers would import themselves: most kills would hit nothing but that."""
WORKERS = 4
SHARDS = 12
CLASSES = tuple("abcde")


def main() -> None:
    path, kills = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    registry = LabelRegistry(str(path / "git"), str(path / "remote"))
    forked(lambda: prepare(path))
    calm = LocalStore(path / "calm")
    labeling = forked(lambda: label_dataset(str(path / "model"), str(path / "pool"), calm.uri, LabelingConfig(batch=8)))
    undisturbed = LabelSet.load(calm)
    wanted = undisturbed.digest
    committing = forked(lambda: registry.commit_version(VersionTag("p", "calm", 1), calm, undisturbed))
    rng = np.random.default_rng(0)
    killed, number, rounds = 0, 0, {"labeling": 0, "committing": 0}
    digests: set[str] = set()
    whole: set[str] = set()
    while killed < kills or not digests:
        out = path / f"out-{number}"
        labeled = (out / LabelSet.filename).exists()
        commits = number % 8 == 0
        if labeled and not commits:
            digests.add(LabelSet.load(LocalStore(out)).digest)
            number += 1
            continue
        rounds["committing" if labeled else "labeling"] += 1
        # About as long as the work takes without kills: some instants lie in each part of it, and some of the work is done.
        instants = np.sort(rng.uniform(0, committing if labeled else labeling, WORKERS))
        if killed >= kills:
            instants += 1e9
        if labeled:
            instants[-1] += 1e9  # one committer gets through, or no version would ever be made
        workers = [start(partial(work, path, number, part, registry)) for part in range(WORKERS)]
        begun = time.monotonic()
        # Workers are killed in another order each time.
        order = rng.permutation(WORKERS).tolist()
        for worker, instant in zip(order, instants, strict=True):
            while (
                time.monotonic() < begun + instant
                and os.waitid(os.P_PID, workers[worker], os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
            ):
                time.sleep(0.005)
            os.kill(workers[worker], signal.SIGKILL)
        ends = [os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) for worker in workers]
        assert set(ends) <= {0, -signal.SIGKILL}, ends
        killed += ends.count(-signal.SIGKILL)
        if labeled:
            whole |= check(registry, path, wanted, known=whole)
        if labeled and 0 in ends:
            digests.add(LabelSet.load(LocalStore(out)).digest)
            number += 1
    # What came later took nothing away from what was there before.
    check(registry, path, wanted, known=set())
    print(json.dumps({"killed": killed, "rounds": rounds, "wanted": wanted, "digests": sorted(digests), "label_sets": number}))


def check(registry: LabelRegistry, path: Path, wanted: str, *, known: set[str]) -> set[str]:
    """The versions that are not known yet; no data of them is missing."""
    versions = [summary.version for summary in registry.list_versions() if str(summary.version.tag) not in known]
    for version in versions:
        assert find_missing_keys(str(path / "remote"), version) == [], version.tag
        assert version.label_set == wanted
    return {str(version.tag) for version in versions}


def work(path: Path, number: int, part: int, registry: LabelRegistry) -> None:
    out = path / f"out-{number}"
    shards = f"{part * SHARDS // WORKERS}-{(part + 1) * SHARDS // WORKERS}"
    made = label_dataset(str(path / "model"), str(path / "pool"), str(out), LabelingConfig(batch=8), shards=shards)
    if made is not None and number % 8 == 0:
        registry.commit_version(VersionTag("p", "r", number + 1), LocalStore(out), made)


def start(run) -> int:  # type: ignore[no-untyped-def]
    """A forked process that runs something and ends."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        run()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def forked(run) -> float:  # type: ignore[no-untyped-def]
    """Runs something in a forked process. Returns seconds."""
    begun = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(start(run), 0)[1]) == 0
    return time.monotonic() - begun


def prepare(path: Path) -> None:
    """A pool of twelve shards, and a model."""
    folder = LocalStore(path / "pool")
    rng = np.random.default_rng(0)
    with ShardWriter(folder, max_samples=10, max_bytes=1 << 20) as writer:
        for index in range(10 * SHARDS):
            png = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(png, "PNG")
            writer.add_image(f"image-{index:03d}", "png", png.getvalue()[: 60 if index % 17 == 3 else None], None)
    Dataset(name="pool", role="unlabeled", classes=(), shards=writer.shards).save(folder)
    torch.manual_seed(0)
    config, noise = ModelConfig(arch="test_efficientnet", resolution=32, crop="none"), NoiseConfig()
    network = models.build_model(config, noise, len(CLASSES))
    fields = {"generation": 0, "model": config, "noise": noise, "classes": CLASSES, "parameters": 1, "steps": 0}
    models.save_model(
        LocalStore(path / "model"), network.state_dict(), {**fields, "lineage": Lineage(config="0", labeled="0")}, []
    )


if __name__ == "__main__":
    main()
