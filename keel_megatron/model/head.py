"""The output layer: Megatron-core's, which gives losses where it is given labels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from keel_megatron.kernels.cross_entropy import Split, linear_cross_entropy
from keel_megatron.model.linear import ColumnParallelLinear, gradient_sums


class OutputLayer(ColumnParallelLinear):
    """The vocabulary's logits, or with labels the tokens' losses in the logits' place.

    The losses come from within the module's forward pass, so what hooks do for the weight (ZeRO 3
    collects it there) is done for them too. Parameters, sharding and checkpoints are
    Megatron-core's.
    """

    rows: int
    """How many tokens' logits may exist at once."""

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits, as Megatron-core's layer gives them; or losses.

        Args:
            input_: [s, b, h], or [s / TP, b, h] under sequence parallelism.
            weight: in place of its own (tied embeddings).
            runtime_gather_output: of the logits, as in Megatron-core.
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
            split=Split(self.tp_group, self.sequence_parallel) if parallel else None,
            accumulate=gradient_sums(matrix) is not None,
        )
        batch, length = labels.shape
        return losses.view(length, batch).t().contiguous(), None
