"""Weights of timm are worth here what they are worth in timm: the same images give the same logits, wherever a model is used.

The oracle is timm's own transform (Pillow's resize) and network. Ours resizes with torch's filter, which rounds at other places: at most
one in a hundred values differs from Pillow's, by 1 or 2 of 255. What of it reaches the logits is `RESIZED`. Images that need no resizing
have equal pixels, and logits that are equal to the last digits of float32 sums, `EXACT`; so has an export, whose preprocess.py resizes with
Pillow.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from timm.data import create_transform, resolve_data_config

from ns.config.loader import parse_experiment
from ns.config.schema import FinetuneConfig, ImportConfig, LabelingConfig, RoleConfig
from ns.data.dataset import Dataset
from ns.data.importing.ingest import import_images
from ns.data.loading.stream import LabeledImages
from ns.evaluation.accuracy import evaluate_accuracy
from ns.export import export_model
from ns.export.forms import FORMS
from ns.labeling.label_set import find_label_shard, read_label_rows
from ns.labeling.predict import label_pool_shards
from ns.modeling.factory import build_model, load_tensors_into, save_model
from ns.modeling.file_predictions import predict_files
from ns.modeling.manifest import Lineage
from ns.modeling.predictor import Predictor
from ns.modeling.pretrained import complete_models
from ns.storage import LocalStore
from ns.training.loop import train_model
from ns.training.plan import plan_finetuning

pytestmark = pytest.mark.integration

CLASSES = ("ant", "bee", "cow", "dog", "emu")
SPREAD = 2.0
"""Standard deviation that logits are brought to, so that confidences differ."""
EXACT = 1e-4
RESIZED = 0.08
"""Largest differences of logits, as shares of their standard deviation over the images. Seen: 3e-5, and 0.02; 0.05 in EfficientNet-Lite,
whose random weights hardly tell these images apart before their logits are brought to `SPREAD`."""


class Family(NamedTuple):
    """A family of networks: weights of timm, with arguments that make the network small."""

    pretrained: str
    args: dict[str, Any] = {}  # noqa: RUF012


SMALL_VIT = {"embed_dim": 48, "depth": 2, "num_heads": 3}
FAMILIES = {
    "efficientnet": Family("efficientnet_lite0.ra_in1k"),
    "efficientnetv2": Family("tf_efficientnetv2_b0.in1k"),
    "resnet": Family("resnet18.tv_in1k", {"channels": [16, 16, 32, 32]}),
    "convnext": Family("convnext_atto.d2_in1k"),
    "vit": Family("vit_tiny_patch16_224.augreg_in21k_ft_in1k", SMALL_VIT),
    "deit3": Family("deit3_small_patch16_224.fb_in22k_ft_in1k", SMALL_VIT),
    "swin": Family(
        "swin_tiny_patch4_window7_224.ms_in1k", {"embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]}
    ),
    "mobilenetv4": Family("mobilenetv4_conv_small.e2400_r224_in1k"),
    "mobilenetv3": Family("mobilenetv3_small_050.lamb_in1k"),
    "regnet": Family("regnetx_002.pycls_in1k"),
    "beit": Family("beit_base_patch16_224.in22k_ft_in22k_in1k", SMALL_VIT),
    "siglip": Family("vit_base_patch16_siglip_224.v2_webli", SMALL_VIT),
    "clip": Family("vit_base_patch32_clip_224.openai_ft_in1k", SMALL_VIT),
    "clip-squash": Family(
        "convnext_base.clip_laion2b_augreg_ft_in12k_in1k_384", {"dims": [16, 24, 32, 48], "depths": [1, 1, 2, 1]}
    ),
}


@dataclass
class Setup:
    """A model of ours with the weights of a network of timm, images, and what timm says of them."""

    store: LocalStore
    data: tuple[LocalStore, Dataset]
    files: list[Any]
    logits: dict[str, np.ndarray]
    """Name of the image → timm's logits, float32 [classes]."""
    features: dict[str, np.ndarray]
    """Name of the image → what timm's classifier is given, float32 [D]."""
    role: RoleConfig
    weights: dict[str, torch.Tensor]
    exact: set[str]
    pixels: dict[str, np.ndarray] = field(default_factory=dict)
    """Name of the image → pixels of timm's transform, uint8 [R, R, 3]."""


def draw_photograph(seed: int, size: tuple[int, int]) -> Image.Image:
    """Edges, gradients and noise at several scales. `size`: (width, height)."""
    rng, layers = np.random.default_rng(seed), np.zeros((size[1], size[0], 3))
    for cells in (3, 12, 48, 192):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        layers += np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)) / 4
    return Image.fromarray(layers.astype(np.uint8)).filter(ImageFilter.SHARPEN)


