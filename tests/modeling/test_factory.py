import pytest
import torch
from safetensors.torch import save_file

from ns.config.loader import parse_experiment
from ns.config.schema import ModelConfig, NoiseConfig, RoleConfig
from ns.core.errors import ConfigError, DataError
from ns.modeling import factory as models
from ns.modeling.manifest import Lineage, ModelManifest
from ns.storage import LocalStore

SMALL = ModelConfig(arch="test_efficientnet", resolution=32)


def experiment(**fields):
    data = {"labeled": "a", "pool": "b", "heldout": "c"}
    network = {"model": {"arch": "test_efficientnet", "resolution": 32}}
    return parse_experiment({"name": "x", "data": data, "teacher": network, "students": [network], **fields}, "x.yaml")


def meta(model: ModelConfig, outputs: int = 3) -> torch.nn.Module:
    return models.build_on_meta(model, NoiseConfig(), outputs).eval()


def saved(folder, network, classes=("a", "b", "c"), model=SMALL) -> ModelManifest:
    fields = {
        "generation": 0,
        "model": model,
        "noise": NoiseConfig(),
        "classes": classes,
        "parameters": models.count_parameters(network),
        "steps": 1,
        "lineage": Lineage(config="0", labeled="0"),
    }
    return models.save_model(folder, network.state_dict(), fields, [{"step": 1.0}])


def test_stochastic_depth_grows_linearly_from_zero_to_its_rate():
    network = models.build_model(ModelConfig(arch="efficientnet_b0"), NoiseConfig(stochastic_depth=0.2), 10)
    rates = [
        getattr(block.drop_path, "drop_prob", 0.0) for stage in network.blocks for block in stage if hasattr(block, "drop_path")
    ]
    # Block i of L drops at 0.2 i / L: B0's last at 0.1875 (the reference code).
    assert len(rates) == 16
    assert rates == pytest.approx([0.2 * index / 16 for index in range(16)])


def test_build_model_is_channels_last():
    network = models.build_model(SMALL, NoiseConfig(), 3)
    assert network.conv_stem.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("arch", ["test_efficientnet", "tf_efficientnet_b0", "resnet18", "resnet26d"])
@pytest.mark.parametrize(("factor", "side"), [(1, 1), (2, 2), (4, 4), (8, 8)])
def test_reduced_stride_leaves_larger_maps(arch, factor, side):
    network = meta(ModelConfig(arch=arch, resolution=32, reduce_stride=factor))
    assert network.forward_features(torch.zeros(1, 3, 32, 32, device="meta")).shape[-2:] == (side, side)


def test_reduced_stride_is_the_papers_for_small_images():
    """Stages 2 and 3 of B0 are dense, the stem is not, as in the reference code: feature maps of 32 px images."""
    network = meta(ModelConfig(arch="tf_efficientnet_b0", resolution=32, reduce_stride=4))
    sides = {}
    for index, stage in enumerate(network.blocks):
        stage.register_forward_hook(lambda _m, _i, out, index=index: sides.__setitem__(index, out.shape[-1]))
    network(torch.zeros(1, 3, 32, 32, device="meta"))
    assert list(sides.values()) == [16, 16, 16, 8, 8, 4, 4]


def test_reduced_stride_needs_stages():
    with pytest.raises(ConfigError, match=r"reduce_stride: invalid value 2: .* too few stages"):
        meta(ModelConfig(arch="test_vit", resolution=160, reduce_stride=2))


@pytest.mark.parametrize(
    ("preset", "parameters", "billions"),
    # Million parameters: arXiv:1911.04252 and the reference code; multiply-adds: timm's, at these sizes.
    [("b0", 5.3, 0.39), ("b7", 66.3, 38.3), ("l2", 480.3, 172.1), ("lite0", 4.65, 0.39)],
)
def test_preset_has_the_papers_size(preset, parameters, billions):
    role = RoleConfig(preset=preset)
    network = meta(role.model, outputs=1000)
    assert models.count_parameters(network) / 1e6 == pytest.approx(parameters, rel=0.01)
    assert models.count_multiply_adds(network, role.model.resolution) / 1e9 == pytest.approx(billions, rel=0.03)
    rates = [block.drop_path.drop_prob for stage in network.blocks for block in stage if hasattr(block.drop_path, "drop_prob")]
    count = sum(len(stage) for stage in network.blocks)
    assert rates[-1] == pytest.approx(0.2 * (count - 1) / count)
    norms = {(module.momentum, module.eps) for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)}
    assert norms == {(0.01, 1e-3)}


@pytest.mark.parametrize("preset", ["b1-small", "lite3", "l2"])
def test_check_models_accepts_a_preset_as_its_own_teacher(preset):
    models.check_models(experiment(teacher={"preset": preset}, students=[{"preset": preset}]))


