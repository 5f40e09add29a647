"""The closing report: held-out images only, the tags that swap in a mirror, one line for a folder that is no run."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from Configuration_System import FullConfig, load_config
from dataset_loader import create_dataloaders, open_dataset
from scripts.make_demo_dataset import make_demo_dataset
from scripts.report_run import left_right_score, main, pick_held_out, python_command
from tagger.config_io import save_yaml
from tagger.run_folder import RunResults
from vocabulary import build_vocabulary

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> FullConfig:
    folder = tmp_path_factory.mktemp("report")
    make_demo_dataset(folder / "set", count=60, seed=5)
    return load_config(
        ROOT / "configs" / "unified_config.yaml",
        (
            f"data.roots=[{folder / 'set'}]",
            f"data.index_dir={folder / 'index'}",
            "data.val_fraction=0.2",
            "data.image_size=64",
            f"orientation.map_path={ROOT / 'configs' / 'orientation_map.json'}",
        ),
        environment={},
    )


def test_the_images_shown_are_the_ones_never_trained_on(config: FullConfig) -> None:
    index = open_dataset(config.data)
    train, validation = create_dataloaders(config, build_vocabulary(index, min_frequency=1), index)
    held_out = {index.stem(int(row)) for batch, _ in validation for row in batch.row_ids}
    shown = [record.stem for record in pick_held_out(config, 3)]
    assert len(set(shown)) == 3
    assert set(shown) <= held_out
    assert len(pick_held_out(config, 1000)) == validation.num_rows == len(index) - train.num_rows


def test_the_mirror_score_is_of_the_tags_that_swap(config: FullConfig, tmp_path: Path) -> None:
    assert left_right_score(tmp_path, config) is None
    scores = {"arrow_left": 0.8, "arrow_right": 1.0, "arrow": 0.1, "facing_left": None}
    tags = [{"name": name, "average_precision": score} for name, score in scores.items()]
    (tmp_path / "evaluation.json").write_bytes(orjson.dumps({"format_version": 1, "tags": tags}))
    assert left_right_score(tmp_path, config) == "AP 0.9000 over 2 tags, lowest 0.8000 (arrow_left)"
    test_part = {"format_version": 2, "mode": "full", "part": "test", "kind": "model", "tags": tags}
    (tmp_path / "evaluation.json").write_bytes(orjson.dumps(test_part))
    assert left_right_score(tmp_path, config) is None
    (tmp_path / "evaluation.json").write_bytes(orjson.dumps({**test_part, "part": "val"}))
    assert left_right_score(tmp_path, config) is not None
    off = replace(config, orientation=replace(config.orientation, mirror_probability=0))
    assert left_right_score(tmp_path, off) is None


@pytest.mark.skipif(os.name == "nt", reason="other quotes there")
def test_the_command_shown_calls_the_python_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = tmp_path / ".venv" / "bin" / "python"
    link.parent.mkdir(parents=True)
    link.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(link))
    assert python_command() == str(link)
    monkeypatch.chdir(tmp_path)
    assert python_command() == ".venv/bin/python"


def test_a_run_that_was_killed_is_summed_up_as_it_stands(
    config: FullConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    save_yaml(config, tmp_path / "config.yaml")
    RunResults("running", final={"val/mAP": 0.25}, steps=40).write(tmp_path / "results.json")
    assert main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert f"run {tmp_path.name}: killed" in shown and "kill -9" in shown and "--resume latest" in shown
    assert "0.2500" in shown and "none yet" in shown and "scripts.predict" not in shown


def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path} is not a run folder: it has no config.yaml; give the folder that training printed\n"
    )
