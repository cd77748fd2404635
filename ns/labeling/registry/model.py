"""What a label registry holds: the names of versions, their documents, and their messages in git."""

import re
from typing import Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict

from ns.core.errors import DataError
from ns.labeling.label_set import LabelSet
from ns.labeling.selection import Selection
from ns.storage.documents import JsonDocument


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
        match = re.fullmatch(r"labels/([^/]+)/([^/]+)/gen-([1-9][0-9]{0,5})", text)
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


def resolve_version_ref(name: str) -> str:
    """The full name in git of a tag, or of `current/PROJECT`. Raises DataError for anything else."""
    project = name.removeprefix("current/")
    if project != name:
        check_tag_part("project", project)
        return f"refs/heads/{name}"
    return VersionTag.parse(name).ref


class VersionFile(JsonDocument):
    """One file of a version."""

    name: str
    bytes: int
    sha256: str
    md5: str


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
    directory: str
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

    def format_tag_message(self) -> str:
        trailers = {
            "Project": self.project,
            "Run": self.run,
            "Generation": self.generation,
            "Label-Set": self.label_set,
            "Teacher": self.teacher,
            "Rows": self.rows,
            "Selection": self.selection,
            "Kept": self.kept,
            "Images": self.images,
        }
        return format_message(f"Label set of {self.run}, generation {self.generation}", trailers)


class VersionSummary(BaseModel):
    """A version as `ns labels list` shows it: what the message of its tag says."""

    model_config = ConfigDict(frozen=True)

    tag: str
    project: str
    run: str
    generation: int
    date: str
    """Time of the commit, ISO 8601."""
    label_set: str
    teacher: str
    selection: str | None
    """Digest of the selection; None if the version has none."""
    rows: int
    kept: int | None
    current: bool
    """Whether it is the version in use of its project."""

    @classmethod
    def from_message(cls, tag: VersionTag, date: str, trailers: dict[str, str], *, current: bool) -> Self:
        return cls(
            tag=str(tag),
            **tag._asdict(),
            date=date,
            label_set=trailers["Label-Set"],
            teacher=trailers["Teacher"],
            selection=trailers.get("Selection"),
            rows=int(trailers["Rows"]),
            kept=int(trailers["Kept"]) if "Kept" in trailers else None,
            current=current,
        )


def format_message(subject: str, trailers: dict[str, Any]) -> str:
    """A message in git's form: subject, blank line, `Name: value` lines."""
    lines = [f"{name}: {value}" for name, value in trailers.items() if value not in (None, "")]
    return "\n".join([subject, "", *lines]) + "\n"


def parse_trailers(message: str) -> dict[str, str]:
    return dict(re.findall(r"^([A-Z][A-Za-z-]+): (.+)$", message, re.MULTILINE))


def parse_current_tag(message: str) -> str | None:
    """The tag that a commit of `current/PROJECT` names."""
    return parse_trailers(message).get("Tag")
