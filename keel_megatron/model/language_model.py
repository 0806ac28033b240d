"""The model of a pipeline stage: Megatron-core's GPTModel with Keel layers."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional

from keel_megatron.architecture.residual import streams
from keel_megatron.compat.modules import replace_output_layer
from keel_megatron.config.run import RunConfig
from keel_megatron.kernels import selection
from keel_megatron.layout.chunks import Layout
from keel_megatron.layout.stages import Partition, own_partition
from keel_megatron.model.attention_kernel import prefer_attention
from keel_megatron.model.backend import choose_backend
from keel_megatron.model.documents import Documents
from keel_megatron.model.head import OutputLayer
from keel_megatron.model.initialization import initialize
from keel_megatron.model.layer import link
from keel_megatron.model.micro_batch import MicroBatch
from keel_megatron.model.norm import RMSNorm, stream_dtype
from keel_megatron.model.rotary import RotaryTable
from keel_megatron.model.specs import chunk_spec
from keel_megatron.model.stream import Noise
from keel_megatron.model.streams import spread
from keel_megatron.runtime.distributed import Runtime

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def transformer_config(
    config: RunConfig,
    layout: Layout,
    recomputed: int,
    compute_dtype: torch.dtype,
    device: torch.device,
    *,
    gradient_fusion: bool = False,
) -> TransformerConfig:
    """Megatron-core's configuration of one chunk of the run's model.

    Args:
        config: the run.
        layout: which blocks are on which stage.
        recomputed: number of blocks, the first of the chunk, that the backward pass recomputes.
        compute_dtype: data type of matrix products and their weights.
        device: the device of the run.
        gradient_fusion: accumulate weight gradients within their matrix products.
    """
    model, parallel = config.model, config.parallel
    return TransformerConfig(
        num_layers=model.blocks,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=functional.silu,
        bias_activation_fusion=False,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        hidden_dropout=model.dropout,
        attention_dropout=model.dropout,
        # model/initialization.py draws the weights later.
        init_method=_keep,
        output_layer_init_method=_keep,
        embedding_init_method=_keep,
        params_dtype=compute_dtype,
        bf16=compute_dtype == torch.bfloat16,
        # The stream is fp32 from the embedding to the head, between stages too.
        fp32_residual_connection=compute_dtype != torch.float64,
        pipeline_dtype=stream_dtype(compute_dtype),
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        sequence_parallel=parallel.sequence,
        # An output may be freed once it is sent. Interleaving frees it as soon as the message is
        # queued, which CUDA's stream order makes safe and gloo does not: it would send garbage.
        deallocate_pipeline_outputs=device.type == "cuda" or layout.virtual_pipeline == 1,
        transformer_impl="local",
        gradient_accumulation_fusion=gradient_fusion,
        # The embedding's gradient is summed in a fixed order.
        deterministic_mode=config.training.deterministic and device.type == "cuda",
        # The first block differs from the rest: checkpoints keep one key a block.
        hetereogenous_dist_checkpoint=True,
        **_fp8(config),
        **_pipelined(layout),
        **_recompute(recomputed),
    )


def _fp8(config: RunConfig) -> dict[str, Any]:
    """Megatron-core's settings for fp8, with a recipe that has no state between steps."""
    if config.kernels.fp8 == "none":
        return {}
    return {"fp8": config.kernels.fp8, "fp8_recipe": "tensorwise"}


def _pipelined(layout: Layout) -> dict[str, Any]:
    """Megatron-core's settings for pipeline stages."""
    if layout.pipeline == 1:
        return {}
    settings: dict[str, Any] = {
        "pipeline_model_parallel_layout": layout.to_megatron(),
        # By default the host waits for the device after every exchange, because of an old torch.
        "batch_p2p_sync": False,
    }
    if layout.virtual_pipeline > 1:
        settings["virtual_pipeline_model_parallel_size"] = layout.virtual_pipeline
        # Two stages are each other's next and previous one: in one batch of messages the four
        # between them would be matched in the wrong order. Unbatched, they are not.
        settings["overlap_p2p_comm"] = True
        settings["batch_p2p_comm"] = False
    return settings


def _recompute(blocks: int) -> dict[str, Any]:
    """Megatron-core's settings for recomputation of a chunk's first blocks."""
    if not blocks:
        return {}
    return {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": blocks,
    }


