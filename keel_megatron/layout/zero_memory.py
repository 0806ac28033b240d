"""Memory of DeepSpeed's ZeRO on a device and on its host.

Counted from deepspeed 0.19.8 (`runtime/zero/stage_1_and_2.py`, `stage3.py`) as this project
configures it: masters, moments and summed gradients in fp32, parameters of s bytes (2 in bf16; in
fp32 4, also with masters). Of n parameters, g are norm weights; the largest matrix has m elements;
there are d replicas and buckets of b elements. Bytes per device:

    stage  parameters         gradients  optimizer  buffers
    1      s n                4 n        12 n / d   8 b
    2      s n                4 n / d    12 n / d   8 b
    3      s n / d + s g      4 n / d    12 n / d   8 b + s min(5 b or m, n), parameters collected

With the optimizer offloaded, the 12 n / d are on the host, in addition to:

    1, 2   gradients 4 n / d, new parameters s n / d, one matrix s m (on the device another); in
           fp32 the sum of the micro-batches 4 n / d, in stage 2 instead of the device's
    3      gradients 8 n / d instead of the device's 4 n / d

With the parameters offloaded, the s n / d of stage 3 are on the host.
tests/layout/test_zero_memory.py compares the sums with the tensors of real runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from keel_megatron.config.run import RunConfig


@dataclass(frozen=True)
class ZeroMemory:
    """Bytes on one device, and its share of the host memory."""

    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    host: int


@dataclass(frozen=True)
class Sizes:
    """Parameter counts of one tensor-parallel rank."""

    matrices: int
    """Elements in all matrices."""
    norm_weights: int
    largest: int
    """Elements in the largest matrix."""

    @property
    def all(self) -> int:
        """Matrices and norm weights."""
        return self.matrices + self.norm_weights


def zero_memory(config: RunConfig, sizes: Sizes, data_parallel: int) -> ZeroMemory:
    """Memory of parameters, gradients and optimizer state under `training.engine: deepspeed`."""
    own, n, m = config.deepspeed, sizes.all, sizes.largest
    fp32 = config.training.precision == "fp32"
    size = 4 if fp32 else 2
    share = -(-n // data_parallel)
    buffers, host, optimizer = 8 * own.bucket_size, 0, 12 * share
    if own.zero_stage == 3:
        parameters, gradients = size * share, 4 * share
        buffers += size * min(max(5 * own.bucket_size, m), n)
        if own.offload_optimizer:
            host += 12 * share + 8 * share
            optimizer = gradients = 0
        if own.offload_parameters:
            host += parameters
            parameters = 0
        return ZeroMemory(
            parameters + size * sizes.norm_weights, gradients, optimizer, buffers, host
        )
    gradients = 4 * n if own.zero_stage == 1 else 4 * share
    if own.offload_optimizer:
        host += 12 * share + 4 * share + size * share + size * m
        buffers += size * m
        optimizer = 0
        if fp32 and own.zero_stage == 2:
            host += 4 * share
            gradients = 0
    return ZeroMemory(size * n, gradients, optimizer, buffers, host)
