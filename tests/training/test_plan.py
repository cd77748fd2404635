import numpy as np
import pytest
import torch

from ns.config.presets import PRESETS
from ns.config.schema import FinetuneConfig, ModelConfig, NoiseConfig, OptimizerConfig, RoleConfig, TrainConfig
from ns.core.errors import ConfigError
from ns.data.augment.transforms import EvalTransform
from ns.modeling import factory as models
from ns.training.plan import freeze_layers, make_finetuning_role, plan_finetuning, plan_training

SAMPLES = 1000


def role(**fields) -> RoleConfig:
    train = {"labeled_batch": 10, "epochs": 35, "optimizer": OptimizerConfig(warmup_epochs=0), **fields}
    return RoleConfig(model=ModelConfig(arch="test_efficientnet", resolution=32), train=TrainConfig(**train))


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return models.build_model(ModelConfig(arch="test_efficientnet", resolution=32), NoiseConfig(), 3)


@pytest.mark.parametrize("images", [SAMPLES, 1])
def test_plan_training_warns_of_batches_larger_than_the_data(capsys, images):
    config = role(epochs=3)
    assert plan_training(config, images).steps == max(1, -(-3 * images // config.train.labeled_batch))
    assert ("a batch is larger than the labeled images" in "".join(capsys.readouterr())) == (images == 1)


@pytest.mark.parametrize(("epochs", "is_told"), [(5, True), (6, False)])
def test_plan_training_warns_of_a_warm_up_that_does_not_end(capsys, epochs, is_told):
    plan_training(role(epochs=epochs, optimizer=OptimizerConfig(warmup_epochs=5)), SAMPLES)
    assert ("ends before its learning rate has reached the peak" in "".join(capsys.readouterr())) == is_told


def test_plan_training_counts_labeled_epochs():
    course = plan_training(role(), SAMPLES)
    assert course.steps == 3500
    assert course.lr_at(0) == pytest.approx(0.016 * 10 / 256)
    assert course.lr_at(24) == pytest.approx(0.97 * 0.016 * 10 / 256)
    assert plan_training(role(epochs=1e-6), SAMPLES).steps == 1


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("epochs", [50, 202.3, 350, 500, 700])
def test_presets_end_at_the_same_learning_rate_at_any_length(preset, epochs):
    of_preset = RoleConfig(preset=preset, train=TrainConfig(epochs=epochs, labeled_batch=256))
    course = plan_training(of_preset, samples=25_600)
    drops = 147 if preset.endswith("-small") else 145
    assert course.lr_at(course.steps - 1) == pytest.approx(0.016 * 0.97**drops)


def test_plan_finetuning_has_the_steps_of_the_paper():
    tuned = RoleConfig(preset="l2", train=TrainConfig(finetune=FinetuneConfig(resolution=800)))
    course = plan_finetuning(tuned, tuned.train.finetune, 1_281_167)
    assert course.steps == 939  # 938.4, rounded up
    assert (course.role.model.inference_resolution, course.role.train.labeled_batch) == (800, 2048)


@pytest.mark.parametrize(
    "optimizer",
    [
        {},
        {"schedule": "cosine"},
        {"staircase_drops": 10},
        {"staircase_drops": 1000},
        {"schedule": "cosine", "name": "sgd", "lr": 0.1},
    ],
)
@pytest.mark.parametrize("epochs", [1, 50, 350])
def test_finetuning_rate_is_the_end_of_the_papers_schedule_for_any_schedule(optimizer, epochs):
    config = role(epochs=epochs, optimizer=OptimizerConfig(warmup_epochs=0, **optimizer))
    course = plan_finetuning(config, FinetuneConfig(resolution=40, epochs=2), SAMPLES)
    assert course.steps == 200
    expected = 0.0121 * config.train.optimizer.lr * 10 / 256
    assert [course.lr_at(step) for step in (0, 100, 199)] == pytest.approx([expected] * 3, rel=5e-3)
    # Half the batch: twice as many steps over the same images, at half the rate.
    halved = plan_finetuning(config, FinetuneConfig(resolution=40, epochs=2, labeled_batch=5), SAMPLES)
    assert (halved.steps, halved.lr_at(0)) == (400, pytest.approx(course.lr_at(0) / 2))


def test_finetuning_rate_of_the_papers_schedule_is_that_of_its_last_steps():
    """As in the reference code, which takes the last steps of the schedule."""
    config = RoleConfig(preset="l2", train=TrainConfig(finetune=FinetuneConfig(resolution=800)))
    main = plan_training(config, 1_281_167)
    course = plan_finetuning(config, config.train.finetune, 1_281_167)
    for step in (0, course.steps // 2, course.steps - 1):
        assert course.lr_at(step) == pytest.approx(main.lr_at(main.steps - course.steps + step), rel=1e-6)


def test_finetuning_may_have_its_own_learning_rate():
    constant = plan_finetuning(role(), FinetuneConfig(resolution=40, lr=0.256), SAMPLES)
    assert {constant.lr_at(step) for step in range(constant.steps)} == {0.256 * 10 / 256}


@pytest.mark.parametrize(("pool", "is_plain"), [("same", False), ("network", True), ("none", True)])
@pytest.mark.parametrize("crop", ["resized", "pad", "none"])
def test_pool_without_noise_sees_images_as_labeling_does(pool, is_plain, crop):
    fields = {"mixup": 1.0, "erasing": 1.0, "pool": pool}
    config = role()
    config = config.model_copy(
        update={"noise": NoiseConfig(**fields), "model": ModelConfig(arch="test_efficientnet", resolution=48, crop=crop)}
    )
    course = plan_training(config, SAMPLES)
    assert course.transform.mixer is not None
    assert (course.pseudo_transform is not None) == is_plain
    if is_plain:
        image = np.random.default_rng(0).integers(0, 255, (50, 60, 3), np.uint8)
        for seed in range(3):
            seen = course.pseudo_transform(image, np.random.default_rng(seed))
            assert np.array_equal(seen, EvalTransform(48, crop, 32)(image))
        assert course.pseudo_transform.mixer is None


def test_finetuning_has_no_noise_and_no_pseudo_labels():
    tuned = make_finetuning_role(role(), FinetuneConfig(resolution=40, dropout=0.1))
    noise = tuned.noise
    assert (noise.dropout, noise.stochastic_depth, noise.randaugment_layers, noise.flip, noise.cutout_px) == (
        0.1,
        0,
        0,
        False,
        0,
    )
    assert (tuned.model.resolution, tuned.model.inference_resolution, tuned.train.pseudo_batch) == (40, 40, 0)
    assert tuned.train.finetune is None
    course = plan_finetuning(role(), FinetuneConfig(resolution=40), SAMPLES)
    image = np.random.default_rng(0).integers(0, 255, (50, 60, 3), np.uint8)
    expected = EvalTransform(40, "resized", 32)(image)
    for seed in range(3):
        assert np.array_equal(course.transform(image, np.random.default_rng(seed)), expected)


@pytest.mark.parametrize(
    ("share", "frozen"),
    [
        (0.2, ("conv_stem", "bn1", "blocks.0")),
        (0.5, ("conv_stem", "bn1", "blocks.0", "blocks.1")),
        (1.0, ("conv_stem", "bn1", "blocks", "conv_head", "bn2")),
    ],
)
def test_freeze_layers_freezes_the_stem_and_the_first_blocks(share, frozen):
    net = network()
    still = freeze_layers(net, share)
    prefixes = tuple(f"{name}." for name in frozen)
    kept = {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
    assert kept == {name for name, _ in net.named_parameters() if name.startswith(prefixes)}
    norms = {name for name, module in net.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}
    assert set(still) == {name for name in norms if f"{name}.".startswith(prefixes)}


def test_freeze_layers_of_share_0_freezes_nothing():
    net = network()
    assert freeze_layers(net, 0) == ()
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_freeze_layers_refuses_networks_of_unknown_order():
    with pytest.raises(ConfigError, match=r"frozen_share: .* must be 0"):
        freeze_layers(torch.nn.Linear(2, 2), 0.5)
