import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from multiprocessing import resource_sharer
from pathlib import Path

import pytest
import torch

from ns.config.schema import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    FinetuneConfig,
    ModelConfig,
    NoiseConfig,
    OptimizerConfig,
    RoleConfig,
    TrainConfig,
)
from ns.core import log
from ns.core.errors import ConfigError, DataError, Interrupted, TrainingError
from ns.data.importing.digits import write_digits
from ns.data.loading import stream
from ns.data.loading.stream import LabeledImages, PseudoLabeledImages
from ns.modeling import factory as models
from ns.modeling.precision import PrecisionMode
from ns.storage import LocalStore
from ns.training import checkpoint, loop
from ns.training.loop import train_model
from ns.training.loss import compute_losses
from ns.training.monitor import Monitor
from ns.training.plan import plan_finetuning, plan_training

CLASSES = 10
SHORT = {"labeled_batch": 10, "unlabeled_ratio": 1, "epochs": 2, "loader_workers": 0, "precision": "float32"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = LocalStore(tmp_path_factory.mktemp("digits"))
    return root, write_digits("digits:labeled", root.at("labeled")), write_digits("digits:heldout", root.at("heldout"))


def role(**train_fields) -> RoleConfig:
    optimizer = train_fields.pop("optimizer", OptimizerConfig(name="adamw", warmup_epochs=1))
    return RoleConfig(
        model=ModelConfig(arch="test_efficientnet", resolution=32, crop="pad"),
        noise=NoiseConfig(flip=False),
        train=TrainConfig(**{**SHORT, "optimizer": optimizer, **train_fields}),
    )


def fresh(config: RoleConfig, seed: int = 1) -> torch.nn.Module:
    torch.manual_seed(seed)
    return models.build_model(config.model, config.noise, CLASSES)


def run(data, folder, config: RoleConfig, seed: int = 1, pseudo_probability: float = 0.01):
    root, labeled, pool = data
    source = LabeledImages(root.at("labeled"), labeled)
    # The held-out digits serve as a pool here, with soft labels made up from their class.
    pool_source = LabeledImages(root.at("heldout"), pool)
    targets = [
        0.9 * torch.eye(CLASSES)[torch.from_numpy(shard)].numpy() + pseudo_probability for shard in pool_source.class_ids
    ]
    pseudo = PseudoLabeledImages(pool_source.source, targets.__getitem__, pool_source.copies)
    plan = plan_training(config, source.samples)
    return train_model(fresh(config, seed), plan, source, pseudo, classes=CLASSES, seed=seed, checkpoints=LocalStore(folder))


@pytest.fixture(scope="module")
def calm(data, tmp_path_factory):
    """A training of two epochs that nothing disturbed."""
    return run(data, tmp_path_factory.mktemp("calm"), role())


def same(left, right) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left) and left.keys() == right.keys()


@pytest.mark.parametrize(
    "optimizer", ["adamw", "muon", *(pytest.param(name, marks=pytest.mark.integration) for name in ("sgd", "rmsprop"))]
)
def test_resumed_training_ends_bit_for_bit_like_an_uninterrupted_one(data, tmp_path, monkeypatch, optimizer):
    config = role(checkpoint_seconds=0, optimizer=OptimizerConfig(name=optimizer, lr=0.05, warmup_epochs=1))
    calm = run(data, tmp_path / "calm", config)
    assert calm.steps == 10

    class Killed(BaseException):
        pass

    advance = log.Progress.update

    def kill_at(step: int):
        def interrupted(self, count=1, **facts):
            advance(self, count, **facts)
            if self.done == step * 20:
                raise Killed

        return interrupted

    # At step 4, and again at step 9: the checkpoints are those of the steps before.
    for step in (4, 9):
        monkeypatch.setattr(log.Progress, "update", kill_at(step))
        with pytest.raises(Killed):
            run(data, tmp_path / "killed", config)
    monkeypatch.setattr(log.Progress, "update", advance)
    resumed = run(data, tmp_path / "killed", config)
    assert same(resumed.weights, calm.weights)
    assert resumed.history == calm.history


