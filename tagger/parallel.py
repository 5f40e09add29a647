"""How the ranks of a run share an update: gradients averaged over whole copies (DDP) or over parts (FSDP2).

Every rank sees its share of the images of a window. The gradient is that of all of them together, each image weighing
the same, so that several ranks train as one does with the same images. Which updates are left out is decided from sums
over all ranks, on the device, so that all ranks do the same without a host waiting. Refuses optimizers that need whole
matrices, and several members, where weights are sharded.

Batch norm (a convolutional stem): on CUDA its statistics are of all ranks' images (SyncBatchNorm). On a CPU torch has
no such thing: each rank normalises by its own batch, and the running statistics are averaged after each update.
"""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from tagger.batch import Batch
from tagger.distributed import Ranks
from tagger.errors import InputError, PeerFailedError

logger = logging.getLogger(__name__)

ParallelMode = Literal["ddp", "fsdp"]
SHARDABLE_OPTIMIZERS = ("adamw",)


def require_shardable(mode: ParallelMode, ranks: Ranks, optimizer: str, num_members: int = 1) -> None:
    """Raise InputError, where the weights are sharded, for what cannot work on parts of them."""
    if mode != "fsdp" or ranks.alone:
        return
    if num_members > 1:
        raise InputError(
            f"model.num_members={num_members} is for networks that fit a device, training.parallel=fsdp for one that "
            "does not; use training.parallel=ddp, or model.num_members=1"
        )
    if optimizer not in SHARDABLE_OPTIMIZERS:
        raise InputError(
            f"optimizer.name={optimizer} needs whole matrices and training.parallel=fsdp gives each rank a part of "
            "them; use training.parallel=ddp, or optimizer.name=adamw"
        )


def synchronise_norms(model: nn.Module, ranks: Ranks, device: torch.device) -> None:
    """Make batch norms work over the images of all ranks, in place, where that is possible; says so where it is not."""
    if ranks.alone or not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return
    logger.warning(
        "batch norm on a CPU: each of the %d ranks normalises by its own batch, so that this trains a little "
        "differently from one rank with all the images; model.stem=patch has no batch norm",
        ranks.world_size,
    )


