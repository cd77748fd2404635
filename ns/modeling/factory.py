"""Networks from timm, and their weights as safetensors. No pickle is ever read."""

import difflib
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ns.config.schema import Experiment, ModelConfig, NoiseConfig, RoleConfig
from ns.core import log
from ns.core.digest import sha256_bytes, sha256_file
from ns.core.errors import ConfigError, DataError, prefix_errors
from ns.modeling.manifest import ModelManifest, split_weights_uri
from ns.modeling.network_noise import check_confined_noise, find_missing_noise
from ns.modeling.pretrained import describe_weights, find_fetched, locate_weights
from ns.modeling.tensor_shapes import read_tensor_shapes
from ns.modeling.weight_names import check_weights_fit
from ns.storage import Store, open_store
from ns.storage.documents import encode_json


def build_model(config: ModelConfig, noise: NoiseConfig, outputs: int) -> nn.Module:
    """A network with random weights in channels_last. Raises ConfigError if timm cannot build it.

    It draws from torch's global generator: seed that first for a repeatable network.
    """
    import timm

    try:
        network = _create_network(config, noise, outputs)
    except ConfigError:
        raise
    # Networks of timm raise what they like about arguments that they cannot use.
    except Exception as error:
        hint, given = "", f" with args {config.args}" if config.args else ""
        if not timm.is_model(config.arch):
            similar = difflib.get_close_matches(config.arch, timm.list_models(), n=3)
            hint = f"; did you mean {' or '.join(similar)}?" if similar else "; see timm.list_models()"
        raise ConfigError(f"model.arch: invalid value {config.arch!r}{given}: {error}{hint}") from error
    _reduce_stride(network, config.reduce_stride)
    return network.to(memory_format=torch.channels_last)


class _ShapesOnly(TorchFunctionMode):
    """While it is entered, weights are not drawn and batch norms do nothing. On the meta device, where no value is, this takes most of
    the time to build a network and half of a pass through it."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.batch_norm or function.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def build_on_meta(config: ModelConfig, noise: NoiseConfig, outputs: int) -> nn.Module:
    """What `build_model` builds, on the meta device: shapes without values, to be counted and checked."""
    with torch.device("meta"), _ShapesOnly():
        return build_model(config, noise, outputs)


NOISE_ARGUMENTS = {"drop_rate": "dropout", "drop_path_rate": "stochastic_depth"}
"""timm's argument → field of the noise."""


def _create_network(config: ModelConfig, noise: NoiseConfig, outputs: int) -> nn.Module:
    """A network of timm. Arguments that its family does not know are left out: rates of noise that are 0, and image sizes.

    Raises ConfigError for noise that the family cannot have, and what timm raises.
    """
    import timm

    rates: dict[str, float] = {argument: getattr(noise, field) for argument, field in NOISE_ARGUMENTS.items()}
    sizes = _choose_size_arguments(config)
    while True:
        try:
            network: nn.Module = timm.create_model(
                config.arch, pretrained=False, num_classes=config.outputs or outputs, **rates, **sizes, **config.args
            )
            return network
        except TypeError as error:
            arguments = (*rates, *sizes)
            unknown = next((name for name in arguments if "keyword argument" in str(error) and f"'{name}'" in str(error)), None)
            if unknown is None:
                raise
            if unknown in sizes:
                del sizes[unknown]
                continue
            field = NOISE_ARGUMENTS[unknown]
            if rate := rates.pop(unknown):
                raise ConfigError(
                    f"noise.{field}: invalid value {rate:g}: {config.arch} has no {field.replace('_', ' ')}; set it to 0"
                ) from error


def _choose_size_arguments(config: ModelConfig) -> dict[str, Any]:
    """timm's arguments for the resolutions of a network that is built for one size of image, unless `args` has them.

    It is built for the size of the test, so that nothing is resampled where it is used; a training at another size resamples position
    embeddings, or the windows of attention, on the way.
    """
    from timm.models import get_pretrained_cfg

    settings = get_pretrained_cfg(config.arch)
    if settings is None or not settings.fixed_input_size or "img_size" in config.args:
        return {}
    arguments: dict[str, Any] = {}
    if config.inference_resolution != settings.input_size[-1]:
        arguments["img_size"] = config.inference_resolution
    if config.resolution != config.inference_resolution:
        arguments |= {"dynamic_img_size": True, "strict_img_size": False}
    return {name: value for name, value in arguments.items() if name not in config.args}


def get_total_stride(network: nn.Module) -> int:
    """Input px per px of the last feature map; 1 if the network has no feature info."""
    features: Any = getattr(network, "feature_info", None)
    return int(features[-1]["reduction"]) if features else 1


