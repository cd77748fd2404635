"""The pointer: a small file in a git repository that names the model in use, with the evidence for it.

    models/production.yaml        a `ModelPointer`: URI of the model, digests, run, numbers

Merging a change of the pointer promotes a model, and reverting the merge goes back; git's history says who did it, when and why. The
same run gives the same pointer, and on the same HEAD the same commit, so that a repeated job changes nothing.
"""

import hashlib
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, NamedTuple

import yaml
from pydantic import ConfigDict

from ns.config.yaml_text import parse_yaml
from ns.core import log
from ns.core.digest import shorten_digest
from ns.core.errors import ConfigError, DataError, NsError, RunError, StoreError
from ns.core.git import GitCommands
from ns.modeling.manifest import Lineage, ModelManifest
from ns.reporting import comparison
from ns.reporting.context import ReportContext, TrainedModel, gather_context
from ns.reporting.markdown import escape_markdown, format_table, render_markdown
from ns.reporting.metrics import collect_metrics, flatten_metrics
from ns.runs.records import RunName
from ns.storage import LocalStore, Store, open_store
from ns.storage.documents import JsonDocument

HEADER = "# The model in use. `ns promote RUN` moves it, `ns promote check` checks it; `ns promote back` goes back.\n"


class ModelPointer(JsonDocument):
    """Names the model in use. People edit it, so a name that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    model: str
    """URI of the model's folder."""
    digest: str
    """Digest of the model's manifest."""
    weights_sha256: str
    arch: str
    classes: int
    root: str
    """URI of the root that holds the run."""
    run: RunName
    generation: int
    heldout: str
    """Digest of the held-out images that `metrics` were measured on, unless a name says otherwise."""
    lineage: Lineage
    metrics: dict[str, float]
    """Name → value, as Kubeflow shows them. The names of bounds end in `_low` and `_high`."""


@dataclass(frozen=True)
class PromotionCandidate:
    """A run's best model, which its gate has accepted."""

    pointer: ModelPointer
    context: ReportContext
    accepted_at: datetime
    """When the gate accepted the model."""
    weights_bytes: int
    """Size of the weights, all of which were read."""


class PointerMove(NamedTuple):
    """What happened to a pointer, or with `dry_run` would."""

    before: ModelPointer | None
    changed: bool
    commit: str | None
    """The commit with the change; None if nothing was committed."""


def read_candidate(root: Store, run: str) -> PromotionCandidate:
    """The best model of a run, all bytes of which are read and checked.

    Raises RunError unless the gate has accepted a student of the run, DataError if the model is damaged.
    """
    context = gather_context(root, run, pictures=0)
    best = context.best_model
    verdict = context.verdict_of(best.generation) if best else None
    if best is None or best.evaluation is None or verdict is None:
        reasons = "; ".join(f"generation {judged.generation}: {judged.reason}" for judged in context.verdicts)
        raise RunError(
            f"run {run}: its gate has accepted no student ({reasons or 'it has decided nothing yet'}); "
            + (f"`ns gate explain {run}` says what was needed" if reasons else "`ns run --resume` continues the run")
        )
    manifest = best.manifest
    pointer = ModelPointer(
        model=root.at(best.key).uri,
        digest=manifest.digest,
        weights_sha256=manifest.weights_sha256,
        arch=manifest.model.arch,
        classes=len(manifest.classes),
        root=root.uri,
        run=run,
        generation=best.generation,
        heldout=best.evaluation.dataset,
        lineage=manifest.lineage,
        metrics=_collect_pointer_metrics(context, best),
    )
    accepted_at = next(
        note.finished_at for note in context.stages if (note.generation, note.stage) == (best.generation, "gate")
    )
    return PromotionCandidate(pointer, context, datetime.fromisoformat(accepted_at), verify_model(pointer, f"run {run}"))


def verify_model(pointer: ModelPointer, origin: str) -> int:
    """Reads and checks the model that a pointer names. Returns the size of its weights in bytes.

    `origin` names the pointer in messages. Raises DataError if it is another model or damaged, StoreError if it cannot be read.
    """
    store = open_store(pointer.model)
    manifest = ModelManifest.load(store)
    if manifest.digest != pointer.digest:
        raise DataError(
            f"{origin}: digest: {pointer.digest!r}, but {store.uri}/{ModelManifest.filename} has {manifest.digest!r}: "
            "another model is there now; promote a run again"
        )
    with store.open(manifest.weights_key) as file:
        weights_digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # typeshed: no readinto
    for source, expected in (
        (f"{store.uri}/{ModelManifest.filename}", manifest.weights_sha256),
        (origin, pointer.weights_sha256),
    ):
        if expected != weights_digest:
            raise DataError(
                f"{source}: weights_sha256: {expected!r}, but {store.uri}/{manifest.weights_key} has {weights_digest!r}: the weights are "
                "damaged or those of another model; promote a run whose model is whole"
            )
    return store.size(manifest.weights_key)


