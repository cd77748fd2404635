"""What foreign images are told by, made once per teacher. The first stage that needs it makes it: the evaluation, or a labeling task."""

from collections.abc import Mapping

from ns.core.digest import FOREIGN_SOURCES, digest_code
from ns.data.prepared import PreparedData
from ns.labeling.foreign import ForeignReference, OpenDataset, make_foreign_reference
from ns.stages.context import StageContext
from ns.stages.keys import read_model_digest


def prepare_foreign_reference(context: StageContext, prepared: PreparedData, teacher: str) -> str | None:
    """Key of the teacher's `foreign.json`; None if the experiment asks for no foreign score."""
    root, labeling = context.root, context.experiment.labeling
    if labeling.foreign_score == "none":
        return None
    assert prepared.calibration is not None
    labeled, calibration = prepared.labeled, prepared.calibration
    inputs = {
        "code": digest_code(*FOREIGN_SOURCES),
        "teacher": read_model_digest(root, teacher),
        "kind": labeling.foreign_score,
        "views": labeling.views,
        "labeled": labeled.digest if labeling.foreign_score == "distance" else None,
        "calibration": calibration.digest,
    }
    key = context.ledger.derive_key("foreign", "foreign-reference", inputs)

    def write_reference() -> Mapping[str, str]:
        make_foreign_reference(
            root.at(teacher),
            OpenDataset(*labeled.open_dataset(root)),
            OpenDataset(*calibration.open_dataset(root)),
            labeling,
            root.at(key),
        )
        return {"reference": f"{key}/{ForeignReference.filename}"}

    entry, _ = context.ledger.get_or_run("foreign-reference", inputs, write_reference)
    return entry.outputs["reference"]