def describe_architecture(config: ModelConfig) -> dict[str, Any]:
    """The settings that decide how fast a network is at a given resolution and batch, as JSON."""
    return config.model_dump(mode="json", include={"arch", "args", "reduce_stride", "outputs"})


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def count_multiply_adds(network: nn.Module, resolution: int) -> int:
    """Multiply-adds of a forward pass over one image. `network` is on the meta device, so nothing is computed.

    0 for a network that cannot run there. Raises ConfigError if it does not take images of that size.
    """
    # The counter fails at parameters that are inputs of a module, such as class tokens, if they await gradients.
    network.eval().requires_grad_(False)
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad(), _ShapesOnly():
            network(torch.zeros(1, 3, resolution, resolution, device="meta"))
    except Exception as error:  # as above
        if "meta" in str(error):
            return 0
        raise ConfigError(f"the network does not take images of {resolution} px: {error}") from error
    return int(counter.get_total_flops()) // 2


_counts: dict[str, int] = {}


def count_model_multiply_adds(network: nn.Module, model: ModelConfig, outputs: int, resolution: int) -> int:
    """`count_multiply_adds` of what `build_model` made of these settings, counted once per process: it takes 0.1 s and more, and
    teachers and students often share a network."""
    key = f"{describe_architecture(model), outputs, resolution}"
    if key not in _counts:
        _counts[key] = count_multiply_adds(network, resolution)
    return _counts[key]


class ModelSize(NamedTuple):
    """How large a network is."""

    parameters: int
    multiply_adds: int
    """Multiply-adds for one image at the resolution of labeling and evaluation."""


def check_models(
    experiment: Experiment, classes: int | None = None, root: Store | None = None, *, fetch: bool = False
) -> list[str]:
    """Checks the networks of an experiment without building weights. Returns remarks, a line each: what a person should know of weights
    that fit in part, or of noise that a network does not have.

    `root`: where fetched weights are; with `fetch`, those that are missing are fetched there. Raises ConfigError naming the field, the
    value and what would be right: for networks that timm cannot build, resolutions below their stride, students smaller than their
    teacher (in parameters or in multiply-adds), more label classes than outputs, and weights that fit no layer.
    """
    remarks: list[str] = []
    sizes = {field: _check_role(field, role, classes, remarks) for field, role in experiment.map_roles().items()}
    for field, role in experiment.map_roles().items():
        remarks += _check_pretrained(field, role, classes, root, fetch=fetch)
    chain = ["teacher"]
    chain += [f"students.{min(g, len(experiment.students)) - 1}" for g in range(1, experiment.generations + 1)]
    if not experiment.allow_smaller_student:
        for teacher, student in pairwise(chain):
            for unit, size, teacher_size in zip(ModelSize._fields, sizes[student], sizes[teacher], strict=True):
                if size and size < teacher_size:
                    raise ConfigError(
                        f"{student}.model: {size:,} {unit.replace('_', '-')}, its teacher ({teacher}.model) has {teacher_size:,}: "
                        "must be equal or larger; for distillation into a smaller network set allow_smaller_student: true"
                    )
    return remarks


def _check_pretrained(field: str, role: RoleConfig, classes: int | None, root: Store | None, *, fetch: bool) -> list[str]:
    """Remarks on how the weights that a role starts from fit its network."""
    model = role.model
    if model.pretrained is None:
        return []
    if model.pretrained_uri:
        parent, key = split_weights_uri(model.pretrained_uri)
        if not open_store(parent).exists(key or ModelManifest.filename):
            raise ConfigError(
                f"{field}.model.pretrained: invalid value {model.pretrained!r}: there is no such "
                f"{'file' if key else f'model (a folder with {ModelManifest.filename})'}"
            )
    with prefix_errors(f"{field}.model.pretrained"):
        weights = describe_weights(model.pretrained, root)
        arch = weights.settings.get("arch", model.arch)
        if arch != model.arch:
            raise ConfigError(f"{model.pretrained}: these weights are of {arch}; model.arch must be that, not {model.arch}")
        if not model.pretrained_uri and not (root and (fetch or find_fetched(model.pretrained, root))):
            return [
                f"{field}.model.pretrained: {model.pretrained}: is fetched by `ns models fetch`, or by the first stage that needs it"
            ]
    if role.train.init == "teacher":
        return []
    network = build_on_meta(model, role.noise, classes or 2)
    assert root or model.pretrained_uri
    with prefix_errors(f"{field}.model.pretrained"):
        uri = model.pretrained_uri or (root and locate_weights(model.pretrained, root)) or ""
        shapes = read_tensor_shapes(uri)
    try:
        fit = check_weights_fit(network, uri, shapes)
    except ConfigError as error:
        raise ConfigError(f"{field}.{error}") from error
    remark = fit.describe()
    return [f"{field}.model.pretrained: {model.pretrained}: {remark}"] if remark else []