def test_stopped_training_leaves_a_checkpoint_and_continues(data, calm, tmp_path, monkeypatch):
    advance = log.Progress.update

    def terminate(self, count=1, **facts):
        advance(self, count, **facts)
        if self.done == 7 * 20:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(log.Progress, "update", terminate)
    with pytest.raises(Interrupted, match="stopped at step 7 of 10; the same command continues there"):
        run(data, tmp_path / "stopped", role())
    monkeypatch.setattr(log.Progress, "update", advance)
    assert [path.name[:13] for path in (tmp_path / "stopped").iterdir()] == ["step-00000007"]
    assert same(run(data, tmp_path / "stopped", role()).weights, calm.weights)


@pytest.mark.parametrize(
    ("how", "asked_to_stop", "error", "message"),
    [
        ("Terminated.", True, Interrupted, "continues from the last checkpoint"),
        ("Killed.", False, TrainingError, "for want of memory; lower train.loader_workers"),
        ("Bus error. It is possible that …", False, TrainingError, "give the container more /dev/shm; lower"),
    ],
)
def test_loader_killed_during_a_step_is_explained(data, tmp_path, monkeypatch, how, asked_to_stop, error, message):
    def killed(*_):
        if asked_to_stop:
            os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError(f"DataLoader worker (pid 584) is killed by signal: {how}")

    monkeypatch.setattr(loop, "compute_losses", killed)
    with pytest.raises(error, match=message):
        run(data, tmp_path, role())


def test_loader_killed_while_waited_for_is_explained(data, tmp_path, monkeypatch):
    def kill(_self, _count=1, **_facts):
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    monkeypatch.setattr(log.Progress, "update", kill)
    config = role()
    config = config.model_copy(update={"train": config.train.model_copy(update={"loader_workers": 1})})
    with pytest.raises(TrainingError, match=r"a data loader's process was killed.*lower train.loader_workers"):
        run(data, tmp_path, config)


def test_loader_killed_is_explained_when_torch_says_it_again(data, tmp_path, monkeypatch):
    """Its handler of SIGCHLD raises wherever Python stands: here, while the handlers of signals are put back."""

    @contextmanager
    def end_badly(_handler):
        try:
            yield
        finally:
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    monkeypatch.setattr("ns.training.loop.handle_signals", end_badly)
    with pytest.raises(TrainingError, match="a data loader's process was killed"):
        run(data, tmp_path, role())


def test_loader_killed_while_handing_over_is_explained(data, tmp_path, monkeypatch):
    def reset(_ident):
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(resource_sharer._ResourceSharer, "get_connection", staticmethod(reset))
    config = role()
    config = config.model_copy(update={"train": config.train.model_copy(update={"loader_workers": 1})})
    with pytest.raises(TrainingError, match=r"a data loader's process was killed.*lower train.loader_workers"):
        run(data, tmp_path, config)


def test_frozen_layers_keep_their_weights_and_statistics(data, tmp_path):
    root, labeled, _ = data
    config = role(optimizer=OptimizerConfig(name="sgd", lr=1, warmup_epochs=0), weighting="mean")
    network = fresh(config)
    plan = plan_finetuning(config, FinetuneConfig(resolution=40, lr=1, frozen_share=0.5), labeled.samples)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    source = LabeledImages(root.at("labeled"), labeled)
    after = train_model(network, plan, source, None, classes=CLASSES, seed=1, checkpoints=LocalStore(tmp_path)).weights
    frozen = ("conv_stem.", "bn1.", "blocks.0.", "blocks.1.")
    for name, value in after.items():
        assert torch.equal(value, before[name]) == name.startswith(frozen), name


FROZEN = ("conv_stem.", "bn1.", "blocks.", "conv_head.", "bn2.")


