"""What the ranks of the tests of masters and moments run: engines with made-up state."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from keel_megatron.checkpoint import folder, megatron_state, state
from keel_megatron.checkpoint.saver import Saver
from keel_megatron.checkpoint.state import Position
from keel_megatron.config.run import RunConfig
from keel_megatron.runtime.distributed import Runtime, start
from keel_megatron.training.origin import config_of
from tests.checkpoint.ranks import Recorder, Sections
from tests.training.ranks import made_up_batches

STATES = ("param", "exp_avg", "exp_avg_sq", "momentum_buffer")
"""Of AdamW's and of Muon's parameters."""


@contextmanager
def engine_of(sections: Sections) -> Iterator[tuple[RunConfig, Runtime, Any]]:
    """The Megatron engine of a run, until the end of the block."""
    from keel_megatron.engines.build import build_engine
    from keel_megatron.model.language_model import build_model

    config = RunConfig.model_validate(sections)
    with start(config.parallel, config.training) as runtime:
        yield config, runtime, build_engine(config, runtime, build_model(config, runtime))


def made_up(key: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """A global tensor that every rank of every layout makes alike."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {key}".encode()))
    return torch.randn(shape, generator=generator)


def expected(chunk: torch.nn.Module, seed: int) -> dict[int, dict[str, Tensor]]:
    """This rank's whole state of each parameter, cut by Megatron-core's own description."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {"singleton_local_shards": False, "dp_cp_group": group}
    found: dict[int, dict[str, Tensor]] = {}
    for item in chunk.sharded_state_dict(metadata=metadata).values():  # type: ignore[operator]
        if isinstance(item, ShardedTensorFactory):
            parts, merge = item.build(), item.merge_fn
        elif isinstance(item, ShardedTensor):
            parts, merge = [item], torch.cat
        else:
            continue
        found[id(item.data)] = {
            name: merge(
                [
                    made_up(f"{name} {part.key}", part.global_shape, seed)[part.global_slice()]
                    for part in parts
                ]
            ).reshape(-1)
            for name in STATES
        }
    return found


def owned(engine: Any) -> Iterator[tuple[str, Any, slice, dict[str, Tensor]]]:
    """Name, parameter, elements and states of all that this rank's optimizer updates."""
    for chunk in engine.chunks:
        for key, parameter in chunk.named_parameters():
            own = engine.state.shards.owned(parameter)
            if own is not None:
                yield key, parameter, own, engine.state.shards.states(parameter)


def fill(engine: Any, seed: int) -> None:
    """Give an engine made-up masters and moments, and the weights that follow from them."""
    wanted = {k: v for chunk in engine.chunks for k, v in expected(chunk, seed).items()}
    for _key, parameter, own, states in owned(engine):
        for name, values in states.items():
            values.copy_(wanted[id(parameter)][name][own])
    engine.state.apply(seed)


def differences(engine: Any, seed: int) -> list[str]:
    """What of an engine is not, to the last bit, as `fill` would make it."""
    found = [] if engine.state.shards.updates == seed else ["updates"]
    found += wrong_weights(engine, seed)
    wanted = {k: v for chunk in engine.chunks for k, v in expected(chunk, seed).items()}
    for key, parameter, own, states in owned(engine):
        whole = wanted[id(parameter)]
        assert len(states) == (2 if "momentum_buffer" in states else 3)
        found += [f"{n} {key}" for n in states if not torch.equal(states[n], whole[n][own])]
    return found


def wrong_weights(engine: Any, seed: int) -> list[str]:
    """Which weights are not, to the last bit, the casts of `fill`'s masters."""
    wanted = {k: v for chunk in engine.chunks for k, v in expected(chunk, seed).items()}
    return [
        f"weight {key}"
        for chunk in engine.chunks
        for key, parameter in chunk.named_parameters()
        if not torch.equal(
            parameter, wanted[id(parameter)]["param"].to(parameter.dtype).view(parameter.shape)
        )
    ]


def path_of(sections: Sections) -> Path:
    return folder.step_folder(RunConfig.model_validate(sections).training.folder, 1)


