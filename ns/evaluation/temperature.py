"""Temperature scaling: the temperature at which a labeler's confidences agree best with the truth (arXiv:1706.04599 §4.2).

The probabilities are gone through several times, so they wait in a file on the local disk, not in memory.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ns.core import log
from ns.core.errors import DataError
from ns.data.dataset import Dataset
from ns.evaluation.accuracy import PredictedBatch, iter_predicted_batches
from ns.evaluation.result import FittedTemperature
from ns.modeling.labeler import MIN_PROBABILITY, Labeler
from ns.storage import Store
from ns.storage.scratch import explain_scratch_errors, make_scratch_dir

TEMPERATURE_RANGE = (0.1, 10.0)
"""Temperatures that are tried. A labeler without any mistake on the images would otherwise be made infinitely sure."""
CHUNK_VALUES = 1 << 22
"""Probabilities in memory at a time."""


def fit_labeler_temperature(labeler: Labeler, store: Store, dataset: Dataset) -> FittedTemperature:
    """Fits the temperature on a labeled dataset. `labeler` must have temperature 1.

    Raises DataError if no image is readable, and as `iter_predicted_batches` does.
    """
    with make_scratch_dir("temperature") as scratch_dir:
        probability_file = _ProbabilityFile(scratch_dir / "probabilities", len(labeler.manifest.classes))
        probability_file.write_batches(iter_predicted_batches(labeler, store, dataset))
        if not probability_file.images:
            raise DataError(f"{store.uri}: no readable image to fit a temperature on")
        temperature, before, after = fit_temperature(probability_file.iter_chunks)
    if temperature in TEMPERATURE_RANGE:
        log.get_logger().warning(
            "the fitted temperature is at the end of its range: the calibration images say little", temperature=temperature
        )
    return FittedTemperature(temperature=temperature, images=probability_file.images, nll_before=before, nll_after=after)


Chunk = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]
"""Probabilities float32 [N, classes], and the true classes int64 [N]."""


def fit_temperature(iter_chunks: Callable[[], Iterator[Chunk]]) -> tuple[float, float, float]:
    """The temperature, rounded to four digits, and the mean negative log-likelihoods at 1 and at the fitted temperature.

    `iter_chunks` yields all images once per call. The likelihood is concave in 1 / T, so there is one best temperature.
    """
    from scipy.optimize import minimize_scalar

    def compute_nll(temperature: float) -> float:
        total, images = 0.0, 0
        for probabilities, class_ids in iter_chunks():
            logits = np.log(np.maximum(probabilities, MIN_PROBABILITY)) / np.float32(temperature)
            greatest = logits.max(1)
            log_sums = greatest + np.log(np.exp(logits - greatest[:, None]).sum(1))
            total += float((log_sums - logits[np.arange(len(logits)), class_ids]).sum(dtype=np.float64))
            images += len(logits)
        return total / images

    low, high = TEMPERATURE_RANGE
    search = minimize_scalar(
        lambda log_t: compute_nll(np.exp(log_t)), bounds=(np.log(low), np.log(high)), method="bounded", options={"xatol": 1e-4}
    )
    # The search never tries the ends themselves.
    temperature = min((low, float(f"{np.exp(search.x):.4g}"), high), key=compute_nll)
    return temperature, compute_nll(1.0), compute_nll(temperature)


class _ProbabilityFile:
    def __init__(self, path: Path, num_classes: int) -> None:
        self._path, self._num_classes = path, num_classes
        self._class_ids: list[npt.NDArray[np.int64]] = []
        self.images = 0

    def write_batches(self, batches: Iterator[PredictedBatch]) -> None:
        with explain_scratch_errors(self._path, "keep probabilities"), self._path.open("wb") as file:
            for batch in batches:
                file.write(np.ascontiguousarray(batch.probabilities, np.float32).tobytes())
                self._class_ids.append(batch.class_ids)
                self.images += len(batch.class_ids)

    def iter_chunks(self) -> Iterator[Chunk]:
        class_ids = np.concatenate(self._class_ids)
        rows = max(1, CHUNK_VALUES // self._num_classes)
        with self._path.open("rb") as file:
            for start in range(0, self.images, rows):
                chunk_ids = class_ids[start : start + rows]
                flat = np.fromfile(file, np.float32, len(chunk_ids) * self._num_classes)
                yield flat.reshape(-1, self._num_classes), chunk_ids
