from typing import get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ns.config.loader import dump_experiment, load_experiment, parse_experiment, resolve_preset
from ns.config.presets import PRESETS
from ns.config.schema import MAX_GENERATIONS, Experiment, ModelConfig, OptimizerConfig, Preset, RoleConfig, TrainConfig
from ns.config.yaml_text import parse_yaml
from ns.core.errors import ConfigError
from ns.runs.lifecycle import derive_run_name
from ns.storage.documents import dump_hashed_fields

DATA = {"labeled": "a", "pool": "b", "heldout": "c"}
MINIMAL = {"name": "x", "data": DATA}


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return str(path)


def refused(document) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_experiment(document, "x.yaml")
    return str(caught.value)


def test_schema_defaults_are_the_papers(minimal):
    experiment = load_experiment(minimal)
    student = experiment.students[0]
    assert student.train.optimizer.lr == 0.016
    assert student.train.ema_decay == 0.9999
    assert student.train.label_smoothing == 0.1
    assert student.train.loss_weighting == "sum"
    assert experiment.selection.min_confidence == 0.3
    assert experiment.selection.per_class == "auto"
    noise = student.noise
    assert (noise.randaugment_translate_px, noise.randaugment_cutout_px, noise.pad_px) == (None, None, None)
    assert (noise.crop_area, noise.crop_aspect, student.model.test_margin_px) == ((0.08, 1), (3 / 4, 4 / 3), 32)


def test_run_name_follows_from_what_differs_from_the_defaults(minimal):
    plain = load_experiment(minimal)
    assert yaml.safe_load(dump_experiment(plain))["teacher"]["noise"]["crop_area"] == [0.08, 1.0]
    assert derive_run_name(load_experiment(minimal, ["teacher.noise.crop_area=[0.08,1]"])) == derive_run_name(plain)
    assert derive_run_name(load_experiment(minimal, ["teacher.noise.crop_area=[0.5,1]"])) != derive_run_name(plain)
    assert dump_hashed_fields(plain) == {"schema": 2, "name": "x", "data": DATA}


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"noise": {"crop_area": [0.5, 0.1]}}, "teacher.noise.crop_area: invalid value [0.5, 0.1]: must be [least, greatest]"),
        ({"noise": {"crop_area": [0, 1]}}, "teacher.noise.crop_area.0: invalid value 0: should be greater than 0"),
        (
            {"model": {"crop": "pad"}, "noise": {"pad_px": 224}},
            "teacher.noise.pad_px: 224: must be below model.resolution, 224 px",
        ),
    ],
)
def test_wrong_sizes_of_noise_are_explained(teacher, message):
    assert f"x.yaml: {message}" in refused({**MINIMAL, "teacher": teacher})


def test_dump_experiment_is_read_back_equal(minimal):
    experiment = load_experiment(minimal, ["generations=2", "selection.from=first"])
    assert experiment.selection.images_from == "first"
    assert parse_experiment(yaml.safe_load(dump_experiment(experiment)), "again") == experiment


@pytest.mark.parametrize(("part", "other"), [
    ("heldout", "labeled"), ("calibration", "labeled"), ("calibration", "heldout"),
    ("test", "labeled"), ("test", "heldout"), ("test", "calibration"),
])  # fmt: skip
def test_data_parts_must_differ(part, other):
    data = {**DATA, "calibration": "kept/apart"}
    message = refused({**MINIMAL, "data": {**data, part: data[other]}})
    assert message.startswith(f"x.yaml: data.{part}: {data[other]}: is the same as data.{other}; ")


def test_unknown_field_suggests_the_likely_one():
    message = refused({**MINIMAL, "students": [{"train": {"epohs": 3}}]})
    assert message == "x.yaml: students.0.train.epohs: unknown field; did you mean 'epochs'?"
    assert "selection.form: unknown field; did you mean 'from'?" in refused({**MINIMAL, "selection": {"form": "first"}})
    assert "selection.images_from: unknown field" in refused({**MINIMAL, "selection": {"images_from": "first"}})
    assert "selection.from: invalid value 'second'" in refused({**MINIMAL, "selection": {"from": "second"}})


def test_unknown_field_without_likely_one_lists_the_known():
    assert "known here: level, min_gain" in refused({**MINIMAL, "gate": {"zzz": 1}})


