"""Packages are installed by uv where that does what pip would do, and by pip otherwise."""

import stat
import zipfile
from pathlib import Path

import pytest

from install_packages import UV, read_settings, translate_settings
from tests.test_makefile import Machine

FAKE_UV = """#!/bin/sh
echo "index $UV_DEFAULT_INDEX, no index $UV_NO_INDEX" > "$HOME/uv-ran"
[ "$1 $2 $3" = "pip install --python" ] || exit 3
python=$4
shift 4
{end}
exec "$python" -m pip install "$@"
"""


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    machine = Machine(tmp_path)
    machine.has_python()
    return machine


def add_uv(machine: Machine, end: str = "") -> None:
    """Puts a wheel of uv where pip finds it: its uv installs with pip, after `end`."""
    name, version = UV.split("==")
    with zipfile.ZipFile(machine.project / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        info = f"{name}-{version}.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: b\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        script = zipfile.ZipInfo(f"{name}-{version}.data/scripts/{name}")
        script.external_attr = (stat.S_IFREG | 0o755) << 16
        wheel.writestr(script, FAKE_UV.format(end=end))
        wheel.writestr(f"{info}/RECORD", "")


def run_make(machine: Machine, monkeypatch: pytest.MonkeyPatch, **settings: str):
    plain = machine.environment
    monkeypatch.setattr(machine, "environment", lambda: plain(PIP_FIND_LINKS=str(machine.project), **settings))
    return machine.make("run")


@pytest.mark.integration
def test_uv_installs_with_pips_settings(machine, monkeypatch):
    add_uv(machine)
    done = run_make(machine, monkeypatch)
    assert done.stdout == "ran run quickstart\n", done.stderr
    assert (machine.project / "uv-ran").read_text() == "index , no index 1\n"
    assert "pip installs instead" not in (machine.project / ".venv" / "install.log").read_text()
    assert not (machine.project / ".venv" / "bin" / "uv").exists()


@pytest.mark.integration
def test_pip_installs_where_uv_fails(machine, monkeypatch):
    add_uv(machine, "exit 2")
    done = run_make(machine, monkeypatch)
    assert done.stdout == "ran run quickstart\n", done.stderr
    assert (machine.project / "uv-ran").exists()
    assert "pip installs instead" in (machine.project / ".venv" / "install.log").read_text()


@pytest.mark.integration
def test_pip_installs_where_its_settings_have_no_equal(machine, monkeypatch):
    add_uv(machine)
    done = run_make(machine, monkeypatch, PIP_EXTRA_INDEX_URL="https://pypi.example/simple")
    assert done.stdout == "ran run quickstart\n", done.stderr
    assert not (machine.project / "uv-ran").exists()


@pytest.mark.integration
def test_a_killed_uv_leaves_an_environment_that_is_made_again(machine, monkeypatch):
    add_uv(machine, "kill -9 $$")
    refused = run_make(machine, monkeypatch)
    assert refused.returncode != 0
    assert "error: the installation failed" in refused.stderr
    assert (machine.project / ".venv" / ".installing").exists()
    assert "pip installs instead" not in (machine.project / ".venv" / "install.log").read_text()


LISTED = """:env:.cert='/etc/ssl/ca.crt'
:env:.index-url='https://mirror.example/simple'
download.index-url='https://other.example/simple'
global.disable-pip-version-check='1'
global.find-links='\\n/opt/wheels\\n/srv/wheels'
global.index-url='https://pypi.example/simple'
global.timeout='60'
install.no-cache-dir='true'
install.only-binary=':all:'
"""


def test_uv_gets_pips_settings():
    assert translate_settings(read_settings(LISTED.splitlines())) == {
        "SSL_CERT_FILE": "/etc/ssl/ca.crt",
        "UV_DEFAULT_INDEX": "https://mirror.example/simple",
        "UV_FIND_LINKS": "/opt/wheels,/srv/wheels",
        "UV_HTTP_TIMEOUT": "60",
        "UV_NO_CACHE": "true",
        "UV_NO_BUILD": "1",
    }


@pytest.mark.parametrize(
    "line", ["global.extra-index-url='https://a.example'", "install.only-binary='torch'", "install.no-binary='numpy'"]
)
def test_settings_that_uv_has_not_are_left_to_pip(line):
    with pytest.raises(ValueError, match=r"uv has no setting for pip's (extra-index-url|only-binary|no-binary)$"):
        translate_settings(read_settings([line]))


def test_unset_configuration_needs_nothing():
    assert translate_settings(read_settings([])) == {}
