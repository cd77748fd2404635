"""Uploads the compiled pipelines: `python -m pipelines.upload`, to the server in NS_KFP_URL. What is there is left as it is.

In the cluster a CronJob does it (k8s/base), so that a platform has its pipelines without anybody's help, also after its database was
lost. Their run forms are filled in for the cluster by NS_PIPELINE_INPUTS: a JSON object, input → default.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ns.core.errors import ConfigError, NsError
from pipelines import load_yaml_documents
from pipelines.kfp_client import KfpClient

INPUTS_VARIABLE = "NS_PIPELINE_INPUTS"

PACKAGES = sorted(Path(__file__).parent.glob("*.yaml"))
"""All that `make compile` wrote."""


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
    """All compiled pipelines (YAML), with the defaults in `inputs` (a JSON object; none if empty).

    Raises ConfigError, which names `place`, for inputs that a pipeline does not have, or not with such values.
    """
    try:
        defaults = json.loads(inputs or "{}")
    except ValueError as error:
        raise ConfigError(f"{source}: is no JSON ({error})") from error
    if not isinstance(defaults, dict):
        raise ConfigError(f"{source}: must be an object, input → value")
    return [_fill_defaults(file.read_text(encoding="utf-8"), defaults, source) for file in PACKAGES]


def _fill_defaults(package: str, defaults: Mapping[str, Any], source: str) -> str:
    """A compiled pipeline with other defaults of its inputs: the same bytes each time, so that its digest stays."""
    if not defaults:
        return package
    spec, *rest = load_yaml_documents(package)
    inputs = spec["root"]["inputDefinitions"]["parameters"]
    for name, value in defaults.items():
        if name not in inputs:
            raise ConfigError(f"{source}: {name}: is no input of the pipeline; its inputs are {', '.join(sorted(inputs))}")
        allowed = inputs[name].get("literals")
        if allowed and value not in allowed:
            raise ConfigError(f"{source}: {name}: invalid value {value!r}: must be one of {', '.join(map(str, allowed))}")
        if type(value) is not type(inputs[name].get("defaultValue", value)):
            raise ConfigError(f"{source}: {name}: invalid value {value!r}: must be like {inputs[name]['defaultValue']!r}")
        inputs[name]["defaultValue"] = value
    return yaml.dump_all([spec, *rest], Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), width=120)


if __name__ == "__main__":
    sys.exit(main())
