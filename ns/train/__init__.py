"""Training of teachers and students."""

from ns.train.loop import Trained, train

__all__ = ["Trained", "train"]
