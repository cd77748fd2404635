def next_teacher(run: str, generation: int, first_teacher: str) -> str:
    """Decides from the run's verdicts whether the generation runs. Returns the key of its teacher's folder, or `stop`."""
    from ns.stages import gate
    from ns.stages.context import RunRef

    ref = RunRef.from_uri(run)
    return gate.resolve_teacher(ref, data=ref.read_data_key(), generation=generation, first_teacher=first_teacher)
