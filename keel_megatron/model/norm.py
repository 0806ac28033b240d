"""RMSNorm of the fp32 residual stream, and replacements for an omitted norm."""

from __future__ import annotations

from typing import Any, Literal

import torch
from megatron.core import tensor_parallel
from torch import Tensor, nn

from keel_megatron.kernels import rms_norm
from keel_megatron.model.join import branch_input


def stream_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """Type of the residual stream: fp32 (fp64 when the whole model is fp64, in exactness tests)."""
    return torch.float64 if compute_dtype == torch.float64 else torch.float32


def scaled(weight: Tensor, factor: float) -> Tensor:
    """A norm's weight [h] times the factor of its output; the weight itself if that is 1."""
    return weight if factor == 1.0 else weight * factor


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

    The statistics and the weight are in the stream's type (fp32); DeepSpeed keeps the parameter in
    the type of the matrix products, beside its fp32 master. Under sequence parallelism the weight
    is marked so that Megatron-core sums its gradient over the tensor group.

    Args:
        config: Megatron-core's TransformerConfig.
        hidden_size: h.
        eps: epsilon inside the square root.
        output: `branch` gives the type of the matrix products, `stream` that of the stream.

    Attributes:
        factor: of the output, constant; the residual rule's `inner_factor`.
    """

    def __init__(
        self,
        config: Any,
        hidden_size: int,
        eps: float = 1e-5,
        output: Literal["branch", "stream"] = "branch",
    ) -> None:
        super().__init__()
        self.eps = eps
        self.stream_dtype = stream_dtype(config.params_dtype)
        self.output_dtype = config.params_dtype if output == "branch" else self.stream_dtype
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=self.stream_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.factor = 1.0

    @property
    def stream_weight(self) -> Tensor:
        """The weight [h] in the stream's type, times `factor`."""
        return scaled(self.weight.to(self.stream_dtype), self.factor)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x: [..., h] in the stream's type, to [..., h] in the output's."""
        return rms_norm(x, self.stream_weight, self.eps, self.output_dtype)


class HeadNorm(RMSNorm):
    """The weight [d] of an RMSNorm of attention heads, one for all of them.

    The heads are split over the tensor-parallel group and the weight is not: its gradient is
    reduced there. `kernels.head_norms` computes the norms of a block together.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(config, hidden_size, eps)
        self.weight.sequence_parallel = False  # type: ignore[attr-defined]
        self._split = config.tensor_model_parallel_size > 1

    @property
    def shared_weight(self) -> Tensor:
        """The weight [d] in the stream's type, for this rank's heads."""
        weight = self.stream_weight
        if not self._split:
            return weight
        reduced: Tensor = tensor_parallel.copy_to_tensor_model_parallel_region(weight)
        return reduced


class BranchVector(nn.Module):
    """A learned vector instead of a norm: beta * x, beta initially 1, in the branch's type.

    Attributes:
        factor: of the output, constant, as `RMSNorm.factor`.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:  # noqa: ARG002
        super().__init__()
        self.output_dtype = config.params_dtype
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=stream_dtype(config.params_dtype)))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.factor = 1.0

    @property
    def stream_weight(self) -> Tensor:
        """The vector [h], times `factor`."""
        return scaled(self.weight, self.factor)

    def forward(self, x: Tensor) -> Tensor:
        """Beta * x for x: [..., h] in the stream's type."""
        return branch_input("vector", x, self.stream_weight, self.output_dtype)


class BranchCast(nn.Module):
    """No norm: casts the stream to the type of the matrix products."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:  # noqa: ARG002
        super().__init__()
        self.output_dtype = config.params_dtype

    def forward(self, x: Tensor) -> Tensor:
        """X: [..., h] in the type of the matrix products."""
        return branch_input("none", x, None, self.output_dtype)