class Parallel:
    """The objective of a run as its ranks compute it together. All ranks make the same calls in the same order.

    `objective` is what a step calls. `sharded` says that no rank has the whole state.
    """

    def __init__(self, objective: nn.Module, model: nn.Module, ranks: Ranks, mode: ParallelMode) -> None:
        """`model`, on its device, is the network inside `objective`; with "fsdp" its parameters are cut in place."""
        self.ranks = ranks
        self.sharded = mode == "fsdp" and not ranks.alone
        self.objective = objective
        self._model = model
        if self.sharded:
            _shard(model)
        elif not ranks.alone:
            # A gradient that a channels-last 1x1 convolution gives has other strides than its weight, which says the
            # same of the memory; DDP, which compares strides, would warn and copy.
            for parameter in objective.parameters():
                if parameter.ndim == 4 and parameter.shape[2:] == (1, 1) and parameter.requires_grad:
                    parameter.register_hook(  # type: ignore[no-untyped-call]
                        lambda gradient: gradient.flatten().view(gradient.shape)
                    )
            # Buffers are the same on all ranks between updates by what `settle_buffers` does. No static_graph=True: it
            # needs the very first backward pass to exchange gradients (torch 2.13 asserts otherwise), and a window
            # begins with `no_sync`. An exchange there alone would round the first window after a resume differently,
            # which then would not be exact.
            with warnings.catch_warnings():
                # The newer name of the first option is not in every torch that this runs with.
                warnings.simplefilter("ignore", FutureWarning)
                self.objective = DistributedDataParallel(
                    objective, broadcast_buffers=False, gradient_as_bucket_view=True
                )
        self._statistics = [
            statistic
            for module in model.modules()
            if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm) and not ranks.alone
            for statistic in (module.running_mean, module.running_var)
            if statistic is not None
        ]

    def batch(self, *, is_last: bool) -> contextlib.AbstractContextManager[object]:
        """Context of forward and backward of one batch of a window: gradients are exchanged with the last one only."""
        if isinstance(self.objective, DistributedDataParallel):
            return contextlib.nullcontext() if is_last else self.objective.no_sync()
        if self.sharded:
            model = cast(Any, self._model)
            model.set_requires_gradient_sync(is_last)
            model.set_is_last_backward(is_last)
        return contextlib.nullcontext()

    def begin_window(self, seed: int, step: int, num_images: int, device: torch.device) -> Tensor | int:
        """Before the first batch: what to divide this rank's summed losses by, so that all images weigh the same.

        `num_images` of this rank's window. Gradients are averaged over the ranks: with several it is the mean number of
        images, a float32 scalar on the device.
        """
        if self.ranks.alone:
            return num_images
        self.ranks.reseed(seed, step)
        count = torch.full((), float(num_images), device=device)
        dist.all_reduce(count)
        return count / self.ranks.world_size

    def add_up(self, value: Tensor) -> None:
        """Replace a scalar by its sum over all ranks, on the device; NaN on any is NaN on all."""
        if not self.ranks.alone:
            dist.all_reduce(value)

    def can_save_after(self, error: Exception) -> bool:
        """Whether this rank alone can still save its last step boundary after an error."""
        if self.ranks.alone:
            return True
        # A CUDA device may be waiting for gradients of a rank that is gone.
        lost_on_device = isinstance(error, PeerFailedError) and dist.get_backend() != "gloo"
        return not self.sharded and not lost_on_device

    @contextlib.contextmanager
    def forward_only(self) -> Iterator[None]:
        """Around forward passes without a backward one: what a sharded model gathers for each is let go after it.

        Else the next one would not see weights that were exchanged in between.
        """
        if not self.sharded:
            yield
            return
        letting_go = self._model.register_forward_hook(lambda model, _, __: cast(Any, model).reshard())
        try:
            yield
        finally:
            letting_go.remove()

    def validation_feed(
        self, loader: Iterable[tuple[Batch, Any]], stop: Callable[[], bool], image_size: int
    ) -> "ValidationFeed":
        """The batches to score on this rank, and when to stop."""
        return ValidationFeed(loader, stop, image_size, self.ranks, together=self.sharded)

    @torch.no_grad()
    def settle_buffers(self) -> None:
        """After an update: running statistics that ranks keep by themselves become their mean, the same on all."""
        if self._statistics:
            joined = torch.cat(self._statistics)
            dist.all_reduce(joined)
            joined /= self.ranks.world_size
            parts = torch.split(joined, [len(statistic) for statistic in self._statistics])
            torch._foreach_copy_(self._statistics, list(parts))


class ValidationFeed:
    """A rank's batches of an evaluation. Ranks with a sharded model go forward together or not at all.

    Their shares may differ by a batch, and broken images may take one away: a rank that has run out goes on with empty
    batches until all have. `stop()` is what was agreed then. With whole models each rank goes on by itself, and hears
    within a second that another was asked to stop.
    """

    def __init__(
        self,
        loader: Iterable[tuple[Batch, Any]],
        stop: Callable[[], bool],
        image_size: int,
        ranks: Ranks,
        *,
        together: bool,
    ) -> None:
        self._loader, self._ask, self._ranks, self._together = loader, stop, ranks, together
        self._filler = (Batch.empty(image_size), None)
        self._stopped = False

    def stop(self) -> bool:
        """Whether to leave the evaluation before the next batch."""
        return self._stopped if self._together else self._ranks.heard_stop(self._ask())

    def __iter__(self) -> Iterator[tuple[Batch, Any]]:
        if not self._together:
            yield from self._loader
            return
        batches = iter(self._loader)
        while True:
            found = next(batches, None)
            agreed = self._ranks.agree(int(found is not None), int(self._ask()), False)
            self._stopped = agreed.stop > 0
            if not agreed.num_images:
                return
            yield found or self._filler


def _shard(model: nn.Module) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # No MixedPrecisionPolicy(param_dtype=torch.bfloat16), which would halve what is gathered under autocast: it casts
    # all parameters of a block, and norms and layer scales, which autocast leaves in float32, would have 8 bits.
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.get_submodule("blocks").children():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # The objective may call it in the place of `forward`; the head's weights stay gathered until the backward pass.
    register_fsdp_forward_method(model, "forward_features")
