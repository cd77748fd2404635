"""The whole loop in one process, on a few digits: what each step leaves behind, and what it finds again."""

import io
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from ns.cli.progress import measures_table
from ns.config import schema as config
from ns.config.schema import GateConfig, LabelingConfig, RoleConfig, TrainConfig
from ns.core import telemetry
from ns.core.errors import ConfigError, DataError, Interrupted, StoreError, TrainingError
from ns.data.index import ShardIndex
from ns.data.prepared import PreparedData
from ns.evaluation.gate import corruption_rise, flip_rise
from ns.evaluation.result import Evaluation, Robustness
from ns.evaluation.robustness.suite import RobustnessSuite
from ns.labeling.label_set import iter_label_rows, read_label_rows, verify_label_set
from ns.labeling.offline import label_dataset
from ns.labeling.purge import purge_images
from ns.labeling.selection import count_copies
from ns.modeling.manifest import FINETUNED, Lineage, ModelManifest
from ns.modeling.manifest import MANIFEST as CARD
from ns.modeling.predictor import Predictor
from ns.reporting import run_metrics as gauges
from ns.runs import lineage
from ns.runs import records as runs
from ns.stages import steps
from ns.storage import LocalStore
from ns.training import runner as training

TINY = [
    "generations=1",
    "teacher.train.epochs=30",
    "students.0.train.epochs=6",
    "students.0.train.unlabeled_ratio=1",
    "gate.min_gain=-1",
]


def start(root, preset, overrides=()):
    experiment = config.load_experiment(preset, [*TINY, *overrides])
    run = runs.derive_run_name(experiment)
    store = LocalStore(root)
    runs.open_run(store, run, experiment, "test")
    return store, (f"{store.uri}/{run}/config.yaml", store.uri, run)


def loop(where) -> None:
    data = steps.prepare_data(*where)
    first = steps.train_generation(*where, data, 0)
    steps.evaluate_generation(*where, data, 0, first)
    for generation in range(1, config.MAX_GENERATIONS + 1):
        teacher = steps.next_teacher(*where, data, generation, first)
        if teacher == steps.STOP:
            return
        for shards in steps.plan_labels(*where, data, generation):
            steps.label_shard_range(*where, data, generation, teacher, shards)
        labels = steps.commit_labels(*where, data, generation, teacher)
        student = steps.train_generation(*where, data, generation, teacher, labels)
        steps.evaluate_generation(*where, data, generation, student)
        steps.gate_generation(*where, data, generation, teacher, student)


@pytest.fixture(scope="module")
def preset():
    from importlib.resources import files

    return str(files("ns.config.presets") / "quickstart.yaml")


@pytest.fixture(scope="module")
def done(tmp_path_factory, preset):
    """A finished run."""
    store, where = start(tmp_path_factory.mktemp("root"), preset)
    loop(where)
    runs.finish_run(store, where[2], "succeeded")
    return store, where


def test_what_a_run_found_is_shown(done, monkeypatch):
    store, (_, _, run) = done
    value = telemetry.REGISTRY.get_sample_value
    assert value("nst_images_processed_total", {"stage": "label-shards"}) >= 1247
    assert value("nst_images_processed_total", {"stage": "evaluate"}) > 0
    assert value("nst_pseudo_label_confidence_count") >= 1247
    assert value("nst_data_wait_seconds_total") > 0
    assert value("nst_shards_done") == value("nst_shards") > 0

    monkeypatch.setenv(telemetry.PORT_VARIABLE, "0")
    (generation,) = runs.summarize_run(store, run).generations
    before = value("nst_pseudo_labels_total", {"outcome": "kept"}) or 0
    selection = runs.open_run_label_set(store, run, 1).selection
    gauges.publish_selection(store, run, 1, selection, GateConfig(max_churn=0.25))
    gauges.publish_evaluation(store, run, 1)
    gauges.publish_verdict(runs.resolve_verdict(store, run)[1])
    assert value("nst_pseudo_labels_total", {"outcome": "kept"}) == before + generation.kept
    assert value("nst_label_churn_limit_ratio") == 0.25
    same = runs.open_run_label_set(store, run, 1)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "open_run_label_set", lambda _root, _run, number: same)
        gauges.publish_selection(store, run, 2, selection, GateConfig())
    assert value("nst_label_churn_ratio") == 0
    assert value("nst_eval_accuracy_ratio", {"split": "heldout"}) == generation.student_top1
    assert value("nst_loop_gain_ratio", {"bound": "low"}) == generation.gain_low
    assert value("nst_gate_passed") == 1
    assert value("nst_gate_guard_passed", {"guard": "gain"}) == 1

    monkeypatch.setenv(telemetry.GATEWAY_VARIABLE, "http://127.0.0.1:9")
    gauges.push_run_summary(store, run, "digits")
    assert telemetry.SUMMARY.get_sample_value("nst_last_run_accuracy_ratio") == generation.student_top1
    assert telemetry.SUMMARY.get_sample_value("nst_last_run_promotions") == 1


