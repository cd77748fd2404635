"""Every formula against a dense reference written out by hand."""

import numpy as np
import pytest
import torch

from ns.config.schema import OptimizerConfig, TrainConfig
from ns.data.loading.stream import MixedLabels
from ns.training.loss import apply_temperature, compute_losses, find_main_labels, sum_loss_weights

B, U, C = 4, 6, 5


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(B + U, C, generator=generator)
    labels = torch.randint(0, C, (B,), generator=generator)
    targets = torch.randn(U, C, generator=generator).softmax(1)
    return logits, labels, targets


def log_softmax(logits: torch.Tensor) -> np.ndarray:
    values = logits.numpy().astype(np.float64)
    return values - np.log(np.exp(values).sum(1, keepdims=True))


def smoothed(labels: np.ndarray, smoothing: float) -> np.ndarray:
    return (1 - smoothing) * np.eye(C)[labels] + smoothing / C


def reference(batch: tuple[torch.Tensor, ...], train: TrainConfig) -> tuple[float, float]:
    logits, labels, targets = batch
    logs = log_softmax(logits)
    labeled = -(smoothed(labels.numpy(), train.label_smoothing) * logs[:B]).sum(1).mean()
    if train.pseudo_labels == "hard":
        wanted = smoothed(targets.numpy().argmax(1), train.label_smoothing)
    else:
        wanted = targets.numpy() ** (1 / train.temperature)
        wanted /= wanted.sum(1, keepdims=True)
    pseudo = -(wanted * logs[B:]).sum(1).mean()
    return labeled, pseudo


@pytest.mark.parametrize("pseudo_labels", ["soft", "hard"])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_compute_losses_matches_a_dense_reference(batch, pseudo_labels, temperature, smoothing):
    train = TrainConfig(pseudo_labels=pseudo_labels, temperature=temperature, label_smoothing=smoothing)
    labeled, pseudo = reference(batch, train)
    result = compute_losses(*batch, train)
    assert result.labeled.item() == pytest.approx(labeled, rel=1e-5)
    assert result.pseudo.item() == pytest.approx(pseudo, rel=1e-5)


