"""What integration tests share."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

import pytest
from filelock import FileLock

CHECKOUT = Path(__file__).parents[2]
ENGINE = Path(os.environ.get("NS_CONTAINER_ENGINE", CHECKOUT.parent / "shared" / "tools" / "container-engine"))

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


@pytest.fixture
def browser(tmp_path):
    """Headless Chromium that logs its console and its requests."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs chromium and chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for flag in [*FLAGS, f"--user-data-dir={tmp_path / 'chromium'}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.binary_location = shutil.which("chromium")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The root of two short runs: one with all that can be measured, and one whose student is refused, which finds most of its work
    done. No test may change it."""
    # pytest-xdist's workers have folders of their own in a common one.
    root = tmp_path_factory.getbasetemp().parent / f"finished-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"
    with FileLock(f"{root}.lock"):
        if not (root / "refusing" / "report.html").exists():
            _finish(root)
    return root


def _finish(root: Path) -> None:
    quick = [
        "generations=2",
        "teacher.train.epochs=60",
        "students.0.train.epochs=20",
        "selection.min_confidence=0.1",
        "gate.max_class_drop=1",
        "evaluation.suites=[clean,corruptions,perturbations,attacks]",
        "labeling.tasks=1",
        "evaluation.images=10",
        "evaluation.perturbation_frames=3",
        "evaluation.pgd_steps=[2]",
    ]
    for name, own in (("promoting", ["gate.min_gain=-1"]), ("refusing", ["gate.min_gain=0.9", "generations=1"])):
        options = [*quick, *own]
        command = [sys.executable, "-m", "ns", "run", "quickstart", "--run", name, "--root", str(root)]
        subprocess.run([*command, *(f"--set={o}" for o in options)], check=True, capture_output=True, timeout=300)


@pytest.fixture(scope="session")
def package_folders() -> list[str]:
    """Folders on this machine that pip is configured to take packages from."""
    configured = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    text = configured + os.environ.get("PIP_FIND_LINKS", "")
    paths = re.findall(r"(?:file://)?(/[A-Za-z0-9_./-]+)", text)
    # An index in `simple` points to files beside it.
    folders = {Path(path).parent if Path(path).name == "simple" else Path(path) for path in paths}
    return sorted(str(folder) for folder in folders if folder.is_dir())


@pytest.fixture(scope="session")
def engine() -> None:
    """A container engine that answers where DOCKER_HOST says."""
    if not ENGINE.exists():
        pytest.skip(f"needs a container engine: {ENGINE.name} beside the checkout, or NS_CONTAINER_ENGINE")
    # pytest-xdist's workers would start it at once.
    with FileLock(Path(tempfile.gettempdir()) / "container-engine.lock"):
        started = subprocess.run([str(ENGINE), "up"], capture_output=True, text=True, timeout=600)
    if started.returncode:
        pytest.skip(f"the container engine did not start: {started.stderr.strip().splitlines()[-1:]}")
    assert shutil.which("podman")
    for line in started.stdout.splitlines():
        if line.startswith("DOCKER_HOST="):
            os.environ.setdefault("DOCKER_HOST", line.partition("=")[2])


def faults(browser) -> list[str]:
    """What axe-core finds in the page that is open, of impact serious or critical: rule, what it is, and where."""
    source = (files("selenium_axe_python") / "axe-core" / "axe.min.js").read_text(encoding="utf-8")
    browser.execute_script(source)
    found = browser.execute_async_script("const done = arguments[0]; axe.run().then(done, error => done({error: `${error}`}))")
    assert found.get("passes"), found
    return [
        f"{rule['id']}: {rule['help']}: {rule['nodes'][0]['html'][:200]} ({len(rule['nodes'])})"
        for rule in found["violations"]
        if rule["impact"] in ("serious", "critical")
    ]
