"""Perturbed sequences, after ImageNet-P (Hendrycks & Dietterich, arXiv:1903.12261): frames that differ a little from one to the next."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy.ndimage import affine_transform

from ns.errors import ConfigError

Pixels = npt.NDArray[np.uint8]


def sequence(image: Pixels, kind: str, frames: int, rng: np.random.Generator) -> Pixels:  # noqa: ARG001
    """uint8 [H, W, 3] → uint8 [frames, H, W, 3]. All chance comes from `rng`. Raises ConfigError for a kind that cannot be made here."""
    if kind not in KINDS:
        raise ConfigError(f"evaluation.perturbations: {kind} cannot be made here; there are {', '.join(KINDS)}")
    return np.stack([KINDS[kind](image, number - frames // 2) for number in range(frames)])


def _brightness(image: Pixels, step: int) -> Pixels:
    lit: Pixels = np.clip(image * (1 + 0.02 * step), 0, 255).astype(np.uint8)
    return lit


def _rotate(image: Pixels, step: int) -> Pixels:
    """By a degree a frame, about the centre."""
    cosine, sine = np.cos(np.radians(step)), np.sin(np.radians(step))
    turn = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
    centre = np.array([(image.shape[0] - 1) / 2, (image.shape[1] - 1) / 2, 0])
    turned: Pixels = affine_transform(image, turn, centre - turn @ centre, order=1, mode="mirror")
    return turned


def _translate(image: Pixels, step: int) -> Pixels:
    """By a pixel a frame; what comes in is what went out, mirrored."""
    columns = np.abs(np.arange(image.shape[1]) - step)
    return image[:, np.where(columns >= image.shape[1], 2 * image.shape[1] - 2 - columns, columns)]


KINDS: dict[str, Callable[[Pixels, int], Pixels]] = {"brightness": _brightness, "rotate": _rotate, "translate": _translate}
