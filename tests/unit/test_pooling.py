"""Pooling to cells: what a cell holds, whatever the token grid, the mask and the tokens left out."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from model_architecture import SimplifiedTagger, VisionTransformerConfig
from tagger.pooling import GridPooling, mean_pooling


def _tokens(rows: int, columns: int, batch: int = 2, width: int = 5) -> Tensor:
    return torch.randn(batch, rows * columns, width, generator=torch.Generator().manual_seed(rows * 31 + columns))


def test_a_cell_for_each_token_is_the_tokens_side_by_side() -> None:
    tokens = _tokens(3, 3)
    torch.testing.assert_close(GridPooling(3)(tokens, (3, 3)), tokens.flatten(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("grid", "side"), [((6, 6), 3), ((8, 4), 2), ((9, 3), 3), ((2, 2), 4)])
def test_where_one_divides_the_other_cells_are_those_of_adaptive_average_pooling(
    grid: tuple[int, int], side: int
) -> None:
    tokens = _tokens(*grid)
    maps = tokens.transpose(1, 2).reshape(2, 5, *grid)
    expected = F.adaptive_avg_pool2d(maps, side).flatten(2).transpose(1, 2).flatten(1)
    torch.testing.assert_close(GridPooling(side)(tokens, grid), expected)


@pytest.mark.parametrize("grid", [(1, 1), (2, 5), (4, 7), (14, 14)])
def test_cells_of_equal_area_average_to_the_mean_of_all_tokens(grid: tuple[int, int]) -> None:
    tokens = _tokens(*grid)
    cells = GridPooling(3)(tokens, grid).reshape(2, 9, 5)
    torch.testing.assert_close(cells.mean(1), mean_pooling(tokens, None))


def test_a_token_counts_in_a_cell_by_its_overlap() -> None:
    along_a_row = torch.tensor([0.0, 1.0, 2.0]).reshape(1, 3, 1)
    # Two cells over three tokens: each holds its own whole and half of the middle one.
    assert GridPooling(2)(along_a_row, (1, 3)).reshape(2, 2)[0].tolist() == pytest.approx([1 / 3, 5 / 3])


def test_masked_tokens_have_no_influence_and_a_cell_of_them_alone_is_the_mean_of_the_others() -> None:
    tokens, pooling = _tokens(4, 4), GridPooling(2)
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[:, 2:, 2:] = False  # the last cell
    mask[:, 0, 0] = False
    mask = mask.flatten(1)
    cells = pooling(tokens, (4, 4), mask).reshape(2, 4, 5)
    changed = torch.where(mask[:, :, None], tokens, torch.full_like(tokens, 100.0))
    torch.testing.assert_close(pooling(changed, (4, 4), mask).reshape(2, 4, 5), cells)
    torch.testing.assert_close(cells[:, 3], mean_pooling(tokens, mask))
    torch.testing.assert_close(cells[:, 0], tokens[:, [1, 4, 5]].mean(1))


def test_tokens_left_out_are_as_tokens_masked() -> None:
    tokens, pooling = _tokens(4, 4), GridPooling(2)
    kept = torch.tensor([[15, 0, 3, 7, 9], [1, 2, 4, 8, 10]])
    mask = torch.zeros(2, 16, dtype=torch.bool).scatter(1, kept, True)
    gathered = tokens.gather(1, kept[:, :, None].expand(-1, -1, 5))
    torch.testing.assert_close(pooling(gathered, (4, 4), kept=kept), pooling(tokens, (4, 4), mask))
    # Both at once: the first two of those kept are padding.
    counts = torch.tensor([False, False, True, True, True]).expand(2, -1)
    mask.scatter_(1, kept[:, :2], False)
    torch.testing.assert_close(pooling(gathered, (4, 4), counts, kept), pooling(tokens, (4, 4), mask))


def test_weights_made_under_inference_mode_serve_training_and_every_dtype() -> None:
    tokens, pooling = _tokens(4, 4), GridPooling(2)
    mask = torch.arange(16).expand(2, -1) > 3
    with torch.inference_mode():
        first = pooling(tokens, (4, 4), mask).clone()
    trained = tokens.clone().requires_grad_()
    pooled = pooling(trained, (4, 4), mask)
    pooled.sum().backward()
    assert torch.equal(pooled, first) and trained.grad is not None and (trained.grad[:, :4] == 0).all()
    assert pooling(tokens.bfloat16(), (4, 4), mask).dtype == torch.bfloat16
    torch.testing.assert_close(pooling(tokens.double(), (4, 4), mask).float(), first)


def test_features_stay_float32_under_autocast() -> None:
    tokens = _tokens(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(GridPooling(2)(tokens, (4, 4)), GridPooling(2)(tokens, (4, 4)).float())
        assert GridPooling(2)(tokens, (4, 4)).dtype == torch.float32


@pytest.mark.parametrize("tokens", [1, 5, 9, 14])
@pytest.mark.parametrize("side", [1, 3, 5, 7])
def test_a_cell_weighs_no_token_that_it_does_not_touch(tokens: int, side: int) -> None:
    (weights,) = GridPooling(side)._cell_weights((1, tokens))
    by_cell = weights.reshape(side, side, tokens)[0]
    for cell in range(side):
        touched = [t for t in range(tokens) if max(t * side, cell * tokens) < min((t + 1) * side, (cell + 1) * tokens)]
        assert by_cell[cell].nonzero().flatten().tolist() == touched
    torch.testing.assert_close(by_cell.sum(1), torch.ones(side, dtype=torch.float64))


def test_a_pass_without_values_leaves_nothing_behind() -> None:
    tokens, pooling = _tokens(4, 4), GridPooling(2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        pooling(torch.zeros(2, 16, 5), (4, 4))
    assert type(pooling(tokens, (4, 4))) is Tensor


def test_a_model_exports_with_any_height_and_batch() -> None:
    model = SimplifiedTagger(VisionTransformerConfig(32, 8, 16, 1, 2, 2.0, num_tags=3, pooling="grid")).eval()
    images = torch.randint(
        0, 256, (2, 3, 48, 32), dtype=torch.uint8
    )  # not the model's own size, which needs no resizing
    dynamic = {"images": {0: Dim("batch"), 2: 8 * Dim("rows", min=2, max=9)}}
    exported = torch.export.export(model, (images,), dynamic_shapes=dynamic).module()
    taller = torch.randint(0, 256, (3, 3, 64, 32), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(exported(taller), model(taller))


def test_one_cell_is_the_mean() -> None:
    tokens = _tokens(5, 3)
    torch.testing.assert_close(GridPooling(1)(tokens, (5, 3)), mean_pooling(tokens, None))


def test_head_dropout_acts_on_what_the_head_reads_and_in_training_alone() -> None:
    config = VisionTransformerConfig(32, 8, 16, 1, 2, 2.0, num_tags=3, pooling="grid", head_dropout=0.5)
    torch.manual_seed(0)
    model, images = SimplifiedTagger(config), torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    trained = model.train().forward_features(images)
    assert trained.shape == (2, 9 * 16) and model.head.weight.shape == (3, 9 * 16)
    assert 0.25 < (trained == 0).float().mean() < 0.75
    assert not (model.eval().forward_features(images) == 0).any()