class LanguageModel(GPTModel):
    """GPTModel with this project's rotary table and head; a chunk of it on a pipeline stage."""

    def __init__(self, config: TransformerConfig, run: RunConfig, **kwargs: Any) -> None:
        model = run.model
        super().__init__(
            config=config,
            vocab_size=run.data.vocab_size,
            max_sequence_length=run.data.seq_length,
            position_embedding_type="rope",
            rotary_base=model.rope_theta,
            share_embeddings_and_output_weights=model.tie_embeddings,
            **kwargs,
        )
        self._run = run
        if self.pre_process:
            if model.embedding_norm:
                self.embedding_norm = RMSNorm(
                    config, model.hidden_size, model.norm_epsilon, output="stream"
                )
            if model.embedding_norm or streams(model) > 1:
                # Whoever asks for x_0 asks the embedding.
                self.embedding.register_forward_hook(lambda _module, _in, x: self._begun(x))
        self.rotary_pos_emb = RotaryTable(
            model.head_dim, model.rope_theta, run.data.seq_length, config.params_dtype
        )
        if self.post_process:
            head = replace_output_layer(self, OutputLayer)
            head.z_loss = run.training.z_loss
            head.rows = run.kernels.rows_at_once(head.output_size_per_partition)

    def _begun(self, x: Tensor) -> Tensor:
        """x_0 of the embedding's output [s, b, h]: its norm, and the copies of several streams."""
        if self._run.model.embedding_norm:
            x = self.embedding_norm(x)
        return spread(x, streams(self._run.model))

    def forward(
        self,
        *arguments: Any,
        documents: Documents | None = None,
        sequences: Tensor | None = None,
        **rest: Any,
    ) -> Tensor:
        """As GPTModel.forward.

        Args:
            arguments: see Megatron-core.
            documents: attention is kept within them, if they are given.
            sequences: numbers of the sequences in the run, int64 [b]; training with
                `model.stream: bf16_stochastic` needs them.
            rest: see Megatron-core.
        """
        noise = self._noise(sequences)
        if documents is not None or noise is not None:
            rest["extra_block_kwargs"] = {"attention_bias": MicroBatch(documents, noise)}
        output: Tensor = super().forward(*arguments, **rest)
        return output

    def _noise(self, sequences: Tensor | None) -> Noise | None:
        """The random bits of a micro-batch, where its stream is rounded stochastically."""
        if self._run.model.stream != "bf16_stochastic" or not self.training:
            return None
        if sequences is None:
            raise ValueError("model.stream: bf16_stochastic needs the sequences' numbers")
        rank = parallel_state.get_tensor_model_parallel_rank()
        return Noise(
            self._run.training.seed, sequences, rank if self.config.sequence_parallel else 0
        )

    def _postprocess(self, hidden_states: Tensor, *, labels: Tensor | None, **rest: Any) -> Tensor:
        """Apply the head: losses [b, s] of the labels [b, s], or logits.

        Args:
            hidden_states: [s, b, h], or [s / TP, b, h] under sequence parallelism.
            labels: the tokens to predict; None: return logits.
            rest: see Megatron-core.
        """
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states, labels=labels, **rest)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        losses, _no_bias = self.output_layer(hidden_states, weight, labels=labels)
        return losses


def build_model(
    config: RunConfig,
    runtime: Runtime,
    partition: Partition | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
) -> list[nn.Module]:
    """This rank's model chunks, on its device, with their initial weights.

    Args:
        config: the run.
        runtime: this rank's place.
        partition: which blocks are on which stage; None: from `own_partition`.
        compute_dtype: overrides `training.precision` (exactness tests use fp64).

    Returns:
        One chunk, or `parallel.virtual_pipeline` chunks in order.

    Raises:
        ValueError: the stages do not hold every block once.
        UserError: the library of kernels.backend is not installed.
    """
    dtype = compute_dtype or COMPUTE_DTYPES[config.training.precision]
    partition = partition or own_partition(config, runtime)
    layout = partition.layout
    layout.check(config.model.blocks)
    backend = choose_backend(config, runtime.device.type)
    prefer_attention(config, runtime.device)
    selection.select(config.kernels.triton)
    stage = partition.stages[runtime.pipeline_rank]
    interleaved = layout.virtual_pipeline > 1
    chunks: list[nn.Module] = []
    for number, part in enumerate(layout.stage(runtime.pipeline_rank)):
        blocks = range(part.first_block, part.first_block + part.blocks)
        chunk = LanguageModel(
            transformer_config(
                config,
                layout,
                stage.recomputed[number],
                dtype,
                runtime.device,
                gradient_fusion=backend.gradient_fusion and dtype == torch.bfloat16,
            ),
            config,
            transformer_layer_spec=chunk_spec(config, backend.modules, blocks),
            pre_process=part.embedding,
            post_process=part.head,
            vp_stage=number if interleaved else None,
        )
        move(chunk, runtime.device)
        link(chunk.decoder.layers)
        _recompute_lightly(chunk, stage.recomputed[number], stage.light[number])
        _check_blocks(chunk, part.first_block, part.blocks)
        initialize(
            chunk, config.model, config.training.seed, runtime.tensor_rank, runtime.tensor_size
        )
        chunks.append(chunk)
    return chunks


def move(module: nn.Module, device: torch.device) -> None:
    """Move a module to a device; tensors without data (of the device meta) stay as they are."""
    apply: Any = module._apply
    apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))


def _recompute_lightly(chunk: nn.Module, full: int, light: int) -> None:
    """Recompute lightly those blocks that follow the fully recomputed ones."""
    layers: Any = chunk.decoder.layers  # type: ignore[union-attr]
    for layer in layers[full : full + light]:
        layer.self_attention.light = layer.mlp.light = True


def _check_blocks(chunk: nn.Module, first_block: int, blocks: int) -> None:
    """Check that Megatron-core built the blocks of this chunk's layout."""
    layers: Any = chunk.decoder.layers  # type: ignore[union-attr]
    built = [layer.layer_number - 1 for layer in layers]
    expected = list(range(first_block, first_block + blocks))
    if built != expected:
        raise ValueError(f"the layout gives this stage blocks {expected}, it holds {built}")


def _keep(weight: Tensor) -> Tensor:
    """An init_method that leaves the weight for model/initialization.py to draw."""
    return weight
