"""What a label registry holds: the names of versions, and their documents."""

import re
from typing import ClassVar, Literal, NamedTuple, Self

from pydantic import Field

from ns.core.errors import DataError
from ns.labeling.label_set import LabelSet
from ns.labeling.selection import Selection
from ns.storage.documents import FileName, JsonDocument, Sha256

VERSION_PATTERN = re.compile(r"labels/([^/]+)/([^/]+)/gen-([1-9][0-9]{0,5})")


class VersionTag(NamedTuple):
    """The name of a version."""

    project: str
    run: str
    generation: int

    def __str__(self) -> str:
        return f"labels/{self.project}/{self.run}/gen-{self.generation}"

    @property
    def ref(self) -> str:
        """The full name in git."""
        return f"refs/tags/{self}"

    @classmethod
    def from_parts(cls, project: str, run: str, generation: int) -> Self:
        """Raises DataError naming the part that cannot stand in a tag."""
        for what, name in (("project", project), ("run", run)):
            check_tag_part(what, name)
        if generation < 1:
            raise DataError(f"generation {generation}: has no label set of its own; generations count from 1")
        return cls(project, run, generation)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises DataError for a text that is not the name of a version."""
        match = VERSION_PATTERN.fullmatch(text)
        if match is None:
            raise DataError(f"{text!r}: not a version; must look like labels/PROJECT/RUN/gen-1 (`ns labels list` has them)")
        return cls.from_parts(match[1], match[2], int(match[3]))


def check_tag_part(what: str, name: str) -> None:
    """Raises DataError for a name that git would not take as part of a tag."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) or ".." in name or name.endswith((".", ".lock")):
        raise DataError(
            f"{what} {name!r}: cannot be part of a tag; must be at most 100 letters, digits, dots, dashes and underscores, "
            "begin with a letter or digit, hold no '..', and not end in '.' or '.lock'"
        )


def is_version_ref(ref: str) -> bool:
    return VERSION_PATTERN.fullmatch(ref.removeprefix("refs/tags/")) is not None


def resolve_version_ref(name: str) -> str:
    """The full name in git of a tag, or of `current/PROJECT`. Raises DataError for anything else."""
    project = name.removeprefix("current/")
    if project != name:
        check_tag_part("project", project)
        return f"refs/heads/{name}"
    return VersionTag.parse(name).ref


class VersionFile(JsonDocument):
    """One file of a version."""

    name: FileName
    bytes: int = Field(ge=0)
    sha256: Sha256
    md5: str = Field(pattern=r"^[0-9a-f]{32}$")


class LabelVersion(JsonDocument):
    """The content of a version: `version.json` in its tag."""

    filename: ClassVar[str] = "version.json"

    format: Literal[1] = 1
    project: str
    run: str
    generation: int
    label_set: str
    """Digest of the label set."""
    dataset: str
    """Digest of the labeled dataset."""
    teacher: str
    """Digest of the teacher."""
    selection: str | None
    """Digest of the selection; None if the version has none."""
    rows: int
    kept: int | None
    """Distinct images that the selection kept."""
    images: int | None
    """Images in an epoch."""
    directory: str = Field(pattern=r"^[0-9a-f]{32}\.dir$")
    """DVC's hash of the folder: the md5 of the list of its files, and `.dir`."""
    files: tuple[VersionFile, ...]

    @property
    def tag(self) -> VersionTag:
        return VersionTag(self.project, self.run, self.generation)

    @classmethod
    def build(
        cls,
        tag: VersionTag,
        label_set: LabelSet,
        selection: Selection | None,
        files: tuple[VersionFile, ...],
        directory: str,
    ) -> Self:
        return cls(
            **tag._asdict(),
            label_set=label_set.digest,
            dataset=label_set.dataset,
            teacher=label_set.teacher,
            selection=selection.digest if selection else None,
            rows=label_set.rows,
            kept=selection.kept if selection else None,
            images=selection.images if selection else None,
            directory=directory,
            files=files,
        )


class VersionSummary(NamedTuple):
    """A version as `ns labels list` shows it."""

    version: LabelVersion
    date: str
    """Time of the commit, ISO 8601."""
    current: bool
    """Whether it is the version in use of its project."""
