"""Uploads the compiled pipelines to the server in NS_KFP_URL: `python -m pipelines.upload`. Versions that exist stay as they are.

In the cluster a CronJob does this (k8s/base), so that a platform gets its pipelines back by itself after its database was lost.
NS_PIPELINE_INPUTS, a JSON object, is the cluster's placement (pipelines/placement.py).
"""

import argparse
import os
import sys
from pathlib import Path

from ns.core.errors import NsError
from pipelines.kfp_client import KfpClient
from pipelines.placement import Placement, render_package

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
    """Reads the compiled pipelines (YAML) and fills in the placement in `inputs` (a JSON object; the default one if empty).

    Raises ConfigError naming `source` and the field, for an unknown field or an invalid value.
    """
    placement = Placement.from_json(inputs, source)
    return [render_package(file.read_text(encoding="utf-8"), placement) for file in PACKAGES]


if __name__ == "__main__":
    sys.exit(main())
