"""The DeepSpeed engine: ZeRO 1, 2 and 3 with offload, for one pipeline stage.

It runs its own micro-steps: under Megatron-core's schedules ZeRO would lose the gradients of all
micro-batches but the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from keel_megatron.architecture.residual import streams
from keel_megatron.checkpoint.parameters import MASTER, placed
from keel_megatron.compat import deepspeed_engine
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
from keel_megatron.engines.deepspeed.checkpoint_state import ZeroState
from keel_megatron.engines.deepspeed.zero_shards import ZeroShards
from keel_megatron.engines.parameter_groups import groups_of
from keel_megatron.errors import UserError
from keel_megatron.runtime.distributed import Runtime

INSTALL = "DS_BUILD_OPS=0 pip install --no-build-isolation 'keel-megatron[deepspeed]'"


class DeepSpeedEngine:
    """DeepSpeed's engine around this rank's model, and its own loop over the micro-batches.

    Args:
        config: the run.
        runtime: this rank's place.
        chunks: the model, one chunk, as built by `model.language_model.build_model`.

    Raises:
        UserError: DeepSpeed is not installed.
    """

    def __init__(self, config: RunConfig, runtime: Runtime, chunks: list[nn.Module]) -> None:
        require_deepspeed(runtime.device)
        self.config = config
        self.runtime = runtime
        self.chunks = chunks
        (model,) = chunks
        parameters = placed(model)  # before ZeRO shards them
        self._model: Any = _initialize(config, runtime, model)
        self._optimizer: Any = self._model.optimizer
        stage = config.deepspeed.zero_stage
        group = parallel_state.get_data_parallel_group()
        self._shards = ZeroShards(self._optimizer, stage, group, runtime.device)
        self._shards.allocate_moments()
        self.state = ZeroState(parameters, self._shards, group)

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
        model = self._model
        model.set_train_batch_size(  # its gradients are divided by its number of micro-batches
            count * self.config.training.micro_batch_size * self.runtime.data_size
        )
        model.train()
        total = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        batches, counted = self._on_device(micro_batches)
        watching = nullcontext() if depth is None else depth.watching()
        with watching, self._span("forward-backward"):
            for number, batch in enumerate(batches, start=1):
                # Its own count of micro-batches supposes that all steps have the same number.
                model.set_gradient_accumulation_boundary(number == count)
                with self._span("forward-compute"):
                    loss = self._loss(batch, counted)
                total += loss.detach().double()
                with self._span("backward-compute"):
                    model.backward(loss)
                if number < count:
                    model.step()  # counts the micro-batch
        if depth is not None:
            depth.before_update()
        result = StepResult(*self._mean(total, count, self._shards.gradient_norm(), stop()))
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_mult"]
        accepted = accept(result) and result.finite
        with nullcontext() if accepted else deepspeed_engine.refusing(self._optimizer):
            model.step()
        if depth is not None:
            depth.after_update()
        return result

    @torch.no_grad()
    def validate(self, micro_batches: Iterable[Batch], count: int) -> float:
        """Mean cross entropy in nats per token over `count` micro-batches a replica."""
        self._model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        batches, counted = self._on_device(micro_batches)
        for batch in batches:
            total += self._loss(batch, counted).double()
        return self._mean(total, count)[0]

    @torch.no_grad()
    def token_losses(self, micro_batches: Iterable[Batch], count: int) -> list[Tensor]:  # noqa: ARG002
        """As `Engine.token_losses`."""
        self._model.eval()
        batches = [batch.to(self.runtime.device) for batch in micro_batches]
        return [forward(self._model, batch) for batch in batches]

    def own_gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """As `Engine.own_gradient`."""
        shard = self._shards.gradient(parameter) if owns(parameter, self.runtime) else None
        return None if shard is None else shard.values

    def own_weight(self, parameter: nn.Parameter) -> Tensor:
        """As `Engine.own_weight`."""
        shard = self._shards.state(parameter, MASTER)
        assert shard is not None
        return shard.values

    @contextmanager
    def _span(self, name: str) -> Iterator[None]:
        """Megatron-core's timer of that name around the block, where there are timers."""
        timers: Any = self.chunks[0].config.timers  # type: ignore[union-attr]
        if timers is None:
            yield
            return
        timers(name).start()
        yield
        timers(name).stop()

    def _on_device(self, micro_batches: Iterable[Batch]) -> tuple[list[Batch], Tensor | None]:
        """The micro-batches, and `mean_counted` of them."""
        batches = [batch.to(self.runtime.device) for batch in micro_batches]
        return batches, mean_counted(batches, parallel_state.get_data_parallel_group())

    def _loss(self, batch: Batch, counted: Tensor | None) -> Tensor:
        return mean_loss(forward(self._model, batch), batch.loss_mask, counted)

    def _mean(
        self, total: Tensor, count: int, norm: Tensor | None = None, stop: bool = False
    ) -> tuple[float, float, bool]:
        """The mean loss, the norm and whether any rank's `stop` is true; read in one host wait."""
        sums = torch.zeros(3, dtype=torch.float64, device=self.runtime.device)
        if self.runtime.tensor_rank == 0:  # each of the tensor ranks has the same
            sums[0] = total
        sums[1].fill_(stop)
        dist.all_reduce(sums)
        if norm is not None:  # the same on every rank
            sums[2] = norm
        loss, asked, grad_norm = sums.tolist()
        return loss / (count * self.runtime.data_size), grad_norm, asked > 0


