"""What is done again, and what is found."""

import pytest

from ns.config.schema import ModelConfig, RoleConfig, TrainConfig
from ns.data.prepared import PreparedData
from ns.runs.records import list_stage_notes
from ns.runs.summary import summarize_run
from ns.stages import keys
from ns.stages.context import STOP, stage
from ns.stages.gate import resolve_teacher
from ns.stages.keys import labeling_inputs, role_inputs
from ns.stages.prepare import prepare_data
from ns.stages.train import train_generation
from ns.storage import LocalStore
from tests.loop import open_tiny_run, run_loop


def test_same_experiment_reuses_every_stage(finished_run):
    store, ref = finished_run
    before = {key: store.get(key) for key in store.list("store/") if "/runs/" not in key}
    other = open_tiny_run(store, "report.pictures=3")
    assert other.run != ref.run
    run_loop(other)
    work = [note for note in list_stage_notes(store, other.run) if note.stage != "gate"]
    assert [note.stage for note in work if not note.reused] == []
    after = {key: store.get(key) for key in store.list("store/") if "/runs/" not in key}
    entries = {key for key in before if key.startswith("store/ledger/generation/")}
    assert {key: value for key, value in after.items() if key not in entries} == {
        key: value for key, value in before.items() if key not in entries
    }


def test_longer_run_continues_a_shorter_one(finished_run):
    store, ref = finished_run
    other = open_tiny_run(store, "generations=2")
    data = prepare_data(other)
    first = train_generation(other, data=data, generation=0)
    best = summarize_run(store, ref.run).best_model
    assert resolve_teacher(other, data=data, generation=2, first_teacher=first) == best
    assert resolve_teacher(other, data=data, generation=3, first_teacher=first) == STOP


def test_role_inputs_hold_the_digest_of_initial_weights(tmp_path):
    places = [tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "c.safetensors"]
    for place, content in zip(places, (b"one", b"one", b"two"), strict=True):
        place.write_bytes(content)
    root = LocalStore(tmp_path / "root")
    first, moved, other = (role_inputs(RoleConfig(model=ModelConfig(pretrained=str(place))), root) for place in places)
    assert first == moved != other
    student = RoleConfig(model=ModelConfig(pretrained=str(places[0])), train=TrainConfig(init="teacher"))
    assert role_inputs(student, root)["init"] == "teacher"


def test_role_inputs_do_not_depend_on_the_preset(tmp_path):
    role = RoleConfig(preset="b0-small")
    spelt_out = RoleConfig(model=role.model, noise=role.noise, train=role.train)
    root = LocalStore(tmp_path)
    assert role_inputs(role, root) == role_inputs(spelt_out, root)


@pytest.mark.parametrize(
    ("override", "module"),
    [("labeling.temperature=fitted", "evaluation/temperature.py"), ("labeling.foreign_score=distance", "labeling/foreign.py")],
)
def test_labels_depend_on_the_code_that_fits_what_they_use(finished_run, monkeypatch, override, module):
    store, _ = finished_run
    monkeypatch.setattr(keys, "digest_code", lambda *parts: parts)
    code = []
    # Runs of their own: with other keys, all is trained again.
    for run in (open_tiny_run(store, "name=keys"), open_tiny_run(store, "name=keys", override)):
        data = prepare_data(run)
        teacher = train_generation(run, data=data, generation=0)
        with stage("label", run, 1) as context:
            code.append(labeling_inputs(context, PreparedData.load_file(store, data), teacher)["code"])
    assert module not in code[0]
    assert module in code[1]
