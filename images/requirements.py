"""Prints the packages that the project needs, one per line: `python3 requirements.py EXTRA…`, beside its pyproject.toml."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
packages = [*project["dependencies"], *(line for extra in sys.argv[1:] for line in project["optional-dependencies"][extra])]
sys.stdout.write("".join(f"{line}\n" for line in packages))