def test_a_run_tells_its_story(done):
    store, (_, _, run) = done
    summary = runs.summarize_run(store, run)
    (generation,) = summary.generations
    assert summary.state == "succeeded"
    assert 0.3 < summary.teacher_top1 < 1
    assert generation.labeled == 1247
    assert 0 < generation.kept <= 1247
    assert generation.teacher_top1 == summary.teacher_top1
    assert generation.gain == pytest.approx(generation.student_top1 - generation.teacher_top1)
    assert generation.gain_low <= generation.gain <= generation.gain_high
    assert generation.verdict == "promoted"
    assert summary.best_model == generation.model
    assert summary.label_sets == [generation.label_set]
    assert store.exists(f"{summary.best_model}/model.safetensors")
    card = ModelManifest.load_file(store.at(summary.best_model), CARD)
    assert (card.training_mode, card.model.inference_precision) == ("float32", "float32")


def test_the_same_experiment_again_does_nothing_again(done, preset):
    store, where = done
    before = {key: store.get(key) for key in store.list("store/") if "/runs/" not in key}
    other = config.load_experiment(preset, [*TINY, "report.pictures=3"])
    run = runs.derive_run_name(other)
    assert run != where[2]
    runs.open_run(store, run, other, "test")
    loop((f"{store.uri}/{run}/config.yaml", store.uri, run))
    work = [note for note in runs.list_stage_notes(store, run) if note.stage != "gate"]
    assert [note.stage for note in work if not note.reused] == []
    after = {key: store.get(key) for key in store.list("store/") if "/runs/" not in key}
    entries = {key for key in before if key.startswith("store/ledger/generation/")}
    assert {key: value for key, value in after.items() if key not in entries} == {
        key: value for key, value in before.items() if key not in entries
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.exclude=/nowhere/keys.txt", "data.exclude: /nowhere/keys.txt: cannot read"),
        ("labeling.ensemble=[/nowhere]", "labeling.ensemble.0: /nowhere/model.json: cannot read"),
        (
            "evaluation.sets={real: {place: digits:heldout, multi_label: /nowhere}}",
            "evaluation.sets.real.multi_label: /nowhere",
        ),
    ],
)
def test_what_only_later_steps_read_is_looked_for_before_anything_is_trained(tmp_path, preset, override, message):
    _, where = start(tmp_path, preset, [override])
    with pytest.raises(StoreError, match=message):
        steps.prepare_data(*where)


def test_a_longer_run_continues_a_shorter_one(done, preset):
    store, where = done
    longer = config.load_experiment(preset, [*TINY, "generations=2"])
    run = runs.derive_run_name(longer)
    runs.open_run(store, run, longer, "test")
    other = (f"{store.uri}/{run}/config.yaml", store.uri, run)
    data = steps.prepare_data(*other)
    first = steps.train_generation(*other, data, 0)
    best = runs.summarize_run(store, where[2]).best_model
    assert steps.next_teacher(*other, data, 1, first) == first
    assert steps.next_teacher(*other, data, 2, first) == best
    assert steps.next_teacher(*other, data, 3, first) == steps.STOP


def test_a_refused_student_ends_the_loop(done, preset):
    store, _ = done
    strict = config.load_experiment(preset, [*TINY, "generations=3", "gate.min_gain=0.99"])
    run = runs.derive_run_name(strict)
    runs.open_run(store, run, strict, "test")
    loop((f"{store.uri}/{run}/config.yaml", store.uri, run))
    summary = runs.summarize_run(store, run)
    assert [generation.verdict for generation in summary.generations] == ["refused"]
    assert "limit +0.990" in summary.generations[0].reason
    assert summary.best_top1 == summary.teacher_top1


