"""Whether two pictures show the same, compared by their pixels.

A perceptual hash of 64 bits keeps the coarse layout of a picture only. All pictures of a camera that does not move have nearly the
same one, whatever lies in front of it. So images whose hashes are near are compared once more, at a higher resolution.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from ns.data.dataset import Dataset
from ns.data.loading.decode import EncodedJpeg, decode_image
from ns.data.loading.shard_reader import ImageSource
from ns.storage import Store

SIDE_PX = 64
"""Side of the gray pictures that are compared, px."""
MAX_LOCAL = 30.0
"""Largest difference anywhere, in median differences, between two copies of a picture: JPEG at quality 40 and resizing reach 5 to
15. An object of a twentieth of the picture's width that is elsewhere reaches 30 to 150."""
MAX_LOCAL_GRAY = 40.0
"""Largest difference anywhere, gray levels. Copies reach 30."""
MAX_DIFFERENCE = 0.3
"""Largest standard deviation of the differences, in those of the pictures. Copies reach 0.1; at 32 px and JPEG at quality 40, 0.2."""
MIN_MEDIAN = 0.5
"""Gray levels (0–255) below which a median difference is rounding."""
COARSE_SIDE_PX = 16
"""Side of the gray pictures that are compared first, px."""
MAX_COARSE, MAX_COARSE_GRAY = 40.0, 50.0
"""MAX_LOCAL and MAX_LOCAL_GRAY at COARSE_SIDE_PX, where a small shift is harder to fit: copies reach 31 and 37."""
PAIRS_AT_ONCE, COARSE_PAIRS_AT_ONCE = 16, 256
"""As many pictures as fit in a core's cache."""
SATURATED = (5, 250)
"""Gray levels at and beyond which a change of brightness cuts off what was there."""

HALF = np.float32(0.5)

Pictures = npt.NDArray[np.uint8]
_Floats = npt.NDArray[np.float32]


def shrink_picture(pixels: npt.NDArray[np.uint8]) -> Pictures:
    """uint8 [H, W, 3] → gray uint8 [SIDE_PX, SIDE_PX]."""
    return np.asarray(Image.fromarray(pixels).convert("L").resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS))


def match_pictures(first: Pictures, second: Pictures) -> npt.NDArray[np.bool_]:
    """Gray uint8 [N, SIDE_PX, SIDE_PX] each → bool [N]: whether the pictures show the same.

    Brightness, contrast, a shift and a zoom by about a pixel of SIDE_PX are fitted first, by least squares. The rest must be small
    everywhere, compared with its own median and with the picture's contrast. Most pictures that differ do so at COARSE_SIDE_PX
    already, where a comparison takes a tenth of the time.
    """
    same = np.zeros(len(first), np.bool_)
    for start in range(0, len(first), COARSE_PAIRS_AT_ONCE):
        part = slice(start, start + COARSE_PAIRS_AT_ONCE)
        same[part] = _match_coarse(first[part], second[part])
    maybe = np.flatnonzero(same)
    for start in range(0, len(maybe), PAIRS_AT_ONCE):
        pairs = maybe[start : start + PAIRS_AT_ONCE]
        same[pairs] = _match_fine(first[pairs], second[pairs])
    return same


def _match_coarse(first: Pictures, second: Pictures) -> npt.NDArray[np.bool_]:
    block = SIDE_PX // COARSE_SIDE_PX
    means = [p.reshape(len(p), COARSE_SIDE_PX, block, COARSE_SIDE_PX, block).mean((2, 4), np.float32) for p in (first, second)]
    low, high = _order_by_brightness(*means)
    rest = _fit_difference(low, high, _find_saturated(low, high)[:, 1:-1, 1:-1], step=1)
    return _has_no_outlier(rest, rest, MAX_COARSE, MAX_COARSE_GRAY)


def _match_fine(first: Pictures, second: Pictures) -> npt.NDArray[np.bool_]:
    low, high = _order_by_brightness(first.astype(np.float32), second.astype(np.float32))
    saturated = _find_saturated(low, high)[:, 2:-2, 2:-2]
    # Every second pixel in each direction is enough for six factors.
    rest = _fit_difference(_average_3x3(low), _average_3x3(high), saturated, step=2)
    contrast = np.sqrt(low.std((1, 2)) * high.std((1, 2)))
    no_outlier = _has_no_outlier(_average_3x3(rest), rest[:, ::2, ::2], MAX_LOCAL, MAX_LOCAL_GRAY)
    same: npt.NDArray[np.bool_] = no_outlier & (rest.std((1, 2)) <= MAX_DIFFERENCE * contrast)
    return same


def _order_by_brightness(first: _Floats, second: _Floats) -> tuple[_Floats, _Floats]:
    darker = (first.mean((1, 2)) <= second.mean((1, 2)))[:, None, None]
    return np.where(darker, first, second), np.where(darker, second, first)


def _find_saturated(low: _Floats, high: _Floats) -> npt.NDArray[np.bool_]:
    return (low <= SATURATED[0]) | (high >= SATURATED[1])


