"""One training, from data to a model in the store: the first teacher, or a student of a teacher's labels."""

from collections.abc import Callable

import torch
from torch import nn

from ns.config.schema import ModelConfig, RoleConfig
from ns.core.mlflow_client import MlflowRun
from ns.data.loading.stream import LabeledImages, PseudoLabeledImages
from ns.data.prepared import PreparedData
from ns.labeling.label_set import LabelSet
from ns.labeling.pseudo_label_dataset import load_pseudo_labels
from ns.labeling.selection import Selection
from ns.modeling import factory as models
from ns.modeling.distributed import World
from ns.modeling.manifest import FINETUNED, Lineage, ModelManifest
from ns.modeling.precision import resolve_mode
from ns.modeling.pretrained import digest_pretrained, find_fetched
from ns.modeling.weight_names import fit_weights
from ns.storage import Store
from ns.training import checkpoint
from ns.training.loop import train_model
from ns.training.monitor import Monitor
from ns.training.plan import TrainingPlan, make_finetuning_role, plan_finetuning, plan_training
from ns.training.warm_start import copy_weights, read_model_weights, read_pretrained


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
    world: World,
    run_store: Store,
    open_mlflow_run: Callable[[Store], MlflowRun] | None = None,
) -> None:
    """Trains a teacher (no selection) or a student, and writes the model into `model_store`; then fine-tunes it, if the role says
    so, into FINETUNED below. A model that is there already is not trained again.

    `world`: the processes that train together; the main one writes. `run_store`: the folder of the run, for progress.
    `open_mlflow_run`: MLflow's run of the model that is written into a store.
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
    )

    def train(
        name: str,
        network: nn.Module,
        plan: TrainingPlan,
        pseudo: PseudoLabeledImages | None,
        store: Store,
        checkpoints: Store,
        init: dict[str, str | None],
    ) -> None:
        """Trains, and writes the model into `store`. `init`: the fields of its lineage that tell the weights it starts from."""
        progress_store = run_store if world.is_main else None
        monitor = Monitor(
            progress_store,
            name=f"{generation}-{name}" if selection or not generation else f"{generation}-{name}-baseline",
            tensorboard=role.train.tensorboard,
            mlflow_run=open_mlflow_run(store) if open_mlflow_run and world.is_main else None,
        )
        trained = train_model(
            network,
            plan,
            labeled,
            pseudo,
            classes=len(classes),
            seed=seed,
            checkpoints=checkpoints,
            world=world,
            monitor=monitor,
        )
        fields = {
            "generation": generation,
            "model": _describe_model(plan.role.model),
            "noise": plan.role.noise,
            "classes": classes,
            "mean": plan.role.model.mean,
            "std": plan.role.model.std,
            "parameters": models.count_parameters(network),
            "steps": trained.steps,
            "training_mode": trained.mode,
            "lineage": lineage.model_copy(update=init),
        }
        if world.is_main:
            models.save_model(store, trained.weights, fields, trained.history)
        world.barrier()

    def is_trained(store: Store) -> bool:
        """Whether the main process finds a whole model, so that all processes do the same."""
        return world.broadcast(lambda: str(models.find_model(store) is not None)) == "True"

    if not is_trained(model_store):
        torch.manual_seed(seed)
        network = models.build_model(role.model, role.noise, len(classes))
        init: dict[str, str | None] = {}
        if teacher and role.train.init == "teacher":
            copy_weights(network, read_model_weights(teacher), classes)
        elif role.model.pretrained:
            copy_weights(network, read_pretrained(role.model.pretrained, root), classes)
            init = _describe_pretrained(role.model.pretrained, root)
        pseudo = None
        if selection:
            label_set_store = root.at(selection.label_set_key)
            label_set = LabelSet.load(label_set_store)
            pseudo = load_pseudo_labels(label_set_store, label_set, selection, *prepared.pool.open_dataset(root))
        train("train", network, plan_training(role, labeled.samples), pseudo, model_store, checkpoints, init)

    finetuned_store = model_store.at(FINETUNED)
    if role.train.finetune and not is_trained(finetuned_store):
        manifest = ModelManifest.load(model_store)
        finetuning_role = make_finetuning_role(role, role.train.finetune)
        torch.manual_seed(seed)
        network = models.build_model(finetuning_role.model, finetuning_role.noise, len(classes))
        load_trained_weights(network, model_store, manifest)
        plan = plan_finetuning(role, role.train.finetune, labeled.samples)
        train("finetune", network, plan, None, finetuned_store, checkpoints.at(FINETUNED), {"init": manifest.weights_sha256})
    if world.is_main:
        # Also those of an attempt that was killed when its model was written.
        for finished in (checkpoints, checkpoints.at(FINETUNED)):
            checkpoint.clear_checkpoints(finished)


def load_trained_weights(network: nn.Module, store: Store, manifest: ModelManifest) -> None:
    """Loads the weights of a model into its network at another resolution: position embeddings, of networks that are built for one size
    of image, are resampled. Raises DataError for weights of another network."""
    tensors = models.load_weights(store, manifest)
    tensors |= fit_weights(network, tensors).tensors
    models.load_tensors_into(network, tensors, f"{store.uri}/{manifest.weights_key}")


def _describe_pretrained(pretrained: str, root: Store) -> dict[str, str | None]:
    """The fields of the lineage that tell which weights a training started from."""
    fetched = find_fetched(pretrained, root)
    about = {"init_source": fetched.source, "init_license": fetched.license} if fetched else {}
    return {"init": digest_pretrained(pretrained, root), **about}


def _describe_model(model: ModelConfig) -> ModelConfig:
    """The model as it will label and be evaluated: the precision that `auto` means here becomes part of it; the weights that it started
    from are in its lineage."""
    changes: dict[str, str | None] = {"pretrained": None}
    if model.inference_precision == "auto":
        mode = resolve_mode("auto", compiled=False, task="infer", device=models.get_best_device())
        changes["inference_precision"] = mode.precision
    return model.model_copy(update=changes)
