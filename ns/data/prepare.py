"""From what an experiment names to three datasets: found where they are, or imported into the store."""

from collections.abc import Callable

from ns import log
from ns.config import DataConfig, Experiment
from ns.data.check import DUPLICATES, LEFT_OUT, Checked, CheckReport, check
from ns.data.check import MANIFEST as CHECK_MANIFEST
from ns.data.dataset import MANIFEST, Dataset
from ns.data.ingest import Limits, import_listing, listed, source_name
from ns.data.prepared import ROLES, LeftOut, Part, Prepared, Source
from ns.digest import code_digest, short
from ns.errors import DataError
from ns.ledger import Ledger
from ns.store import Store, open_store

DIGITS = "digits:"
IMPORT = (
    "data/ingest.py",
    "data/listing.py",
    "data/sources.py",
    "data/digits.py",
    "data/shards.py",
    "data/writer.py",
    "data/decode.py",
    "data/dataset.py",
)

CHECK = ("data/check.py", "data/duplicates.py", "data/fingerprint.py", "data/decode.py", "data/images.py", "data/index.py")


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
    prepared = Prepared(labelled=labelled, pool=pool, heldout=heldout)
    left_out, checked = _leak_guard(prepared, data, root, ledger)
    reused = labelled_reused and heldout_reused and pool_reused and checked
    return prepared.model_copy(update={"left_out": left_out}), reused


def _leak_guard(prepared: Prepared, data: DataConfig, root: Store, ledger: Ledger) -> tuple[LeftOut | None, bool]:
    """Looks for held-out images elsewhere. Returns what is to be left out of the pool, and whether that was known."""
    if data.leak_guard == "off":
        return None, True
    inputs: dict[str, object] = {
        "code": code_digest(*CHECK),
        "bits": data.near_duplicate_bits,
        **{part: source.dataset for part, source in prepared.parts.items()},
    }
    target = f"store/checks/{short(ledger.key('check', inputs))}"

    def work() -> dict[str, str]:
        datasets = [Checked(part, *source.open(root)) for part, source in prepared.parts.items()]
        check(datasets, root.at(target), root.at("store/fingerprints"), bits=data.near_duplicate_bits)
        return {"check": f"{target}/{CHECK_MANIFEST}"}

    _, reused = ledger.once("check", inputs, work)
    report = CheckReport.read(root, f"{target}/{CHECK_MANIFEST}")
    trained = report.between("labelled", "heldout")
    if trained.same + trained.near:
        log.get().warning(
            "held-out images are also trained on, so their accuracy says too much",
            same=trained.same,
            near=trained.near,
            list=f"{root.uri}/{target}/{DUPLICATES}",
        )
    if not report.left_out or data.leak_guard == "report":
        return None, reused
    log.get().warning(
        "images of the pool are also held out, and get no label", images=report.left_out, list=f"{root.uri}/{target}/{LEFT_OUT}"
    )
    return LeftOut(ref=target, report=report.digest), reused


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
        return _imported(part, place, data, root, ledger, classes)
    return _once(inputs, root, ledger, lambda folder: _write_digits(part, place, folder))


def _imported(
    part: Part, place: str, data: DataConfig, root: Store, ledger: Ledger, classes: tuple[str, ...] | None
) -> tuple[Source, bool]:
    limits = Limits(
        max_rejected_share=data.max_rejected_share,
        shard_samples=data.shard_samples,
        shard_mib=data.shard_mib,
        max_side=data.max_side,
    )
    try:
        with listed(place, ROLES[part]) as listing:
            inputs: dict[str, object] = {
                "source": listing.digest(),
                "role": ROLES[part],
                "classes": classes,
                "limits": limits.identity(),
                "code": code_digest(*IMPORT),
            }

            def work(folder: Store) -> None:
                import_listing(
                    listing, place, folder, name=source_name(place), role=ROLES[part], limits=limits, classes=classes
                )

            return _once(inputs, root, ledger, work)
    except DataError as error:
        raise DataError(f"data.{part}: {error}") from error


def _once(inputs: dict[str, object], root: Store, ledger: Ledger, work: Callable[[Store], object]) -> tuple[Source, bool]:
    target = f"store/datasets/{short(ledger.key('import', inputs))}"

    def make() -> dict[str, str]:
        work(root.at(target))
        return {"dataset": f"{target}/{MANIFEST}"}

    _, reused = ledger.once("import", inputs, make)
    return Source(ref=target, dataset=Dataset.load(root.at(target)).digest), reused


def _write_digits(part: Part, place: str, folder: Store) -> None:
    from ns.data.digits import write_digits

    name = place.removeprefix(DIGITS)
    if name not in ("labelled", "pool", "heldout"):
        raise DataError(f"data.{part}: {place}: no such part; there are digits:labelled, digits:pool, digits:heldout")
    write_digits(name, folder)  # type: ignore[arg-type]


def _few(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:5])
    return f"({shown}, … {len(names)} in all)" if len(names) > 5 else f"({shown})"