def read_pointer(path: Path) -> ModelPointer | None:
    """The pointer in a file; None if there is no such file. Raises DataError if the file is no pointer, StoreError if it cannot be read.

    Links are refused: a request for a promotion could name by them any file of the machine that checks it.
    """
    linked = [part for part in (path, *(() if path.is_absolute() else path.parents)) if part.is_symlink()]
    if linked:
        raise DataError(f"{linked[0]}: is a link; a pointer is a plain file")
    try:
        return parse_pointer(path.read_bytes(), str(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{path}: cannot read: {error.strerror or error}") from error


def parse_pointer(data: bytes, origin: str) -> ModelPointer:
    """`origin` names the file in messages. Raises DataError naming the field and the value."""
    try:
        fields = parse_yaml(data, origin)
    except ConfigError as error:
        raise DataError(str(error)) from error
    required = [name for name, field in ModelPointer.model_fields.items() if field.is_required()]
    missing = [name for name in required if not isinstance(fields, dict) or name not in fields]
    if missing:
        # Nothing of such a file is quoted: it is something else.
        raise DataError(
            f"{origin}: must be a pointer to a model, as `ns promote RUN` writes it; it has no {', '.join(missing)}"
        )
    return ModelPointer.validate_fields(fields, origin)


def render_pointer(pointer: ModelPointer) -> str:
    return HEADER + yaml.safe_dump(pointer.model_dump(mode="json", exclude_none=True), sort_keys=False, width=140)


def format_title(pointer: ModelPointer) -> str:
    """Subject of the commit, and title of the pull request."""
    return f"Promote {pointer.run}, generation {pointer.generation}"


def write_pointer(pointer: ModelPointer, path: Path, *, dry_run: bool = False) -> PointerMove:
    """Writes the pointer into a file, completely or not at all. With `dry_run` only returns what that would do.

    Raises DataError if the file holds something else, StoreError if it cannot be written.
    """
    text = render_pointer(pointer)
    before = read_pointer(path)
    changed = before is None or render_pointer(before) != text
    if changed and not dry_run:
        try:
            LocalStore(path.parent).put(path.name, text.encode())
        except StoreError as error:
            raise StoreError(f"{error}; name another file with --to") from error
    return PointerMove(before, changed, None)


def commit_pointer(
    pointer: ModelPointer,
    path: Path,
    branch: str,
    *,
    title: str,
    accepted_at: datetime | None = None,
    dry_run: bool = False,
) -> PointerMove:
    """Commits the pointer on a branch: one commit on HEAD, in the repository that holds the file's folder.

    `title`: subject of the commit. `accepted_at`: its time, if HEAD is not younger; HEAD's own if not given.

    Files, index and HEAD stay as they are. The branch is created, or moved from where it was. Nothing is committed where HEAD has
    this pointer already, or with `dry_run`. Raises ConfigError for a branch that cannot be moved, StoreError where git fails.
    """
    commands, name = _open_repository(path)
    commands.ensure_identity()
    ref = _resolve_free_branch(commands, branch)
    try:
        base, head_seconds = commands.run_git("log", "-1", "--format=%H %ct", "HEAD").split()
    except StoreError as error:
        raise StoreError(f"{commands.path}: HEAD is no commit ({error}); commit something first") from error
    listing = commands.run_git("ls-tree", "--name-only", "-z", base, "--", name)
    old_text = commands.run_git("show", f"{base}:{name}") if listing else None
    before = None if old_text is None else parse_pointer(old_text.encode(), f"HEAD:{name}")
    text = render_pointer(pointer)
    changed = before is None or render_pointer(before) != text
    if not changed or dry_run:
        return PointerMove(before, changed, None)
    # Not the time of the call, which would give each call another commit; and not before the parent's.
    commit_seconds = max(int(accepted_at.timestamp()) if accepted_at else 0, int(head_seconds))
    author = re.sub(r"> .*", ">", commands.run_git("var", "GIT_COMMITTER_IDENT").strip())
    message = f"{title}\n\nRun: {pointer.run}\nModel: {pointer.model}\nDigest: {pointer.digest}\n"
    stream = (
        f"commit {ref}\ncommitter {author} {commit_seconds} +0000\n{_format_data_block(message)}"
        f"from {base}\nM 100644 inline {_quote_path(name)}\n{_format_data_block(text)}\ndone\n"
    )
    commands.run_git("fast-import", "--quiet", "--force", "--done", data=stream)
    return PointerMove(before, True, commands.run_git("rev-parse", f"{ref}^{{commit}}").strip())


def read_previous_pointer(path: Path) -> ModelPointer:
    """The pointer to another model that the file held before, from git's history.

    Raises DataError if the file is no pointer, RunError if it never held another one, StoreError where git fails.
    """
    commands, name = _open_repository(path)
    current = read_pointer(path)
    for commit in commands.run_git("log", "--format=%H", "HEAD", "--", name).split():
        if not commands.run_git("ls-tree", "--name-only", "-z", commit, "--", name):
            continue  # it was deleted by this commit
        try:
            earlier = parse_pointer(commands.run_git("show", f"{commit}:{name}").encode(), f"{commit[:7]}:{name}")
        except DataError as error:
            # What was no pointer then must not be in the way of going back now.
            log.get_logger().warning("passed over", commit=commit[:7], reason=str(error))
            continue
        if current is None or earlier.digest != current.digest:
            return earlier
    raise RunError(f"{path}: git's history has no pointer to another model; `ns promote RUN` moves it to a run's best model")


def _open_repository(path: Path) -> tuple[GitCommands, str]:
    """Git in the repository that holds the file's folder, and the name of the file in it."""
    target = path.resolve()
    directory = next(parent for parent in target.parents if parent.is_dir())
    try:
        repository = Path(GitCommands(directory).run_git("rev-parse", "--show-toplevel").removesuffix("\n"))
    except StoreError as error:
        if "not a git repository" not in str(error):
            raise
        raise StoreError(f"{path}: is in no git repository: {error}; name a file in one, or run `git init`") from error
    return GitCommands(repository), target.relative_to(repository).as_posix()


def render_evidence(root: Store, promoted: PromotionCandidate, before: ModelPointer | None, pointer_path: str) -> str:
    """What a reviewer needs, as Markdown: what moves, how it compares with the model before it, and the report of its run."""
    new = promoted.pointer
    names = ("run", "model", "digest", "network")
    rows = list(zip(names, _describe_pointer(before), _describe_pointer(new), strict=True))
    lines = [
        f"`{pointer_path}` moves to the best model of **{escape_markdown(new.run)}**, which its gate has accepted. Merging promotes it; "
        f"reverting the merge goes back. All {promoted.weights_bytes:,} bytes of its weights were read, and match the digests.",
        *format_table(("", "before", "after"), rows),
        "",
    ]
    lines += _compare_with_previous(root, before, new)
    return "\n".join(lines) + "\n" + render_markdown(promoted.context)


def _describe_pointer(pointer: ModelPointer | None) -> tuple[str, str, str, str]:
    """Markdown of its run, model, digest and network."""
    if pointer is None:
        return ("", "", "", "")
    return (
        escape_markdown(f"{pointer.run}, generation {pointer.generation}"),
        f"`{pointer.model}`",
        f"`{shorten_digest(pointer.digest)}`",
        escape_markdown(f"{pointer.arch}, {pointer.classes:,} classes"),
    )


def _compare_with_previous(root: Store, before: ModelPointer | None, new: ModelPointer) -> list[str]:
    """The two runs side by side, if both can be read."""
    if before is None or before.run == new.run:
        return []
    if before.heldout != new.heldout:
        return ["> The model before was measured on other held-out images: the numbers do not compare.", ""]
    try:
        return [comparison.render_comparison_markdown(comparison.compare_runs(root, [before.run, new.run]))]
    except NsError as error:
        return [f"> Not compared with the run before: {escape_markdown(str(error))}", ""]


def _collect_pointer_metrics(context: ReportContext, model: TrainedModel) -> dict[str, float]:
    """The metrics of the model's answers, without those of its cost. Six digits: more would be noise in a diff."""
    metrics = [metric for metric in collect_metrics(context, model) if metric.better or metric.key == "gain"]
    return {key: round(value, 6) for key, value in flatten_metrics(metrics).items()}


def _resolve_free_branch(commands: GitCommands, branch: str) -> str:
    """The full name of a branch. Raises ConfigError if it is no name for one, or checked out."""
    ref = f"refs/heads/{branch}"
    try:
        if branch.startswith("-"):
            raise StoreError("commands take it for an option")
        commands.run_git("check-ref-format", ref)
    except StoreError as error:
        raise ConfigError(f"--branch {branch!r}: not a name that git takes; for example promote/production") from error
    if f"branch {ref}" in commands.run_git("worktree", "list", "--porcelain").splitlines():
        raise ConfigError(
            f"--branch {branch}: is checked out; name another branch, or leave out --branch to change the file itself"
        )
    return ref


def _format_data_block(text: str) -> str:
    """In the form of git fast-import."""
    return f"data {len(text.encode())}\n{text}"


def _quote_path(name: str) -> str:
    escaped = name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
