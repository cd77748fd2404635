"""One of the processes that train a network together.

    torchrun … -m ns.stages.train_worker CONFIG ROOT RUN DATA GENERATION TEACHER SELECTION

The stage that starts them, on this machine or as a TrainJob on many, records the result; these only train. Of those on other machines
the first also evaluates the model, since the stage that started them has no GPU.
"""

import sys

from ns.core.process import run_process
from ns.stages.context import RunRef
from ns.stages.evaluate import evaluate_generation
from ns.stages.train import has_remote_client, join_training


def main() -> None:
    config_uri, root, run, data, generation, teacher, selection = sys.argv[1:]
    ref = RunRef(config_uri, root, run)
    model = join_training(ref, data=data, generation=int(generation), teacher=teacher, selection=selection)
    if model and has_remote_client():
        evaluate_generation(ref, data=data, generation=int(generation), model=model)


if __name__ == "__main__":
    run_process(main)
