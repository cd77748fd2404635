"""Confidence in ten bands, as people compare it."""

import numpy as np
import numpy.typing as npt

BANDS = 10
EDGES = tuple(band / BANDS for band in range(BANDS + 1))


def bands(confidence: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """int64 [N] of confidences in [0, 1]: band b holds [b, b + 1) / 10, the last one 1 too."""
    return np.clip(np.searchsorted(np.array(EDGES, np.float32), confidence, side="right") - 1, 0, BANDS - 1)
