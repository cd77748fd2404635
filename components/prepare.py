from typing import NamedTuple


def prepare(run: str) -> NamedTuple("Prepared", data=str, shards=list[str]):
    """Checks the experiment; finds or imports labeled images, pool and held-out images.

    Returns:
        Key of the prepared data, and the pool's ranges of shards START-STOP, half open: one for each labeling task.
    """
    from ns.stages import label, prepare
    from ns.stages.context import RunRef

    ref = RunRef.from_uri(run)
    data = prepare.prepare_data(ref)
    return data, label.split_pool(ref, data=data)
