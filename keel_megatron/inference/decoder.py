"""The logits of the next token, with a key/value cache, over tensor and pipeline ranks."""

from __future__ import annotations

from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from keel_megatron.architecture.residual import streams
from keel_megatron.config.model import ModelConfig
from keel_megatron.errors import UserError
from keel_megatron.inference.blocks import Block
from keel_megatron.inference.cache import Columns, KeyValueCache
from keel_megatron.inference.static_step import StaticStep
from keel_megatron.model.rotary import RotaryTable
from keel_megatron.model.stream import stored
from keel_megatron.runtime.distributed import Runtime


class Decoder:
    """A stage of a model, and what its blocks have seen of a batch of sequences.

    Every rank calls the same methods with the same tokens; the stages pass the stream on.

    Args:
        chunk: this stage's model (model/language_model.py).
        model: the model's section of the configuration.
        runtime: this rank's place.
        static: take steps of static shapes, on CUDA as one graph a token; one rank only.
    """

    def __init__(
        self, chunk: Any, model: ModelConfig, runtime: Runtime, *, static: bool = False
    ) -> None:
        self.chunk, self.model, self.runtime = chunk.eval(), model, runtime
        self.layers = list(chunk.decoder.layers)
        self.blocks = [Block(layer, number) for number, layer in enumerate(self.layers)]
        self.dtype: torch.dtype = chunk.config.params_dtype
        self.is_first = runtime.pipeline_rank == 0
        self.is_last = runtime.pipeline_rank == runtime.pipeline_size - 1
        self.static = static
        self._cache: KeyValueCache | None = None
        self._table: Tensor | None = None
        self._static_step: StaticStep | None = None

    @torch.inference_mode()
    def prefill(self, sequences: list[list[int]], new: int) -> Tensor | None:
        """Forget everything, and read new sequences.

        Positions are columns, which may exceed the context's length: rotary scores depend on
        differences alone.

        Args:
            sequences: the tokens, each at least one; shorter ones are padded on the left.
            new: tokens that will follow at most.

        Returns:
            Logits after each sequence, as `step`.

        Raises:
            UserError: the cache does not fit in memory.
        """
        self._cache = self._static_step = None  # of the last batch: its memory is free again
        columns = max(map(len, sequences))
        padding = [columns - len(tokens) for tokens in sequences]
        groups = self.model.query_groups // self.runtime.tensor_size
        self._require_memory(len(sequences) * (columns + new) * groups)
        table = RotaryTable(
            self.model.head_dim, self.model.rope_theta, columns + new, self.dtype
        ).table
        # [2, columns, 1, 1, 1, d]
        self._table = table.unsqueeze(-2).to(self.runtime.device)
        cache = self._cache = KeyValueCache(
            len(self.blocks),
            padding,
            groups,
            columns + new,
            self.model.head_dim,
            self.dtype,
            self.runtime.device,
        )
        rows = [
            [0] * missing + list(tokens) for missing, tokens in zip(padding, sequences, strict=True)
        ]
        logits = self._forward(torch.tensor(rows, device=self.runtime.device), cache)
        cache.length = columns
        if self.static:
            self._static_step = StaticStep(self._forward, cache)
        return logits

    def _require_memory(self, heads: int) -> None:
        """Refuse a cache of so many heads of a column that does not fit."""
        needed = 2 * len(self.blocks) * heads * self.model.head_dim * self.dtype.itemsize
        if self.runtime.device.type == "cuda":
            kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            free = torch.cuda.mem_get_info()[0] + kept
        else:
            free = psutil.virtual_memory().available
        if needed > free:
            raise UserError(
                f"--batch-size: keys and values of the prompts need {needed / 1e9:.3g} GB, and "
                f"{free / 1e9:.3g} GB are free; use a smaller batch size, or more "
                "--processes"
            )

    @torch.inference_mode()
    def step(self, tokens: list[int]) -> Tensor | None:
        """Append one token to each sequence.

        Args:
            tokens: [b].

        Returns:
            Logits of the next tokens [b, vocabulary], fp32, on the last stage; elsewhere None.
            The next static step overwrites them.
        """
        cache = self._cache
        assert cache is not None
        if self._static_step is not None:
            logits: Tensor | None = self._static_step(tokens)
        else:
            column = torch.tensor(tokens, device=self.runtime.device)[:, None]
            logits = self._forward(column, cache)
        cache.length += 1
        return logits

    def _forward(self, tokens: Tensor, columns: Columns) -> Tensor | None:
        """Logits after the last of the next columns' tokens [b, s]."""
        table = self._table
        assert table is not None
        b, s = tokens.shape
        if self.is_first:
            embedded = self.chunk.embedding(input_ids=tokens, position_ids=None)
            x = stored(self.model.stream, embedded.to(torch.float32))
        else:
            shape = (s, streams(self.model) * b, self.model.hidden_size)
            x = torch.empty(shape, device=tokens.device)
            dist.recv(x, self.runtime.on_stage(self.runtime.pipeline_rank - 1))
        rotation, bias = columns.rotation(table, s), columns.bias(s)
        z = self.layers[0].attention_input(x) if self.layers else None
        for block in self.blocks:
            assert z is not None
            x, z = block.forward(x, z, rotation, columns, bias)
        if not self.is_last:
            dist.send(x.contiguous(), self.runtime.on_stage(self.runtime.pipeline_rank + 1))
            return None
        return self._head(x[-1:])

    def _head(self, x: Tensor) -> Tensor:
        """Logits [b, vocabulary], fp32, of the stream [1, b, h], or of n streams [1, n b, h]."""
        chunk = self.chunk
        z = chunk.decoder.final_layernorm(x)
        tied = chunk.share_embeddings_and_output_weights
        weight = chunk.shared_embedding_or_output_weight() if tied else None
        logits: Tensor = chunk.output_layer(z, weight, runtime_gather_output=True)[0]
        return logits[0].float()

    def agree(self, tokens: list[int]) -> list[int]:
        """The last stage's tokens [b], on every rank of the replica.

        Args:
            tokens: on the last stage its tokens, elsewhere as many numbers.
        """
        runtime = self.runtime
        if runtime.tensor_size * runtime.pipeline_size == 1:
            return tokens
        from megatron.core import parallel_state

        shared = torch.tensor(tokens, device=runtime.device)
        source = runtime.on_stage(runtime.pipeline_size - 1) - runtime.tensor_rank
        dist.broadcast(shared, src=source, group=parallel_state.get_model_parallel_group())
        return [int(token) for token in shared]