def test_wrong_values_name_path_value_and_range():
    message = refused({**MINIMAL, "gate": {"level": 2}, "generations": "many", "teacher": {"model": {"resolution": 4}}})
    assert "x.yaml: gate.level: invalid value 2: should be less than 1" in message
    assert "x.yaml: generations: invalid value 'many': should be a valid integer" in message
    assert "x.yaml: teacher.model.resolution: invalid value 4: should be greater than or equal to 8" in message


@pytest.mark.parametrize(
    "override",
    ["selection.per_class=true", "labeling.temperature=true", "students.0.noise.mixup=True", "evaluation.fgsm_epsilons=[true]"],
)
def test_true_and_false_are_no_numbers(minimal, override):
    field = override.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"{field}: invalid value \[?True\]?: must be a number; true and false") as caught:
        load_experiment(minimal, ["students=[{}]", override])
    assert "\n" not in str(caught.value)


def test_true_and_false_stay_what_they_are_elsewhere(minimal):
    experiment = load_experiment(minimal, ["selection.repeat=no", "teacher.model.args.stem_bias=true"])
    assert (experiment.selection.repeat, experiment.teacher.model.args) == (False, {"stem_bias": True})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.calibration=''", "data.calibration: invalid value '': must not be empty"),
        ("labeling.ensemble=['']", "labeling.ensemble.0: invalid value '': must not be empty"),
        ("students=[]", "students: invalid value []: must not be empty"),
        ("data.pool=gs://b/c", "data.pool: invalid value 'gs://b/c': no store for gs://; use a folder path, file:///absolute"),
        (
            "data.pool=https://x.org/a.zip",
            "data.pool: .*: no store for https://; use a folder path, file:///absolute/path or s3://",
        ),
        ("data.pool=s3://", "data.pool: invalid value 's3://': must name a bucket: s3://bucket/prefix"),
        ("labeling.ensemble=model", "labeling.ensemble: invalid value 'model': must be a list"),
    ],
)
def test_wrong_uris_say_what_is_right(minimal, override, message):
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        load_experiment(minimal, [override])


def test_missing_field_is_named():
    assert refused({"name": "x", "data": {"labeled": "a", "pool": "b"}}) == "x.yaml: data.heldout: missing; it has no default"


def test_students_are_at_most_one_per_generation():
    assert "at most one per generation" in refused({**MINIMAL, "generations": 1, "students": [{}, {}]})


def test_model_args_point_to_the_field_of_their_own():
    message = refused({**MINIMAL, "teacher": {"model": {"args": {"drop_rate": 0.5}}}})
    assert "teacher.model.args" in message
    assert "noise.dropout" in message


def test_generations_are_limited():
    assert "generations" in refused({**MINIMAL, "generations": MAX_GENERATIONS + 1})


def test_overrides_reach_sections_and_list_items(minimal):
    experiment = load_experiment(minimal, ["students=[{}]", "students.0.train.epochs=5", "teacher.noise.flip=false", "seed=7"])
    assert experiment.students[0].train.epochs == 5
    assert experiment.teacher.noise.flip is False
    assert experiment.seed == 7


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("seed", "must look like a.b=value"),
        ("=3", "must look like a.b=value"),
        ("seed.x=3", "seed is a value, not a section"),
        ("students.4.train.epochs=1", "must be an index below 1"),
        ("seed=[1", "not YAML: line 2, column 1: while parsing a flow sequence did not find expected"),
    ],
)
def test_wrong_override_says_why(minimal, override, reason):
    overrides = ["seed=1", "students=[{}]", override]
    with pytest.raises(ConfigError, match=reason.replace("[", r"\[")):
        load_experiment(minimal, overrides)


@pytest.mark.parametrize(
    ("text", "what"), [("", "is empty"), ("# later\n", "is empty"), ("- name\n", "is no mapping but a list")]
)
def test_file_without_fields_says_what_to_write(tmp_path, text, what):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"x\.yaml: {what}; write fields, one a line \(name: animals\)"):
        load_experiment(str(tmp_path / "x.yaml"))


