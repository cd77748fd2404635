"""A training for tests to start in several processes: python -m tests.training.together FOLDER OPTIONS (JSON).

Leaves what came of it in FOLDER/trained.safetensors and FOLDER/trained.json. KILL_AT=STEP kills one of the processes after that step.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from ns.config.schema import ModelConfig, NoiseConfig, OptimizerConfig, RoleConfig, TrainConfig
from ns.data.digits import write_digits
from ns.data.loading import stream
from ns.data.loading.stream import Labelled, PseudoLabelled
from ns.modeling import factory as models
from ns.modeling.distributed import failures_told, joined
from ns.storage import LocalStore
from ns.training.loop import train
from ns.training.monitor import Monitor
from ns.training.plan import training

CLASSES = 10


class Deadly(Monitor):
    """Kills this process after the step in KILL_AT, in odd steps the first process, in even ones the last."""

    rank, size = 0, 1

    def stepped(self, step: int, waited_seconds: float) -> None:
        super().stepped(step, waited_seconds)
        if step == int(os.environ.get("KILL_AT", "-1")) and self.rank == (0 if step % 2 else self.size - 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if step == int(os.environ.get("ASK_AT", "-1")) and self.rank == 0:
            # The launcher, as Kubernetes would; two above: torchrun is between.
            os.kill(int(os.environ["LAUNCHER"]), signal.SIGTERM)


def main() -> None:
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    noise = NoiseConfig(**{"crop": "pad", "flip": False, **options.pop("noise", {})})
    sgd = OptimizerConfig(name="sgd", **{"lr": 0.5, "warmup_epochs": 1, **options.pop("optimizer", {})})
    fields = {"labelled_batch": 12, "unlabelled_ratio": 1, "epochs": 5, "loader_workers": 0, "precision": "float32"}
    config = RoleConfig(
        model=ModelConfig(arch="test_efficientnet", resolution=32),
        noise=noise,
        train=TrainConfig(**{"optimizer": sgd, "label_smoothing": 0.1, **fields, **options}),
    )
    with joined() as world, failures_told():
        root = LocalStore(folder / f"data-{world.rank}")
        labelled = Labelled(root.at("labelled"), write_digits("labelled", root.at("labelled")))
        pool = Labelled(root.at("heldout"), write_digits("heldout", root.at("heldout")))
        targets = [0.9 * torch.eye(CLASSES)[torch.from_numpy(shard)].numpy() + 0.01 for shard in pool.labels]
        seen: dict[int, list[float]] = {}
        take = stream.Batches.__getitem__

        def spy(self: stream.Batches, step: int) -> stream.Batch:
            batch = take(self, step)
            seen[step] = batch.images.float().mean((1, 2, 3)).tolist()
            return batch

        stream.Batches.__getitem__ = spy  # type: ignore[method-assign]
        torch.manual_seed(1)
        network = models.build(config.model, config.noise, CLASSES)
        monitor = Deadly()
        monitor.rank, monitor.size = world.rank, world.size
        trained = train(
            network,
            training(config, labelled.samples),
            labelled,
            PseudoLabelled(pool.source, targets, pool.copies),
            classes=CLASSES,
            seed=1,
            checkpoints=LocalStore(folder / "checkpoints"),
            world=world,
            monitor=monitor,
        )
        (folder / f"seen-{world.rank}.json").write_text(json.dumps(seen))
        if world.first:
            save_file({name: value.contiguous() for name, value in trained.weights.items()}, folder / "trained.safetensors")
            (folder / "trained.json").write_text(json.dumps(trained.history))


if __name__ == "__main__":
    main()
