"""Foreign images in a run."""

import pytest

from ns.labeling.foreign import ForeignReference, find_foreign_limit
from ns.labeling.label_set import iter_label_rows, verify_label_set
from ns.labeling.selection import count_copies
from ns.reporting.pictures import build_label_galleries
from ns.runs.lookup import find_policy_foreign_limit, open_label_set
from ns.runs.records import find_stage_note
from ns.stages.evaluate import evaluate_generation
from ns.stages.prepare import prepare_data
from ns.stages.train import train_generation
from ns.storage import parent_key
from tests.loop import label_pool, open_tiny_run


@pytest.mark.parametrize("kind", ["distance", "energy"])
def test_foreign_images_are_left_out_above_the_quantile(finished_run, kind):
    store, _ = finished_run
    ref = open_tiny_run(store, f"labeling.foreign_score={kind}", "selection.foreign_quantile=0.8")
    data = prepare_data(ref)
    teacher = train_generation(ref, data=data, generation=0)
    evaluate_generation(ref, data=data, generation=0, model=teacher)
    label_pool(ref, data=data, generation=1, teacher=teacher)
    labels = open_label_set(store, f"{ref.run}/gen-1")
    selection = labels.selection
    assert verify_label_set(labels.store, labels.label_set) == 847
    reference = store.at(parent_key(find_stage_note(store, ref.run, 1, "select").outputs["foreign"]))
    assert ForeignReference.load(reference).calibration_images == 250
    assert selection.foreign_limit == find_foreign_limit(reference, 0.8)
    foreign = [0] * 10
    for rows in iter_label_rows(labels.store, labels.label_set):
        is_foreign = rows.foreign_score > selection.foreign_limit
        assert not count_copies(selection, rows)[is_foreign].any()
        for class_id in rows.top_class[is_foreign, 0].tolist():
            foreign[class_id] += 1
    assert [rule.foreign for rule in selection.rules] == foreign
    # What was scored is found again, and a lower quantile costs no labeling.
    again = open_tiny_run(store, f"labeling.foreign_score={kind}", "selection.foreign_quantile=0.5")
    label_pool(again, data=prepare_data(again), generation=1, teacher=teacher)
    stricter = open_label_set(store, f"{again.run}/gen-1")
    assert stricter.label_set == labels.label_set
    assert stricter.selection.foreign > selection.foreign
    assert find_policy_foreign_limit(store, labels, stricter.selection.policy) == stricter.selection.foreign_limit
    galleries = build_label_galleries(*labels.open_pool(store), labels.store, labels.label_set, selection, 3)
    highest = sorted(score for rows in iter_label_rows(labels.store, labels.label_set) for score in rows.foreign_score)[-3:]
    assert [picture.caption.partition(",")[0] for picture in galleries[-1].pictures] == [
        f"score {score:.3g}" for score in reversed(highest)
    ]
    # The pool holds digits like those of the calibration images.
    assert selection.foreign == pytest.approx(0.2 * 847, rel=0.3)
    assert selection.kept + selection.foreign + selection.low_confidence + selection.balanced_out == 847 - selection.left_out