def train_frozen(data, folder, **changes):
    """Trains the classifier of a network, and perhaps all of it later. Returns the weights before and after."""
    root, labeled, _ = data
    config = role(optimizer=OptimizerConfig(name="sgd", lr=1, warmup_epochs=0), weighting="mean", frozen_share=1.0, **changes)
    network = fresh(config)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    plan = plan_training(config, labeled.samples)
    source = LabeledImages(root.at("labeled"), labeled)
    store = LocalStore(folder)
    return before, train_model(network, plan, source, None, classes=CLASSES, seed=1, checkpoints=store).weights


def test_the_classifier_alone_learns_if_all_blocks_are_frozen(data, tmp_path):
    before, after = train_frozen(data, tmp_path)
    for name, value in after.items():
        assert torch.equal(value, before[name]) == name.startswith(FROZEN), name


def test_frozen_blocks_learn_from_the_epoch_on_that_unfreezes_them(data, tmp_path):
    _, alone = train_frozen(data, tmp_path / "never", unfreeze_epoch=1000.0)
    before, after = train_frozen(data, tmp_path / "later", unfreeze_epoch=1.0)
    assert not torch.equal(after["conv_stem.weight"], before["conv_stem.weight"])
    assert torch.equal(alone["conv_stem.weight"], before["conv_stem.weight"])
    assert not torch.equal(after["bn1.running_mean"], before["bn1.running_mean"])


def test_order_of_images_does_not_depend_on_loader_workers(data, calm, tmp_path):
    config = role()
    helped = config.model_copy(update={"train": config.train.model_copy(update={"loader_workers": 2})})
    assert same(run(data, tmp_path / "helped", helped).weights, calm.weights)


def test_training_continues_before_a_damaged_checkpoint(data, tmp_path, monkeypatch):
    config = role(checkpoint_seconds=0, checkpoints_kept=3)
    calm = run(data, tmp_path / "calm", config)
    kept = sorted((tmp_path / "calm").iterdir())
    assert len(kept) == 3
    kept[-1].write_bytes(kept[-1].read_bytes()[:-1] + b"x")
    again = run(data, tmp_path / "calm", config)
    assert again.steps == calm.steps
    assert same(again.weights, calm.weights)


def test_nonfinite_loss_stops_training(data, tmp_path):
    with pytest.raises(TrainingError, match=r"the loss was not finite in step 0 at learning rate 0; lower train.optimizer.lr"):
        run(data, tmp_path, role(checkpoint_seconds=0), pseudo_probability=float("nan"))
    assert not list(tmp_path.iterdir()), "a checkpoint of the broken state would break every later attempt"


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_shard_is_named_in_one_line(data, tmp_path, workers):
    root, labeled, _ = data
    folder = root.at("damaged")
    for shard in labeled.shards:
        whole = bytearray(root.at("labeled").get(shard.name))
        whole[1024 : 1024 + 60] = bytes(60)
        folder.put(shard.name, bytes(whole))
    config = role()
    config = config.model_copy(update={"train": config.train.model_copy(update={"loader_workers": workers})})
    network = models.build_model(config.model, config.noise, CLASSES)
    with pytest.raises(DataError) as caught:
        train_model(
            network,
            plan_training(config, labeled.samples),
            LabeledImages(folder, labeled),
            None,
            classes=CLASSES,
            seed=1,
            checkpoints=LocalStore(tmp_path),
        )
    assert "\n" not in str(caught.value)
    assert "damaged/shard-00000.tar" in str(caught.value)


SMALL_SHARED_MEMORY = """
import sys
from tests.training import test_loop
test_loop.train_with_loaders(sys.argv[1])
"""


def train_with_loaders(folder: str, resolution: int = 96) -> None:
    """A student's training whose steps of 2.2 MB do not fit four times into /dev/shm."""
    root = LocalStore(Path(folder))
    data = root, write_digits("digits:labeled", root.at("labeled")), write_digits("digits:heldout", root.at("heldout"))
    config = role(labeled_batch=20, unlabeled_ratio=3, epochs=4, loader_workers=2)
    config = config.model_copy(update={"model": config.model.model_copy(update={"resolution": resolution})})
    log.configure_logging()
    print("steps", run(data, root.at("checkpoints").root, config).steps)