def _fit_difference(low: _Floats, high: _Floats, saturated: npt.NDArray[np.bool_], *, step: int) -> _Floats:
    """The brighter pictures, [N, S, S], less the darker ones, fitted to them: [N, S - 2, S - 2]. Pixels that are `saturated`,
    [N, S - 2, S - 2], hardly count; the fit looks at each `step`-th pixel in each direction."""
    middle: _Floats = HALF * (low + high)
    across: _Floats = HALF * (middle[:, 1:-1, 2:] - middle[:, 1:-1, :-2])
    down: _Floats = HALF * (middle[:, 2:, 1:-1] - middle[:, :-2, 1:-1])
    low, high = low[:, 1:-1, 1:-1], high[:, 1:-1, 1:-1]
    offset: _Floats = np.linspace(-1, 1, low.shape[1], dtype=np.float32)
    terms: tuple[_Floats, ...] = (low, np.ones_like(low), across, down, across * offset, down * offset[:, None])
    count = len(low)
    sparse = np.stack([term[:, ::step, ::step].reshape(count, -1) for term in terms], axis=1)  # [N, 6, pixels]
    weights = np.where(saturated[:, ::step, ::step], 1e-3, 1).astype(np.float32)
    weighted = sparse * weights.reshape(count, 1, -1)
    # A little is added for pictures of one color, whose terms do not differ.
    gram = weighted @ sparse.transpose(0, 2, 1) + 1e-2 * np.eye(6, dtype=np.float32)
    factors: _Floats = np.linalg.solve(gram, weighted @ high[:, ::step, ::step].reshape(count, -1, 1))  # [N, 6, 1]
    fitted: _Floats = np.zeros_like(high)
    for number, term in enumerate(terms):
        fitted += factors[:, number, :, None] * term
    rest: _Floats = high - fitted.clip(0, 255)
    return rest


def _has_no_outlier(rest: _Floats, typical: _Floats, ratio: float, gray: float) -> npt.NDArray[np.bool_]:
    """bool [N]: whether the largest of the differences `rest` is at most `ratio` medians of `typical`, and at most `gray`."""
    largest = np.abs(rest).max((1, 2))
    median = np.median(np.abs(typical).reshape(len(typical), -1), axis=1)
    return np.asarray(largest <= np.minimum(ratio * np.maximum(median, MIN_MEDIAN), gray), np.bool_)


def _average_3x3(pictures: _Floats) -> _Floats:
    """[N, S, S] → [N, S - 2, S - 2]."""
    rows = pictures[:, :-2] + pictures[:, 1:-1] + pictures[:, 2:]
    means: _Floats = (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) / np.float32(9)
    return means


class PictureMatcher:
    """Compares images of several datasets, numbered through all their shards in order. Each is decoded once, when it is first
    compared; its small picture is kept in a file, so memory grows with the images that are compared only."""

    def __init__(self, datasets: Sequence[tuple[Store, Dataset]], path: Path) -> None:
        """`path`: a new file for the pictures."""
        self._sources = [ImageSource(store, dataset) for store, dataset in datasets]
        self._shards = [(number, shard) for number, (_, dataset) in enumerate(datasets) for shard in range(len(dataset.shards))]
        self._starts = np.cumsum([0, *(shard.samples for _, dataset in datasets for shard in dataset.shards)])
        self._file = path.open("x+b", buffering=0)
        self._kept: set[int] = set()

    def match_images(self, first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Pairs of images, by their numbers → bool [N]: whether the two show the same. Raises DataError for damaged shards,
        StoreError for those that are out of reach, OSError if the file cannot be written."""
        for image in np.unique(np.concatenate([first, second])).tolist():
            if image not in self._kept:
                self._file.seek(image * SIDE_PX**2)
                self._file.write(self._decode_picture(image).tobytes())
                self._kept.add(image)
        matches = np.empty(len(first), np.bool_)
        for start in range(0, len(first), COARSE_PAIRS_AT_ONCE):
            part = slice(start, start + COARSE_PAIRS_AT_ONCE)
            matches[part] = match_pictures(self._read_pictures(first[part]), self._read_pictures(second[part]))
        return matches

    def _decode_picture(self, image: int) -> Pictures:
        at = int(np.searchsorted(self._starts, image, "right")) - 1
        number, shard = self._shards[at]
        row = image - int(self._starts[at])
        encoded = next(self._sources[number].read_encoded(shard, row, row + 1))
        if isinstance(encoded, EncodedJpeg):
            return shrink_picture(encoded.decode_box((0, 0, encoded.width, encoded.height), SIDE_PX)[0])
        return shrink_picture(decode_image(encoded))

    def _read_pictures(self, images: npt.NDArray[np.int64]) -> Pictures:
        pictures = np.empty((len(images), SIDE_PX, SIDE_PX), np.uint8)
        for picture, image in zip(pictures, images.tolist(), strict=True):
            self._file.seek(image * SIDE_PX**2)
            picture[:] = np.frombuffer(self._file.read(picture.size), np.uint8).reshape(picture.shape)
        return pictures

    def close(self) -> None:
        self._file.close()
