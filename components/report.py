from kfp.dsl import HTML, Markdown, Output


def report(run: str, page: Output[HTML], summary: Output[Markdown]) -> str:
    """Writes the run's report. Returns the key of the report.

    Args:
        page: The report, with fewer pictures.
        summary: The same as tables.
    """
    from ns.stages import report
    from ns.stages.context import RunRef

    ref = RunRef.from_uri(run)
    key = report.report_run(ref)
    report.publish_report(ref, page, summary)
    return key
