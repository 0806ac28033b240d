"""The Megatron engine: Megatron-core's pipeline schedules, DDP and distributed optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from keel_megatron.architecture.residual import streams
from keel_megatron.checkpoint.megatron_state import MegatronState
from keel_megatron.checkpoint.parameters import MASTER
from keel_megatron.compat import clipping
from keel_megatron.config.run import RunConfig
from keel_megatron.data.batches import Batch
from keel_megatron.engines.base import (
    DepthObserver,
    StepResult,
    forward,
    mean_counted,
    mean_loss,
    owns,
)
from keel_megatron.engines.megatron.muon.optimizer import build_muon
from keel_megatron.engines.megatron.optimizer import (
    build_optimizer,
    set_learning_rate,
    wrap_data_parallel,
)
from keel_megatron.engines.megatron.overlap import (
    ParameterGather,
    overlaps_grad_reduce,
    overlaps_param_gather,
)
from keel_megatron.runtime.distributed import Runtime

_Reduce = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A chunk's output to what is differentiated and what is reported."""
_ForwardStep = Callable[[Iterator[Batch], Any], tuple[Tensor, _Reduce]]
"""What a schedule calls for one micro-batch on one chunk."""


class MegatronEngine:
    """Megatron-core's schedules (none, 1F1B, interleaved 1F1B), DDP and optimizer.

    Args:
        config: the run.
        runtime: this rank's place.
        chunks: this rank's model chunks, as built by `model.language_model.build_model`.
    """

    def __init__(self, config: RunConfig, runtime: Runtime, chunks: list[nn.Module]) -> None:
        self.config = config
        self.runtime = runtime
        self.chunks = chunks
        self._muon = build_muon(config, chunks, runtime)
        with nullcontext() if self._muon is None else self._muon.left_out():
            self.model = wrap_data_parallel(config, chunks, runtime)
            self.optimizer = build_optimizer(config, self.model, runtime)
        self._gather: ParameterGather | None = None
        if overlaps_param_gather(config, runtime):
            self._gather = ParameterGather(self.model, whole=config.kernels.cuda_graphs)
        self._state = MegatronState(chunks, self.optimizer, self._muon)
        self._schedule: Callable[..., list[Tensor]] = get_forward_backward_func()
        megatron_config: Any = chunks[0].config
        megatron_config.grad_scale_func = self.optimizer.scale_loss
        megatron_config.finalize_model_grads_func = self._finalize
        if overlaps_grad_reduce(config, runtime):
            syncs = [chunk.no_sync for chunk in self.model]
            megatron_config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]

    @property
    def state(self) -> MegatronState:
        """As `Engine.state`; collective where updated weights are still being gathered."""
        if self._gather is not None:
            self._gather.finish()
        return self._state

    def train_step(
        self,
        micro_batches: Iterable[Batch],
        count: int,
        learning_rate: float,
        accept: Callable[[StepResult], bool] = lambda _result: True,
        depth: DepthObserver | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> StepResult:
        """As `Engine.train_step`."""
        for chunk in self.model:
            if not chunk.training:  # it walks through all modules
                chunk.train()
        self._zero_grad()
        with nullcontext() if depth is None else depth.watching():
            loss = self._run(micro_batches, count, forward_only=False)
        if depth is not None:
            depth.before_update()
        self.optimizer.prepare_grads()
        result = self._result(loss, count, stop())
        if accept(result) and result.finite:
            self._update(result.grad_norm, learning_rate)
        if depth is not None:
            depth.after_update()
        return result

    def update(self, learning_rate: float) -> None:
        """What a step does beside its passes, with the gradients that are there; to measure it."""
        self._finalize(self.model)
        self.optimizer.prepare_grads()
        nothing = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        self._update(self._result(nothing, 1, stop=False).grad_norm, learning_rate)
        self._zero_grad()

    def _zero_grad(self) -> None:
        """Start the sums of a step's gradients."""
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        if self._muon is not None:
            self._muon.zero_grad()

    def _finalize(self, *args: Any, **kwargs: Any) -> None:
        """What a schedule calls after its passes: average the gradients over the replicas."""
        finalize_model_grads(*args, **kwargs)
        if self._muon is not None:
            self._muon.reduce()

    def _update(self, grad_norm: float, learning_rate: float) -> None:
        """Clip and step: the second half of Megatron-core's `optimizer.step`, in its own calls."""
        set_learning_rate(self.optimizer, self.config, learning_rate)
        self._state.before_update()
        limit = self.config.optimizer.clip_grad
        if limit > 0.0:
            for inner in self.optimizer.chained_optimizers:
                if parameters := inner.get_parameters():
                    clip_grad_by_total_norm_fp32(parameters, limit, grad_norm)
        self.optimizer.step_with_ready_grads()
        if self._muon is not None:
            if limit > 0.0:
                self._muon.clip(limit, grad_norm)
            self._muon.step(learning_rate)
        if self._gather is not None:
            self._gather.start()

    @torch.no_grad()
    def validate(self, micro_batches: Iterable[Batch], count: int) -> float:
        """Mean cross entropy in nats per token over `count` micro-batches a replica."""
        for chunk in self.model:
            chunk.eval()
        total = self._run(micro_batches, count, forward_only=True)
        dist.all_reduce(total)
        return float(total) / (count * self.runtime.data_size)

    @torch.no_grad()
    def token_losses(self, micro_batches: Iterable[Batch], count: int) -> list[Tensor]:
        """As `Engine.token_losses`."""
        for chunk in self.model:
            chunk.eval()
        batches = [batch.to(self.runtime.device) for batch in micro_batches]
        return self._scheduled(_token_losses, batches, count, forward_only=True)

    def own_gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """As `Engine.own_gradient`.

        After `finalize_model_grads` of megatron-core 0.16.1 `main_grad` is fp32 and averaged over
        the replicas: everywhere without the distributed optimizer (replica 0 owns it), but with it
        only in the shard of the buffer that the rank's optimizer owns, because gradients are
        reduce-scattered and the rest of the buffer keeps the replica's own. Shards may end
        within a parameter. Of Muon's matrices one replica has the whole averaged gradient.
        """
        own = self._own(parameter) if owns(parameter, self.runtime) else None
        return None if own is None else parameter.main_grad.view(-1)[own]  # type: ignore[attr-defined]

    def own_weight(self, parameter: nn.Parameter) -> Tensor:
        """As `Engine.own_weight`."""
        own = self._own(parameter)
        assert own is not None
        if self._muon is not None and parameter in self._muon:
            return self._muon.states(parameter)[MASTER]
        main: Tensor | None = getattr(parameter, "main_param", None)
        if main is None:
            return parameter.detach().view(-1)[own]
        sharded = getattr(parameter, "main_param_sharded", False)
        return main.detach().view(-1) if sharded else main.detach().view(-1)[own]

    def _own(self, parameter: nn.Parameter) -> slice | None:
        """Elements of the flat parameter whose reduced gradient this rank owns; None if none."""
        if self._state.shards.is_replicated(parameter):
            return slice(None) if self.runtime.data_rank == 0 else None
        return self._state.shards.owned(parameter)

    @torch.no_grad()
    def _result(self, loss: Tensor, count: int, stop: bool) -> StepResult:
        """The step's result on every rank: one all-reduce, and the step's only host wait."""
        sums = torch.zeros(3, dtype=torch.float64, device=self.runtime.device)
        sums[0] = loss
        # With the distributed optimizer every rank has gradients of its own; without, every
        # replica has the same.
        if self.config.parallel.distributed_optimizer or self.runtime.data_rank == 0:
            sums[1] = self._squared_norm()
        if self._muon is not None:
            sums[1] += self._muon.squared_norm()
        sums[2].fill_(stop)
        dist.all_reduce(sums)
        total, squared, asked = sums.tolist()
        # In fp32, as Megatron-core adds up the ranks' squares.
        grad_norm = float(np.float32(squared)) ** 0.5
        return StepResult(total / (count * self.runtime.data_size), grad_norm, asked > 0)

    def _squared_norm(self) -> Tensor:
        """Square of the norm of the gradients that Megatron-core's optimizers hold, fp32."""
        gradients = [
            gradient
            for inner in self.optimizer.chained_optimizers
            for gradient in clipping.gradients_for_norm(inner)
        ]
        return nn.utils.get_total_norm(gradients, foreach=True).float() ** 2

    def _run(self, micro_batches: Iterable[Batch], count: int, *, forward_only: bool) -> Tensor:
        """Run the schedule; the sum of the losses that this rank speaks for, fp64."""
        batches = [batch.to(self.runtime.device) for batch in micro_batches]
        counted = mean_counted(batches, parallel_state.get_data_parallel_group())
        losses = self._scheduled(
            partial(_forward_step, counted), batches, count, forward_only=forward_only
        )
        # Only the last stage has losses, and each of its tensor ranks has the same.
        if losses and self.runtime.tensor_rank == 0:
            return torch.stack(losses).double().sum()
        return torch.zeros((), dtype=torch.float64, device=self.runtime.device)

    def _scheduled(
        self, forward_step: _ForwardStep, batches: list[Batch], count: int, *, forward_only: bool
    ) -> list[Tensor]:
        """Run the schedule; what the last stage reports of each micro-batch, empty elsewhere."""
        # Every chunk of this stage walks the same micro-batches at its own pace.
        iterators = [iter(batches) for _ in self.model]
        return self._schedule(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.model,
            num_microbatches=count,
            seq_length=self.config.data.seq_length,
            # Of the messages between stages, in which several streams lie along the batch.
            micro_batch_size=streams(self.config.model) * self.config.training.micro_batch_size,
            forward_only=forward_only,
        )


def _forward_step(
    counted: Tensor | None, batches: Iterator[Batch], model: Any
) -> tuple[Tensor, _Reduce]:
    """What a schedule calls for one micro-batch on one chunk: its output and how to reduce it."""
    batch = next(batches)
    return forward(model, batch), partial(_mean_loss, batch.loss_mask, counted)


def _mean_loss(
    loss_mask: Tensor | None, counted: Tensor | None, losses: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, to differentiate and to report."""
    loss = mean_loss(losses, loss_mask, counted)
    return loss, loss.detach().clone()


def _token_losses(batches: Iterator[Batch], model: Any) -> tuple[Tensor, _Reduce]:
    """The same, for a schedule without a backward pass that reports every token's loss."""
    return forward(model, next(batches)), _reported


def _reported(losses: Tensor) -> tuple[Tensor, Tensor]:
    return losses.mean(), losses.clone()  # the schedule may free its output
