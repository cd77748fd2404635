"""Confidence in ten bands, as people compare it."""

import numpy as np
import numpy.typing as npt

CONFIDENCE_BINS = 10
CONFIDENCE_BIN_EDGES = tuple(band / CONFIDENCE_BINS for band in range(CONFIDENCE_BINS + 1))


def bin_confidences(confidence: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """int64 [N] of confidences in [0, 1]: band b holds [b, b + 1) / 10, the last one 1 too."""
    return np.clip(
        np.searchsorted(np.array(CONFIDENCE_BIN_EDGES, np.float32), confidence, side="right") - 1, 0, CONFIDENCE_BINS - 1
    )