def test_a_teacher_at_chance_is_refused_before_any_student(done, preset, monkeypatch):
    _, where = done
    data = steps.prepare_data(*where)
    first = steps.train_generation(*where, data, 0)
    real = steps.evaluate_heldout

    def useless(*arguments):
        folder, evaluation = real(*arguments)
        return folder, evaluation.model_copy(update_weights={"top1": 0.11})

    monkeypatch.setattr(steps, "evaluate_heldout", useless)
    with pytest.raises(TrainingError, match="no better than chance"):
        steps.next_teacher(*where, data, 1, first)


def test_a_teacher_that_is_not_there_stops_before_any_student(done):
    _, where = done
    data = steps.prepare_data(*where)
    for step in (steps.next_teacher, steps.train_generation):
        with pytest.raises(StoreError, match=r"store/models/gone/\S+: .*no such"):
            step(*where, data, 1, "store/models/gone")


def test_a_step_that_fails_unwatched_leaves_its_reason_until_it_is_tried_again(done, preset, monkeypatch):
    store, where = done
    data = steps.prepare_data(*where)
    # The run is that of all tests here, and steps of it have failed before.
    store.delete_prefix(f"{where[2]}/failures/")

    def full(*_, **__):
        raise StoreError("the disk is full: free some space")

    with monkeypatch.context() as patch:
        patch.setattr(steps.Ledger, "get_or_run", full)
        with pytest.raises(StoreError):
            steps.train_generation(*where, data, 0)
        (failure,) = runs.list_stage_failures(store, where[2])
        assert (str(failure), failure.exit_code) == ("train: the disk is full: free some space", 4)
        # A client that watches is told, and keeps no second record.
        store.delete_prefix(f"{where[2]}/failures/")
        patch.setenv("NS_EVENTS", str(store.root / "events"))
        with pytest.raises(StoreError):
            steps.train_generation(*where, data, 0)
        assert runs.list_stage_failures(store, where[2]) == []
    runs.write_stage_failure(store, where[2], 0, "train", "killed", note_name="train")
    steps.train_generation(*where, data, 0)
    assert runs.list_stage_failures(store, where[2]) == []


def test_what_is_done_is_foreseen(done, preset):
    store, where = done
    prepared = PreparedData.load_file(store, steps.prepare_data(*where))
    _, pool = prepared.pool.open_dataset(store)

    def foresee(*overrides):
        return steps.find_finished_work(
            store, config.load_experiment(preset, [*TINY, *overrides]), prepared.labeled.digest, pool.shards
        )

    assert foresee() == (True, {shard.sha256 for shard in pool.shards})
    assert foresee("labeling.views=flip") == (True, frozenset())
    assert foresee("seed=7") == (False, frozenset())


def test_a_threshold_that_nothing_meets_is_an_error_that_says_so(done, preset):
    store, _ = done
    picky = config.load_experiment(preset, [*TINY, "selection.min_confidence=0.999999"])
    run = runs.derive_run_name(picky)
    runs.open_run(store, run, picky, "test")
    with pytest.raises(DataError, match=r"lower it, or train a better teacher"):
        loop((f"{store.uri}/{run}/config.yaml", store.uri, run))


def test_a_fine_tuned_model_is_kept_and_evaluated_beside_the_one_it_came_from(tmp_path, preset, monkeypatch):
    overrides = ["teacher.train.epochs=4", "teacher.train.finetune={resolution: 40, epochs: 3, lr: 0.001}"]
    store, where = start(tmp_path, preset, overrides)
    data = steps.prepare_data(*where)
    model = steps.train_generation(*where, data, 0)
    plain, tuned = (ModelManifest.load_file(store.at(folder), CARD) for folder in (model, f"{model}/{FINETUNED}"))
    assert (plain.model.inference_resolution, tuned.model.inference_resolution) == (32, 40)
    assert (plain.steps, tuned.steps) == (4, 3)
    assert tuned.lineage.init == plain.weights_sha256 != tuned.weights_sha256
    assert tuned.noise.dropout == 0
    steps.evaluate_generation(*where, data, 0, model)
    (note,) = [note for note in runs.list_stage_notes(store, where[2]) if note.stage == "evaluate"]
    evaluated = {name: Evaluation.load_file(store, key).model for name, key in note.outputs.items()}
    assert evaluated == {"evaluation": plain.digest, "finetuned": tuned.digest}
    assert not list(store.list("store/checkpoints/"))
    # Killed between the two: what is there is not trained again.
    store.delete_prefix("store/ledger/train/")
    store.delete_prefix(f"{model}/{FINETUNED}/")
    monkeypatch.setattr(training, "plan_training", lambda *_: pytest.fail("trained again"))
    steps.train_generation(*where, data, 0)
    assert ModelManifest.load_file(store.at(f"{model}/{FINETUNED}"), CARD).digest == tuned.digest


