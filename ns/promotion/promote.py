"""The model in use: a small file in a git repository that names a model, and says by what evidence it is in use.

    models/production.yaml        a `Pointer`: place of the model, digests, run, numbers

Merging a change of that file promotes, reverting the merge goes back; git's history says who did it, when and why. The same run
gives the same file, on the same commit the same commit, so that a job that is repeated changes nothing.
"""

import hashlib
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, NamedTuple

import yaml

from ns.core.digest import short
from ns.core.errors import ConfigError, DataError, NsError, RunError, StoreError
from ns.core.git import Commands
from ns.data.scratch import scratch
from ns.modeling.manifest import MANIFEST, WEIGHTS, Lineage, ModelCard
from ns.reporting import comparison
from ns.reporting.context import Facts, Trained, gather
from ns.reporting.markdown import markdown, plain, table
from ns.reporting.metrics import measures
from ns.storage import Store, open_store
from ns.storage.documents import Document

HEADER = "# The model in use. `ns promote RUN` moves it, `ns promote check` checks it; to go back, revert the commit that moved it.\n"
CHUNK = 1 << 20


class Pointer(Document):
    """Which model is in use."""

    format: Literal[1] = 1
    model: str
    """Its folder, as a URI."""
    digest: str
    """Of its model.json."""
    weights_sha256: str
    arch: str
    classes: int
    root: str
    """URI of the root of its run."""
    run: str
    generation: int
    heldout: str
    """Digest of the held-out images that the numbers are of, unless they say otherwise."""
    lineage: Lineage
    metrics: dict[str, float]
    """Name → value of what was measured, as Kubeflow shows them; bounds end in `_low` and `_high`."""


@dataclass(frozen=True)
class Candidate:
    """A run's best model, which its gate has accepted."""

    pointer: Pointer
    facts: Facts
    accepted_at: datetime
    """When the gate had spoken."""
    bytes: int
    """Of the weights that were read."""


class Moved(NamedTuple):
    """What became of a pointer."""

    before: Pointer | None
    changed: bool
    commit: str | None
    """Of the branch that holds the change; None if there is none."""


def candidate(root: Store, run: str) -> Candidate:
    """The best model of a run, read from end to end.

    Raises RunError unless the gate has accepted a student of the run, DataError if the model is not whole.
    """
    facts = gather(root, run, pictures=0)
    best = facts.best
    verdict = facts.verdict_of(best.generation) if best else None
    if best is None or best.evaluation is None or verdict is None:
        spoken = "; ".join(f"generation {one.generation}: {one.reason}" for one in facts.verdicts)
        raise RunError(
            f"run {run}: its gate has accepted no student ({spoken or 'it has not spoken yet'}); "
            + (f"`ns gate explain {run}` says what was needed" if spoken else "`ns run --resume` continues the run")
        )
    card = best.card
    pointer = Pointer(
        model=root.at(best.key).uri,
        digest=card.digest,
        weights_sha256=card.weights_sha256,
        arch=card.model.arch,
        classes=len(card.classes),
        root=root.uri,
        run=run,
        generation=best.generation,
        heldout=best.evaluation.dataset,
        lineage=card.lineage,
        metrics=_metrics(facts, best),
    )
    spoken_at = next(note.finished_at for note in facts.steps if (note.generation, note.step) == (best.generation, "gate"))
    return Candidate(pointer, facts, datetime.fromisoformat(spoken_at), check(pointer, f"run {run}"))


def check(pointer: Pointer, place: str) -> int:
    """Reads the model that a pointer names from end to end. Returns the bytes of its weights.

    Raises DataError if it is not that model, StoreError if it cannot be read.
    """
    folder = open_store(pointer.model)
    card = ModelCard.read(folder, MANIFEST)
    if card.digest != pointer.digest:
        raise DataError(
            f"{place}: digest: {pointer.digest!r}, but {folder.uri}/{MANIFEST} has {card.digest!r}: another model lies there now; "
            "promote a run again"
        )
    hasher, size = hashlib.sha256(), 0
    with folder.open(WEIGHTS) as file:
        while chunk := file.read(CHUNK):
            hasher.update(chunk)
            size += len(chunk)
    found = hasher.hexdigest()
    for where, wanted in ((f"{folder.uri}/{MANIFEST}", card.weights_sha256), (place, pointer.weights_sha256)):
        if wanted != found:
            raise DataError(
                f"{where}: weights_sha256: {wanted!r}, but {folder.uri}/{WEIGHTS} has {found!r}: the weights are damaged or "
                "others; promote a run whose model is whole"
            )
    return size


def read(file: Path) -> Pointer | None:
    """The pointer in a file; None if there is no such file. Raises DataError for what is no pointer."""
    try:
        return parse(file.read_bytes(), str(file))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{file}: cannot read: {error.strerror or error}") from error


def parse(data: bytes, place: str) -> Pointer:
    """Raises DataError naming the place, the field and the value."""
    try:
        fields = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{place}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(fields, dict):
        raise DataError(f"{place}: must be a pointer to a model, as `ns promote RUN` writes it; got {type(fields).__name__}")
    return Pointer.check(fields, place)


def render(pointer: Pointer) -> str:
    return HEADER + yaml.safe_dump(pointer.model_dump(mode="json", exclude_none=True), sort_keys=False, width=140)


def subject(pointer: Pointer) -> str:
    """Of the commit, and of the pull request."""
    return f"Promote {pointer.run}, generation {pointer.generation}"