@pytest.mark.integration
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("size", "said"), [("4m", "little shared memory"), ("64k", "even single images of 96 px need")])
def test_training_with_small_shared_memory_goes_on_or_says_so(tmp_path, size, said):
    """In a mount namespace of its own, as in a container. It stood still for good."""
    unshare = ["unshare", "--mount", "--map-root-user"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode:
        pytest.skip("mount namespaces are not allowed here")
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm && exec {sys.executable} -c '{SMALL_SHARED_MEMORY}' {tmp_path}"
    ended = subprocess.run([*unshare, "sh", "-c", mount], capture_output=True, text=True, check=False, timeout=100)
    output = ended.stdout + ended.stderr
    assert said in output
    assert ("steps 10" in output) == (size == "4m"), output
    assert ended.returncode == 0 or "ConfigError: train.loader_workers: 2:" in output


def one_step(data, tmp_path, **fields):
    """One step without noise: its settings, the network before it, the batch, and the outcome."""
    config = role(optimizer=OptimizerConfig(name="rmsprop", lr=2.0, warmup_epochs=0), epochs=0.2, **fields)
    noise = NoiseConfig(dropout=0, stochastic_depth=0, randaugment_layers=0, flip=False)
    model = config.model.model_copy(update={"crop": "none"})
    config = config.model_copy(update={"model": model, "noise": noise})
    network = fresh(config)
    seen = []
    take = stream.TrainingBatches.__getitem__

    def spy(self, step):
        seen.append(take(self, step))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream.TrainingBatches, "__getitem__", spy)
        trained = run(data, tmp_path, config)
    assert trained.steps == len(seen) == 1
    return config, network, seen[0], trained


def test_training_step_is_that_of_the_paper(data, tmp_path):
    """Loss, batch statistics over both kinds of images together, weight decay, RMSProp and average, written out."""
    config, network, batch, trained = one_step(data, tmp_path)
    images = models.Normalize(IMAGENET_MEAN, IMAGENET_STD)(batch.images)
    assert len(images) == 20
    logits = network.train()(images)
    wanted = torch.cat([0.9 * torch.eye(CLASSES)[batch.class_ids] + 0.1 / CLASSES, batch.targets])
    loss = -(wanted * logits.log_softmax(1)).sum() / config.train.labeled_batch  # the sum over all images, over B
    assert trained.history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    gradients = dict(zip(dict(network.named_parameters()), torch.autograd.grad(loss, list(network.parameters())), strict=True))
    rate = 2.0 * config.train.labeled_batch / 256
    assert trained.history[0]["lr"] == rate
    start = fresh(config)
    for name, weight in start.named_parameters():
        gradient = gradients[name] + (0 if ".bn" in f".{name}" else 1e-5 * weight)
        after = weight - rate * gradient / (0.9 + 0.1 * gradient**2 + 1e-3).sqrt()
        # The average's first decay is 1 / 10.
        torch.testing.assert_close(trained.weights[name], (0.1 * weight + 0.9 * after).detach(), rtol=1e-4, atol=1e-5)
    statistics = network.state_dict()  # changed by the one forward pass above
    for name, at_start in start.state_dict().items():
        if "running" not in name:
            continue
        expected = 0.1 * at_start + 0.9 * statistics[name]
        torch.testing.assert_close(trained.weights[name], expected, rtol=1e-4, atol=1e-5)


def test_accumulated_parts_make_one_step(data, tmp_path, monkeypatch):
    whole = one_step(data, tmp_path / "whole")[-1]
    passes = []
    monkeypatch.setattr(
        loop, "compute_losses", lambda logits, *rest: passes.append(len(logits)) or compute_losses(logits, *rest)
    )
    parts = one_step(data, tmp_path / "parts", accumulate=5)[-1]
    assert passes == [4] * 5
    assert parts.history[0]["images"] == whole.history[0]["images"]
    # Batch statistics differ between four images and twenty, so the loss agrees only roughly.
    assert parts.history[0]["loss"] == pytest.approx(whole.history[0]["loss"], rel=0.2)


