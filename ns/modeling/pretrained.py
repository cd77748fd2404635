"""Weights that training starts from: what is known of them, and how those of a hub come into the root, once for all.

store/pretrained/ID/pretrained.json      where they are from, their license, network and settings; written last
store/pretrained/ID/model-SHA.safetensors

Stages read hub weights from the root alone, so that pods need no way out, and all start from the same bytes.
"""

import difflib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field, ValidationError

from ns.config.error_messages import format_validation_error
from ns.config.schema import HUB, Experiment, ModelConfig, RoleConfig, is_weights_uri
from ns.core import log
from ns.core.digest import digest_json, sha256_bytes, sha256_file, shorten_digest
from ns.core.errors import ConfigError, DataError, StoreError, prefix_errors
from ns.modeling.manifest import WEIGHTS, ModelManifest, digest_weights, split_weights_uri
from ns.modeling.tensor_shapes import read_tensor_shapes
from ns.storage import Store, open_store
from ns.storage.documents import FileName, HashedDocument, Sha256, name_by_content, parse_json_object
from ns.storage.lease import hold_lease

TIMM_CONFIG = "config.json"
"""timm's description of weights, beside them: architecture, `model_args`, `pretrained_cfg`."""
HUB_FILES = (WEIGHTS, "open_clip_model.safetensors")
"""Files of weights at a hub, the first that is there; never a pickle."""
FOLDER = "store/pretrained"
DEFAULT_CROP_SHARE = 0.875
"""As in timm."""
MIN_CROP_SHARE, MAX_CROP_SHARE = 0.1, 2.0
MAX_SIDE_PX = 1 << 16
MAX_LICENSES = 10
MAX_CARD_BYTES = 1 << 20
COMPLETED = {"arch", "args", "resolution", "test_resolution", "mean", "std", "interpolation", "test_crop", "test_margin_px"}
"""Fields of `model` that an experiment may leave to its weights. One that was completed before leaves none."""


class WeightsDescription(NamedTuple):
    """What is known of weights beside their tensors."""

    settings: dict[str, Any]
    """Fields of `model` that follow from them; empty for a bare file."""
    classes: tuple[str, ...] | None = None
    """Names of the outputs in their order, if they are known."""
    crop_share: float | None = None
    """timm's `crop_pct`: the share of a resized image that the test sees; None if `test_margin_px` is in the settings, or unknown."""
    test_crop_share: float | None = None
    """The same at the weights' own `test_resolution`."""


class PretrainedManifest(HashedDocument):
    """`pretrained.json`: weights of a hub that were fetched into a root."""

    filename: ClassVar[str] = "pretrained.json"

    format: Literal[1] = 1
    name: str
    """As `model.pretrained` has it."""
    repository: str
    revision: str
    """The commit that was fetched."""
    file: FileName
    """Name of the file of weights in the repository."""
    license: str | None
    """As the repository, or timm, states it; None if neither does."""
    config: dict[str, Any] = Field(default_factory=dict)
    """timm's description of the weights."""
    weights_sha256: Sha256
    bytes: int
    """Size of the file of weights."""

    @property
    def weights_key(self) -> str:
        """File of the weights, in the folder of the manifest."""
        return name_by_content(WEIGHTS, self.weights_sha256)

    @property
    def source(self) -> str:
        """Where the weights are from, in a line."""
        return f"{HUB}{self.repository}@{self.revision}"


def complete_models(experiment: Experiment, root: Store | None) -> Experiment:
    """Takes what an experiment, as it was read, does not say of its networks from the weights that they start from.

    `root`: where fetched weights are. A student that starts from its teacher takes the teacher's normalization, interpolation and crop.
    Raises ConfigError and DataError naming the field for weights that are unknown, missing, or need what we lack.
    """
    before = experiment.teacher
    roles: dict[str, RoleConfig] = {}
    for field, role in experiment.map_roles().items():
        model, weights = role.model, WeightsDescription({})
        if model.pretrained:
            with prefix_errors(f"{field}.model.pretrained"):
                if COMPLETED - model.model_fields_set:
                    weights = describe_weights(model.pretrained, root)
        elif role.train.init == "teacher":
            weights = WeightsDescription(before.model.model_dump(include={"mean", "std", "interpolation", "test_crop"}))
        if weights.settings:
            completed = _complete_model(f"{field}.model", model, weights)
            roles[field] = before = role.model_copy(update={"model": completed})
        else:
            roles[field] = before = role
    teacher, *students = roles.values()
    return experiment.model_copy(update={"teacher": teacher, "students": tuple(students)})


