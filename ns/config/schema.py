"""The experiment: one validated object, read from YAML, that says everything a run does.

Defaults are the paper's (arXiv:1911.04252 v4 and its reference code). Derived values are computed, not configured.
"""

import importlib.resources
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from ns.config.error_messages import format_validation_error
from ns.config.presets import PRESETS
from ns.core.errors import ConfigError, StoreError
from ns.storage import read_uri

MAX_GENERATIONS = 5
"""Generations that one pipeline run holds: the pipeline is unrolled, and its size grows with this number."""


Precision = Literal["float32", "bfloat16", "float16"]

Preset = Literal[
    "b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7", "l2",
    "lite0", "lite1", "lite2", "lite3", "lite4",
    "b0-small", "b1-small", "b2-small", "b3-small",
]  # fmt: skip


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    younger: ClassVar[tuple[str, ...]] = ()
    """Fields that came after models and runs had been named by their digests."""

    @model_serializer(mode="wrap")
    def _leave_out_what_is_not_asked(self, serialize: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        # An experiment or a model that does not use these is the one it was before they existed, under the same digest and name.
        fields: dict[str, Any] = serialize(self)
        if info.context == EVERY_FIELD:
            return fields
        untouched = {name for name in self.younger if getattr(self, name) == type(self).model_fields[name].default}
        return {name: value for name, value in fields.items() if name not in untouched}


EVERY_FIELD = "every field"
"""Context of a serialization that people read."""


SectionT = TypeVar("SectionT", bound=Section)


class DataConfig(Section):
    """Where images come from. Each place is a dataset (a folder or `s3://` prefix with dataset.json), or anything that
    `ns data import` takes: class folders, loose images (pool only), a table, tars, an archive. `digits:labeled|pool|heldout`
    are scikit-learn's handwritten digits, split for the quickstart."""

    labeled: str
    """Labeled images that teacher and students train on."""
    pool: str
    """Unlabeled images; labels that may be there are ignored."""
    heldout: str
    """Human-labeled images that decide promotions. Never trained on."""
    test: str | None = None
    """Human-labeled images that are only reported: no decision is taken on them, so that what is reported is not what was
    optimized. Never trained on."""
    max_rejected_share: float = Field(default=0.1, ge=0, le=1)
    """Unreadable images are counted, listed and left out; a larger share than this stops the run."""
    shard_samples: int = Field(default=10_000, ge=1, le=100_000)
    """Images in a shard, at most."""
    shard_mib: int = Field(default=256, ge=1, le=4096)
    """MiB in a shard, at most."""
    max_side: int | None = Field(default=None, ge=8, le=65536)
    """Images with a longer side than this, px, are made smaller when they are imported; kept byte for byte if not given."""
    leak_guard: Literal["exclude", "report", "off"] = "exclude"
    """`exclude`: images of the pool that are also held out get no label, so that accuracy stays honest. `report`: only count them.
    `off`: do not look; saves reading all images once."""
    exclude: str | None = None
    """A text file or URI with a key of the pool a line: these images get no label, as those withdrawn by their owners."""
    near_duplicate_bits: int = Field(default=4, ge=0, le=8)
    """Images count as the same picture when at most so many of the 64 bits of their perceptual hashes differ. Images with a side
    below 32 px are compared by their bytes only."""

    @model_validator(mode="after")
    def _check_sets_differ(self) -> Self:
        # Copies of one dataset in two places are found when the data are prepared, and single images by the leak guard.
        for name, why, others in (
            ("heldout", "hold out images that are not trained on", ("labeled",)),
            ("test", "name images that nothing is trained on or decided by, or leave it out", ("labeled", "heldout")),
        ):
            for other in others:
                if getattr(self, name) == getattr(self, other):
                    raise ValueError(f"{name}: {getattr(self, name)}: is the same as data.{other}; {why}")
        return self


class ModelConfig(Section):
    """A timm network."""

    younger = ("test_margin_px",)

    arch: str = "efficientnet_b0"
    """Name of a timm architecture."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of `timm.create_model`."""
    resolution: int = Field(default=224, ge=8, le=2048)
    """Training resolution, px."""
    test_resolution: int | None = Field(default=None, ge=8, le=2048)
    """Evaluation and labeling resolution, px; the training resolution if not given."""
    test_margin_px: int = Field(default=32, ge=0, le=2048)
    """Evaluation and labeling see the centered square of resolution / (resolution + this) of a photograph's short side. Paper: 32."""
    reduce_stride: Literal[1, 2, 4, 8] = 1
    """Divides the network's total stride by making its first strided convolutions dense: for images of 64 px and less."""
    inference_precision: Literal["auto", Precision] = "auto"
    """Of labeling and evaluation. `auto`: the fastest on the machine that trains the network. The model keeps it, so that its
    labels do not depend on where they are made."""
    outputs: int | None = Field(default=None, ge=2)
    """Model outputs; the number of classes of the labeled data if not given."""

    @field_validator("args")
    @classmethod
    def _check_args(cls, args: dict[str, Any]) -> dict[str, Any]:
        reserved = {
            "num_classes": "outputs",
            "drop_rate": "noise.dropout",
            "drop_path_rate": "noise.stochastic_depth",
            "pretrained": "(nothing: weights are never downloaded)",
        }
        for name, instead in reserved.items():
            if name in args:
                raise ValueError(f"{name} is set elsewhere: use {instead}")
        return args

    @property
    def inference_resolution(self) -> int:
        return self.test_resolution or self.resolution


Fraction = Annotated[float, Field(gt=0, le=1)]
Aspect = Annotated[float, Field(ge=0.1, le=10)]


class NoiseConfig(Section):
    """What makes the student noisy. The teacher labels without any of it."""

    younger = ("randaugment_translate_px", "randaugment_cutout_px", "crop_area", "crop_aspect", "pad_px")

    dropout: float = Field(default=0.2, ge=0, lt=1)
    """Before the classifier. Paper: 0.2 (B0, B1) to 0.5 (B6, B7, L2)."""
    stochastic_depth: float = Field(default=0.2, ge=0, lt=1)
    """Drop rate of the last block, growing linearly from 0 at the first. Paper: 0.2."""
    randaugment_layers: int = Field(default=2, ge=0, le=8)
    """Operations applied to each image. Paper: 2; 0 turns RandAugment off."""
    randaugment_magnitude: float = Field(default=6, ge=0, le=30)
    """Paper: none for B0 and B1, 6, 12, 15, 18, 24, 27 for B2…B7, 27 for L2, 5 for 32 px digits."""
    randaugment: Literal["paper", "timm"] = "paper"
    """`paper`: every drawn operation is applied, at ranges that go on beyond magnitude 10. `timm`: timm's, where an operation is
    applied half of the time and the magnitude ends at 10."""
    randaugment_translate_px: float | None = Field(default=None, ge=0, le=2048)
    """Of `paper`: shift at magnitude 10. If not given, the paper's: 100, and an eighth of the resolution up to 64 px."""
    randaugment_cutout_px: float | None = Field(default=None, ge=0, le=1024)
    """Of `paper`: half side of the gray square at magnitude 10; 0 takes it out of the operations that are drawn. If not given, the
    paper's: 40, and an eighth of the resolution up to 64 px."""
    crop: Literal["resized", "pad", "none"] = "resized"
    """`resized`: a random part, the paper's for photographs. `pad`: reflect-pad and crop, for small images."""
    crop_area: tuple[Fraction, Fraction] = (0.08, 1.0)
    """Of `resized`: least and greatest share of the image's area. Paper: 8 to 100 %."""
    crop_aspect: tuple[Aspect, Aspect] = (3 / 4, 4 / 3)
    """Of `resized`: least and greatest width / height. Paper: 3/4 to 4/3."""
    pad_px: int | None = Field(default=None, ge=0, le=1024)
    """Of `pad`: an image is shifted by at most so much each way; by an eighth of the resolution if not given. Paper: 4 at 32 px."""
    flip: bool = True
    """Mirror at random. Off for digits, text, and anything that has a handedness."""
    cutout_px: int = Field(default=0, ge=0, le=1024)
    """Side of a gray square put on every image after RandAugment. Paper: 16 at 32 px, none for photographs."""

    @field_validator("crop_area", "crop_aspect")
    @classmethod
    def _check_bounds_order(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        if bounds[0] > bounds[1]:
            raise ValueError("must be [least, greatest]")
        return bounds


class OptimizerConfig(Section):
    """How weights move (`noisy_student.md` §1.4)."""

    name: Literal["rmsprop", "sgd", "adamw"] = "rmsprop"
    """`rmsprop` has TensorFlow's semantics, as in the paper."""
    lr: float = Field(default=0.016, gt=0, le=10)
    """Peak learning rate for a labeled batch of 256; scaled linearly with the labeled batch."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of `rmsprop` and `sgd` (Nesterov's)."""
    rms_decay: float = Field(default=0.9, ge=0, lt=1)
    """Of `rmsprop`: decay of the mean squared gradient."""
    rms_epsilon: float = Field(default=1e-3, gt=0)
    """Of `rmsprop`: added to the mean squared gradient, inside the square root."""
    weight_decay: float = Field(default=1e-5, ge=0, lt=1)
    """L2 on everything but batch-norm parameters. Paper: 1e-5 (ImageNet), 1e-4 (SVHN)."""
    schedule: Literal["staircase", "cosine"] = "staircase"
    """`staircase`: falls by `staircase_factor` every `staircase_epochs`. `cosine`: to zero."""
    staircase_factor: float = Field(default=0.97, gt=0, le=1)
    """What a drop leaves of the learning rate."""
    staircase_epochs: float | None = Field(default=None, gt=0)
    """Labeled epochs between drops. If not given, 2.4 of 350: the paper's 145 drops, however long the training is."""
    warmup_epochs: float = Field(default=5, ge=0)
    """Linear from zero, in labeled epochs."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest gradient norm; not clipped if not given."""


class FinetuneConfig(Section):
    """The train/test resolution fix: a short training on plain labeled images, at the resolution of the test (paper §3). The
    model from before it is kept, labels, and goes through the gate; the fine-tuned one is evaluated beside it."""

    resolution: int = Field(ge=8, le=2048)
    """px. Paper: 800 for L2, which trained at 475."""
    epochs: float = Field(default=1.5, gt=0)
    """Labeled epochs. Paper: 1.5."""
    frozen_share: float = Field(default=0.5, ge=0, le=1)
    """Of the blocks, counted from the input: they and the stem keep their weights and statistics. The paper freezes shallow
    layers, and does not say how many."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """The only noise that can be left on, as the reference code did unless told otherwise."""
    labeled_batch: int | None = Field(default=None, ge=2, le=65536)
    """Labeled images a step; as in training if not given."""
    lr: float | None = Field(default=None, gt=0, le=10)
    """Learning rate for a batch of 256, scaled linearly; if not given, the last ones of the training's schedule."""


class TrainConfig(Section):
    """How a network is trained. An epoch is a pass over the labeled images, as in the paper."""

    younger = ("checkpoints_kept",)

    labeled_batch: int = Field(default=512, ge=2, le=65536)
    """Labeled images a step."""
    epochs: float = Field(default=350, gt=0)
    """Labeled epochs. Paper: 700 for B0–B4, 350 for larger."""
    optimizer: OptimizerConfig = OptimizerConfig()
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """On labeled images and on hard pseudo-labels; never on soft ones."""
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    """Decay of the averaged weights that evaluate, teach and are kept; ramped as min(decay, (1 + step) / (10 + step))."""
    unlabeled_ratio: float = Field(default=3, ge=0, le=64)
    """Pseudo-labeled images per labeled image in a step; students only. Paper: 1 (B0), 3 (B1–B7), 14 and 28 (L2)."""
    pseudo_labels: Literal["soft", "hard"] = "soft"
    """`soft`: the teacher's probabilities. `hard`: its best class; hurts where the teacher is unsure (below about 0.6)."""
    temperature: float = Field(default=1.0, gt=0, le=100)
    """Of soft pseudo-labels: probabilities to the power 1/T, renormalized."""
    weighting: Literal["sum", "mean", "equal"] = "sum"
    """Of the two mean losses, with r = unlabeled_ratio. `sum`: L + r U, as the reference code. `mean`: (L + r U) / (1 + r).
    `equal`: L + U, as the paper's Algorithm 1."""
    accumulate: int = Field(default=1, ge=1, le=4096)
    """Parts that a step's batch is split into, one in memory at a time. The gradient is that of the whole batch; batch-norm
    statistics are those of a part."""
    init: str = "scratch"
    """`scratch`: random weights. `teacher`: a student starts from its teacher's averaged weights. Otherwise the path or URI of
    a `.safetensors` file, or of a model's folder. Layers whose shapes differ start fresh; so does the classifier if the classes
    do."""
    precision: Literal["auto", Precision, "float32+compile", "bfloat16+compile", "float16+compile"] = "auto"
    """Of the forward and backward pass; weights, statistics and losses are float32 always. `auto`: the fastest on the machine
    where training begins, with torch.compile if that pays; a continued training keeps to it. float16 needs a GPU."""
    finetune: FinetuneConfig | None = None
    """A fine-tuning at another resolution after the training; none if not given."""
    checkpoint_seconds: float = Field(default=60, ge=0)
    """Between training checkpoints, from which a killed training goes on."""
    checkpoints_kept: int = Field(default=2, ge=1, le=100)
    """The last ones; a damaged one falls back on the one before."""
    loader_workers: int = Field(default=1, ge=0, le=64)
    """Processes that decode and augment for each that trains; 0 does it in the training process. The order of images does not
    depend on it."""
    processes: Literal["auto"] | Annotated[int, Field(ge=1, le=64)] = "auto"
    """Processes that train together on this machine, each on an equal part of every step's images. `auto`: one on each GPU; one
    without a GPU. Ignored where torchrun started them, as on several nodes."""
    tensorboard: bool = False
    """Write the curves as TensorBoard events too, to `tensorboard/` in the run's folder."""

    @field_validator("init")
    @classmethod
    def _check_init(cls, init: str) -> str:
        if init not in ("scratch", "teacher") and "/" not in init and not init.endswith(".safetensors"):
            raise ValueError("must be scratch, teacher, a .safetensors file, or a model's folder (./NAME)")
        return init

    @property
    def init_uri(self) -> str | None:
        """Where the weights are that training starts from, if they are neither random nor the teacher's."""
        return None if self.init in ("scratch", "teacher") else self.init

    @property
    def pseudo_batch(self) -> int:
        """Pseudo-labeled images in a student's step."""
        return math.ceil(self.labeled_batch * self.unlabeled_ratio)

    @model_validator(mode="after")
    def _check_equal_parts(self) -> Self:
        if self.labeled_batch % self.accumulate or self.pseudo_batch % self.accumulate:
            raise ValueError(
                f"accumulate: {self.accumulate} must divide the {self.labeled_batch} labeled and the {self.pseudo_batch} "
                "pseudo-labeled images of a step (labeled_batch × unlabeled_ratio)"
            )
        return self


class RoleConfig(Section):
    """A network with its noise and its training."""

    preset: Preset | None = None
    """The paper's settings for a size of network; fields given here go before them. `b0` … `b7`, `l2`: for photographs.
    `lite0` … `lite4`: for phones. `b0-small` … `b3-small`: for images of 32 px, not mirrored."""
    model: ModelConfig = ModelConfig()
    noise: NoiseConfig = NoiseConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, role: Any) -> Any:
        preset = PRESETS.get(role["preset"]) if isinstance(role, dict) and isinstance(role.get("preset"), str) else None
        return _merge_sections(preset, role) if preset else role

    @model_validator(mode="after")
    def _check_padding(self) -> Self:
        pad = self.noise.pad_px or 0
        if self.noise.crop == "pad" and pad >= self.model.resolution:
            raise ValueError(f"noise.pad_px: {pad}: must be below model.resolution, {self.model.resolution} px")
        return self


Views = Literal["one", "flip", "five", "ten"]


class LabelingConfig(Section):
    """How the teacher labels the pool."""

    batch: int = Field(default=256, ge=1, le=8192)
    """Images in a forward pass, in labeling and in evaluation."""
    top_k: int = Field(default=10, ge=1, le=1000)
    """Classes kept per image; the tail's mass is spread evenly. With at most 100 classes all are kept."""
    tasks: int = Field(default=2, ge=1, le=50)
    """Parallel labeling tasks, each over a range of shards."""
    views: Views = "one"
    """What the teacher's probabilities are averaged over. `flip`: the image and its mirror image. `five`: center and corners. `ten`:
    these, mirrored too. Labeling takes as many times longer. Paper: one."""
    ensemble: tuple[str, ...] = ()
    """Folders or URIs of further models, with the same classes, whose probabilities are averaged with the teacher's."""
    probabilities: Literal["float16", "log8"] = "float16"
    """How they are kept. `log8`: a byte each, to 2 % of itself, down to 2⁻¹⁶; halves a label set."""


class SelectionConfig(Section):
    """Which pseudo-labels a student sees, and how often (paper §3: filter, then balance)."""

    policy: Literal["paper", "all"] = "paper"
    """`paper`: confidence above the threshold, the most confident `per_class` of each class, rarer classes repeated.
    `all`: every image above the threshold, once."""
    min_confidence: float = Field(default=0.3, ge=0, lt=1)
    """Images at or below this confidence are left out."""
    per_class: int = Field(default=130_000, ge=1)
    """Images of each class after balancing."""
    repeat: bool = True
    """Repeat images of classes that have fewer than `per_class`; each image at most `max_repeat` times."""
    max_repeat: int = Field(default=100, ge=1)
    """So that one image does not stand for a class. The paper has no such limit."""
    classes_per_image: int = Field(default=1, ge=1, le=10)
    """An image may be picked for so many of its best classes, by the probability of each (arXiv:1905.00546, P). Paper: 1."""
    precision: float | None = Field(default=None, gt=0, lt=1)
    """Wanted precision of the labels: each class's threshold is the lowest at which the held-out images vouch for it. Never lower
    than `min_confidence`. Not used if not given."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Of that precision: one-sided, of the Clopper–Pearson bound."""

    @model_validator(mode="after")
    def _check_precision(self) -> Self:
        if self.precision is not None and self.classes_per_image > 1:
            raise ValueError("precision: is that of the best class only; must be left out with classes_per_image above 1")
        return self


SuiteName = Literal["clean", "corruptions", "perturbations", "attacks"]


class GateConfig(Section):
    """When a student becomes the teacher."""

    younger = ("max_mce_rise", "max_mfr_rise", "max_churn", "max_class_shrinkage", "min_audited_precision")

    level: float = Field(default=0.95, gt=0.5, lt=1)
    """One-sided confidence of the bound on the gain in held-out top-1 accuracy."""
    min_gain: float = Field(default=0.0, ge=-1, le=1)
    """Promote when the lower bound of the gain is above this. Below 0 it is a margin of non-inferiority."""
    max_class_drop: float | None = Field(default=None, gt=0, le=1)
    """Refuse when any class loses more held-out accuracy than this."""
    max_mce_rise: float | None = Field(default=None, ge=0)
    """Refuse when mCE on held-out images, of which the teacher has 100, rises by more than so many points. Needs `corruptions` in
    evaluation.suites."""
    max_mfr_rise: float | None = Field(default=None, ge=0)
    """Refuse when mFR on held-out images, of which the teacher has 100, rises by more than so many points. Needs `perturbations` in
    evaluation.suites."""
    max_churn: float | None = Field(default=None, ge=0, le=1)
    """Refuse when more than this share of the pool's labels differ from those of the generation before. No limit if not given, and
    none on the first generation."""
    max_class_shrinkage: float | None = Field(default=None, ge=0, le=1)
    """Refuse when the selection keeps fewer images of any class than in the generation before, by more than this share."""
    min_audited_precision: float | None = Field(default=None, gt=0, lt=1)
    """Refuse when people audited the generation's labels (`ns labels audit`), and the lower 95 % bound of the share that is right is
    below this. Labels that nobody audited are not refused; the verdict says so."""
    resamples: int = Field(default=10_000, ge=1000, le=1_000_000)
    """Bootstrap resamples of the held-out images."""

    @property
    def required_suites(self) -> dict[str, SuiteName]:
        """Limits on robustness that are set → what they need to be measured, on held-out images."""
        needs: dict[str, SuiteName] = {"max_mce_rise": "corruptions", "max_mfr_rise": "perturbations"}
        return {condition: suite for condition, suite in needs.items() if getattr(self, condition) is not None}


Corruption = Literal[
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow", "frost",
    "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
    "speckle_noise", "gaussian_blur", "spatter", "saturate",
]  # fmt: skip
EXTRA_CORRUPTIONS: tuple[Corruption, ...] = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""Published beside the 15 of the benchmark, for tuning on; in no mCE."""
CORRUPTIONS: tuple[Corruption, ...] = tuple(name for name in get_args(Corruption) if name not in EXTRA_CORRUPTIONS)

Perturbation = Literal[
    "gaussian_noise", "shot_noise", "motion_blur", "zoom_blur", "snow", "brightness", "translate", "rotate", "tilt", "scale"
]  # fmt: skip
PERTURBATIONS: tuple[Perturbation, ...] = get_args(Perturbation)

Severity = Annotated[int, Field(ge=1, le=5)]
Pixels = Annotated[float, Field(gt=0, le=255)]


class EvaluationSet(Section):
    """A further set of human-labeled images, on which every model is evaluated."""

    uri: str = Field(min_length=1)
    """A dataset, anything that `ns data import` takes, or the folder of a ready-made benchmark."""
    kind: Literal["images", "imagenet-c", "cifar10-c", "imagenet-p"] = "images"
    """`images`: plain ones, for accuracy. The others are read as they were published: `imagenet-c` CORRUPTION/SEVERITY/CLASS/IMAGE,
    `cifar10-c` CORRUPTION.npy and labels.npy, `imagenet-p` PERTURBATION/CLASS/SEQUENCE.mp4."""
    classes: Literal["all", "own"] | tuple[str, ...] = "all"
    """Between which of the model's classes the answer is chosen. `own`: those that the set has, as ImageNet-A, -R and -O are scored:
    the other outputs are left out before the softmax. Or the names of the classes."""
    multi_label: str | None = None
    """JSON or Parquet that names all the right classes of each image, as ReaL does (arXiv:2006.07159): an answer is right if it is
    one of them; images that have none are left out."""

    @model_validator(mode="after")
    def _check_kind_options(self) -> Self:
        if self.kind != "images":
            for name in ("classes", "multi_label"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name}: is for kind images only; leave it out for {self.kind}")
        return self


class EvaluationConfig(Section):
    """What models are evaluated on, and how (docs/evaluation.md). Costs are printed before the work begins."""

    suites: tuple[SuiteName, ...] = ("clean",)
    """`clean`: accuracy, always part of it, since the gate decides by it. `corruptions`: 15 kinds at 5 severities (mCE).
    `perturbations`: 10 kinds of short sequences (mFR, mT5D). `attacks`: FGSM and PGD. On data.test, if that is given, else on
    data.heldout."""
    sets: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")], EvaluationSet] = Field(default_factory=dict)
    """Further sets of images, by name: lower-case letters, digits, dashes."""
    images: int | None = Field(default=None, ge=1)
    """Images of a set for corruptions, perturbations and attacks: a quick look. All if not given. They are drawn evenly over the
    classes, the same ones in every run. Clean accuracy is always that of all images."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of that draw, and of corruptions and random starts. Not the experiment's: runs of other seeds see the same pixels."""
    corruptions: tuple[Corruption, ...] = Field(default=CORRUPTIONS, min_length=1)
    """Kinds; fewer than the 15 make no published mCE."""
    extra_corruptions: bool = False
    """Add the 4 further kinds, which count for no mCE."""
    severities: tuple[Severity, ...] = Field(default=(1, 2, 3, 4, 5), min_length=1)
    """Of the corruptions."""
    perturbations: tuple[Perturbation, ...] = Field(default=PERTURBATIONS, min_length=1)
    """Kinds of sequences."""
    perturbation_frames: int = Field(default=31, ge=2, le=101)
    """Images in a sequence. Published: about 31."""
    fgsm_epsilons: tuple[Pixels, ...] = (2, 4, 8, 16)
    """Largest change of a pixel, of 255, by one step along the gradient's sign. Paper: 2, 4, 8, 16."""
    pgd_steps: tuple[Annotated[int, Field(ge=1, le=1000)], ...] = (10, 50)
    """Steps of projected gradient descent. Paper: 10; models that stand 10 may fall at 50 (`noisy_student.md` §6.5)."""
    pgd_epsilon: Pixels = 16
    """Largest change of a pixel, of 255. Paper: 16."""
    pgd_step_size: Pixels | None = None
    """Of 255; 2.5 · pgd_epsilon / steps if not given (arXiv:1706.06083), which can reach the edge and come back."""

    keep_gib: float = Field(default=8, ge=0)
    """Corrupted images are kept in the store for the next model, if those of a set are no more than this. Changes no result."""

    @field_validator("suites", "corruptions", "severities", "perturbations", "fgsm_epsilons", "pgd_steps")
    @classmethod
    def _check_unique(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(values)) != len(values):
            raise ValueError("must name each only once")
        return values

    @property
    def needs_robustness(self) -> bool:
        """Whether more than clean accuracy is asked for."""
        return any(suite != "clean" for suite in self.suites)

    @property
    def all_corruptions(self) -> tuple[Corruption, ...]:
        """All corruptions that are asked for."""
        extra = EXTRA_CORRUPTIONS if self.extra_corruptions else ()
        return tuple(dict.fromkeys((*self.corruptions, *extra)))


class ReportConfig(Section):
    """What the report shows."""

    pictures: int = Field(default=24, ge=0, le=200)
    """Pseudo-labeled images shown in each group (most confident, least confident, flipped)."""


class RegistryConfig(Section):
    """Where versions of label sets are kept (docs/labels.md). Changes no result, and is no part of any digest."""

    git: str = Field(min_length=1)
    """URL or path of the label registry: a git repository of its own, which may be empty. Keys and passwords come from git's
    helpers, never from here."""
    remote: str | None = Field(default=None, min_length=1)
    """Folder or `s3://bucket/prefix` for the data. Needed as long as the registry is empty; afterwards it knows."""

    @model_validator(mode="after")
    def _check_no_password(self) -> Self:
        # The value is not shown: it would stand in logs.
        if re.search(r"^https?://[^/]*@|://[^/]*:[^/]*@", self.git):
            raise ValueError("git: holds a password or token; take it out, and set up a git credential helper")
        return self


class Experiment(Section):
    """Everything that a run does."""

    name: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")
    """Lower-case letters, digits and dashes, at most 40: it becomes part of names of runs, tags and pods."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of weights, order, noise, ties and the bootstrap: equal seeds give equal runs on equal machines."""
    generations: int = Field(default=3, ge=1, le=MAX_GENERATIONS)
    """Trips round the loop, at most; the gate may stop it earlier."""
    allow_smaller_student: bool = False
    """The method wants students equal to or larger than their teacher; a smaller one is distillation."""
    data: DataConfig
    teacher: RoleConfig = RoleConfig()
    students: tuple[RoleConfig, ...] = Field(default=(RoleConfig(),), min_length=1)
    """One per generation; the last one serves all further generations."""
    labeling: LabelingConfig = LabelingConfig()
    selection: SelectionConfig = SelectionConfig()
    gate: GateConfig = GateConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    report: ReportConfig = ReportConfig()
    registry: RegistryConfig | None = None
    """Keeps a version of each generation's label set."""

    @model_validator(mode="after")
    def _check_student_count(self) -> Self:
        if len(self.students) > self.generations:
            raise ValueError(
                f"students: {len(self.students)} given for {self.generations} generations; give at most one per generation"
            )
        return self

    @model_validator(mode="after")
    def _check_conditions_measured(self) -> Self:
        for condition, suite in self.gate.required_suites.items():
            if suite not in self.evaluation.suites:
                raise ValueError(
                    f"gate.{condition}: needs {suite} to be measured; add {suite} to evaluation.suites "
                    f"(now {', '.join(self.evaluation.suites) or 'empty'})"
                )
            if suite == "corruptions" and not set(self.evaluation.corruptions) - set(EXTRA_CORRUPTIONS):
                raise ValueError(
                    f"gate.{condition}: evaluation.corruptions names extra kinds only, which count for no mCE; add one of the 15"
                )
        return self

    @property
    def gate_evaluation(self) -> EvaluationConfig:
        """What is measured of robustness on held-out images for the gate, beside what is reported: no attacks, for instance."""
        return self.evaluation.model_copy(update={"suites": tuple(self.gate.required_suites.values())})

    def map_roles(self) -> dict[str, RoleConfig]:
        """The first teacher and all students, by their place in the document."""
        return {"teacher": self.teacher} | {f"students.{index}": role for index, role in enumerate(self.students)}

    def map_uris(self) -> dict[str, str]:
        """Folders, files and URIs that a run reads, by field; not the digits, which come with the code."""
        data, evaluation = self.data, self.evaluation
        uris = {f"data.{part}": getattr(data, part) for part in ("labeled", "pool", "heldout", "test", "exclude")}
        uris |= {f"labeling.ensemble.{index}": uri for index, uri in enumerate(self.labeling.ensemble)}
        for name, evaluation_set in evaluation.sets.items():
            uris |= {
                f"evaluation.sets.{name}.place": evaluation_set.uri,
                f"evaluation.sets.{name}.multi_label": evaluation_set.multi_label,
            }
        uris |= {f"{uri}.train.init": role.train.init_uri for uri, role in self.map_roles().items()}
        return {field: uri for field, uri in uris.items() if uri and not uri.startswith("digits:")}

    def get_student(self, generation: int) -> RoleConfig:
        """The student of a generation, counted from 1."""
        return self.students[min(generation, len(self.students)) - 1]


def resolve_preset(config_uri: str) -> str:
    """The file of a preset (`quickstart`), or the file or URI itself."""
    preset = importlib.resources.files("ns.config.presets") / f"{config_uri}.yaml"
    return str(preset) if preset.is_file() and not Path(config_uri).exists() else config_uri


def load_with_overrides(
    config_uri: str, overrides: Iterable[str] = (), fields: Mapping[str, str | int] | None = None
) -> Experiment:
    """An experiment (a file, a URI or a preset) with what a run form changes: overrides, and values by field (`data.pool`), of which an
    empty one or 0 leaves the field as the experiment has it."""
    return load_experiment(
        resolve_preset(config_uri), [*overrides, *(f"{name}={value}" for name, value in (fields or {}).items() if value)]
    )


def load_experiment(uri: str, overrides: Iterable[str] = ()) -> Experiment:
    """Reads an experiment from a YAML file and applies `a.b=c` overrides (list items by index: `students.0.train.epochs=5`).

    Raises ConfigError naming each wrong field with its path, its value and what would be right.
    """
    try:
        document = yaml.safe_load(read_uri(uri))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{uri}: not YAML: {error}") from error
    except StoreError as error:
        hint = "" if "." in uri.rpartition("/")[2] else "; name a YAML file, or the preset quickstart"
        raise ConfigError(f"config: {error}{hint}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{uri}: must be a mapping of fields, got {type(document).__name__}")
    document = _copy_unshared(document)
    for override in overrides:
        _apply_override(document, override)
    return parse_experiment(document, uri)


def parse_experiment(document: dict[str, Any], uri: str) -> Experiment:
    """Validates a document. `place` names it in messages."""
    try:
        return Experiment.model_validate(document)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{uri}: {line}" for line in format_validation_error(error, Experiment))) from error


def with_overrides(section: SectionT, overrides: Iterable[str]) -> SectionT:
    """A section with `a.b=c` overrides. Raises ConfigError naming each wrong field."""
    document = section.model_dump(mode="json")
    for override in overrides:
        _apply_override(document, override)
    try:
        return type(section).model_validate(document)
    except ValidationError as error:
        raise ConfigError("\n".join(f"--set: {line}" for line in format_validation_error(error, type(section)))) from error


def with_uris(experiment: Experiment, uris: Mapping[str, str]) -> Experiment:
    """An experiment that reads from other places, by field as `Experiment.places` has them."""
    document = experiment.model_dump(mode="json", context=EVERY_FIELD)
    for field, uri in uris.items():
        node: Any = document
        *sections, leaf = field.split(".")
        for key in sections:
            node = node[int(key) if isinstance(node, list) else key]
        node[int(leaf) if isinstance(node, list) else leaf] = uri
    return Experiment.model_validate(document)


def dump_experiment(experiment: Experiment) -> str:
    """YAML with every field, defaults included; `load` reads it back to an equal experiment."""
    return yaml.safe_dump(experiment.model_dump(mode="json", context=EVERY_FIELD), sort_keys=False, allow_unicode=True)


def _merge_sections(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given`, completed section by section. Arguments of a network are taken as a whole: another network has others."""
    merged = {**defaults, **given}
    for name, value in defaults.items():
        if isinstance(value, dict) and name != "args" and name in given:
            section = given[name].model_dump(exclude_unset=True) if isinstance(given[name], Section) else given[name]
            merged[name] = _merge_sections(value, section) if isinstance(section, dict) else section
    return merged


def _copy_unshared(node: Any) -> Any:
    """A copy in which YAML's aliases are separate: an override of the teacher must not reach a student that merges it."""
    if isinstance(node, dict):
        return {key: _copy_unshared(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_copy_unshared(value) for value in node]
    return node


def _apply_override(document: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override}: must look like a.b=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML: {error}") from error
    node: Any = document
    for depth, key in enumerate(keys):
        is_last = depth == len(keys) - 1
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise ConfigError(f"--set {override}: {key}: must be an index below {len(node)}")
            index: Any = int(key)
        elif isinstance(node, dict):
            index = key
            if not is_last and node.get(key) is None:
                node[key] = {}
        else:
            raise ConfigError(f"--set {override}: {'.'.join(keys[:depth])} is a value, not a section")
        if is_last:
            node[index] = value
        else:
            node = node[index]