def test_a_step_asked_to_stop_ends_with_the_code_that_says_go_on(tmp_path, preset, monkeypatch):
    _, where = start(tmp_path, preset)
    data = steps.prepare_data(*where)

    def stopped(*_, **__):
        raise Interrupted("stopped at step 3 of 30; the same command continues there")

    monkeypatch.setattr(training, "train", stopped)
    with pytest.raises(SystemExit) as caught:
        steps.train_generation(*where, data, 0)
    assert caught.value.code == 130


@pytest.mark.parametrize(
    ("runtime", "last", "code", "says"),
    [
        ("true", "print('outputs')", 0, "outputs\n"),
        ("", "print('outputs')", 0, "outputs\ntaken apart\n"),
        ("true", "raise OSError('no space left for the outputs')", 1, "taken apart\n"),
    ],
)
def test_a_process_of_kubeflow_ends_at_once_but_with_its_own_code(runtime, last, code, says):
    lines = [
        "import atexit; atexit.register(print, 'taken apart')",
        "from ns.stages import steps",
        "with steps._announced('report', 0): pass",
        last,
    ]
    ended = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env={**os.environ, "_KFP_RUNTIME": runtime},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == code
    assert ended.stdout.endswith(says)


def test_of_runs_that_train_the_same_at_once_the_first_ones_model_stays(tmp_path, preset, monkeypatch):
    store, where = start(tmp_path, preset, ["teacher.train.epochs=2"])
    data = steps.prepare_data(*where)
    train, others = training.train_model, []

    def overtaken(*arguments, **options):
        if not others:
            others.append("under way")
            others.append(ModelManifest.load_file(store.at(steps.train_generation(*where, data, 0)), CARD))
        trained = train(*arguments, **options)
        if len(others) == 2:
            # As on a machine that adds up in another order.
            trained.weights["conv_stem.weight"] += 1e-6
        return trained

    monkeypatch.setattr(training, "train", overtaken)
    assert ModelManifest.load_file(store.at(steps.train_generation(*where, data, 0)), CARD) == others[1]


def test_a_training_is_known_by_the_weights_it_starts_from_not_by_their_place(tmp_path):
    places = [tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "c.safetensors"]
    for place, content in zip(places, (b"one", b"one", b"two"), make_strict=True):
        place.write_bytes(content)
    first, moved, other = (steps.role_inputs(RoleConfig(train=TrainConfig(init=str(place)))) for place in places)
    assert first == moved != other


def test_a_training_is_known_by_its_settings_not_by_the_preset_they_came_from():
    role = RoleConfig(preset="b0-small")
    spelt_out = RoleConfig(model=role.model, noise=role.noise, train=role.train)
    assert steps.role_inputs(role) == steps.role_inputs(spelt_out)


def selected(store, run, wanted=True):
    """A key of the pool that the student saw, or that it did not see."""
    labels = runs.open_label_set(store, f"{run}/gen-1")
    for shard in labels.label_set.shards:
        rows = read_label_rows(labels.store, shard)
        for key, times in zip(rows.keys, count_copies(labels.selection, rows).tolist(), make_strict=True):
            if bool(times) == wanted:
                return key
    raise AssertionError("none")


def test_an_image_is_traced_through_labels_runs_and_models(done):
    store, (_, _, run) = done
    key = selected(store, run)
    found = lineage.trace_image(store, key)
    assert set(found.locations) == {"pool"}
    view = next(view for view in found.answers if view.run == run)
    labels = runs.open_label_set(store, f"{run}/gen-1")
    assert (view.generation, view.label_set, view.teacher) == (1, labels.label_set.digest, labels.teacher)
    assert view.times_per_epoch >= 1
    assert view.threshold == pytest.approx(0.3)
    assert list(view.probabilities.values()) == sorted(view.probabilities.values(), reverse=True)
    card = ModelManifest.load_file(store.at(view.student), CARD)
    assert card.digest in found.models
    unseen = lineage.trace_image(store, selected(store, run, wanted=False))
    assert card.digest not in unseen.models
    with pytest.raises(DataError, match="no dataset of a run"):
        lineage.trace_image(store, "nobody")