def set_up(tmp_path, family: Family) -> Setup:
    experiment = parse_experiment(
        {
            "name": "x",
            "data": {"labeled": "a", "pool": "b", "heldout": "c"},
            "teacher": {"model": {"pretrained": family.pretrained, "args": family.args, "inference_precision": "float32"}},
        },
        "x.yaml",
    )
    role = complete_models(experiment, None).teacher
    # timm's network, with random weights of which all count.
    torch.manual_seed(0)
    network = timm.create_model(role.model.arch, num_classes=len(CLASSES), **role.model.args, **img_size(role.model)).eval()
    config = timm.models.get_pretrained_cfg(family.pretrained).to_dict()
    transform = create_transform(**resolve_data_config(pretrained_cfg=config, use_test_size=True), is_training=False)
    scaled = role.model.inference_resolution + role.model.test_margin_px
    sizes = [(320, 240), (240, 320), (640, 480), (180, 181), (scaled, scaled), (scaled + 36, scaled), (scaled, scaled + 17)]
    exact = set()
    for number, size in enumerate(sizes):
        path = tmp_path / "images" / CLASSES[number % len(CLASSES)] / f"{number}.{'jpg' if number in (0, 2) else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_photograph(number, size).save(path, quality=95)
        if number >= 4 and (role.model.test_crop == "center" or size == (scaled, scaled)):
            exact.add(path.stem)
    files = sorted((tmp_path / "images").rglob("*.*"))
    with torch.no_grad():
        batch = torch.stack([transform(Image.open(path).convert("RGB")) for path in files])
        for parameter in network.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.02 * torch.randn_like(parameter))
        spread = network(batch).std(0).mean()
        head = network.get_classifier()
        head.weight.mul_(SPREAD / spread)
        logits = network(batch)
        features = network.forward_head(network.forward_features(batch), pre_logits=True)
        weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    mean, std = (np.array(config[name]) for name in ("mean", "std"))
    pixels = [np.rint((image.permute(1, 2, 0).numpy() * std + mean) * 255).astype(np.uint8) for image in batch]
    ours = build_model(role.model, role.noise, len(CLASSES))
    load_tensors_into(ours, weights, family.pretrained)
    store = LocalStore(tmp_path / "model")
    fields = {
        "generation": 0,
        "model": role.model.model_copy(update={"pretrained": None}),
        "noise": role.noise,
        "classes": CLASSES,
    }
    fields |= {"mean": role.model.mean, "std": role.model.std, "parameters": 1, "steps": 1}
    save_model(store, weights, {**fields, "lineage": Lineage(config="0", labeled="0")}, [])
    data_store = LocalStore(tmp_path / "data")
    import_images(str(tmp_path / "images"), data_store, name="data", role="evaluation", config=ImportConfig(), workers=1)
    return Setup(
        store,
        (data_store, Dataset.load(data_store)),
        files,
        {path.stem: row.numpy() for path, row in zip(files, logits, strict=True)},
        {path.stem: row.numpy() for path, row in zip(files, features, strict=True)},
        role,
        weights,
        exact,
        {path.stem: image for path, image in zip(files, pixels, strict=True)},
    )


def img_size(model) -> dict[str, int]:
    settings = timm.models.get_pretrained_cfg(model.arch)
    return {"img_size": model.inference_resolution} if settings.fixed_input_size else {}


def assert_logits(setup: Setup, logits: dict[str, np.ndarray]) -> None:
    assert logits.keys() == setup.logits.keys()
    spread = np.std(list(setup.logits.values()), 0).mean()
    for name, row in logits.items():
        assert np.abs(row - setup.logits[name]).max() <= spread * (EXACT if name in setup.exact else RESIZED), name


def assert_confidences(setup: Setup, keys: Sequence[str], confidences: Sequence[float], class_ids: Sequence[int]) -> None:
    """The largest probability changes by less than the logits may change by, and the class if two are as close."""
    assert {key.rpartition("/")[2] for key in keys} == setup.logits.keys()
    spread = np.std(list(setup.logits.values()), 0).mean()
    for key, confidence, class_id in zip(keys, confidences, class_ids, strict=True):
        name = key.rpartition("/")[2]
        exponentials = np.exp(setup.logits[name] - setup.logits[name].max())
        probabilities = exponentials / exponentials.sum()
        assert abs(confidence - probabilities.max()) <= spread * (EXACT if name in setup.exact else RESIZED), name
        assert probabilities[class_id] >= probabilities.max() - 2 * RESIZED * spread, name


