"""From what an experiment names to datasets: found where they are, or imported into the store."""

from collections.abc import Callable

from ns.config.schema import DataConfig, EvaluationSet, Experiment
from ns.core import log
from ns.core.digest import code_digest, short
from ns.core.errors import DataError, StoreError
from ns.data.dataset import MANIFEST, Dataset, Role
from ns.data.digits import DIGITS
from ns.data.importing.ingest import Limits, import_listing, listed, source_name
from ns.data.leakage import DUPLICATES, LEFT_OUT, Checked, CheckReport, check
from ns.data.leakage import MANIFEST as CHECK_MANIFEST
from ns.data.prepared import ROLES, LeftOut, Part, Prepared, Source
from ns.storage import Store, open_store
from ns.storage.ledger import Ledger

IMPORT = (
    "data/importing/ingest.py",
    "data/importing/listing.py",
    "data/importing/sources.py",
    "data/digits.py",
    "data/shards.py",
    "data/importing/writer.py",
    "data/loading/decode.py",
    "data/dataset.py",
)

CHECK = (
    "data/leakage.py",
    "data/duplicates.py",
    "data/fingerprint.py",
    "data/loading/decode.py",
    "data/loading/shard_reader.py",
    "data/index.py",
)


def prepare(experiment: Experiment, root: Store, ledger: Ledger) -> tuple[Prepared, bool]:
    """Prepares labelled images, pool and evaluation sets. Returns them and whether nothing had to be imported.

    Raises DataError when a source is missing or the parts contradict each other, ConfigError when the networks do not fit.
    """
    data = experiment.data
    _check_networks(experiment, ledger, None)
    finder = _Finder(data, root, ledger)
    labelled = finder.find("data.labelled", data.labelled, "labelled")
    classes = labelled.open(root)[1].classes
    if len(classes) < 2:
        raise DataError(f"data.labelled: {data.labelled}: has {len(classes)} class; at least 2 are needed")
    _check_networks(experiment, ledger, len(classes))
    heldout = finder.evaluation("data.heldout", data.heldout, classes)
    test = finder.evaluation("data.test", data.test, classes) if data.test is not None else None
    pool = finder.find("data.pool", data.pool, "pool")
    sets = {
        name: finder.subset(f"evaluation.sets.{name}", asked, classes)
        for name, asked in experiment.evaluation.sets.items()
        if asked.kind == "images"
    }
    if heldout.dataset == labelled.dataset:
        raise DataError(f"data.heldout: {data.heldout}: is the same as data.labelled; hold out images that are not trained on")
    for field, other in (("data.labelled", labelled), ("data.heldout", heldout)):
        if test and test.dataset == other.dataset:
            raise DataError(
                f"data.test: {data.test}: is the same as {field}; name images that nothing is trained on or decided by, or "
                "leave it out"
            )
    prepared = Prepared(labelled=labelled, pool=pool, heldout=heldout, test=test, sets=sets)
    for name, source in prepared.evaluation.items():
        folder, dataset = source.open(root)
        if dataset.role != "evaluation":
            # The leak guard keeps the pool clear of evaluation sets only.
            raise DataError(f"{name}: {folder.uri}: has the role {dataset.role}; import it with --role evaluation")
    left_out, checked = _leak_guard(prepared, data, root, ledger)
    return prepared.model_copy(update={"left_out": left_out}), finder.reused and checked


def _leak_guard(prepared: Prepared, data: DataConfig, root: Store, ledger: Ledger) -> tuple[LeftOut | None, bool]:
    """Looks for images of evaluation sets elsewhere. Returns what is to be left out of the pool, and whether that was known."""
    if data.leak_guard == "off":
        return None, True
    named = {"labelled": prepared.labelled, "pool": prepared.pool} | prepared.evaluation
    inputs: dict[str, object] = {
        "code": code_digest(*CHECK),
        "bits": data.near_duplicate_bits,
        **{name: source.dataset for name, source in named.items()},
    }
    target = f"store/checks/{short(ledger.key('check', inputs))}"

    def work() -> dict[str, str]:
        used_as: dict[str, Role] = {"labelled": "labelled", "pool": "unlabelled"}
        datasets = [Checked(name, *source.open(root), used_as.get(name, "evaluation")) for name, source in named.items()]
        check(datasets, root.at(target), root.at("store/fingerprints"), bits=data.near_duplicate_bits)
        return {"check": f"{target}/{CHECK_MANIFEST}"}

    _, reused = ledger.once("check", inputs, work)
    report = CheckReport.read(root, f"{target}/{CHECK_MANIFEST}")
    for name in prepared.evaluation:
        trained = report.between("labelled", name)
        if trained.same + trained.near:
            log.get().warning(
                "held-out images are also trained on, so their accuracy says too much",
                set=name,
                same=trained.same,
                near=trained.near,
                list=f"{root.uri}/{target}/{DUPLICATES}",
            )
    if prepared.test:
        shared = report.between("test", "heldout")
        if shared.same + shared.near:
            log.get().warning(
                "images that decide are also in the test, so what is reported says a little too much",
                same=shared.same,
                near=shared.near,
                list=f"{root.uri}/{target}/{DUPLICATES}",
            )
    if not report.left_out or data.leak_guard == "report":
        return None, reused
    log.get().warning(
        "images of the pool are also in evaluation sets, and get no label",
        images=report.left_out,
        list=f"{root.uri}/{target}/{LEFT_OUT}",
    )
    return LeftOut(ref=target, report=report.digest), reused