def test_a_student_has_seen_what_its_teacher_has(done):
    store, (_, _, run) = done
    heldout_free = runs.open_label_set(store, f"{run}/gen-1").prepared.labeled
    folder, dataset = heldout_free.open_dataset(store)
    key = ShardIndex.load(folder, dataset.shards[0]).keys[0]
    models = lineage.find_exposed_models(store, {key})
    trained = [note.outputs["model"].rpartition("/")[0] for note in runs.list_stage_notes(store, run) if note.stage == "train"]
    assert len(trained) == 2
    assert set(trained) <= set(models.values())


def test_images_of_a_run_that_has_no_labels_yet_are_traced(done, tmp_path):
    store = LocalStore(shutil.copytree(done[0].root, tmp_path / "root"))
    run = done[1][2]
    for key in list(store.list(f"{run}/steps/")):
        if key.rpartition("/")[2] not in ("0-prepare-data.json", "0-train.json"):
            store.delete(key)
    for record in runs.list_runs(store):
        if record.run != run:
            store.delete(f"{runs.RECORDS}{record.run}.json")
    folder, dataset = runs.read_prepared_data(store, run).labeled.open_dataset(store)
    key = ShardIndex.load(folder, dataset.shards[0]).keys[0]
    (note,) = [note for note in runs.list_stage_notes(store, run) if note.stage == "train"]
    teacher = note.outputs["model"].rpartition("/")[0]
    assert teacher in lineage.find_exposed_models(store, {key}).values()
    found = lineage.trace_image(store, key)
    assert set(found.locations) == {"labeled"}
    assert found.answers == ()


def test_a_student_has_seen_what_any_of_its_teachers_has(done, tmp_path, monkeypatch):
    store, (_, _, run) = LocalStore(shutil.copytree(done[0].root, tmp_path / "root")), done[1]
    labels = runs.open_label_set(store, f"{run}/gen-1")
    card = ModelManifest.load_file(store.at(runs.summarize_run(store, run).best_model), CARD)
    together = labels._replace(label_set=labels.label_set.model_copy(update_weights={"ensemble": (card.digest,)}))
    monkeypatch.setattr(lineage, "_iterate_label_sets", lambda *_: [(1, labels), (2, together)])
    learnt = Lineage(config="c", labeled="l", teacher="t", label_set=together.label_set.digest, selection="s")
    pupil = card.model_copy(update_weights={"lineage": learnt, "weights_sha256": "w"})
    pupil.save_file(store.at("store/models/pupil"), CARD)
    assert lineage.find_exposed_models(store, {selected(store, run)})[pupil.digest] == "store/models/pupil"
    assert pupil.digest not in lineage.find_exposed_models(store, {selected(store, run, wanted=False)})


def test_a_purged_label_set_lacks_the_images_and_nothing_else(done, tmp_path):
    store, (_, _, run) = done
    labels = runs.open_label_set(store, f"{run}/gen-1")
    keys = [selected(store, run), selected(store, run, wanted=False)]
    target = LocalStore(tmp_path / "purged")
    made, count = purge_images(labels.store, labels.label_set, keys, target)
    assert count == 2
    assert made.digest != labels.label_set.digest
    assert verify_label_set(target, made, labels.open_pool(store)) == 1247
    assert made.left_out == labels.label_set.left_out + 2
    same = [a.sha256 == b.sha256 for a, b in zip(made.shards, labels.label_set.shards, make_strict=True)]
    before = {
        key: c
        for rows in iter_label_rows(labels.store, labels.label_set)
        for key, c in zip(rows.keys, rows.confidence, make_strict=True)
    }
    after = {key: c for rows in iter_label_rows(target, made) for key, c in zip(rows.keys, rows.confidence, make_strict=True)}
    assert {key for key in before if not np.array_equal(before[key], after[key], equal_nan=True)} <= set(keys)
    assert all(np.isnan(after[key]) for key in keys)
    assert sum(same) == len(same) - len({key_shard(labels, key) for key in keys})
    with pytest.raises(DataError, match="1 of the keys are not in this label set; the first: nobody"):
        purge_images(labels.store, labels.label_set, ["nobody"], target)


