"""The labeler: what a teacher says of an image, with all the views and further models that label together with it."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ns.core import log
from ns.core.digest import shorten_digest
from ns.core.errors import ConfigError
from ns.modeling.predictor import ImageInput, Predictor

MIN_PROBABILITY = np.float32(1e-30)
"""Smaller probabilities count as this one where their logarithm is taken."""


class Labeler:
    """Models that label together: the teacher first, then the ensemble, with the same classes. Raises ConfigError if they differ.

    `temperature`: see `combine_probabilities`.
    """

    def __init__(self, predictors: Sequence[Predictor], temperature: float = 1.0) -> None:
        self._predictors = predictors
        self._temperature = temperature
        self.manifest = predictors[0].manifest
        """The teacher's manifest."""
        self.batch = predictors[0].batch
        self.scored_classes: tuple[str, ...] | None = None
        for other in predictors[1:]:
            if other.manifest.classes != self.manifest.classes:
                raise ConfigError(
                    f"labeling.ensemble: model {shorten_digest(other.manifest.digest)} has other classes, or another order of them, "
                    "than the teacher; all must have the same"
                )

    @property
    def mode(self) -> str:
        """Precisions in which the models run."""
        return "+".join(dict.fromkeys(str(predictor.mode) for predictor in self._predictors))

    def predict_groups(
        self, groups: Iterable[Sequence[ImageInput]], progress: log.Progress | None = None
    ) -> Iterator[npt.NDArray[np.float32]]:
        """As `Predictor.predict_groups`: float32 [N, classes] per group, the models' probabilities combined."""
        streams = itertools.tee(groups, len(self._predictors))
        outputs = [
            predictor.predict_groups(stream, progress if position == 0 else None)
            for position, (predictor, stream) in enumerate(zip(self._predictors, streams, strict=True))
        ]
        for probabilities in zip(*outputs, strict=True):
            yield combine_probabilities(probabilities, self._temperature)


def combine_probabilities(probabilities: Sequence[npt.NDArray[np.float32]], temperature: float) -> npt.NDArray[np.float32]:
    """The mean of the models' probabilities, each float32 [N, classes], to the power 1 / temperature, renormalized: the softmax at
    this temperature of the logits behind the mean. A row without an answer is NaN."""
    mean = probabilities[0] if len(probabilities) == 1 else np.mean(probabilities, axis=0)
    if temperature == 1:
        return mean
    logits = np.log(np.maximum(mean, MIN_PROBABILITY)) / np.float32(temperature)
    scaled: npt.NDArray[np.float32] = np.exp(logits - logits.max(1, keepdims=True))
    scaled /= scaled.sum(1, keepdims=True)
    return scaled
