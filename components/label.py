def label(run: str, generation: int, teacher: str, shards: str, gpus: str) -> None:
    """Labels one range of the pool's shards with the un-noised teacher."""
    from ns.stages import label
    from ns.stages.context import RunRef

    ref = RunRef.from_uri(run)
    label.label_shards(ref, data=ref.read_data_key(), generation=generation, teacher=teacher, shards=shards, gpus=int(gpus))