def key_shard(labels, key):
    return next(n for n, rows in enumerate(iter_label_rows(labels.folder, labels.label_set)) if key in rows.keys)


def test_excluded_images_get_no_label_and_other_shards_are_not_labeled_again(done, preset, tmp_path, monkeypatch):
    store, (_, _, run) = done
    labels = runs.open_label_set(store, f"{run}/gen-1")
    rows = read_label_rows(labels.store, labels.label_set.shards[0])
    (tmp_path / "withdrawn.txt").write_text(f"{rows.keys[3]}\n\n{rows.keys[5]}\n")
    experiment = config.load_experiment(preset, [*TINY, f"data.exclude={tmp_path / 'withdrawn.txt'}"])
    other = runs.derive_run_name(experiment)
    runs.open_run(store, other, experiment, "test")
    where = (f"{store.uri}/{other}/config.yaml", store.uri, other)
    data = steps.prepare_data(*where)
    first = steps.train_generation(*where, data, 0)
    asked = []
    shards_of = Predictor.predict_shards

    def spy(self, source, wanted, progress=None):
        wanted = list(wanted)
        asked.extend(number for number, _ in wanted)
        return shards_of(self, source, wanted, progress)

    monkeypatch.setattr(Predictor, "shards", spy)
    for shards in steps.plan_labels(*where, data, 1):
        steps.label_shard_range(*where, data, 1, first, shards)
    steps.commit_labels(*where, data, 1, first)
    assert asked == [0]
    found = runs.open_label_set(store, f"{other}/gen-1")
    assert found.label_set.left_out == labels.label_set.left_out + 2
    without = read_label_rows(found.store, found.label_set.shards[0])
    assert without.reasons[3] == "left out: excluded by data.exclude"
    assert found.label_set.shards[1] == labels.label_set.shards[1]


def test_a_precision_that_is_asked_for_becomes_thresholds(done, preset):
    store, _ = done
    experiment = config.load_experiment(preset, [*TINY, "selection.precision=0.6", "selection.confidence=0.8"])
    run = runs.derive_run_name(experiment)
    runs.open_run(store, run, experiment, "test")
    where = (f"{store.uri}/{run}/config.yaml", store.uri, run)
    data = steps.prepare_data(*where)
    first = steps.train_generation(*where, data, 0)
    for shards in steps.plan_labels(*where, data, 1):
        steps.label_shard_range(*where, data, 1, first, shards)
    steps.commit_labels(*where, data, 1, first)
    labels = runs.open_label_set(store, f"{run}/gen-1")
    calibration = labels.selection.thresholds
    assert calibration == runs.find_policy_thresholds(store, labels, labels.selection.policy)
    for rule, one in zip(labels.selection.rules, calibration.classes, make_strict=True):
        assert rule.threshold == max(np.float32(0.3), np.float32(one.threshold))
        assert one.bound >= 0.6 or rule.kept == 0
    assert 0 < labels.selection.kept < labels.label_set.rows


def test_another_model_labels_what_was_kept(done, tmp_path):
    store, (_, _, run) = done
    labels = runs.open_label_set(store, f"{run}/gen-1")
    model = store.at(runs.summarize_run(store, run).best_model).uri
    pool, _ = labels.open_pool(store)
    only = (labels.store, labels.label_set, labels.selection)
    assert label_dataset(model, pool.uri, str(tmp_path / "again"), LabelingConfig(), shards="1-2", kept_by=only) is None
    with pytest.raises(DataError, match="holds labels of another views: one, not flip; name another folder"):
        label_dataset(model, pool.uri, str(tmp_path / "again"), LabelingConfig(views="flip"), kept_by=only)
    made = label_dataset(model, pool.uri, str(tmp_path / "again"), LabelingConfig(), kept_by=only)
    assert made.rows - made.left_out == labels.selection.kept
    assert verify_label_set(LocalStore(tmp_path / "again"), made, labels.open_pool(store)) == 1247
    with pytest.raises(ConfigError, match="must be START-STOP, within 0-2"):
        label_dataset(model, pool.uri, str(tmp_path / "again"), LabelingConfig(), shards="1-9")
    with pytest.raises(DataError, match="holds labels of another teacher"):
        label_dataset(store.at(labels.teacher).uri, pool.uri, str(tmp_path / "again"), LabelingConfig())
    with pytest.raises(ConfigError, match="a label set by itself has no selection"):
        label_dataset(model, pool.uri, str(tmp_path / "b"), LabelingConfig(), kept_by=(labels.store, labels.label_set, None))