def save_all(runs: list[Sections], seeds: list[int]) -> list[int]:
    """Save made-up state at each layout; the bytes of tensors that this rank has written."""
    written = []
    for sections, seed in zip(runs, seeds, strict=True):
        with engine_of(sections) as (config, runtime, engine):
            fill(engine, seed)
            saver = Saver(config, runtime, Recorder(config), data={})
            saver.save(engine.state, Position(1, 0), {})
            for _key, _parameter, _own, states in owned(engine):
                for values in states.values():
                    values.fill_(-1.0)  # the save has copied
            saver.finish()
            assert saver.failure is None
            written.append(sum(piece_bytes(engine)))
    return written


def piece_bytes(engine: Any) -> list[int]:
    return [p.values.nbytes for p in engine.state.to_save(copy=False).pieces]


def load_all(runs: list[Sections], saved: dict[str, int]) -> dict[tuple[str, str], list[str]]:
    """At each layout what differs after loading each checkpoint, by names of both."""
    found = {}
    for sections in runs:
        with engine_of(sections) as (config, runtime, engine):
            for path, seed in saved.items():
                if config_of(Path(path)).optimizer.name != config.optimizer.name:
                    continue
                state.load(Path(path), config, runtime, engine.state)
                wrong = differences(engine, seed)
                fill(engine, 0)
                state.load_weights(Path(path), runtime, engine.chunks)  # as for generation
                wrong += [f"{name} alone" for name in wrong_weights(engine, seed)]
                found[path, sections["training"]["name"]] = wrong
    return found


@dataclass(frozen=True)
class Saving:
    """What a save took on a rank."""

    written: int
    """Bytes of tensors."""
    numel: int
    """Elements of this rank's parameters."""
    to_save: list[str]
    """Collectives that `to_save` has called."""
    whole_save: list[tuple[str, str, int]]
    """Those of a whole save: name, type and bytes of the largest tensor."""
    to_read: list[str]
    """Collectives that `read` has called."""


class Collectives(TorchDispatchMode):
    """Records all collectives below whatever calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            largest = max(tensors, key=lambda tensor: tensor.nbytes, default=torch.empty(0))
            self.seen.append((func.__name__, str(largest.dtype), largest.nbytes))
        return func(*args, **(kwargs or {}))


def measure(sections: Sections) -> Saving:
    """One save and one load of made-up state, with the collectives that they take."""
    with engine_of(sections) as (config, runtime, engine):
        fill(engine, 1)
        with Collectives() as alone:
            engine.state.to_save(copy=True)
        saver = Saver(config, runtime, Recorder(config), data={})
        with Collectives() as whole:
            saver.save(engine.state, Position(1, 0), {})
            saver.finish()
        with Collectives() as reading:
            path = path_of(sections)
            index = state.read_json(path / state.INDEX)
            engine.state.read(path, index, {"optimizer": {"updates": 1}})
        numel = sum(p.numel() for chunk in engine.chunks for p in chunk.parameters())
        names = [name for name, _dtype, _bytes in alone.seen]
        to_read = [name for name, _dtype, _bytes in reading.seen]
        return Saving(sum(piece_bytes(engine)), numel, names, whole.seen, to_read)


def staged_devices(sections: Sections) -> tuple[list[str], list[str]]:
    """Types of the devices that a waiting save stages: as it is, and with its state elsewhere."""
    devices: list[str] = []

    class Recorded:
        ready = None

        def __init__(self, device: torch.device) -> None:
            devices.append(device.type)

        def copy(self, tensors: list[Tensor]) -> list[Tensor]:
            return tensors

    with engine_of(sections) as (_config, _runtime, engine), pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron_state, "Staging", Recorded)
        engine.state.to_save(copy=False)
        here, shares = list(devices), list(engine.state._shares())
        elsewhere = [
            (one, start, {name: values.to("meta") for name, values in states.items()})
            for one, start, states in shares
        ]
        patch.setattr(engine.state, "_shares", lambda: iter(elsewhere))
        engine.state.to_save(copy=False)
        return here, devices


def order_of_a_step(sections: Sections) -> list[str]:
    """What a step calls of waiting for a save's copies and of Megatron-core's update."""
    with engine_of(sections) as (config, runtime, engine):
        order: list[str] = []
        update = engine.optimizer.step_with_ready_grads
        engine.state.before_update = lambda: order.append("wait")
        engine.optimizer.step_with_ready_grads = lambda: [order.append("update"), update()][1]
        batches = made_up_batches(config, runtime, 0)
        engine.train_step(batches, len(batches), 1e-3)
        return order
