def prepare(run: str) -> list[str]:
    """Checks the experiment; finds or imports labeled images, pool and held-out images.

    Returns:
        The pool's ranges of shards START-STOP, half open: one for each labeling task.
    """
    from ns.stages import label, prepare
    from ns.stages.context import RunRef

    ref = RunRef.from_uri(run)
    return label.split_pool(ref, data=prepare.prepare_data(ref))
