"""Trainings as stages."""

import numpy as np
import pytest
import torch

from ns.evaluation.result import Evaluation
from ns.modeling.factory import load_model
from ns.modeling.manifest import FINETUNED, ModelManifest
from ns.modeling.predictor import Predictor
from ns.runs.lookup import find_best_model
from ns.runs.records import list_stage_notes
from ns.stages.evaluate import evaluate_generation
from ns.stages.prepare import prepare_data
from ns.stages.train import train_generation
from ns.storage import lease
from ns.training import runner as training
from tests.loop import open_tiny_run


@pytest.mark.integration
def test_finetuned_model_is_kept_beside_the_plain_one(digits_store, monkeypatch):
    overrides = ["teacher.train.epochs=4", "teacher.train.finetune={resolution: 40, epochs: 3, lr: 0.001}"]
    store = digits_store
    ref = open_tiny_run(store, *overrides)
    data = prepare_data(ref)
    model = train_generation(ref, data=data, generation=0)
    plain, tuned = (ModelManifest.load(store.at(folder)) for folder in (model, f"{model}/{FINETUNED}"))
    assert (plain.model.inference_resolution, tuned.model.inference_resolution) == (32, 40)
    assert (plain.steps, tuned.steps) == (4, 3)
    assert tuned.lineage.init == plain.weights_sha256 != tuned.weights_sha256
    assert tuned.noise.dropout == 0
    evaluate_generation(ref, data=data, generation=0, model=model)
    (note,) = [note for note in list_stage_notes(store, ref.run) if note.stage == "evaluate"]
    evaluated = {name: Evaluation.load_file(store, key).model for name, key in note.outputs.items()}
    assert evaluated == {
        **dict.fromkeys(["evaluation", "test"], plain.digest),
        **dict.fromkeys(["finetuned", "finetuned_test"], tuned.digest),
    }
    assert not list(store.list("store/checkpoints/"))
    # Killed between the two: what is there is not trained again.
    store.delete_prefix("store/ledger/train/")
    store.delete_prefix(f"{model}/{FINETUNED}/")
    monkeypatch.setattr(training, "plan_training", lambda *_: pytest.fail("trained again"))
    train_generation(ref, data=data, generation=0)
    assert ModelManifest.load(store.at(f"{model}/{FINETUNED}")).digest == tuned.digest


def test_training_that_was_silent_and_taken_over_keeps_the_first_model(digits_store, monkeypatch):
    store = digits_store
    ref = open_tiny_run(store, "teacher.train.epochs=2")
    data = prepare_data(ref)
    train, others = training.train_model, []
    # The first was silent for long, and is taken over.
    monkeypatch.setattr(lease, "STALE_SECONDS", 0)

    def overtaken(*arguments, **options):
        if not others:
            others.append("under way")
            others.append(ModelManifest.load(store.at(train_generation(ref, data=data, generation=0))))
        trained = train(*arguments, **options)
        if len(others) == 2:
            # As on a machine that adds up in another order.
            trained.weights["conv_stem.weight"] += 1e-6
        return trained

    monkeypatch.setattr(training, "train_model", overtaken)
    assert ModelManifest.load(store.at(train_generation(ref, data=data, generation=0))) == others[1]


def test_model_keeps_its_own_normalization(digits_store):
    """Weights from elsewhere want the mean and the deviation of their own training, everywhere."""
    store = digits_store
    half = [f"{field}.model.{name}=[0.5,0.5,0.5]" for field in ("teacher", "students.0") for name in ("mean", "std")]
    ref = open_tiny_run(store, *half, "teacher.train.epochs=2")
    data = prepare_data(ref)
    model = train_generation(ref, data=data, generation=0)
    manifest = ModelManifest.load(store.at(model))
    assert (manifest.mean, manifest.std) == ((0.5,) * 3, (0.5,) * 3)
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    network, _ = load_model(store.at(model))
    with torch.inference_mode():
        expected = network(torch.from_numpy(images).permute(0, 3, 1, 2) / 255 * 2 - 1)
        seen = Predictor(store.at(model), batch=4).compute_logits(torch.from_numpy(images))
    assert torch.allclose(seen, expected, atol=1e-4)


def test_other_normalization_of_initial_weights_is_told(finished_run, digits_store, capsys):
    store, ref = finished_run
    best_store = store.at(find_best_model(store, ref.run))
    best, weights_key = best_store.uri, ModelManifest.load(best_store).weights_key
    for overrides, told in (
        ([f"teacher.model.pretrained={best}"], False),
        ([f"teacher.model.pretrained={best}", "teacher.model.mean=[0.5,0.5,0.5]"], True),
        ([f"teacher.model.pretrained={best}/{weights_key}"], True),
        (["students.0.model.std=[0.5,0.5,0.5]", "students.0.train.init=teacher"], True),
    ):
        other = open_tiny_run(digits_store, *overrides)
        capsys.readouterr()
        prepare_data(other)
        captured = capsys.readouterr()
        assert ("images are normalized by model.mean" in captured.out + captured.err) is told, overrides
