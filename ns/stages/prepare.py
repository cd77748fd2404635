"""Prepares the data that an experiment names: finds the datasets where they are, or imports them into the store."""

import math
from collections.abc import Callable, Mapping, Sequence

from ns.config.schema import DataConfig, EvaluationSet, Experiment
from ns.core import log
from ns.core.digest import digest_code, shorten_digest
from ns.core.errors import ConfigError, DataError, StoreError, prefix_errors
from ns.data.calibration_split import SplitPart, copy_split_part
from ns.data.class_names import shorten_names
from ns.data.dataset import Dataset, DatasetRole, format_class_names
from ns.data.fingerprint import FINGERPRINTS
from ns.data.importing.digits import SHARD_SAMPLES, write_digits
from ns.data.importing.ingest import (
    REJECTED,
    derive_dataset_name,
    digest_config,
    import_listing,
    open_listing,
    remove_leftovers,
)
from ns.data.index import ShardIndex, is_shard_whole
from ns.data.key_list import KeyList, read_keys
from ns.data.leakage import DUPLICATES, LEFT_OUT, LeakageReport, NamedDataset, check_datasets, count_class_images
from ns.data.locate import classify_uri
from ns.data.prepared import PART_ROLES, DataPart, LeftOutImages, PreparedData, PreparedDataset
from ns.evaluation.gate import FEW_IMAGES
from ns.labeling.label_set import LabelSet
from ns.modeling.manifest import ModelManifest
from ns.modeling.pretrained import describe_weights
from ns.stages.context import RunRef, stage
from ns.storage import Store, open_store, read_uri
from ns.storage.documents import dump_hashed_fields
from ns.storage.ledger import Ledger

IMPORT_CODE = (
    "data/importing/ingest.py",
    "data/importing/listing.py",
    "data/importing/sources.py",
    "data/importing/tables.py",
    "data/importing/tars.py",
    "data/importing/file_kinds.py",
    "data/importing/digits.py",
    "data/class_names.py",
    "data/key_list.py",
    "data/shards.py",
    "data/importing/writer.py",
    "data/loading/decode.py",
    "data/dataset.py",
)

SPLIT_CODE = (
    "data/calibration_split.py",
    "data/dataset.py",
    "data/index.py",
    "data/shards.py",
    "data/importing/writer.py",
    "data/loading/shard_reader.py",
)

FEW_STEPS = 20
"""Steps of a training below which it can hardly learn anything."""

CHECK_CODE = (
    "data/leakage.py",
    "data/duplicates.py",
    "data/fingerprint.py",
    "data/picture_match.py",
    "data/loading/decode.py",
    "data/loading/shard_reader.py",
    "data/index.py",
)


def prepare_data(ref: RunRef) -> str:
    """Checks the experiment, and finds or imports its datasets. Returns the key of `prepared.json`."""
    with stage("prepare", ref) as context:
        key, prepared, reused = write_prepared_data(context.experiment, context.root, context.ledger)
        context.write_note({"data": key}, reused=reused, **count_images(context.root, prepared))
        return key


def write_prepared_data(experiment: Experiment, root: Store, ledger: Ledger) -> tuple[str, PreparedData, bool]:
    """Prepares the data, and checks whatever else later stages read. Returns the key of `prepared.json`, its content, and whether
    nothing had to be imported."""
    prepared, reused = prepare_datasets(experiment, root, ledger)
    labeled = prepared.labeled.open_dataset(root)[1]
    _check_later_inputs(experiment, labeled.classes)
    _warn_of_few_steps(experiment, labeled.samples)
    _warn_of_normalization(experiment, root)
    if prepared.calibration and experiment.needs_calibration:
        _warn_of_few_calibration_images(*prepared.calibration.open_dataset(root))
    if experiment.labeling.label_set:
        _check_label_set(experiment.labeling.label_set, prepared.pool.open_dataset(root)[1], labeled.classes)
    if experiment.data.exclude:
        with prefix_errors("data.exclude"):
            _check_excluded(read_keys(experiment.data.exclude), *prepared.pool.open_dataset(root))
    key = f"store/prepared/{shorten_digest(prepared.digest)}/{PreparedData.filename}"
    prepared.save_file(root, key)
    return key, prepared, reused


