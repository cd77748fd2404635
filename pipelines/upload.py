"""Uploads the compiled pipelines: `python -m pipelines.upload`, to the server in NS_KFP_URL. What is there is left as it is.

In the cluster a CronJob does it (k8s/base), so that a platform has its pipelines without anybody's help, also after its database was
lost.
"""

import argparse
import sys
from pathlib import Path

from ns.errors import NsError
from pipelines.submit import Server

PACKAGES = sorted(Path(__file__).parent.glob("*.yaml"))
"""All that `make compile` wrote."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Upload the compiled pipelines as versions named by their digests.")
    parser.add_argument("--kfp", default="", metavar="URL", help="Kubeflow Pipelines' address; NS_KFP_URL if not given")
    asked = parser.parse_args(arguments)
    try:
        server = Server(asked.kfp)
        for package in PACKAGES:
            sys.stdout.write(f"{server.upload(package.read_text(encoding='utf-8')).version}\n")
    except NsError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
