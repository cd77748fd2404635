"""One training from data to a model on disk: the first teacher, or a student of a teacher's labels."""

import torch
from torch import nn

from ns import log, models
from ns.card import MANIFEST as CARD
from ns.card import Lineage, ModelCard
from ns.config import RoleConfig
from ns.data.prepared import Prepared
from ns.data.stream import Labelled
from ns.label.labelset import MANIFEST as LABEL_SET
from ns.label.labelset import LabelSet
from ns.label.selection import Selection
from ns.label.targets import pseudo_labelled
from ns.store import Store
from ns.train import checkpoint
from ns.train.loop import train


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
) -> ModelCard:
    """Trains a teacher (no selection) or a student, and writes the model into `folder`."""
    labelled_folder, labelled = prepared.labelled.open(root)
    classes = len(labelled.classes)
    torch.manual_seed(seed)
    network = models.build(role.model, role.noise, classes)
    teacher_card = ModelCard.read(teacher, CARD) if teacher else None
    if teacher and teacher_card and role.train.init == "teacher":
        _warm_start(network, teacher, teacher_card)

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
            "model": role.model,
            "noise": role.noise,
            "classes": labelled.classes,
            "parameters": models.parameter_count(network),
            "steps": trained.steps,
            "lineage": Lineage(
                config=config_digest,
                labelled=labelled.digest,
                teacher=teacher_card.digest if teacher_card else None,
                label_set=selection.label_set if selection else None,
                selection=selection.digest if selection else None,
            ),
        },
        trained.history,
    )
    checkpoint.clear(checkpoints)
    return card


def _warm_start(network: nn.Module, teacher: Store, card: ModelCard) -> None:
    """Copies the teacher's averaged weights where names and shapes agree; the rest (a wider layer, a new head) starts fresh."""
    own = network.state_dict()
    known = models.load_weights(teacher, card)
    fitting = {name: value for name, value in known.items() if name in own and own[name].shape == value.shape}
    network.load_state_dict({**own, **fitting})
    log.get().info("warm start", tensors=len(fitting), of=len(own))
