"""Uploads the compiled pipelines to the server in NS_KFP_URL: `python -m pipelines.upload`. Versions that exist stay as they are.

In the cluster a CronJob does this (k8s/base), so that a platform gets its pipelines back by itself after its database was lost.
NS_PIPELINE_INPUTS, a JSON object, is the cluster's placement (pipelines/placement.py).
"""

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ns.core.errors import NsError
from ns.core.printable import make_printable
from pipelines.kfp_client import KfpClient, UploadedPipeline
from pipelines.placement import Placement, read_placement, render_package
from pipelines.versions import describe_version

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
            sys.stdout.write(f"{upload_package(client, package).version}\n")
    except NsError as error:
        sys.stderr.write(f"error: {make_printable(str(error))}\n")
        return error.exit_code
    return 0


def load_packages(inputs: str, source: str, changes: Mapping[str, Any] | None = None) -> list[str]:
    """Reads the compiled pipelines (YAML) and fills in the placement in `inputs` (a JSON object; the default one if empty), with `changes`.

    Raises ConfigError naming `source` and the field, for an unknown field or an invalid value.
    """
    placement = Placement.from_json(inputs, source)
    if changes:
        changed = Placement.from_values(dict(changes), "--input")
        placement = replace(placement, **{name: getattr(changed, name) for name in changes})
    return [render_package(file.read_text(encoding="utf-8"), placement) for file in PACKAGES]


def upload_package(client: KfpClient, package: str) -> UploadedPipeline:
    """Uploads a compiled pipeline (YAML) as the platform's, unless that version exists; clients find it by its description."""
    return client.upload_pipeline(package, describe_version(package, read_placement(package)))


if __name__ == "__main__":
    sys.exit(main())