def test_split_batch_makes_equal_parts_labeled_images_first():
    mixed = stream.MixedLabels(torch.arange(40, 44), torch.arange(60, 66), torch.arange(10) / 10)
    batch = stream.Batch(torch.arange(10), torch.arange(4), torch.arange(6), mixed)
    last, parts = zip(*loop.split_batch(batch, 2), strict=True)
    assert last == (False, True)
    assert [part.images.tolist() for part in parts] == [[0, 1, 4, 5, 6], [2, 3, 7, 8, 9]]
    assert [part.class_ids.tolist() for part in parts] == [[0, 1], [2, 3]]
    assert [part.targets.tolist() for part in parts] == [[0, 1, 2], [3, 4, 5]]
    assert [part.mixed.class_ids.tolist() for part in parts] == [[40, 41], [42, 43]]
    assert [part.mixed.targets.tolist() for part in parts] == [[60, 61, 62], [63, 64, 65]]
    assert [(part.mixed.shares * 10).int().tolist() for part in parts] == [[0, 1, 4, 5, 6], [2, 3, 7, 8, 9]]
    without_pseudo = [
        part for _, part in loop.split_batch(stream.Batch(torch.arange(4), torch.arange(4), torch.zeros(0, 3)), 2)
    ]
    assert [part.images.tolist() for part in without_pseudo] == [[0, 1], [2, 3]]
    assert [part.targets.shape for part in without_pseudo] == [(0, 3), (0, 3)]
    assert [part.mixed for part in without_pseudo] == [None, None]


def test_gradients_are_clipped_to_their_norm(data, tmp_path):
    sgd = OptimizerConfig(name="sgd", lr=10, momentum=0, weight_decay=0, warmup_epochs=0, clip_norm=0.01)
    config = role(optimizer=sgd, epochs=0.2, ema_decay=0)
    before = dict(fresh(config).named_parameters())
    after = run(data, tmp_path, config).weights
    moved = torch.cat([(after[name] - weight).flatten() for name, weight in before.items()])
    assert moved.norm().item() == pytest.approx(0.01 * 10 * 10 / 256, rel=1e-3)


@pytest.mark.parametrize("clip_norm", [None, 0.01])
@pytest.mark.parametrize(("ratio", "weighting", "length"), [(1, "auto", 1), (3, "mean", 1), (1, "sum", 2), (3, "sum", 4)])
def test_weighting_sum_scales_steps_and_clipping_of_sgd_alike(data, tmp_path, clip_norm, ratio, weighting, length):
    """Beside decay, which it leaves as it is: so `auto` is `mean` with SGD."""

    def move(folder, **fields):
        sgd = OptimizerConfig(name="sgd", lr=0.5, momentum=0, weight_decay=0, warmup_epochs=0, clip_norm=clip_norm)
        config = role(optimizer=sgd, epochs=0.2, ema_decay=0, unlabeled_ratio=ratio, **fields)
        config = config.model_copy(update={"noise": NoiseConfig(flip=False, dropout=0, stochastic_depth=0)})
        before = dict(fresh(config).named_parameters())
        after = run(data, folder, config).weights
        return torch.cat([(after[name] - weight).detach().flatten() for name, weight in before.items()])

    moved, by_mean = move(tmp_path / "a", weighting=weighting), move(tmp_path / "b", weighting="mean")
    torch.testing.assert_close(moved, length * by_mean, rtol=1e-3, atol=1e-6)
    if clip_norm:
        assert by_mean.norm().item() == pytest.approx(clip_norm * 0.5 * 10 / 256, rel=1e-3)


