"""Prepared data: the datasets of an experiment, found or imported, with their digests."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from ns.core.errors import DataError
from ns.data.dataset import Dataset, DatasetRole
from ns.storage import Store
from ns.storage.documents import BlobKey, HashedDocument, JsonDocument

DataPart = Literal["labeled", "pool", "heldout", "calibration", "test"]
PART_ROLES: dict[DataPart, DatasetRole] = {
    "labeled": "labeled",
    "pool": "unlabeled",
    "heldout": "evaluation",
    "calibration": "evaluation",
    "test": "evaluation",
}


class PreparedDataset(JsonDocument):
    """Reference to a dataset."""

    uri: str
    """Key of its folder below the root, or a URI."""
    digest: str

    def open_dataset(self, root: Store) -> tuple[Store, Dataset]:
        """The dataset and its store. Raises DataError if it changed since it was prepared."""
        store = root.at(self.uri)
        dataset = Dataset.load(store)
        if dataset.digest != self.digest:
            raise DataError(
                f"{store.uri}: the dataset changed since it was prepared "
                f"(digest {dataset.digest}, was {self.digest}); start the run again"
            )
        return store, dataset


class LeftOutImages(JsonDocument):
    """Images of the pool that are also in an evaluation set."""

    key: BlobKey
    """Key below the root of the folder of the check that found them."""
    report_digest: str
    """Digest of the check's report."""


class PreparedData(HashedDocument):
    filename: ClassVar[str] = "prepared.json"

    labeled: PreparedDataset
    pool: PreparedDataset
    heldout: PreparedDataset
    """What decides promotions; without the images that were set apart for calibration."""
    calibration: PreparedDataset | None = None
    """Labeled images on which thresholds and the like are found; None if nothing is to be found and no set was given."""
    test: PreparedDataset | None = None
    """Evaluation images that are only reported."""
    sets: dict[str, PreparedDataset] = Field(default_factory=dict)
    """Further evaluation sets, by name."""
    left_out: LeftOutImages | None = None
    """Images that get no pseudo-label; None if there are none."""
    check: BlobKey | None = None
    """Key of the leak guard's report below the root; None if the guard is off."""

    def hashed_fields(self) -> Any:
        datasets: dict[str, Any] = {part: source.digest for part, source in self.parts.items()}
        if self.sets:
            datasets["sets"] = {name: source.digest for name, source in self.sets.items()}
        return datasets | ({"left_out": self.left_out.report_digest} if self.left_out else {})

    @property
    def parts(self) -> dict[DataPart, PreparedDataset]:
        parts: dict[DataPart, PreparedDataset] = {"labeled": self.labeled, "pool": self.pool, "heldout": self.heldout}
        optional: dict[DataPart, PreparedDataset | None] = {"calibration": self.calibration, "test": self.test}
        return parts | {part: source for part, source in optional.items() if source}

    @property
    def evaluation_sets(self) -> dict[str, PreparedDataset]:
        """All evaluation sets, by the names that records of a run use: `heldout`, `calibration`, `test`, `set:NAME`."""
        sets: dict[str, PreparedDataset] = {
            part: source for part, source in self.parts.items() if PART_ROLES[part] == "evaluation"
        }
        return sets | {f"set:{name}": source for name, source in self.sets.items()}

    @property
    def reported_set(self) -> PreparedDataset:
        """The set that robustness is measured on: `test` if there is one, otherwise `heldout`."""
        return self.test or self.heldout
