"""The quickstart as one page of timm and torch in one process: what our stages, records, checks and report are compared with.

    python -m benchmarks.plain_loop SEED

The same split of the digits, network, noise, optimizer, numbers of steps and images, and rules of the quickstart, without anything that
would survive the process. Prints the top-1 of the teacher and of each student as JSON.
"""

import copy
import json
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from timm.data.auto_augment import rand_augment_transform
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms

STEPS, WARMUP_STEPS, LABELED_BATCH, UNLABELED_RATIO, GENERATIONS = 200, 10, 50, 3, 2
NORMALIZE = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
NOISE = transforms.Compose(
    [rand_augment_transform("rand-m5-n2", {}), transforms.RandomCrop(32, padding=4, padding_mode="reflect"), *NORMALIZE]
)


Rows = npt.NDArray[np.int64]


def split_digits() -> dict[str, Rows]:
    """Rows of labeled images, held-out images, test images and pool, as `ns/data/importing/digits.py` draws them."""
    rng = np.random.default_rng(0)
    orders = [rng.permutation(np.flatnonzero(load_digits().target == digit)) for digit in range(10)]
    ends = {"labeled": (0, 5), "heldout": (5, 55), "test": (55, 95), "pool": (95, None)}
    return {part: np.concatenate([order[slice(*end)] for order in orders]) for part, end in ends.items()}


def noise_images(images: list[Image.Image]) -> Tensor:
    return torch.stack([NOISE(image) for image in images])


def train(
    start: nn.Module,
    images: list[Image.Image],
    labeled: Rows,
    class_ids: Tensor,
    pool: Rows,
    targets: Tensor,
    rate: float,
    seed: int,
) -> nn.Module:
    """Returns the averaged weights. A batch has labeled images and `UNLABELED_RATIO` times as many of the pool, if there is one."""
    torch.manual_seed(seed)
    network = copy.deepcopy(start).to(memory_format=torch.channels_last)
    average = ModelEmaV3(network, decay=0.99)
    optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=0.01, fused=True)
    schedule = CosineLRScheduler(optimizer, STEPS, warmup_t=WARMUP_STEPS, warmup_lr_init=rate / WARMUP_STEPS, t_in_epochs=False)
    draw = np.random.default_rng(seed)
    choices = [draw.permutation(len(labeled))[:LABELED_BATCH] for _ in range(STEPS)]
    pool_choices = [draw.permutation(len(pool))[: UNLABELED_RATIO * LABELED_BATCH] for _ in range(STEPS)]
    samples = [images[row] for step in range(STEPS) for row in (*labeled[choices[step]], *pool[pool_choices[step]])]
    size = len(samples) // STEPS
    loader: Any = DataLoader(samples, size, num_workers=1, collate_fn=noise_images)  # type: ignore[arg-type]
    network.train()
    for step, pixels in enumerate(loader):
        logits = network(pixels.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits[:LABELED_BATCH], class_ids[choices[step]])
        if len(pool):
            pseudo = F.cross_entropy(logits[LABELED_BATCH:], targets[pool_choices[step]])
            loss = (loss + UNLABELED_RATIO * pseudo) / (1 + UNLABELED_RATIO)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        average.decay = min(0.99, (1 + step) / (10 + step))  # as ours, which has TensorFlow's ramp
        average.update(network)
        schedule.step_update(step + 1)
    averaged: nn.Module = average.module.eval()
    return averaged


@torch.inference_mode()
def predict_probabilities(network: nn.Module, images: list[Image.Image], rows: Rows) -> Tensor:
    """Probabilities [N, 10]."""
    pixels = torch.stack([transforms.Compose(NORMALIZE)(images[row]) for row in rows])
    return torch.cat([network(batch).softmax(1) for batch in torch.split(pixels, 256)])


def select_rows(probabilities: Tensor) -> Rows:
    """Rows of the pool, some repeatedly: above the threshold, the most confident of each class, as many of each."""
    confidences, classes = (values.numpy() for values in probabilities.max(1))
    kept = [np.flatnonzero((classes == digit) & (confidences > 0.3)) for digit in range(10)]
    count = round(sum(map(len, kept)) / max(1, sum(len(rows) > 0 for rows in kept)))
    return np.concatenate([np.resize(rows[np.argsort(-confidences[rows])], count if len(rows) else 0) for rows in kept])


def main() -> None:
    seed = int(sys.argv[1])
    torch.set_num_threads(1)  # the loader's process has the other core
    digits = load_digits()
    images = [
        Image.fromarray(np.rint(image * 255 / 16).astype(np.uint8)).convert("RGB").resize((32, 32)) for image in digits.images
    ]
    class_ids, parts = torch.from_numpy(digits.target), split_digits()
    torch.manual_seed(seed)
    start = timm.create_model("test_efficientnet", num_classes=10, drop_rate=0.2, drop_path_rate=0.1)
    labels, none = class_ids[parts["labeled"]], np.array([], int)

    def measure_top1(model: nn.Module) -> float:
        """Top-1 on the held-out images; the test images are evaluated too, as a run does."""
        by_part = [
            (predict_probabilities(model, images, parts[part]).argmax(1) == class_ids[parts[part]]).float().mean().item()
            for part in ("heldout", "test")
        ]
        return by_part[0]

    teacher = train(start, images, parts["labeled"], labels, none, torch.empty(0), 0.01, seed)
    top1 = [measure_top1(teacher)]
    for generation in range(1, GENERATIONS + 1):
        probabilities = predict_probabilities(teacher, images, parts["pool"])
        selected = select_rows(probabilities)
        pool, targets = parts["pool"][selected], probabilities[selected]
        teacher = train(teacher, images, parts["labeled"], labels, pool, targets, 0.015, seed + generation)
        top1.append(measure_top1(teacher))
    print(json.dumps([round(value, 4) for value in top1]))


if __name__ == "__main__":
    main()