def test_last_student_serves_all_further_generations():
    experiment = parse_experiment({**MINIMAL, "generations": 3, "students": [{}, {"train": {"epochs": 9}}]}, "x.yaml")
    assert [experiment.get_student(g).train.epochs for g in (1, 2, 3)] == [350, 9, 9]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"name: x\n  bad: [1,\n", "line 2, column 6: mapping values are not allowed in this context"),
        (b"\tname: x\n", "line 1 begins with a tab; indent it with spaces"),
        (b"name: x\ngate: {level: 1}\ngate: {min_gain: 0}\n", "line 3, column 1: gate is there twice; keep one"),
        (b"\xff\xd8\xff\xe0", "unacceptable character #x00ff: invalid leading UTF-8 octet"),
    ],
)
def test_load_experiment_says_in_one_line_why_it_is_no_yaml(tmp_path, text, reason):
    (tmp_path / "x.yaml").write_bytes(text)
    with pytest.raises(ConfigError, match=rf"x\.yaml: not YAML: {reason}$") as caught:
        load_experiment(str(tmp_path / "x.yaml"))
    assert "\n" not in str(caught.value)


def test_merged_fields_may_be_overridden(tmp_path):
    text = "name: x\ndata: {labeled: a, pool: b, heldout: c}\nteacher: {noise: &n {<<: &m {cutout_px: 8}, cutout_px: 4}}\n"
    (tmp_path / "x.yaml").write_text(text + "students: [{noise: {<<: *n, cutout_px: 2}}]\n")
    experiment = load_experiment(str(tmp_path / "x.yaml"))
    assert (experiment.teacher.noise.cutout_px, experiment.students[0].noise.cutout_px) == (4, 2)


def test_load_experiment_names_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_experiment(str(tmp_path / "nowhere.yaml"))


def test_every_field_is_documented_in_the_schema():
    schema = Experiment.model_json_schema()
    undocumented = [
        f"{name}.{field}"
        for name, section in [("Experiment", schema), *schema["$defs"].items()]
        for field, facts in section["properties"].items()
        if "description" not in facts and "$ref" not in facts and not any("$ref" in str(value) for value in facts.values())
    ]
    assert undocumented == []


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda leaf: st.lists(leaf) | st.dictionaries(st.text(), leaf)
    )
)
def test_parse_experiment_refuses_garbage(document):
    with pytest.raises(ConfigError):
        parse_experiment(document if isinstance(document, dict) else {"name": document}, "x.yaml")


