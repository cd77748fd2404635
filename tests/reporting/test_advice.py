"""Each rule speaks when its facts are there, and is silent otherwise."""

from dataclasses import replace

import numpy as np
import pytest

from ns.config.loader import with_overrides
from ns.reporting.advice import CLASS_LEVEL, MAX_ADVICE, find_weak_classes, list_advice
from ns.reporting.context import gather_context
from ns.reporting.markdown import render_markdown
from tests.command_line import parse
from tests.reporting.conftest import RUN


@pytest.fixture(scope="module")
def context(unchanged):
    """30 held-out images; a teacher that is right on 43 % of them, and a promoted student on 97 %."""
    return gather_context(unchanged, RUN, pictures=0)


def with_evaluation(context, **fields):
    """All models with other facts in their evaluations."""
    models = [
        replace(model, evaluations={**model.evaluations, "evaluation": model.evaluation.model_copy(update=fields)})
        if model.evaluation
        else model
        for model in context.models
    ]
    return replace(context, models=models)


def with_history(context, **point):
    return replace(context, models=[*context.models[:-1], replace(context.models[-1], history=[point])])


def with_selection(context, **fields):
    labeling = context.labelings[-1]
    return replace(context, labelings=[replace(labeling, selection=labeling.selection.model_copy(update=fields))])


def says(context, text: str) -> bool:
    return any(text in advice.text for advice in list_advice(context))


def test_advice_is_commands_that_exist(context):
    steps = list_advice(
        with_selection(with_history(context, accuracy_labeled=0.1), rules=context.labelings[-1].selection.rules[:1])
    )
    assert 3 <= len(steps) <= MAX_ADVICE
    for step in steps:
        parse(step.command.split()[1:])


def test_few_heldout_images(context):
    assert says(context, "30 held-out images show a gain of")
    many = with_evaluation(context, images=20_000)
    assert not says(many, "hold out more")


def test_weak_model_asks_for_labels_before_all_else(context):
    weak = with_evaluation(context, top1=0.3)
    assert list_advice(weak)[0].text.startswith("the best model is right on 30.0%")
    assert not says(context, "more labeled images help")


def test_weak_class_is_named(context):
    counts = {"images": 3000, "top1": 0.9, "class_images": (1000,) * 3, "class_correct": (980, 960, 760)}
    assert says(with_evaluation(context, **counts), "is right on 76.0% of its held-out images")
    even = with_evaluation(context, **counts | {"class_correct": (900, 905, 895)})
    assert not says(even, "label more of them")


def test_equal_classes_are_rarely_called_weak():
    """The promised level, over 2,000 evaluations of 20 equally hard classes."""
    drawn = np.random.default_rng(0).binomial(200, 0.8, (2000, 20))
    called = sum(len(find_weak_classes(correct, np.full(20, 200), correct.sum() / 4000)) > 0 for correct in drawn)
    # Three standard errors above the level.
    assert called / 2000 < CLASS_LEVEL + 3 * (CLASS_LEVEL * (1 - CLASS_LEVEL) / 2000) ** 0.5
    assert called > 20, "nor is the level wasted"


def test_selection_that_keeps_little(context):
    rows = context.labelings[-1].label_set.rows
    rules = tuple(rule.model_copy(update={"kept": 1}) for rule in context.labelings[-1].selection.rules)
    sparse = with_selection(context, rules=rules)
    assert 0.2 * rows > 3
    assert says(sparse, "the threshold of 0.5 may be too high")
    assert not says(context, "may be too high")


def test_pool_that_is_unlike_the_labels(context):
    rows = context.labelings[-1].label_set.rows
    first, *others = context.labelings[-1].selection.rules
    for share, is_said in ((0.1, False), (0.5, True)):
        rules = (first.model_copy(update={"foreign": int(share * rows)}), *others)
        assert says(with_selection(context, rules=rules), "are unlike the labeled ones: look at them") == is_said


def test_confidence_that_is_off_its_accuracy(context):
    evaluation = context.first_model.evaluation
    for ece, is_said in ((0.02, False), (0.3, True)):
        calibration = evaluation.calibration.model_copy(update={"ece": ece})
        trusting = with_selection(with_evaluation(context, calibration=calibration), low_confidence=0)
        assert says(trusting, "the teacher's confidence is 30 points off its accuracy") == is_said


def test_class_without_pseudo_labels(context):
    selection = context.labelings[-1].selection
    rules = (selection.rules[0].model_copy(update={"kept": 0}), *selection.rules[1:])
    assert says(with_selection(context, rules=rules), "no image of the pool is taken for 1 of 3 classes (cat)")


def test_student_that_underfits(context):
    assert says(with_history(context, accuracy_labeled=0.5), "train it longer, or with less noise")
    assert not says(with_history(context, accuracy_labeled=0.9), "train it longer")


def test_promoted_student_is_put_to_use_and_a_refused_one_explained(context):
    many = with_evaluation(context, images=20_000)
    assert says(many, "put it to use")
    (verdict,) = context.verdicts
    refused = replace(many, verdicts=[verdict.model_copy(update={"promoted": False})])
    assert says(refused, "student 1 was refused")
    assert not says(refused, "put it to use")
    last = replace(many, experiment=with_overrides(context.experiment, ["generations=1"]))
    assert says(last, "another generation may be too")
    worse = replace(last, verdicts=[verdict.model_copy(update={"gain": -0.03})])
    assert says(worse, "put it to use")
    assert not says(worse, "another generation may be too")
    assert not says(many, "another generation may be too")


def test_commands_name_a_file_or_an_experiment_of_the_package(context):
    few = "--heldout 120 --classes 3"
    assert f"ns config check made-up.yaml {few}" in [advice.command for advice in list_advice(context)]
    packaged = replace(context, experiment=with_overrides(context.experiment, ["name=quickstart"]))
    assert f"ns config check quickstart {few}" in [advice.command for advice in list_advice(packaged)]


def test_no_advice_before_a_model_is_evaluated(context):
    assert list_advice(replace(context, models=[])) == []


def test_page_and_markdown_begin_with_it(page, context):
    command = "ns promote made-up --to models/made-up.yaml"
    text = render_markdown(context)
    assert page.index('id="next"') < page.index('id="loop"')
    assert f"<code>{command}</code>" in page
    assert f"put it to use: `{command}`" in text
    assert text.index("What to do next:") < text.index("| held out, top-1")
