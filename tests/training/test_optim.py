import numpy as np
import pytest
import timm
import torch
from pydantic import ValidationError
from timm.optim import list_optimizers
from torch import nn

from ns.config.schema import UNUSABLE_OPTIMIZERS, OptimizerConfig
from ns.training.optim import compute_learning_rate, make_optimizer, make_parameter_groups


def rate(step: int, config: OptimizerConfig, *, steps: int = 3500, batch: int = 256) -> float:
    return compute_learning_rate(step, steps=steps, steps_per_epoch=10, labeled_batch=batch, config=config)


def test_peak_learning_rate_is_the_papers_at_batch_2048():
    config = OptimizerConfig(warmup_epochs=0)
    assert rate(0, config, batch=2048) == pytest.approx(0.128)


def test_warmup_rises_linearly_from_zero():
    config = OptimizerConfig(warmup_epochs=5)
    assert rate(0, config) == 0
    assert rate(25, config) == pytest.approx(0.008)


def test_staircase_falls_as_in_the_paper():
    config = OptimizerConfig(warmup_epochs=0)
    assert rate(23, config) == pytest.approx(0.016)
    assert rate(24, config) == pytest.approx(0.016 * 0.97)
    # 145 drops, final factor 0.97^145 = 0.0121
    assert rate(3499, config) / 0.016 == pytest.approx(0.0121, abs=5e-5)


def test_staircase_counts_from_the_start_of_warmup():
    with_warmup, without = OptimizerConfig(warmup_epochs=5), OptimizerConfig(warmup_epochs=0)
    assert rate(100, with_warmup) == rate(100, without)


def test_cosine_ends_near_zero():
    config = OptimizerConfig(schedule="cosine", warmup_epochs=0)
    assert rate(0, config) == pytest.approx(0.016)
    assert rate(1750, config) == pytest.approx(0.008)
    assert rate(3499, config) < 1e-6


def test_staircase_falls_by_the_same_at_any_length():
    """SVHN's script: × 0.97 every 1.3716 of 202.3 epochs, in the paper's 109,474 steps every 742."""
    config = OptimizerConfig(warmup_epochs=0, staircase_drops=202.3 / 1.3716)
    for step in (0, 742, 743, 50_000, 109_473):
        expected = 0.008 * 0.97 ** np.floor(step / (109_474 * 1.3716 / 202.3))
        assert rate(step, config, steps=109_474, batch=128) == pytest.approx(expected)
    for steps in (200, 500, 2023, 5000, 109_474):
        assert rate(steps - 1, config, steps=steps) / 0.016 == pytest.approx(0.97**147, rel=0.031)


def test_cosine_starts_where_warmup_ends():
    config = OptimizerConfig(schedule="cosine", warmup_epochs=5)
    for step in range(50, 3500, 69):
        assert rate(step, config) == pytest.approx(0.008 * (1 + np.cos(np.pi * (step - 50) / 3450)))


def test_weight_decay_spares_batch_norm_only():
    network = timm.create_model("test_efficientnet", num_classes=3)
    exempt, decayed = make_parameter_groups(network, OptimizerConfig())
    names = {id(p): name for name, p in network.named_parameters()}
    exempt_names = {names[id(p)] for p in exempt["params"]}
    assert all(".bn" in f".{name}" for name in exempt_names)
    decayed_names = {names[id(p)] for p in decayed["params"]}
    assert "classifier.bias" in decayed_names  # biases are decayed, as in the reference code
    assert not any(".bn" in f".{name}" for name in decayed_names)
    assert exempt["weight_decay"] == 0
    assert len(decayed_names) + len(exempt_names) == len(names)


