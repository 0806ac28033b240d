"""Communication volume and time of a step: messages, gradient reduction, the update."""

from __future__ import annotations

import math
from collections.abc import Sequence

from keel_megatron.architecture.residual import streams
from keel_megatron.config.run import RunConfig
from keel_megatron.layout.devices import Device
from keel_megatron.layout.muon import MuonLoad, muon_load
from keel_megatron.layout.stages import Partition
from keel_megatron.layout.times import Times, time_parts
from keel_megatron.layout.work import STREAM_BYTES, Execution

_UPDATE_BYTES = 4 + 4 + 8 + 8 + 16
"""Bytes per parameter and update: gradient zeroed, read for the norm, scaled in place; moments and
master weight (or the weight itself) read and written."""
_COPY_BYTES = 4 + 2
"""Additional bytes in bf16: the master weight copied to the weight."""
_ZERO_BYTES = 4
"""Bytes per element of Muon's gradients, of all owners, that are zeroed."""

_LEAST_BUCKET, _BUCKET_OF_REPLICA = 40e6, 1e6
"""Parameters of a bucket that overlaps: Megatron-core's choice, by the number of replicas."""


def message_bytes(config: RunConfig) -> int:
    """Bytes of one micro-batch's residual streams in fp32; a device's share under SP."""
    tokens = config.data.seq_length * config.training.micro_batch_size
    share = config.parallel.tensor if config.parallel.sequence else 1
    return streams(config.model) * tokens * config.model.hidden_size * STREAM_BYTES // share


def link_seconds(config: RunConfig, device: Device, data_parallel: int) -> tuple[float, ...]:
    """Time of a message from each stage to the next (from the last to the first), seconds.

    Megatron-core numbers ranks by tensor, then data, then pipeline rank, so neighbours in the
    pipeline are TP x DP ranks apart. The slowest replica determines the time.
    """
    parallel = config.parallel
    apart = parallel.tensor * data_parallel
    size = message_bytes(config)
    within = size / (device.intra_node_gb * 1e9) + device.intra_node_latency_us * 1e-6
    between = size / (device.inter_node_gb * 1e9) + device.inter_node_latency_us * 1e-6

    def same_node(stage: int, following: int) -> bool:
        return all(
            (stage * apart + rank) // device.devices_per_node
            == (following * apart + rank) // device.devices_per_node
            for rank in range(0, min(apart, device.devices_per_node), parallel.tensor)
        )

    stages = range(parallel.pipeline)
    return tuple(
        within if same_node(stage, (stage + 1) % parallel.pipeline) else between for stage in stages
    )


