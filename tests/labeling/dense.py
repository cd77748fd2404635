"""The probabilities of label rows over all classes, by the plain formula."""

import numpy as np

from ns.labeling.label_set import LabelRows


def expand_probabilities(rows: LabelRows, num_classes: int) -> np.ndarray:
    """float64 [N, classes]: the kept classes, and the rest spread evenly over the others; NaN in rows without a label."""
    top = rows.top_prob.astype(np.float64)
    others = num_classes - top.shape[1]
    rest = np.clip(1 - top.sum(1, keepdims=True), 0, 1) / others if others else np.zeros((len(top), 1))
    full = np.repeat(rest, num_classes, axis=1)
    np.put_along_axis(full, rows.top_class.astype(np.int64), top, axis=1)
    full[~rows.readable] = np.nan
    return full / full.sum(1, keepdims=True)
