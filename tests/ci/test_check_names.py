"""`.ci/check_names.py` finds names and words that the glossary does without, and documents that name what is not there."""

import importlib.util
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture
def check_names(tmp_path, monkeypatch):
    """The script, over an empty checkout."""
    spec = importlib.util.spec_from_file_location("check_names", CHECKOUT / ".ci" / "check_names.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "CHECKOUT", tmp_path)
    (tmp_path / "ns").mkdir()
    (tmp_path / "Makefile").write_text("run: ## Run\n")
    return module


def write_module(root: Path, name: str, text: str) -> Path:
    path = root / "ns" / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("def located(): ...\n", "ns/a.py:1: located: one word does not say what it does; use verb and noun"),
        ("def locate_keys(place): ...\n", "ns/a.py:1: place: retired name"),
        ("class Store:\n    def found(self): ...\n", "ns/a.py:2: found: one word does not say what it does; use verb and noun"),
    ],
)
def test_check_code_refuses_names_that_say_nothing(check_names, tmp_path, text, problem):
    assert problem in check_names.check_code([write_module(tmp_path, "a.py", text)])[0]


def test_check_code_allows_words_of_the_field_and_private_or_short_properties(check_names, tmp_path):
    text = "def train(): ...\nclass Store:\n    @property\n    def digest(self): ...\n    def _at(self): ...\n"
    assert check_names.check_code([write_module(tmp_path, "a.py", text)])[0] == []


def test_check_code_counts_words_lines_and_shared_names(check_names, tmp_path):
    paths = [write_module(tmp_path, f"{name}.py", "def write_rows(): ...\n\n\nclass Rows: ...\n") for name in "ab"]
    problems, figures = check_names.check_code(paths)
    assert problems == [f"ns/a.py, ns/b.py: {name}: one name, several meanings" for name in ("write_rows", "Rows")]
    assert figures == {"names_mean_words": 2.0, "names_shared": 2, "loose_modules": 2, "product_lines": 8}


def test_check_prose_finds_retired_words(check_names, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"Good.\n{'who' + 'ever'} labels an aria-labelledby\n")
    assert check_names.check_prose([page]) == [f"page.md:2: {'who' + 'ever'}: retired word"]


def test_check_documents_finds_files_and_targets_that_do_not_exist(check_names, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("`ns/gone.py`, `ns/`, `make run`, `make nothing`\n")
    assert check_names.check_documents([page]) == ["page.md: ns/gone.py: no such file", "page.md: make nothing: no such target"]
