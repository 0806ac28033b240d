"""The engine protocol: what the training loop asks of an engine, and what all engines share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from keel_megatron.checkpoint.state import Trained
from keel_megatron.data.batches import Batch
from keel_megatron.depth.collector import Profiled
from keel_megatron.runtime.distributed import Runtime


@dataclass(frozen=True)
class StepResult:
    """Loss and gradient norm of one optimizer step, the same on every rank."""

    loss: float
    """Mean cross entropy of the global batch, in nats per token."""
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


def owns(parameter: nn.Parameter, runtime: Runtime) -> bool:
    """Whether this tensor rank owns its values of the parameter in sums over all ranks.

    Norm weights are whole on every tensor rank; rank 0 owns them.
    """
    return getattr(parameter, "tensor_model_parallel", False) or runtime.tensor_rank == 0


def mean_loss(losses: Tensor, loss_mask: Tensor | None) -> Tensor:
    """Mean of the token losses [b, s], under the mask if there is one."""
    if loss_mask is None:
        return losses.sum() / losses.numel()
    return (losses * loss_mask).sum() / loss_mask.sum()