QUIET_POOL = NoiseConfig(flip=False, pool="none", dropout=0.5, stochastic_depth=0.5, mixup=0.8, cutmix=1.0, erasing=0.25)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_pool_without_noise_is_masked_in_each_part(data, tmp_path, monkeypatch, accumulate):
    confined, passes = [], []
    original = loop.FirstImagesNoise
    monkeypatch.setattr(loop, "FirstImagesNoise", lambda *counts: confined.append(counts) or original(*counts))
    monkeypatch.setattr(loop, "compute_losses", lambda logits, *rest: passes.append(rest) or compute_losses(logits, *rest))
    config = role(epochs=0.4, unlabeled_ratio=3, accumulate=accumulate).model_copy(update={"noise": QUIET_POOL})
    trained = run(data, tmp_path, config)
    assert trained.steps == 2
    assert confined == [(10 // accumulate, 40 // accumulate)] * 2 * accumulate
    for class_ids, targets, _, mixed in passes:
        # Labeled images are mixed, those of the pool are not.
        assert (mixed.shares[: len(class_ids)] < 1).any()
        assert (mixed.shares[len(class_ids) :] == 1).all()
        assert torch.equal(mixed.targets, targets)
    confined.clear()
    run(data, tmp_path / "same", config.model_copy(update={"noise": QUIET_POOL.model_copy(update={"pool": "network"})}))
    assert confined == []


def run_until_saved(data, folder, config, monkeypatch, *, step):
    """Trains, and is interrupted when the checkpoint of a step is written."""
    save = checkpoint.CheckpointWriter.save

    def stop_after(writer, state):
        save(writer, state)
        if state.step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.CheckpointWriter, "save", stop_after)
        with pytest.raises(KeyboardInterrupt):
            run(data, folder, config)


def test_mixed_training_with_a_quiet_pool_resumes_bit_for_bit(data, tmp_path, monkeypatch):
    config = role(checkpoint_seconds=0).model_copy(update={"noise": QUIET_POOL})
    calm = run(data, tmp_path / "calm", config)
    run_until_saved(data, tmp_path / "stopped", config, monkeypatch, step=7)
    resumed = run(data, tmp_path / "stopped", config)
    assert same(resumed.weights, calm.weights)
    assert resumed.history == calm.history


def test_history_has_one_point_per_interval(calm):
    assert [point["step"] for point in calm.history] == list(range(1, 11))
    for point in calm.history:
        assert 0 <= point["accuracy_labeled"] <= 1
        assert 0 <= point["agreement"] <= 1
        assert point["images"] == point["step"] * 20


def test_resumed_training_keeps_its_precision(data, tmp_path, monkeypatch):
    config = role(precision="auto", checkpoint_seconds=0)
    monkeypatch.setattr(loop, "resolve_mode", lambda *_, **__: PrecisionMode("bfloat16"))
    calm = run(data, tmp_path / "calm", config)
    assert calm.mode == "bfloat16"
    run_until_saved(data, tmp_path / "stopped", config, monkeypatch, step=4)
    monkeypatch.setattr(loop, "resolve_mode", lambda *_, **__: pytest.fail("chosen again"))
    resumed = run(data, tmp_path / "stopped", config)
    assert resumed.mode == "bfloat16"
    assert same(resumed.weights, calm.weights)


def test_resumed_training_needs_no_compiler(data, calm, tmp_path, monkeypatch):
    save = checkpoint.CheckpointWriter.save

    def stop_after(writer, state):
        state.mode = PrecisionMode("float32", compiled=True)
        save(writer, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.CheckpointWriter, "save", stop_after)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "stopped", role(checkpoint_seconds=0))
    monkeypatch.setattr(checkpoint.CheckpointWriter, "save", save)
    monkeypatch.setattr(loop, "can_compile", lambda _: False)
    resumed = run(data, tmp_path / "stopped", role())
    assert resumed.mode == "float32"
    assert same(resumed.weights, calm.weights)


def test_training_uses_the_configured_precision(data, calm, tmp_path):
    fast = run(data, tmp_path, role(precision="bfloat16"))
    assert (calm.mode, fast.mode) == ("float32", "bfloat16")
    assert not same(calm.weights, fast.weights)
    assert all(value.dtype != torch.bfloat16 for value in fast.weights.values())
    assert fast.history[-1]["loss"] == pytest.approx(calm.history[-1]["loss"], rel=0.1)


