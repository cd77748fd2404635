"""Prepared data: the datasets of an experiment, found or imported, with their identities."""

from typing import Any, Literal

from pydantic import Field

from ns.core.errors import DataError
from ns.data.dataset import Dataset, Role
from ns.storage import Store
from ns.storage.documents import Document, Identified

MANIFEST = "prepared.json"

Part = Literal["labelled", "pool", "heldout", "test"]
ROLES: dict[Part, Role] = {"labelled": "labelled", "pool": "unlabelled", "heldout": "evaluation", "test": "evaluation"}


class Source(Document):
    """A dataset and where it is."""

    ref: str
    """Key of its folder below the root, or a URI."""
    dataset: str
    """Digest."""

    def open(self, root: Store) -> tuple[Store, Dataset]:
        """Raises DataError if what is there now is not what was prepared."""
        folder = root.at(self.ref)
        dataset = Dataset.load(folder)
        if dataset.digest != self.dataset:
            raise DataError(
                f"{folder.uri}: the dataset changed since it was prepared "
                f"(digest {dataset.digest}, was {self.dataset}); start the run again"
            )
        return folder, dataset


class LeftOut(Document):
    """Images of the pool that are also in an evaluation set."""

    ref: str
    """Key of the folder of the check that found them, below the root."""
    report: str
    """Digest of its report."""


class Prepared(Identified):
    labelled: Source
    pool: Source
    heldout: Source
    test: Source | None = None
    """Images that are only reported."""
    sets: dict[str, Source] = Field(default_factory=dict)
    """Further evaluation sets, by name."""
    left_out: LeftOut | None = None
    """Images that get no pseudo-label; None if there are none."""

    def identity(self) -> Any:
        datasets: dict[str, Any] = {part: source.dataset for part, source in self.parts.items()}
        if self.sets:
            datasets["sets"] = {name: source.dataset for name, source in self.sets.items()}
        return datasets | ({"left_out": self.left_out.report} if self.left_out else {})

    @property
    def parts(self) -> dict[Part, Source]:
        parts: dict[Part, Source] = {"labelled": self.labelled, "pool": self.pool, "heldout": self.heldout}
        return parts | ({"test": self.test} if self.test else {})

    @property
    def evaluation(self) -> dict[str, Source]:
        """All sets that models are evaluated on, as the notes of a run name them: `heldout`, `test`, `set:NAME`."""
        tests = {"heldout": self.heldout} | ({"test": self.test} if self.test else {})
        return tests | {f"set:{name}": source for name, source in self.sets.items()}

    @property
    def reported(self) -> Source:
        """What robustness is measured on: the images that are only reported, where there are such."""
        return self.test or self.heldout
