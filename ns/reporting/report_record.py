"""What a run's report was drawn of, so that a run which is finished anyway need not draw it again."""

from functools import cache

from ns.core.digest import describe_code, digest_files, digest_json, read_library_version, sha256_bytes
from ns.core.errors import NsError
from ns.runs.records import CONFIG_FILE, REPORT_FILE, RunRecord, list_stage_notes, record_key
from ns.storage import Store
from ns.storage.documents import JsonDocument, Sha256

DRAWING_LIBRARIES = ("jinja2", "markupsafe", "matplotlib", "numpy", "pyarrow", "scipy")


class ReportRecord(JsonDocument):
    """Stands beside the report, and is written after it."""

    filename = "report.json"

    inputs: Sha256
    """Digest of all that the page is made of: code, experiment, and what the stages left."""
    sha256: Sha256
    """Digest of the page."""


def provide_report(root: Store, run: str) -> tuple[str, bool]:
    """Writes ROOT/RUN/report.html, unless it is there as it would be written. Returns its key, and whether it was there."""
    key, run_store = f"{run}/{REPORT_FILE}", root.at(run)
    inputs = digest_report_inputs(root, run)
    record = ReportRecord.find_file(run_store, ReportRecord.filename)
    # The page itself is read: it may be lost, cut off, or of another time, since `ns report` writes it too.
    if record and record.inputs == inputs and run_store.exists(REPORT_FILE) and _digest_page(run_store) == record.sha256:
        return key, True
    # Loaded only now: matplotlib takes a second.
    from ns.reporting.page import write_report

    write_report(root, run)
    if inputs:
        ReportRecord(inputs=inputs, sha256=_digest_page(run_store)).save(run_store)
    return key, False


def _digest_page(run_store: Store) -> str:
    return sha256_bytes(run_store.get(REPORT_FILE))


def digest_report_inputs(root: Store, run: str) -> str | None:
    """Digest of all that the report of a run is made of; None if a part of it cannot be read.

    The documents that the notes name hold the digests of what they stand for: datasets, weights, labels and predictions.
    """
    notes = list_stage_notes(root, run)
    try:
        record = RunRecord.load_file(root, record_key(run))
        outputs = {key: sha256_bytes(root.get(key)) for note in notes for key in note.outputs.values()}
        experiment = sha256_bytes(root.get(f"{run}/{CONFIG_FILE}"))
    except NsError:
        return None
    return digest_json(
        {
            "code": _digest_drawing_code(),
            "run": f"{root.uri}/{run}",
            "experiment": experiment,
            "record": record.model_dump(mode="json", exclude={"code", "finished_at"}),
            "notes": [note.model_dump(mode="json") for note in notes],
            "outputs": outputs,
        }
    )


@cache
def _digest_drawing_code() -> str:
    """Digest of all files of `ns`, templates too, and of the libraries that draw: a page is drawn once too often, never too seldom."""
    libraries = {library: read_library_version(library) for library in DRAWING_LIBRARIES}
    return digest_json({"files": digest_files(), "libraries": describe_code() | libraries})
