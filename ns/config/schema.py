"""The experiment: one validated object that says everything a run does. `ns.config.loader` reads it from YAML.

Defaults are the paper's (arXiv:1911.04252 v4 and its reference code). Derived values are computed, not configured.
"""

import difflib
import math
import re
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from ns.config.presets import PRESETS
from ns.core.printable import holds_credentials

MAX_GENERATIONS = 5
"""Generations of one run, at most: the pipeline is unrolled, and its size grows with this number."""

Precision = Literal["float32", "bfloat16", "float16"]

Preset = Literal[
    "b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7", "l2",
    "lite0", "lite1", "lite2", "lite3", "lite4",
    "b0-small", "b1-small", "b2-small", "b3-small",
]  # fmt: skip


class Section(BaseModel):
    """A frozen part of the experiment. Docstrings of fields are what `ns config schema` shows."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        serialize_by_alias=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans_as_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        # Pydantic takes true for 1.
        items = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(item, bool) for item in items) and _takes_numbers(cls.model_fields[info.field_name or ""].annotation):
            raise ValueError("must be a number; true and false are none")
        return value


def _takes_numbers(annotation: Any) -> bool:
    return annotation in (int, float) or any(map(_takes_numbers, get_args(annotation)))


def _check_scheme(uri: str) -> str:
    scheme, separator, rest = uri.partition("://")
    if holds_credentials(uri):
        return uri  # A password would stand in the message; the experiment refuses it without its value.
    if separator and scheme not in ("s3", "file"):
        raise ValueError(f"no store for {scheme}://; use a folder path, file:///absolute/path or s3://bucket/prefix")
    if scheme == "s3" and separator and not rest.strip("/"):
        raise ValueError("must name a bucket: s3://bucket/prefix")
    return uri


Uri = Annotated[str, Field(min_length=1), AfterValidator(_check_scheme)]


class ImportConfig(Section):
    """What an import accepts, and how it writes shards."""

    max_rejected_share: float = Field(default=0.1, ge=0, le=1)
    """Largest share of unreadable images. Up to it, they are counted, listed and left out; above it, the run stops."""
    shard_samples: int = Field(default=10_000, ge=1, le=100_000)
    """Largest number of images per shard."""
    shard_mib: int = Field(default=256, ge=1, le=4096)
    """Largest size of a shard, MiB."""
    max_side: int | None = Field(default=None, ge=8, le=65536)
    """Longest side of an imported image, px; larger images are scaled down. If not given, images are kept byte for byte."""
    max_megapixels: int = Field(default=100, ge=1, le=178)
    """Largest image, millions of pixels. A larger one is counted, listed and left out before it is decoded: a file of 1 MB may hold 178,
    which take 1.4 GB of memory in each process. Above 178, Pillow reads none."""


class DataConfig(ImportConfig):
    """Where images come from. Each URI names a dataset (a folder or an `s3://` prefix with dataset.json), or anything that
    `ns data import` takes: class folders, loose images (pool only), a table, tars, an archive. `digits:labeled|pool|heldout|test`
    are scikit-learn's handwritten digits, split for the quickstart."""

    labeled: Uri
    """URI of the labeled images that teacher and students train on."""
    pool: Uri
    """URI of the unlabeled images; labels that may be there are ignored."""
    heldout: Uri
    """URI of human-labeled images that decide promotions. They are never trained on."""
    test: Uri | None = None
    """URI of human-labeled images that are only reported: they take part in no decision, so that the reported accuracy is not the one
    that was optimized. They are never trained on."""
    calibration: Uri | None = None
    """URI of human-labeled images on which what has to be fitted is fitted: thresholds for `selection.precision`,
    `labeling.temperature`, and the limit of foreign scores. They are never trained on, and decide no promotion. If not given,
    `calibration_share` of the held-out images is set apart for it."""
    calibration_share: float = Field(default=0.5, gt=0, lt=1)
    """Share of the held-out images of each class that is set apart for fitting, if something has to be fitted and `calibration` is not
    given. The gate decides on the others alone. The images are drawn by a hash of key and `evaluation.seed`, the same in every run."""
    leak_guard: Literal["exclude", "report", "off"] = "exclude"
    """What is done with images of the pool that are also held out. `exclude`: they get no label, so that accuracy stays honest.
    `report`: they are only counted. `off`: the pool is not checked, which saves reading all its images once, and no image is refused for
    its looks."""
    exclude: Uri | None = None
    """Path or URI of a text file with one key of the pool, or path of an image's file, per line. These images get no label: their
    owners withdrew them, say."""
    near_duplicate_bits: int = Field(default=4, ge=0, le=8)
    """Two images are compared by their pixels if at most this many of the 64 bits of their perceptual hashes differ; they count as the
    same picture if the pixels agree too. Images with a side below 32 px are compared by their bytes only."""
    max_left_out_share: float = Field(default=0.2, ge=0, le=1)
    """Largest share of the pool that may be left out because it is also held out; above it, the run stops and asks."""
    max_heldout_overlap: float = Field(default=0.05, ge=0, le=1)
    """Largest share of the held-out, calibration or test images that may be nearly alike to labeled ones; above it, the run stops and
    asks. Images with equal bytes are never accepted."""

    @model_validator(mode="after")
    def _check_sets_differ(self) -> Self:
        # Copies of one dataset in two places are found when the data are prepared, and single images by the leak guard.
        for name, why, others in (
            ("heldout", "hold out images that are not trained on", ("labeled",)),
            ("calibration", "name images that are used for nothing else, or leave it out", ("labeled", "heldout")),
            (
                "test",
                "name images that nothing is trained on or decided by, or leave it out",
                ("labeled", "heldout", "calibration"),
            ),
        ):
            for other in others:
                if getattr(self, name) is not None and getattr(self, name) == getattr(self, other):
                    raise ValueError(f"{name}: {getattr(self, name)}: is the same as data.{other}; {why}")
        return self


Crop = Literal["resized", "pad", "none"]
TestCrop = Literal["paper", "center", "squash"]
Interpolation = Literal["bicubic", "bilinear"]