def _check_label_set(uri: str, pool: Dataset, classes: tuple[str, ...]) -> None:
    """Raises DataError unless it is a label set of these images and classes."""
    again = "import the labels again: ns labels import LABELS POOL"
    with prefix_errors("labeling.label_set"):
        store = open_store(uri)
        if not store.exists(LabelSet.filename):
            raise DataError(
                f"{uri}: has no {LabelSet.filename}; name the folder of a label set, as ns labels import LABELS POOL writes it"
            )
        label_set = LabelSet.load(store)
        if label_set.classes != classes:
            differing = sorted({*label_set.classes} ^ {*classes})
            what = (
                f"has not the classes of data.labeled: {shorten_names(differing)}"
                if differing
                else "has its classes in another order"
            )
            raise DataError(f"{uri}: {what}; {again}")
        if [shard.source for shard in label_set.shards] != [shard.sha256 for shard in pool.shards]:
            raise DataError(f"{uri}: is of other images than data.pool; {again}")


def count_images(root: Store, prepared: PreparedData) -> dict[str, int]:
    """Images of each part of the data."""
    return {part: source.open_dataset(root)[1].samples for part, source in prepared.parts.items()}


def prepare_datasets(experiment: Experiment, root: Store, ledger: Ledger) -> tuple[PreparedData, bool]:
    """Prepares labeled images, pool and evaluation sets. Returns them and whether nothing had to be imported.

    Raises DataError if a source is missing or the parts contradict each other, ConfigError if the networks do not fit.
    """
    data = experiment.data
    _check_networks(experiment, root, ledger, None)
    finder = _DatasetFinder(data, root, ledger)
    labeled = finder.find_dataset("data.labeled", data.labeled, "labeled")
    classes = labeled.open_dataset(root)[1].classes
    if len(classes) < 2:
        raise DataError(f"data.labeled: {data.labeled}: has {len(classes)} class; at least 2 are needed")
    _check_networks(experiment, root, ledger, len(classes))
    heldout = finder.find_evaluation_set("data.heldout", data.heldout, classes)
    given_sets = {
        part: finder.find_evaluation_set(f"data.{part}", uri, classes)
        for part, uri in (("calibration", data.calibration), ("test", data.test))
        if uri is not None
    }
    pool = finder.find_dataset("data.pool", data.pool, "pool")
    sets = {
        name: finder.find_subset(f"evaluation.sets.{name}", evaluation_set, classes)
        for name, evaluation_set in experiment.evaluation.sets.items()
        if evaluation_set.kind == "images"
    }
    if heldout.digest == labeled.digest:
        raise DataError(f"data.heldout: {data.heldout}: is the same as data.labeled; hold out images that are not trained on")
    earlier = {"data.labeled": labeled, "data.heldout": heldout}
    for part, source in given_sets.items():
        for field, other in earlier.items():
            if source.digest == other.digest:
                raise DataError(
                    f"data.{part}: {getattr(data, part)}: is the same as {field}; name images that are used for nothing else, or "
                    "leave it out"
                )
        earlier[f"data.{part}"] = source
    if experiment.needs_calibration and "calibration" not in given_sets:
        heldout, given_sets["calibration"] = (
            finder.split_heldout(heldout, part, experiment.evaluation.seed) for part in ("rest", "calibration")
        )
    calibration, test = given_sets.get("calibration"), given_sets.get("test")
    prepared = PreparedData(labeled=labeled, pool=pool, heldout=heldout, calibration=calibration, test=test, sets=sets)
    for name, source in prepared.evaluation_sets.items():
        store, dataset = source.open_dataset(root)
        if dataset.role != "evaluation":
            # The leak guard keeps the pool clear of evaluation sets only.
            raise DataError(f"{name}: {store.uri}: has the role {dataset.role}; import it with --role evaluation")
    checked, check_reused = _check_leaks(prepared, data, root, ledger)
    return checked, finder.reused and check_reused


