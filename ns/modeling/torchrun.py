"""torchrun that ends without a stack trace when it is asked to stop: `python -m ns.modeling.torchrun`, with torchrun's arguments."""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.run import main

from ns.core.process import run_process


def run_torchrun() -> None:
    try:
        main()
    except SignalException as error:
        # Its processes were told to stop, and have said why they ended.
        sys.exit(128 + error.sigval)


if __name__ == "__main__":
    run_process(run_torchrun)