WORD = re.compile(r"[A-Za-z0-9_]{1,40}")
# Models come from strangers too, and timm's other arguments would read files, the network, and in old versions pickles.
ARCHITECTURE_ARGS: frozenset[str] = frozenset({
    "aa_layer", "act_layer", "attn_drop_rate", "attn_ratio", "avg_down", "base_dim", "base_dims", "base_width",
    "block_config", "bn_eps", "bn_momentum", "bn_size", "bn_tf", "bottle_ratio", "cardinality", "channel_multiplier",
    "channels", "class_token", "conv_mlp", "conv_ratio", "deepen_factor", "depth", "depth_mult", "depths", "dim_mul", "dims",
    "down_kernel_size", "downsamples", "drop_block_rate", "dynamic_img_pad", "dynamic_img_size", "embed_dim", "embed_dims",
    "expand_ratio", "expansion_ratio", "fc_norm", "final_norm", "fix_stem", "fused_conv", "global_pool", "growth_rate",
    "head_dim", "head_hidden_size", "head_init_scale", "head_mul", "head_norm", "head_norm_first", "head_widths",
    "hidden_sizes", "img_size", "init_values", "kernel_size", "kernel_sizes", "key_dim", "layer_scale_init_value", "layers",
    "ls_init_value", "mlp_ratio", "mlp_ratios", "no_embed_class", "norm_eps", "norm_layer", "num_blocks", "num_features",
    "num_heads", "num_init_features", "num_kv_heads", "num_reg_tokens", "output_stride", "pad_type", "patch_drop_rate",
    "patch_size", "pool_size", "pos_drop_rate", "pos_embed", "pre_norm", "preact", "proj_bias", "proj_drop_rate", "qk_norm",
    "qkv_bias", "qkv_fused", "reg_tokens", "rope_temperature", "rope_theta", "se_layer", "se_ratio", "sr_ratios",
    "stage_depths", "stages", "stem_bias", "stem_chs", "stem_kernel_size", "stem_size", "stem_stride", "stem_type",
    "stem_width", "strict_img_size", "strides", "swiglu_mlp", "use_abs_pos", "use_abs_pos_emb", "use_conv", "use_fc_norm",
    "use_grn", "use_layer_scale", "use_pos_embed", "use_rel_pos", "use_rope", "weight_init", "widen_factor", "width",
    "width_factor", "width_mult", "widths", "window_ratio", "window_size", "window_sizes", "zero_init_last",
})  # fmt: skip
"""Arguments of timm's networks that decide their shape and nothing else."""


def _is_plain_value(value: Any, depth: int = 0) -> bool:
    if isinstance(value, list | tuple):
        return depth < 2 and all(_is_plain_value(item, depth + 1) for item in value)
    return (
        value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and WORD.fullmatch(value) is not None)
    )


# For images scaled to [0, 1], as in timm and in the paper's code.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Channel = Annotated[float, Field(ge=0, le=1)]
Deviation = Annotated[float, Field(gt=0, le=1)]


PICKLES = ("pth", "pt", "bin", "ckpt", "pkl", "tar")
"""Endings of files of weights that are pickles."""
HUB = "hf-hub:"
HUB_NAME = re.compile(rf"{HUB}(?!.*\.\.)[\w.-]{{1,96}}/[\w.-]{{1,96}}(@\w[\w./-]{{0,99}})?", re.ASCII)
"""A revision becomes a path in the hub's cache on this machine."""


def is_weights_uri(pretrained: str) -> bool:
    """Whether weights are named by the URI of a file or a folder, and not by a name at a hub."""
    return not pretrained.startswith(HUB) and ("/" in pretrained or pretrained.endswith(".safetensors"))


class ModelConfig(Section):
    """A timm network."""

    arch: str = Field(default="efficientnet_b0", max_length=100)
    """Name of a timm architecture; if not given, that of `pretrained`."""
    pretrained: str | None = Field(default=None, min_length=1, max_length=1024)
    """Weights that training starts from; random ones if not given. A name of timm with its tag (`resnet18.a1_in1k`), a repository of the
    Hugging Face hub (`hf-hub:OWNER/NAME`, with `@REVISION` if need be), the path or URI of a `.safetensors` file, or of the folder of a
    model of ours. What is not given below is taken from them: `args`, resolutions, `mean`, `std`, `interpolation`, `test_crop` and
    `test_margin_px`. Layers that do not fit start from random weights; so does the classifier if the classes differ. Paper: none."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the architecture, such as `img_size` and `bn_eps`: plain values and lists that decide its shape."""
    resolution: int = Field(default=224, ge=8, le=2048)
    """Training resolution, px."""
    test_resolution: int | None = Field(default=None, ge=8, le=2048)
    """Resolution of evaluation and labeling, px; the training resolution if not given."""
    test_margin_px: int = Field(default=32, ge=0, le=2048)
    """Margin around the part of a photograph that evaluation and labeling see: the centered square with resolution / (resolution +
    margin) of the short side, which timm calls `crop_pct`. Paper: 32."""
    test_crop: TestCrop = "paper"
    """How evaluation and labeling cut a photograph, with `crop` `resized`. `paper`: the square is cut, then resized. `center`: the image
    is resized, then the square is cut, as timm does, and as weights from elsewhere want it; the result differs by less than a pixel.
    `squash`: the image is made square, then cut. The last two decode photographs at their full size, which takes longer."""
    interpolation: Interpolation = "bicubic"
    """Filter that images are resized with, in training and wherever the model is used. Paper: bicubic."""
    crop: Crop = "resized"
    """Geometry of an image. `resized`: training sees a random part of it, labeling and evaluation its center; the paper's choice
    for photographs. `pad`: training sees it shifted, with reflected borders; for small images. `none`: always the whole image."""
    mean: tuple[Channel, Channel, Channel] = IMAGENET_MEAN
    """Mean of the red, green and blue of images, of 1: it is subtracted in training and wherever the model is used. Weights from
    elsewhere need that of their own training. Paper: ImageNet's."""
    std: tuple[Deviation, Deviation, Deviation] = IMAGENET_STD
    """Standard deviation that the three channels are divided by, of 1; as for `mean`. Paper: ImageNet's."""
    reduce_stride: Literal[1, 2, 4, 8] = 1
    """Divisor of the network's total stride: its first strided convolutions become dense. For images of 64 px and less."""
    inference_precision: Literal["auto", Precision] = "auto"
    """Precision of labeling and evaluation. `auto` goes by the hardware that trains the network: bfloat16 on GPUs of compute
    capability 8.0 and above and on CPUs with AMX or AVX-512 instructions for it, float16 on GPUs of compute capability 7.x, float32
    otherwise. The model keeps the precision, so that its labels do not depend on where they are made."""
    inference_compile: bool = False
    """Use torch.compile in labeling and evaluation of 50,000 images and more. It needs a C++ compiler, and takes up to a minute."""
    outputs: int | None = Field(default=None, ge=2)
    """Number of outputs of the network; the number of classes of the labeled data if not given."""

    @field_validator("args")
    @classmethod
    def _check_args(cls, args: dict[str, Any]) -> dict[str, Any]:
        reserved = {
            "num_classes": "outputs",
            "drop_rate": "noise.dropout",
            "drop_path_rate": "noise.stochastic_depth",
            "pretrained": "model.pretrained",
        }
        for name, instead in reserved.items():
            if name in args:
                raise ValueError(f"{name} is set elsewhere: use {instead}")
        for name, value in args.items():
            if name not in ARCHITECTURE_ARGS:
                similar = difflib.get_close_matches(name, sorted(ARCHITECTURE_ARGS), n=3)
                hint = f"did you mean {' or '.join(similar)}?" if similar else "leave it out"
                raise ValueError(f"{name}: is none of the arguments that decide a network's shape; {hint}")
            if not _is_plain_value(value):
                raise ValueError(f"{name}: must be a number, a word, true, false, or a list of such")
        return args

    @field_validator("arch")
    @classmethod
    def _check_arch(cls, arch: str) -> str:
        if not re.fullmatch(r"\w+(\.\w+)?", arch, re.ASCII):
            raise ValueError("must be the name of a timm architecture; sources such as hf-hub: and local-dir: are never read")
        return arch

    @field_validator("pretrained")
    @classmethod
    def _check_pretrained(cls, pretrained: str | None) -> str | None:
        if pretrained is None:
            return None
        if pretrained.rpartition(".")[2] in PICKLES:
            raise ValueError(
                "pickled weights are not read, because a pickle can run any program; convert the file once: safetensors.torch.save_file("
                "torch.load(FILE, weights_only=True), 'weights.safetensors')"
            )
        if pretrained.startswith(HUB):
            if not HUB_NAME.fullmatch(pretrained):
                raise ValueError("must be hf-hub:OWNER/NAME, or hf-hub:OWNER/NAME@REVISION")
        elif not is_weights_uri(pretrained) and not re.fullmatch(r"\w+(\.\w+)?", pretrained, re.ASCII):
            raise ValueError(
                "must be a name of timm (NAME.TAG), hf-hub:OWNER/NAME, a .safetensors file, or a model's folder (./NAME)"
            )
        return _check_scheme(pretrained) if is_weights_uri(pretrained) else pretrained

    @property
    def pretrained_uri(self) -> str | None:
        """URI of the file or the model's folder that `pretrained` names; None if it names weights of a hub, or nothing."""
        return self.pretrained if self.pretrained and is_weights_uri(self.pretrained) else None

    @property
    def inference_resolution(self) -> int:
        return self.test_resolution or self.resolution


