"""Output layer and cross entropy as one operation, without keeping all logits in memory.

Logits [n, v] of n tokens and a vocabulary of v are the largest tensor of a deep, narrow model by
far: at 4096 tokens and a vocabulary of 128k they take 2 GB in fp32. So the rows go through the
product and the softmax in pieces. Only the operation's input is kept; the backward pass recomputes
each piece's logits. If all rows are one piece, the log-softmax is kept and nothing is recomputed.

With logits z = x W^T and p = softmax(z), from the gradients d of the losses

    loss = -log p[label],   dz = d (p - 1[label]),   dx = dz W,   dW = dz^T x.

Under vocabulary parallelism a rank has v / TP rows of W, its own softmax q over them, and its own
log-sum-exp s; with S that of the whole vocabulary p = q exp(s - S). So only one number per row is
reduced, in one message for all rows. megatron-core's `vocab_parallel_cross_entropy` gives the same
losses.

The z-loss c S^2 of a row (PaLM, arXiv 2204.02311, section 5) keeps its log-sum-exp S near 0. It is
in the gradients alone: the losses stay those of the cross entropy, and

    dz = d (p (1 + 2 c S) - 1[label]),

one more factor of the row, at no cost to the logits.

On CUDA the softmax is two Triton kernels (`triton_cross_entropy.py`): the logits stay in the
product's type, and their gradient replaces them. All rows at once then keep 2 bytes a logit under
bf16 in place of 4, and move 6 between the products in place of 36. torch's operators take the
logits in fp32: on CUDA from the product itself (`out_dtype`), on a CPU rounded to bf16 first, as
the Triton kernels do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from keel_megatron.kernels.selection import Backend, use_triton
from keel_megatron.kernels.weight_gradients import add_product, placeholder


@dataclass(frozen=True)
class Split:
    """The ranks that share the vocabulary, and optionally the rows."""

    group: dist.ProcessGroup
    """Each rank has the next v / TP rows of the weight."""
    sequence: bool
    """Each rank also has the next n / TP rows of x; they are gathered, and dx scattered."""


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    rows: int,
    z_loss: float = 0.0,
    split: Split | None = None,
    accumulate: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Cross entropy of softmax(x weight^T) in nats: [n], fp32 (fp64 for fp64), differentiable once.

    The products are in x's type, the softmax in the result's.

    Args:
        x: [n, h], or [n / TP, h] where the sequence is split too.
        weight: [v, h], or [v / TP, h].
        labels: [n], integers below v, the same on all ranks of the group.
        rows: maximum rows whose logits are in memory at once.
        z_loss: c; the gradients are those of the cross entropy + c S^2 of every row, where S is the
            log-sum-exp of its logits. The result is without.
        split: the ranks that share the vocabulary; None: this process has all of it.
        accumulate: add the weight's gradient to `weight.main_grad` instead of returning it.
        backend: of the softmax. `auto`: the Triton kernels on CUDA for fp32 and bf16, where
            `selection.use_triton` permits; otherwise torch's operators.
    """
    operation: Any = _LinearCrossEntropy
    fits = x.dtype in (torch.float32, torch.bfloat16)
    in_place = use_triton("cross_entropy", x, backend, fits=fits)
    result: Tensor = operation.apply(x, weight, labels, rows, z_loss, split, accumulate, in_place)
    return result


