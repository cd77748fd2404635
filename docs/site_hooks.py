"""Hooks of mkdocs: the pages that lie outside docs/, the generated reference, and the navigation, which is docs/README.md's list."""

import itertools
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from docs.reference import render_command_page, render_config_page, render_message_page, render_metric_page
from ns.cli.app import app

ROOT = Path(__file__).parents[1]
HOME = "index.md"
REFERENCE = {
    "reference/config.md": ("The experiment", render_config_page),
    "reference/commands.md": ("Commands", lambda: render_command_page(app)),
    "reference/metrics.md": ("Metrics", render_metric_page),
    "reference/messages.md": ("Messages", render_message_page),
}
"""Page → its title, and what makes it."""
LINK = re.compile(r"(?P<before>\]\()(?P<target>[^)\s#:]+)(?P<fragment>#[^)\s]*)?\)")
NAV_LINE = re.compile(r"^- \[(?P<title>[^\]]+)\]\((?P<target>[^)#]+)\)", re.MULTILINE)


def map_outside_pages() -> dict[str, str]:
    """Files outside docs/ that the site has: their path from the root → their path in the site."""
    pages = {"README.md": HOME, "docs/README.md": HOME, "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
    outside = (ROOT.glob(pattern) for pattern in ("examples/*.*", "benchmarks/results/*.md", "benchmarks/results/*.svg"))
    for path in sorted(itertools.chain.from_iterable(outside)):
        source = path.relative_to(ROOT).as_posix()
        pages[source] = re.sub(r"README\.md$", HOME, source)
    return pages


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.nav = build_nav((ROOT / "docs" / "README.md").read_text())
    return config


def build_nav(text: str) -> list[dict[str, Any]]:
    """The groups of a page of lists, each under a line in bold, and the pages that only the site has."""
    groups = re.split(r"^\*\*(.+)\*\*$", text, flags=re.MULTILINE)[1:]
    nav: list[dict[str, Any]] = [{"Home": HOME}]
    for title, body in zip(groups[::2], groups[1::2], strict=True):
        pages = [{line["title"]: resolve_page("docs/README.md", line["target"])} for line in NAV_LINE.finditer(body)]
        nav.append({title: pages})
    nav.insert(-1, {"Reference": [{title: page} for page, (title, _) in REFERENCE.items()]})
    pages_by_group = {title: pages for group in nav for title, pages in group.items()}
    runbooks = sorted(path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/runbooks/*.md"))
    pages_by_group["Operate"].append({"Runbooks": runbooks})
    measured = [page for page in map_outside_pages().values() if page.startswith("benchmarks/") and page.endswith(".md")]
    pages_by_group["Contribute"] += [{"Changelog": "changelog.md"}, {"What was measured": measured}]
    return nav


def resolve_page(source: str, target: str) -> str:
    """A link of the file `source`, a path from the root, as a path in the site."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    return map_outside_pages().get(path, path.removeprefix("docs/"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in map_outside_pages().items():
        if source != "docs/README.md":
            files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for page, (_, render) in REFERENCE.items():
        files.append(File.generated(config, page, content=render()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links between files of the repository into links between pages of the site."""
    sources = {site_path: source for source, site_path in reversed(map_outside_pages().items())}
    here = page.file.src_uri
    if here in REFERENCE:
        return markdown
    source = sources.get(here, f"docs/{here}")

    def rewrite(link: re.Match[str]) -> str:
        target = posixpath.relpath(resolve_page(source, link["target"]), posixpath.dirname(here) or ".")
        return f"{link['before']}{target}{link['fragment'] or ''})"

    return LINK.sub(rewrite, markdown)
