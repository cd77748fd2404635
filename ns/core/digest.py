"""Identities: canonical JSON, hashed with SHA-256, and the digests of the code that results depend on."""

import ast
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]


def canonical_json(value: Any) -> bytes:
    """The only spelling of a JSON value: sorted keys, no spaces, UTF-8.

    Raises ValueError for NaN and infinities, TypeError for values that JSON cannot express.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def digest_json(value: Any) -> str:
    """SHA-256 of the canonical JSON, 64 hex digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def shorten_digest(full_digest: str) -> str:
    """The first 16 hex digits, which suffice for folder names within one project."""
    return full_digest[:16]


def hash_text(text: str, *, size: int, key: bytes = b"") -> int:
    """A number of `size` bytes that follows from the text and the key alone (BLAKE2b): a seed, or a rank in random order."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=size, key=key).digest())


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def digest_code(*parts: str) -> str:
    """Digest of parts of `ns` ("training", "modeling/factory.py") and of the libraries that they use, so that a change repeats the work.

    `parts` holds only code that can change a stage's output: a new report must not cost a new training. For the same reason comments,
    docstrings and blank lines do not count, nor do libraries that decide no pixel, weight or probability.
    """
    sources: dict[str, str] = {}
    libraries: dict[str, str] = {}
    for file in _list_sources(parts):
        source_digest, modules = _digest_file(file)
        sources[file.relative_to(PACKAGE).as_posix()] = source_digest
        for module in modules:
            libraries[module] = read_library_version(DECIDING_LIBRARIES[module])
    return digest_json({"sources": sources, "libraries": libraries})


def read_sources() -> None:
    """Reads the sources that results depend on. A process that is forked afterwards reads again only those that have changed since."""
    for file in _list_sources(RESULT_SOURCES):
        _digest_file(file)


def _digest_file(file: Path) -> tuple[str, frozenset[str]]:
    """Digest of a file's code as it is now, and the modules of deciding libraries that it imports."""
    state = file.stat()
    return _digest_source(file, state.st_mtime_ns, state.st_size)


@cache
def _digest_source(file: Path, _modified_ns: int, _size: int) -> tuple[str, frozenset[str]]:
    """Several parts may hold the file, and it takes milliseconds."""
    source = file.read_text(encoding="utf-8")
    return sha256_bytes(strip_comments(source).encode()), frozenset(_IMPORT.findall(source)) & DECIDING_LIBRARIES.keys()


def describe_code() -> dict[str, str]:
    """What decides results: the digest of all code that they depend on, and the versions of the libraries, by name."""
    libraries = {name: read_library_version(name) for name in DECIDING_LIBRARIES.values()}
    return {"ns": shorten_digest(digest_code(*RESULT_SOURCES))} | libraries


def digest_files() -> str:
    """Digest of all files of `ns` as they are, templates and comments too."""
    files = sorted(file for file in PACKAGE.rglob("*") if file.is_file() and file.suffix != ".pyc")
    return digest_json({file.relative_to(PACKAGE).as_posix(): sha256_file(file) for file in files})


def strip_comments(source: str) -> str:
    """Python source without comments, docstrings (of modules, classes, functions and attributes) and blank lines."""
    lines = source.splitlines()
    for statement in _iterate_docstrings(ast.parse(source).body):
        # Statements that are only text stand on lines of their own.
        for number in range(statement.lineno - 1, statement.end_lineno or statement.lineno):
            lines[number] = ""
    text = "\n".join(lines)
    text = _COMMENT.sub(lambda match: match["text"] or "", text)
    return _BLANK_LINES.sub(lambda match: match["text"] or "\n", text).strip()


def _iterate_docstrings(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        match statement:
            case ast.Expr(ast.Constant(str())):
                yield statement
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                yield from _iterate_docstrings(statement.body)


def _list_sources(parts: Iterable[str]) -> list[Path]:
    paths = (PACKAGE / part for part in parts)
    return [file for path in paths for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]


@cache
def read_library_version(library: str) -> str:
    """Version of an installed library, without the build that follows its + (cpu, cu128); empty if it is not installed."""
    try:
        return version(library).partition("+")[0]
    except PackageNotFoundError:
        return ""


# Texts in quotes are matched too, so that nothing is found inside of them.
_TEXT = r'(?P<text>"""(?:\\.|[^\\])*?"""|\'\'\'(?:\\.|[^\\])*?\'\'\'|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\')'
_COMMENT = re.compile(rf"{_TEXT}|[ \t]*#[^\n]*", re.DOTALL)
_BLANK_LINES = re.compile(rf"{_TEXT}|[ \t]*\n(?:[ \t]*\n)*", re.DOTALL)
_IMPORT = re.compile(r"^\s*(?:import|from) (\w+)", re.MULTILINE)
DECIDING_LIBRARIES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "timm": "timm",
    "PIL": "pillow",
    "simplejpeg": "simplejpeg",
    "cv2": "opencv-python-headless",
}
"""Libraries that decide pixels, weights and probabilities: module → distribution."""

RESULT_SOURCES = ("data", "evaluation", "labeling", "modeling", "training")
"""Rooms whose code makes results."""

# The code that each kind of result depends on; tests/core/test_digest.py compares it with the imports.
READING_SOURCES = (
    "data/dataset.py",
    "data/shards.py",
    "data/index.py",
    "data/loading/shard_reader.py",
    "data/loading/decode.py",
    "data/augment/transforms.py",
    "modeling/factory.py",
    "modeling/weight_names.py",
)
TRAINING_SOURCES = (
    *READING_SOURCES,
    "training",
    "modeling/precision.py",
    "modeling/distributed.py",
    "modeling/network_noise.py",
    "data/loading/sampler.py",
    "data/loading/stream.py",
    "data/augment",
    "labeling/label_set.py",
    "labeling/selection.py",
    "labeling/alignment.py",
    "labeling/pseudo_label_dataset.py",
)
INFERENCE_SOURCES = (
    *READING_SOURCES,
    "data/loading/jpeg_processes.py",
    "modeling/predictor.py",
    "modeling/foreign.py",
    "modeling/precision.py",
    "modeling/labeler.py",
)
EVALUATION_SOURCES = (
    *INFERENCE_SOURCES,
    "evaluation/accuracy.py",
    "evaluation/multi_label.py",
    "evaluation/result.py",
    "data/subsample.py",
    "data/class_names.py",
    "data/key_list.py",
)
TEMPERATURE_SOURCES = (*EVALUATION_SOURCES, "evaluation/temperature.py")
ROBUSTNESS_SOURCES = (*EVALUATION_SOURCES, "evaluation/robustness")
DISTORTION_SOURCES = (
    "data/loading/decode.py",
    "evaluation/robustness/corruptions.py",
    "evaluation/robustness/render.py",
    "data/subsample.py",
)
FOREIGN_SOURCES = (*INFERENCE_SOURCES, "labeling/foreign.py", "data/subsample.py")
LABELING_SOURCES = (*INFERENCE_SOURCES, "labeling/predict.py", "labeling/label_set.py")
