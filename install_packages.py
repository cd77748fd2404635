"""python3 install_packages.py PYTHON ARGUMENT…: does `pip install ARGUMENT…` for the environment of PYTHON, with uv where that is the same.

uv takes a fraction of the time, but does not read pip's configuration, which may name a company's index. Settings that it has too are
handed on; if there are others, or uv cannot be had, or it fails, pip installs. Needs nothing but Python and pip; compiles no bytecode.
"""

import ast
import os
import subprocess
import sys
import tempfile
from pathlib import Path

UV = "uv==0.13.9"
SETTINGS = {
    "cert": ("SSL_CERT_FILE", " "),
    "client-cert": ("SSL_CLIENT_CERT", " "),
    "constraint": ("UV_CONSTRAINT", " "),
    "default-timeout": ("UV_HTTP_TIMEOUT", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "no-cache-dir": ("UV_NO_CACHE", " "),
    "no-index": ("UV_NO_INDEX", " "),
    "timeout": ("UV_HTTP_TIMEOUT", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
}
"""pip's setting → uv's variable, and what stands between several values there."""
HARMLESS = {
    *("cache-dir", "config-file", "disable-pip-version-check", "no-color", "no-input", "progress-bar", "quiet", "retries"),
    "root-user-action",
}
"""Settings that do not change what is installed, nor from where."""
SECTIONS = ("global", "install", ":env:")
"""Of pip's configuration, later ones win."""


def read_settings(lines: list[str]) -> dict[str, str]:
    """Returns what `pip config list` says of installations: setting → value."""
    found: dict[str, dict[str, str]] = {section: {} for section in SECTIONS}
    for line in lines:
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        if section in found:
            found[section][key] = str(ast.literal_eval(value))
    return {key: value for section in SECTIONS for key, value in found[section].items()}


def translate_settings(settings: dict[str, str]) -> dict[str, str]:
    """Returns uv's variables for pip's settings. Raises ValueError for one that has no equal."""
    variables = {}
    for key, value in settings.items():
        if key == "only-binary" and value == ":all:":
            variables["UV_NO_BUILD"] = "1"
        elif key in SETTINGS:
            variable, separator = SETTINGS[key]
            variables[variable] = separator.join(value.split())
        elif key not in HARMLESS:
            raise ValueError(f"uv has no setting for pip's {key}")
    return variables


def run_uv(python: str, arguments: list[str]) -> int:
    """Installs with uv. Returns its exit code, or 1 if it cannot be used here."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    listed = subprocess.run([*pip, "config", "list"], capture_output=True, text=True, check=True)
    try:
        variables = translate_settings(read_settings(listed.stdout.splitlines()))
    except ValueError as error:
        print(error)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        # Not into the environment, which is to hold what was asked for.
        if subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", folder, UV], close_fds=False).returncode:
            return 1
        command = [str(Path(folder, "bin", "uv")), "pip", "install", "--python", python, *arguments]
        environment = {**variables, "UV_PYTHON_DOWNLOADS": "never", **os.environ}
        try:
            return subprocess.run(command, env=environment, close_fds=False).returncode
        except OSError as error:
            print(f"uv does not start here: {error}")
            return 1


def main() -> int:
    python, *arguments = sys.argv[1:]
    code = run_uv(python, arguments)
    if code > 0:
        print("pip installs instead", flush=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, "install", "--no-compile"]
        # Files that are open stay open: one may be a lock, which is to be kept for as long as packages are written.
        code = subprocess.run([*pip, *arguments], close_fds=False).returncode
    # As a shell has it of what a signal ended.
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
