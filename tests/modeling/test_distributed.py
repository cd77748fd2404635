import json
import os
import random
import signal

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from timm.layers import BatchNormAct2d
from torch import nn

from ns.core.errors import ConfigError, Interrupted, TrainingError
from ns.modeling.distributed import (
    SINGLE,
    World,
    convert_batch_norms,
    count_local_processes,
    launch_processes,
    sync_batch_norms,
    sync_normalize,
)
from tests.training.together import prepare_folder, train_in_forks

CALM = {"noise": {"dropout": 0, "stochastic_depth": 0}}
"""What processes draw by themselves is off; what follows from an image's place in the stream is on."""


def launch(folder, processes, **options):
    prepare_folder(folder)
    launch_processes(processes, "tests.training.together", [str(folder), json.dumps(options)])


def together(folder, processes, **options):
    """Trains without torchrun, which takes seconds to start; returns weights, history, and for each process what it saw."""
    prepare_folder(folder)
    assert set(train_in_forks(processes, folder, options, {})) == {0}
    return read_outcome(folder, processes)


def read_outcome(folder, processes):
    seen = [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(processes)]
    return load_file(folder / "trained.safetensors"), json.loads((folder / "trained.json").read_text()), seen


@pytest.fixture
def group(tmp_path):
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_synced_batch_norm_equals_batch_norm(group, momentum):
    ours, theirs = (BatchNormAct2d(3, momentum=momentum, act_layer=nn.SiLU) for _ in range(2))
    network = sync_batch_norms(nn.Sequential(nn.Conv2d(3, 3, 1), ours, nn.BatchNorm2d(3)), World(0, 1))
    assert [type(module).__mro__[1] for module in network[1:]] == [BatchNormAct2d, nn.BatchNorm2d]
    for scale in (1, 5):
        images = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(scale)) * scale + 2
        left, right = images.clone().requires_grad_(), images.clone().requires_grad_()
        torch.testing.assert_close(ours(left), theirs(right), rtol=1e-4, atol=1e-5)
        (ours(left) ** 3).sum().backward()
        (theirs(right) ** 3).sum().backward()
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-4)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.eval()(images), ours(images))
    assert sync_normalize(ours, images.bfloat16(), World(0, 1)).dtype == torch.bfloat16


def test_convert_batch_norms_keeps_activations_when_blocks_are_unfrozen():
    """A network is wrapped once more when frozen blocks begin to learn."""
    network = nn.Sequential(nn.Conv2d(3, 3, 1), BatchNormAct2d(3, act_layer=nn.SiLU), nn.BatchNorm2d(3))
    weight = network[1].weight
    once = convert_batch_norms(network).eval()
    images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    before = once(images)
    twice = convert_batch_norms(once)
    assert twice[1].weight is weight
    assert isinstance(twice[1], nn.SyncBatchNorm)
    assert torch.equal(twice(images), before)


def test_sync_batch_norms_refuses_other_kinds():
    with pytest.raises(ConfigError, match=r"0: BatchNorm3d cannot be shared by processes; set train.processes: 1"):
        sync_batch_norms(nn.Sequential(nn.BatchNorm3d(2)), World(0, 2))


def test_single_world_needs_no_group():
    values = torch.ones(2)
    assert SINGLE.all_reduce_mean(values) is values
    assert SINGLE.any_rank(True, False) == (True, False)
    assert SINGLE.all_gather(7) == [7]
    assert SINGLE.broadcast(lambda: "yes") == "yes"
    assert count_local_processes(3) == 3
    assert count_local_processes("auto") == max(1, torch.cuda.device_count())