def _check_later_inputs(experiment: Experiment, classes: Sequence[str]) -> None:
    """Looks for what only later stages read: a training of days comes before them. Raises an NsError that names the field."""
    for index, uri in enumerate(experiment.labeling.ensemble):
        with prefix_errors(f"labeling.ensemble.{index}"):
            if ModelManifest.load(open_store(uri)).classes != tuple(classes):
                raise ConfigError(f"{uri}: has other classes, or another order of them, than data.labeled")
    for name, evaluation_set in experiment.evaluation.sets.items():
        if evaluation_set.multi_label:
            with prefix_errors(f"evaluation.sets.{name}.multi_label"):
                read_uri(evaluation_set.multi_label)


def _warn_of_few_calibration_images(store: Store, calibration: Dataset) -> None:
    counts = count_class_images(store, calibration)
    missing = [name for name, images in counts.items() if images == 0]
    if missing or calibration.samples < FEW_IMAGES:
        log.get_logger().warning(
            "few calibration images: what is fitted on them is little more than chance",
            images=calibration.samples,
            **({"classes_without": format_class_names(missing)} if missing else {}),
            cure=f"{FEW_IMAGES} and more, of all classes: data.calibration, data.calibration_share, or more held-out images",
        )


def _warn_of_normalization(experiment: Experiment, root: Store) -> None:
    """Says how images are normalized for weights whose own normalization is another, or unknown: a bare file does not tell."""
    before = experiment.teacher.model
    for field, role in experiment.map_roles().items():
        model, own_normalization = role.model, None
        if role.train.init == "teacher":
            own_normalization = (before.mean, before.std)
        elif model.pretrained:
            settings = describe_weights(model.pretrained, root).settings
            own_normalization = (settings["mean"], settings["std"]) if "mean" in settings and "std" in settings else None
        before = model
        if (role.train.init == "teacher" or model.pretrained) and own_normalization != (model.mean, model.std):
            log.get_logger().warning(
                "images are normalized by model.mean and model.std: they must be those that the weights were trained with",
                field=field,
                mean=list(model.mean),
                std=list(model.std),
                **(
                    {"weights_mean": list(own_normalization[0]), "weights_std": list(own_normalization[1])}
                    if own_normalization
                    else {}
                ),
            )


def _warn_of_few_steps(experiment: Experiment, samples: int) -> None:
    """Says if a step has more labeled images than there are, or if a training is hardly any steps."""
    for field, role in experiment.map_roles().items():
        batch, epochs = role.train.labeled_batch, role.train.epochs
        steps = max(1, math.ceil(epochs * samples / batch))
        if batch > samples or steps < FEW_STEPS:
            log.get_logger().warning(
                "a training has few steps for its batch: lower train.labeled_batch or raise train.epochs",
                field=field,
                steps=steps,
                epochs=epochs,
                labeled_batch=batch,
                labeled_images=samples,
            )


def _check_excluded(key_list: KeyList, store: Store, pool: Dataset) -> None:
    """Raises DataError if no line of the list names an image of the pool. Some may: of an older pool, say."""
    matched, unknown = key_list.match_keys(key for shard in pool.shards for key in ShardIndex.load(store, shard).keys)
    if not matched:
        raise DataError(
            f"{key_list.uri}: none of its {len(unknown)} lines names an image of the pool; the first: {unknown[0]}; "
            "give keys, or the paths of files in the pool's source"
        )
    if unknown:
        log.get_logger().warning("lines of data.exclude name no image of the pool", lines=len(unknown), first=unknown[0])


