"""Thresholds in whole runs: fitted at the end on calibration images alone, used everywhere, fitted again on demand."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import train_direct
import validation_loop
from Configuration_System import load_config
from dataset_loader import create_part_loader
from model_architecture import VisionTransformerConfig, create_model
from scripts import fit_thresholds, predict
from tagger.artifact import load_artifact
from tagger.data.split import Part
from tagger.metrics.thresholds import TagThresholds, decide
from tests.integration.test_train_direct import arguments, run

CALIB = ("data.calib_fraction=0.2", "data.test_fraction=0.15", "training.num_epochs=2")


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(images, tmp_path_factory.mktemp("runs"), "calibrated", *CALIB)


def copy_of(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / finished.name)


def test_a_run_ends_with_thresholds_of_its_own_model_and_calibration_images(finished: Path) -> None:
    artifact = load_artifact(finished / "model")
    thresholds = artifact.thresholds
    assert thresholds is not None and thresholds.weights_sha256 == artifact.weights_sha256
    config = load_config(finished / "config.yaml", environment={})
    vocabulary, train, validation, _ = validation_loop.open_data_and_model(config, finished / "vocabulary.json")
    split = validation.split
    assert split is not None and train.split is split
    assert thresholds.calib_sha256 == split.part_sha256(Part.CALIB)
    assert thresholds.num_images == len(split.rows(Part.CALIB)) > 0
    assert thresholds.vocabulary_sha256 == vocabulary.sha256 and len(thresholds.logits) == len(vocabulary)
    assert artifact.threshold == thresholds.global_probability != config.validation.threshold
    assert "calibration images: f1_macro" in (finished / "train.log").read_text(encoding="utf-8")

    # The same scores by another way: the saved model over the loader of that part.
    model = create_model(VisionTransformerConfig.from_dict(artifact.model_config))
    model.load_state_dict(artifact.weights)
    evaluation = validation_loop.evaluate(
        model,
        create_part_loader(validation, Part.CALIB),
        validation_loop.build_criterion(config, vocabulary),
        validation_loop.MixedPrecisionTrainer("off", torch.device("cpu")),
        torch.device("cpu"),
        num_tags=len(vocabulary),
        threshold=0.5,
        logit_thresholds=thresholds.logits,
    )
    assert evaluation.metrics["f1_macro"] == thresholds.on_calib["f1_macro"]
    assert decide(evaluation.computer, thresholds.logits).to_json() == thresholds.on_calib
    assert np.isnan(evaluation.metrics["threshold"])


def test_validation_says_f1_at_the_models_own_thresholds(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "evaluation.json"
    assert validation_loop.main(["--run", str(finished), "--output", str(output)]) == 0
    content = json.loads(output.read_text(encoding="utf-8"))
    thresholds = load_artifact(finished / "model").thresholds
    assert thresholds is not None
    fitted = content["fitted_thresholds"]
    assert fitted["calib_sha256"] == thresholds.calib_sha256 and fitted["objective"] == "best F1"
    assert 0 <= fitted["f1_macro"] <= 1 and content["threshold"] == 0.5
    told = f"at each tag's own threshold, fitted for best F1 on {thresholds.num_images} calibration images"
    assert told in " ".join(capsys.readouterr().out.split())
    # Where the calibration images are others, they may be among those that are scored.
    recipe = copy_of(finished, tmp_path) / "config.yaml"
    text = recipe.read_text(encoding="utf-8")
    recipe.write_text(text.replace("calib_fraction: 0.2", "calib_fraction: 0.1"), encoding="utf-8")
    assert validation_loop.main(["--run", str(recipe.parent), "--output", str(output)]) == 0
    assert json.loads(output.read_text(encoding="utf-8"))["fitted_thresholds"] is None
    assert "calibration images of another split" in caplog.text


def test_thresholds_are_fitted_again_for_another_goal(
    finished: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = copy_of(finished, tmp_path)
    before = load_artifact(copy / "model")
    assert fit_thresholds.main(["--run", str(copy)]) == 0
    again = load_artifact(copy / "model").thresholds
    assert before.thresholds is not None and again is not None
    assert again.to_json() == before.thresholds.to_json()
    few = tmp_path / "few.json"
    words = ["--run", str(copy), "--objective", "tags_per_image", "--tags-per-image", "1", "--output", str(few)]
    assert fit_thresholds.main(words) == 0
    unchanged = load_artifact(copy / "model").thresholds
    assert unchanged is not None and unchanged.to_json() == again.to_json()
    assert TagThresholds.load(few).goal.describe() == "1 tags an image"
    assert (TagThresholds.load(few).logits >= again.logits).mean() > 0.5
    assert fit_thresholds.main(["--run", str(copy), "--objective", "precision", "--precision", "0.99"]) == 0
    precise = load_artifact(copy / "model").thresholds
    assert precise is not None and precise.goal.describe() == "precision 0.99"
    assert "thresholds for precision 0.99" in capsys.readouterr().out
    assert not (copy / "run.lock").exists()

    def tags_given(*more: str) -> int:
        assert predict.main([str(copy), str(images), "--json", "--device", "cpu", *more]) == 0
        return sum(len(json.loads(line)["tags"]) for line in capsys.readouterr().out.splitlines())

    assert tags_given("--threshold", "0") > tags_given("--thresholds", str(few)) > 0
    assert tags_given("--threshold", "1") == 0


def test_without_calibration_images_it_says_what_to_set(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(images, tmp_path, "plain", "training.num_epochs=1")
    assert load_artifact(folder / "model").thresholds is None
    assert load_artifact(folder / "model").threshold == 0.5
    assert "hold out data.calib_fraction=0.05" in (folder / "train.log").read_text(encoding="utf-8")
    capsys.readouterr()
    assert fit_thresholds.main(["--run", str(folder)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: no image is held out for calibration; set data.calib_fraction")


def test_calibration_images_that_were_trained_on_are_refused(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Setting a part aside after training takes images that the model has learnt from."""
    folder = run(images, tmp_path, "plain", "training.num_epochs=1")
    capsys.readouterr()
    assert fit_thresholds.main(["--run", str(folder), "data.calib_fraction=0.2"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: data.calib_fraction: 0.0 -> 0.2: the images to fit thresholds on would be among")
    words = ("training.num_epochs=2", "data.calib_fraction=0.2", "--resume", "latest")
    assert train_direct.main(arguments(images, tmp_path, "plain", *words)) == 2
    assert "0.0 -> 0.2: calibration and test images would be among those" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--objective", "tags_per_image"], "--tags-per-image: it goes with --objective tags_per_image"),
        (["--precision", "0.8"], "--precision: it is for --objective precision"),
        (["--objective", "precision", "--precision", "1.5"], "1.5 is not a number above 0 up to 1"),
        (["--objective", "luck"], "invalid choice: 'luck'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    finished: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        fit_thresholds.main(["--run", str(finished), *words])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_is_no_run_and_a_run_without_a_model_are_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit_thresholds.main(["--run", str(tmp_path / "nowhere")]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    copy = copy_of(finished, tmp_path)
    shutil.rmtree(copy / "model")
    assert fit_thresholds.main(["--run", str(copy)]) == 2
    assert "has no model yet" in capsys.readouterr().err
