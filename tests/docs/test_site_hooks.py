"""The site: its navigation, its links, and its pages in a browser are in tests/integration/test_docs_browser.py."""

from types import SimpleNamespace

import pytest

from docs import site_hooks


def test_navigation_is_the_list_of_pages():
    nav = site_hooks.build_nav((site_hooks.ROOT / "docs" / "README.md").read_text())
    titles = [next(iter(group)) for group in nav]
    assert titles == ["Home", "Start", "Use", "Operate", "Reference", "Contribute"]
    assert {"Examples": "examples/index.md"} in nav[1]["Start"]
    assert "runbooks/NstStalled.md" in nav[3]["Operate"][-1]["Runbooks"]


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("index.md", "docs/data.md#tables", "data.md#tables"),
        ("index.md", "CONTRIBUTING.md", "contributing.md"),
        ("data.md", "../examples/paper.yaml", "examples/paper.yaml"),
        ("method.md", "../benchmarks/results/label.md", "benchmarks/results/label.md"),
        ("benchmarks/results/index.md", "label.md", "label.md"),
        ("runbooks/NstStalled.md", "../runs.md#exit-codes", "../runs.md#exit-codes"),
        ("contributing.md", "docs/glossary.md", "glossary.md"),
        ("data.md", "https://arxiv.org/abs/1911.04252", "https://arxiv.org/abs/1911.04252"),
        ("reference/config.md", "../method.md", "../method.md"),
    ],
)
def test_links_between_files_become_links_between_pages(page, link, expected):
    place = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    assert site_hooks.on_page_markdown(f"see [this]({link}).", page=place) == f"see [this]({expected})."
