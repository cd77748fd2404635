"""The paper's settings by model size, which are the defaults that `preset: b5` stands for (arXiv:1911.04252 §3.1, appendix A).

Each is a part of a RoleConfig; fields that a role sets override it.
"""

from typing import Any, NamedTuple

# The paper's networks: TensorFlow's padding and batch-norm constants (momentum 0.99 there is 0.01 here).
TF_ARGS = {"bn_momentum": 0.01, "bn_eps": 1e-3}


class _PresetSize(NamedTuple):
    resolution: int
    """Training resolution, px."""
    dropout: float
    magnitude: float | None
    """Magnitude of RandAugment; None for no RandAugment."""
    ratio: float
    """Pseudo-labeled images per labeled one."""
    epochs: int


SIZES = {
    "b0": _PresetSize(224, 0.2, None, 1, 700),
    "b1": _PresetSize(240, 0.2, None, 3, 700),
    "b2": _PresetSize(260, 0.3, 6, 3, 700),
    "b3": _PresetSize(300, 0.3, 12, 3, 700),
    "b4": _PresetSize(380, 0.4, 15, 3, 700),
    "b5": _PresetSize(456, 0.4, 18, 3, 350),
    "b6": _PresetSize(528, 0.5, 24, 3, 350),
    "b7": _PresetSize(600, 0.5, 27, 3, 350),
    # No script was published for L2; these values are those of the paper (ratio 14, and 28 in the last generation).
    "l2": _PresetSize(475, 0.5, 27, 14, 350),
    # EfficientNet-Lite, for phones: sizes and dropout are those of its authors, noise and length those of the B of the same number.
    "lite0": _PresetSize(224, 0.2, None, 1, 700),
    "lite1": _PresetSize(240, 0.2, None, 3, 700),
    "lite2": _PresetSize(260, 0.3, 6, 3, 700),
    "lite3": _PresetSize(280, 0.3, 12, 3, 700),
    "lite4": _PresetSize(300, 0.3, 15, 3, 700),
}


def _make_photo_preset(name: str, size: _PresetSize) -> dict[str, Any]:
    return {
        "model": {"arch": f"tf_efficientnet_{name}", "args": TF_ARGS, "resolution": size.resolution, "crop": "resized"},
        "noise": {
            "dropout": size.dropout,
            "stochastic_depth": 0.2,
            "randaugment_layers": 0 if size.magnitude is None else 2,
            "randaugment_magnitude": size.magnitude or 0,
            "flip": True,
        },
        "train": {"labeled_batch": 2048, "unlabeled_ratio": size.ratio, "epochs": size.epochs},
    }


def _make_small_preset(name: str) -> dict[str, Any]:
    """For images of 32 px, from the paper's SVHN experiment. The paper trained B0; larger networks differ in their dropout."""
    return {
        "model": {"arch": f"tf_efficientnet_{name}", "args": TF_ARGS, "resolution": 32, "crop": "pad", "reduce_stride": 4},
        "noise": {
            "dropout": SIZES[name].dropout,
            "stochastic_depth": 0.2,
            "randaugment_layers": 2,
            "randaugment_magnitude": 5,
            "flip": False,
            "cutout_px": 16,
        },
        "train": {
            "labeled_batch": 128,
            "unlabeled_ratio": 5,
            "epochs": 202.3,
            "optimizer": {"weight_decay": 1e-4, "staircase_drops": 202.3 / 1.3716},
        },
    }


PRESETS: dict[str, dict[str, Any]] = {name: _make_photo_preset(name, size) for name, size in SIZES.items()}
PRESETS |= {f"{name}-small": _make_small_preset(name) for name in ("b0", "b1", "b2", "b3")}