Fraction = Annotated[float, Field(gt=0, le=1)]
Aspect = Annotated[float, Field(ge=0.1, le=10)]

POLICY = re.compile(
    r"trivialaugment"
    r"|rand(-(m\d+|n\d+|p[01]?\.?\d+|mstd\d*\.?\d+|mmax[1-9]\d*|inc[01]|t(weights|3aw?|increasing)))*"
    r"|augmix(-(m\d+|w[1-9]\d*|d[1-9]\d*|a\d*\.?\d+|b[01]|mstd\d*\.?\d+))*"
)
"""Names of augmentation policies: timm's grammar, with the parts that timm understands."""


class NoiseConfig(Section):
    """What makes the student noisy. The teacher labels without any of it."""

    pool: Literal["same", "network", "none"] = "same"
    """Noise of the pseudo-labeled images; labeled ones always have all of it (arXiv:1911.04252, Table 6). `same`: as for labeled images.
    `network`: dropout and stochastic depth only; images are as in labeling, at the training resolution. `none`: not even these.
    Paper: same, and the other two in its ablation."""
    dropout: float = Field(default=0.2, ge=0, lt=1)
    """Dropout rate before the classifier. Paper: 0.2 (B0, B1) to 0.5 (B6, B7, L2)."""
    stochastic_depth: float = Field(default=0.2, ge=0, lt=1)
    """Drop rate of the last block, growing linearly from 0 at the first. Paper: 0.2."""
    randaugment_layers: int = Field(default=2, ge=0, le=8)
    """Operations per image. Paper: 2; 0 turns RandAugment off."""
    randaugment_magnitude: float = Field(default=6, ge=0, le=30)
    """Magnitude of RandAugment. Paper: none for B0 and B1, 6, 12, 15, 18, 24, 27 for B2…B7, 27 for L2, 5 for 32 px digits."""
    randaugment: Literal["paper", "reference", "timm"] = "paper"
    """Kind of RandAugment (docs/training.md has what each does at each magnitude). `paper`: every drawn operation is applied, and ranges
    go on beyond magnitude 10, up to the limits of a byte. `reference`: as the paper's authors ran it, with the overflows of their code.
    `timm`: an operation is applied half of the time, and the magnitude ends at 10; whole magnitudes only."""
    policy: str | None = None
    """Augmentation policy that replaces RandAugment: one of timm's, such as `rand-m9-mstd0.5-inc1` or `augmix-m5-w4-d2`, or
    `trivialaugment`. If not given, the `randaugment` fields are used. Paper: RandAugment."""
    randaugment_translate_px: float | None = Field(default=None, ge=0, le=2048)
    """Shift at magnitude 10, px, of kinds `paper` and `reference`. If not given, the paper's 100, and an eighth of the resolution up to
    64 px."""
    randaugment_cutout_px: float | None = Field(default=None, ge=0, le=1024)
    """Half the side of the gray square at magnitude 10, px, of kinds `paper` and `reference`; 0 takes it out of the operations that are
    drawn. If not given, the paper's 40, and an eighth of the resolution up to 64 px."""
    crop_area: tuple[Fraction, Fraction] = (0.08, 1.0)
    """Least and greatest share of the image's area, for model.crop `resized`. Paper: 8 to 100 %."""
    crop_aspect: tuple[Aspect, Aspect] = (3 / 4, 4 / 3)
    """Least and greatest width / height of that part, for model.crop `resized`. Paper: 3/4 to 4/3."""
    pad_px: int | None = Field(default=None, ge=0, le=1024)
    """Largest shift in each direction, px, for model.crop `pad`; an eighth of the resolution if not given. Paper: 4 at 32 px."""
    flip: bool = True
    """Mirror half of the images. Turn it off for digits, text, and anything that has a handedness."""
    cutout_px: int = Field(default=0, ge=0, le=1024)
    """Side of a gray square that is put on every image after RandAugment, px. Paper: 16 at 32 px, none for photographs."""
    erasing: float = Field(default=0, ge=0, le=1)
    """Probability of random erasing: random pixels in a rectangle of 2 to 33 % of the image (arXiv:1708.04896). Paper: none."""
    mixup: float = Field(default=0, ge=0, le=100)
    """α of MixUp (arXiv:1710.09412): images of a stream are blended in pairs, with shares drawn from Beta(α, α), and so are their labels.
    0 turns it off. Paper: none."""
    cutmix: float = Field(default=0, ge=0, le=100)
    """α of CutMix (arXiv:1905.04899): images of a stream exchange a box in pairs, whose area is drawn from Beta(α, α); labels are mixed by
    area. 0 turns it off; with both, each is taken for half of the pairs. Paper: none."""

    @property
    def mixes_images(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    @field_validator("crop_area", "crop_aspect")
    @classmethod
    def _check_bounds_order(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        if bounds[0] > bounds[1]:
            raise ValueError("must be [least, greatest]")
        return bounds

    @field_validator("policy")
    @classmethod
    def _check_policy(cls, policy: str | None) -> str | None:
        # Checked here, since timm passes over parts that it does not know.
        if policy is not None and not POLICY.fullmatch(policy):
            raise ValueError(
                "must be trivialaugment, rand with parts of -m9 -n2 -p0.5 -mstd0.5 -mmax15 -inc1 -tweights, or augmix with parts of "
                "-m5 -w4 -d2 -a1 -b1 -mstd0.5"
            )
        return policy

    @model_validator(mode="after")
    def _check_whole_magnitude(self) -> Self:
        if self.randaugment == "timm" and self.randaugment_magnitude % 1:
            raise ValueError(f"randaugment_magnitude: {self.randaugment_magnitude:g}: must be a whole number for kind timm")
        return self


OPTIMIZERS = ("rmsprop", "sgd", "adamw")
UNUSABLE_OPTIMIZERS = ("bnb", "fused", "adahessian", "kron")
"""Beginnings of timm's names of optimizers that need programs of their own, or second derivatives, or draw from a generator of their own,
which no checkpoint holds."""


class OptimizerConfig(Section):
    """How weights are updated (arXiv:1911.04252 §3.1)."""

    name: str = "rmsprop"
    """Algorithm. `rmsprop` has TensorFlow's semantics, as in the paper; `sgd` and `adamw` are PyTorch's; any other is that of
    `timm.optim`, as `lamb`, `lion` or `muon`, with its own defaults."""
    lr: float = Field(default=0.016, gt=0, le=10)
    """Peak learning rate for a labeled batch of 256; scaled linearly with the labeled batch."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of `rmsprop` and `sgd` (Nesterov's)."""
    rms_decay: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the mean squared gradient of `rmsprop`."""
    rms_epsilon: float = Field(default=1e-3, gt=0)
    """Constant that `rmsprop` adds to the mean squared gradient, inside the square root."""
    weight_decay: float = Field(default=1e-5, ge=0, lt=1)
    """Factor of the L2 penalty. Paper: 1e-5 (ImageNet), 1e-4 (SVHN)."""
    decay_rule: Literal["auto", "paper", "timm"] = "auto"
    """Parameters that weight decay spares. `paper`: those of batch norms. `timm`: all vectors (biases, scales and shifts of norms),
    and what the architecture names, as class tokens and position embeddings. `auto`: `paper` with `rmsprop` and `sgd`, else `timm`."""
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    """Factor from each layer's learning rate to that of the layer before it, for fine-tuning pretrained transformers
    (arXiv:2106.08254: 0.65 to 0.9); the same rate for all if not given."""
    schedule: Literal["staircase", "cosine"] = "staircase"
    """Course of the learning rate. `staircase`: it falls `staircase_drops` times by `staircase_factor`. `cosine`: it falls to zero."""
    staircase_factor: float = Field(default=0.97, gt=0, le=1)
    """Share of the learning rate that a drop leaves."""
    staircase_drops: float = Field(default=350 / 2.4, gt=0)
    """Drops in a training, whatever its length. Paper: one every 2.4 of 350 epochs (145 drops, the last to 1.2 % of the peak), and for
    32 px digits one every 1.3716 of 202.3 (147)."""
    warmup_epochs: float = Field(default=5, ge=0)
    """Labeled epochs in which the learning rate rises linearly from zero."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient of the mean loss per image; not clipped if not given. With `train.weighting` `sum`, a student's
    gradients are 1 + r times as large, and so is its limit."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name not in OPTIMIZERS:
            from timm.optim import list_optimizers  # two seconds, for those who name one of them

            names = [other for other in list_optimizers() if not other.startswith(UNUSABLE_OPTIMIZERS)]
            if name not in names:
                similar = difflib.get_close_matches(name, names, n=3) or OPTIMIZERS
                raise ValueError(f"timm.optim has no such optimizer; did you mean {' or '.join(similar)}?")
        return name


class FinetuneConfig(Section):
    """The train/test resolution fix: a short training on plain labeled images, at the resolution of the test (arXiv:1911.04252 §3).
    The model from before it is kept: it labels, and goes through the gate. The fine-tuned one is evaluated beside it."""

    resolution: int = Field(ge=8, le=2048)
    """Resolution of fine-tuning and of the fine-tuned model, px. Paper: 800 for L2, which trained at 475."""
    epochs: float = Field(default=1.5, gt=0)
    """Labeled epochs. Paper: 1.5."""
    frozen_share: float = Field(default=0.5, ge=0, le=1)
    """Share of the blocks, counted from the input, that keep their weights and statistics; the stem does too. The paper freezes
    shallow layers, and does not say how many."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout rate, the only noise that can be left on; the reference code leaves it on by default."""
    labeled_batch: int | None = Field(default=None, ge=2, le=65536)
    """Labeled images per step; as in training if not given."""
    lr: float | None = Field(default=None, gt=0, le=10)
    """Learning rate for a batch of 256, scaled linearly. If not given, 0.0121 of optimizer.lr: where the paper's schedule ends, whatever
    the schedule here."""


class TrainConfig(Section):
    """How a network is trained. An epoch is a pass over the labeled images, as in the paper."""

    labeled_batch: int = Field(default=512, ge=2, le=65536)
    """Labeled images per step."""
    epochs: float = Field(default=350, gt=0)
    """Length of the training in labeled epochs. Paper: 700 for B0–B4, 350 for larger."""
    optimizer: OptimizerConfig = OptimizerConfig()
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Label smoothing on labeled images and on hard pseudo-labels, never on soft ones."""
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    """Decay of the averaged weights, which are the ones that are kept, evaluated and used for teaching. It is ramped up as
    min(decay, (1 + step) / (10 + step))."""
    unlabeled_ratio: float = Field(default=3, ge=0, le=64)
    """Pseudo-labeled images per labeled image in a step; students only. Paper: 1 (B0), 3 (B1–B7), 14 and 28 (L2)."""
    pseudo_labels: Literal["soft", "hard"] = "soft"
    """What a student learns from. `soft`: the teacher's probabilities. `hard`: its best class, which hurts where the teacher is unsure
    (confidence below about 0.6)."""
    temperature: float = Field(default=1.0, gt=0, le=100)
    """Temperature T of soft pseudo-labels: probabilities to the power 1/T, renormalized."""
    weighting: Literal["auto", "sum", "mean", "equal"] = "auto"
    """Weights of the two mean losses L (labeled) and U (pseudo-labeled), with r = unlabeled_ratio. `sum`: L + r U, as in the reference
    code. `mean`: (L + r U) / (1 + r). `equal`: L + U, as in the paper's Algorithm 1. `auto`: `sum` with `rmsprop`, as in the reference
    code, and `mean` with `sgd` and `adamw`. With `sgd`, `sum` makes a student's steps 1 + r times as long, and its weight decay 1 + r
    times as weak beside the loss; `rmsprop` and `adamw` divide by the size of gradients."""
    accumulate: int = Field(default=1, ge=1, le=4096)
    """Parts that a step's batch is split into; one part is in memory at a time. The gradient is that of the whole batch; batch-norm
    statistics are those of a part."""
    init: Literal["scratch", "teacher"] = "scratch"
    """Weights that a student starts from. `scratch`: none of its teacher's: those of `model.pretrained`, or else random ones. `teacher`:
    its teacher's averaged weights; layers whose shapes differ start from random weights. Paper: scratch."""
    frozen_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the blocks, counted from the input, that keep their weights and statistics; the stem does too. 1: only the classifier
    learns. For trainings that start from weights. Paper: 0."""
    unfreeze_epoch: float | None = Field(default=None, gt=0)
    """Labeled epoch from which the frozen blocks learn too; never if not given."""
    precision: Literal["auto", Precision] = "auto"
    """Precision of the forward and the backward pass; weights, statistics and losses are always float32. `auto` goes by the hardware
    where training begins: bfloat16 on GPUs of compute capability 8.0 and above, float16 on those of 7.x, float32 on older ones and on
    CPUs. A continued training keeps its precision. float16 needs a GPU."""
    compile: bool = False
    """Use torch.compile. It needs a C++ compiler, and takes up to a minute; without a compiler the network runs uncompiled."""
    finetune: FinetuneConfig | None = None
    """Fine-tuning at another resolution after the training; none if not given."""
    checkpoint_seconds: float = Field(default=60, ge=0)
    """Seconds between training checkpoints. A killed training continues from the last one."""
    checkpoints_kept: int = Field(default=2, ge=1, le=100)
    """Number of training checkpoints that are kept. If the newest is damaged, the one before it is used."""
    loader_workers: int = Field(default=1, ge=0, le=64)
    """Processes that decode and augment, per training process; with 0, the training process does it. The order of images does not
    depend on this number."""
    processes: Literal["auto"] | Annotated[int, Field(ge=1, le=64)] = "auto"
    """Processes that train together on this machine, each on an equal part of every step's images. `auto`: one per GPU, or one without
    a GPU. Ignored where torchrun started the processes, as on several nodes."""
    tensorboard: bool = False
    """Write the curves as TensorBoard events too, into `tensorboard/` in the run's folder."""

    @field_validator("init", mode="before")
    @classmethod
    def _check_init(cls, init: Any) -> Any:
        if init not in ("scratch", "teacher"):
            raise ValueError("must be scratch or teacher; weights from elsewhere are named in model.pretrained")
        return init

    @property
    def loss_weighting(self) -> Literal["sum", "mean", "equal"]:
        """What `weighting` means for this optimizer."""
        if self.weighting == "auto":
            return "sum" if self.optimizer.name == "rmsprop" else "mean"
        return self.weighting

    @property
    def pseudo_batch(self) -> int:
        """Pseudo-labeled images per step of a student."""
        return math.ceil(self.labeled_batch * self.unlabeled_ratio)

    @model_validator(mode="after")
    def _check_equal_parts(self) -> Self:
        if self.labeled_batch % self.accumulate or self.pseudo_batch % self.accumulate:
            raise ValueError(
                f"accumulate: {self.accumulate} must divide the {self.labeled_batch} labeled and the {self.pseudo_batch} "
                "pseudo-labeled images of a step (labeled_batch × unlabeled_ratio)"
            )
        batch = self.finetune and self.finetune.labeled_batch
        if batch and batch % self.accumulate:
            raise ValueError(f"finetune.labeled_batch: {batch}: must be a multiple of accumulate, {self.accumulate}")
        return self


class RoleConfig(Section):
    """A network with its noise and its training."""

    preset: Preset | None = None
    """The paper's settings for a size of network; fields that are given here override them. `b0` … `b7`, `l2`: for photographs.
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
        if self.model.crop == "pad" and pad >= self.model.resolution:
            raise ValueError(f"noise.pad_px: {pad}: must be below model.resolution, {self.model.resolution} px")
        return self


Views = Literal["one", "flip", "five", "ten"]
ForeignScore = Literal["none", "distance", "energy"]


class LabelingConfig(Section):
    """How the teacher labels the pool."""

    label_set: Uri | None = None
    """URI of a label set of the pool, as `ns labels import` makes it: a student of generation 1 learns from it, in the place of the first
    teacher's labels. The selection, audits, comparisons and the gate treat it as any other. Later generations have their teacher's
    labels. Paper: none."""
    batch: int = Field(default=256, ge=1, le=8192)
    """Images per forward pass in labeling and in evaluation."""
    top_k: int = Field(default=10, ge=1, le=1000)
    """Classes that are kept per image; the mass of the others is spread evenly. With at most 100 classes all are kept."""
    tasks: int = Field(default=2, ge=1, le=50)
    """Parallel labeling tasks; each labels a range of shards."""
    views: Views = "one"
    """Views of an image that the teacher's probabilities are averaged over. `flip`: the image and its mirror image. `five`: center and
    corners. `ten`: these five and their mirror images. Labeling takes longer by the number of views. Paper: one."""
    ensemble: tuple[Uri, ...] = ()
    """URIs of further models with the same classes, whose probabilities are averaged with the teacher's."""
    temperature: Literal["fitted"] | Annotated[float, Field(ge=0.1, le=10)] = 1.0
    """Divides the logarithms of the teacher's probabilities, after views and ensemble are averaged and before the best classes are taken:
    above 1 labels become less sure. Confidences, thresholds, the selection and the soft labels follow. `fitted`: the temperature at which
    the true classes of the calibration images are most likely (arXiv:1706.04599). Paper: 1."""
    probabilities: Literal["float16", "log8"] = "float16"
    """Encoding of the kept probabilities. `float16`: two bytes each. `log8`: one byte each, exact to 2 % of the value, down to 2⁻¹⁶;
    it halves a label set."""
    foreign_score: ForeignScore = "none"
    """Score of every image of the pool by how unlike the labeled images it is, for leaving out foreign images, which belong to none of the
    classes (`selection.foreign_quantile`). `distance`: Mahalanobis distance to the labeled images in the outputs of the teacher's stages.
    `energy`: of the teacher's logits (arXiv:2010.03759). The teacher alone gives it, as the mean over its views. Paper: none."""


class SelectionConfig(Section):
    """Which pseudo-labels a student sees, and how often (arXiv:1911.04252 §3.1: filter, then balance)."""

    policy: Literal["paper", "all", "adaptive", "aligned"] = "paper"
    """Rule of the selection. `paper`: of the images above the threshold, the most confident `per_class` of each class; images of rarer
    classes are repeated. `all`: every image above the threshold, once. `adaptive`: as `paper`, with a threshold for each class that
    follows the teacher's confidence in it (`adaptive_scale`). `aligned`: as `paper`, after the probabilities are divided by a power of
    their mean over the pool (`alignment`), which raises the classes that the teacher neglects; soft labels are aligned too."""
    images_from: Literal["each", "first"] = Field(default="each", alias="from")
    """Generation whose labels choose the images. `each`: every generation selects by its own labels. `first`: later generations see
    the images that the run's first one chose, as often, with their own teacher's labels, as in the paper."""
    weights: Literal["none", "confidence"] = "none"
    """Weight of a pseudo-labeled image in the loss. `confidence`: its confidence, divided by the mean over an epoch. Paper: none."""
    min_confidence: float = Field(default=0.3, ge=0, lt=1)
    """Threshold: images at or below this confidence are left out."""
    adaptive_scale: float = Field(default=1.0, gt=0, le=2)
    """S of policy `adaptive`: the threshold of a class is S times the mean confidence of its images above `min_confidence`, which never
    is undercut. At 1 a class keeps about half of them; below, more."""
    alignment: float = Field(default=0.5, gt=0, le=1)
    """Exponent λ of policy `aligned`: probabilities become p / q^λ, renormalized, where q is the mean prediction over the pool
    (arXiv:2201.01490, where it is 0.5). The larger, the more even the classes become."""
    per_class: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Images per class after balancing. `auto`: the mean number of candidates of the classes that have any, at most the paper's 130,000:
    larger classes keep their most confident images, smaller ones repeat theirs. Paper: 130,000 of 300 million images."""
    repeat: bool = True
    """Repeat images of classes that have fewer than `per_class`."""
    max_repeat: int = Field(default=100, ge=1)
    """Largest number of copies of an image: one image should not stand for a class. The paper has no such limit."""
    classes_per_image: int = Field(default=1, ge=1, le=10)
    """Number of an image's best classes that it may be selected for, by the probability of each (arXiv:1905.00546, P). Paper: 1."""
    precision: float | None = Field(default=None, gt=0, lt=1)
    """Wanted precision of the labels, for pools without foreign images. Thresholds are tested on the calibration images from high to
    low, class by class, down to `min_confidence`, as long as there is evidence of this precision. If not given, `min_confidence` is
    the only threshold."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Level of that evidence: the threshold of a class misses the precision with a probability of at most 1 - confidence."""
    fallback_share: float = Field(default=0.1, ge=0, le=1)
    """Share of its candidates, the most confident ones, that a class keeps if there is no evidence of `precision` at any threshold.
    Without them the student would never see the class. 0: such a class stays empty."""
    foreign_quantile: float = Field(default=0.95, gt=0, le=1)
    """Images whose foreign score is above this quantile of the calibration images' scores are left out; used only with
    `labeling.foreign_score`. At 0.95, about 5 % of the images of the classes are lost. Lower values leave out more foreign images."""

    @model_validator(mode="after")
    def _check_precision(self) -> Self:
        if self.precision is not None and self.classes_per_image > 1:
            raise ValueError("precision: is that of the best class only; must be left out with classes_per_image above 1")
        if self.precision is not None and self.policy == "aligned":
            raise ValueError("precision: is found for labels as the teacher gives them; must be left out with policy aligned")
        return self


SuiteName = Literal["clean", "corruptions", "perturbations", "attacks"]


class GateConfig(Section):
    """When a student becomes the teacher."""

    level: float = Field(default=0.95, gt=0.5, lt=1)
    """One-sided confidence level of the gain in held-out top-1 accuracy, and of each of the conditions `max_class_drop`, `max_mce_rise`
    and `max_mfr_rise`."""
    min_gain: float = Field(default=0.0, ge=-1, le=1)
    """Promote if the lower bound of the gain is above this, and an exact test agrees. A value below 0 is a margin of non-inferiority."""
    spend: Literal["none", "bonferroni"] = "none"
    """What repeated tries on the same held-out images cost. `none`: each is tested at `level`; a verdict warns from the tenth on.
    `bonferroni`: the k-th may err with probability (1 - level) / (k (k + 1)), so that all tries together err with at most 1 - level."""
    max_class_drop: float | None = Field(default=None, gt=0, le=1)
    """Refuse if any class surely loses more held-out accuracy than this, at `level` for all classes together. No limit if not given."""
    max_mce_rise: float | None = Field(default=None, ge=0)
    """Refuse if the mCE on held-out images surely rises by more points than this; the teacher has 100. Needs `corruptions` in
    evaluation.suites. No limit if not given."""
    max_mfr_rise: float | None = Field(default=None, ge=0)
    """Refuse if the mFR on held-out images surely rises by more points than this; the teacher has 100. Needs `perturbations` in
    evaluation.suites. No limit if not given."""
    max_churn: float | None = Field(default=None, ge=0, le=1)
    """Refuse if more than this share of the pool's labels differs from those of the generation before. No limit if not given, and none
    on the first generation."""
    max_class_shrinkage: float | None = Field(default=None, ge=0, le=1)
    """Refuse if the selection keeps fewer images of any class than in the generation before, by more than this share. No limit if not
    given."""
    min_audited_precision: float | None = Field(default=None, gt=0, lt=1)
    """Refuse if the generation's labels were audited (`ns labels audit`), and the lower 95 % bound of the share that is right is below
    this. Labels without an audit are not refused; the verdict says so."""
    min_class_coverage: Literal["auto"] | Annotated[float, Field(gt=0, le=1)] | None = None
    """Refuse if fewer than this share of the classes are represented in the generation's selection: have pseudo-labels, and at least a
    fifth of their share of the labeled images. `auto`: 0.95, which with fewer than 20 classes is all of them. No limit if not given."""
    resamples: int = Field(default=10_000, ge=1000, le=1_000_000)
    """Number of bootstrap resamples of the held-out images."""

    @property
    def required_class_coverage(self) -> float | None:
        """The share of `min_class_coverage` as a number; None without a limit."""
        return 0.95 if self.min_class_coverage == "auto" else self.min_class_coverage

    @property
    def required_suites(self) -> dict[str, SuiteName]:
        """Conditions on robustness that are set → the suite that measures them on held-out images."""
        needs: dict[str, SuiteName] = {"max_mce_rise": "corruptions", "max_mfr_rise": "perturbations"}
        return {condition: suite for condition, suite in needs.items() if getattr(self, condition) is not None}


Corruption = Literal[
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow", "frost",
    "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
    "speckle_noise", "gaussian_blur", "spatter", "saturate",
]  # fmt: skip
EXTRA_CORRUPTIONS: tuple[Corruption, ...] = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""Published beside the 15 of the benchmark, for tuning on; they count for no mCE."""
CORRUPTIONS: tuple[Corruption, ...] = tuple(name for name in get_args(Corruption) if name not in EXTRA_CORRUPTIONS)

Perturbation = Literal[
    "gaussian_noise", "shot_noise", "motion_blur", "zoom_blur", "snow", "brightness", "translate", "rotate", "tilt", "scale"
]  # fmt: skip
PERTURBATIONS: tuple[Perturbation, ...] = get_args(Perturbation)

Severity = Annotated[int, Field(ge=1, le=5)]
Pixels = Annotated[float, Field(gt=0, le=255)]


class EvaluationSet(Section):
    """A further set of human-labeled images, on which every model is evaluated."""

    uri: Uri
    """URI of a dataset, of anything that `ns data import` takes, or of the folder of a published benchmark."""
    kind: Literal["images", "imagenet-c", "cifar10-c", "imagenet-p"] = "images"
    """Layout. `images`: plain images, for accuracy. The others are read as they were published:
    `imagenet-c` CORRUPTION/SEVERITY/CLASS/IMAGE, `cifar10-c` CORRUPTION.npy and labels.npy,
    `imagenet-p` PERTURBATION/CLASS/SEQUENCE.mp4."""
    classes: Literal["all", "own"] | tuple[str, ...] = "all"
    """Classes that the answer is chosen from: `all` of the model's; `own`, those that the set has, as ImageNet-A, -R and -O are scored;
    or a list of names. The other outputs are left out before the softmax."""
    multi_label: Uri | None = None
    """URI of a JSON or Parquet file with all the right classes of each image, as ReaL has them (arXiv:2006.07159). An answer is right
    if it is one of them; images without any are left out."""

    @model_validator(mode="after")
    def _check_kind_options(self) -> Self:
        if self.kind != "images":
            for name in ("classes", "multi_label"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name}: is for kind images only; leave it out for {self.kind}")
        return self


class EvaluationConfig(Section):
    """What models are evaluated on, and how (docs/evaluation.md). The cost is printed before the work begins."""

    suites: tuple[SuiteName, ...] = ("clean",)
    """What is measured. `clean`: accuracy, which is always measured, since the gate decides by it. `corruptions`: 15 kinds at 5
    severities (mCE). `perturbations`: 10 kinds of short sequences (mFR, mT5D). `attacks`: FGSM and PGD. Robustness is measured on
    data.test, or on data.heldout if there is no data.test."""
    sets: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")], EvaluationSet] = Field(default_factory=dict)
    """Further sets of images by name (lower-case letters, digits, dashes and underscores)."""
    images: int | None = Field(default=None, ge=1)
    """Images per set for corruptions, perturbations and attacks, for a quick look; all if not given. They are drawn evenly over the
    classes, the same ones in every run. Clean accuracy is always that of all images."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of that draw, of corruptions and of random starts. It does not depend on the experiment's seed: runs with other seeds see
    the same pixels."""
    corruptions: tuple[Corruption, ...] = Field(default=CORRUPTIONS, min_length=1)
    """Kinds of corruptions; an mCE of fewer than the 15 is not the published one."""
    extra_corruptions: bool = False
    """Measure the 4 further kinds of corruptions too, which count for no mCE."""
    severities: tuple[Severity, ...] = Field(default=(1, 2, 3, 4, 5), min_length=1)
    """Severities of the corruptions."""
    perturbations: tuple[Perturbation, ...] = Field(default=PERTURBATIONS, min_length=1)
    """Kinds of perturbation sequences."""
    perturbation_frames: int = Field(default=31, ge=2, le=101)
    """Images per perturbation sequence. Published: about 31."""
    fgsm_epsilons: tuple[Pixels, ...] = (2, 4, 8, 16)
    """Largest changes of a pixel, of 255, by one step along the gradient's sign. Paper: 2, 4, 8, 16."""
    pgd_steps: tuple[Annotated[int, Field(ge=1, le=1000)], ...] = (10, 50)
    """Numbers of steps of projected gradient descent. Paper: 10; models that withstand 10 steps may fail at 50."""
    pgd_epsilon: Pixels = 16
    """Largest change of a pixel by projected gradient descent, of 255. Paper: 16."""
    pgd_step_size: Pixels | None = None
    """Change of a pixel per step of projected gradient descent, of 255. If not given, 2.5 · pgd_epsilon / steps (arXiv:1706.06083),
    which can reach the edge and come back."""

    keep_gib: float = Field(default=8, ge=0)
    """Corrupted images of a set are kept in the store for the next model if they take at most this many GiB. It changes no result."""

    @field_validator("suites", "corruptions", "severities", "perturbations", "fgsm_epsilons", "pgd_steps")
    @classmethod
    def _check_unique(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(values)) != len(values):
            raise ValueError("must name each only once")
        return values

    @property
    def needs_robustness(self) -> bool:
        """Whether more than clean accuracy is measured."""
        return any(suite != "clean" for suite in self.suites)

    @property
    def all_corruptions(self) -> tuple[Corruption, ...]:
        """All corruptions that are measured, without duplicates."""
        extra = EXTRA_CORRUPTIONS if self.extra_corruptions else ()
        return tuple(dict.fromkeys((*self.corruptions, *extra)))


class ReportConfig(Section):
    """What the report shows."""

    pictures: int = Field(default=24, ge=0, le=200)
    """Pseudo-labeled images per group (most confident, least confident, flipped)."""


class RegistryConfig(Section):
    """Where versions of label sets are kept (docs/labels.md). It changes no result, and is no part of any digest."""

    git: str = Field(min_length=1)
    """URL or path of the label registry: a separate git repository, which may be empty. Keys and passwords come from git's credential
    helpers, never from here."""
    remote: str | None = Field(default=None, min_length=1)
    """Folder or `s3://bucket/prefix` for the data. It is needed while the registry is empty; afterwards the registry holds it."""

    @model_validator(mode="after")
    def _check_no_password(self) -> Self:
        # The value is not shown: it would stand in logs. A user alone is none: of ssh, which has keys.
        if re.search(r"://[^/]*@", self.git) and not re.match(r"(git\+)?ssh://[^/:]*@", self.git):
            raise ValueError("git: holds a password or token; take it out, and set up a git credential helper")
        return self


def _check_experiment_name(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?", name):
        raise ValueError("must be at most 40 small letters, digits and dashes, with a letter or digit at both ends: my-animals")
    return name


class Experiment(Section):
    """Everything that a run does."""

    name: Annotated[str, AfterValidator(_check_experiment_name)]
    """Name of the experiment, at most 40 lower-case letters, digits and dashes. It becomes part of names of runs, tags and pods."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of weights, order, noise, ties and the bootstrap. Equal seeds give equal runs on equal machines."""
    generations: int = Field(default=3, ge=1, le=MAX_GENERATIONS)
    """Largest number of generations; the gate may end the run earlier."""
    allow_smaller_student: bool = False
    """Allow students that are smaller than their teacher, which is distillation; the method wants them equal or larger."""
    data: DataConfig
    teacher: RoleConfig = RoleConfig()
    students: tuple[RoleConfig, ...] = Field(default=(RoleConfig(),), min_length=1)
    """Students, one per generation; the last one serves all further generations."""
    baseline: Literal["none", "labeled_only"] = "none"
    """What the students are compared with besides their teachers. `labeled_only`: a model of the first student's kind, with its noise and
    as many steps, trained on the labeled images alone. It takes part in no decision."""
    labeling: LabelingConfig = LabelingConfig()
    selection: SelectionConfig = SelectionConfig()
    gate: GateConfig = GateConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    report: ReportConfig = ReportConfig()
    registry: RegistryConfig | None = None
    """Label registry, which keeps a version of each generation's label set; none if not given."""

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

    @model_validator(mode="after")
    def _check_label_set_usable(self) -> Self:
        if self.labeling.label_set:
            for field, is_set in (
                ("selection.precision", self.selection.precision is not None),
                ("labeling.foreign_score", self.labeling.foreign_score != "none"),
            ):
                if is_set:
                    raise ValueError(
                        f"labeling.label_set: {field} goes by what the teacher says, and these labels are not its; leave one out"
                    )
        return self

    @model_validator(mode="after")
    def _check_no_passwords(self) -> Self:
        uris = {**self.map_uris(), "registry.remote": (self.registry and self.registry.remote) or ""}
        for field, uri in uris.items():
            # The value is not shown: it would stand in logs.
            if holds_credentials(uri):
                raise ValueError(f"{field}: holds a user or a password; take it out: credentials come from the environment")
        return self

    @property
    def needs_calibration(self) -> bool:
        """Whether something is fitted on human-labeled images that decide no promotion."""
        return (
            self.selection.precision is not None
            or self.labeling.temperature == "fitted"
            or self.labeling.foreign_score != "none"
        )

    @property
    def gate_evaluation(self) -> EvaluationConfig:
        """What is measured on held-out images for the gate: only the suites that its conditions need."""
        return self.evaluation.model_copy(update={"suites": tuple(self.gate.required_suites.values())})

    def map_roles(self) -> dict[str, RoleConfig]:
        """The first teacher and all students, by field (`students.0`)."""
        return {"teacher": self.teacher} | {f"students.{index}": role for index, role in enumerate(self.students)}

    def map_uris(self) -> dict[str, str]:
        """URIs that a run reads, by field; without `digits:`, which come with the code."""
        data, evaluation = self.data, self.evaluation
        uris = {
            f"data.{part}": getattr(data, part) for part in ("labeled", "pool", "heldout", "calibration", "test", "exclude")
        }
        uris |= {f"labeling.ensemble.{index}": uri for index, uri in enumerate(self.labeling.ensemble)}
        uris["labeling.label_set"] = self.labeling.label_set
        for name, evaluation_set in evaluation.sets.items():
            uris |= {
                f"evaluation.sets.{name}.uri": evaluation_set.uri,
                f"evaluation.sets.{name}.multi_label": evaluation_set.multi_label,
            }
        uris |= {f"{field}.model.pretrained": role.model.pretrained_uri for field, role in self.map_roles().items()}
        return {field: uri for field, uri in uris.items() if uri and not uri.startswith("digits:")}

    def get_student(self, generation: int) -> RoleConfig:
        """The student of a generation, counted from 1."""
        return self.students[min(generation, len(self.students)) - 1]


def _merge_sections(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given`, completed section by section. Arguments of a network are taken as a whole: another network has other arguments."""
    merged = {**defaults, **given}
    for name, value in defaults.items():
        if isinstance(value, dict) and name != "args" and name in given:
            section = given[name].model_dump(exclude_unset=True) if isinstance(given[name], Section) else given[name]
            merged[name] = _merge_sections(value, section) if isinstance(section, dict) else section
    return merged