@pytest.mark.parametrize("pseudo_labels", ["soft", "hard"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sum_of_the_targets_is_the_weight_of_an_image(batch, pseudo_labels, temperature):
    logits, labels, targets = batch
    weights = torch.linspace(0.2, 1.8, U)
    train = TrainConfig(pseudo_labels=pseudo_labels, temperature=temperature)
    weighted = compute_losses(logits, labels, targets * weights[:, None], train).pseudo.item()
    single = [reference((logits[[*range(B), B + i]], labels, targets[i : i + 1]), train)[1] for i in range(U)]
    assert weighted == pytest.approx(float(np.mean(weights.numpy() * single)), rel=1e-5)


@pytest.mark.parametrize(
    ("weighting", "labeled_weight", "pseudo_weight"),
    [("sum", 1, U / B), ("mean", 1 / (1 + U / B), (U / B) / (1 + U / B)), ("equal", 1, 1)],
)
def test_loss_weightings_are_those_of_paper_and_code(batch, weighting, labeled_weight, pseudo_weight):
    train = TrainConfig(weighting=weighting)
    labeled, pseudo = reference(batch, train)
    expected = labeled_weight * labeled + pseudo_weight * pseudo
    assert compute_losses(*batch, train).total.item() == pytest.approx(expected, rel=1e-5)


def test_sum_weighting_divides_the_sum_by_the_labeled_batch(batch):
    logits, labels, targets = batch
    train = TrainConfig(label_smoothing=0.0)
    logs = log_softmax(logits)
    total = -(np.eye(C)[labels.numpy()] * logs[:B]).sum() - (targets.numpy() * logs[B:]).sum()
    assert compute_losses(*batch, train).total.item() == pytest.approx(total / B, rel=1e-5)


def test_loss_of_a_teacher_has_no_pseudo_part(batch):
    logits, labels, _ = batch
    result = compute_losses(logits[:B], labels, torch.zeros(0, C), TrainConfig())
    assert result.pseudo.item() == 0
    assert result.total.item() == result.labeled.item()


def test_apply_temperature_equals_softmax_at_that_temperature():
    logits = torch.randn(7, C, generator=torch.Generator().manual_seed(0))
    for temperature in (0.5, 1.0, 4.0):
        torch.testing.assert_close(apply_temperature(logits.softmax(1), temperature), (logits / temperature).softmax(1))


def test_apply_temperature_is_finite_at_low_temperatures():
    unsure = torch.tensor([[0.3, 0.25, 0.25, 0.2], [1.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(
        apply_temperature(unsure, 0.01), torch.tensor([[1.0, 0, 0, 0], [1.0, 0, 0, 0]]), atol=1e-6, rtol=0
    )


def test_hard_pseudo_labels_do_not_depend_on_the_temperature(batch):
    cold, hot = (compute_losses(*batch, TrainConfig(pseudo_labels="hard", temperature=t)).pseudo for t in (0.1, 10.0))
    assert cold == hot


@pytest.mark.parametrize("weighting", ["sum", "mean", "equal"])
def test_loss_of_equal_parts_has_the_gradient_of_the_whole(batch, weighting):
    logits, labels, targets = batch
    train = TrainConfig(weighting=weighting)
    whole, parts = (logits.clone().requires_grad_() for _ in range(2))
    compute_losses(whole, labels, targets, train).total.backward()
    for index in range(2):
        rows = torch.cat([parts[:B].chunk(2)[index], parts[B:].chunk(2)[index]])
        (compute_losses(rows, labels.chunk(2)[index], targets.chunk(2)[index], train).total / 2).backward()
    torch.testing.assert_close(parts.grad, whole.grad)


def make_mixed() -> MixedLabels:
    generator = torch.Generator().manual_seed(9)
    return MixedLabels(
        torch.randint(0, C, (B,), generator=generator),
        torch.randn(U, C, generator=generator).softmax(1),
        torch.rand(B + U, generator=generator),
    )


@pytest.mark.parametrize("pseudo_labels", ["soft", "hard"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_mixed_images_learn_both_labels_by_their_shares(batch, pseudo_labels, temperature):
    train = TrainConfig(pseudo_labels=pseudo_labels, temperature=temperature, label_smoothing=0.1)
    logits, labels, targets = batch
    mixed = make_mixed()
    # Images of the pool have weights, which are the sums of their targets.
    targets = targets * torch.linspace(0.5, 1.5, U)[:, None]
    mixed = mixed._replace(targets=mixed.targets * torch.linspace(1.2, 0.8, U)[:, None])
    logs, shares = log_softmax(logits), mixed.shares.numpy().astype(np.float64)[:, None]

    def soften(values):
        weights = values.numpy().astype(np.float64).sum(1, keepdims=True)
        if pseudo_labels == "hard":
            return weights * smoothed(values.numpy().argmax(1), 0.1)
        powers = values.numpy().astype(np.float64) ** (1 / temperature)
        return weights * powers / powers.sum(1, keepdims=True)

    wanted_labeled = shares[:B] * smoothed(labels.numpy(), 0.1) + (1 - shares[:B]) * smoothed(mixed.class_ids.numpy(), 0.1)
    wanted_pseudo = shares[B:] * soften(targets) + (1 - shares[B:]) * soften(mixed.targets)
    result = compute_losses(logits, labels, targets, train, mixed)
    assert result.labeled.item() == pytest.approx(-(wanted_labeled * logs[:B]).sum(1).mean(), rel=1e-5)
    assert result.pseudo.item() == pytest.approx(-(wanted_pseudo * logs[B:]).sum(1).mean(), rel=1e-5)


def test_shares_of_one_are_no_mixing(batch):
    alone = make_mixed()._replace(shares=torch.ones(B + U))
    mixed, plain = (compute_losses(*batch, TrainConfig(), labels).total.item() for labels in (alone, None))
    assert mixed == pytest.approx(plain, rel=1e-6)


def test_main_labels_are_those_of_the_larger_share(batch):
    _, labels, targets = batch
    mixed = make_mixed()
    main_labels, main_targets = find_main_labels(labels, targets, mixed)
    for index in range(B):
        assert main_labels[index] == (labels if mixed.shares[index] >= 0.5 else mixed.class_ids)[index]
    for index in range(U):
        assert torch.equal(main_targets[index], (targets if mixed.shares[B + index] >= 0.5 else mixed.targets)[index])
    assert find_main_labels(labels, targets, None) == (labels, targets)


@pytest.mark.parametrize(
    ("optimizer", "weighting", "expected"),
    [
        ("rmsprop", "auto", "sum"),
        ("sgd", "auto", "mean"),
        ("adamw", "auto", "mean"),
        ("sgd", "sum", "sum"),
        ("sgd", "equal", "equal"),
    ],
)
def test_weighting_auto_is_the_reference_codes_for_its_optimizer(optimizer, weighting, expected):
    train = TrainConfig(optimizer=OptimizerConfig(name=optimizer), weighting=weighting)
    assert train.loss_weighting == expected


@pytest.mark.parametrize("weighting", ["sum", "mean", "equal"])
@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop"])
def test_sum_loss_weights_is_the_scale_of_the_loss(weighting, optimizer):
    """The loss of images that are all alike is the scale times that of one."""
    train = TrainConfig(optimizer=OptimizerConfig(name=optimizer), weighting=weighting, label_smoothing=0)
    logits = torch.tensor([[1.0, 2.0, 0.5, 0.0, 0.0]]).repeat(B + U, 1)
    labels = torch.full((B,), 2)
    result = compute_losses(logits, labels, torch.eye(C)[torch.full((U,), 2)], train)
    assert result.total.item() == pytest.approx(sum_loss_weights(train, U / B) * result.labeled.item(), rel=1e-6)
    assert sum_loss_weights(train, 0) == 1
