"""From what an experiment names to three datasets: found where they are, or imported into the store."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from ns.config import DataConfig, Experiment
from ns.data.dataset import MANIFEST, Dataset
from ns.data.ingest import import_images, walk
from ns.data.prepared import ROLES, Part, Prepared, Source
from ns.digest import code_digest, digest, short
from ns.errors import DataError
from ns.ledger import Ledger
from ns.store import Store, open_store

DIGITS = "digits:"
IMPORT = ("data/ingest.py", "data/digits.py", "data/shards.py", "data/decode.py", "data/dataset.py")


def prepare(experiment: Experiment, root: Store, ledger: Ledger) -> tuple[Prepared, bool]:
    """Prepares labelled images, pool and held-out images. Returns them and whether nothing had to be imported.

    Raises DataError when a source is missing or the parts contradict each other, ConfigError when the networks do not fit.
    """
    data = experiment.data
    _check_networks(experiment, ledger, None)
    labelled, labelled_reused = _source("labelled", data.labelled, data, root, ledger, None)
    _, labelled_set = labelled.open(root)
    if len(labelled_set.classes) < 2:
        raise DataError(f"data.labelled: {data.labelled}: has {len(labelled_set.classes)} class; at least 2 are needed")
    _check_networks(experiment, ledger, len(labelled_set.classes))
    heldout, heldout_reused = _source("heldout", data.heldout, data, root, ledger, labelled_set.classes)
    _, heldout_set = heldout.open(root)
    if heldout_set.classes != labelled_set.classes:
        raise DataError(
            f"data.heldout: {data.heldout}: its classes {_few(heldout_set.classes)} are not those of data.labelled, "
            f"{_few(labelled_set.classes)}; import it with the same classes in the same order"
        )
    pool, pool_reused = _source("pool", data.pool, data, root, ledger, None)
    if heldout.dataset == labelled.dataset:
        raise DataError(f"data.heldout: {data.heldout}: is the same as data.labelled; hold out images that are not trained on")
    return Prepared(labelled=labelled, pool=pool, heldout=heldout), labelled_reused and heldout_reused and pool_reused


def _check_networks(experiment: Experiment, ledger: Ledger, classes: int | None) -> None:
    """Checks the networks once for each set of them: loading timm takes longer than the check."""
    inputs = {
        "code": code_digest("models.py"),
        "roles": [role.model.model_dump(mode="json") for role in (experiment.teacher, *experiment.students)],
        "generations": experiment.generations,
        "allow_smaller_student": experiment.allow_smaller_student,
        "classes": classes,
    }

    def work() -> dict[str, str]:
        from ns import models

        models.check(experiment, classes)
        return {}

    ledger.once("check-networks", inputs, work)


def _source(
    part: Part, place: str, data: DataConfig, root: Store, ledger: Ledger, classes: tuple[str, ...] | None
) -> tuple[Source, bool]:
    """Finds or imports one part."""
    if place.startswith(DIGITS):
        inputs: dict[str, object] = {"source": place, "code": code_digest(*IMPORT)}
    elif (folder := open_store(place)).exists(MANIFEST):
        return Source(ref=folder.uri, dataset=Dataset.load(folder).digest), True
    else:
        inputs = {
            "source": digest(_fingerprint(part, _local_folder(part, place))),
            "role": ROLES[part],
            "classes": classes,
            "shard_samples": data.shard_samples,
            "shard_mib": data.shard_mib,
            "code": code_digest(*IMPORT),
        }
    target = f"store/datasets/{short(ledger.key('import', inputs))}"

    def work() -> dict[str, str]:
        folder = root.at(target)
        if place.startswith(DIGITS):
            from ns.data.digits import write_digits

            name = place.removeprefix(DIGITS)
            if name not in ("labelled", "pool", "heldout"):
                raise DataError(f"data.{part}: {place}: no such part; there are digits:labelled, digits:pool, digits:heldout")
            write_digits(name, folder)  # type: ignore[arg-type]
        else:
            import_images(
                place,
                folder,
                name=Path(place).name or part,
                role=ROLES[part],
                max_rejected_share=data.max_rejected_share,
                shard_samples=data.shard_samples,
                shard_mib=data.shard_mib,
                classes=classes,
            )
        return {"dataset": f"{target}/{MANIFEST}"}

    _, reused = ledger.once("import", inputs, work)
    return Source(ref=target, dataset=Dataset.load(root.at(target)).digest), reused


def _local_folder(part: Part, place: str) -> Path:
    folder = Path(unquote(urlsplit(place).path) if place.startswith("file://") else place).expanduser()
    if "://" in place and not place.startswith("file://"):
        raise DataError(f"data.{part}: {place}: has no {MANIFEST}; import the images first with `ns data import`")
    if not folder.is_dir():
        raise DataError(f"data.{part}: {place}: no such folder; name a folder of images, or a dataset with {MANIFEST}")
    return folder


def _fingerprint(part: Part, folder: Path) -> list[list[object]]:
    """Names, sizes and times of all files: changes when anything in the folder does, at the cost of a listing."""
    entries: list[list[object]] = [[part, str(folder.resolve())]]
    for parent, folders, names in walk(folder):
        # Empty folders count: an empty class is an error, and stays one until it is mended.
        entries += [[str((parent / name).relative_to(folder)), 0, 0] for name in folders]
        for name in names:
            path = parent / name
            # A dangling link has no status of its own; ingest will say that it cannot be read.
            status = path.stat() if path.exists() else path.lstat()
            entries.append([str(path.relative_to(folder)), status.st_size, status.st_mtime_ns])
    return entries


def _few(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:5])
    return f"({shown}, … {len(names)} in all)" if len(names) > 5 else f"({shown})"
