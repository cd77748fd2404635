import numpy as np
import pytest

from ns.evaluation.result import Evaluation, FittedTemperature, read_predictions
from ns.evaluation.temperature import TEMPERATURE_RANGE, fit_temperature
from ns.labeling.label_set import read_label_rows
from ns.modeling.labeler import combine_probabilities
from ns.runs.lookup import open_label_set
from ns.stages.evaluate import evaluate_generation
from ns.stages.prepare import prepare_data
from ns.stages.train import train_generation
from ns.storage import parent_key
from tests.labeling.dense import expand_probabilities
from tests.loop import label_pool, open_tiny_run


def softmax(logits):
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return (powers / powers.sum(1, keepdims=True)).astype(np.float32)


def draw_images(temperature, images=20_000, classes=20):
    """Probabilities of a labeler whose confidences are right at a temperature, and the true classes."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (images, classes))
    gumbel = rng.gumbel(size=logits.shape)
    return softmax(logits), (logits / temperature + gumbel).argmax(1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_fit_finds_the_temperature_that_the_truth_was_drawn_at(temperature):
    probabilities, class_ids = draw_images(temperature)
    parts = [slice(0, 7_000), slice(7_000, 20_000)]
    fitted, before, after = fit_temperature(lambda: ((probabilities[part], class_ids[part]) for part in parts))
    assert fitted == pytest.approx(temperature, rel=0.03)
    true_probability = softmax(np.log(probabilities) / fitted)[np.arange(len(class_ids)), class_ids]
    assert after == pytest.approx(-np.log(true_probability).mean(), rel=1e-4)
    assert after <= before + 1e-9


def test_fit_of_a_labeler_without_mistakes_ends_at_the_range():
    probabilities, _ = draw_images(1.0, images=50)
    fitted, _, _ = fit_temperature(lambda: iter([(probabilities, probabilities.argmax(1))]))
    assert fitted == TEMPERATURE_RANGE[0]


def test_temperature_is_applied_after_the_mean_of_the_models():
    one, other = (softmax(np.random.default_rng(seed).normal(0, 2, (6, 5))) for seed in (0, 1))
    one[4] = other[4] = np.nan
    combined = combine_probabilities([one, other], 2.5)
    expected = softmax(np.log((one + other) / 2) / 2.5)
    np.testing.assert_allclose(combined, expected, rtol=1e-5)
    assert combine_probabilities([one], 1.0) is one


def test_temperature_of_a_sure_model_gives_no_nan():
    sure = np.array([[1, 0, 0], [0.5, 0.5, 0]], np.float32)
    for temperature in (0.1, 10.0):
        assert np.isfinite(combine_probabilities([sure], temperature)).all()


@pytest.mark.integration
def test_run_labels_at_the_fitted_temperature(finished_run):
    store, finished = finished_run
    ref = open_tiny_run(store, "labeling.temperature=fitted")
    data = prepare_data(ref)
    first = train_generation(ref, data=data, generation=0)
    evaluate_generation(ref, data=data, generation=0, model=first)
    label_pool(ref, data=data, generation=1, teacher=first)
    labels, plain = (open_label_set(store, f"{run}/gen-1") for run in (ref.run, finished.run))
    (fitted,) = {FittedTemperature.load_file(store, key) for key in store.list("store/temperatures/")}
    assert labels.label_set.temperature == fitted.temperature != 1
    assert fitted.images == 250
    assert fitted.nll_after < fitted.nll_before
    rows, plain_rows = (read_label_rows(side.store, side.label_set.shards[0]) for side in (labels, plain))
    # Both are rounded to float16.
    expected = combine_probabilities([np.maximum(expand_probabilities(plain_rows, 10), 1e-7)], fitted.temperature)
    np.testing.assert_allclose(expand_probabilities(rows, 10), expected, atol=3e-3)
    # Thresholds are found on confidences of the same temperature.
    calibration = Evaluation.load_file(store, labels.calibration)
    confidence = read_predictions(store.at(parent_key(labels.calibration)), calibration)["confidence"].to_numpy()
    assert abs(confidence.mean() - calibration.top1) < 0.1
