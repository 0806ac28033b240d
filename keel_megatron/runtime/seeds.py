"""Seeds of weights and dropout, derived from the run's seed and their purpose."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def derive_seed(seed: int, *purpose: object) -> int:
    """A 63-bit seed that depends only on the run's seed and the purpose.

    Independent of Python's hash randomization, of the parallel layout and of call order.
    """
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_dropout(seed: int, pipeline_rank: int, data_rank: int, *, step: int = 0) -> None:
    """Seed the generators that dropout draws from: different masks on every stage and replica.

    Within a tensor-parallel group the default generator is the same on every rank (whole
    activations) and the tracked `model-parallel-rng` differs (split activations).

    Python's and NumPy's own generators are seeded with them: a library may draw from those.
    """
    from megatron.core import tensor_parallel

    mine = derive_seed(seed, "dropout", pipeline_rank, data_rank, step) % 2**31
    random.seed(mine)
    np.random.seed(mine)
    torch.manual_seed(mine)
    tensor_parallel.model_parallel_cuda_manual_seed(mine, force_reset_rng=True)
