"""A training for tests to start in several processes: `train_in_forks`, or python -m tests.training.together FOLDER OPTIONS (JSON).

`prepare_folder` comes first. Leaves what came of it in FOLDER/trained.safetensors and FOLDER/trained.json. KILL_AT=STEP kills one of the
processes after that step.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ns.config.schema import ModelConfig, NoiseConfig, OptimizerConfig, RoleConfig, TrainConfig
from ns.data.dataset import Dataset
from ns.data.importing.digits import write_digits
from ns.data.loading import stream
from ns.data.loading.stream import LabeledImages, PseudoLabeledImages
from ns.modeling import factory as models
from ns.modeling.distributed import process_group, report_failure
from ns.storage import LocalStore
from ns.training.loop import train_model
from ns.training.monitor import Monitor
from ns.training.plan import plan_training

CLASSES = 10


class Deadly(Monitor):
    """Kills this process after the step in KILL_AT, in odd steps the first process, in even ones the last."""

    rank, size = 0, 1

    def on_step_end(self, step: int, waited_seconds: float) -> None:
        super().on_step_end(step, waited_seconds)
        if step == int(os.environ.get("KILL_AT", "-1")) and self.rank == (0 if step % 2 else self.size - 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if step == int(os.environ.get("ASK_AT", "-1")) and self.rank == 0:
            # The launcher, as Kubernetes would; two above: torchrun is between.
            os.kill(int(os.environ["LAUNCHER"]), signal.SIGTERM)


def prepare_folder(folder: Path) -> None:
    """Writes the images, which takes longer than to train on them."""
    for part in ("labeled", "heldout"):
        write_digits(f"digits:{part}", LocalStore(folder / part))


def train_in_forks(
    processes: int, folder: Path, options: Mapping[str, Any], environment: Mapping[str, str]
) -> list[int | None]:
    """Trains as torchrun would have it, by processes that have torch loaded already. Returns their exit codes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    forks = []
    for rank in range(processes):
        variables = {name: str(value) for name, value in (world | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        forks.append(context.Process(target=train_fork, args=(folder, dict(options), {**variables, **environment})))
        forks[-1].start()
    for fork in forks:
        fork.join()
    return [fork.exitcode for fork in forks]


def train_fork(folder: Path, options: dict[str, Any], environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    train(folder, options)


def train(folder: Path, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    noise = NoiseConfig(**{"flip": False, **options.pop("noise", {})})
    sgd = OptimizerConfig(name="sgd", **{"lr": 0.5, "warmup_epochs": 1, **options.pop("optimizer", {})})
    fields = {"labeled_batch": 12, "unlabeled_ratio": 1, "epochs": 5, "loader_workers": 0, "precision": "float32"}
    config = RoleConfig(
        model=ModelConfig(arch="test_efficientnet", resolution=32, crop=options.pop("crop", "pad")),
        noise=noise,
        train=TrainConfig(**{"optimizer": sgd, "label_smoothing": 0.1, **fields, **options}),
    )
    with process_group() as world, report_failure():
        stores = [LocalStore(folder / part) for part in ("labeled", "heldout")]
        labeled, pool = (LabeledImages(store, Dataset.load(store)) for store in stores)
        targets = [0.9 * torch.eye(CLASSES)[torch.from_numpy(shard)].numpy() + 0.01 for shard in pool.class_ids]
        seen: dict[int, list[float]] = {}
        take = stream.TrainingBatches.__getitem__

        def spy(self: stream.TrainingBatches, step: int) -> stream.Batch:
            batch = take(self, step)
            seen[step] = batch.images.float().mean((1, 2, 3)).tolist()
            return batch

        stream.TrainingBatches.__getitem__ = spy  # type: ignore[method-assign]
        torch.manual_seed(1)
        network = models.build_model(config.model, config.noise, CLASSES)
        monitor = Deadly()
        monitor.rank, monitor.size = world.rank, world.world_size
        trained = train_model(
            network,
            plan_training(config, labeled.samples),
            labeled,
            PseudoLabeledImages(pool.source, targets.__getitem__, pool.copies),
            classes=CLASSES,
            seed=1,
            checkpoints=LocalStore(folder / "checkpoints"),
            world=world,
            monitor=monitor,
        )
        (folder / f"seen-{world.rank}.json").write_text(json.dumps(seen))
        if world.is_main:
            save_file({name: value.contiguous() for name, value in trained.weights.items()}, folder / "trained.safetensors")
            (folder / "trained.json").write_text(json.dumps(trained.history))


if __name__ == "__main__":
    train(Path(sys.argv[1]), json.loads(sys.argv[2]))
