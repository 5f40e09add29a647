"""The configuration refuses what cannot work and says where each value came from."""

import itertools
import re
from pathlib import Path

import pytest

import Configuration_System
from Configuration_System import (
    FullConfig,
    changed_settings,
    check_paths,
    describe,
    load_config,
    load_with_origin,
)
from tagger.config_io import ConfigError, Layer, _schema_hints, compose, digest, flat_values, save_yaml

UNIFIED = Path(__file__).resolve().parents[2] / "configs" / "unified_config.yaml"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "unified_config.yaml").write_text(UNIFIED.read_text(encoding="utf-8"), encoding="utf-8")
    path = tmp_path / "mine.yaml"
    path.write_text("defaults: [unified_config]\ntraining: {num_epochs: 7, seed: 7, batch_size: 7}\n", encoding="utf-8")
    return path


def test_precedence_is_defaults_file_environment_command_line(recipe: Path) -> None:
    environment = {"TAGGER_TRAINING__SEED": "8", "TAGGER_TRAINING__BATCH_SIZE": "8"}
    loaded = load_with_origin(recipe, ["training.batch_size=9"], environment)
    training = loaded.tree.training
    assert (training.accumulation_steps, training.num_epochs, training.seed, training.batch_size) == (1, 7, 8, 9)
    assert loaded.origin["training.num_epochs"] == f"file {recipe}"
    assert loaded.origin["training.seed"] == "environment"
    assert loaded.origin["training.batch_size"] == "command line"
    shown = describe(loaded)
    assert all(key in shown for key in flat_values(loaded.tree))
    assert "defaults < file < environment" in shown.splitlines()[0]


def test_one_text_stands_for_a_list_of_one(recipe: Path) -> None:
    recipe.write_text("defaults: [unified_config]\ndata: {extra_fields: categories}\n", encoding="utf-8")
    data = load_config(recipe, ["data.roots=my images"], {}).data
    assert (data.roots, data.extra_fields) == (["my images"], ["categories"])
    assert load_config(recipe, environment={"TAGGER_DATA__ROOTS": "there"}).data.roots == ["there"]


def test_no_value_of_the_wrong_type_is_told_in_a_librarys_words() -> None:
    keys = {hint: key for key, hint in _schema_hints(FullConfig).items()}
    assert len(keys) > 20
    for key, value in itertools.product(keys.values(), ([None], [["a"]])):
        with pytest.raises(ConfigError, match=re.escape(key)) as caught:
            compose(FullConfig, [Layer("here", {key: value})])
        assert not re.search(r"Config\b|Node|subclass|Optional|Incompatible|convert", str(caught.value))


