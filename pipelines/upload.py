"""Uploads the compiled pipelines to the server in NS_KFP_URL: `python -m pipelines.upload`. Versions that exist stay as they are.

In the cluster a CronJob does this (k8s/base), so that a platform gets its pipelines back by itself after its database was lost.
NS_PIPELINE_INPUTS, a JSON object input → default, fills in the run forms for the cluster.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ns.core.errors import ConfigError, NsError, prefix_errors
from pipelines import dump_yaml_documents, load_yaml_documents
from pipelines.kfp_client import KfpClient, check_inputs

INPUTS_VARIABLE = "NS_PIPELINE_INPUTS"

PACKAGES = sorted(Path(__file__).parent.glob("*.yaml"))
"""The compiled pipelines."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Upload the compiled pipelines as versions named by their digests.")
    parser.add_argument("--kfp", default="", metavar="URL", help="Kubeflow Pipelines' address; NS_KFP_URL if not given")
    options = parser.parse_args(arguments)
    try:
        client = KfpClient(options.kfp)
        for package in load_packages(os.environ.get(INPUTS_VARIABLE, ""), INPUTS_VARIABLE):
            sys.stdout.write(f"{client.upload_pipeline(package).version}\n")
    except NsError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


def load_packages(inputs: str, source: str) -> list[str]:
    """Reads the compiled pipelines (YAML) and sets the defaults in `inputs` (a JSON object; none if empty).

    Raises ConfigError naming `source` and the input, for an unknown input or an invalid value.
    """
    try:
        defaults = json.loads(inputs or "{}")
    except ValueError as error:
        raise ConfigError(f"{source}: is not JSON ({error})") from error
    if not isinstance(defaults, dict):
        raise ConfigError(f"{source}: must be an object, input → value")
    return [_fill_defaults(file.read_text(encoding="utf-8"), defaults, source) for file in PACKAGES]


def _fill_defaults(package: str, defaults: Mapping[str, Any], source: str) -> str:
    """Sets defaults in a compiled pipeline. The same defaults give the same bytes, and so the same version."""
    if not defaults:
        return package
    with prefix_errors(source):
        check_inputs(package, defaults)
    spec, *rest = load_yaml_documents(package)
    inputs = spec["root"]["inputDefinitions"]["parameters"]
    for name, value in defaults.items():
        inputs[name]["defaultValue"] = value
    return dump_yaml_documents([spec, *rest])


if __name__ == "__main__":
    sys.exit(main())