def test_multiply_adds_are_counted_by_hand():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.nn.Flatten(), torch.nn.Linear(128, 10))
    assert models.count_multiply_adds(network.to("meta"), 8) == 4 * 4 * 8 * 27 + 128 * 10


def test_normalize_keeps_the_layout():
    images = torch.randint(0, 256, (2, 8, 6, 3), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    out = models.Normalize(mean, std)(images)
    expected = (images.permute(0, 3, 1, 2) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    for width in (2, 6):
        assert torch.equal(models.Normalize(mean, std, width)(images), out)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_load_model_gives_the_same_outputs(tmp_path):
    folder = LocalStore(tmp_path)
    torch.manual_seed(0)
    network = models.build_model(SMALL, NoiseConfig(), 3)
    card = saved(folder, network)
    again, read = models.load_model(folder)
    assert read == card
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(network.eval()(images), again(images))


@pytest.mark.parametrize("damage", ["none", "missing", "cut off"])
def test_find_model_wants_whole_weights(tmp_path, damage, capsys):
    folder = LocalStore(tmp_path)
    assert models.find_model(folder) is None
    manifest = saved(folder, models.build_model(SMALL, NoiseConfig(), 3))
    if damage == "missing":
        folder.delete(manifest.weights_key)
    elif damage == "cut off":
        folder.put(manifest.weights_key, folder.get(manifest.weights_key)[:-1])
    assert models.find_model(folder) == (manifest if damage == "none" else None)
    assert (f"{folder.uri}/{manifest.weights_key}" in "".join(capsys.readouterr())) == (damage != "none")


def test_two_attempts_at_one_model_leave_one_that_is_whole(tmp_path):
    folder = LocalStore(tmp_path)
    first, second = (models.build_model(SMALL, NoiseConfig(), 3) for _ in range(2))
    put, others = LocalStore.put, [second]

    def overtaken(store, key, data):
        put(store, key, data)
        # The other attempt begins and ends between this one's weights and its manifest.
        if others:
            saved(folder, others.pop())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStore, "put", overtaken)
        kept = saved(folder, first)
    assert models.find_model(folder) == kept
    assert torch.equal(models.load_weights(folder, kept)["conv_stem.weight"], second.conv_stem.weight)
    assert set(folder.list()) == {ModelManifest.filename, kept.weights_key, kept.history_key}
    # Weights that were damaged since are followed by another attempt's.
    folder.put(kept.weights_key, b"")
    assert saved(folder, first) == models.find_model(folder) != kept


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"x" + data[1:], lambda data: b""])
def test_load_weights_refuses_damage(tmp_path, damage):
    folder = LocalStore(tmp_path)
    card = saved(folder, models.build_model(SMALL, NoiseConfig(), 3))
    folder.put(card.weights_key, damage(folder.get(card.weights_key)))
    with pytest.raises(DataError, match="damaged or was replaced"):
        models.load_weights(folder, card)


def test_load_model_refuses_an_edited_manifest(tmp_path):
    folder = LocalStore(tmp_path)
    saved(folder, models.build_model(SMALL, NoiseConfig(), 3))
    folder.put(ModelManifest.filename, folder.get(ModelManifest.filename).replace(b'"parameters": ', b'"parameters": 1'))
    with pytest.raises(DataError, match=r"model\.json: digest"):
        models.load_model(folder)


def test_check_models_names_path_value_and_cure():
    small = {"model": {"arch": "test_efficientnet", "resolution": 32}}
    narrow = {"model": {"arch": "lcnet_035", "resolution": 32}}
    large = {"model": {"arch": "efficientnet_b0", "resolution": 32}}
    cases = [
        ({"teacher": large, "students": [small]}, None, r"students\.0\.model: .* must be equal or larger"),
        ({"students": [large, small], "generations": 2}, None, r"students\.1\.model: .* \(students\.0\.model\)"),
        # More parameters than its teacher, but fewer multiply-adds.
        (
            {"students": [narrow]},
            None,
            r"students\.0\.model: 774,408 multiply-adds, its teacher \(teacher\.model\) has 2,288,832",
        ),
        (
            {"teacher": {"model": {"arch": "vit_tiny_patch16_224", "args": {"img_size": 224}, "resolution": 96}}},
            None,
            r"teacher\.model: .* not take images of 96 px",
        ),
        (
            {"students": [{"model": {**small["model"], "resolution": 31}}]},
            None,
            r"students\.0\.model\.resolution: invalid value 31",
        ),
        (
            {"teacher": {"model": {**small["model"], "test_resolution": 16}}},
            None,
            r"teacher\.model\.test_resolution: invalid value 16: below the total stride of test_efficientnet, 32 px",
        ),
        ({"teacher": {"model": {**small["model"], "outputs": 4}}}, 10, r"teacher\.model\.outputs: .* must be at least 10"),
        (
            {"students": [{"model": {**small["model"], "pretrained": "/nowhere/b5.safetensors"}}]},
            None,
            r"students\.0\.model\.pretrained: invalid value '/nowhere/b5\.safetensors': there is no such file",
        ),
        (
            {"teacher": {"model": {**small["model"], "pretrained": "/nowhere"}}},
            None,
            r"teacher\.model\.pretrained: .* no such model",
        ),
        ({"teacher": {"model": {"arch": "nonet"}}}, None, r"teacher\.model\.arch: invalid value 'nonet'"),
        (
            {
                "teacher": {
                    "model": {"arch": "test_vit", "args": {"patch_size": 0}},
                    "noise": {"dropout": 0, "stochastic_depth": 0},
                }
            },
            None,
            r"teacher\.model\.arch: invalid value 'test_vit' with args \{'patch_size': 0\}: .* by zero",
        ),
        ({"teacher": {"model": {**small["model"], "args": {"wings": 2}}}}, None, r"teacher\.model\.args\.wings: is none"),
        (
            {"students": [{"model": {"arch": "test_resnet", "args": {"drop_block_rate": 0.1}}, "noise": {"pool": "none"}}]},
            None,
            r"students\.0\.noise\.pool: invalid value 'none' for this network: its noise \(bernoulli_\)",
        ),
    ]
    for fields, classes, reason in cases:
        with pytest.raises(ConfigError, match=reason):
            models.check_models(experiment(**fields), classes)