def _check_networks(experiment: Experiment, ledger: Ledger, classes: int | None) -> None:
    """Checks the networks once for each set of them: loading timm takes longer than the check."""
    roles = (experiment.teacher, *experiment.students)
    inputs = {
        "code": code_digest("modeling/factory.py"),
        "roles": [role.model.model_dump(mode="json") for role in roles],
        "finetuned_at": [role.train.finetune and role.train.finetune.resolution for role in roles],
        "generations": experiment.generations,
        "allow_smaller_student": experiment.allow_smaller_student,
        "classes": classes,
    }

    def work() -> dict[str, str]:
        from ns.modeling import factory as models

        models.check(experiment, classes)
        return {}

    if any(role.train.init_place for role in roles):
        # Whether weights are where they were is another question each time.
        work()
    else:
        ledger.once("check-networks", inputs, work)


class _Finder:
    """Finds or imports what fields of the experiment name."""

    def __init__(self, data: DataConfig, root: Store, ledger: Ledger) -> None:
        self._data, self._root, self._ledger = data, root, ledger
        self.reused = True
        """Whether nothing had to be imported so far."""

    def evaluation(self, field: str, place: str, classes: tuple[str, ...]) -> Source:
        """Images of the classes that are trained on."""
        source = self.find(field, place, "heldout", classes)
        found = source.open(self._root)[1].classes
        if found != classes:
            raise DataError(
                f"{field}: {place}: its classes {_few(found)} are not those of data.labelled, "
                f"{_few(classes)}; import it with the same classes in the same order"
            )
        return source

    def subset(self, field: str, asked: EvaluationSet, classes: tuple[str, ...]) -> Source:
        """Images of some of the classes that are trained on, by their names."""
        source = self.find(f"{field}.place", asked.place, "heldout")
        chosen = () if isinstance(asked.classes, str) else asked.classes
        for name, names in (("place", source.open(self._root)[1].classes), ("classes", chosen)):
            unknown = tuple(one for one in names if one not in set(classes))
            if unknown:
                raise DataError(
                    f"{field}.{name}: {asked.place}: {_few(unknown)} are no classes of data.labelled, {_few(classes)}; "
                    "name its classes as they are named there"
                )
        return source

    def find(self, field: str, place: str, part: Part, classes: tuple[str, ...] | None = None) -> Source:
        """Raises DataError if there are no images."""
        if place.startswith(DIGITS):
            inputs: dict[str, object] = {"source": place, "code": code_digest(*IMPORT)}
            return self._once(inputs, lambda folder: _write_digits(field, place, folder))
        if (folder := open_store(place)).exists(MANIFEST):
            dataset = Dataset.load(folder)
            if dataset.samples == 0:
                raise DataError(f"{field}: {folder.uri}/{MANIFEST}: has no images; import some, or name another dataset")
            return Source(ref=folder.uri, dataset=dataset.digest)
        return self._imported(field, place, ROLES[part], classes)

    def _imported(self, field: str, place: str, role: Role, classes: tuple[str, ...] | None) -> Source:
        limits = Limits(
            max_rejected_share=self._data.max_rejected_share,
            shard_samples=self._data.shard_samples,
            shard_mib=self._data.shard_mib,
            max_side=self._data.max_side,
        )
        try:
            with listed(place, role) as listing:
                inputs: dict[str, object] = {
                    "source": listing.digest(),
                    "role": role,
                    "classes": classes,
                    "limits": limits.identity(),
                    "code": code_digest(*IMPORT),
                }

                def work(folder: Store) -> None:
                    import_listing(listing, place, folder, name=source_name(place), role=role, limits=limits, classes=classes)

                return self._once(inputs, work)
        except DataError as error:
            raise DataError(f"{field}: {error}") from error

    def _once(self, inputs: dict[str, object], work: Callable[[Store], object]) -> Source:
        target = f"store/datasets/{short(self._ledger.key('import', inputs))}"

        def make() -> dict[str, str]:
            folder = self._root.at(target)
            if not folder.exists(MANIFEST):
                try:
                    work(folder)
                except StoreError:
                    # Another run that imported the same, and was done first, has cleared away what this one was to go on with.
                    if not folder.exists(MANIFEST):
                        raise
            return {"dataset": f"{target}/{MANIFEST}"}

        _, reused = self._ledger.once("import", inputs, make)
        self.reused &= reused
        return Source(ref=target, dataset=Dataset.load(self._root.at(target)).digest)


def _write_digits(field: str, place: str, folder: Store) -> None:
    from ns.data.digits import write_digits

    try:
        write_digits(place.removeprefix(DIGITS), folder)
    except DataError as error:
        raise DataError(f"{field}: {error}") from error


def _few(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:5])
    return f"({shown}, … {len(names)} in all)" if len(names) > 5 else f"({shown})"
