"""What a tracing process imports; the processes of tests/planner/trace/strict.py start with it."""

import megatron.core.optimizer
import torch
import torch._dynamo
import torch._subclasses.fake_tensor
import torch.testing._internal.distributed.fake_pg

import keel_megatron.checkpoint.sharding
import keel_megatron.depth.collector
import keel_megatron.engines.build
import keel_megatron.model.language_model
import keel_megatron.planner.trace.rank  # noqa: F401
