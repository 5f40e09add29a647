"""Counted operations are those of the formula, for any phase, and cost no arithmetic."""

import json
from pathlib import Path

import pytest

from Configuration_System import load_config
from scripts import count_flops

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "configs" / "unified_config.yaml"
WIDTH, DEPTH, NUM_TAGS = 192, 2, 100
WORDS = ("model.preset=vit_tiny", f"model.depth={DEPTH}", "data.image_size=64")


def formula(num_tokens: int, num_patches: int) -> int:
    """Forward and backward, the latter twice as much: qkv, two products of attention, projection, MLP; stem; head."""
    block = 2 * num_tokens * 12 * WIDTH * WIDTH + 2 * 2 * num_tokens * num_tokens * WIDTH
    stem = 2 * num_patches * 3 * 16 * 16 * WIDTH
    # The stem's input is pixels, which need no gradient.
    return 3 * (DEPTH * block + 2 * WIDTH * NUM_TAGS) + 2 * stem


@pytest.mark.parametrize("image_size", [64, 32])
def test_counted_operations_are_those_of_the_formula(image_size: int) -> None:
    patches = (image_size // 16) ** 2
    config = load_config(DEMO, WORDS, environment={})
    counted = count_flops.flops_an_image(config, NUM_TAGS, image_size, 512, 0.0)
    # Positions of a smaller grid are worked out once a batch.
    assert counted == pytest.approx(formula(patches, patches), rel=1e-3)
    assert image_size != 64 or counted == formula(patches, patches)


def test_patch_dropout_saves_what_the_dropped_tokens_cost() -> None:
    config = load_config(DEMO, WORDS, environment={})
    assert count_flops.flops_an_image(config, NUM_TAGS, 64, 4, 0.5) == formula(8, 16)


def test_the_command_sums_up_phases_and_compares_with_a_run_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*WORDS, "training.num_epochs=3", "training.phases=[{image_size: 32, share: 0.75}, {image_size: 64}]"]
    sizes = ["--images", "1000", "--tags", str(NUM_TAGS), "--output", str(tmp_path / "flops.json")]
    assert count_flops.main(["--config", str(DEMO), *words, *sizes]) == 0
    found = json.loads((tmp_path / "flops.json").read_text(encoding="utf-8"))
    assert [(row["image_size"], row["batch_size"], row["images"]) for row in found["phases"]] == [
        (32, 256, 2250),
        (64, 64, 750),
    ]
    expected = 2250 * formula(4, 4) + 750 * formula(16, 16)
    assert found["flops"] == pytest.approx(expected, rel=1e-3)
    assert found["ratio"] == pytest.approx(expected / (3000 * formula(16, 16)), rel=1e-3)
    assert f"{found['ratio']:.3f} of a run at 64 px throughout" in capsys.readouterr().out