def gradient_seconds(
    config: RunConfig,
    device: Device,
    data_parallel: int,
    parameters: int,
    *,
    sharded: bool,
    backward: float = 0.0,
    forward: float = 0.0,
) -> float:
    """Time for which a step waits for the replicas' gradients and, if sharded, new parameters.

    Ring: each device sends (d - 1) / d of the data, twice for an all-reduce; latency counts log2(d)
    hops. The group's members within a node share the node's bandwidth.

    Args:
        config: the run.
        device: the device type.
        data_parallel: number of replicas d.
        parameters: on one device.
        sharded: whether each replica updates a part of them, and so needs those gradients only.
        backward: a stage's backward pass of a micro-batch, seconds, with which the reduction
            overlaps under `parallel.overlap_grad_reduce`.
        forward: its forward pass, with which the gather overlaps under
            `parallel.overlap_param_gather`.
    """
    if data_parallel == 1:
        return 0.0
    parallel = config.parallel
    weight = 2 if config.training.precision == "bf16" else 4
    reduced, gathered = (4, weight) if sharded else (2 * 4, 0)
    if parallel.tensor * data_parallel <= device.devices_per_node:
        bandwidth, latency = device.intra_node_gb, device.intra_node_latency_us
    else:
        members = max(1, device.devices_per_node // parallel.tensor)
        bandwidth = min(device.intra_node_gb, members * device.inter_node_gb)
        latency = device.inter_node_latency_us
    one_byte = parameters * (data_parallel - 1) / data_parallel / (bandwidth * 1e9)
    # The bucket that is ready last, or needed first, overlaps with nothing.
    alone = min(1.0, max(_LEAST_BUCKET, _BUCKET_OF_REPLICA * data_parallel) / parameters)
    reduce, gather = reduced * one_byte, gathered * one_byte
    if parallel.overlap_grad_reduce:
        reduce = max(reduce - backward, alone * reduce)
    if parallel.overlap_param_gather:
        gather = max(gather - forward, alone * gather)
    hops = 2 * math.ceil(math.log2(data_parallel))
    return reduce + gather + hops * latency * 1e-6


def update_seconds(config: RunConfig, device: Device, data_parallel: int, parameters: int) -> float:
    """Time of clipping and AdamW on a device's share of parameters, at memory bandwidth."""
    share = parameters / (data_parallel if config.parallel.distributed_optimizer else 1)
    bandwidth = device.memory_bandwidth_gb * 1e9 * device.bandwidth_fraction
    copied = _COPY_BYTES if config.training.precision == "bf16" else 0
    return share * (_UPDATE_BYTES + copied) / bandwidth


def muon_seconds(config: RunConfig, device: Device, muon: MuonLoad) -> float:
    """Time of Muon's update of what its busiest owner has.

    Orthogonalisation at the rate of matrix products; a device that runs ahead of its host takes
    the longer of both times.
    """
    work = muon.update
    on_device = sum(time_parts(work, device, Execution()).values())
    if device.asynchronous:
        on_device = max(on_device, work.kernels * device.kernel_launch_us * 1e-6)
    copied = _COPY_BYTES if config.training.precision == "bf16" else 0
    bandwidth = device.memory_bandwidth_gb * 1e9 * device.bandwidth_fraction
    return on_device + (copied * muon.own + _ZERO_BYTES * muon.buffer) / bandwidth


def stage_closing_seconds(
    config: RunConfig,
    device: Device,
    data_parallel: int,
    parameters: int,
    muon: MuonLoad,
    *,
    passes: Times,
    update: float | None = None,
) -> float:
    """Time between a stage's last backward pass and the next step.

    Args:
        config: the run.
        device: the device type.
        data_parallel: number of replicas.
        parameters: that AdamW updates, on one device.
        muon: Muon's share of the stage.
        passes: of a micro-batch through a chunk, with which communication may overlap.
        update: measured time of the update, seconds, or None.
    """
    seconds = gradient_seconds(
        config,
        device,
        data_parallel,
        parameters,
        sharded=config.parallel.distributed_optimizer,
        backward=passes.backward,
        forward=passes.forward,
    )
    if muon.buffer:
        seconds += gradient_seconds(config, device, data_parallel, muon.buffer, sharded=True)
    if update is not None:
        return seconds + update
    seconds += update_seconds(config, device, data_parallel, parameters)
    return seconds + (muon_seconds(config, device, muon) if muon.buffer else 0.0)


def closing_seconds(
    config: RunConfig,
    device: Device,
    data_parallel: int,
    partition: Partition,
    updates: Sequence[float] | None = None,
) -> float:
    """Time between the last backward pass and the next step that no computation covers.

    Args:
        config: the run.
        device: the device type.
        data_parallel: number of replicas.
        partition: the stages.
        updates: measured time of each stage's update, seconds, or None.
    """
    costs = partition.costs
    # The first stage is the last to finish and the first to begin.
    first = partition.stages[0]
    chunks = len(first.chunks)
    passes = Times(first.forward_seconds / chunks, first.backward_seconds / chunks)
    found = []
    for stage in partition.stages:
        muon = muon_load(config, stage.blocks, data_parallel, costs.muon_bytes)
        matrices = stage.blocks * costs.block.parameters if muon.buffer else 0
        found.append(
            stage_closing_seconds(
                config,
                device,
                data_parallel,
                stage.parameters - matrices,
                muon,
                passes=passes,
                update=None if updates is None else updates[stage.number],
            )
        )
    seconds = max(found)
    if config.model.tie_embeddings and config.parallel.pipeline > 1:
        shared = config.data.vocab_size * config.model.hidden_size // config.parallel.tensor
        seconds += 4 * shared / (device.inter_node_gb * 1e9)
    return seconds
