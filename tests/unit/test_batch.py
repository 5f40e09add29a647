import pytest
import torch

from tagger.batch import Batch


def make_batch() -> Batch:
    return Batch(
        images=torch.arange(3 * 3 * 2 * 2, dtype=torch.uint8).reshape(3, 3, 2, 2),
        tag_indices=torch.tensor([0, 4, 2], dtype=torch.int32),
        tag_offsets=torch.tensor([0, 2, 2, 3], dtype=torch.int32),
        row_ids=torch.tensor([7, 8, 9]),
        valid_sizes=torch.tensor([[2, 2], [2, 1], [1, 2]], dtype=torch.int32),
        mirrored=torch.tensor([False, True, False]),
    )


def test_dense_targets_are_the_multi_hot_of_the_lists() -> None:
    expected = torch.tensor([[1, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0]], dtype=torch.float32)
    targets = make_batch().dense_targets(5)
    assert targets.dtype == torch.float32
    assert torch.equal(targets, expected)


def test_a_tag_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 0"):
        make_batch().dense_targets(4)


def test_tag_lists_are_read_image_by_image() -> None:
    assert make_batch().tag_lists() == ((0, 4), (), (2,))
    assert make_batch().tag_lists(2) == ((0, 4), ())
    assert make_batch().tag_lists(0) == ()


def test_moving_moves_every_tensor() -> None:
    batch = make_batch()
    moved = batch.to("meta")
    assert len(moved) == len(batch) == 3
    for name, tensor in vars(moved).items():
        assert tensor.device.type == "meta"
        assert tensor.shape == vars(batch)[name].shape
