from benchmarks.loop import find_stage_intervals, measure_union


def test_measure_union_counts_overlaps_once():
    assert measure_union([(0, 2), (1, 3), (5, 6)]) == 4
    assert measure_union([(0, 10), (2, 3)]) == 10
    assert measure_union([]) == 0


def test_find_stage_intervals_pairs_start_and_end():
    events = [
        {"event": "started", "pid": 1, "stage": "label", "generation": 1, "at": 10.0},
        {"event": "started", "pid": 2, "stage": "label", "generation": 1, "at": 11.0},
        {"event": "progress", "pid": 1, "at": 12.0},
        {"event": "finished", "pid": 2, "at": 13.0},
        {"event": "failed", "pid": 1, "at": 14.0},
    ]
    assert [(begin, end) for _, begin, end in find_stage_intervals(events)] == [(11.0, 13.0)]
