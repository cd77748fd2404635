"""What each operation of RandAugment does to an image, by kind and magnitude, as the table in docs/training.md.

    python -m benchmarks.randaugment

The picture has 224 px, and slopes with noise. Changes are means over all values, of 255, and over draws of sign and interpolation. For
timm, they are those of an operation that is applied, which happens half of the time.
"""

import random
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image
from timm.data.auto_augment import AugmentOp

from ns.data.augment.randaugment import GRAY, RandAugment
from ns.data.augment.reference import ReferenceRandAugment

MAGNITUDES = (5, 9, 18, 27)
PX = 224
DRAWS = 6
TIMM_NAMES = {
    "auto_contrast": "AutoContrast", "equalize": "Equalize", "invert": "Invert", "rotate": "Rotate", "posterize": "Posterize",
    "solarize": "Solarize", "color": "Color", "contrast": "Contrast", "brightness": "Brightness", "sharpness": "Sharpness",
    "shear_x": "ShearX", "shear_y": "ShearY", "translate_x": "TranslateXRel", "translate_y": "TranslateYRel",
    "solarize_add": "SolarizeAdd",
}  # fmt: skip
"""Its set has no Cutout."""


def main() -> None:
    print(render_table())


def render_table() -> str:
    """Markdown: a row per operation, and a column per magnitude with the changes of kinds paper / reference / timm."""
    picture = make_picture()
    header = ["operation", *(f"M = {magnitude}" for magnitude in MAGNITUDES)]
    rows = [
        [f"`{name}`", *(describe_changes(picture, name, magnitude) for magnitude in MAGNITUDES)]
        for name in RandAugment(1, 1, PX).operations
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---", *["---:"] * len(MAGNITUDES)], *rows))


def make_picture() -> Image.Image:
    y, x = np.mgrid[:PX, :PX] / PX
    slopes = np.stack([40 + 170 * x, 30 + 150 * y * x, 200 * (1 - y)], 2)
    return Image.fromarray((slopes + np.random.RandomState(0).randint(0, 20, (PX, PX, 3))).astype(np.uint8))


def describe_changes(picture: Image.Image, name: str, magnitude: int) -> str:
    pixels = np.asarray(picture)
    paper, reference = RandAugment(1, magnitude, PX), ReferenceRandAugment(1, magnitude, PX)
    changes = [
        measure_change(pixels, lambda rng: paper.operations[name](pixels, rng)),
        measure_change(pixels, lambda rng: reference.operations[name](pixels, rng)),
        measure_change(pixels, lambda rng: _run_timm(picture, name, magnitude, rng)) if name in TIMM_NAMES else None,
    ]
    return " / ".join("–" if change is None else f"{change:.0f}" for change in changes)


def measure_change(pixels: npt.NDArray[np.uint8], run: Callable[[np.random.Generator], npt.NDArray[np.uint8]]) -> float:
    """Mean absolute change of a value, over draws."""
    before = pixels.astype(int)
    return float(np.mean([np.abs(run(np.random.default_rng(seed)) - before).mean() for seed in range(DRAWS)]))


def _run_timm(picture: Image.Image, name: str, magnitude: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    random.seed(int(rng.integers(2**32)))
    return np.asarray(AugmentOp(TIMM_NAMES[name], prob=1, magnitude=magnitude, hparams={"img_mean": GRAY})(picture))


if __name__ == "__main__":
    main()