def _check_leaks(prepared: PreparedData, data: DataConfig, root: Store, ledger: Ledger) -> tuple[PreparedData, bool]:
    """Looks for images of evaluation sets in the other parts; in the pool only if the leak guard is on. Returns the data with what is
    left out of the pool, and whether the check was done before.

    Raises DataError if held-out images are also labeled ones, or if too large a share of the pool would be left out."""
    is_on = data.leak_guard != "off"
    parts = {"labeled": prepared.labeled, **({"pool": prepared.pool} if is_on else {})} | prepared.evaluation_sets
    inputs: dict[str, object] = {
        "code": digest_code(*CHECK_CODE),
        "bits": data.near_duplicate_bits,
        **{name: source.digest for name, source in parts.items()},
    }
    target = ledger.derive_key("checks", "check", inputs)

    def run_check() -> dict[str, str]:
        used_as: dict[str, DatasetRole] = {"labeled": "labeled", "pool": "unlabeled"}
        datasets = [
            NamedDataset(name, *source.open_dataset(root), used_as.get(name, "evaluation")) for name, source in parts.items()
        ]
        check_datasets(datasets, root.at(target), root.at(FINGERPRINTS), bits=data.near_duplicate_bits)
        return {"check": f"{target}/{LeakageReport.filename}"}

    _, reused = ledger.get_or_run("check", inputs, run_check)
    report = LeakageReport.load(root.at(target))
    _check_heldout_apart(prepared, data, report, f"{root.uri}/{target}/{DUPLICATES}")
    trained_on = "held-out images are also trained on: their accuracy is too high"
    overlaps = [("labeled", name, trained_on) for name in prepared.evaluation_sets]
    if prepared.calibration:
        fitted_on = "images that thresholds are found on also decide promotions: keep them apart"
        overlaps.append(("calibration", "heldout", fitted_on))
    if prepared.test:
        overlaps.append(("test", "heldout", "images that decide are also in the test: the reported accuracy is too high"))
    for one_part, other_part, warning in overlaps:
        overlap = report.get_overlap(one_part, other_part)
        if overlap.same + overlap.near:
            log.get_logger().warning(
                warning,
                set=other_part,
                same_bytes=overlap.same,
                nearly_alike=overlap.near,
                list=f"{root.uri}/{target}/{DUPLICATES}",
            )
    for part in ("heldout", "test"):
        if missing := [name for name, images in report.classes.get(part, {}).items() if images == 0]:
            log.get_logger().warning(
                "classes without any image to measure them by: nothing here tells whether a student still knows them",
                classes_without=format_class_names(missing),
                cure=f"data.{part}: add images of these classes",
            )
    if report.skipped:
        log.get_logger().warning("too many images are too much alike to compare them all", skipped=report.skipped)
    left_out = None
    if report.left_out and data.leak_guard == "exclude":
        listed, same = f"{root.uri}/{target}/{LEFT_OUT}", report.left_out_same
        share = report.left_out / report.images["pool"]
        if share > data.max_left_out_share:
            raise DataError(
                f"data.max_left_out_share: {data.max_left_out_share:g}: {report.left_out:,} images of the pool ({share:.0%}) are also in "
                f"evaluation sets ({same:,} with the same bytes, {report.left_out - same:,} nearly alike; listed in {listed}) and would "
                "get no label; raise it if they are copies; lower data.near_duplicate_bits if they are other pictures"
            )
        log.get_logger().warning(
            "images of the pool are also in evaluation sets, and get no label",
            images=report.left_out,
            same_bytes=same,
            nearly_alike=report.left_out - same,
            field="data.near_duplicate_bits",
            list=listed,
        )
        left_out = LeftOutImages(key=target, report_digest=report.digest)
    update = {"left_out": left_out, "check": f"{target}/{LeakageReport.filename}" if is_on else None}
    return prepared.model_copy(update=update), reused


