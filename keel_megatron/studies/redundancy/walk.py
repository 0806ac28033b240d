"""One walk down the depth: the losses of a batch of sequences with each unit removed.

The stream of the whole model, the trunk, goes down once. Where a unit begins, the stream without it
branches off and runs through what follows; several of them run together, one after another along
the batch. So a removal costs only what follows it, and besides the trunk at one depth and the
variants under way no stream is kept.

Over pipeline stages the same happens in a row: a stage hands on the variants of the stages before
it, group after group, then its own, then the trunk. The stages work at the same time, on different
groups. Later stages have more to do, since every variant passes them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from keel_megatron.data.batches import Batch
from keel_megatron.runtime.distributed import Runtime
from keel_megatron.studies.redundancy.stage import Stage
from keel_megatron.studies.redundancy.units import NOTHING, Unit, sub_layers_of


@dataclass(frozen=True)
class Found:
    """What one removal did to a batch."""

    unit: int
    """The number of the unit, or NOTHING."""
    losses: list[float]
    """Summed loss of each sequence, nats."""
    angles: list[float]
    """Mean angular distance of each sequence between the streams before and after the unit, in the
    whole model; of NOTHING none."""


@dataclass
class _Group:
    """Variants that run together."""

    units: list[int]
    x: Tensor
    """[s, variants x b, h]."""
    angles: Tensor
    """[variants, b]."""


class Walk:
    """Walks batches down the model; every rank calls `run` with the same units.

    Args:
        stage: this rank's part of the model.
        stages: the sub-layers of every stage.
        unit: what is removed.
        batch_size: sequences that run together at most, all variants counted; one variant of a
            batch runs in any case.
        hidden_size: h.
        runtime: this rank's place.

    Attributes:
        is_last: whether this stage has the results.
    """

    def __init__(
        self,
        stage: Stage,
        stages: Sequence[range],
        unit: Unit,
        batch_size: int,
        hidden_size: int,
        runtime: Runtime,
    ) -> None:
        self.stage, self._stages, self._unit = stage, stages, unit
        self._batch_size, self._hidden_size, self._runtime = batch_size, hidden_size, runtime
        self._is_first = runtime.pipeline_rank == 0
        self.is_last = runtime.pipeline_rank == runtime.pipeline_size - 1
        self._size = (0, 0)

    @torch.inference_mode()
    def run(
        self,
        batch: Batch,
        size: tuple[int, int],
        units: Sequence[int],
        found: Callable[[Found], None],
    ) -> None:
        """Measure a batch; collective.

        Args:
            batch: the sequences, on this rank's device.
            size: how many, b, and tokens of each, s.
            units: those to remove, ascending; without any removed it is measured in any case.
            found: called on the last stage with each result.
        """
        b, s = self._size = size
        self.stage.begin(batch, b, s)
        for earlier in range(self._runtime.pipeline_rank):
            for group in self._groups(earlier, units):
                self._finish(self._received(group), self.stage.sub_layers, found)
        trunk = self.stage.embedded() if self._is_first else self._received([]).x
        at = self.stage.sub_layers.start
        for group in self._groups(self._runtime.pipeline_rank, units):
            trunk, at = self._branched(group, trunk, at, found)
        rest = range(at, self.stage.sub_layers.stop)
        self._finish(_Group([], trunk, trunk.new_empty((0, b))), rest, found)

    def _groups(self, stage: int, units: Sequence[int]) -> Iterator[list[int]]:
        """The groups of units that a stage removes."""
        held = self._stages[stage]
        own = iter([unit for unit in units if sub_layers_of(unit, self._unit).start in held])
        variants = max(1, self._batch_size // self._size[0])
        while group := list(itertools.islice(own, variants)):
            yield group

    def _branched(
        self, units: list[int], trunk: Tensor, at: int, found: Callable[[Found], None]
    ) -> tuple[Tensor, int]:
        """Let a group's variants branch off, and finish them; the trunk after the last, and where.

        Args:
            units: the group.
            trunk: the stream [s, b, h] before sub-layer `at`.
            at: a sub-layer of this stage.
            found: called with results.
        """
        stack: list[Tensor] = []
        angles = []
        for unit in units:
            removed = sub_layers_of(unit, self._unit)
            trunk, stack = self._through(range(at, removed.start), trunk, stack)
            variant = before = trunk
            for l in removed:
                variant = self.stage.without(l, variant)
            trunk, stack = self._through(removed, trunk, stack)
            angles.append(angular_distance(before, trunk).mean(0))
            stack = [torch.cat([*stack, variant], 1)]
            at = removed.stop
        rest = range(at, self.stage.sub_layers.stop)
        self._finish(_Group(units, stack[0], torch.stack(angles)), rest, found)
        return trunk, at

    def _through(
        self, sub_layers: range, trunk: Tensor, stack: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The trunk and the stack of variants, if there is one, after sub-layers."""
        trunk = self._passed(sub_layers, trunk)
        return trunk, [self._passed(sub_layers, x) for x in stack]

    def _passed(self, sub_layers: range, x: Tensor) -> Tensor:
        """A stream [s, n b, h] after sub-layers of this stage."""
        for l in sub_layers:
            x = self.stage.apply(l, x)
        return x

    def _finish(self, group: _Group, rest: range, found: Callable[[Found], None]) -> None:
        """Run a group through the rest of this stage, and hand it on or take its losses."""
        x = self._passed(rest, group.x)
        if not self.is_last:
            to = self._neighbour(1)
            dist.send(x.contiguous(), to)
            if group.units:
                dist.send(group.angles.contiguous(), to)
            return
        losses, angles = self.stage.losses(x).tolist(), group.angles.tolist()
        for number, unit in enumerate(group.units or [NOTHING]):
            found(Found(unit, losses[number], angles[number] if group.units else []))

    def _received(self, units: list[int]) -> _Group:
        """A group of the previous stage; without units, the trunk."""
        b, s = self._size
        device = self._runtime.device
        x = torch.empty((s, max(1, len(units)) * b, self._hidden_size), device=device)
        angles = torch.empty((len(units), b), device=device)
        dist.recv(x, self._neighbour(-1))
        if units:
            dist.recv(angles, self._neighbour(-1))
        return _Group(units, x, angles)

    def _neighbour(self, difference: int) -> int:
        """Global rank of this tensor rank on the next or previous stage."""
        return self._runtime.rank + difference * self._runtime.tensor_size


def angular_distance(x: Tensor, y: Tensor) -> Tensor:
    """The angle between two streams [..., h] as a part of pi: [...], from 0 to 1.

    d(x, y) = arccos(x y / (|x| |y|)) / pi, as Gromov et al. (arXiv 2403.17887) compare the streams
    at two depths. In the form 2 atan2(|u - v|, |u + v|) of the directions u and v, because the
    cosine of an angle of 1/1024 differs from 1 by no more than fp32 can tell.
    """
    u, v = (z / torch.linalg.vector_norm(z, dim=-1, keepdim=True) for z in (x, y))
    difference, total = (torch.linalg.vector_norm(z, dim=-1) for z in (u - v, u + v))
    return 2 / math.pi * torch.atan2(difference, total)
