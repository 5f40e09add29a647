"""Images blended in pairs: the shares of a batch, and the loss of the blends."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from loss_functions import AsymmetricFocalLoss, BinaryCrossEntropy, MultiTaskLoss
from tagger.data.augment import BatchAugment, Op
from tagger.errors import InputError
from tagger.objective import TrainingObjective

TAGS = 11


class Network(nn.Module):
    """Logits, and features with a head, that differ from image to image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(3 * 4 * 4, 8), nn.Linear(8, TAGS)

    def forward_features(self, images: Tensor, sizes: Tensor) -> Tensor:
        self.seen = (images, sizes)
        features: Tensor = self.body(images.flatten(1).float() / 255).tanh()
        return features

    def forward(self, images: Tensor, sizes: Tensor) -> Tensor:
        logits: Tensor = self.head(self.forward_features(images, sizes))
        return logits


def keys(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.uint64)


def batch(size: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Images, sizes, flat tags with their offsets, and the same tags multi-hot."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (size, 3, 4, 4), dtype=torch.uint8, generator=generator)
    dense = (torch.rand(size, TAGS, generator=generator) < 0.3).double()
    offsets = torch.cat([torch.zeros(1), dense.sum(1).cumsum(0)]).int()
    sizes = torch.tensor([[4, 2 + row % 3] for row in range(size)], dtype=torch.int32)
    return images, sizes, dense.nonzero()[:, 1].int(), offsets, dense


@pytest.mark.parametrize("chunk_tags", [None, 4])
@pytest.mark.parametrize("criterion", [BinaryCrossEntropy(), AsymmetricFocalLoss(), "ratings"])
def test_the_loss_is_that_of_blended_targets(criterion: nn.Module | str, chunk_tags: int | None) -> None:
    loss = MultiTaskLoss(AsymmetricFocalLoss(), [8, 9, 10], 0.5) if isinstance(criterion, str) else criterion
    images, sizes, indices, offsets, dense = batch()
    network = Network()
    objective = TrainingObjective(network, loss, chunk_tags)
    share = 0.7137  # no blend lies half-way between two values
    found = objective(images, sizes, indices, offsets, share)

    blended = (share * images.double() + (1 - share) * images.roll(1, 0).double()).round()
    assert torch.equal(network.seen[0].double(), blended)
    assert torch.equal(network.seen[1], torch.maximum(sizes, sizes.roll(1, 0)))
    logits = network(network.seen[0], sizes).double()
    if isinstance(criterion, str):  # the share of a rating is of the row's own ratings
        expected = share * loss(logits, dense) + (1 - share) * loss(logits, dense.roll(1, 0))
    else:
        expected = loss(logits, share * dense + (1 - share) * dense.roll(1, 0))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    found.backward()
    (wanted,) = torch.autograd.grad(expected, [network.head.weight])
    assert network.head.weight.grad is not None
    torch.testing.assert_close(network.head.weight.grad, wanted, rtol=1e-4, atol=1e-5)


def test_a_whole_share_changes_nothing() -> None:
    images, sizes, indices, offsets, _ = batch()
    objective = TrainingObjective(Network(), BinaryCrossEntropy())
    assert torch.equal(objective(images, sizes, indices, offsets), objective(images, sizes, indices, offsets, 1.0))
    assert objective.model.seen[0] is images


def test_one_image_blends_with_itself() -> None:
    images, sizes, indices, offsets, _ = batch(1)
    objective = TrainingObjective(Network(), BinaryCrossEntropy())
    torch.testing.assert_close(
        objective(images, sizes, indices, offsets, 0.3), objective(images, sizes, indices, offsets)
    )


def test_shares_follow_the_keys_and_their_distribution() -> None:
    augment = BatchAugment(mixup=Op(0.75, 1.0))
    shares = [augment.own_share(keys(number, 7)) for number in range(2000)]
    assert shares == [augment.own_share(keys(number, 7)) for number in range(2000)]
    acting = np.array([share for share in shares if share < 1.0])
    assert len(acting) / len(shares) == pytest.approx(0.75, abs=0.04)
    assert np.quantile(acting, [0.1, 0.5, 0.9]) == pytest.approx([0.1, 0.5, 0.9], abs=0.04)
    near_half = [BatchAugment(mixup=Op(1, 50.0)).own_share(keys(number)) for number in range(300)]
    assert np.std(near_half) == pytest.approx(0.05, abs=0.01)


def test_off_means_whole_shares() -> None:
    for mixup in (None, Op(0.0, 1.0), Op(1.0, 0.0)):
        assert BatchAugment(mixup=mixup).own_share(keys(1, 2)) == 1.0


def test_mixup_alone_leaves_the_images_to_the_objective() -> None:
    images = batch()[0]
    assert BatchAugment(mixup=Op(1, 1.0))(images, keys(*range(5))) is images


def test_a_strength_without_meaning_is_refused() -> None:
    with pytest.raises(InputError, match=r"augment\.mixup\.strength=1000\.0 is above 100 .* 1 is usual"):
        BatchAugment(mixup=Op(1, 1000.0))