def describe_weights(pretrained: str, root: Store | None) -> WeightsDescription:
    """What is known of weights, for `complete_models`.

    The repository of a hub is asked only if its weights are not in the root and timm does not know them. Raises ConfigError for an
    unknown name, StoreError if the hub cannot be reached.
    """
    if is_weights_uri(pretrained):
        return _describe_file(pretrained)
    manifest = find_fetched(pretrained, root) if root else None
    if manifest:
        return _describe_timm_config(manifest.config, pretrained)
    if pretrained.startswith(HUB):
        repository, revision = _split_hub_name(pretrained)
        path, _ = _download(pretrained, repository, revision, TIMM_CONFIG)
        return _describe_timm_config(parse_json_object(path.read_bytes(), f"{pretrained}/{TIMM_CONFIG}"), pretrained)
    return _describe_timm_config(_get_timm_config(pretrained), pretrained)


def locate_weights(pretrained: str, root: Store) -> str:
    """URI of the weights: a safetensors file, or the folder of a model. Those of a hub are fetched into the root if they are not there."""
    if is_weights_uri(pretrained):
        return pretrained
    manifest = fetch_weights(pretrained, root)
    return f"{root.at(_derive_key(pretrained)).uri}/{manifest.weights_key}"


def digest_pretrained(pretrained: str, root: Store) -> str:
    """SHA-256 of the weights; see `locate_weights`."""
    return digest_weights(pretrained) if is_weights_uri(pretrained) else fetch_weights(pretrained, root).weights_sha256


def find_fetched(pretrained: str, root: Store) -> PretrainedManifest | None:
    """The manifest of a hub's weights that are in the root; None if they are not, or were cut off."""
    store = root.at(_derive_key(pretrained))
    manifest = PretrainedManifest.find_file(store, PretrainedManifest.filename)
    is_whole = manifest and store.exists(manifest.weights_key) and store.size(manifest.weights_key) == manifest.bytes
    return manifest if is_whole else None


def read_fetched(pretrained: str, root: Store) -> bytes:
    """The weights of a hub in the root, which are fetched if they are not there. Raises DataError if they are not what was fetched."""
    manifest = fetch_weights(pretrained, root)
    store = root.at(_derive_key(pretrained))
    data = store.get(manifest.weights_key)
    if sha256_bytes(data) != manifest.weights_sha256:
        raise DataError(
            f"{store.uri}/{manifest.weights_key}: sha256 differs from {PretrainedManifest.filename}: the file is damaged or was replaced; "
            "remove it, and run again: it is fetched again"
        )
    return data


def fetch_weights(pretrained: str, root: Store) -> PretrainedManifest:
    """Fetches the weights of a hub into the root, once: what is there stays, whatever the hub has since.

    Raises ConfigError for a name that timm or the hub does not know, DataError for a file that is no safetensors, StoreError if the
    hub cannot be reached.
    """
    if manifest := find_fetched(pretrained, root):
        return manifest
    with hold_lease(root, f"pretrained-{shorten_digest(digest_json(pretrained))}", "fetch"):
        return find_fetched(pretrained, root) or _fetch_from_hub(pretrained, root.at(_derive_key(pretrained)))


def _fetch_from_hub(pretrained: str, store: Store) -> PretrainedManifest:
    config: dict[str, Any] = {}
    # Weights that were lost come from the same commit again.
    lost = PretrainedManifest.find_file(store, PretrainedManifest.filename)
    if pretrained.startswith(HUB):
        repository, revision = _split_hub_name(pretrained)
        revision = lost.revision if lost else revision
        path, commit = _download(pretrained, repository, revision, TIMM_CONFIG)
        config = parse_json_object(path.read_bytes(), f"{pretrained}/{TIMM_CONFIG}")
        _describe_timm_config(config, pretrained)
        # The file of weights is that of the same commit.
        revision = commit
    else:
        config, revision = _get_timm_config(pretrained), None
        repository, revision = _split_hub_name(config["pretrained_cfg"]["hf_hub_id"])
        revision = lost.revision if lost else revision
    for name in HUB_FILES:
        try:
            path, commit = _download(pretrained, repository, revision, name)
            break
        except _FileMissingError:
            continue
    else:
        raise ConfigError(
            f"{pretrained}: {HUB}{repository} has none of {', '.join(HUB_FILES)}, and pickles are not read; convert the file once, and "
            "give its path"
        )
    with prefix_errors(pretrained):
        read_tensor_shapes(str(path))
    sha256 = sha256_file(path)
    if lost and lost.weights_sha256 != sha256:
        raise DataError(
            f"{pretrained}: the weights in {store.uri} are lost or damaged, and the hub has others now; restore "
            f"{lost.weights_key} there, or remove the folder to start from the hub's"
        )
    manifest = PretrainedManifest(
        name=pretrained,
        repository=repository,
        revision=commit,
        file=name,
        license=_read_license(config, repository, commit),
        config=config,
        weights_sha256=sha256,
        bytes=path.stat().st_size,
    )
    store.put_file(manifest.weights_key, path)
    kept = manifest.commit(store)
    log.get_logger().info(
        "fetched", weights=pretrained, source=kept.source, license=kept.license, mib=round(path.stat().st_size / 2**20, 1)
    )
    return kept


