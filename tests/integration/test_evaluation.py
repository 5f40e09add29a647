"""The evaluation command on whole tiny runs: the trainer's own numbers, its modes, its files, and what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

import validation_loop
from scripts import fit_thresholds, report_run
from tagger.artifact import load_artifact
from tests.integration.test_ontology_runs import TEXT
from tests.integration.test_train_direct import lines_of, results_of, run

SPLIT = ("data.val_fraction=0.3", "data.calib_fraction=0.15", "data.test_fraction=0.2")
NUM_EPOCHS = "training.num_epochs=2"


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    ontology = runs / "tags.yaml"
    ontology.write_text(TEXT, encoding="utf-8")
    return run(images, runs, "one", *SPLIT, NUM_EPOCHS, f"vocabulary.ontology_file={ontology}")


@pytest.fixture(scope="module")
def other(images: Path, finished: Path) -> Path:
    """A run with other tags, another image size and another validation part."""
    words = ("data.val_fraction=0.45", "vocabulary.min_frequency=12", "data.image_size=24", "training.seed=9")
    return run(images, finished.parent, "other", *words, "training.num_epochs=1")


def evaluate(*words: object) -> int:
    return validation_loop.main([str(word) for word in words])


def evaluated(path: Path, *words: object) -> dict[str, Any]:
    assert evaluate(*words, "--output", path) == 0
    content = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(content, dict) and content["format_version"] == 2
    return content


def logged(folder: Path) -> dict[str, float]:
    """The last validation in the metrics log."""
    line = [line for line in lines_of(folder) if "val/mAP" in line][-1]
    return {name: value for name, value in line.items() if name.startswith("val/")}


def newest(folder: Path) -> Path:
    return sorted((folder / "checkpoints").glob("step-*"))[-1]


BUCKETS = ("data.fit=buckets", "model.mask_padding=true", "model.patch_size=4", "data.image_size=48")
CASES = {
    "online": ("training.ema_decay=null",),
    "bf16": ("training.mixed_precision=bf16", "training.accumulation_steps=3", "validation.batch_size=5"),
    "rating": ("loss.rating_weight=0.5",),
    "buckets": (*BUCKETS, "data.num_processes=2"),
}


@pytest.mark.parametrize(
    "case", [*list(CASES)[:2], *(pytest.param(c, marks=pytest.mark.slow) for c in list(CASES)[2:])]
)
def test_the_commands_numbers_are_the_trainers_bit_for_bit(images: Path, tmp_path: Path, case: str) -> None:
    folder = run(images, tmp_path, case, NUM_EPOCHS, *CASES[case])
    found = evaluated(tmp_path / "found.json", "--checkpoint", newest(folder))
    assert found["kind"] == ("online" if case == "online" else "EMA")
    numbers = logged(folder)
    assert len(numbers) == 4
    assert {name: found[name] for name in numbers} == numbers


def test_both_weights_in_one_pass_are_each_by_itself(finished: Path, tmp_path: Path) -> None:
    both = evaluated(tmp_path / "both.json", "--checkpoint", newest(finished), "--weights", "both")
    numbers = logged(finished)
    assert {name: both[name] for name in numbers} == numbers
    online = evaluated(tmp_path / "online.json", "--checkpoint", newest(finished), "--weights", "online")
    assert both["kind"] == "EMA" and online["kind"] == "online"
    assert both["online"] == {name: online[name] for name in both["online"]}
    assert {name: online[name] for name in numbers} != numbers


def test_a_whole_evaluation_says_what_each_number_is_over(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    capsys.readouterr()
    found = evaluated(tmp_path / "found.json", "--run", finished)
    shown = capsys.readouterr().out
    assert all(len(line) <= 80 for line in shown.splitlines() if str(tmp_path) not in line)
    assert "validation part" in shown and "test part" not in shown and "fitted for best F1" in shown
    assert "…" not in shown and "weakest" in shown
    for mean in (found["summary"]["all_tags"]["f1_macro"]["over"], found["num_tags_in_f1_macro"]):
        assert f"{mean} tags there or told" in shown
    best = results_of(finished)["best"]
    assert found["val/mAP"] == best["value"] == pytest.approx(found["summary"]["all_tags"]["mAP"]["value"])  # type: ignore[index]
    tags, summary = found["tags"], found["summary"]
    num_images = found["num_images"]
    assert num_images == found["num_images_chosen"] == found["num_images_in_part"]
    assert found["num_images_refused"] == 0
    assert sum(bucket["num_tags"] for bucket in summary["by_frequency"]) == len(tags) == summary["num_tags"]
    assert all(bucket["empty"] == (bucket["num_tags"] == 0) for bucket in summary["by_frequency"])
    by_name = {tag["name"]: tag for tag in tags}
    # 60 images, of which every fifth is a sign; those that are held out are not counted.
    vocabulary = json.loads((finished / "vocabulary.json").read_text(encoding="utf-8"))
    counts = {tag["name"]: tag["count"] for tag in vocabulary["tags"]}
    sign = by_name["sign"]
    assert sign["positives"] <= counts["sign"] - sign["training_images"] and sign["training_images"] > 0
    assert found["hierarchy"]["num_images"] == num_images
    assert found["fitted_thresholds"]["num_images"] == num_images


def test_every_number_is_at_the_models_own_thresholds_but_what_training_logs(finished: Path, tmp_path: Path) -> None:
    own = evaluated(tmp_path / "own.json", "--run", finished)
    # The model's weights are the best checkpoint's, which has no thresholds of its own.
    at_one = evaluated(tmp_path / "one.json", "--run", finished, "--weights", "ema")
    assert own["thresholds"].startswith("each tag's own, fitted for best F1") and own["threshold"] == 0.5
    assert at_one["thresholds"] == "0.5 for all tags" and at_one["fitted_thresholds"] is None
    same = [name for name in own if name.startswith(("val/", "num_"))]
    assert {name: own[name] for name in same} == {name: at_one[name] for name in same}
    assert "val/f1_macro" in same and "num_tags_in_f1_macro" in same
    fitted, summary = own["fitted_thresholds"], own["summary"]
    assert fitted["f1_macro"] == pytest.approx(summary["all_tags"]["f1_macro"]["value"], abs=1e-12)
    assert fitted["num_tags_in_f1_macro"] == summary["all_tags"]["f1_macro"]["over"]
    assert fitted["f1_micro"] == summary["all_tags"]["f1_micro"]["value"] == summary["intervals"]["f1_micro"]["value"]
    assert fitted["tags_per_image"] == pytest.approx(summary["per_image"]["predicted"]["value"])
    assert sum(tag["predicted"] for tag in own["tags"]) == round(fitted["tags_per_image"] * own["num_images"])
    thresholds = load_artifact(finished / "model").thresholds
    assert thresholds is not None
    assert [tag["threshold"] for tag in own["tags"]] == thresholds.probabilities.tolist()
    assert {tag["threshold"] for tag in at_one["tags"]} == {0.5}
    assert at_one["summary"]["all_tags"]["f1_micro"]["value"] == own["val/f1_micro"] != fitted["f1_micro"]


def test_the_report_of_a_run_reads_the_file(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("--run", finished) == 0
    assert (finished / "evaluation.json").is_file()
    assert report_run.main([str(finished), "--predict", "1"]) == 0
    assert "left/right tags" in capsys.readouterr().out


def test_overrides_are_recorded_and_other_pixels_have_no_fitted_thresholds(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = evaluated(tmp_path / "plain.json", "--run", finished, "validation.batch_size=7")
    assert plain["overrides"] == ["validation.batch_size=7"] and plain["fitted_thresholds"] is not None
    assert "prepared otherwise" not in caplog.text
    found = evaluated(tmp_path / "found.json", "--run", finished, "data.image_size=48")
    assert found["overrides"] == ["data.image_size=48"] and found["fitted_thresholds"] is None
    assert "prepared otherwise (image_size 32 there, 48 here)" in caplog.text
    sides = evaluated(tmp_path / "c.json", "--compare", finished, finished, "data.image_size=48")["sides"]
    assert {side["thresholds"] for side in sides} == {"0.5 for all tags"}


KINDS = (("evaluation", "json"), ("suspects", "jsonl"))


def test_no_evaluation_overwrites_anothers_files(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "one")
    last = newest(folder)
    for path in folder.glob("evaluation*"):
        path.unlink()
    kept = set(folder.iterdir())
    sources = (("--run", folder), ("--run", folder, "--weights", "online"), ("--checkpoint", last))
    ends = ("", "-online", f"-{last.name}", "-test")
    for source in sources:
        assert evaluate(*source, "--suspects", 3) == 0
    assert evaluate("--run", folder, "--part", "test", "--suspects", 3) == 0
    names = {f"{name}{end}.{suffix}" for end in ends for name, suffix in KINDS}
    assert {path.name for path in set(folder.iterdir()) - kept} == names
    assert json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["kind"] == "model"
    assert evaluate("--compare", folder, last, "--part", "test") == 0
    assert (folder / f"comparison-{last.name}-test.json").is_file()


def test_parts_do_not_overlap_and_the_test_part_says_so(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, set[str]] = {}
    hashes = set()
    for part in ("val", "calib", "test"):
        file = tmp_path / f"{part}.jsonl"
        found = evaluated(tmp_path / f"{part}.json", "--run", finished, "--part", part, "--save-predictions", file)
        assert f"{part}/mAP" in found and ("val/mAP" in found) == (part == "val")
        assert ("use it once" in capsys.readouterr().out) == (part == "test")
        assert (found["fitted_thresholds"] is None) == (part == "calib")
        hashes.add(found["part_sha256"])
        seen[part] = {json.loads(line)["image"] for line in file.read_text(encoding="utf-8").splitlines()[1:]}
        assert len(seen[part]) == found["num_images"]
    assert len(hashes) == 3
    assert not seen["val"] & seen["calib"] and not seen["val"] & seen["test"] and not seen["calib"] & seen["test"]
    assert evaluate("--run", finished, "--part", "test", "--mode", "fast", "--images", "3") == 0
    assert (finished / "evaluation-test-fast.json").is_file()


def test_fast_takes_the_same_images_every_time(finished: Path, tmp_path: Path) -> None:
    def images_of(*words: object) -> list[str]:
        file = tmp_path / "fast.jsonl"
        evaluated(tmp_path / "f.json", "--run", finished, "--mode", "fast", *words, "--save-predictions", file)
        return [json.loads(line)["image"] for line in file.read_text(encoding="utf-8").splitlines()[1:]]

    few, more = images_of("--images", 4), images_of("--images", 9)
    assert len(few) == 4 and len(more) == 9 and set(few) < set(more)
    half = images_of("--fraction", 0.5)
    assert half == images_of("--fraction", 0.5) and set(half) <= set(images_of("--fraction", 0.9))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_predictions_give_the_evaluations_own_scores(finished: Path, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"scores{suffix}"
    found = evaluated(tmp_path / "found.json", "--run", finished, "--save-predictions", file)
    if suffix == ".parquet":
        table = pytest.importorskip("pyarrow.parquet").read_table(file)
        header, rows = json.loads(table.schema.metadata[b"tagsmith"]), table.to_pylist()
    else:
        header, *rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    assert header["format_version"] == 1 and header["part_sha256"] == found["part_sha256"]
    scores = np.array([row["scores"] for row in rows], dtype=np.float64)
    truth = np.array([[tag in row["tags"] for tag in header["vocabulary"]] for row in rows])
    assert len(rows) == found["num_images"] and [tag["name"] for tag in found["tags"]] == header["vocabulary"]
    for place, tag in enumerate(found["tags"]):
        assert tag["positives"] == truth[:, place].sum()
        # A threshold may be an image's score; as probabilities the two are rounded differently.
        assert tag["predicted"] == (scores[:, place] >= tag["threshold"] - 1e-7).sum()
        if tag["positives"]:
            expected = average_precision_score(truth[:, place], scores[:, place])
            assert tag["average_precision"] == pytest.approx(expected, abs=1e-12)


def test_named_tags(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # An alias is the tag that it stands for.
    words = ("--mode", "tags", "--tags", "square", "arrow left")
    found = evaluated(tmp_path / "found.json", "--run", finished, *words)
    first, second = found["tag_details"]
    assert (first["name"], second["name"]) == ("box", "arrow left")
    by_name = {tag["name"]: tag for tag in found["tags"]}
    assert first["average_precision"] == pytest.approx(by_name["box"]["average_precision"], abs=1e-12)
    assert first["curve"][-1]["predicted"] == first["num_images"] and first["curve"][-1]["recall"] == 1
    assert all(Path(image["image"]).is_file() for image in first["lowest_of_those_with_it"])
    assert evaluate("--run", finished, "--mode", "tags", "--tags", "arow") == 2
    assert "did you mean 'arrow'" in capsys.readouterr().err


def test_hierarchical_needs_an_ontology(
    finished: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluated(tmp_path / "found.json", "--run", finished, "--mode", "hierarchical")
    assert found["hierarchy"]["num_pairs"] > 0 and found["hierarchy"]["all_tags"]["f1"] is not None
    assert "with all they imply" in capsys.readouterr().out
    assert evaluate("--run", other, "--mode", "hierarchical") == 2
    assert "has no ontology" in capsys.readouterr().err


def test_a_comparison_leaves_out_what_one_side_was_trained_on(
    finished: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = evaluated(tmp_path / "b.json", "--run", other)
    capsys.readouterr()
    found = evaluated(tmp_path / "found.json", "--run", other, "--compare", finished, other)
    shown = capsys.readouterr().out
    a, b = found["sides"]
    # The larger validation part holds images that the first run was trained or calibrated on.
    assert a["num_images_it_was_made_from"] > 0 == b["num_images_it_was_made_from"]
    assert found["num_images"] == whole["num_images"] - a["num_images_it_was_made_from"]
    assert "was made from" in shown and "tags in common" in shown
    assert "shape" in a["left_out"] and "square" in b["left_out"]
    assert found["num_tags"] == a["num_tags"] - len(a["left_out"]) == b["num_tags"] - len(b["left_out"])
    score = found["scores"]["mAP"]
    assert score["difference"] == pytest.approx(score["b"] - score["a"]) and score["over"] <= found["num_tags"]
    # A has thresholds of its own, B has one: F1 at one rule for both is beside it.
    assert a["thresholds"] == "fitted for each tag" and b["thresholds"] == "0.5 for all tags" and not found["one_rule"]
    assert "F1 micro *" in shown and "mAP *" not in shown and "F1 micro at 0.5" in shown
    assert found["scores"]["f1_micro_at_0.5"]["b"] == found["scores"]["f1_micro"]["b"]
    assert found["scores"]["f1_macro_at_0.5"]["b"] == pytest.approx(found["scores"]["f1_macro"]["b"])
    assert found["scores"]["f1_micro_at_0.5"]["a"] != found["scores"]["f1_micro"]["a"]
    assert evaluate("--compare", finished, other) == 0
    assert (finished / "comparison-other.json").is_file()


def test_a_model_compared_with_itself_is_no_better(finished: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(finished / "model", tmp_path / "alone")
    whole = evaluated(tmp_path / "whole.json", "--run", finished)
    found = evaluated(tmp_path / "found.json", "--compare", finished, alone)
    assert found["sides"][1]["num_images_it_was_made_from"] is None
    score = found["scores"]["mAP"]
    assert score["a"] == score["b"] == whole["val/mAP"] and score["standard_error"] == 0
    assert found["num_won"] == found["num_lost"] == 0 and found["one_rule"]
    assert "f1_micro_at_0.5" not in found["scores"]


def test_a_split_that_was_edited_after_training_is_warned_of(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert evaluated(tmp_path / "a.json", "--run", finished)["training_part_unchanged"] is True
    assert "not those of" not in caplog.text
    edited = shutil.copytree(finished, tmp_path / "edited")
    recipe = edited / "config.yaml"
    text = recipe.read_text(encoding="utf-8")
    assert "val_fraction: 0.3" in text
    recipe.write_text(text.replace("val_fraction: 0.3", "val_fraction: 0.4"), encoding="utf-8")
    for source in (("--run", edited), ("--checkpoint", newest(edited))):
        caplog.clear()
        assert evaluated(tmp_path / "b.json", *source)["training_part_unchanged"] is False
        assert "some that it was trained on may count as held out now" in caplog.text
    caplog.clear()
    assert fit_thresholds.main(["--run", str(edited), "--output", str(tmp_path / "thresholds.json")]) == 0
    assert "not those of" in caplog.text
    found = evaluated(tmp_path / "c.json", "--compare", finished, edited)
    assert [side["training_part_unchanged"] for side in found["sides"]] == [True, False]
    shutil.rmtree(edited / "checkpoints")
    assert evaluated(tmp_path / "d.json", "--run", edited)["training_part_unchanged"] is None


def test_a_run_without_a_model_says_how_it_stands(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(finished, tmp_path / "one")
    shutil.rmtree(folder / "model")
    assert evaluate("--run", folder) == 2
    assert "has no model yet (completed, step" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "say what to score"),
        (("--run", "{run}", "--images", "3"), "add --mode fast"),
        (("--run", "{run}", "--mode", "fast", "--images", "3", "--fraction", "0.5"), "give one of them"),
        (("--run", "{run}", "--mode", "tags"), "name the tags"),
        (("--run", "{run}", "--tags", "arrow"), "--tags goes with --mode tags"),
        (("--run", "{run}", "--top", "3"), "add it"),
        (("--run", "{run}", "--save-predictions", "{tmp}/scores.csv"), ".jsonl or .parquet"),
        (("--run", "{run}", "--weights", "both", "--suspects", "5"), "one kind of weights"),
        (("--run", "{run}", "--mode", "fast", "--fraction", "1e-9"), "leaves none"),
        (("--run", "{run}/model"), "without its run"),
        (("--run", "{run}", "data.val_fraction=0.5"), "images that were trained on would count as held out"),
        (("--compare", "{run}", "{run}", "data.split_key=path"), "images that were trained on would count as held out"),
        (("--run", "{tmp}"), "holds none of these"),
        (("--compare", "{run}", "{tmp}/gone"), "does not exist"),
        (("--compare", "{run}", "{run}", "--suspects", "5"), "leave out --suspects"),
        (("--run", "{run}", "model.embed_dim=64"), "do not fit this model"),
    ],
)
def test_bad_input_is_one_line(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    folder = finished
    if words == ("--run", "{run}/model"):
        shutil.copytree(finished / "model", tmp_path / "model")
        folder = tmp_path
    before = sorted(tmp_path.rglob("*"))
    assert evaluate(*(word.format(run=folder, tmp=tmp_path) for word in words)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_parquet_without_its_package_is_refused_before_the_work(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr(validation_loop, "open_data_and_model", None)
    assert evaluate("--run", finished, "--save-predictions", tmp_path / "scores.parquet") == 2
    assert "pip install 'tagsmith[parquet]'" in capsys.readouterr().err
