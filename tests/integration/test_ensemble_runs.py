"""Runs of several networks as one model: trained, resumed, evaluated and used as one."""

import json
from pathlib import Path

import pytest

import train_direct
import validation_loop
from scripts import predict
from tests.integration.test_train_direct import arguments, copy_half, final_state, losses_of, results_of, run

MEMBERS = ("model.num_members=2", "checkpoint.every_steps=1", "checkpoint.keep_last=100")


@pytest.fixture(scope="module")
def straight(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(images, tmp_path_factory.mktemp("runs"), "straight", *MEMBERS)


def test_a_resume_continues_bitwise(straight: Path, images: Path, tmp_path: Path) -> None:
    resumed = copy_half(straight, tmp_path / "resumed")
    run(images, tmp_path, "resumed", *MEMBERS, "--resume", "latest")
    expected, found = final_state(straight), final_state(resumed)
    assert expected.keys() == found.keys()
    assert {name.split(".")[1] for name in expected if name.startswith("model/members.")} == {"0", "1"}
    assert [name for name in expected if not expected[name].equal(found[name])] == []
    assert losses_of(resumed) == losses_of(straight)


def test_the_model_folder_scores_and_tags_as_one_model(
    straight: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        json.loads((straight / "model" / "config.json").read_text(encoding="utf-8"))["model_args"]["num_members"] == 2
    )
    assert validation_loop.main(["--run", str(straight)]) == 0
    found = json.loads((straight / "evaluation.json").read_text(encoding="utf-8"))
    best = results_of(straight)["best"]
    assert isinstance(best, dict)
    assert found["val/mAP"] == pytest.approx(best["value"], abs=1e-4)
    capsys.readouterr()
    assert predict.main([str(straight / "model"), str(next(images.rglob("*.png"))), "--threshold", "0"]) == 0
    assert capsys.readouterr().out.strip()


def test_a_new_run_starts_from_it_and_another_number_of_members_does_not(
    straight: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--init-from", str(straight), "training.num_epochs=1")
    run(images, tmp_path, "tuned", *words, "model.num_members=2")
    capsys.readouterr()
    assert train_direct.main(arguments(images, tmp_path, "one", *words)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "has 2 members, this model 1; use model.num_members=2" in line
