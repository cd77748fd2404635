"""Augmentation policies of timm and torchvision, as pure functions of an image and a generator."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from ns.data.augment.randaugment import GRAY, Pixels

TRIVIAL_AUGMENT = "trivialaugment"


class AugmentPolicy:
    """A policy by name: one of timm's (`rand-m9-mstd0.5-inc1`, `augmix-m5-w4-d2`), or `trivialaugment`, torchvision's
    TrivialAugmentWide (arXiv:2103.10158).

    `size`: side of the images, px, which timm's absolute shifts depend on. NoiseConfig.policy checks the name.
    """

    def __init__(self, policy: str, size: int) -> None:
        self._transform = _build_transform(policy, size)

    def __call__(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        # Both libraries draw from the global generators of the process, so they are seeded for each image.
        seed = int(rng.integers(2**32))
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        return np.asarray(self._transform(Image.fromarray(image)))


def _build_transform(policy: str, size: int) -> Callable[[Image.Image], Image.Image]:
    if policy == TRIVIAL_AUGMENT:
        from torchvision.transforms import TrivialAugmentWide

        return TrivialAugmentWide(fill=list(GRAY))  # type: ignore[no-any-return, no-untyped-call, unused-ignore]
    from timm.data.auto_augment import augment_and_mix_transform, rand_augment_transform
    from timm.data.constants import IMAGENET_DEFAULT_MEAN

    # As timm's create_transform has it.
    settings: dict[str, Any] = {
        "translate_const": int(size * 0.45),
        "img_mean": tuple(min(255, round(255 * mean)) for mean in IMAGENET_DEFAULT_MEAN),
    }
    if policy.startswith("augmix"):
        transform: Any = augment_and_mix_transform(policy, {**settings, "translate_pct": 0.3})
    else:
        transform = rand_augment_transform(policy, settings)
    for operation in transform.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize_image
    return transform  # type: ignore[no-any-return]


def _posterize_image(image: Image.Image, bits_to_keep: int, **settings: Any) -> Image.Image:
    """timm's, except that no bits give a black image, as they did before Pillow 13, which refuses them."""
    from timm.data.auto_augment import posterize

    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return posterize(image, bits_to_keep, **settings)  # type: ignore[no-any-return]
