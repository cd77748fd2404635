"""Weights of a hub come into the root once, and networks take from them what an experiment does not say."""

import json
import shutil
import socket

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from ns.config.loader import dump_experiment, load_experiment, parse_experiment
from ns.config.schema import ModelConfig, NoiseConfig, RoleConfig, TrainConfig
from ns.core.errors import ConfigError, DataError, StoreError
from ns.modeling.factory import build_model, check_models, save_model
from ns.modeling.manifest import Lineage
from ns.modeling.pretrained import (
    FOLDER,
    PretrainedManifest,
    complete_models,
    describe_weights,
    digest_pretrained,
    fetch_weights,
    find_fetched,
    locate_weights,
)
from ns.stages.keys import role_inputs
from ns.storage import LocalStore
from ns.training.warm_start import copy_weights, read_pretrained, read_weights
from tests.modeling.hub import COMMIT, Hub, serve_hub

NET = "hf-hub:me/net"
SMALL = {"arch": "test_efficientnet", "resolution": 32}
CARD = "---\nlicense: cc-by-4.0\n---\n# A network"


def point_to_hub(monkeypatch, tmp_path, url):
    """What HF_ENDPOINT and HF_HOME do for a process."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serve_hub(Hub()) as hub:
        point_to_hub(monkeypatch, tmp_path, hub.url)
        yield hub


@pytest.fixture
def root(tmp_path):
    return LocalStore(tmp_path / "root")


def make_experiment(**fields):
    return parse_experiment({"name": "x", "data": {"labeled": "a", "pool": "b", "heldout": "c"}, **fields}, "x.yaml")


def complete_teacher(root, **model):
    return complete_models(make_experiment(teacher={"model": model}), root).teacher.model


def test_weights_are_fetched_once_with_license_and_source(hub, root):
    state = hub.add_model("me/net", "test_efficientnet", card=CARD, num_classes=10)
    manifest = fetch_weights(NET, root)
    assert (manifest.source, manifest.license) == (f"hf-hub:me/net@{COMMIT}", "cc-by-4.0")
    assert manifest.weights_sha256 == digest_pretrained(NET, root)
    tensors = read_weights(locate_weights(NET, root)).tensors
    assert all(torch.equal(tensors[name], value) for name, value in state.items())
    asked = len(hub.requests)
    hub.add_model("me/net", "test_efficientnet", seed=1, num_classes=10)
    # The hub's weights are others now; those of the root stay.
    assert fetch_weights(NET, root) == manifest
    assert describe_weights(NET, root).settings["mean"] == (0.5, 0.5, 0.5)
    assert len(hub.requests) == asked
    assert not any("pickle" in path or path.endswith(".bin") for path in hub.requests)


def test_weights_of_a_timm_name_come_from_its_repository(hub, root):
    hub.add_model("timm/test_vit.r160_in1k", "test_vit")
    manifest = fetch_weights("test_vit.r160_in1k", root)
    assert (manifest.repository, manifest.license) == ("timm/test_vit.r160_in1k", "apache-2.0")
    assert locate_weights("test_vit.r160_in1k", root).startswith(f"{root.uri}/{FOLDER}/")
    assert find_fetched("test_vit.r160_in1k", LocalStore(root.root / "elsewhere")) is None


def test_fetch_that_was_killed_before_its_manifest_begins_again(hub, root):
    hub.add_model("me/net", "test_efficientnet")
    first = fetch_weights(NET, root)
    folder = next(root.list(FOLDER)).rpartition("/")[0]
    root.delete(f"{folder}/{PretrainedManifest.filename}")
    assert find_fetched(NET, root) is None
    assert fetch_weights(NET, root) == first
    root.delete(f"{folder}/{first.weights_key}")
    assert fetch_weights(NET, root) == first
    assert root.exists(f"{folder}/{first.weights_key}")


def test_fetched_weights_that_were_cut_off_or_changed_are_not_trained_from(hub, root):
    hub.add_model("me/net", "test_efficientnet", num_classes=10)
    manifest = fetch_weights(NET, root)
    folder = next(root.list(FOLDER)).rpartition("/")[0]
    key = f"{folder}/{manifest.weights_key}"
    whole = root.get(key)
    root.put(key, whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(
        DataError, match=rf"{manifest.weights_key}: sha256 differs from pretrained\.json: .* it is fetched again"
    ):
        read_pretrained(NET, root)
    root.put(key, whole[:-100])
    assert find_fetched(NET, root) is None
    read_pretrained(NET, root)
    assert root.get(key) == whole
    # What the run began with is not replaced by what the hub has since.
    root.put(key, whole[:-100])
    hub.add_model("me/net", "test_efficientnet", seed=1, num_classes=10)
    shutil.rmtree(constants.HF_HUB_CACHE)
    with pytest.raises(DataError, match=rf"lost or damaged, and the hub has others now; restore {manifest.weights_key} there"):
        fetch_weights(NET, root)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_fetch_takes_no_weights_that_are_cut_off(hub, root, keep):
    hub.add_model("me/net", "test_efficientnet")
    files = hub.repositories["me/net"]
    files["model.safetensors"] = files["model.safetensors"][:keep]
    with pytest.raises(DataError, match="not a safetensors file"):
        fetch_weights(NET, root)
    assert not list(root.list(FOLDER))


@pytest.mark.parametrize(
    ("card", "license_name"),
    [
        ("---\nlicense:\n- mit\n- apache-2.0\n---\n", "mit, apache-2.0"),
        ("---\nlicense: {a: b}\n---\n", None),
        ("---\nlicense: 5\n---\n", None),
        ("---\nlicense: [mit\n  a: {{\n---\n", None),
        ("---\n!!python/object/apply:os.system ['true']\n---\n", None),
        ("---\na: " + 1000 * "[" + 1000 * "]" + "\n---\n", None),
        pytest.param("---\nlicense: mit\n---\n" + (1 << 20) * "-", None, id="larger than a card"),
    ],
)
def test_fetch_reads_any_card(hub, root, card, license_name):
    hub.add_model("me/net", "test_efficientnet", card=card)
    assert fetch_weights(NET, root).license == license_name


def test_fetch_says_what_the_hub_refuses(hub, root):
    hub.add_model("me/net", "test_efficientnet")
    config = hub.repositories["me/net"]["config.json"]
    hub.repositories |= {
        "me/gated": hub.repositories["me/net"],
        "me/pickle": {"config.json": config, "pytorch_model.bin": b"x"},
        "me/zip": {"config.json": config, "model.safetensors": b"PK\x03\x04\x14\0\0\0 a zip"},
        "me/other": {"config.json": b'{"model_type": "bert"}'},
        "me/bare": {"model.safetensors": b"x"},
    }
    hub.gated.add("me/gated")
    for name, kind, reason in (
        ("hf-hub:me/nothing", ConfigError, "no such repository, or it is private: check the name, or set HF_TOKEN"),
        ("hf-hub:me/gated", ConfigError, "access to it must be asked for at the hub; then set HF_TOKEN"),
        ("hf-hub:me/net@v9", ConfigError, "no revision v9"),
        (
            "hf-hub:me/pickle",
            ConfigError,
            "has none of model.safetensors, open_clip_model.safetensors, and pickles are not read",
        ),
        ("hf-hub:me/zip", DataError, "not a safetensors file: a zip archive with a pickle"),
        ("hf-hub:me/other", DataError, "config.json: is no description of timm's weights"),
        ("hf-hub:me/bare", ConfigError, "has no config.json, so it is no model of timm"),
        ("resnet18.a9_in1k", ConfigError, "did you mean resnet18.a"),
        ("resnet1x", ConfigError, "did you mean resnet1"),
        ("gcvit_tiny.in1k", ConfigError, "a pickle at https://"),
    ):
        with pytest.raises(kind) as caught:
            fetch_weights(name, root)
        message = str(caught.value)
        assert reason in message
        assert name.removeprefix("hf-hub:") in message
        assert "\n" not in message
    assert not list(root.list(FOLDER))


def test_token_opens_a_gated_repository(hub, root, monkeypatch):
    hub.add_model("me/net", "test_efficientnet")
    hub.gated.add("me/net")
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert fetch_weights(NET, root).repository == "me/net"


def test_without_the_hub_the_cure_is_told(root, monkeypatch, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        point_to_hub(monkeypatch, tmp_path, f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in (NET, "resnet18.a1_in1k"):
        with pytest.raises(
            StoreError, match=rf"^{name}: HF_HUB_OFFLINE is set, .* run `ns models fetch {name} --root ROOT` where"
        ) as caught:
            fetch_weights(name, root)
        assert len(str(caught.value).splitlines()) == 1


def test_settings_of_timm_names_are_known_without_a_hub(root):
    model = complete_teacher(root, pretrained="vit_small_patch16_224.augreg_in21k_ft_in1k")
    assert (model.arch, model.resolution, model.test_resolution) == ("vit_small_patch16_224", 224, None)
    assert (model.mean, model.std) == ((0.5,) * 3, (0.5,) * 3)
    # 224 of ⌊224 / 0.9⌋ px.
    assert (model.test_crop, model.test_margin_px, model.interpolation) == ("center", 24, "bicubic")


def test_settings_of_the_test_are_the_weights_own(root):
    model = complete_teacher(root, pretrained="efficientnet_b1.ra4_e3600_r240_in1k")
    assert (model.resolution, model.test_resolution, model.test_margin_px) == (240, 288, 0)
    small = complete_teacher(root, pretrained="efficientnet_b1.ra4_e3600_r240_in1k", resolution=64)
    assert (small.resolution, small.test_resolution, small.test_margin_px) == (64, None, 7)
    assert complete_teacher(root, pretrained="resnet18.tv_in1k").interpolation == "bilinear"


def test_what_an_experiment_says_stays(root):
    given = {"arch": "resnet18", "mean": (0.1, 0.2, 0.3), "test_crop": "paper", "test_margin_px": 5, "interpolation": "bicubic"}
    model = complete_teacher(root, pretrained="resnet18.tv_in1k", **given)
    assert {name: getattr(model, name) for name in given} == given


def test_completed_experiment_needs_nothing_more(root, tmp_path, monkeypatch):
    fields = {"teacher": {"model": {"pretrained": "resnet18.a1_in1k"}}}
    experiment = complete_models(make_experiment(**fields), root)
    (tmp_path / "x.yaml").write_text(dump_experiment(experiment))
    again = load_experiment(str(tmp_path / "x.yaml"))
    monkeypatch.setattr("ns.modeling.pretrained.describe_weights", lambda *_: pytest.fail("asked again"))
    assert complete_models(again, root) == again == experiment


def test_student_of_its_teachers_weights_sees_images_as_its_teacher(root):
    student = {"train": {"init": "teacher"}}
    experiment = make_experiment(
        teacher={"model": {"pretrained": "resnet18.tv_in1k"}},
        students=[student, {"model": {"std": [0.2, 0.2, 0.2]}, **student}],
        generations=2,
    )
    teacher, first, second = (role.model for role in complete_models(experiment, root).map_roles().values())
    assert (first.mean, first.interpolation, first.test_crop) == (teacher.mean, "bilinear", "center")
    assert (second.interpolation, second.std) == ("bilinear", (0.2,) * 3)
    assert complete_models(make_experiment(), root) == make_experiment()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            {"interpolation": "lanczos"},
            r"teacher\.model\.interpolation: invalid value 'lanczos': .* set the field to what comes nearest",
        ),
        ({"crop_mode": "border"}, r"teacher\.model\.test_crop: invalid value 'border'"),
        ({"input_size": [1, 64, 64]}, r"teacher\.model\.pretrained: hf-hub:me/net: takes images of 1 channels"),
        ({"input_size": [3, 64, 48]}, r"teacher\.model\.pretrained: hf-hub:me/net: takes images of 3 channels and 64 × 48 px"),
        ({"input_size": [3]}, r"config\.json: is no description of timm's weights"),
        ({"test_input_size": [3]}, r"config\.json: is no description of timm's weights"),
        ({"crop_pct": 1e-320}, r"config\.json: is no description of timm's weights"),
        ({"crop_pct": float("nan")}, r"config\.json: is no description of timm's weights"),
        ({"crop_pct": 1.15}, r"teacher\.model\.test_margin_px: invalid value -9"),
        ({"input_size": [3, 10**400, 10**400]}, r"hf-hub:me/net: takes images of 3 channels and 1000"),
        ({"note": "\ud800"}, r"config\.json: not JSON \(.*surrogates not allowed"),
    ],
)
def test_settings_that_we_lack_are_refused(hub, root, config, reason):
    hub.add_model("me/net", "test_efficientnet", config=config)
    with pytest.raises((ConfigError, DataError), match=reason):
        complete_teacher(root, pretrained=NET)


def test_foreign_arguments_of_a_hub_are_refused(hub, root):
    hub.add_model("me/net", "test_efficientnet")
    config = json.loads(hub.repositories["me/net"]["config.json"])
    hub.repositories["me/net"]["config.json"] = json.dumps(
        config | {"model_args": {"pretrained_cfg_overlay": {"file": "x"}}}
    ).encode()
    with pytest.raises(ConfigError, match=r"teacher\.model\.args\.pretrained_cfg_overlay: is none of the arguments"):
        complete_teacher(root, pretrained=NET)


def test_settings_lie_beside_a_file(hub, root, tmp_path):
    hub.add_model("me/net", "test_efficientnet", num_classes=3)
    for name, content in hub.repositories["me/net"].items():
        (tmp_path / name).write_bytes(content)
    model = complete_teacher(root, pretrained=f"{tmp_path}/model.safetensors")
    assert (model.arch, model.resolution, model.std, model.test_margin_px) == ("test_efficientnet", 64, (0.25,) * 3, 7)
    (tmp_path / "config.json").unlink()
    assert complete_teacher(root, pretrained=f"{tmp_path}/model.safetensors") == ModelConfig(
        pretrained=f"{tmp_path}/model.safetensors"
    )


def test_settings_of_a_model_of_ours_are_those_of_its_manifest(root, tmp_path):
    model = ModelConfig(arch="test_efficientnet", resolution=32, mean=(0.1,) * 3, crop="pad", interpolation="bilinear")
    network = build_model(model, NoiseConfig(), 3)
    fields = {"generation": 0, "model": model, "noise": NoiseConfig(), "classes": ("a", "b", "c"), "mean": model.mean}
    lineage = Lineage(config="0", labeled="0")
    save_model(
        LocalStore(tmp_path / "m"), network.state_dict(), {**fields, "parameters": 1, "steps": 1, "lineage": lineage}, []
    )
    uri = str(tmp_path / "m")
    assert complete_teacher(root, pretrained=uri) == model.model_copy(update={"pretrained": uri})
    assert describe_weights(uri, root).classes == ("a", "b", "c")


def test_check_models_says_what_fits_and_what_is_fetched_later(hub, root):
    hub.add_model("me/net", "test_efficientnet", num_classes=10)
    experiment = complete_models(
        make_experiment(
            teacher={"model": {"pretrained": NET}}, students=[{"model": {"arch": "test_resnet", "resolution": 64}}]
        ),
        root,
    )
    (remark,) = check_models(experiment, root=root)
    assert remark == f"teacher.model.pretrained: {NET}: is fetched by `ns models fetch`, or by the first stage that needs it"
    assert find_fetched(NET, root) is None
    assert check_models(experiment, 10, root, fetch=True) == []
    assert find_fetched(NET, root)
    wrong = make_experiment(
        teacher={"model": {"pretrained": NET, "arch": "test_resnet"}},
        students=[{"model": {"arch": "test_resnet", "resolution": 64}}],
    )
    with pytest.raises(
        ConfigError, match=r"teacher\.model\.pretrained: .* these weights are of test_efficientnet; model\.arch must be that"
    ):
        check_models(wrong, root=root)


def test_weights_that_fit_partly_are_told(root, tmp_path, capsys):
    network = build_model(ModelConfig(arch="test_efficientnet"), NoiseConfig(), 3)
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    del state["conv_stem.weight"], state["bn1.weight"]
    uri = f"{tmp_path}/a.safetensors"
    save_file(state, uri)
    experiment = make_experiment(teacher={"model": SMALL | {"pretrained": uri}}, students=[{"model": SMALL}])
    (remark,) = check_models(experiment)
    total = len(network.state_dict()) - 2
    expected = f"{total - 2} of {total} tensors fit; from random weights start conv_stem.weight, bn1.weight"
    assert remark == f"teacher.model.pretrained: {uri}: {expected}"
    copy_weights(build_model(ModelConfig(arch="test_efficientnet"), NoiseConfig(), 3), read_weights(uri), ("a", "b", "c"))
    captured = capsys.readouterr()
    assert expected in captured.out + captured.err


def test_other_class_lists_of_a_hub_are_told(hub, root, capsys):
    state = hub.add_model("me/net", "test_efficientnet", num_classes=3)
    config = json.loads(hub.repositories["me/net"]["config.json"])
    hub.repositories["me/net"]["config.json"] = json.dumps(config | {"label_names": ["a", "b", "c"]}).encode()
    network = build_model(ModelConfig(arch="test_efficientnet"), NoiseConfig(), 3)
    head = network.classifier.weight.clone()
    weights = read_pretrained(NET, root)
    copy_weights(network, weights, ("c", "b", "a"))
    captured = capsys.readouterr()
    assert "the weights have other classes, so the classifier starts from random weights" in captured.out + captured.err
    assert torch.equal(network.classifier.weight, head)
    copy_weights(network, weights, ("a", "b", "c"))
    assert torch.equal(network.classifier.weight, state["classifier.weight"])


def test_position_embeddings_follow_the_resolution(tmp_path):
    """As timm does it for the same weights."""
    large = build_model(ModelConfig(arch="test_vit", resolution=160), NoiseConfig(), 3)
    torch.nn.init.normal_(large.pos_embed)
    uri = f"{tmp_path}/a.safetensors"
    save_file({f"model.{name}": value.contiguous() for name, value in large.state_dict().items()}, uri)
    model = ModelConfig(arch="test_vit", resolution=64, pretrained=uri)
    assert check_models(make_experiment(teacher={"model": model.model_dump()}, allow_smaller_student=True)) == []
    small = build_model(model, NoiseConfig(), 3)
    copy_weights(small, read_weights(uri), ("a", "b", "c"))
    large.set_input_size(img_size=(64, 64))
    assert torch.allclose(small.pos_embed, large.pos_embed, atol=1e-6)
    assert torch.equal(small.blocks[0].attn.qkv.weight, large.blocks[0].attn.qkv.weight)


def test_role_inputs_hold_the_digest_of_fetched_weights(hub, root):
    hub.add_model("me/net", "test_efficientnet")
    role = RoleConfig(model=ModelConfig(pretrained=NET), train=TrainConfig())
    assert role_inputs(role, root)["init"] == fetch_weights(NET, root).weights_sha256
    assert "pretrained" not in role_inputs(role, root).get("model", {})
