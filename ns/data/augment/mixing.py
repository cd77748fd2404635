"""MixUp (arXiv:1710.09412) and CutMix (arXiv:1905.04899): images are mixed in pairs, and learn both labels by their shares.

Each image is mixed with its neighbor in the stream, positions 2 i and 2 i + 1, and the neighbor with it, with the same draws: timm's
mode `pair`, with other pairs. What is mixed with what, and how, is a function of the seed and of i alone.
"""

import math

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]


class PairMixer:
    """Mixes two images. `mixup`, `cutmix`: the α of Beta(α, α), which the share is drawn from; 0 turns it off.

    With both, each is taken for half of the pairs, at random.
    """

    def __init__(self, mixup: float, cutmix: float) -> None:
        self._mixup = mixup
        self._cutmix = cutmix

    def __call__(self, first: Pixels, second: Pixels, rng: np.random.Generator) -> tuple[Pixels, Pixels, float]:
        """Two images, uint8 [H, W, 3], mixed with each other, and the share in 0…1 that each keeps of itself."""
        cuts = self._cutmix > 0 and (self._mixup == 0 or rng.random() < 0.5)
        alpha = self._cutmix if cuts else self._mixup
        share = float(rng.beta(alpha, alpha))
        if not cuts:
            return blend_pair(first, second, share), blend_pair(second, first, share), share
        top, bottom, left, right = draw_cut(first.shape[0], first.shape[1], share, rng)
        first_cut, second_cut = first.copy(), second.copy()
        first_cut[top:bottom, left:right] = second[top:bottom, left:right]
        second_cut[top:bottom, left:right] = first[top:bottom, left:right]
        return first_cut, second_cut, 1 - (bottom - top) * (right - left) / (first.shape[0] * first.shape[1])


def blend_pair(image: Pixels, other: Pixels, share: float) -> Pixels:
    """share · image + (1 - share) · other, rounded."""
    blended = image * np.float32(share) + other * np.float32(1 - share)
    return np.rint(blended).astype(np.uint8)


def draw_cut(height: int, width: int, share: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of a box with √(1 - share) of each side around a random pixel, cut off at the border, px."""
    ratio = math.sqrt(1 - share)
    h, w = int(height * ratio), int(width * ratio)
    y, x = int(rng.integers(height)), int(rng.integers(width))
    return max(0, y - h // 2), min(height, y + (h + 1) // 2), max(0, x - w // 2), min(width, x + (w + 1) // 2)
