"""The documentation as a site: every page is accessible and fits a telephone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import faults

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--no-directory-urls", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    # A link that leads nowhere is a warning, which ends a strict build.
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.browser
def test_pages_are_accessible_and_fit_a_narrow_screen(site, browser):
    pages = sorted(path for path in site.rglob("*.html") if path.name != "404.html")
    assert len(pages) > 40
    if not os.environ.get("NS_LONG_TESTS"):
        # One in eight, and those that are like no other.
        pages = pages[::8] + [site / name for name in ("index.html", "reference/config.html", "reference/messages.html")]
    wrong = {}
    browser.set_window_size(375, 800)
    for path in pages:
        browser.get(f"file://{path}")
        problems = faults(browser)
        if browser.execute_script("return document.documentElement.scrollWidth > window.innerWidth"):
            problems.append("wider than the screen")
        if problems:
            wrong[path.relative_to(site).as_posix()] = problems
    assert wrong == {}