def _check_heldout_apart(prepared: PreparedData, data: DataConfig, report: LeakageReport, listed: str) -> None:
    """Raises DataError if images that decide or are reported are also trained on: by their bytes, or too many by their looks."""
    for part in ("heldout", "calibration", "test"):
        if not getattr(prepared, part):
            continue
        overlap, images = report.get_overlap("labeled", part), report.images[part]
        if overlap.same:
            raise DataError(
                f"data.{part}: {overlap.same:,} images of data.labeled are also here, byte for byte (listed in {listed}); remove them "
                "from one of the two: what is trained on cannot measure"
            )
        share = overlap.resembled / images
        if share > data.max_heldout_overlap and data.leak_guard != "off":
            raise DataError(
                f"data.{part}: {overlap.resembled:,} of its {images:,} images ({share:.0%}) are nearly alike to images of data.labeled "
                f"(listed in {listed}); remove them from one of the two, or raise data.max_heldout_overlap "
                f"({data.max_heldout_overlap:g})"
            )


def _check_networks(experiment: Experiment, root: Store, ledger: Ledger, classes: int | None) -> None:
    """Checks the networks of an experiment once, since to load timm takes longer than the check. Fetches the weights that they need."""
    roles = (experiment.teacher, *experiment.students)
    inputs = {
        "code": digest_code("modeling/factory.py"),
        "roles": [dump_hashed_fields(role.model) for role in roles],
        "finetuned_at": [role.train.finetune and role.train.finetune.resolution for role in roles],
        "generations": experiment.generations,
        "allow_smaller_student": experiment.allow_smaller_student,
        "classes": classes,
    }

    def check_models() -> dict[str, str]:
        from ns.modeling import factory as models

        remarks = models.check_models(experiment, classes, root, fetch=True)
        for remark in remarks if classes else ():
            log.get_logger().warning(remark)
        return {}

    if any(role.model.pretrained for role in roles):
        # Files of weights may be gone since the last check.
        check_models()
    else:
        ledger.get_or_run("check-networks", inputs, check_models)


