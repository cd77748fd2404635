"""One training from data to a model on disk: the first teacher, or a student of a teacher's labels."""

import torch
from torch import nn

from ns.config.schema import ModelConfig, RoleConfig
from ns.data.loading.stream import LabeledImages, PseudoLabeledImages
from ns.data.prepared import PreparedData
from ns.labeling.label_set import LabelSet
from ns.labeling.pseudo_label_dataset import load_pseudo_labels
from ns.labeling.selection import Selection
from ns.modeling import factory as models
from ns.modeling.distributed import World
from ns.modeling.manifest import FINETUNED, Lineage, ModelManifest, digest_weights
from ns.modeling.precision import choose
from ns.modeling.predictor import make_inference_workload
from ns.storage import Store
from ns.training import checkpoint
from ns.training.loop import TrainingResult, train_model
from ns.training.monitor import Monitor
from ns.training.plan import make_finetuning_role, plan_finetuning, plan_training
from ns.training.warm_start import copy_weights, read_model_weights, read_weights


def train_and_save(
    model_store: Store,
    checkpoints: Store,
    root: Store,
    role: RoleConfig,
    prepared: PreparedData,
    selection: Selection | None,
    *,
    generation: int,
    seed: int,
    teacher: Store | None,
    config_digest: str,
    inference_batch: int,
    world: World,
    run_store: Store,
) -> None:
    """Trains a teacher (no selection) or a student, and writes the model into `folder`; then fine-tunes it, if the role says
    so, into FINETUNED below. What is there already is not trained again.

    `inference_batch`: images in a forward pass of labeling, for which the model's inference precision is chosen.
    `world`: the processes that do this together; the first one writes. `notes`: folder of the run.
    """
    labeled_store, labeled_dataset = prepared.labeled.open_dataset(root)
    labeled = LabeledImages(labeled_store, labeled_dataset)
    classes = labeled_dataset.classes
    lineage = Lineage(
        config=config_digest,
        labeled=labeled_dataset.digest,
        teacher=ModelManifest.load(teacher).digest if teacher else None,
        label_set=selection.label_set if selection else None,
        selection=selection.digest if selection else None,
        init=digest_weights(role.train.init_uri) if role.train.init_uri else None,
    )

    def make_monitor(role: RoleConfig, name: str) -> Monitor:
        return Monitor(run_store if world.is_main else None, name=f"{generation}-{name}", tensorboard=role.train.tensorboard)

    def save_trained(store: Store, role: RoleConfig, network: nn.Module, trained: TrainingResult, lineage: Lineage) -> None:
        fields = {
            "generation": generation,
            "model": _with_inference_precision(role.model, network, batch=inference_batch),
            "noise": role.noise,
            "classes": classes,
            "parameters": models.count_parameters(network),
            "steps": trained.steps,
            "training_mode": trained.mode,
            "lineage": lineage,
        }
        # Another run may have trained the same beside this one, on another machine to other weights: what is there has been read.
        if world.is_main and not store.exists(ModelManifest.filename):
            models.save_model(store, trained.weights, fields, trained.history)
        world.barrier()

    if not world.broadcast(lambda: "there" if model_store.exists(ModelManifest.filename) else ""):
        torch.manual_seed(seed)
        network = models.build_model(role.model, role.noise, len(classes))
        if role.train.init_uri:
            copy_weights(network, read_weights(role.train.init_uri), classes)
        elif teacher and role.train.init == "teacher":
            copy_weights(network, read_model_weights(teacher), classes)
        pseudo = _open_pseudo_labeled(root, prepared, selection) if selection else None
        plan = plan_training(role, labeled.samples)
        trained = train_model(
            network,
            plan,
            labeled,
            pseudo,
            classes=len(classes),
            seed=seed,
            checkpoints=checkpoints,
            world=world,
            monitor=make_monitor(role, "train"),
        )
        save_trained(model_store, role, network, trained, lineage)
        if world.is_main:
            checkpoint.clear_checkpoints(checkpoints)

    manifest = ModelManifest.load(model_store)
    tuned_store = model_store.at(FINETUNED)
    if role.train.finetune and not world.broadcast(lambda: "there" if tuned_store.exists(ModelManifest.filename) else ""):
        tuned_role = make_finetuning_role(role, role.train.finetune)
        torch.manual_seed(seed)
        network = models.build_model(tuned_role.model, tuned_role.noise, len(classes))
        network.load_state_dict(models.load_weights(model_store, manifest))
        plan = plan_finetuning(role, role.train.finetune, network, labeled.samples)
        checkpoints = checkpoints.at(FINETUNED)
        trained = train_model(
            network,
            plan,
            labeled,
            None,
            classes=len(classes),
            seed=seed,
            checkpoints=checkpoints,
            world=world,
            monitor=make_monitor(role, "finetune"),
        )
        started_from = lineage.model_copy(update={"init": manifest.weights_sha256})
        save_trained(tuned_store, tuned_role, network, trained, started_from)
        if world.is_main:
            checkpoint.clear_checkpoints(checkpoints)


def _open_pseudo_labeled(root: Store, prepared: PreparedData, selection: Selection) -> PseudoLabeledImages:
    label_set_store = root.at(selection.label_set_key)
    pool_store, pool = prepared.pool.open_dataset(root)
    return load_pseudo_labels(label_set_store, LabelSet.load(label_set_store), selection, pool_store, pool)


def _with_inference_precision(model: ModelConfig, network: nn.Module, *, batch: int) -> ModelConfig:
    """The model as it will label and be evaluated: an automatic precision is decided, and becomes part of what it is."""
    if model.inference_precision != "auto":
        return model
    # Whether to compile is another question, asked by whoever knows how much there is to do.
    mode = choose(make_inference_workload(network, model, batch), images=0)
    return model.model_copy(update={"inference_precision": mode.precision})
