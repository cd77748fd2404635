"""Confidence in ten equal bins, for tables and charts."""

import numpy as np
import numpy.typing as npt

CONFIDENCE_BINS = 10
CONFIDENCE_BIN_EDGES = tuple(index / CONFIDENCE_BINS for index in range(CONFIDENCE_BINS + 1))


def bin_confidences(confidence: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Bins int64 [N] of confidences in [0, 1]: bin b holds [b, b + 1) / 10, the last one 1 too."""
    return np.clip(
        np.searchsorted(np.array(CONFIDENCE_BIN_EDGES, np.float32), confidence, side="right") - 1, 0, CONFIDENCE_BINS - 1
    )
