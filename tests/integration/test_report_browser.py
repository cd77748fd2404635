"""Reports of real runs in headless Chromium, in the widths of a desktop and of a phone."""

import pytest

from ns.cli.app import run_command_line
from tests.integration.conftest import faults

pytestmark = pytest.mark.browser

CONTRAST = """
const rgb = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
const luminance = color => {
  const [r, g, b] = rgb(color).map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const page = luminance(getComputedStyle(document.body).backgroundColor);
return [...document.querySelectorAll('p, td, th, h1, h2, a, figcaption, .card, svg text')].map(element => {
  const style = getComputedStyle(element);
  const text = luminance(element.closest('svg') ? style.fill : style.color);
  return (Math.max(text, page) + 0.05) / (Math.min(text, page) + 0.05); }).reduce((a, b) => Math.min(a, b));
"""


def open_page(browser, path, width=1280, scheme="light", media="screen"):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [feature]})
    browser.get(path.as_uri())


def check_opens_well(browser, path, width, scheme):
    """The unfolded page logs nothing, shows all images, is no wider than the window, and has no serious accessibility fault."""
    open_page(browser, path, width, scheme)
    browser.execute_script("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert browser.get_log("browser") == []
    assert browser.execute_script("return [...document.images].filter(i => !i.naturalWidth).length") == 0
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    # Text keeps a contrast of 4.5 : 1 with the page (WCAG 2.1, 1.4.3), and charts are drawn in the page's colors.
    assert browser.execute_script(CONTRAST) >= 4.5
    assert faults(browser) == []
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [1280, 375])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("run", ["promoting", "refusing"])
def test_report_opens_well(finished, browser, run, width, scheme):
    path = finished / run / "report.html"
    assert path.stat().st_size < 5_000_000
    check_opens_well(browser, path, width, scheme)
    assert browser.execute_script("return document.images.length") > 40


def test_accessibility_check_finds_faults(browser, tmp_path):
    page = tmp_path / "faulty.html"
    page.write_text("<!doctype html><html lang=en><title>x</title><main><h1>x</h1><p style='color: #ccc'>faint</p></main>")
    open_page(browser, page)
    assert [fault.partition(":")[0] for fault in faults(browser)] == ["color-contrast"]


def test_report_sections_are_reached_with_keyboard(finished, browser):
    from selenium.webdriver.common.keys import Keys

    open_page(browser, finished / "promoting" / "report.html")
    wanted = [
        "next",
        "loop",
        "models",
        "gate",
        "robustness",
        "calibration",
        "classes",
        "disagreement",
        "labels",
        "diff",
        "pictures",
        "training",
        "lineage",
    ]
    links = browser.execute_script("return [...document.querySelectorAll('nav a')].map(a => a.getAttribute('href').slice(1))")
    assert links == wanted == browser.execute_script("return [...document.querySelectorAll('main section')].map(s => s.id)")
    # The first thing that Tab reaches leads past the links.
    browser.find_element("tag name", "body").send_keys(Keys.TAB)
    assert browser.switch_to.active_element.text == "Skip to the content"
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert browser.current_url.endswith("#main")
    browser.execute_script("document.querySelector('summary').focus()")
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert browser.execute_script("return document.querySelector('details').open")


def test_report_prints_light_and_unfolded(finished, browser):
    open_page(browser, finished / "promoting" / "report.html", 800, "dark", media="print")
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not browser.find_element("tag name", "nav").is_displayed()
    assert browser.execute_script("return document.querySelector('details pre').checkVisibility({contentVisibilityAuto: true})")
    assert browser.execute_script("return document.querySelector('details pre').getBoundingClientRect().height") > 100


def test_generation_page_opens_well(finished, browser, tmp_path):
    from ns.reporting.artifacts import render_small_html
    from ns.storage import LocalStore

    page = tmp_path / "generation.html"
    page.write_text(render_small_html(LocalStore(finished), "promoting", 2))
    assert page.stat().st_size < 1_000_000
    check_opens_well(browser, page, 1280, "light")


@pytest.mark.parametrize("width", [1280, 375])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_comparison_page_opens_well(finished, browser, tmp_path, width, scheme):
    page = tmp_path / "comparison.html"
    assert run_command_line(["report", "compare", "promoting", "refusing", "--root", str(finished), "--out", str(page)]) == 0
    check_opens_well(browser, page, width, scheme)
    assert "gate.min_gain" in browser.find_element("id", "settings").text