class _LinearCrossEntropy(torch.autograd.Function):
    """See `linear_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        rows: int,
        z_loss: float,
        split: Split | None,
        accumulate: bool,
        in_place: bool,
    ) -> Tensor:
        """See `linear_cross_entropy`; in_place: by the Triton kernels."""
        ctx.rows, ctx.split, ctx.accumulate = rows, split, accumulate
        places, foreign = _places(labels.unsqueeze(1), weight.size(0), split)
        whole = _gathered(x, split)
        kept, found = None, []
        softmax = _triton_softmax if in_place else _softmax
        with_scores = split is not None or z_loss > 0.0
        for piece in _pieces(whole, rows):
            values, *numbers = softmax(
                _rows(whole, piece), weight, _rows(places, piece), scores=with_scores
            )
            found.append(numbers)
            if piece is None:
                kept = values
            del values  # before the next piece has its own
        result, log_sums, scores = (_joined(parts) for parts in zip(*found, strict=True))
        scale = None
        if with_scores:
            own = scores - result if log_sums is None else log_sums.clone()
            if split is not None and foreign is not None:
                result, own, scale = _over_ranks(own, scores, foreign, split.group)
            if z_loss:
                scale = _with_z_loss(own, z_loss, scale)
        ctx.save_for_backward(x, weight, places, foreign, scale, kept, log_sums)
        return result.neg().squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_losses: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and the weight from those of the losses [n]."""
        x, weight, places, foreign, scale, kept, log_sums = ctx.saved_tensors
        whole = _gathered(x, ctx.split)
        d = d_losses.unsqueeze(1)
        at_label = d.neg()
        if foreign is not None:
            at_label.masked_fill_(foreign, 0.0)
        if scale is not None:
            d = d * scale
        dx = torch.empty_like(whole) if ctx.needs_input_grad[0] else None
        sums = weight.main_grad if ctx.accumulate else None
        for piece in _pieces(whole, ctx.rows):
            part = _rows(whole, piece)
            numbers = [_rows(one, piece) for one in (places, d, at_label)]
            # The saved tensors are modified in place: torch refuses a second backward pass.
            if log_sums is None:
                dz = _gradient(kept, part, weight, *numbers)
            else:
                dz = _triton_gradient(kept, part, weight, _rows(log_sums, piece), *numbers)
            if dx is not None:
                torch.mm(dz, weight, out=_rows(dx, piece))
            if ctx.needs_input_grad[1]:
                sums = _plus_product(sums, dz, part, once=piece is None)
            del dz
        if ctx.accumulate:
            weight.grad_added_to_main_grad, d_weight = True, placeholder(weight)
        else:
            d_weight = None if sums is None else sums.to(weight.dtype)
        return None if dx is None else _scattered(dx, ctx.split), d_weight, *[None] * 6


def _pieces(x: Tensor, rows: int) -> list[slice] | list[None]:
    """Slices of the rows of x; None: all rows."""
    if len(x) <= rows:
        return [None]
    return [slice(start, start + rows) for start in range(0, len(x), rows)]


def _rows(x: Tensor, piece: slice | None) -> Tensor:
    """A piece of x; x itself, without an operator, for all rows."""
    return x if piece is None else x[piece]


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    """X W^T in the softmax's type."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    if x.is_cuda and weight.dtype != wide:
        mm: Any = torch.mm
        product: Tensor = mm(x, weight.t(), out_dtype=wide)
        return product
    return x.mm(weight.t()).to(wide)


def _softmax(
    x: Tensor, weight: Tensor, places: Tensor, *, scores: bool
) -> tuple[Tensor, Tensor, None, Tensor | None]:
    """Of a piece: log-softmax [n, v]; that at the places [n, 1]; None; there the logits, or None.

    Args:
        x: the rows.
        weight: this rank's.
        places: of the labels in it.
        scores: whether the logits at the places are needed.
    """
    logits = _logits(x, weight)
    logs = torch.log_softmax(logits, 1)
    return logs, logs.gather(1, places), None, logits.gather(1, places) if scores else None


def _triton_softmax(
    x: Tensor,
    weight: Tensor,
    places: Tensor,
    *,
    scores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Like `_softmax`, with the logits in place of the log-softmax, and the rows' log-sum-exp."""
    # Imported late: importing Triton takes a second, and a CPU run does not need it.
    from keel_megatron.kernels import triton_cross_entropy

    logits = x.mm(weight.t())
    log_sums, found = triton_cross_entropy.row_sums(logits, places)
    return logits, found - log_sums, log_sums, found if scores else None