def require_deepspeed(device: torch.device) -> None:
    """Import DeepSpeed, for this kind of device and quietly.

    Raises:
        UserError: it is not installed.
    """
    try:
        deepspeed_engine.import_for(device.type)
    except ImportError as error:
        raise UserError(
            f"training.engine: deepspeed needs DeepSpeed ({error}): after torch,\n  {INSTALL}\n"
            "or set training.engine: megatron"
        ) from None


class TensorParallelUnit:
    """Megatron-core's groups as DeepSpeed asks for them: model-parallel means tensor-parallel."""

    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(
        parallel_state.get_tensor_model_parallel_world_size
    )
    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)
    get_pipeline_model_parallel_rank = staticmethod(parallel_state.get_pipeline_model_parallel_rank)
    get_pipeline_model_parallel_world_size = staticmethod(
        parallel_state.get_pipeline_model_parallel_world_size
    )
    get_pipeline_model_parallel_group = staticmethod(
        parallel_state.get_pipeline_model_parallel_group
    )


def deepspeed_config(config: RunConfig, data_parallel: int, device: str) -> dict[str, Any]:
    """DeepSpeed's configuration, all of it from the run's."""
    training, own = config.training, config.deepspeed
    n = streams(config.model)
    host = {"device": "cpu", "pin_memory": device == "cuda"}
    zero: dict[str, Any] = {
        "stage": own.zero_stage,
        "overlap_comm": device == "cuda",
        "contiguous_gradients": True,
        "reduce_bucket_size": own.bucket_size,
        "allgather_bucket_size": own.bucket_size,
        "stage3_prefetch_bucket_size": own.bucket_size,
        "stage3_max_live_parameters": 4 * own.bucket_size,
        "stage3_max_reuse_distance": 4 * own.bucket_size,
        "sub_group_size": 4 * own.bucket_size,
        # Norm weights and mixes of n streams stay whole: a layer reads its neighbours' norms in its
        # fused kernel, and its mixes, which ZeRO's hooks on modules cannot see.
        "stage3_param_persistence_threshold": max(config.model.hidden_size, n * (n + 2)),
    }
    if own.offload_optimizer:
        zero["offload_optimizer"] = host
    if own.offload_parameters:
        zero["offload_param"] = host
    return {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": training.global_batch_size
        // (training.micro_batch_size * data_parallel),
        "gradient_clipping": config.optimizer.clip_grad,
        "bf16": {"enabled": training.precision == "bf16"},
        # As Megatron-core's DDP does it.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }


def _initialize(config: RunConfig, runtime: Runtime, model: nn.Module) -> Any:
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfig

    deepspeed_engine.set_local_rank(runtime.launch.local_rank)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)
    unit = TensorParallelUnit()
    settings = deepspeed_config(config, runtime.data_size, runtime.device.type)
    engine = deepspeed_engine.zero_engine()(
        args=None,
        model=model,
        optimizer=_adam(config, model, runtime.device),
        mpu=unit,
        dist_init_required=False,
        config=settings,
        config_class=DeepSpeedConfig(settings, unit),
    )
    if config.model.tie_embeddings and config.deepspeed.zero_stage == 3:
        # The head multiplies with a weight that is not its own.
        whole: Any = model
        deepspeed.zero.register_external_parameter(
            whole.output_layer, whole.embedding.word_embeddings.weight
        )
    return engine


def _adam(config: RunConfig, model: nn.Module, device: torch.device) -> Any:
    """AdamW on the device of its state, in the groups of `parameter_groups`."""
    settings = config.optimizer
    groups = [
        {
            "params": parameters,
            "lr_mult": factors.rate,
            "lr": settings.learning_rate * factors.rate,
            "weight_decay": settings.weight_decay * factors.decay,
            "eps": settings.epsilon * factors.epsilon,
        }
        for factors, parameters in groups_of([model], config).items()
    ]
    common: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.beta1, settings.beta2),
    }
    if config.deepspeed.offload_optimizer and device.type == "cuda":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **common)
    return torch.optim.AdamW(groups, fused=device.type == "cuda", **common)