@given(st.binary(max_size=200))
def test_load_experiment_refuses_garbage(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("garbage") / "x.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError):
        load_experiment(str(path))


def test_override_does_not_leak_through_yaml_aliases(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("name: x\ndata: {labeled: a, pool: b, heldout: c}\nteacher: &t {model: {resolution: 32}}\nstudents: [*t]\n")
    experiment = load_experiment(str(path), ["teacher.model.resolution=64"])
    assert experiment.teacher.model.resolution == 64
    assert experiment.students[0].model.resolution == 32


def test_accumulate_must_divide_a_step():
    train = {"labeled_batch": 8, "unlabeled_ratio": 0.5}
    parse_experiment({**MINIMAL, "teacher": {"train": {**train, "accumulate": 4}}}, "x.yaml")
    assert "x.yaml: teacher.train.accumulate: 8 must divide the 8 labeled and the 4" in refused(
        {**MINIMAL, "teacher": {"train": {**train, "accumulate": 8}}}
    )


def test_accumulate_must_divide_a_step_of_fine_tuning():
    """Which comes after the training: the error would come days later."""
    train = {"labeled_batch": 8, "unlabeled_ratio": 0, "accumulate": 4, "finetune": {"resolution": 32, "labeled_batch": 6}}
    assert "x.yaml: teacher.train.finetune.labeled_batch: 6: must be a multiple of accumulate, 4" in refused(
        {**MINIMAL, "teacher": {"train": train}}
    )


def test_preset_is_overridden_by_fields():
    role = {"preset": "b5", "noise": {"dropout": 0.1}, "train": {"optimizer": {"lr": 0.5}, "epochs": 2}}
    teacher = parse_experiment({**MINIMAL, "teacher": role}, "x.yaml").teacher
    assert teacher.model.arch == "tf_efficientnet_b5"
    assert teacher.model.resolution == 456
    assert (teacher.noise.dropout, teacher.noise.randaugment_magnitude) == (0.1, 18)
    assert (teacher.train.epochs, teacher.train.labeled_batch, teacher.train.unlabeled_ratio) == (2, 2048, 3)
    assert (teacher.train.optimizer.lr, teacher.train.optimizer.name) == (0.5, "rmsprop")


def test_small_preset_reaches_into_the_optimizer():
    teacher = RoleConfig(preset="b0-small", train=TrainConfig(optimizer=OptimizerConfig(lr=0.5)))
    assert (teacher.train.optimizer.weight_decay, teacher.train.optimizer.lr) == (1e-4, 0.5)
    assert (teacher.model.reduce_stride, teacher.noise.cutout_px) == (4, 16)


@pytest.mark.parametrize("name", ["hf-hub:me/net@../../x", "hf-hub:../net", "hf-hub:me/net@-x", "hf-hub:me/net@/x"])
def test_experiment_refuses_revisions_that_lead_out_of_the_hubs_cache(name):
    document = {**MINIMAL, "teacher": {"model": {"arch": "resnet18", "pretrained": name}}}
    assert "must be hf-hub:OWNER/NAME, or hf-hub:OWNER/NAME@REVISION" in refused(document)


@pytest.mark.parametrize("field", ["data.labeled", "data.test", "data.exclude", "registry.remote", "teacher.model.pretrained",
                                   "labeling.ensemble.0", "evaluation.sets.a.uri"])  # fmt: skip
@pytest.mark.parametrize("uri", ["s3://me:secret@bucket/a", "s3://me:sec/ret@bucket/a", "https://secret@host/a.zip"])
def test_experiment_refuses_passwords_in_uris_without_showing_them(field, uri):
    document = {**MINIMAL, "data": dict(DATA), "registry": {"git": "g"}, "labeling": {"ensemble": ["m"]}}
    section, *keys, last = [int(key) if key.isdigit() else key for key in field.split(".")]
    node = document.setdefault(section, {})
    for key in keys:
        node = node.setdefault(key, {})
    node[last] = uri + ("/w.safetensors" if last == "pretrained" else "")
    message = refused(document)
    assert f"x.yaml: {field}: holds a user or a password" in message
    assert "secret" not in message


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("number", ["0x" + 5000 * "f", ":".join(5000 * ["59"]), f"\n  ? 0x{5000 * 'f'}\n  : 1"])
def test_yaml_has_no_numbers_that_cannot_be_printed(number):
    with pytest.raises(ConfigError, match=r"x\.yaml: not YAML: OverflowError; put the value"):
        parse_yaml(f"seed: {number}", "x.yaml")


@pytest.mark.parametrize("text", [BOMB, "a: &a {b: *a}", "a: &a [*a]", "[" * 5000, "a: " + "[" * 40 + "]" * 40], ids=range(5))
def test_small_yaml_has_no_large_cost(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"x\.yaml: (has more than|is nested too deeply)"):
        load_experiment(str(path))


@pytest.mark.parametrize("value", ["[" * 5000, "[" * 40 + "]" * 40])
def test_override_of_great_depth_is_refused(minimal, value):
    with pytest.raises(ConfigError, match=r"--set data"):
        load_experiment(minimal, [f"data={value}"])


LOADED = {
    "checkpoint_path": "/etc/passwd", "pretrained_cfg_overlay": {"file": "w.bin"}, "pretrained_cfg": "x", "cache_dir": "/tmp",
    "pretrained_model_args": {}, "feature_cfg": {}, "device": "cuda", "scriptable": True, "features_only": True, "bn_esp": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", LOADED)
def test_model_args_are_those_of_shape(name):
    assert f"x.yaml: teacher.model.args.{name}: is none of" in refused(
        {**MINIMAL, "teacher": {"model": {"args": {name: LOADED[name]}}}}
    )


@pytest.mark.parametrize("value", [{"a": 1}, "/etc/passwd", "../x", "a:b", [[["deep"]]]])
def test_model_args_are_plain_values(value):
    assert "x.yaml: teacher.model.args.act_layer" in refused({**MINIMAL, "teacher": {"model": {"args": {"act_layer": value}}}})


@pytest.mark.parametrize("arch", ["hf-hub:timm/resnet18", "local-dir:/tmp/x", "hf_hub:x", "a/b", "../x", "", "resnet18\n"])
def test_model_arch_is_a_name(arch):
    assert "x.yaml: teacher.model.arch: " in refused({**MINIMAL, "teacher": {"model": {"arch": arch}}})
    assert RoleConfig.model_validate({"model": {"arch": "vit_tiny_patch16_224.augreg_in21k"}})


def test_preset_args_are_not_inherited_by_another_network():
    assert RoleConfig.model_validate({"preset": "b0", "model": {"arch": "resnet50", "args": {}}}).model.args == {}


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_survives_a_dump(preset):
    experiment = parse_experiment({**MINIMAL, "teacher": {"preset": preset}}, "x.yaml")
    assert experiment.teacher != parse_experiment(MINIMAL, "x.yaml").teacher
    assert parse_experiment(yaml.safe_load(dump_experiment(experiment)), "again") == experiment


def test_unknown_preset_lists_the_known():
    message = refused({**MINIMAL, "teacher": {"preset": "b9"}})
    assert "x.yaml: teacher.preset: invalid value 'b9'" in message
    assert "'l2'" in message
    assert set(PRESETS) == set(get_args(Preset))


@pytest.mark.parametrize("init", ["techer", "weights.safetensors", "/models/b0", ["scratch"]])
def test_train_init_takes_no_weights_from_elsewhere(init):
    message = refused({**MINIMAL, "teacher": {"train": {"init": init}}})
    cure = "must be scratch or teacher; weights from elsewhere are named in model.pretrained"
    assert f"teacher.train.init: invalid value {init!r}: {cure}" in message


def test_train_init_shows_no_password_of_the_former_form():
    message = refused({**MINIMAL, "teacher": {"train": {"init": "s3://me:secret@bucket/w.safetensors"}}})
    assert "teacher.train.init" in message
    assert "secret" not in message


@pytest.mark.parametrize(
    ("pretrained", "uri"),
    [
        ("resnet18", None),
        ("vit_small_patch16_224.augreg_in21k_ft_in1k", None),
        ("hf-hub:timm/resnet18.a1_in1k", None),
        ("hf-hub:me/a@v1.0", None),
        ("a.safetensors", "a.safetensors"),
        ("./model", "./model"),
        ("s3://bucket/model", "s3://bucket/model"),
    ],
)
def test_pretrained_names_weights_of_a_hub_or_a_uri(pretrained, uri):
    assert ModelConfig(pretrained=pretrained).pretrained_uri == uri


@pytest.mark.parametrize(
    "pretrained", ["hf-hub:me", "hf-hub:me/a/b", "local-dir:x", "a b", "http://host/a.safetensors", "s3://", ""]
)
def test_pretrained_refuses_other_forms(pretrained):
    assert "teacher.model.pretrained: " in refused({**MINIMAL, "teacher": {"model": {"pretrained": pretrained}}})


def test_registry_refuses_passwords():
    for url in ("https://user:pass@host/x.git", "https://token@host/x.git", "ssh://git:pass@host/x.git"):
        said = refused(MINIMAL | {"registry": {"git": url}})
        assert "registry.git: holds a password or token" in said
        assert "pass@" not in said
        assert "token@" not in said
    for url in ("git@host:x.git", "ssh://git@host/x.git", "https://host/x.git", "registry.git"):
        assert parse_experiment(MINIMAL | {"registry": {"git": url}}, "x.yaml").registry.remote is None


def test_run_name_ignores_defaults_of_evaluation():
    plain = parse_experiment({"name": "x", "data": DATA}, "x.yaml")
    asked = {"suites": ["clean"], "images": None}
    assert derive_run_name(
        parse_experiment({"name": "x", "data": {**DATA, "test": None}, "evaluation": asked}, "x.yaml")
    ) == derive_run_name(plain)
    for more in ({"evaluation": {"suites": ["attacks"]}}, {"data": {**DATA, "test": "t"}}):
        assert derive_run_name(parse_experiment({"name": "x", "data": DATA, **more}, "x.yaml")) != derive_run_name(plain)


def test_evaluation_sets_survive_a_dump():
    sets = {"imagenet-a": {"uri": "a", "classes": "own"}, "c": {"uri": "c", "kind": "cifar10-c"}}
    experiment = parse_experiment({"name": "x", "data": DATA, "evaluation": {"sets": sets}}, "x.yaml")
    assert parse_experiment(yaml.safe_load(dump_experiment(experiment)), "x.yaml") == experiment


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"suites": ["corruption"]}, "evaluation.suites.0: invalid value 'corruption': should be 'clean', 'corruptions'"),
        ({"severities": [1, 1]}, "evaluation.severities: invalid value [1, 1]: must name each only once"),
        ({"severities": [6]}, "evaluation.severities.0: invalid value 6: should be less than or equal to 5"),
        ({"corruptions": ["rain"]}, "evaluation.corruptions.0: invalid value 'rain'"),
        (
            {"sets": {"c": {"uri": "c", "kind": "imagenet-c", "classes": "own"}}},
            "evaluation.sets.c.classes: is for kind images",
        ),
        ({"sets": {"c": {"uri": "c", "clases": "own"}}}, "evaluation.sets.c.clases: unknown field; did you mean 'classes'?"),
        ({"sets": {"No": {"uri": "c"}}}, "evaluation.sets.No"),
    ],
)
def test_wrong_evaluation_is_explained(evaluation, message):
    assert message in refused({"name": "x", "data": DATA, "evaluation": evaluation})


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "teacher.train.processes=two",
            "teacher.train.processes: invalid value 'two': should be 'auto', or should be a valid integer",
        ),
        (
            "evaluation.sets.x={uri: a, classes: 5}",
            "evaluation.sets.x.classes: invalid value 5: should be 'all' or 'own', or",
        ),
        ("evaluation.sets.Xy.uri=a", "evaluation.sets.Xy: invalid value 'Xy': "),
        ("evaluation.sets.x.urii=a", "evaluation.sets.x.urii: unknown field; did you mean 'uri'?"),
    ],
)
def test_field_of_several_types_is_named_once(override, line):
    with pytest.raises(ConfigError) as caught:
        load_experiment(resolve_preset("quickstart"), [override])
    assert sum(line in one for one in str(caught.value).splitlines()) == 1
    assert "literal" not in str(caught.value)
    assert "[key]" not in str(caught.value)