def _gradient(
    kept: Tensor | None,
    x: Tensor,
    weight: Tensor,
    places: Tensor,
    d: Tensor,
    at_label: Tensor,
) -> Tensor:
    """Gradient of a piece's logits, in the weight's type: p d, plus at_label at the places.

    Args:
        kept: the log-softmax, which is overwritten; None: computed again.
        x: the rows.
        weight: this rank's.
        places: of the labels in it, [n, 1], as the following.
        d: factor of the softmax.
        at_label: what is added at the places.
    """
    p = kept.exp_() if kept is not None else torch.softmax(_logits(x, weight), 1)
    return p.mul_(d).scatter_add_(1, places, at_label).to(weight.dtype)


def _triton_gradient(
    kept: Tensor | None,
    x: Tensor,
    weight: Tensor,
    log_sums: Tensor,
    places: Tensor,
    d: Tensor,
    at_label: Tensor,
) -> Tensor:
    """Like `_gradient`; kept: the logits, which become the gradient."""
    from keel_megatron.kernels import triton_cross_entropy

    logits = x.mm(weight.t()) if kept is None else kept
    return triton_cross_entropy.to_gradient(logits, places, log_sums, d, at_label)


def _joined(parts: tuple[Any, ...]) -> Any:
    """The pieces' numbers as one tensor; None where there are none."""
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts)


def _places(labels: Tensor, own: int, split: Split | None) -> tuple[Tensor, Tensor | None]:
    """Indices of the labels [n, 1] in this rank's part of the vocabulary, and a mask of others.

    Labels on other ranks get the index 0.
    """
    if split is None:
        return labels, None
    places = labels - split.group.rank() * own
    foreign = (places < 0) | (places >= own)
    return places.masked_fill_(foreign, 0), foreign


def _with_z_loss(log_sums: Tensor, z_loss: float, share: Tensor | None) -> Tensor:
    """Factor of each row's softmax in the gradient, [n, 1]; both tensors are overwritten.

    Args:
        log_sums: log-sum-exp of every row, over the whole vocabulary.
        z_loss: its coefficient.
        share: this rank's of the row's probability; None: all of it.
    """
    factor = log_sums.mul_(2.0 * z_loss).add_(1.0)
    return factor if share is None else share.mul_(factor)


def _over_ranks(
    own: Tensor, scores: Tensor, foreign: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row, [n, 1], over the ranks.

    Log-probabilities of the labels, log-sum-exp, and this rank's share of the probability.

    Args:
        own: log-sum-exp of this rank's logits; overwritten, as scores.
        scores: this rank's logit at every row's place.
        foreign: rows whose label lies on another rank.
        group: the ranks.
    """
    largest = own.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    both = torch.stack([own.sub(largest).exp_(), scores.masked_fill_(foreign, 0.0)])
    dist.all_reduce(both, group=group)
    whole = both[0].log_().add_(largest)
    return both[1] - whole, whole, own.sub_(whole).exp_()


def _gathered(x: Tensor, split: Split | None) -> Tensor:
    """All rows of x, gathered from the ranks."""
    if split is None or not split.sequence:
        return x
    whole = x.new_empty(split.group.size() * x.size(0), x.size(1))
    dist.all_gather_into_tensor(whole, x.contiguous(), split.group)
    return whole


def _scattered(dx: Tensor, split: Split | None) -> Tensor:
    """Sum of dx over the ranks: all rows, or this rank's rows under sequence parallelism."""
    if split is None:
        return dx
    if not split.sequence:
        dist.all_reduce(dx, group=split.group)
        return dx
    own = dx.new_empty(dx.size(0) // split.group.size(), dx.size(1))
    dist.reduce_scatter_tensor(own, dx, group=split.group)
    return own


def _plus_product(sums: Tensor | None, a: Tensor, b: Tensor, *, once: bool) -> Tensor:
    """Sums + a^T b, in place; the sum of several pieces is at least fp32."""
    if sums is None:
        product = a.t().mm(b)
        return product if once else product.to(torch.promote_types(a.dtype, torch.float32))
    return add_product(sums, a.t(), b)
