def select(run: str, data: str, generation: int, teacher: str) -> str:
    """Joins the labeled shards into a label set and selects what the student sees. Returns the key of the selection's folder."""
    from ns.stages import select
    from ns.stages.context import RunRef

    return select.commit_labels(RunRef.from_uri(run), data=data, generation=generation, teacher=teacher)
