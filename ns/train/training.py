"""One training from data to a model on disk: the first teacher, or a student of a teacher's labels."""

import torch
from torch import nn

from ns import models
from ns.card import MANIFEST as CARD
from ns.card import Lineage, ModelCard, weights_digest
from ns.config import ModelConfig, RoleConfig
from ns.data.prepared import Prepared
from ns.data.stream import Labelled
from ns.inference import inference_workload
from ns.label.labelset import MANIFEST as LABEL_SET
from ns.label.labelset import LabelSet
from ns.label.selection import Selection
from ns.label.targets import pseudo_labelled
from ns.precision import choose
from ns.store import Store
from ns.train import checkpoint
from ns.train.loop import train
from ns.train.warm_start import model_weights, start_from, weights_at


def train_and_save(
    folder: Store,
    checkpoints: Store,
    root: Store,
    role: RoleConfig,
    prepared: Prepared,
    selection: Selection | None,
    *,
    generation: int,
    seed: int,
    teacher: Store | None,
    config_digest: str,
    inference_batch: int,
) -> ModelCard:
    """Trains a teacher (no selection) or a student, and writes the model into `folder`.

    `inference_batch`: images in a forward pass of labelling, for which the model's inference precision is chosen.
    """
    labelled_folder, labelled = prepared.labelled.open(root)
    classes = len(labelled.classes)
    torch.manual_seed(seed)
    network = models.build(role.model, role.noise, classes)
    teacher_card = ModelCard.read(teacher, CARD) if teacher else None
    place = role.train.init_place
    if place:
        start_from(network, weights_at(place), labelled.classes)
    elif teacher and role.train.init == "teacher":
        start_from(network, model_weights(teacher), labelled.classes)

    pseudo = None
    if selection:
        labels = root.at(selection.labels)
        pool_folder, pool = prepared.pool.open(root)
        pseudo = pseudo_labelled(labels, LabelSet.read(labels, LABEL_SET), selection, pool_folder, pool)

    trained = train(
        network,
        role,
        Labelled(labelled_folder, labelled),
        pseudo,
        classes=classes,
        seed=seed,
        checkpoints=checkpoints,
    )
    card = models.save(
        folder,
        trained.weights,
        {
            "generation": generation,
            "model": _with_inference_precision(role.model, network, batch=inference_batch),
            "noise": role.noise,
            "classes": labelled.classes,
            "parameters": models.parameter_count(network),
            "steps": trained.steps,
            "training_mode": trained.mode,
            "lineage": Lineage(
                config=config_digest,
                labelled=labelled.digest,
                teacher=teacher_card.digest if teacher_card else None,
                label_set=selection.label_set if selection else None,
                selection=selection.digest if selection else None,
                init=weights_digest(place) if place else None,
            ),
        },
        trained.history,
    )
    checkpoint.clear(checkpoints)
    return card


def _with_inference_precision(model: ModelConfig, network: nn.Module, *, batch: int) -> ModelConfig:
    """The model as it will label and be evaluated: an automatic precision is decided, and becomes part of what it is."""
    if model.inference_precision != "auto":
        return model
    # Whether to compile is another question, asked by whoever knows how much there is to do.
    mode = choose(inference_workload(network, model, batch), images=0)
    return model.model_copy(update={"inference_precision": mode.precision})
