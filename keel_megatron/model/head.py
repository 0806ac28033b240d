"""Megatron-core's output layer, which returns losses if it gets labels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from keel_megatron.kernels.cross_entropy import Split, linear_cross_entropy
from keel_megatron.model.linear import ColumnParallelLinear, gradient_sums


class OutputLayer(ColumnParallelLinear):
    """Logits of the vocabulary, or losses of the tokens if labels are given.

    The losses are computed in the module's forward pass, so hooks on the module apply (ZeRO 3
    gathers the weight there). Parameters, sharding and checkpoints are
    Megatron-core's.
    """

    rows: int
    """Maximum tokens whose logits are in memory at once."""
    z_loss: float = 0.0
    """Coefficient of the z-loss, which is in the gradients and not in the losses."""

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits as from Megatron-core's layer, or losses.

        Args:
            input_: [s, b, h], or [s / TP, b, h] under sequence parallelism.
            weight: used instead of its own (tied embeddings).
            runtime_gather_output: gather the logits, as in Megatron-core.
            labels: [b, s].

        Returns:
            [s, b, vocabulary / TP] in the compute type, or [b, s] nats in the stream's; and None.
        """
        if labels is None:
            return super().forward(input_, weight, runtime_gather_output=runtime_gather_output)
        matrix: Any = self.weight if weight is None else weight
        parallel = self.tp_group.size() > 1
        losses = linear_cross_entropy(
            input_.flatten(0, 1),
            matrix,
            labels.t().flatten(),
            rows=self.rows,
            z_loss=self.z_loss,
            split=Split(self.tp_group, self.sequence_parallel) if parallel else None,
            accumulate=gradient_sums(matrix) is not None,
        )
        batch, length = labels.shape
        return losses.view(length, batch).t().contiguous(), None
