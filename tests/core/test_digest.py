"""The modules that count for a step are all that its code imports, but for those that cannot change what comes out."""

import ast
import re
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
    **{
        f"data/augment/{name}.py": "evaluation adds no noise"
        for name in ("erasing", "mixing", "policies", "randaugment", "reference")
    },
    "data/loading/shared_memory.py": "how images are handed over, not which",
    "modeling/network_noise.py": "inference has no noise",
    "modeling/tensor_shapes.py": "it checks weights before they are read",
    "modeling/pretrained.py": "settings are in the inputs by their values, and weights by their digests",
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


@pytest.mark.parametrize(
    "kind", ["TRAINING", "INFERENCE", "EVALUATION", "TEMPERATURE", "ROBUSTNESS", "FOREIGN", "LABELING", "DISTORTION"]
)
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


SOURCE = '''"""A module."""

import torch  # and a comment

LIMIT = 3  # px
"""What LIMIT is."""


class Layer:
    """A layer."""

    def __init__(self) -> None:
        """Makes one."""
        self.name = "# no comment"
        self.text = """# none
here either"""
'''


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("A module.", "Another text."),
        ("  # and a comment", ""),
        ("  # px", "  # pixels"),
        ("What LIMIT is.", "What\nLIMIT\nis."),
        ("A layer.", "Layers."),
        ("Makes one.", "Makes another."),
        ("\n\n\nclass", "\nclass"),
    ],
)
def test_comments_and_docstrings_do_not_count(before, after):
    assert before in SOURCE
    assert digest.strip_comments(SOURCE.replace(before, after)) == digest.strip_comments(SOURCE)


@pytest.mark.parametrize(
    ("before", "after"),
    [("LIMIT = 3", "LIMIT = 4"), ("# no comment", "# still none"), ("here either", "here"), ("class Layer", "class Block")],
)
def test_code_and_texts_count(before, after):
    assert before in SOURCE
    assert digest.strip_comments(SOURCE.replace(before, after)) != digest.strip_comments(SOURCE)


@pytest.mark.integration
def test_stripped_sources_are_the_same_program():
    """Every file of ours, compiled before and after: the same syntax tree but for the docstrings."""

    class Docstrings(ast.NodeTransformer):
        def visit_Expr(self, node):
            return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node

    for file in sorted(PACKAGE.rglob("*.py")):
        source = file.read_text()
        stripped = digest.strip_comments(source)
        before = ast.dump(Docstrings().visit(ast.parse(source)))
        # A body that was only a docstring is empty now, which Python cannot parse.
        try:
            after = ast.dump(ast.parse(stripped))
        except SyntaxError:
            assert re.search(r"^class .*:\n(?! )|:\n\S|:$", stripped, re.MULTILINE), file
            continue
        assert after == before, file


def test_read_sources_spares_reading_what_has_not_changed(monkeypatch, tmp_path):
    monkeypatch.setattr(digest, "PACKAGE", tmp_path)
    monkeypatch.setattr(digest, "RESULT_SOURCES", ("data", "training"))
    read = []
    monkeypatch.setattr(digest, "strip_comments", lambda source: read.append(source) or source)
    for file, source in (("data/a.py", "A = 1"), ("training/b.py", "B = 1")):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text(source)

    def compute():
        digest.digest_code.cache_clear()
        return digest.digest_code("data", "training")

    digest.read_sources()
    first = compute()
    assert read == ["A = 1", "B = 1"]
    (tmp_path / "training/b.py").write_text("B = 10")
    assert compute() != first
    assert read == ["A = 1", "B = 1", "B = 10"]


def test_digest_code_follows_the_versions_of_deciding_libraries(monkeypatch):
    versions = {"torch": "2.14.1+cpu", "torchvision": "0.29.1+cpu", "timm": "1.0.31", "pillow": "12.0", "simplejpeg": "1.8"}
    versions["opencv-python-headless"] = "5.0"
    monkeypatch.setattr(digest, "version", lambda name: versions[name])

    def forget():
        digest.digest_code.cache_clear()
        digest.read_library_version.cache_clear()

    def compute(*parts):
        forget()
        return digest.digest_code(*parts)

    training, selection = compute("modeling/factory.py"), compute("labeling/selection.py")
    versions["torch"] = "2.14.1+cu128"
    assert compute("modeling/factory.py") == training, "the same release for another device"
    versions["torch"] = "2.15.0"
    assert compute("modeling/factory.py") != training
    assert compute("labeling/selection.py") == selection, "a selection is made without torch"
    forget()