def test_override_makes_a_missing_section(tmp_path):
    full = tmp_path / "full.yaml"
    full.write_text(dump_experiment(load_experiment(resolve_preset("quickstart"))) + "\n")
    experiment = load_experiment(str(full), ["registry.git=/git", "teacher.train.finetune.resolution=64"])
    assert experiment.registry.git == "/git"
    assert experiment.teacher.train.finetune.resolution == 64


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
@pytest.mark.parametrize(
    "field", ["teacher.train.epochs", "teacher.train.optimizer.clip_norm", "gate.min_gain", "evaluation.keep_gib"]
)
def test_numbers_must_be_finite(field, value):
    # JSON has no word for others: they would come back from a run's config.yaml as not given.
    with pytest.raises(ConfigError, match=rf"{field}: invalid value"):
        load_experiment(resolve_preset("quickstart"), [f"{field}={value}"])


def test_words_that_yaml_1_1_takes_for_truth_values_are_words(minimal, tmp_path):
    """off, no, on and yes without quotes, in a file and in an override: as settings, as names, and as truth values."""
    path = tmp_path / "words.yaml"
    path.write_text(
        "name: on\ndata: {labeled: a, pool: b, heldout: c, leak_guard: off}\n"
        "evaluation: {sets: {no: {uri: d, classes: [no, yes, off]}}}\n"
        "teacher: {noise: {flip: off}}\nselection: {repeat: yes}\nallow_smaller_student: true\n"
    )
    experiment = load_experiment(str(path))
    assert (experiment.name, experiment.data.leak_guard) == ("on", "off")
    assert experiment.evaluation.sets["no"].classes == ("no", "yes", "off")
    assert (experiment.teacher.noise.flip, experiment.selection.repeat, experiment.allow_smaller_student) == (False, True, True)
    written = tmp_path / "written.yaml"
    written.write_text(dump_experiment(experiment))
    assert load_experiment(str(written)) == experiment
    assert load_experiment(minimal, ["data.leak_guard=off"]).data.leak_guard == "off"


@pytest.mark.parametrize("weights", ["./weights.pth", "s3://bucket/x.pt", "/tmp/pytorch_model.bin", "last.ckpt"])
def test_pickled_weights_are_refused_with_a_cure(weights):
    message = refused({**MINIMAL, "teacher": {"model": {"pretrained": weights}}})
    assert f"x.yaml: teacher.model.pretrained: invalid value {weights!r}: pickled weights are not read" in message
    assert "safetensors.torch.save_file(torch.load(FILE, weights_only=True)" in message
    assert len(message.splitlines()) == 1
