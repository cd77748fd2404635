"""Dataset: an ordered list of tar shards with a manifest beside them.

dataset.json          name, role, classes, shards, digest; written last
shard-00000.tar …     WebDataset layout: KEY.jpg|png|webp, and KEY.cls (class index as text) where labelled
"""

from typing import Any, Literal, Self

from pydantic import Field

from ns.storage import Store
from ns.storage.documents import Document, Identified

MANIFEST = "dataset.json"

Role = Literal["labelled", "unlabelled", "evaluation"]


class Shard(Document):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.tar$")
    samples: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Dataset(Identified):
    format: Literal[1] = 1
    name: str
    role: Role
    classes: tuple[str, ...]
    """Class names; a label is an index into them. Empty for unlabelled data."""
    shards: tuple[Shard, ...]
    rejected: int = Field(default=0, ge=0)
    """Images left out because they could not be read; `rejected.parquet` lists them with reasons."""

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    def identity(self) -> Any:
        return {
            "classes": list(self.classes),
            "role": self.role,
            "shards": [[shard.sha256, shard.samples] for shard in self.shards],
        }

    def save(self, folder: Store) -> None:
        self.write(folder, MANIFEST)

    @classmethod
    def load(cls, folder: Store) -> Self:
        """Reads and checks `dataset.json`. Raises DataError naming the field that is wrong."""
        return cls.read(folder, MANIFEST)
