"""All that is measured of a model."""

import io

import numpy as np
import pytest
from rich.console import Console

from ns.cli.runs import make_measurements_table
from ns.evaluation.paired import bound_rise
from ns.evaluation.result import Evaluation, Robustness, read_mistakes
from ns.evaluation.robustness.suite import RobustnessSuite
from ns.runs.lookup import resolve_verdict
from ns.runs.records import list_stage_notes
from ns.runs.summary import summarize_run
from ns.stages.evaluate import evaluate_generation
from ns.stages.prepare import prepare_data
from ns.stages.train import train_generation
from ns.storage import parent_key
from tests.loop import open_tiny_run, run_loop


@pytest.fixture
def robust_run(finished_run, picture, tmp_path):
    """The finished run again, asked to evaluate on more."""

    def classes(folder, names, seed):
        for name in names:
            (folder / name).mkdir(parents=True)
            for number in range(3):
                (folder / name / f"{number}.png").write_bytes(picture(seed + 100 * int(name) + number))
        return str(folder)

    store, _ = finished_run
    published = tmp_path / "published"
    published.mkdir()
    np.save(published / "labels.npy", np.tile(np.arange(10), 5))
    np.save(published / "fog.npy", np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), np.uint8))
    hard = f"{{uri: {classes(tmp_path / 'hard', ['3', '7'], 5000)}, classes: own}}"
    fields = [
        f"data.test={classes(tmp_path / 'test', [str(n) for n in range(10)], 1)}",
        f"evaluation.sets={{hard: {hard}, ready: {{uri: {published}, kind: cifar10-c}}}}",
        "evaluation.suites=[corruptions,perturbations,attacks]",
        "gate.max_mce_rise=10000",
        "gate.max_mfr_rise=10000",
        "evaluation.images=20",
        "evaluation.corruptions=[contrast,fog]",
        "evaluation.severities=[1,5]",
        "evaluation.perturbations=[brightness]",
        "evaluation.perturbation_frames=3",
        "evaluation.pgd_steps=[2]",
    ]
    return store, open_tiny_run(store, *fields)


@pytest.mark.integration
def test_evaluate_generation_measures_all_that_is_asked_for(robust_run):
    store, ref = robust_run
    run_loop(ref)
    notes = [note for note in list_stage_notes(store, ref.run) if note.stage == "evaluate"]
    assert [sorted(note.outputs) for note in notes] == [
        ["evaluation", "gate_robustness", "robustness", "set:hard", "set:ready", "test"]
    ] * 2
    first, student = (Robustness.load_file(store, note.outputs["robustness"]) for note in notes)
    assert first.model != student.model
    assert (first.images, first.subsample.images) == (20, 20)
    assert first.dataset == Evaluation.load_file(store, notes[0].outputs["test"]).dataset
    assert list(first.corruptions) == ["contrast", "fog"]
    gated = [Robustness.load_file(store, note.outputs["gate_robustness"]) for note in notes]
    assert (
        {robustness.dataset for robustness in gated}
        == {Evaluation.load_file(store, notes[0].outputs["evaluation"]).dataset}
        != {first.dataset}
    )
    assert gated[0].attacks == ()
    assert (list(gated[0].corruptions), list(gated[0].perturbations)) == (["contrast", "fog"], ["brightness"])
    (_, verdict) = resolve_verdict(store, ref.run)
    assert [condition.name for condition in verdict.conditions] == ["gain", "exact test", "mCE rise", "mFR rise"]
    mistakes = [
        read_mistakes(store.at(parent_key(note.outputs["gate_robustness"])), robustness)
        for note, robustness in zip(notes, gated, strict=True)
    ]
    for condition, suite in zip(verdict.conditions[2:], ("corruptions", "perturbations"), strict=True):
        counts = (np.stack([*getattr(model, suite).values()], 1) for model in mistakes)
        assert condition.value == bound_rise(*counts, level=0.95, resamples=10_000, seed=0)
    # The totals are those of the images.
    for model, robustness in zip(mistakes, gated, strict=True):
        for kind, rates in robustness.corruptions.items():
            assert model.corruptions[kind].sum() == pytest.approx(sum(rates) * robustness.images)
        for kind, result in robustness.perturbations.items():
            flips = result.flip_probability * robustness.images * (robustness.frames - 1)
            assert model.perturbations[kind].sum() == pytest.approx(flips)
    ready = Robustness.load_file(store, notes[0].outputs["set:ready"])
    assert (ready.kind, ready.images, list(ready.corruptions)) == ("cifar10-c", 10, ["fog"])
    hard = Evaluation.load_file(store, notes[0].outputs["set:hard"])
    assert (hard.scored_classes, hard.images) == (("3", "7"), 6)
    summary = summarize_run(store, ref.run)
    teacher, own = summary.measurements
    assert teacher.scores.mce == pytest.approx(100)
    assert own.scores.mce_relative_to == "reference"
    assert own.attacks == {str(attack): attack.top1 for attack in student.attacks}
    assert list(own.sets) == ["hard"]
    shown = io.StringIO()
    Console(file=shown, width=100).print(make_measurements_table(summary))
    assert "mCE, mFR: % of the first teacher's" in shown.getvalue()
    for name in ("test top-1", "hard top-1", "error when corrupted", "mCE", "FGSM-16 top-1", "PGD-16-2 top-1"):
        assert name in shown.getvalue()


def test_evaluate_generation_reuses_what_was_measured(robust_run, monkeypatch):
    _, ref = robust_run
    run_loop(ref)
    monkeypatch.setattr(RobustnessSuite, "run_suite", lambda *_: pytest.fail("done again"))
    data = prepare_data(ref)
    evaluate_generation(ref, data=data, generation=0, model=train_generation(ref, data=data, generation=0))
