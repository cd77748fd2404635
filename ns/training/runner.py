"""One training from data to a model on disk: the first teacher, or a student of a teacher's labels."""

import torch
from torch import nn

from ns.config.schema import ModelConfig, RoleConfig
from ns.data.loading.stream import Labelled, PseudoLabelled
from ns.data.prepared import Prepared
from ns.labeling.label_set import MANIFEST as LABEL_SET
from ns.labeling.label_set import LabelSet
from ns.labeling.pseudo_label_dataset import pseudo_labelled
from ns.labeling.selection import Selection
from ns.modeling import factory as models
from ns.modeling.distributed import World
from ns.modeling.manifest import FINETUNED, Lineage, ModelCard, weights_digest
from ns.modeling.manifest import MANIFEST as CARD
from ns.modeling.precision import choose
from ns.modeling.predictor import inference_workload
from ns.storage import Store
from ns.training import checkpoint
from ns.training.loop import Trained, train
from ns.training.monitor import Monitor
from ns.training.plan import finetuned_role, finetuning, training
from ns.training.warm_start import model_weights, start_from, weights_at


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
    world: World,
    notes: Store,
) -> None:
    """Trains a teacher (no selection) or a student, and writes the model into `folder`; then fine-tunes it, if the role says
    so, into FINETUNED below. What is there already is not trained again.

    `inference_batch`: images in a forward pass of labelling, for which the model's inference precision is chosen.
    `world`: the processes that do this together; the first one writes. `notes`: folder of the run.
    """
    labelled_folder, labelled_data = prepared.labelled.open(root)
    labelled = Labelled(labelled_folder, labelled_data)
    classes = labelled_data.classes
    lineage = Lineage(
        config=config_digest,
        labelled=labelled_data.digest,
        teacher=ModelCard.read(teacher, CARD).digest if teacher else None,
        label_set=selection.label_set if selection else None,
        selection=selection.digest if selection else None,
        init=weights_digest(role.train.init_place) if role.train.init_place else None,
    )

    def monitor(role: RoleConfig, name: str) -> Monitor:
        return Monitor(notes if world.first else None, name=f"{generation}-{name}", tensorboard=role.train.tensorboard)

    def save(place: Store, role: RoleConfig, network: nn.Module, trained: Trained, lineage: Lineage) -> None:
        fields = {
            "generation": generation,
            "model": _with_inference_precision(role.model, network, batch=inference_batch),
            "noise": role.noise,
            "classes": classes,
            "parameters": models.parameter_count(network),
            "steps": trained.steps,
            "training_mode": trained.mode,
            "lineage": lineage,
        }
        # Another run may have trained the same beside this one, on another machine to other weights: what is there has been read.
        if world.first and not place.exists(CARD):
            models.save(place, trained.weights, fields, trained.history)
        world.wait()

    if not world.first_says(lambda: "there" if folder.exists(CARD) else ""):
        torch.manual_seed(seed)
        network = models.build(role.model, role.noise, len(classes))
        if role.train.init_place:
            start_from(network, weights_at(role.train.init_place), classes)
        elif teacher and role.train.init == "teacher":
            start_from(network, model_weights(teacher), classes)
        pseudo = _pseudo_labelled(root, prepared, selection) if selection else None
        course = training(role, labelled.samples)
        trained = train(
            network,
            course,
            labelled,
            pseudo,
            classes=len(classes),
            seed=seed,
            checkpoints=checkpoints,
            world=world,
            monitor=monitor(role, "train"),
        )
        save(folder, role, network, trained, lineage)
        if world.first:
            checkpoint.clear(checkpoints)

    card = ModelCard.read(folder, CARD)
    tuned_folder = folder.at(FINETUNED)
    if role.train.finetune and not world.first_says(lambda: "there" if tuned_folder.exists(CARD) else ""):
        tuned = finetuned_role(role, role.train.finetune)
        torch.manual_seed(seed)
        network = models.build(tuned.model, tuned.noise, len(classes))
        network.load_state_dict(models.load_weights(folder, card))
        course = finetuning(role, role.train.finetune, network, labelled.samples)
        checkpoints = checkpoints.at(FINETUNED)
        trained = train(
            network,
            course,
            labelled,
            None,
            classes=len(classes),
            seed=seed,
            checkpoints=checkpoints,
            world=world,
            monitor=monitor(role, "finetune"),
        )
        started_from = lineage.model_copy(update={"init": card.weights_sha256})
        save(tuned_folder, tuned, network, trained, started_from)
        if world.first:
            checkpoint.clear(checkpoints)


def _pseudo_labelled(root: Store, prepared: Prepared, selection: Selection) -> PseudoLabelled:
    labels = root.at(selection.labels)
    pool_folder, pool = prepared.pool.open(root)
    return pseudo_labelled(labels, LabelSet.read(labels, LABEL_SET), selection, pool_folder, pool)


def _with_inference_precision(model: ModelConfig, network: nn.Module, *, batch: int) -> ModelConfig:
    """The model as it will label and be evaluated: an automatic precision is decided, and becomes part of what it is."""
    if model.inference_precision != "auto":
        return model
    # Whether to compile is another question, asked by whoever knows how much there is to do.
    mode = choose(inference_workload(network, model, batch), images=0)
    return model.model_copy(update={"inference_precision": mode.precision})
