import pytest
import timm
import torch
from torch import nn

from ns.config import OptimizerConfig
from ns.train.optimizer import learning_rate, make_optimizer, parameter_groups


def rate(step: int, config: OptimizerConfig, *, steps: int = 3500, batch: int = 256) -> float:
    return learning_rate(step, steps=steps, steps_per_epoch=10, labelled_batch=batch, config=config)


def test_peak_learning_rate_is_the_papers_at_batch_2048():
    config = OptimizerConfig(warmup_epochs=0)
    assert rate(0, config, batch=2048) == pytest.approx(0.128)


def test_warm_up_rises_linearly_from_zero_over_its_epochs():
    config = OptimizerConfig(warmup_epochs=5)
    assert rate(0, config) == 0
    assert rate(25, config) == pytest.approx(0.008)


def test_staircase_falls_every_2_4_epochs_of_350_and_ends_at_the_papers_factor():
    config = OptimizerConfig(warmup_epochs=0)
    assert rate(23, config) == pytest.approx(0.016)
    assert rate(24, config) == pytest.approx(0.016 * 0.97)
    # 145 drops, final factor 0.0121 (noisy_student.md §1.4)
    assert rate(3499, config) / 0.016 == pytest.approx(0.0121, abs=5e-5)


def test_the_decay_clock_runs_during_warm_up():
    with_warmup, without = OptimizerConfig(warmup_epochs=5), OptimizerConfig(warmup_epochs=0)
    assert rate(100, with_warmup) == rate(100, without)


def test_cosine_ends_near_zero():
    config = OptimizerConfig(schedule="cosine", warmup_epochs=0)
    assert rate(0, config) == pytest.approx(0.016)
    assert rate(1750, config) == pytest.approx(0.008)
    assert rate(3499, config) < 1e-6


def test_weight_decay_spares_batch_norm_only():
    network = timm.create_model("test_efficientnet", num_classes=3)
    decayed, exempt = parameter_groups(network, 1e-5)
    names = {id(p): name for name, p in network.named_parameters()}
    exempt_names = {names[id(p)] for p in exempt["params"]}
    assert all(".bn" in f".{name}" for name in exempt_names)
    decayed_names = {names[id(p)] for p in decayed["params"]}
    assert "classifier.bias" in decayed_names  # biases are decayed, as in the reference code
    assert not any(".bn" in f".{name}" for name in decayed_names)
    assert exempt["weight_decay"] == 0
    assert len(decayed_names) + len(exempt_names) == len(names)


def test_rmsprop_has_tensorflow_semantics():
    """TF1: ms ← 0.9 ms + 0.1 g² from ms = 1; mom ← 0.9 mom + lr·g / √(ms + ε); w ← w − mom."""
    parameter = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        parameter.weight.fill_(1.0)
    optimizer = make_optimizer(parameter, OptimizerConfig(weight_decay=0.0))
    weight, square, momentum = 1.0, 1.0, 0.0
    for gradient, lr in ((0.5, 0.1), (-2.0, 0.05), (0.25, 0.05)):
        for group in optimizer.param_groups:
            group["lr"] = lr
        parameter.weight.grad = torch.tensor([[gradient]])
        optimizer.step()
        square = 0.9 * square + 0.1 * gradient**2
        momentum = 0.9 * momentum + lr * gradient / (square + 1e-3) ** 0.5
        weight -= momentum
        assert parameter.weight.item() == pytest.approx(weight, rel=1e-5)
