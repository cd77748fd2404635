def next_teacher(run: str, data: str, generation: int, first_teacher: str) -> str:
    """Decides from the run's verdicts whether the generation runs. Returns the key of its teacher's folder, or `stop`."""
    from ns.stages import gate
    from ns.stages.context import RunRef

    return gate.resolve_teacher(RunRef.from_uri(run), data=data, generation=generation, first_teacher=first_teacher)