@pytest.fixture
def robust(done, preset, picture, tmp_path):
    """The finished run again, asked to evaluate on more."""

    def classes(folder, names, seed):
        for name in names:
            (folder / name).mkdir(parents=True)
            for number in range(3):
                (folder / name / f"{number}.png").write_bytes(picture(seed + 100 * int(name) + number))
        return str(folder)

    store, _ = done
    published = tmp_path / "published"
    published.mkdir()
    np.save(published / "labels.npy", np.tile(np.arange(10), 5))
    np.save(published / "fog.npy", np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), np.uint8))
    hard = f"{{place: {classes(tmp_path / 'hard', ['3', '7'], 5000)}, classes: own}}"
    fields = [
        f"data.test={classes(tmp_path / 'test', [str(n) for n in range(10)], 1)}",
        f"evaluation.sets={{hard: {hard}, ready: {{place: {published}, kind: cifar10-c}}}}",
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
    experiment = config.load_experiment(preset, [*TINY, *fields])
    run = runs.derive_run_name(experiment)
    runs.open_run(store, run, experiment, "test")
    return store, (f"{store.uri}/{run}/config.yaml", store.uri, run)


def test_every_model_is_evaluated_on_all_that_is_asked_for(robust):
    store, where = robust
    loop(where)
    notes = [note for note in runs.list_stage_notes(store, where[2]) if note.stage == "evaluate"]
    assert [sorted(note.outputs) for note in notes] == [
        ["evaluation", "guarded", "robustness", "set:hard", "set:ready", "test"]
    ] * 2
    first, student = (Robustness.load_file(store, note.outputs["robustness"]) for note in notes)
    assert first.model != student.model
    assert (first.images, first.subsample.images) == (20, 20)
    assert first.dataset == Evaluation.load_file(store, notes[0].outputs["test"]).dataset
    assert list(first.corruptions) == ["contrast", "fog"]
    guarded = [Robustness.load_file(store, note.outputs["guarded"]) for note in notes]
    assert (
        {one.dataset for one in guarded}
        == {Evaluation.load_file(store, notes[0].outputs["evaluation"]).dataset}
        != {first.dataset}
    )
    assert guarded[0].attacks == ()
    assert (list(guarded[0].corruptions), list(guarded[0].perturbations)) == (["contrast", "fog"], ["brightness"])
    (_, verdict) = runs.resolve_verdict(store, where[2])
    assert [guard.name for guard in verdict.conditions] == ["gain", "mCE rise", "mFR rise"]
    assert [guard.value for guard in verdict.conditions[1:]] == [corruption_rise(*guarded), flip_rise(*guarded)]
    ready = Robustness.load_file(store, notes[0].outputs["set:ready"])
    assert (ready.kind, ready.images, list(ready.corruptions)) == ("cifar10-c", 10, ["fog"])
    hard = Evaluation.load_file(store, notes[0].outputs["set:hard"])
    assert (hard.scored_classes, hard.images) == (("3", "7"), 6)
    summary = runs.summarize_run(store, where[2])
    teacher, own = summary.measurements
    assert teacher.scores.mce == pytest.approx(100)
    assert own.scores.mce_relative_to == "reference"
    assert own.attacks == {str(one): one.top1 for one in student.attacks}
    assert list(own.sets) == ["hard"]
    shown = io.StringIO()
    Console(file=shown, width=100).print(measures_table(summary))
    assert "mCE, mFR: % of the first teacher's" in shown.getvalue()
    for name in ("test top-1", "hard top-1", "error when corrupted", "mCE", "FGSM-16 top-1", "PGD-16-2 top-1"):
        assert name in shown.getvalue()


def test_evaluation_that_was_done_is_not_done_again(robust, monkeypatch):
    _, where = robust
    loop(where)
    monkeypatch.setattr(RobustnessSuite, "run", lambda *_: pytest.fail("done again"))
    data = steps.prepare_data(*where)
    steps.evaluate_generation(*where, data, 0, steps.train_generation(*where, data, 0))


def go_on(started, root, teacher):
    """The rest of one generation."""
    where = (started.config_uri, root, started.run)
    steps.evaluate_generation(*where, started.data, started.teacher_generation, teacher)
    for shards in steps.plan_labels(*where, started.data, started.generation):
        steps.label_shard_range(*where, started.data, started.generation, teacher, shards)
    labels = steps.commit_labels(*where, started.data, started.generation, teacher)
    student = steps.train_generation(*where, started.data, started.generation, teacher, labels)
    steps.evaluate_generation(*where, started.data, started.generation, student)
    steps.gate_generation(*where, started.data, started.generation, teacher, student)


def test_one_more_generation_goes_on_from_the_student_that_was_accepted(done, preset):
    store, (_, root, run) = done
    best = runs.summarize_run(store, run).best_model
    started = steps.start_generation(preset, root, "", TINY)
    assert started[3:] == (2, 1, best)
    assert started == steps.start_generation(preset, root, "", TINY), "a step that is repeated finds its run"
    where = (started.config_uri, root, started.run)
    assert steps.next_teacher(*where, started.data, 2, best) == best
    summary = runs.summarize_run(store, started.run)
    assert (summary.best_model, summary.teacher_top1) == (best, None)
    (adopted,) = [note for note in summary.stages if note.stage == "train"]
    assert (adopted.generation, adopted.reused) == (1, True)


def test_the_first_of_recurring_runs_trains_a_teacher_and_a_refused_student_is_not_tried_again(done, preset):
    _, (_, root, _) = done
    asked = [*TINY, "name=recurring", "gate.min_gain=0.99"]
    started = steps.start_generation(preset, root, "", asked)
    assert started[3:] == (1, 0, steps.TRAIN)
    where = (started.config_uri, root, started.run)
    first = steps.train_generation(*where, started.data, 0)
    steps.evaluate_generation(*where, started.data, 0, first)
    teacher = steps.next_teacher(*where, started.data, 1, steps.TRAIN)
    assert teacher == first
    go_on(started, root, teacher)
    again = steps.start_generation(preset, root, "", asked)
    assert (again.run, again.teacher) == (started.run, steps.STOP)
    assert steps.next_teacher(*where, again.data, 1, steps.STOP) == steps.STOP
    changed = steps.start_generation(preset, root, "", [*asked, "seed=8"])
    assert (changed.teacher, changed.run != started.run) == (steps.TRAIN, True)


def test_an_accepted_student_of_other_classes_is_no_teacher(done, preset, monkeypatch):
    _, (_, root, run) = done
    monkeypatch.setattr(steps, "_classes", lambda *_: ("cat", "dog"))
    with pytest.raises(DataError, match=rf"data.labeled: digits:labeled: its classes .*\(run {run}\); give the experiment"):
        steps.start_generation(preset, root, "", TINY)


def test_the_student_that_was_accepted_last_stays_so_when_an_earlier_run_is_repeated(done, tmp_path):
    source, (_, _, run) = done
    known = runs.resolve_verdict(source, run)[1]
    experiment = config.load_with_overrides("quickstart")
    store = LocalStore(tmp_path)
    for name, students in (("a", ["1"]), ("b", ["1", "2"]), ("a-again", ["1"])):
        runs.open_run(store, name, experiment, "test")
        for generation, student in enumerate(students, 1):
            key = f"store/verdicts/{name}-{student}/verdict.json"
            known.model_copy(update_weights={"student": student, "generation": generation}).save_file(store, key)
            store.put(f"{student}/{CARD}", b"{}")
            runs.write_stage_note(store, name, generation, "gate", {"verdict": key}, 0, reused=False)
    assert runs.find_accepted_student(store, experiment.name) == ("b", 2, "2")
    assert runs.find_accepted_student(store, "another") is None
    store.delete(f"2/{CARD}")
    assert runs.find_accepted_student(store, experiment.name) == ("a", 1, "1")


def test_a_run_that_starts_from_a_preset_keeps_what_was_asked_for(tmp_path):
    root = str(tmp_path / "root")
    fields = {"data.labeled": "", "data.pool": "s3://bucket/pool", "generations": 1, "labeling.tasks": 0}
    asked = (["seed=7"], fields)
    uri, name = steps.start_run("quickstart", root, "", *asked)
    experiment = config.load_experiment(uri)
    assert (experiment.seed, experiment.generations, experiment.data.pool) == (7, 1, "s3://bucket/pool")
    assert (experiment.data.labeled, experiment.labeling.tasks) == ("digits:labeled", 2)
    assert name == runs.derive_run_name(experiment)
    assert steps.start_run(uri, root, name) == (uri, name), "a step that is repeated finds its run"
