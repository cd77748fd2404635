"""One of the processes that train a network together: torchrun … -m ns.training.worker CONFIG ROOT RUN DATA GENERATION TEACHER LABELS.

Whoever starts them (a training step on this machine, a TrainJob's step on many) records the result; these only train.
"""

import sys

from ns.stages import steps


def main() -> None:
    config_uri, root, run, data, generation, teacher, selection_key = sys.argv[1:]
    steps.join_training(config_uri, root, run, data, int(generation), teacher, selection_key)


if __name__ == "__main__":
    main()
