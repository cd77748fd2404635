"""Dataset: an ordered list of tar shards with a manifest beside them.

dataset.json          name, role, classes, shards, digest; written last
shard-00000.tar …     WebDataset layout: KEY.jpg|png|webp and, in labeled data, KEY.cls (class index as text)
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from ns.core.printable import escape_controls
from ns.storage.documents import HashedDocument, JsonDocument, Sha256

MAX_CLASSES = 1 << 16
"""Class indices are uint16 in predictions, label sets and selections."""
SHOWN_CLASS_NAMES = 5
"""Names of classes that a message lists."""
DatasetRole = Literal["labeled", "unlabeled", "evaluation"]


class Shard(JsonDocument):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.tar$")
    samples: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: Sha256
    index_sha256: Sha256 | None = None
    """SHA-256 of the index file. An index without it is not used. It is no part of the dataset's digest: the index follows from the tar."""


class Dataset(HashedDocument):
    filename: ClassVar[str] = "dataset.json"

    format: Literal[1] = 1
    name: str
    role: DatasetRole
    classes: tuple[str, ...] = Field(max_length=MAX_CLASSES)
    """Class names, in the order of class indices. Empty for unlabeled data."""
    shards: tuple[Shard, ...]
    rejected: int = Field(default=0, ge=0)
    """Number of unreadable images, which were left out; `rejected.parquet` lists them with reasons."""

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    def hashed_fields(self) -> Any:
        return {
            "classes": list(self.classes),
            "role": self.role,
            "shards": [[shard.sha256, shard.samples] for shard in self.shards],
        }


def format_class_names(names: Sequence[str]) -> str:
    """`cat, dog`, in one line; of more than five names, the first five and how many more there are."""
    more = len(names) - SHOWN_CLASS_NAMES
    shown = (escape_controls(name, keep_newlines=False) for name in names[:SHOWN_CLASS_NAMES])
    return ", ".join(shown) + (f" and {more:,} more" if more > 0 else "")
