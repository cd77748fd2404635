"""A real run's report in headless Chromium, as wide as a desk and as narrow as a phone."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    quick = [
        "generations=2",
        "teacher.train.epochs=60",
        "students.0.train.epochs=20",
        "gate.min_gain=-1",
        "selection.min_confidence=0.1",
    ]
    command = [sys.executable, "-m", "ns", "run", "quickstart", "--root", str(root), *(f"--set={o}" for o in quick)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (path,) = root.glob("*/report.html")
    return path


@pytest.mark.parametrize("width", [1280, 375])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report_opens_without_error_and_fits(report, browser, width, scheme):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get(report.as_uri())
    assert browser.get_log("browser") == []
    assert browser.execute_script("return [...document.images].filter(i => !i.naturalWidth).length") == 0
    assert browser.execute_script("return document.images.length") > 40
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    # Text keeps a contrast of 4.5 : 1 with the page (WCAG 2.1, 1.4.3), and charts are drawn in the page's colours.
    contrast = browser.execute_script(
        """
        const rgb = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
        const luminance = colour => {
          const [r, g, b] = rgb(colour).map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
          return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        const page = luminance(getComputedStyle(document.body).backgroundColor);
        return [...document.querySelectorAll('p, td, th, h1, h2, a, figcaption, .card, svg text')].map(element => {
          const style = getComputedStyle(element);
          const text = luminance(element.closest('svg') ? style.fill : style.color);
          return (Math.max(text, page) + 0.05) / (Math.min(text, page) + 0.05); }).reduce((a, b) => Math.min(a, b));
        """
    )
    assert contrast >= 4.5
    # The sections are reached and the configuration opens with the keyboard.
    browser.execute_script("document.querySelector('summary').focus()")
    from selenium.webdriver.common.keys import Keys

    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert browser.execute_script("return document.querySelector('details').open")