def move(found: Candidate, file: Path, *, dry: bool = False) -> Moved:
    """Writes the pointer into a file, whole or not at all. With `dry` only says what that would do."""
    text = render(found.pointer)
    before = read(file)
    changed = before is None or render(before) != text
    if changed and not dry:
        unfinished = file.with_name(f".{file.name}.tmp")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(file)
        except OSError as error:
            raise StoreError(f"{file}: cannot write: {error.strerror or error}; name another file with --to") from error
    return Moved(before, changed, None)


def commit(found: Candidate, file: Path, branch: str, *, dry: bool = False) -> Moved:
    """Puts the pointer on a branch: one commit on HEAD, in the repository that the file's folder is in. Files, index and HEAD stay as
    they are; the branch is made, or moved from wherever it was. No branch is made where HEAD has this pointer already.

    Raises ConfigError for a branch that cannot be moved, StoreError where git fails.
    """
    target = file.resolve()
    folder = next(parent for parent in target.parents if parent.is_dir())
    with scratch("promote") as own:
        top = Path(Commands(folder, own, s3=False).git("rev-parse", "--show-toplevel").removesuffix("\n"))
        commands = Commands(top, own, s3=False)
        commands.identify()
        ref = _free(commands, branch)
        name = target.relative_to(top).as_posix()
        try:
            base, spoken = commands.git("log", "-1", "--format=%H %ct", "HEAD").split()
        except StoreError as error:
            raise StoreError(f"{top}: HEAD is no commit ({error}); commit something first") from error
        there = commands.git("ls-tree", "--name-only", "-z", base, "--", name)
        old = commands.git("show", f"{base}:{name}") if there else None
        before = None if old is None else parse(old.encode(), f"HEAD:{name}")
        text = render(found.pointer)
        changed = before is None or render(before) != text
        if not changed or dry:
            return Moved(before, changed, None)
        # Neither before its parent nor at the time of the call, which would make each call's commit another one.
        when = max(int(found.accepted_at.timestamp()), int(spoken))
        author = re.sub(r"> .*", ">", commands.git("var", "GIT_COMMITTER_IDENT").strip())
        stream = (
            f"commit {ref}\ncommitter {author} {when} +0000\n{_data(_message(found.pointer))}"
            f"from {base}\nM 100644 inline {_quoted(name)}\n{_data(text)}\ndone\n"
        )
        commands.git("fast-import", "--quiet", "--force", "--done", data=stream)
        return Moved(before, True, commands.git("rev-parse", f"{ref}^{{commit}}").strip())


def evidence(root: Store, found: Candidate, before: Pointer | None, place: str) -> str:
    """What a reviewer wants to know, as Markdown: what moves, how it compares with the model before it, and the report of its run."""
    new = found.pointer
    rows = [
        ("run", *(plain(f"{one.run}, generation {one.generation}") if one else "" for one in (before, new))),
        ("model", *(f"`{one.model}`" if one else "" for one in (before, new))),
        ("digest", *(f"`{short(one.digest)}`" if one else "" for one in (before, new))),
        ("network", *(plain(f"{one.arch}, {one.classes:,} classes") if one else "" for one in (before, new))),
    ]
    made = [
        f"`{place}` moves to the best model of **{plain(new.run)}**, which its gate has accepted. Merging promotes; reverting the "
        f"merge goes back. All {found.bytes:,} bytes of its weights were read, and are those of the digests.",
        *table(("", "before", "after"), rows),
        "",
    ]
    made += _against(root, before, new)
    return "\n".join(made) + "\n" + markdown(found.facts)


def _against(root: Store, before: Pointer | None, new: Pointer) -> list[str]:
    """The two runs side by side, if both are at hand."""
    if before is None or before.run == new.run:
        return []
    if before.heldout != new.heldout:
        return ["> The held-out images are others than those of the model before: their numbers do not compare.", ""]
    try:
        return [comparison.markdown(comparison.compare(root, [before.run, new.run]))]
    except NsError as error:
        return [f"> Not compared with the run before: {plain(str(error))}", ""]


def _metrics(facts: Facts, model: Trained) -> dict[str, float]:
    """What was measured of the model's answers; not what it cost. Six digits: more would be noise in a diff."""
    found: dict[str, float] = {}
    for measure in measures(facts, model):
        if measure.better or measure.key == "gain":
            found[measure.key] = round(float(measure.value), 6)
            if measure.low is not None and measure.high is not None:
                found[f"{measure.key}_low"] = round(float(measure.low), 6)
                found[f"{measure.key}_high"] = round(float(measure.high), 6)
    return found


def _free(commands: Commands, branch: str) -> str:
    """The full name of a branch that may be moved."""
    ref = f"refs/heads/{branch}"
    try:
        commands.git("check-ref-format", ref)
    except StoreError as error:
        raise ConfigError(f"--branch {branch!r}: not a name that git takes; for example promote/production") from error
    if f"branch {ref}" in commands.git("worktree", "list", "--porcelain").splitlines():
        raise ConfigError(f"--branch {branch}: is checked out; name another one, or leave it out to change the file itself")
    return ref


def _message(pointer: Pointer) -> str:
    facts = {"Run": pointer.run, "Model": pointer.model, "Digest": pointer.digest}
    return "\n".join([subject(pointer), "", *(f"{name}: {value}" for name, value in facts.items())]) + "\n"


def _data(text: str) -> str:
    """In git-fast-import's form."""
    return f"data {len(text.encode())}\n{text}"


def _quoted(name: str) -> str:
    escaped = name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