def trace(config: OptimizerConfig, update) -> None:
    """Compares the optimizer with `update(state, gradient, lr)` on a dense float64 `state["w"]`, over 30 steps."""
    rng = np.random.default_rng(0)
    layer = nn.Linear(3, 4, bias=False)
    state = {"w": layer.weight.detach().double().numpy().copy(), "t": 0}
    optimizer = make_optimizer(layer, config, 0.1)
    for step in range(30):
        gradient, lr = rng.normal(size=(4, 3)), 0.1 / (1 + step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        layer.weight.grad = torch.from_numpy(gradient).float()
        optimizer.step()
        state["t"] += 1
        update(state, gradient, lr)
        np.testing.assert_allclose(layer.weight.detach().numpy(), state["w"], rtol=1e-4, atol=1e-5)


def test_rmsprop_has_tensorflow_semantics():
    """TF1: ms ← 0.9 ms + 0.1 g² from ms = 1; mom ← 0.9 mom + lr·g / √(ms + ε); w ← w − mom; weight decay is part of g."""

    def update(state, gradient, lr):
        gradient = gradient + 0.01 * state["w"]
        state["ms"] = 0.9 * state.get("ms", 1.0) + 0.1 * gradient**2
        state["mom"] = 0.9 * state.get("mom", 0.0) + lr * gradient / np.sqrt(state["ms"] + 1e-3)
        state["w"] -= state["mom"]

    trace(OptimizerConfig(weight_decay=0.01), update)


def test_rmsprop_accepts_other_constants():
    def update(state, gradient, lr):
        state["ms"] = 0.99 * state.get("ms", 1.0) + 0.01 * gradient**2
        state["mom"] = 0.5 * state.get("mom", 0.0) + lr * gradient / np.sqrt(state["ms"] + 0.1)
        state["w"] -= state["mom"]

    trace(OptimizerConfig(weight_decay=0.0, rms_decay=0.99, rms_epsilon=0.1, momentum=0.5), update)


def test_sgd_has_nesterov_momentum_and_coupled_weight_decay():
    def update(state, gradient, lr):
        gradient = gradient + 0.01 * state["w"]
        state["mom"] = 0.9 * state["mom"] + gradient if "mom" in state else gradient
        state["w"] -= lr * (gradient + 0.9 * state["mom"])

    trace(OptimizerConfig(name="sgd", weight_decay=0.01), update)


def test_adamw_decouples_weight_decay():
    def update(state, gradient, lr):
        state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * gradient
        state["v"] = 0.999 * state.get("v", 0.0) + 0.001 * gradient**2
        state["w"] *= 1 - lr * 0.01
        mean, square = state["m"] / (1 - 0.9 ** state["t"]), state["v"] / (1 - 0.999 ** state["t"])
        state["w"] -= lr * mean / (np.sqrt(square) + 1e-8)

    trace(OptimizerConfig(name="adamw", weight_decay=0.01), update)


@pytest.mark.parametrize("arch", ["test_vit", "test_convnext", "test_efficientnet"])
def test_adamw_spares_what_timm_spares(arch):
    network = timm.create_model(arch, num_classes=3)
    groups = make_parameter_groups(network, OptimizerConfig(name="adamw", weight_decay=0.05))
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    decayed = {names[id(parameter)] for group in groups if group["weight_decay"] for parameter in group["params"]}
    vectors = {name for name, parameter in network.named_parameters() if parameter.ndim == 1}
    assert decayed == set(names.values()) - vectors - set(getattr(network, "no_weight_decay", set)())
    assert not decayed & {"cls_token", "pos_embed", "norm.weight"}
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_layers_near_the_input_learn_slower():
    network = timm.create_model("test_vit", num_classes=3)
    groups = make_parameter_groups(network, OptimizerConfig(name="adamw", weight_decay=0.05, layer_decay=0.5))
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    scales = {names[id(parameter)]: group["lr_scale"] for group in groups for parameter in group["params"]}
    depth = len(network.blocks)
    assert scales["head.weight"] == 1
    assert [scales[f"blocks.{block}.mlp.fc1.weight"] for block in range(depth)] == [
        0.5 ** (depth - block) for block in range(depth)
    ]
    assert scales["patch_embed.proj.weight"] == 0.5 ** (depth + 1)


@pytest.mark.integration
def test_every_optimizer_of_timm_that_is_accepted_takes_steps():
    names = [name for name in list_optimizers() if not name.startswith(UNUSABLE_OPTIMIZERS)]
    assert len(names) > 80
    for name in names:
        torch.manual_seed(0)
        layer = nn.Linear(4, 4)
        before = layer.weight.detach().clone()
        optimizer = make_optimizer(layer, OptimizerConfig(name=name, weight_decay=0.01, decay_rule="timm"), 0.01)
        for _ in range(2):
            optimizer.zero_grad()
            layer(torch.ones(3, 4)).square().mean().backward()
            optimizer.step()
        assert torch.isfinite(layer.weight).all(), name
        assert not torch.equal(layer.weight, before), name


def test_unknown_optimizers_are_refused_with_the_nearest_names():
    with pytest.raises(ValidationError, match=r"timm\.optim has no such optimizer; did you mean adamw"):
        OptimizerConfig(name="adamww")
    with pytest.raises(ValidationError, match="has no such optimizer"):
        OptimizerConfig(name="bnbadamw8bit")
