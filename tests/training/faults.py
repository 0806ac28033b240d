"""What the ranks of the guard's tests run."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

import yaml
from keel_megatron.checkpoint.state import Position
from keel_megatron.config.run import RunConfig
from keel_megatron.data.dataset import open_dataset
from keel_megatron.engines.base import Engine, StepResult
from keel_megatron.engines.build import build_engine
from keel_megatron.engines.megatron.engine import MegatronEngine
from keel_megatron.engines.megatron.optimizer import set_learning_rate
from keel_megatron.model.language_model import build_model
from keel_megatron.runtime.distributed import Runtime, start
from keel_megatron.tracking.metrics import read_metrics
from keel_megatron.training import diagnose, run
from keel_megatron.training.dataset import ready_dataset
from keel_megatron.training.learning_rate import learning_rate
from keel_megatron.training.ready import open_batches
from tests.training.ranks import made_up_batches

RATE = 1e-3
BLOCK = 6


def try_engines(runs: list[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """`try_engine` of several runs, one after the other in the same processes."""
    found = []
    for sections in runs:
        config = RunConfig.model_validate(sections)
        with start(config.parallel, config.training) as runtime:
            found.append(try_engine(config, runtime))
    return found


def try_engine(config: RunConfig, runtime: Runtime) -> dict[str, Any]:
    """Refuse an update, take others, make faults; digests of all state between."""
    batches = [made_up_batches(config, runtime, step) for step in range(3)]
    found: dict[str, Any] = {}
    engine = MegatronEngine(config, runtime, build_model(config, runtime))
    step(engine, batches[0])
    found["before"] = digest(engine)
    norms: list[list[float]] = []

    def refuse(_result: StepResult) -> bool:
        norms.append(diagnose.gradient_norms(engine, config.model.blocks + 2))
        return False

    refused = engine.train_step(batches[1], len(batches[1]), 1e6 * RATE, refuse)
    found["norms"], found["grad_norm"] = norms[0], refused.grad_norm
    found["after"] = digest(engine)
    step(engine, batches[2])
    found["later"] = digest(engine)

    for name, train in (("never_asked", step), ("megatrons", megatrons_step)):
        other = MegatronEngine(config, runtime, build_model(config, runtime))
        train(other, batches[0])
        train(other, batches[2])
        found[name] = digest(other)
    found["where"] = [where(engine, batches[0], fault) for fault in ("gradient", "weight", "large")]
    return found


def step(engine: MegatronEngine, batches: list[Any]) -> StepResult:
    return engine.train_step(batches, len(batches), RATE)


def megatrons_step(engine: MegatronEngine, batches: list[Any]) -> None:
    """The passes, then Megatron-core's `optimizer.step` as it is."""
    for chunk in engine.model:
        chunk.train()
        chunk.zero_grad_buffer()
    engine.optimizer.zero_grad()
    engine._run(batches, len(batches), forward_only=False)
    set_learning_rate(engine.optimizer, engine.config, RATE)
    engine.optimizer.step()


def digest(engine: MegatronEngine) -> str:
    """Of every bit of the weights and of all that the optimizer keeps."""
    total = hashlib.sha256()
    for chunk in engine.chunks:
        for parameter in chunk.parameters():
            total.update(parameter.detach().float().numpy().tobytes())
    for inner in engine.optimizer.chained_optimizers:
        for group in inner.optimizer.param_groups:
            for parameter in group["params"]:
                total.update(parameter.detach().float().numpy().tobytes())
                for _key, value in sorted(inner.optimizer.state[parameter].items()):
                    total.update(torch.as_tensor(value).float().numpy().tobytes())
    if engine.config.optimizer.name == "muon":
        for chunk in engine.chunks:
            for parameter in chunk.parameters():
                if engine.state.shards.owned(parameter) is not None:
                    for value in engine.state.shards.states(parameter).values():
                        total.update(value.float().numpy().tobytes())
    return total.hexdigest()


def where(engine: MegatronEngine, batches: list[Any], fault: str) -> str:
    """What is said about a step with a fault in block 6, on one rank that has it."""
    said: list[str] = []
    weights = [
        layer.mlp.linear_fc2.weight
        for chunk in engine.chunks
        for layer in chunk.decoder.layers  # type: ignore[union-attr]
        if layer.layer_number == BLOCK
    ]
    undo = [make(fault, weight) for weight in weights if engine.runtime.data_rank == 0]

    def ask(result: StepResult) -> bool:
        said.append(diagnose.describe(engine, batches, result.loss))
        return False

    engine.train_step(batches, len(batches), RATE, ask)
    for take_back in undo:
        take_back()
    return said[0]


def make(fault: str, weight: nn.Parameter) -> Any:
    """Make a fault; what takes it back."""
    if fault == "weight":
        kept = weight.detach().clone()
        weight.data[0, 0] = torch.nan

        def take_back() -> None:
            weight.data.copy_(kept)

        return take_back
    factor = torch.nan if fault == "gradient" else 1e4
    return weight.register_hook(lambda gradient: gradient * factor).remove


class PoisonedBatch:
    """Makes a gradient NaN in the batch of this number."""

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._hook: Any = None

    def __call__(self, position: Position, engine: Engine) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if position.consumed_samples == self._batch * engine.config.training.global_batch_size:
            parameter = next(engine.chunks[0].parameters())
            self._hook = parameter.register_hook(lambda gradient: gradient * torch.nan)


def roll_back(path: Path) -> tuple[Any, Any, str]:
    """A run that is rolled back, and the same steps by hand: (loss, gradient norm) of each.

    Args:
        path: the run's YAML; every rank reads it, so the test writes it before they start.
    """
    outcome = run.run_training(path, before_step=PoisonedBatch(3))
    reported = [
        (line["loss"], line["grad_norm"])
        for line in read_metrics(outcome.folder / "metrics.jsonl")
        if "loss" in line
    ]
    config = RunConfig.model_validate(yaml.safe_load(path.read_text()))
    folder = ready_dataset(config, print, on_one_machine=True)
    with start(config.parallel, config.training) as runtime:
        source = open_batches(config, runtime, open_dataset(folder, config.data)).train
        engine = build_engine(config, runtime, build_model(config, runtime))
        expected = []
        size, steps = config.training.global_batch_size, config.training.steps
        for number, batch in enumerate((0, 1, 4, 5, 6), start=1):
            rate = learning_rate(number, steps, config.optimizer, config.schedule)
            batches = list(source.micro_batches(batch * size, size))
            result = engine.train_step(batches, len(batches), rate)
            expected.append((result.loss, result.grad_norm))
    return reported, expected, (outcome.folder / "log.txt").read_text()
