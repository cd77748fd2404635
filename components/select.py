def select(run: str, generation: int, teacher: str) -> str:
    """Joins the labeled shards into a label set and selects what the student sees. Returns the key of the selection's folder."""
    from ns.stages import select
    from ns.stages.context import RunRef

    ref = RunRef.from_uri(run)
    return select.commit_labels(ref, data=ref.read_data_key(), generation=generation, teacher=teacher)
