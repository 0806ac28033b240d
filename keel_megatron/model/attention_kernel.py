"""`kernels.attention`: which kernel torch's scaled_dot_product_attention runs, and its name.

torch tries its kernels in an order and takes the first that can compute the call. Left alone, the
order depends on the version of cuDNN that the process happens to load. By published measurements
cuDNN's kernel is about 1.3 x as fast as FlashAttention-2 on an H100 at head size 64, forward.
"""

from __future__ import annotations

from functools import cache

import torch
from torch.nn.attention import SDPBackend

from keel_megatron.config.run import RunConfig
from keel_megatron.model.documents import takes_borders

Order = tuple[SDPBackend, ...]

_CUDNN, _FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
_OTHERS = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
_NAMES = {
    _CUDNN: "cuDNN's kernel",
    _FLASH: "FlashAttention-2",
    SDPBackend.EFFICIENT_ATTENTION: "the memory-efficient kernel",
    SDPBackend.MATH: "plain operators, with the s x s matrix in memory",
}


def attention_order(config: RunConfig, capability: tuple[int, int]) -> Order | None:
    """The order in which torch shall try its kernels; None: torch's own.

    Args:
        config: the run.
        capability: the device's compute capability.
    """
    chosen = config.kernels.attention
    # cuDNN before 9.15.1 fails for other lengths; torch has it first on these devices only.
    suits = config.data.seq_length % 128 == 0 and capability in ((9, 0), (10, 0), (10, 3))
    if chosen == "cudnn" or (chosen == "auto" and suits):
        return (_CUDNN, _FLASH, *_OTHERS)
    return (_FLASH, *_OTHERS, _CUDNN) if chosen == "flash" else None


def prefer_attention(config: RunConfig, device: torch.device) -> None:
    """Set the order for this process; does nothing on a CPU, or where CUDA is only traced."""
    if device.type != "cuda" or torch.version.cuda is None:
        return
    attention_choice(config, device)  # torch sets its own order at the first choice
    own, order = _own_order(), attention_order(config, torch.cuda.get_device_capability(device))
    first = [backend.value for backend in order or ()]
    torch._C._set_sdp_priority_order(first + [n for n in own if n not in first])


@cache
def _own_order() -> list[int]:
    return torch._C._get_sdp_priority_order()


def attention_choice(config: RunConfig, device: torch.device) -> SDPBackend:
    """The kernel that torch takes now for this run's queries, keys and values."""
    model, size = config.model, config.parallel.tensor
    s, b = config.data.seq_length, config.training.micro_batch_size
    heads, groups = model.num_attention_heads // size, model.query_groups // size
    dtype = _dtype(config)
    if expands_groups(device, dtype):
        groups = heads
    query, key, value = (
        torch.empty((b, n, s, model.head_dim), dtype=dtype, device=device, requires_grad=True)
        for n in (heads, groups, groups)
    )
    found = torch._fused_sdp_choice(
        query, key, value, None, model.dropout, True, enable_gqa=groups != heads
    )
    return SDPBackend(found)


def _dtype(config: RunConfig) -> torch.dtype:
    return torch.bfloat16 if config.training.precision == "bf16" else torch.float32


def expands_groups(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether keys and values are repeated for every head of their group before the kernel.

    On CUDA only the memory-efficient kernel computes fp32, and not in every version of torch with
    groups; otherwise the s x s matrix would be in memory.
    """
    return device.type == "cuda" and dtype == torch.float32


def describe_attention(config: RunConfig, device: torch.device) -> str:
    """The name of the kernel that a run uses for attention; sets the order for this process."""
    if config.kernels.backend == "transformer_engine":
        return "Transformer Engine's"
    prefer_attention(config, device)
    if config.data.document_masks:
        if takes_borders(device, _dtype(config), config.model.head_dim):
            return "FlashAttention-2 within documents"
        return "torch's, with a mask of documents in memory"
    name = _NAMES.get(attention_choice(config, device), "none: torch has no kernel for this run")
    if device.type == "cuda":
        return name
    return name.replace("FlashAttention-2", "torch's flash kernel for CPUs")
