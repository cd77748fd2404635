"""Attacks against what can be worked out by hand: on a linear network the worst change is known."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ns.evaluation.robustness.attacks import AttackPlan, attack_images
from ns.modeling.predictor import Predictor

SIZE, CLASSES = 4, 3
KEYS = ["a", "b", "c", "d", "e"]


@pytest.fixture
def linear():
    """Images, labels, weights, and the network: logits = images · weights / 255."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (len(KEYS), SIZE, SIZE, 3), np.uint8))
    weights = torch.from_numpy(rng.normal(size=(SIZE * SIZE * 3, CLASSES)).astype(np.float32))
    labels = torch.arange(len(KEYS)) % CLASSES

    def logits(pixels):
        return pixels.flatten(1) @ weights / 255

    return images, labels, weights, logits


@pytest.mark.parametrize("epsilon", [0.5, 2, 16, 255])
def test_attack_images_fgsm_follows_analytic_gradient(linear, epsilon):
    images, labels, weights, logits = linear
    clean = images.flatten(1).double()
    probabilities = (clean @ weights.double() / 255).softmax(1)
    gradient = (probabilities - F.one_hot(labels, CLASSES)) @ weights.double().T
    expected = (clean + epsilon * gradient.sign()).clamp(0, 255)
    result = attack_images(logits, images, labels, AttackPlan.fgsm(epsilon), KEYS, 0)
    assert result.dtype == torch.float32
    assert torch.allclose(result.flatten(1).double(), expected, atol=1e-4)


def test_attack_images_pgd_ends_at_worst_corner_of_linear_network(linear):
    images, labels, weights, _ = linear
    labels = labels % 2
    # The loss grows with the margin of the other class, whose gradient is one direction everywhere: the corner is the worst place.
    toward = (weights[:, 1] - weights[:, 0]).sign()
    for plan in (AttackPlan.pgd(8, 10), AttackPlan.pgd(8, 50), AttackPlan.pgd(8, 40, 1)):
        result = attack_images(lambda pixels: pixels.flatten(1) @ weights[:, :2] / 255, images, labels, plan, KEYS, 0)
        signs = torch.where(labels == 0, 1, -1)[:, None] * toward[None]
        expected = (images.flatten(1).float() + 8 * signs).clamp(0, 255)
        assert torch.allclose(result.flatten(1), expected, atol=1e-3), plan


@pytest.mark.parametrize("plan", [AttackPlan.fgsm(16), AttackPlan.pgd(16, 3), AttackPlan.pgd(2, 5, 30)])
def test_attack_images_stays_within_epsilon_and_pixel_range(linear, plan):
    images, labels, _, logits = linear
    result = attack_images(logits, images, labels, plan, KEYS, 0)
    assert float((result - images.float()).abs().max()) <= plan.epsilon
    assert 0 <= float(result.min()) <= float(result.max()) <= 255


def test_attack_images_pgd_start_follows_seed_and_key(linear):
    images, labels, _, logits = linear
    plan = AttackPlan.pgd(4, 1, 0.25)
    together = attack_images(logits, images, labels, plan, KEYS, 0)
    order = [3, 1]
    apart = attack_images(logits, images[order], labels[order], plan, [KEYS[place] for place in order], 0)
    assert torch.equal(apart, together[order])
    assert not torch.equal(attack_images(logits, images, labels, plan, KEYS, 1), together)
    twins = attack_images(logits, images[:1].repeat(2, 1, 1, 1), labels[:1].repeat(2), plan, ["a", "b"], 0)
    assert not torch.equal(twins[0], twins[1])


def test_attack_plan_default_step_size():
    assert AttackPlan.pgd(16, 10).step_size == 4
    assert AttackPlan.pgd(16, 50).step_size == pytest.approx(0.8)
    assert str(AttackPlan.fgsm(2)) == "fgsm-2"
    assert str(AttackPlan.pgd(16, 10)) == "pgd-16-10x4"


def test_attack_images_through_normalization(model, make_pixels):
    predictor = Predictor(model, batch=8)
    images = torch.from_numpy(make_pixels(6, 32))
    labels = predictor.compute_logits(images).argmax(1)
    before = F.cross_entropy(predictor.compute_logits(images), labels, reduction="none")
    result = attack_images(predictor.compute_logits, images, labels, AttackPlan.pgd(8, 5), [str(n) for n in range(6)], 0)
    after = F.cross_entropy(predictor.compute_logits(result), labels, reduction="none")
    assert bool((after > before).all())
    # Against a gradient by differences: the step that FGSM takes is uphill in each of some pixels.
    step = (
        attack_images(predictor.compute_logits, images, labels, AttackPlan.fgsm(1), [str(n) for n in range(6)], 0)
        - images.float()
    )
    rng = np.random.default_rng(0)
    agree = 0
    for _ in range(20):
        y, x, channel = rng.integers(32), rng.integers(32), rng.integers(3)
        probe = images[:1].double()
        higher, lower = probe.clone(), probe.clone()
        higher[0, y, x, channel] += 2
        lower[0, y, x, channel] -= 2
        slopes = [F.cross_entropy(predictor.compute_logits(one.float()), labels[:1]) for one in (higher, lower)]
        agree += int(torch.sign(slopes[0] - slopes[1]) == step[0, y, x, channel].sign() or step[0, y, x, channel] == 0)
    assert agree >= 18