@pytest.mark.integration
@pytest.mark.timeout(300)
@pytest.mark.parametrize("noise", [{}, {"mixup": 0.8, "cutmix": 1.0, "erasing": 0.5}, {"mixup": 0.8, "pool": "none"}])
def test_two_processes_train_like_one(tmp_path, noise):
    # Five steps: rounding grows threefold with each step in so small a network. Gradients or learning rates
    # that are a tenth too large move the losses by a hundred times what is allowed here.
    few = {"noise": CALM["noise"] | noise, "epochs": 1, "optimizer": {"lr": 0.2, "warmup_epochs": 0}}
    alone = together(tmp_path / "1", 1, **few)
    both = together(tmp_path / "2", 2, **few)
    for step, images in alone[2][0].items():
        parts = [seen[step] for seen in both[2]]
        # Half of the labeled images to each, and half of the others: the order is that of one process.
        assert images == [*parts[0][:6], *parts[1][:6], *parts[0][6:], *parts[1][6:]], step
    assert len(alone[1]) == len(both[1]) == 5
    for one, two in zip(alone[1], both[1], strict=True):
        assert (one.pop("processes"), two.pop("processes")) == (1, 2)
        assert one == pytest.approx(two, rel=5e-4)
    for name, value in alone[0].items():
        torch.testing.assert_close(both[0][name], value, rtol=1e-3, atol=1e-3)


@pytest.mark.integration
@pytest.mark.timeout(300)
def test_accumulated_gradients_are_synced_once_per_step(tmp_path):
    """Two processes with two parts each do what one process does with two parts of twice the size."""
    one = together(tmp_path / "1", 1, accumulate=2, noise={**CALM["noise"], "randaugment_layers": 0}, crop="none", epochs=1)
    two = together(tmp_path / "2", 2, accumulate=2, noise={**CALM["noise"], "randaugment_layers": 0}, crop="none", epochs=1)
    assert [point["images"] for point in one[1]] == [point["images"] for point in two[1]]
    assert one[1][0]["loss"] == pytest.approx(two[1][0]["loss"], rel=0.1)


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("processes", [1, 2])
def test_training_killed_at_random_steps_ends_bit_for_bit_the_same(tmp_path, processes):
    # With dropout and stochastic depth: their draws follow from the step too.
    calm = together(tmp_path / "calm", processes, checkpoint_seconds=0)
    steps = sorted(random.Random(processes).sample(range(2, len(calm[1])), 5))
    killed = tmp_path / "killed"
    prepare_folder(killed)
    for step in steps:
        codes = train_in_forks(processes, killed, {"checkpoint_seconds": 0}, {"KILL_AT": str(step)})
        assert codes.count(-signal.SIGKILL) == 1
        assert 0 not in codes
    weights, history, _ = together(killed, processes, checkpoint_seconds=0)
    assert all(torch.equal(weights[name], value) for name, value in calm[0].items())
    assert history == calm[1]


@pytest.mark.integration
@pytest.mark.timeout(300)
def test_launched_processes_that_are_killed_or_asked_to_stop_continue(tmp_path, monkeypatch, capfd):
    calm = together(tmp_path / "calm", 2)
    stopped = tmp_path / "stopped"
    monkeypatch.setenv("KILL_AT", "3")
    with pytest.raises(TrainingError, match="one of 2 training processes exited without an error message"):
        launch(tmp_path / "killed", 2)
    monkeypatch.delenv("KILL_AT")
    monkeypatch.setenv("LAUNCHER", str(os.getpid()))
    monkeypatch.setenv("ASK_AT", "9")
    capfd.readouterr()
    with pytest.raises(Interrupted, match=r"stopped at step \d+ of 21; the same command continues there"):
        launch(stopped, 2)
    assert "Traceback" not in capfd.readouterr().err  # torchrun's own
    (kept,) = (stopped / "checkpoints").iterdir()
    assert kept.name[:11] == "step-000000"
    monkeypatch.delenv("ASK_AT")
    launch(stopped, 2)
    weights, history, _ = read_outcome(stopped, 2)
    assert all(torch.equal(weights[name], value) for name, value in calm[0].items())
    assert history == calm[1]


@pytest.mark.integration
@pytest.mark.timeout(120)
def test_launch_processes_raises_the_first_error(tmp_path):
    with pytest.raises(ConfigError, match=r"12 labeled images must be a multiple of processes × train.accumulate, 2 × 4"):
        launch(tmp_path, 2, accumulate=4)
