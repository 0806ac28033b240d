"""The engine protocol: what the training loop asks of an engine, and what all engines share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from keel_megatron.checkpoint.state import Trained
from keel_megatron.data.batches import Batch
from keel_megatron.depth.collector import Profiled
from keel_megatron.model.documents import Documents
from keel_megatron.runtime.distributed import Runtime


@dataclass(frozen=True)
class StepResult:
    """Loss and gradient norm of one optimizer step, the same on every rank."""

    loss: float
    """Mean cross entropy of the global batch's tokens that count, in nats per token."""
    grad_norm: float
    """Global gradient norm before clipping, whether anything is clipped or not."""
    stop: bool = False
    """Whether any rank's `stop` was true in this step."""

    @property
    def finite(self) -> bool:
        """Whether both are finite; otherwise the update is never made."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class DepthObserver(Protocol):
    """What observes a step (`depth.collector.DepthCollector`)."""

    def watching(self) -> AbstractContextManager[None]:
        """Around the passes."""

    def before_update(self) -> None:
        """Called when the gradients are averaged."""

    def after_update(self) -> None:
        """Called when the weights are updated."""


class Engine(Profiled, Protocol):
    """Trains the model; all that loop, guard, checkpoints and depth profiles use."""

    @property
    def state(self) -> Trained:
        """The weights and the optimizer's state, for checkpoints."""

    def train_step(
        self,
        micro_batches: Iterable[Batch],
        count: int,
        learning_rate: float,
        accept: Callable[[StepResult], bool] = ...,
        depth: DepthObserver | None = ...,
        stop: Callable[[], bool] = ...,
    ) -> StepResult:
        """Forward, backward and update on this replica's `count` micro-batches.

        The update is made, and the optimizer's state changes, only if the result of the passes is
        finite and `accept` returns true for it, which must be the same on every rank. `depth`
        observes the step, if it is given. `stop` is asked once, and its answer travels with the
        loss: a step's results are one all-reduce, and the host waits for the device once.
        """

    def validate(self, micro_batches: Iterable[Batch], count: int) -> float:
        """Mean cross entropy in nats per token over `count` micro-batches a replica."""

    def token_losses(self, micro_batches: Iterable[Batch], count: int) -> list[Tensor]:
        """Cross entropy of every label of `count` micro-batches of this replica, as in validation.

        An interleaved schedule needs a multiple of its stages.

        Returns:
            For each micro-batch [b, s] nats, fp32, on the device; the same on each tensor rank.
            Empty on all but the last pipeline stage.
        """


def owns(parameter: nn.Parameter, runtime: Runtime) -> bool:
    """Whether this tensor rank owns its values of the parameter in sums over all ranks.

    Norm weights are whole on every tensor rank; rank 0 owns them.
    """
    return getattr(parameter, "tensor_model_parallel", False) or runtime.tensor_rank == 0


def forward(model: Any, batch: Batch) -> Tensor:
    """The output of a chunk for a micro-batch: the losses of its tokens [b, s] on the last one."""
    documents = None
    if batch.documents is not None:
        documents = Documents(batch.documents, batch.borders, batch.longest)
    output: Tensor = model(
        batch.tokens,
        batch.position_ids,
        None,
        labels=batch.labels,
        documents=documents,
        sequences=batch.sequences,
    )
    return output


def mean_loss(losses: Tensor, loss_mask: Tensor | None, counted: Tensor | None) -> Tensor:
    """What a micro-batch contributes to the step's mean loss, times their number.

    Args:
        losses: of the tokens, [b, s].
        loss_mask: 1 where the token counts; None: everywhere.
        counted: tokens that count in an average micro-batch of the step (`mean_counted`).
    """
    if loss_mask is None:
        return losses.sum() / losses.numel()
    assert counted is not None
    return (losses * loss_mask).sum() / counted


def mean_counted(batches: list[Batch], replicas: dist.ProcessGroup) -> Tensor | None:
    """The tokens that count in an average micro-batch of a step, fp32; None: all of them.

    Each contribution is divided by this number and not by the micro-batch's own, so that the loss
    and its gradient are the mean over the global batch's counted tokens, however it is cut into
    micro-batches. Collective where there are masks; the host does not wait for it.

    Args:
        batches: this replica's micro-batches, on the device.
        replicas: the group of the replicas.
    """
    masks = [batch.loss_mask for batch in batches if batch.loss_mask is not None]
    if not masks:
        return None
    total = torch.stack([mask.sum(dtype=torch.float64) for mask in masks]).sum()
    if replicas.size() > 1:
        dist.all_reduce(total, group=replicas)
    return (total / (len(masks) * replicas.size())).float()
