"""The modules that count for a step are all that its code imports, but for those that cannot change what comes out."""

import ast
from pathlib import Path

import pytest

from ns.core import digest
from ns.core.digest import PACKAGE

# How things are said, watched, kept and configured: what of it matters is in the inputs by its value, or in the files by their digests.
PLUMBING = {
    "config", "core", "storage", "modeling/manifest.py", "data/prepared.py",
}  # fmt: skip
ELSEWHERE = {
    "data/loading/sampler.py": "only WINDOW is taken of it, how many shards are held open",
    "data/augment/randaugment.py": "evaluation adds no noise",
    "labeling/thresholds.py": "a selection holds the thresholds that were found",
}
DISTORTED = {
    "data/loading/shard_reader.py": "whatever reads the images, they are those of the dataset's digest",
    "evaluation/robustness/perturbations.py": "sequences are not kept",
    "evaluation/result.py": "only how a subsample is written down",
}


def listed(parts: tuple[str, ...]) -> set[str]:
    files = [file for part in parts for file in ((PACKAGE / part).rglob("*.py") if "." not in part else [PACKAGE / part])]
    return {file.relative_to(PACKAGE).as_posix() for file in files}


def imported(file: str) -> set[str]:
    """Modules of ns, as files, that a file imports, at the top or within."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "ns":
            base = Path(*(node.module or "").split(".")[1:])
            places = [base.with_suffix(".py") if base.name else base, *(base / f"{name.name}.py" for name in node.names)]
            found |= {place.as_posix() for place in places if (PACKAGE / place).is_file()}
    return found


@pytest.mark.parametrize("kind", ["TRAINING", "INFERENCE", "EVALUATION", "TEMPERATURE", "ROBUSTNESS", "LABELING", "DISTORTION"])
def test_sources_of_a_result_are_all_that_they_import(kind):
    own = listed(getattr(digest, f"{kind}_SOURCES"))
    assert all((PACKAGE / file).is_file() for file in own)
    known = ELSEWHERE | (DISTORTED if kind == "DISTORTION" else {})
    missing = {
        name
        for file in own
        for name in imported(file) - own - known.keys()
        if name not in PLUMBING and Path(name).parts[0] not in PLUMBING
    }
    assert missing == set()