def test_arguments_that_lack_are_named_without_the_ones_that_may(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        Configuration_System.main([])
    assert capsys.readouterr().err == (
        "error: the following arguments are required: action, file; --help lists the options\n"
    )


def test_run_is_named_after_its_recipe(recipe: Path) -> None:
    assert load_config(recipe, environment={}).run.name == "mine"
    assert load_config(recipe, ["run.name=other"], {}).run.folder == Path("runs/other")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("training.num_epoch=3", "did you mean 'training.num_epochs'"),
        ("trainin.seed=3", "did you mean 'training.seed'"),
        ("training.seed", "write section.key=value"),
        ("training.seed=x", "training.seed=x is not a whole number; write it as in training.seed=3"),
        ("training.num_epochs=1.5", "training.num_epochs=1.5 is not a whole number;"),
        ("training.num_epochs=0", "training.num_epochs=0 is not above 0"),
        ("training.ema_decay=1.0", "training.ema_decay=1.0 is not between 0 and 1"),
        ("training.device=tpu", "training.device=tpu is not known; use auto, cpu, cuda, mps"),
        ("data.image_size=450", "data.image_size=450 is not a multiple of model.patch_size=16; use 448 or 464"),
        ("data.background=[1,2]", "three numbers"),
        ("data.sampling=balanced", "data.sampling"),
        ("data.sampling_cap=0.5", "data.sampling_cap=0.5 is below 1"),
        ("data.sampling_power=-1", "data.sampling_power=-1.0 is below 0"),
        ("data.fit=stretch", "data.fit"),
        ("data.val_fraction=1", "data.val_fraction=1.0 is not between 0 and 1"),
        ("data.roots=5", "data.roots=5 is not a list of texts; write it as data.roots=[one,two]"),
        ("data.roots=null", "data.roots=null is not a list of texts"),
        ("training={num_epoch: 3}", "did you mean 'training.num_epochs'"),
        ("augment.rotation={probability: 3, strength: 1}", "augment.rotation.probability=3.0 is not between 0 and 1"),
        ("augment.rotation={probability: .5}", "augment.rotation.strength must be set too"),
        ("augment.blur.strength=2", "augment.blur.probability must be set too: augment.blur has no default for it"),
        ("augment.rotation={probability: 1, strength: -1}", "augment.rotation.strength=-1.0 is below 0"),
        ("augment.mixup={probability: 1, strength: 101}", "augment.mixup.strength=101.0 is above 100"),
        ("augment.rotation={probability: 1, strength: 181}", "augment.rotation.strength=181.0 is above 180 (degrees)"),
        ("augment.mixup={probability:0.5,strength: 1}", "a space must follow the colon, as in probability: ..."),
        ("training.phases=[{image_size:32}]", "a space must follow the colon, as in image_size: ..."),
        ("loss.clip=1", "loss.clip=1.0"),
        ("optimizer.betas=[0.9]", "optimizer.betas"),
        ("run.name=a/b", "run.name='a/b' is not a folder name"),
        ("run.name=${oc.env:HOME}", "which recipes may not"),
        ("training=3", "training is a group of settings; set them one by one, e.g. training.num_epochs="),
    ],
)
def test_a_wrong_setting_gives_one_line_that_names_it(recipe: Path, word: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, [word], {})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_that_exclude_each_other_are_refused(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"vocabulary\.ratings is 'ignore'"):
        load_config(recipe, ["loss.rating_weight=1", "vocabulary.ratings=ignore"], {})
    with pytest.raises(
        ConfigError, match=r"at least 3 patches a side; data\.image_size=32 has 2.*image_size=48 or more"
    ):
        load_config(recipe, ["data.fit=buckets", "data.image_size=32"], {})
    assert load_config(recipe, ["data.fit=buckets", "data.image_size=48"], {}).data.fit == "buckets"
    with pytest.raises(ConfigError, match="never acts"):
        load_config(recipe, ["training.early_stopping_patience=7"], {})


def test_numbers_written_as_people_write_them_are_numbers(recipe: Path) -> None:
    config = load_config(recipe, ["optimizer.learning_rate=1e-5", "optimizer.eps=1E-9"], {})
    assert (config.optimizer.learning_rate, config.optimizer.eps) == (1e-5, 1e-9)


def test_an_operation_is_turned_off_by_null(recipe: Path) -> None:
    recipe.write_text(
        "defaults: [unified_config.yaml]\naugment: {rotation: {probability: 0.5, strength: 5}}\n", encoding="utf-8"
    )
    on, off = load_config(recipe, environment={}), load_config(recipe, ["augment.rotation=null"], {})
    assert on.augment.rotation is not None
    assert (on.augment.rotation.probability, on.augment.rotation.strength) == (0.5, 5.0)
    assert off.augment.rotation is None


def test_environment_mistakes_are_refused_too(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"environment: unknown setting 'training.sed'.*training.seed"):
        load_config(recipe, environment={"TAGGER_TRAINING__SED": "1"})


def test_recipes_that_include_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("defaults: [b]\n", encoding="utf-8")
    (tmp_path / "b.yaml").write_text("defaults: [a]\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"a.yaml -> b.yaml -> a.yaml"):
        load_config(tmp_path / "a.yaml", environment={})


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1, 2]", "holds a list"), ("a: b: c", "not valid YAML"), ("defaults: {a: 1}", "must be a list")],
)
def test_files_that_are_no_recipes_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "bad.yaml", environment={})


