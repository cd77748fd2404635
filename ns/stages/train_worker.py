"""One of the processes that train a network together.

    torchrun … -m ns.stages.train_worker CONFIG ROOT RUN DATA GENERATION TEACHER SELECTION

The stage that starts them, on this machine or as a TrainJob on many, records the result; these only train.
"""

import sys

from ns.stages.context import RunRef
from ns.stages.train import join_training


def main() -> None:
    config_uri, root, run, data, generation, teacher, selection = sys.argv[1:]
    ref = RunRef(config_uri, root, run)
    join_training(ref, data=data, generation=int(generation), teacher=teacher, selection=selection)


if __name__ == "__main__":
    main()
