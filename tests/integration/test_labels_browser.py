"""The pages of label sets in headless Chromium: used with mouse and keyboard, and silent on console and network."""

import json
import time

import pytest

from ns.cli.app import run_command_line
from tests.integration.conftest import faults

pytestmark = pytest.mark.browser

CLASSES = ("cat", "</script><script>alert(1)</script>", 'quote"s & <b>co</b>')


@pytest.fixture
def label_sets(make_label_set, make_pool, tmp_path):
    """Two label sets of one pool, in which a third of the images change their class."""
    keys = [[f"<img src=x onerror=alert(1)>'{shard}-{row}" for row in range(40)] for shard in range(2)]
    folder, images = make_pool(tmp_path / "pool", keys, size=200)
    for side in (0, 1):
        rows = [
            [
                (key, (number + side * (number % 3 == 0)) % 3, 0.35 + 0.6 * ((7 * number) % 40) / 40)
                for number, key in enumerate(shard)
            ]
            for shard in keys
        ]
        make_label_set(tmp_path / str(side), rows, CLASSES, images, teacher=str(side))
    return tmp_path, [str(tmp_path / "0"), str(tmp_path / "1")], ["--pool", str(folder.root)]


def read_messages_and_requests(browser):
    """Messages on the console, and the URLs that were requested."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requested = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return browser.get_log("browser"), {url for url in requested if not url.startswith(("data:", "blob:", "chrome:"))}


def find_faults(browser):
    """What axe-core finds in the light and in the dark colors, at the window's width."""
    found = {}
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        found[scheme] = faults(browser)
    return found


def is_whole(browser, width):
    """Whether all pictures are shown and nothing is wider than the window."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    shown = browser.execute_script("return [...document.images].filter(i => i.offsetParent && !i.naturalWidth).length")
    return shown == 0 and browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_diff_page_shows_flips(label_sets, browser):
    folder, names, pool = label_sets
    page = folder / "diff.html"
    assert run_command_line(["labels", "diff", *names, *pool, "--html", str(page)]) == 0
    browser.get(page.as_uri())
    assert browser.execute_script("return document.images.length") == 28
    assert browser.find_element("tag name", "h1").text == "35.0 % of labels changed"
    assert is_whole(browser, 1280)
    assert is_whole(browser, 375)
    # Names are text: as headings of the matrix they can be read in full.
    heads = browser.execute_script("return [...document.querySelectorAll('.matrix thead th')].map(th => th.textContent)")
    assert tuple(heads) == CLASSES
    assert browser.execute_script("return document.scripts.length") == 0
    assert find_faults(browser) == {"light": [], "dark": []}
    assert read_messages_and_requests(browser) == ([], {page.as_uri()})


def test_audit_page_is_used_downloaded_and_applied(label_sets, browser, capsys):
    from selenium.webdriver.common.keys import Keys

    folder, names, pool = label_sets
    page = folder / "audit.html"
    assert run_command_line(["labels", "audit", names[0], *pool, "--images", "60", "--out", str(page)]) == 0
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})
    browser.get(page.as_uri())

    def counter():
        return browser.find_element("id", "counter").text

    def cards():
        return [card for card in browser.find_elements("css selector", "#sheet > li") if card.is_displayed()]

    def press(keys):
        browser.switch_to.active_element.send_keys(keys)

    assert len(cards()) == 48
    assert is_whole(browser, 1280)
    assert is_whole(browser, 375)
    assert find_faults(browser) == {"light": [], "dark": []}
    assert counter() == "0 of 60 reviewed, 0 wrong"
    # With the mouse: mark an image and name its class; an unknown class is refused.
    first = cards()[0]
    assert first.get_attribute("data-class") == "cat"
    first.find_element("tag name", "button").click()
    field = first.find_element("tag name", "input")
    field.send_keys("dgo")
    assert field.get_attribute("aria-invalid") == "true"
    field.clear()
    field.send_keys(CLASSES[2])
    assert field.get_attribute("aria-invalid") is None
    assert counter() == "1 of 60 reviewed, 1 wrong"
    # With the keyboard: Enter leaves the field, → moves, w marks, w again undoes, c names.
    field.send_keys(Keys.ENTER)
    press(Keys.ARROW_RIGHT)
    press("w")
    assert counter() == "2 of 60 reviewed, 2 wrong"
    press("w")
    assert counter() == "2 of 60 reviewed, 1 wrong"
    press(Keys.ARROW_RIGHT)
    press("c")
    press(CLASSES[1])
    press(Keys.ENTER)
    assert counter() == "3 of 60 reviewed, 2 wrong"
    press("n")
    assert counter() == "48 of 60 reviewed, 2 wrong"
    assert len(cards()) == 12
    # Closing and reopening the page loses nothing.
    browser.get(page.as_uri())
    assert counter() == "48 of 60 reviewed, 2 wrong"
    # Filters.
    browser.execute_script(
        "const s = document.getElementById('state'); s.value = 'wrong'; s.dispatchEvent(new Event('change'))"
    )
    assert len(cards()) == 2
    browser.execute_script("const s = document.getElementById('state'); s.value = 'new'; s.dispatchEvent(new Event('change'))")
    assert len(cards()) == 12
    browser.execute_script("const s = document.getElementById('state'); s.value = ''; s.dispatchEvent(new Event('change'))")
    browser.execute_script("const s = document.getElementById('class'); s.value = 'cat'; s.dispatchEvent(new Event('change'))")
    assert {card.get_attribute("data-class") for card in cards()} == {"cat"}
    browser.find_element("id", "download").click()
    file = folder / "audit.json"
    for _ in range(100):
        if file.exists():
            break
        time.sleep(0.1)
    answers = [image for image in json.loads(file.read_text())["images"] if image["wrong"]]
    assert [image["correct_class"] for image in answers] == [CLASSES[2], CLASSES[1]]
    corrections = folder / "corrections"
    command = [
        "labels",
        "audit",
        "apply",
        str(file),
        names[0],
        "--images",
        "60",
        *pool,
        "--corrections",
        str(corrections),
        "--json",
    ]
    capsys.readouterr()
    assert run_command_line(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["reviewed"], result["wrong"], len(result["mistakes"])) == (48, 2, 2)
    assert result["precision_low"] < result["precision"] < result["precision_high"]
    assert (corrections / "dataset.json").exists()
    assert read_messages_and_requests(browser) == ([], {page.as_uri()})