def _check_role(field: str, role: RoleConfig, classes: int | None, remarks: list[str]) -> ModelSize:
    model, outputs = role.model, classes or 2
    name, _, tag = model.arch.partition(".")
    if tag:
        raise ConfigError(
            f"{field}.model.arch: invalid value {model.arch!r}: .{tag} names trained weights; give {name}, and the weights in "
            f"model.pretrained: {model.arch}"
        )
    if classes and model.outputs and model.outputs < classes:
        raise ConfigError(
            f"{field}.model.outputs: invalid value {model.outputs}: the labeled data has {classes} classes; "
            f"must be at least {classes}, or be left out"
        )
    key = _describe_check(field, role, outputs)
    if key in _checked:
        size, network_remarks = _checked[key]
        remarks += [f"{field}.{remark}" for remark in network_remarks]
        return size
    try:
        network = build_on_meta(model, role.noise, outputs)
    except ConfigError as error:
        raise ConfigError(f"{field}.{error}") from error
    network_remarks = find_missing_noise(network, role.noise)
    remarks += [f"{field}.{remark}" for remark in network_remarks]
    stride = max(1, get_total_stride(network) // model.reduce_stride)
    for name, resolution in (("resolution", model.resolution), ("test_resolution", model.inference_resolution)):
        if resolution < stride:
            raise ConfigError(
                f"{field}.model.{name}: invalid value {resolution}: below the total stride of {model.arch}, {stride} px; "
                f"must be at least {stride}, or set reduce_stride"
            )
    if role.noise.pool == "none" and field != "teacher":
        try:
            check_confined_noise(network, model.resolution)
        except ConfigError as error:
            raise ConfigError(f"{field}.{error}") from error
    networks = [(network, model.resolution), (network, model.inference_resolution)]
    try:
        if finetune := role.train.finetune:
            tuned = model.model_copy(update={"resolution": finetune.resolution, "test_resolution": None})
            networks.insert(1, (build_on_meta(tuned, role.noise, outputs), finetune.resolution))
        counts = [count_model_multiply_adds(network, model, outputs, resolution) for network, resolution in networks]
        size = ModelSize(count_parameters(network), counts[-1])
    except ConfigError as error:
        raise ConfigError(f"{field}.model: {error}") from error
    _checked[key] = size, network_remarks
    return size


_checked: dict[str, tuple[ModelSize, list[str]]] = {}
"""Size and remarks of networks that were found right in the life of this process: building one takes up to half a second, and roles
often share one."""


def _describe_check(field: str, role: RoleConfig, outputs: int) -> str:
    """What the result of `_check_role` depends on."""
    finetune = role.train.finetune and role.train.finetune.resolution
    model = role.model.model_dump_json(exclude={"pretrained"})
    return f"{model, role.noise.model_dump_json(), finetune, outputs, field == 'teacher'}"


def save_model(
    store: Store, state: dict[str, Tensor], manifest_fields: dict[str, Any], history: list[dict[str, float]]
) -> ModelManifest:
    """Writes weights, history, and last the manifest, which makes the folder a model. Returns the manifest that is there.

    The first model that is whole stays: another attempt, on another machine, has other weights, and this one's may be in use.
    """
    weights = save_tensors({name: tensor.contiguous() for name, tensor in state.items()})
    manifest = ModelManifest(weights_sha256=sha256_bytes(weights), **manifest_fields)
    store.put(manifest.weights_key, weights)
    store.put(manifest.history_key, encode_json(history))
    if store.exists(ModelManifest.filename) and find_model(store) is None:
        manifest.save(store)
    kept = manifest.commit(store)
    # No other manifest can come now: what it would name is left over.
    for key in [*store.list("model-"), *store.list("history-")]:
        if key not in (kept.weights_key, kept.history_key):
            store.delete(key)
    return kept


def find_model(store: Store) -> ModelManifest | None:
    """The manifest of a model whose weights are whole. None if there is none; then a warning names weights that were damaged."""
    manifest = ModelManifest.find_file(store, ModelManifest.filename)
    if manifest is None:
        return None
    key = manifest.weights_key
    if store.exists(key) and sha256_file(store.path(key)) == manifest.weights_sha256:
        return manifest
    log.get_logger().warning("damaged, and made again", file=f"{store.uri}/{key}")
    return None


def load_weights(store: Store, manifest: ModelManifest) -> dict[str, Tensor]:
    """The averaged weights, on the CPU. Raises DataError if their bytes do not match the manifest."""
    data = store.get(manifest.weights_key)
    if sha256_bytes(data) != manifest.weights_sha256:
        raise DataError(
            f"{store.uri}/{manifest.weights_key}: sha256 differs from {ModelManifest.filename}; the file is damaged or was replaced"
        )
    try:
        return load_tensors(data)
    except SafetensorError as error:
        raise DataError(f"{store.uri}/{manifest.weights_key}: not a safetensors file: {error}") from error


def load_model(store: Store) -> tuple[nn.Module, ModelManifest]:
    """A model for inference: averaged weights, evaluation mode, no noise."""
    manifest = ModelManifest.load(store)
    network = build_model(manifest.model, manifest.noise, len(manifest.classes))
    load_tensors_into(network, load_weights(store, manifest), f"{store.uri}/{manifest.weights_key}")
    return network.eval(), manifest


def load_tensors_into(network: nn.Module, tensors: dict[str, Tensor], uri: str) -> None:
    """Raises DataError, naming the first tensor that is missing, unknown, or of another shape or kind, unless all fit the network."""
    own_tensors = network.state_dict()
    for name in sorted(own_tensors.keys() | tensors.keys()):
        expected, given = own_tensors.get(name), tensors.get(name)
        if expected is None or given is None:
            problem = f"has no {name}" if given is None else f"{name}: is no tensor of {type(network).__name__}"
        elif expected.shape != given.shape:
            problem = f"{name}: has the shape {list(given.shape)}, must be {list(expected.shape)}"
        elif expected.is_floating_point() != given.is_floating_point():
            problem = f"{name}: is of the type {given.dtype}, must be {expected.dtype}"
        else:
            continue
        raise DataError(
            f"{uri}: {problem}: the weights are not those of the network in {ModelManifest.filename}; put both there again"
        )
    network.load_state_dict(tensors)


def get_best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Normalize(nn.Module):
    """uint8 images [N, H, W, 3] → float32 [N, 3, H, W] in channels_last, with zero mean and unit variance, on the images' device.

    W must be a multiple of `width`, px. If both are the same, torch.compile makes one fast loop of this and what follows.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float], width: int = 1) -> None:
        super().__init__()
        # The division by 255 is folded into both.
        self.register_buffer("mean", (torch.tensor(mean) * 255).repeat(width))
        self.register_buffer("std", (torch.tensor(std) * 255).repeat(width))

    def forward(self, images: Tensor) -> Tensor:
        count, height, width, channels = images.shape
        # Rows of pixels fill a processor's vectors; computing on three channels at a time takes four times as long.
        rows = images.reshape(count, height, width * channels).to(torch.float32, copy=True)
        # In place: another array of this size takes half as long again.
        repeats = width * channels // len(self.mean)
        rows = rows.sub_(self.mean.repeat(repeats)).div_(self.std.repeat(repeats))
        # A permuted view of NHWC is channels_last already: no copy here, and none in the network.
        return rows.view(count, height, width, channels).permute(0, 3, 1, 2)


def _reduce_stride(network: nn.Module, factor: int) -> None:
    """Makes the first stages after the stem dense until the total stride is divided by `factor` (2, 4, 8).

    The stem keeps its stride, as in the paper's reference code for 32 px, at a quarter of the cost of a dense stem.
    """
    if factor == 1:
        return
    remaining = factor
    for stage in _iter_halving_stages(network):
        if remaining == 1:
            return
        if not stage or any(isinstance(module, nn.Conv2d) and module.kernel_size == (2, 2) for module in stage):
            raise ConfigError(
                f"model.reduce_stride: invalid value {factor}: {type(network).__name__} does not halve its map by strided convolutions "
                "that can be made dense; set it to 1, and raise model.resolution"
            )
        for module in stage:
            module.stride = (1, 1)
            if isinstance(module, nn.AvgPool2d):
                module.kernel_size = (1, 1)  # it only halves a shortcut; with two px it would now lose a row
        remaining //= 2
    if remaining != 1:
        raise ConfigError(
            f"model.reduce_stride: invalid value {factor}: the network has too few stages of stride 2 after its stem"
        )


def _iter_halving_stages(network: nn.Module) -> Iterator[list[Any]]:
    """For each stage after the stem that halves the map, from the input on: its convolutions and poolings of stride 2, for instance
    those of a residual block and of its shortcut."""
    features = getattr(network, "feature_info", None) or []
    modules = list(network.named_modules())
    # Stages that are no modules of their own, as in HRNet, end before the first one.
    ends = [
        max((i for i, (name, _) in enumerate(modules) if f"{name}.".startswith(f"{f['module']}.")), default=-1)
        for f in features
    ]
    for index in range(1, len(features)):
        if min(ends) >= 0 and features[index]["reduction"] == 2 * features[index - 1]["reduction"]:
            stage = (module for _, module in modules[ends[index - 1] + 1 : ends[index] + 1])
            yield [
                module
                for module in stage
                if isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) and module.stride in (2, (2, 2))
            ]
