"""Two validations have one yardstick where their scores compare, wherever the files lie, and else another."""

import json
import shutil
from pathlib import Path

import pytest

from start_up import measured_with
from tests.tiny_dataset import configure, loaders, write_dataset


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("yardstick") / "images"
    write_dataset(root)
    return root


def measured(root: Path, **overrides: object) -> str:
    _, validation, vocabulary = loaders(root, **overrides)
    return measured_with(configure(root, **overrides), vocabulary, validation)


def held_out(root: Path) -> Path:
    _, validation, _ = loaders(root)
    return validation.dataset.index.image_path(int(validation.rows[0]))


def test_what_does_not_move_the_score_keeps_the_yardstick(drawn: Path, tmp_path: Path) -> None:
    before = measured(drawn)
    for change in ({"training__batch_size": 4}, {"training__seed": 6}, {"validation__threshold": 0.3}):
        assert measured(drawn, **change) == before
    assert measured(drawn, loss__gamma_neg=2.0) == before
    moved = tmp_path / "moved" / "images"
    shutil.copytree(drawn, moved)
    (moved / "even").rename(moved / "zzz")  # other paths in another order
    assert measured(moved) == before


@pytest.mark.parametrize(
    ("metric", "change"),
    [
        ("val/mAP", {"data__val_fraction": 0.3}),
        ("val/mAP", {"data__background": [0, 0, 0]}),
        ("val/mAP", {"data__image_size": 64}),
        ("val/mAP", {"data__partial_images": True}),
        ("val/f1_macro", {"validation__threshold": 0.3}),
        ("val/loss", {"loss__gamma_neg": 2.0}),
    ],
)
def test_what_moves_the_score_changes_the_yardstick(drawn: Path, metric: str, change: dict[str, object]) -> None:
    by = {"checkpoint__best_metric": metric}
    assert measured(drawn, **by, **change) != measured(drawn, **by)


def test_other_images_or_tags_change_the_yardstick(drawn: Path, tmp_path: Path) -> None:
    before = measured(drawn)
    edited = tmp_path / "edited" / "images"
    shutil.copytree(drawn, edited)
    sidecar = held_out(edited).with_suffix(".json")
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "tags": ["circle", "sign"]}))
    assert measured(edited) != before
    fewer = tmp_path / "fewer" / "images"
    shutil.copytree(drawn, fewer)
    gone = held_out(fewer)
    gone.unlink()
    gone.with_suffix(".json").unlink()
    assert measured(fewer) != before