class _DatasetFinder:
    """Finds or imports the datasets that the experiment names."""

    def __init__(self, data: DataConfig, root: Store, ledger: Ledger) -> None:
        self._data, self._root, self._ledger = data, root, ledger
        self.reused = True
        """Whether nothing had to be imported so far."""

    def find_evaluation_set(self, field: str, uri: str, classes: tuple[str, ...]) -> PreparedDataset:
        """A dataset with the classes that are trained on."""
        source = self.find_dataset(field, uri, "heldout", classes)
        own_classes = source.open_dataset(self._root)[1].classes
        if own_classes != classes:
            # A preset's own test images outlive the other parts when a user names data of their own.
            other_cure = ", or set data.test=null" if field == "data.test" else ""
            raise DataError(
                f"{field}: {uri}: its classes {_shorten_names(own_classes)} are not those of data.labeled, "
                f"{_shorten_names(classes)}; import it with the same classes in the same order{other_cure}"
            )
        return source

    def find_subset(self, field: str, evaluation_set: EvaluationSet, classes: tuple[str, ...]) -> PreparedDataset:
        """A dataset with some of the classes that are trained on, by their names."""
        source = self.find_dataset(f"{field}.uri", evaluation_set.uri, "heldout")
        selected = () if isinstance(evaluation_set.classes, str) else evaluation_set.classes
        for name, names in (("uri", source.open_dataset(self._root)[1].classes), ("classes", selected)):
            unknown = tuple(class_name for class_name in names if class_name not in set(classes))
            if unknown:
                raise DataError(
                    f"{field}.{name}: {evaluation_set.uri}: {_shorten_names(unknown)} are no classes of data.labeled, "
                    f"{_shorten_names(classes)}; name its classes as they are named there"
                )
        return source

    def find_dataset(self, field: str, uri: str, part: DataPart, classes: tuple[str, ...] | None = None) -> PreparedDataset:
        """The dataset at a URI, imported if it is not one yet. Raises DataError if it has no images."""
        kind = classify_uri(uri)
        if kind == "dataset":
            store = open_store(uri)
            dataset = Dataset.load(store)
            if dataset.samples == 0:
                raise DataError(f"{field}: {store.uri}/{Dataset.filename}: has no images; import some, or name another dataset")
            return PreparedDataset(uri=store.uri, digest=dataset.digest)
        with prefix_errors(field):
            if kind == "digits":
                samples = min(SHARD_SAMPLES, self._data.shard_samples)
                inputs = {"source": uri, "shard_samples": samples, "code": digest_code(*IMPORT_CODE)}
                return self._import_once(inputs, lambda store: write_digits(uri, store, samples))
            return self._import_source(uri, PART_ROLES[part], classes)

    def split_heldout(self, heldout: PreparedDataset, part: SplitPart, seed: int) -> PreparedDataset:
        """The part of the held-out images that is set apart for calibration, or the rest, as a dataset of its own."""
        data = self._data
        limits = {"shard_samples": data.shard_samples, "shard_mib": data.shard_mib}
        draw = {"share": data.calibration_share, "seed": seed}
        inputs = {"code": digest_code(*SPLIT_CODE), "dataset": heldout.digest, "part": part, **draw, **limits}

        def copy_part(target: Store) -> None:
            with prefix_errors("data.calibration_share"):
                copy_split_part(*heldout.open_dataset(self._root), target, part, data.calibration_share, seed, data)

        return self._import_once(inputs, copy_part)

    def _import_source(self, uri: str, role: DatasetRole, classes: tuple[str, ...] | None) -> PreparedDataset:
        with open_listing(uri, role) as listing:
            inputs = {
                "source": listing.compute_digest(),
                "role": role,
                "classes": classes,
                "config": digest_config(self._data),
                "code": digest_code(*IMPORT_CODE),
            }

            def import_into(store: Store) -> None:
                name = derive_dataset_name(uri)
                # Another run may have imported the same by now, and read it.
                import_listing(
                    listing, uri, store, name=name, role=role, config=self._data, classes=classes, is_own_folder=True
                )

            prepared = self._import_once(inputs, import_into)
            self._check_rejected(uri, prepared)
            return prepared

    def _check_rejected(self, uri: str, prepared: PreparedDataset) -> None:
        """Another run may have imported the same with a laxer limit."""
        store, dataset = prepared.open_dataset(self._root)
        total = dataset.samples + dataset.rejected
        if dataset.rejected > self._data.max_rejected_share * total:
            raise DataError(
                f"{uri}: {dataset.rejected} of {total} files were left out, more than data.max_rejected_share = "
                f"{self._data.max_rejected_share:.1%}; {store.uri}/{REJECTED} lists them; repair or remove them, or raise the limit"
            )

    def _import_once(self, inputs: Mapping[str, object], import_into: Callable[[Store], object]) -> PreparedDataset:
        key = self._ledger.derive_key("datasets", "import", inputs)

        def import_if_missing() -> dict[str, str]:
            store = self._root.at(key)
            dataset = Dataset.find_file(store, Dataset.filename)
            if dataset and all(is_shard_whole(store, shard) for shard in dataset.shards):
                # The import was killed when its manifest was written.
                remove_leftovers(store, dataset)
            else:
                try:
                    import_into(store)
                except StoreError:
                    # Another run that imported the same finished first, and removed the parts that this import was to join.
                    if not store.exists(Dataset.filename):
                        raise
            return {"dataset": f"{key}/{Dataset.filename}"}

        _, reused = self._ledger.get_or_run("import", inputs, import_if_missing)
        self.reused &= reused
        return PreparedDataset(uri=key, digest=Dataset.load(self._root.at(key)).digest)


def _shorten_names(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:5])
    return f"({shown}, … {len(names)} in all)" if len(names) > 5 else f"({shown})"
