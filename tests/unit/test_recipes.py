"""The recipes for GPUs can be trained as they stand, and what their headers compute is what the formulas say."""

from pathlib import Path

import pytest
import torch

from Configuration_System import FullConfig, load_config
from loss_functions import create_loss
from model_architecture import TaggerModel, create_model
from scripts.gpu_bench.flops import training_flops
from tagger.preprocess import Preprocess
from training_phases import resized_batch, resolve_phases
from training_utils import create_optimizer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GUIDE = CONFIGS.parent / "docs" / "training-fast.md"
RECIPES = ("vit_s_224", "vit_b_448", "vit_l_448", "finetune")
NUM_TAGS = 20_000
# Half of a dense bfloat16 product measured on an H200.
FLOPS = 0.5 * 790e12
# What 16-bit training keeps for the backward pass, and float32 weights, gradients, two moments and their average.
BYTES_A_TOKEN_CHANNEL_AND_BLOCK = 30
BYTES_A_PARAMETER = 20


def recipe(name: str) -> tuple[FullConfig, list[str]]:
    """A recipe and the lines of its header."""
    path = CONFIGS / f"{name}.yaml"
    lines = path.read_text(encoding="utf-8").splitlines()
    return load_config(path, environment={}), [line for line in lines if line.startswith("#")]


def model_of(config: FullConfig) -> TaggerModel:
    with torch.device("meta"):
        return create_model(config.model, num_tags=NUM_TAGS, image_size=config.data.image_size)


@pytest.mark.parametrize("name", RECIPES)
def test_it_builds_its_model_loss_optimizer_and_phases(name: str) -> None:
    config, _ = recipe(name)
    model = model_of(config)
    optimizer = create_optimizer(config.optimizer, model)
    moved = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    assert moved == model.num_parameters()
    create_loss(config.loss)
    phases = resolve_phases(config)
    assert phases[-1].image_size == config.data.image_size
    for phase in phases:
        assert Preprocess.create(phase.image_size, config.data.fit, model.config.patch_size).useful_share() > 0.96


@pytest.mark.parametrize("name", RECIPES)
def test_its_header_has_the_command_and_what_can_be_computed(name: str) -> None:
    config, header = recipe(name)
    model = model_of(config)
    text = "\n".join(header)
    assert f"--config configs/{name}.yaml" in text and "Expected score: not known" in text
    for size in {phase.image_size for phase in resolve_phases(config)}:
        rate = FLOPS / training_flops(model.config, size, size)
        assert f"{size} px {round(rate, -1 if rate > 10_000 else 0):,.0f} images/s" in text
    channels = model.config.embed_dim * model.config.depth
    kept = max(
        phase.batch_size * (phase.image_size // model.config.patch_size) ** 2 for phase in resolve_phases(config)
    )
    total = kept * channels * BYTES_A_TOKEN_CHANNEL_AND_BLOCK + BYTES_A_PARAMETER * model.num_parameters()
    assert f"{total / 1e9:.0f} GB (computed)" in text


def test_fine_tuning_goes_on_with_the_model_of_the_recipe_it_names() -> None:
    finetune, base = recipe("finetune")[0], recipe("vit_b_448")[0]
    assert finetune.model == base.model and finetune.data.image_size == base.data.image_size
    config, model = finetune.optimizer, model_of(finetune)
    rates = {round(group["lr"], 12) for group in create_optimizer(config, model).param_groups}
    assert max(rates) == config.learning_rate and len(rates) > model.config.depth


@pytest.mark.parametrize("name", RECIPES)
def test_the_table_of_recipes_has_what_a_million_images_take(name: str) -> None:
    config, header = recipe(name)
    model = model_of(config)
    phases = resolve_phases(config)
    flops = sum(phase.share * training_flops(model.config, phase.image_size, phase.image_size) for phase in phases)
    (row,) = [
        line
        for line in GUIDE.read_text(encoding="utf-8").splitlines()
        if line.startswith("|") and f"`configs/{name}.yaml`" in line
    ]
    assert row.endswith(f"| {1e6 * flops / FLOPS / 3600:.2f} |")
    memory = next(line for line in header if "GB (computed)" in line).split(" GB")[0].split()[-1]
    assert f"| {memory} GB |" in row


def test_batches_that_follow_the_image_size_are_multiples_of_eight() -> None:
    for name in RECIPES:
        assert all(phase.batch_size % 8 == 0 for phase in resolve_phases(recipe(name)[0]))
    assert [phase.batch_size for phase in resolve_phases(recipe("vit_l_448")[0])] == [256, 120, 96]


@pytest.mark.parametrize(
    ("own", "image_size", "expected"),
    [(96, 448, 120), (100, 512, 100), (100, 511, 100), (2, 224, 10), (3, 224, 15), (4, 224, 16), (5, 224, 24)],
)
def test_a_batch_never_shrinks_with_its_images(own: int, image_size: int, expected: int) -> None:
    config = load_config(CONFIGS / "vit_l_448.yaml", [f"training.batch_size={own}"], environment={})
    assert resized_batch(config, image_size) == expected


def test_phases_of_the_large_recipes_cost_less_than_six_tenths() -> None:
    for name in ("vit_b_448", "vit_l_448"):
        config, _ = recipe(name)
        model = model_of(config)
        flops = {
            phase.image_size: training_flops(model.config, phase.image_size, phase.image_size)
            for phase in resolve_phases(config)
        }
        spent = sum(phase.share * flops[phase.image_size] for phase in resolve_phases(config))
        assert spent <= 0.6 * flops[448]
