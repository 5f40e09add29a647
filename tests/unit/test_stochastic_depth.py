"""Stochastic depth: what is drawn, what it multiplies, and that blocks of all rates share their compiled graphs."""

import collections
import typing

import pytest
import torch

from model_architecture import SimplifiedTagger, TransformerBlock, VisionTransformerConfig
from tagger.layers import StochasticDepth


def small(**changes: typing.Any) -> VisionTransformerConfig:
    sizes = {"image_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 4, "mlp_ratio": 2.0, "num_tags": 7}
    return VisionTransformerConfig(**{**sizes, **changes})


def test_drop_path_keeps_the_mean_and_drops_whole_samples() -> None:
    torch.manual_seed(0)
    factors = StochasticDepth(0.4, 3)(torch.ones(20_000, 2, 16))
    assert [set(each.unique().tolist()) for each in factors] == [
        {1.0},
        {0.0, torch.tensor(1 / 0.8).item()},
        {0.0, torch.tensor(1 / 0.6).item()},
    ]
    for each in factors:
        assert each.shape == (2, 20_000, 1, 1)
        assert (each.mean(1) - 1.0).abs().max() < 0.03  # standard error 0.006
    assert not torch.equal(factors[2][0], factors[2][1]) and not torch.equal(factors[1] > 0, factors[2] > 0)


def test_factors_are_of_what_attention_and_mlp_add() -> None:
    torch.manual_seed(0)
    block, tokens = TransformerBlock(16, 2).eval(), torch.randn(4, 3, 16)
    factors = torch.tensor([[0.0, 2.0, 0.0, 1.0], [0.0, 0.0, 2.0, 1.0]]).reshape(2, 4, 1, 1)
    with torch.no_grad():
        added = block.attn(block.norm1(tokens), None)
        mixed, plain = block(tokens, None, None, factors), block(tokens)
        assert torch.equal(mixed[0], tokens[0])
        torch.testing.assert_close(mixed[1], tokens[1] + 2 * added[1])
        torch.testing.assert_close(mixed[2], tokens[2] + 2 * block.mlp(block.norm2(tokens))[2])
        torch.testing.assert_close(mixed[3], plain[3])


def test_drop_path_grows_with_depth() -> None:
    model = SimplifiedTagger(small(depth=5, drop_path=0.2))
    assert (1 - model.drop_path.keep.flatten()).tolist() == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2], abs=1e-6)
    assert SimplifiedTagger(small(depth=1, drop_path=0.2)).drop_path.keep.item() == 1.0
    assert not any("drop_path" in name for name in model.state_dict())


def test_all_blocks_are_one_graph_for_each_count_of_tokens() -> None:
    torch.manual_seed(0)
    model = SimplifiedTagger(small(depth=4, drop_path=0.3, layer_scale_init=0.1)).train()
    torch._dynamo.reset()
    seen = collections.Counter[str]()

    def count(graph: torch.fx.GraphModule, _: object) -> typing.Any:
        seen["graphs"] += 1
        return graph.forward

    for block in model.blocks:
        block.compile(backend=count, fullgraph=True, dynamic=False)
    for height, width in ((32, 32), (24, 40), (16, 32), (32, 32), (16, 32)):
        model(torch.zeros(3, 3, height, width, dtype=torch.uint8)).sum().backward()
    assert seen["graphs"] == 3  # 16, 15 and 8 tokens
