import numpy as np
import pyarrow as pa
import pytest

from ns.config.schema import SelectionConfig
from ns.labeling.alignment import LEAST_SHARE, align_classes, align_rows, compute_alignment
from ns.labeling.label_set import LabelRows, TopClasses, build_row_schema
from ns.labeling.selection import count_copies, select_pseudo_labels
from tests.labeling.dense import expand_probabilities


def make_rows(images, classes, k, seed=0, bias=4.0, unreadable=0.1) -> LabelRows:
    """Rows of a teacher that favors the first classes."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (images, classes)) + np.linspace(bias, 0, classes)
    full = np.exp(logits)
    full /= full.sum(1, keepdims=True)
    order = np.argsort(-full, axis=1)[:, :k]
    top = np.take_along_axis(full, order, axis=1)
    lost = rng.random(images) < unreadable
    table = pa.table(
        [
            [f"{seed}-{row}" for row in range(images)],
            pa.array(top[:, 0].astype(np.float32), mask=lost),
            pa.array([None if bad else row for bad, row in zip(lost, order.tolist(), strict=True)], pa.list_(pa.uint16(), k)),
            pa.array(
                [None if bad else row for bad, row in zip(lost, top.astype(np.float16), strict=True)], pa.list_(pa.float16(), k)
            ),
            pa.array(["truncated" if bad else None for bad in lost], pa.string()),
        ],
        schema=build_row_schema(k),
    )
    return LabelRows(table)


def expand(rows: LabelRows, classes: int) -> np.ndarray:
    """Dense probabilities float64 of the readable rows, with exact confidences."""
    labeled = rows.readable
    probabilities = rows.top_prob[labeled].astype(np.float64)
    probabilities[:, 0] = rows.confidence[labeled]
    count, k = probabilities.shape
    full = np.zeros((count, classes))
    if k < classes:
        full += np.clip(1 - probabilities.sum(1, keepdims=True), 0, 1) / (classes - k)
    np.put_along_axis(full, rows.top_class[labeled].astype(np.int64), probabilities, axis=1)
    return full


@pytest.mark.parametrize(("classes", "k"), [(6, 6), (40, 5)])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_alignment_divides_by_a_power_of_the_mean_prediction(classes, k, strength):
    parts = [make_rows(200, classes, k, seed) for seed in range(3)]
    factors = compute_alignment((rows.top_classes for rows in parts), classes, strength)
    dense = np.concatenate([expand(rows, classes) for rows in parts])
    mean = dense.mean(0)
    assert mean[0] > 5 * mean[-1]
    expected = mean**-strength
    np.testing.assert_allclose(np.array(factors) / factors[0], expected / expected[0], rtol=1e-6)
    assert np.log(factors).mean() == pytest.approx(0, abs=1e-9)
    aligned_dense = dense * expected
    aligned_dense /= aligned_dense.sum(1, keepdims=True)
    aligned = [align_rows(rows, factors) for rows in parts]
    top_class = np.concatenate([rows.top_class[rows.readable] for rows in aligned]).astype(np.int64)
    top_prob = np.concatenate([rows.top_prob[rows.readable] for rows in aligned])
    np.testing.assert_allclose(top_prob, np.take_along_axis(aligned_dense, top_class, axis=1), rtol=1e-5)
    assert (np.diff(top_prob, axis=1) <= 0).all()
    # What the student reads: the other classes share the rest.
    for before, after in zip(parts, aligned, strict=True):
        targets = expand_probabilities(after, classes)
        np.testing.assert_allclose(targets[after.readable].sum(1), 1, rtol=1e-5)
        assert (after.readable == before.readable).all()
        assert np.isnan(after.confidence[~after.readable]).all()
        assert (after.confidence[after.readable] == after.top_prob[after.readable, 0]).all()
    after_mean = np.concatenate([expand_probabilities(rows, classes)[rows.readable] for rows in aligned]).mean(0)
    assert after_mean.max() / after_mean.min() < mean.max() / mean.min()


def test_full_strength_takes_most_of_the_bias():
    rows = make_rows(5_000, 6, 6)
    mean = expand_probabilities(align_rows(rows, compute_alignment([rows.top_classes], 6, 1.0)), 6)[rows.readable].mean(0)
    before = expand_probabilities(rows, 6)[rows.readable].mean(0)
    assert before.max() / before.min() > 10
    assert mean.max() / mean.min() < 3


def test_class_that_is_never_predicted_is_not_raised_without_bound():
    rows = np.eye(4)[[0, 0, 1, 1]][:, :3].astype(np.float16)
    shard = TopClasses(np.ones(4, bool), np.tile(np.arange(3, dtype=np.uint16), (4, 1)), rows, rows[:, 0].astype(np.float32))
    factors = np.array(compute_alignment([shard], 4, 1.0))
    assert factors[3] / factors[0] == pytest.approx(0.5 * 4 / LEAST_SHARE)


@pytest.mark.parametrize(("classes", "k"), [(6, 6), (150, 10)])
def test_aligned_selection_finds_the_same_images_again_in_the_rows(classes, k):
    """The selection reads shards as columns, and training reads them as rows; a last digit would lose or add an image."""
    parts = [make_rows(300, classes, k, seed) for seed in range(3)]
    policy = SelectionConfig(policy="aligned", min_confidence=0.2, per_class=7, classes_per_image=2)
    alignment = compute_alignment((rows.top_classes for rows in parts), classes, policy.alignment)
    selection = select_pseudo_labels(
        lambda: (align_rows(rows, alignment).build_scores(2) for rows in parts),
        classes,
        policy,
        seed=0,
        label_set="0" * 64,
        label_set_key="x",
        alignment=alignment,
    )
    again = type(selection).model_validate_json(selection.model_dump_json())
    copies = [count_copies(again, rows) for rows in parts]
    assert sum(int(part.sum()) for part in copies) == selection.images
    whole, halves = parts[0].top_classes, [slice(0, 131), slice(131, 300)]
    for part in halves:
        some = align_classes(TopClasses(*(column[part] for column in whole[:4])), alignment)
        for column, expected in zip(some[:4], align_classes(whole, alignment)[:4], strict=True):
            assert (column == expected[part]).all()
    plain = select_pseudo_labels(
        lambda: (rows.build_scores(1) for rows in parts), classes, SelectionConfig(), seed=0, label_set="", label_set_key=""
    )
    assert [rule.candidates for rule in plain.rules] != [rule.candidates for rule in selection.rules]