def _derive_key(pretrained: str) -> str:
    return f"{FOLDER}/{shorten_digest(digest_json(pretrained))}"


def _split_hub_name(name: str) -> tuple[str, str | None]:
    repository, _, revision = name.removeprefix(HUB).partition("@")
    return repository, revision or None


class _FileMissingError(Exception):
    """A repository has no such file."""


def _download(pretrained: str, repository: str, revision: str | None, name: str) -> tuple[Path, str]:
    """A file of a hub, in its library's cache, and its commit. Tokens, mirrors and HF_HUB_OFFLINE are the library's."""
    from huggingface_hub import errors, hf_hub_download
    from huggingface_hub.utils.logging import get_logger

    get_logger("huggingface_hub").setLevel("ERROR")  # it tells each of five retries; a person needs the outcome
    cure = (
        f"run `ns models fetch {pretrained} --root ROOT` where the hub can be reached, or give the path of a copy of its .safetensors "
        f"(with its {TIMM_CONFIG} beside it) in model.pretrained"
    )
    try:
        path = Path(hf_hub_download(repository, name, revision=revision))
    except errors.LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set" if _is_offline() else "the hub cannot be reached"
        raise StoreError(f"{pretrained}: {reason}, and {name} of {repository} is not here; {cure}") from error
    except errors.EntryNotFoundError as error:
        if name in HUB_FILES:
            raise _FileMissingError from error
        raise ConfigError(
            f"{pretrained}: the repository has no {name}, so it is no model of timm; give timm's weights"
        ) from error
    except errors.GatedRepoError as error:
        raise ConfigError(
            f"{pretrained}: access to it must be asked for at the hub; then set HF_TOKEN to a token of that user"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(
            f"{pretrained}: the hub has no such repository, or it is private: check the name, or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ConfigError(f"{pretrained}: the repository has no revision {revision}") from error
    except errors.HFValidationError as error:
        raise ConfigError(f"{pretrained}: no name of a repository: {error}") from error
    except OSError as error:  # HfHubHTTPError, and connections that break
        if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
            raise ConfigError(f"{pretrained}: the hub refuses {repository}: check the name and HF_TOKEN") from error
        raise StoreError(f"{pretrained}: the hub did not give {name}: {str(error).splitlines()[0]}; {cure}") from error
    # CACHE/models--OWNER--NAME/snapshots/COMMIT/FILE
    return path, path.parent.name


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _read_license(config: Mapping[str, Any], repository: str, commit: str) -> str | None:
    """What the weights' description states, else the card of the repository."""
    weights = config.get("pretrained_cfg", config)
    return _format_license(weights.get("license")) or _format_license(_read_card_license(repository, commit))


def _format_license(stated: Any) -> str | None:
    """A license, or several; None for what is none."""
    names = stated if isinstance(stated, list) else [stated]
    return ", ".join(name for name in names[:MAX_LICENSES] if isinstance(name, str)) or None


def _read_card_license(repository: str, commit: str) -> Any:
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        path, _ = _download(repository, repository, commit, "README.md")
        if path.stat().st_size > MAX_CARD_BYTES:
            return None
        card: Any = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except (ConfigError, StoreError, ValueError, TypeError, YAMLError, RecursionError):
        # A card that cannot be read states none.
        return None
    return getattr(card.data, "license", None)


def _get_timm_config(name: str) -> dict[str, Any]:
    """timm's description of weights that it knows by name, in the form of TIMM_CONFIG."""
    import timm
    from timm.models import get_pretrained_cfg, list_pretrained

    arch, _, tag = name.partition(".")
    names = [other for other in list_pretrained() if other.startswith(f"{arch}.")]
    if not timm.is_model(arch) or (tag and name not in names):
        if names:
            similar = difflib.get_close_matches(name, names, n=3, cutoff=0.0)
        else:
            archs = difflib.get_close_matches(arch, timm.list_models(), n=5)
            similar = [
                f"{other}.{settings.tag}" for other in archs if (settings := get_pretrained_cfg(other)) and settings.hf_hub_id
            ][:3]
        hint = f"did you mean {' or '.join(similar)}?" if similar else "see timm.list_pretrained()"
        raise ConfigError(f"timm knows no such weights, {name!r}; {hint}")
    settings = get_pretrained_cfg(name)
    if settings is None or not settings.hf_hub_id:
        at = f" but as a pickle at {settings.url}" if settings and settings.url else ""
        raise ConfigError(f"timm has no weights {name!r}{at}; give those of another name, or the path of a .safetensors file")
    values = settings.to_dict()
    return json.loads(json.dumps({"architecture": arch, "pretrained_cfg": values}))  # type: ignore[no-any-return]


def _describe_file(uri: str) -> WeightsDescription:
    """Of a file or the folder of a model. A file that is missing is told when it is needed."""
    parent, key = split_weights_uri(uri)
    store = open_store(parent)
    if key is None:
        manifest = ModelManifest.find_file(store, ModelManifest.filename)
        if manifest is None:
            return WeightsDescription({})
        fields = set(ModelConfig.model_fields) - {"pretrained", "inference_precision", "inference_compile", "outputs"}
        settings = manifest.model.model_dump(include=fields) | {"mean": manifest.mean, "std": manifest.std}
        return WeightsDescription(settings, manifest.classes)
    if not store.exists(TIMM_CONFIG):
        return WeightsDescription({})
    return _describe_timm_config(parse_json_object(store.get(TIMM_CONFIG), f"{parent}/{TIMM_CONFIG}"), parent)


def _describe_timm_config(config: Mapping[str, Any], uri: str) -> WeightsDescription:
    """From timm's description of the weights at `uri`; the test's sizes are those of `timm.data.resolve_data_config(use_test_size=True)`.

    Raises DataError for other JSON, ConfigError for images that we lack.
    """
    weights: Mapping[str, Any] = config.get("pretrained_cfg", config)
    try:
        size = tuple(weights.get("input_size") or (3, 224, 224))
        channels, height, width = size
        test_height = tuple(weights.get("test_input_size") or size)[1]
        settings: dict[str, Any] = {
            "arch": str(config["architecture"]),
            "args": dict(config.get("model_args") or {}),
            "resolution": height,
            "test_resolution": test_height,
            "interpolation": weights.get("interpolation") or "bicubic",
            "test_crop": weights.get("crop_mode") or "center",
            **{name: tuple(weights[name]) for name in ("mean", "std") if weights.get(name)},
        }
        names = config.get("label_names") or weights.get("label_names")
        classes = tuple(map(str, names.values() if isinstance(names, dict) else names)) if names else None
        crop_share = _read_crop_share(weights.get("crop_pct") or DEFAULT_CROP_SHARE)
        test_crop_share = _read_crop_share(weights.get("test_crop_pct") or crop_share)
        digest_json(config)  # refuses what the manifest could not hold: half characters, nan
    except (AttributeError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise DataError(
            f"{uri}/{TIMM_CONFIG}: is no description of timm's weights ({type(error).__name__}: {error})"
        ) from error
    if channels != 3 or height != width or not 0 < max(height, test_height) <= MAX_SIDE_PX:
        raise ConfigError(
            f"{uri}: takes images of {channels!s:.20} channels and {height!s:.20} × {width!s:.20} px; must be 3, and square"
        )
    return WeightsDescription(settings, classes, crop_share, test_crop_share)


def _read_crop_share(value: Any) -> float:
    share = float(value)
    # Some of timm's are above 1; the experiment refuses these, and says so.
    if not MIN_CROP_SHARE <= share <= MAX_CROP_SHARE:
        raise ValueError(f"a crop of {share:g} of the image")
    return share


def _complete_model(field: str, model: ModelConfig, weights: WeightsDescription) -> ModelConfig:
    """The model with what its section does not say. Raises ConfigError for settings that we lack."""
    given, settings = model.model_dump(exclude_unset=True), dict(weights.settings)
    own_test_resolution = settings.get("test_resolution")
    if "resolution" in given:
        # As everywhere, the test has the resolution of the training unless it has its own.
        settings.pop("test_resolution", None)
    completed = settings | given
    if "args" in given:
        completed["args"] = {**settings.get("args", {}), **given["args"]}
    resolution = completed.get("resolution") or model.resolution
    test_resolution = completed.get("test_resolution") or resolution
    completed["test_resolution"] = None if test_resolution == resolution else test_resolution
    if weights.crop_share and "test_margin_px" not in given:
        share = weights.test_crop_share if test_resolution == own_test_resolution else weights.crop_share
        # timm resizes to this size, and cuts.
        completed["test_margin_px"] = math.floor(test_resolution / (share or weights.crop_share)) - test_resolution
    try:
        return ModelConfig.model_validate(completed)
    except ValidationError as error:
        lines = "; ".join(format_validation_error(error, ModelConfig))
        raise ConfigError(f"{field}.{lines} (so the weights have it; set the field to what comes nearest)") from error
