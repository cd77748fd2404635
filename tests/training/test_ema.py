import pytest
import torch
from torch import nn

from ns.training.ema import Ema


def test_ema_decay_ramps_up_as_in_tensorflow():
    ema = Ema(nn.Linear(2, 2), 0.9999)
    assert ema.decay_at(0) == pytest.approx(1 / 10)
    assert ema.decay_at(90) == pytest.approx(91 / 100)
    assert ema.decay_at(10**6) == 0.9999


def test_ema_averages_statistics_and_copies_counters():
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ema = Ema(network, 0.5)
    expected = {name: value.clone().double() for name, value in network.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        network(torch.randn(8, 3, generator=generator))
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, value in network.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
    for name, value in ema.shadow.items():
        if name.endswith("num_batches_tracked"):
            assert value.item() == 20
        else:
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=1e-5)
    assert {"1.running_mean", "1.running_var"} <= set(ema.shadow)


def test_ema_copies_infinite_limits():
    """As those of Gemma's layers, which clamp nothing until they are calibrated."""
    network = nn.Linear(2, 2)
    network.register_buffer("lowest", torch.tensor([-torch.inf, 1.0]))
    ema = Ema(network, 0.9)
    ema.update(0)
    assert ema.shadow["lowest"].tolist() == [-torch.inf, 1.0]