EVERY_PUSH = ("resnet", "vit", "clip-squash")
"""Families that every push tries: both filters, and images that are cropped or squashed."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in EVERY_PUSH else pytest.mark.long) for name in FAMILIES]
)
def test_images_are_seen_as_timm_sees_them(tmp_path, name):
    setup = set_up(tmp_path, FAMILIES[name])
    predictor = Predictor(setup.store, batch=3)

    # Attacks, and their clean accuracy, begin with these pixels and logits.
    encoded = [path.read_bytes() for path in setup.files]
    pixels = predictor.decode_pixels(encoded)
    logits = predictor.compute_logits(pixels).detach().numpy()
    for path, image in zip(setup.files, pixels.numpy(), strict=True):
        difference = np.abs(image.astype(int) - setup.pixels[path.stem])
        assert difference.max() <= (0 if path.stem in setup.exact else 2), path.stem
        assert (difference > 0).mean() <= 0.01, path.stem
    assert_logits(setup, {path.stem: row for path, row in zip(setup.files, logits, strict=True)})
    spread = np.std(list(setup.logits.values()), 0).mean()
    # The pixels of another preprocessing give other logits: the comparison can fail.
    other = np.abs(predictor.compute_logits(255 - pixels).detach().numpy() - logits).max()
    assert other > 5 * RESIZED * spread

    # What similar images are found by, and foreign ones.
    features = predictor.extract_features(encoded)
    feature_spread = np.std(list(setup.features.values()), 0).mean()
    for path, row in zip(setup.files, features, strict=True):
        tolerance = feature_spread * (EXACT if path.stem in setup.exact else RESIZED)
        assert np.abs(row - setup.features[path.stem]).mean() <= tolerance, path.stem

    # Training that sees images as evaluation does, as fine-tuning at the end of a training; noise has tests of its own.
    finetune = FinetuneConfig(
        resolution=setup.role.model.inference_resolution, epochs=1, labeled_batch=len(encoded), lr=1e-9, frozen_share=0
    )
    plan = plan_finetuning(setup.role, finetune, len(encoded))
    network = build_model(plan.role.model, plan.role.noise, len(CLASSES))
    network.load_state_dict(setup.weights)
    # The statistics of seven images would make large differences of small ones.
    network.eval().train = lambda *_: network
    checkpoints = LocalStore(tmp_path / "checkpoints")
    trained = train_model(
        network, plan, LabeledImages(*setup.data), None, classes=len(CLASSES), seed=0, checkpoints=checkpoints
    )
    timm_logits = torch.tensor(np.stack([setup.logits[path.stem] for path in setup.files]))
    class_ids = torch.tensor([CLASSES.index(path.parent.name) for path in setup.files])
    loss = F.cross_entropy(timm_logits, class_ids, label_smoothing=setup.role.train.label_smoothing)
    assert trained.history[0]["loss"] == pytest.approx(float(loss), abs=float(spread) * RESIZED / 4)

    # Labeling.
    labels = LocalStore(tmp_path / "labels")
    label_pool_shards([predictor], *setup.data, labels, range(1), LabelingConfig())
    rows = read_label_rows(labels, find_label_shard(labels, setup.data[1].shards[0]))
    assert_confidences(setup, rows.keys, rows.confidence.tolist(), rows.top_class[:, 0].tolist())

    # Evaluation.
    evaluations = LocalStore(tmp_path / "evaluations")
    evaluation = evaluate_accuracy(predictor, *setup.data, evaluations)
    table = pq.read_table(evaluations.path(evaluation.predictions_key))
    assert_confidences(setup, *(table[column].to_pylist() for column in ("key", "confidence", "predicted_class_id")))

    # ns predict.
    predictions = list(predict_files(setup.store, setup.files, 1))
    best = [prediction.classes[0] for prediction in predictions]
    names, class_ids = [prediction.path.stem for prediction in predictions], [CLASSES.index(name) for name, _ in best]
    assert_confidences(setup, names, [confidence for _, confidence in best], class_ids)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "vit" else pytest.mark.long) for name in FAMILIES])
def test_exports_see_images_as_timm_sees_them(tmp_path, name):
    setup = set_up(tmp_path, FAMILIES[name])
    export_model(setup.store, tmp_path / "out", ["onnx", "timm", "torch"], setup.data)
    spec = importlib.util.spec_from_file_location("preprocess", tmp_path / "out" / "preprocess.py")
    preprocess = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(preprocess)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    pixels = np.stack([preprocess.load_pixels(path) for path in setup.files])
    # Pillow here and there.
    assert all(np.array_equal(image, setup.pixels[path.stem]) for path, image in zip(setup.files, pixels, strict=True))
    (logits,) = session.run(["logits"], {"images": pixels})
    setup.exact |= {path.stem for path in setup.files}
    assert_logits(setup, {path.stem: row for path, row in zip(setup.files, logits, strict=True)})
    with torch.inference_mode():
        logits = FORMS["torch"].read(tmp_path / "out" / "model.pt2")(torch.from_numpy(pixels))
    assert_logits(setup, {path.stem: row.numpy() for path, row in zip(setup.files, logits, strict=True)})
    exported = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    transform = create_transform(**resolve_data_config(pretrained_cfg=exported.pretrained_cfg), is_training=False)
    with torch.inference_mode():
        batch = torch.stack([transform(Image.open(path).convert("RGB")) for path in setup.files])
        assert_logits(setup, {path.stem: row.numpy() for path, row in zip(setup.files, exported(batch), strict=True)})