def test_a_missing_file_says_what_is_there(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"other.yaml does not exist; .* holds mine.yaml, unified_config.yaml"):
        load_config(recipe.with_name("other.yaml"), environment={})


def test_a_saved_configuration_reads_back_equal(recipe: Path, tmp_path: Path) -> None:
    words = ["augment.blur={probability: 0.1, strength: 2}", "data.roots=[/a b, c]", "run.name=x", "optimizer.eps=1e-9"]
    config = load_config(recipe, words, {})
    save_yaml(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml", environment={}) == config


def test_changes_since_a_run_started_are_named(recipe: Path, tmp_path: Path) -> None:
    before = load_config(recipe, ["run.name=x"], {})
    save_yaml(before, tmp_path / "config.yaml")
    now = load_config(recipe, ["run.name=x", "training.seed=1", "checkpoint.resume=latest"], {})
    assert changed_settings(tmp_path / "config.yaml", now) == ["training.seed: 7 -> 1"]
    assert changed_settings(tmp_path / "absent.yaml", now) == []
    assert digest(before) != digest(now)


def test_paths_that_are_not_there_are_named(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.roots is empty"):
        check_paths(load_config(recipe, environment={}))
    with pytest.raises(ConfigError, match=r"data.roots: .*absent is not a folder"):
        check_paths(load_config(recipe, [f"data.roots=[{tmp_path}/absent]"], {}))
    with pytest.raises(ConfigError, match=r"data.cache_dir: .*absent is not a folder .*scripts.build_cache"):
        check_paths(load_config(recipe, [f"data.roots=[{tmp_path}]", f"data.cache_dir={tmp_path}/absent"], {}))
    with pytest.raises(ConfigError, match=r"vocabulary.file: .*none.json is not a file"):
        check_paths(load_config(recipe, [f"data.roots=[{tmp_path}]", f"vocabulary.file={tmp_path}/none.json"], {}))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["calib_fraction=0.4", "test_fraction=0.2"], "data.calib_fraction=0.4 and data.test_fraction=0.2 are more"),
        (["val_fraction=0.6", "test_fraction=0.2"], "data.val_fraction=0.6 is over 0.5"),
        (["val_fraction=0.5", "calib_fraction=0.25", "test_fraction=0.25"], "leave no image for training; lower"),
        (["stratified_split=true", "val_list=names.txt"], "or data.val_list=null"),
        (["stratified_split=true", "group_near_duplicates=true"], "data.group_near_duplicates=false"),
        (["annotations=tags.json", "roots=[a,b]"], "data.roots names 2; give one folder"),
        (["calib_fraction=nan"], "data.calib_fraction=nan is not between 0 and 1"),
    ],
)
def test_splits_that_cannot_be_are_refused_before_any_data(recipe: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(recipe, [f"data.{word}" for word in words], {})


def test_a_list_leaves_the_share_for_validation_without_a_say(recipe: Path) -> None:
    words = ["data.val_list=names.txt", "data.val_fraction=0.9", "data.calib_fraction=0.25", "data.test_fraction=0.25"]
    assert load_config(recipe, words, {}).data.calib_fraction == 0.25


def test_the_command_validates_shows_and_fails_in_one_line(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(recipe), f"data.roots=[{tmp_path}]", "orientation.map_path=null"]
    assert Configuration_System.main(["validate", *words]) == 0
    assert "all valid" in capsys.readouterr().out
    assert Configuration_System.main(["show", *words]) == 0
    assert "# command line" in capsys.readouterr().out
    assert Configuration_System.main(["validate", *words, "training.sed=1"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_a_bare_off_is_the_word_off(recipe: Path) -> None:
    recipe.write_text("defaults: [unified_config]\ntraining: {mixed_precision: off}\n", encoding="utf-8")
    config = load_config(recipe, ["training.compile=on"], {})
    assert (config.training.mixed_precision, config.training.compile) == ("off", "on")
