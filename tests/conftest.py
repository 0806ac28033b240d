"""Without a GPU, Triton's kernels run in its interpreter.

Triton decides that when it is imported, which importing Megatron-core does: so before any test
module is.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