def test_check_models_accepts_valid_experiments():
    large = {"model": {"arch": "efficientnet_b0", "resolution": 32}}
    models.check_models(experiment(students=[large]))
    models.check_models(experiment(students=[{**large, "noise": {"pool": "none"}}]))
    models.check_models(experiment(teacher=large, allow_smaller_student=True))
    models.check_models(experiment(teacher={"model": {**large["model"], "outputs": 12}}, allow_smaller_student=True), 10)


@pytest.mark.parametrize("arch", ["densenet121", "vgg11", "hrnet_w18", "repvit_m0_9", "inception_v3"])
def test_families_without_stochastic_depth_are_built_without_it(arch):
    expected = rf"noise\.stochastic_depth: invalid value 0\.2: {arch} has no stochastic depth; set it to 0"
    assert models.build_on_meta(ModelConfig(arch=arch), NoiseConfig(stochastic_depth=0), 3)
    with pytest.raises(ConfigError, match=expected):
        models.build_on_meta(ModelConfig(arch=arch), NoiseConfig(), 3)


def test_check_models_refuses_weights_that_fit_no_layer(tmp_path):
    save_file({"layer1.0.conv1.weight": torch.zeros(3)}, tmp_path / "a.safetensors")
    teacher = {"model": {"arch": "test_efficientnet", "resolution": 32, "pretrained": f"{tmp_path}/a.safetensors"}}
    with pytest.raises(ConfigError, match=r"^teacher\.model\.pretrained: .*none of its 1 tensors"):
        models.check_models(experiment(teacher=teacher))


def test_multiply_adds_of_networks_with_class_tokens_are_counted():
    network = models.build_on_meta(ModelConfig(arch="cait_xxs24_224", resolution=64), NoiseConfig(dropout=0), 3)
    assert models.count_multiply_adds(network, 64) > 1e8


@pytest.mark.parametrize("arch", ["test_vit", "swin_tiny_patch4_window7_224", "convnext_atto"])
def test_reduce_stride_is_refused_where_nothing_can_be_made_dense(arch):
    noise = NoiseConfig(dropout=0, stochastic_depth=0)
    with pytest.raises(ConfigError, match=r"model\.reduce_stride: invalid value 2"):
        models.build_on_meta(ModelConfig(arch=arch, reduce_stride=2), noise, 3)


def test_networks_of_one_size_are_built_for_that_of_the_test():
    noise = NoiseConfig(dropout=0)
    network = models.build_on_meta(ModelConfig(arch="test_vit", resolution=64, test_resolution=96), noise, 3)
    assert network.patch_embed.img_size == (96, 96)
    fixed = models.build_on_meta(ModelConfig(arch="swin_tiny_patch4_window7_224", resolution=64, test_resolution=96), noise, 3)
    for size in (64, 96):
        assert models.count_multiply_adds(network, size)
        assert models.count_multiply_adds(fixed, size)


def test_reduce_stride_is_refused_where_stages_are_no_modules():
    model = ModelConfig(arch="hrnet_w18", reduce_stride=2)
    with pytest.raises(ConfigError, match=r"model\.reduce_stride: invalid value 2"):
        models.build_on_meta(model, NoiseConfig(stochastic_depth=0), 3)


def test_check_models_builds_the_network_of_fine_tuning_for_its_own_resolution():
    role = {"model": {"arch": "test_vit", "resolution": 64}, "noise": {"stochastic_depth": 0}}
    tuned = {**role, "train": {"finetune": {"resolution": 96}}}
    assert models.check_models(experiment(teacher=tuned, students=[tuned])) == []
