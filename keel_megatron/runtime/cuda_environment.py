"""Variables that CUDA, cuBLAS and torch's allocator read once, when they start.

They are set for this process before anything asks for a device. A variable that the user has set
stays as it is. Does not import torch.
"""

from __future__ import annotations

import os

from keel_megatron.config.parallel import ParallelConfig
from keel_megatron.config.training import TrainingConfig

ALLOCATOR, _ALLOCATOR_BEFORE = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def prepare(parallel: ParallelConfig, training: TrainingConfig) -> None:
    """Set what the user has not set; does nothing for a run on the CPU.

    - Expandable segments: memory that was freed in pieces can be used for larger tensors.
    - One hardware queue under tensor parallelism: kernels then start in the order of their launch,
      which hides communication behind the weight gradient (Megatron-core relies on it).
    - A fixed cuBLAS workspace for `training.deterministic`.
    """
    if training.device == "cpu":
        return
    if _ALLOCATOR_BEFORE not in os.environ:  # torch 2.9 to 2.13 read both; the former goes first
        os.environ.setdefault(ALLOCATOR, "expandable_segments:True")
    if parallel.tensor > 1:
        os.environ.setdefault(CONNECTIONS, "1")
    if training.deterministic:
        os.environ.setdefault(CUBLAS, ":4096:8")
