"""Runs a component in its pod, with the arguments that KFP gives:

python -m components --executor_input JSON --function_to_execute NAME
"""

import argparse
import importlib
import json
import os

from kfp.dsl.executor import Executor

from components.cluster.mounts import read_mounts
from ns.core.errors import ConfigError
from ns.core.process import run_process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--executor_input", type=json.loads, required=True, help="inputs, and where outputs are written")
    parser.add_argument("--function_to_execute", required=True, help="name of the component")
    options = parser.parse_args()
    try:
        read_mounts(os.environ)
    except ConfigError as error:
        parser.exit(error.exit_code, f"error: {error}\n")
    module = importlib.import_module(f"components.{options.function_to_execute}")
    component = getattr(module, options.function_to_execute)
    Executor(executor_input=options.executor_input, function_to_execute=component).execute()


if __name__ == "__main__":
    run_process(main)