@pytest.mark.integration
def test_float16_scales_gradients_and_skips_steps_that_overflow(data, tmp_path, monkeypatch):
    """As on a GPU, but for its kernels: where the processor computes in float16, the same scaler works."""
    monkeypatch.setattr(loop, "_resolve_training_mode", lambda config, _: PrecisionMode(config.precision))
    updates, step = [], torch.optim.AdamW.step

    def counted(self, *arguments, **named):
        updates.append(True)
        return step(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    plain = run(data, tmp_path / "plain", role())
    assert len(updates) == plain.steps
    updates.clear()
    monkeypatch.setattr(torch.amp.GradScaler.__init__, "__defaults__", ("cuda", 2.0**18, 2.0, 0.5, 2000, True))
    optimizer = OptimizerConfig(name="adamw", warmup_epochs=1, clip_norm=1e3)
    scaled = run(data, tmp_path / "scaled", role(precision="float16", optimizer=optimizer))
    assert scaled.mode == "float16"
    assert 0 < len(updates) < scaled.steps
    assert all(value.isfinite().all() for value in scaled.weights.values())
    assert scaled.history[0]["loss"] == pytest.approx(plain.history[0]["loss"], rel=0.01)


def test_float16_is_refused_without_a_gpu(data, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=r"train.precision: invalid value 'float16' on cpu: float16 needs a GPU"):
        run(data, tmp_path, role(precision="float16"))


def test_nonfinite_step_leaves_a_list_of_its_images(data, tmp_path, monkeypatch):
    """Found at the next point, some steps later: the record says which step it was."""
    root, labeled, pool = data
    config = role()
    count = []

    def breaks(*arguments):
        count.append(1)
        found = compute_losses(*arguments)
        return found._replace(total=found.total * float("nan")) if len(count) == 5 else found

    monkeypatch.setattr(loop, "compute_losses", breaks)
    monkeypatch.setattr(loop, "HISTORY_POINTS", 2)
    source, pool_source = LabeledImages(root.at("labeled"), labeled), LabeledImages(root.at("heldout"), pool)
    targets = [torch.eye(CLASSES)[torch.from_numpy(shard)].numpy() for shard in pool_source.class_ids]
    pseudo = PseudoLabeledImages(pool_source.source, targets.__getitem__, pool_source.copies)
    seen = []
    take = stream.TrainingBatches.__getitem__
    monkeypatch.setattr(stream.TrainingBatches, "__getitem__", lambda self, step: seen.append(take(self, step)) or seen[-1])
    monitor = Monitor(LocalStore(tmp_path / "run"), name="1-train")
    with pytest.raises(
        TrainingError, match=r"not finite in step 4 at learning rate .* listed in file://.*/1-train-not-finite.json"
    ):
        train_model(
            fresh(config),
            plan_training(config, source.samples),
            source,
            pseudo,
            classes=CLASSES,
            seed=1,
            checkpoints=LocalStore(tmp_path / "checkpoints"),
            monitor=monitor,
        )
    kept = json.loads((tmp_path / "run" / "1-train-not-finite.json").read_text())
    index = source.source.read_index(0)
    class_ids = dict(zip(index.keys, source.class_ids[0].tolist(), strict=True))
    assert kept["step"] == 4
    assert [class_ids[key] for key in kept["labeled"]] == seen[4].class_ids.tolist()
    assert len(kept["pseudo_labeled"]) == 10


def test_out_of_memory_names_the_settings_to_lower(data, tmp_path, monkeypatch):
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")):

        def full(*_, error=error):
            raise error

        monkeypatch.setattr(loop, "compute_losses", full)
        with pytest.raises(
            TrainingError, match=r"out of memory with 10 labeled images per step, .* 32 px, in 1 part: raise train.accumulate"
        ):
            run(data, tmp_path, role())
