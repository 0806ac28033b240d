"""Every setting that a run may change between two starts is in force afterwards.

All of them, from the configuration's own models: in SEEN with a change and where it shows, in ALIKE
with a change that leaves the mathematics as they are, or in ELSEWHERE with the reason why it does
not concern what a checkpoint brings back. A new setting fails until it stands in one of the three.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.checkpoint import folder
from keel_megatron.checkpoint.identity import may_change
from keel_megatron.config.run import RunConfig
from keel_megatron.tracking.records import StepRecord, ValidationRecord
from keel_megatron.training.learning_rate import learning_rate
from tests.checkpoint.ranks import Ran, full_at, poison, run_in_turn
from tests.engines.deepspeed.ranks import needs_deepspeed
from tests.settings import settings

SAVED, STEPS = 12, 16
ENGINES = ["megatron", *(["deepspeed"] if importlib.util.find_spec("deepspeed") else [])]
Fault = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Seen:
    """A change, and what must differ between the run with it and the one without."""

    value: Any
    look: Callable[[Ran, Path], Any]
    """What to compare, from the run and its folder."""
    given: dict[str, Any] = field(default_factory=dict)
    """Overrides of both."""
    fault: Fault | None = None
    """Done to both."""


def weights(ran: Ran, _run: Path) -> Any:
    """Of all losses after the change, and the weights at the end."""
    return ran.losses, ran.digest


def rates(ran: Ran, _run: Path) -> Any:
    return [record.learning_rate for record in ran.records if isinstance(record, StepRecord)]


def samples(ran: Ran, _run: Path) -> Any:
    return [record.consumed_samples for record in ran.records if isinstance(record, StepRecord)]


def kept(_ran: Ran, run: Path) -> Any:
    return folder.steps(run)


def window(_ran: Ran, run: Path) -> Any:
    state = json.loads((folder.step_folder(run, STEPS) / "state.json").read_text())
    return len(state["extras"]["guard"]["windows"]["loss"])


def findings(ran: Ran, _run: Path) -> Any:
    return [text for text in ran.said if text.startswith("guard")]


def ended(ran: Ran, _run: Path) -> Any:
    return ran.error is None, ran.diverged


def validations(ran: Ran, _run: Path) -> Any:
    return [record.step for record in ran.records if isinstance(record, ValidationRecord)]


BACK = {"guard__action": "rollback", "guard__limit": 1, "checkpoint__every": 1}
EVERY = {"checkpoint__every": 1}
MUON = {"optimizer__name": "muon"}
SEEN: dict[str, Seen] = {
    "optimizer.learning_rate": Seen(1e-3, weights),
    "optimizer.weight_decay": Seen(0.5, weights),
    "optimizer.clip_grad": Seen(0.05, weights),
    "optimizer.beta1": Seen(0.5, weights),
    "optimizer.beta2": Seen(0.5, weights),
    "optimizer.epsilon": Seen(1e-2, weights),
    "optimizer.decay_norms": Seen(True, weights),
    "optimizer.rates": Seen({"embeddings": 0.5, "norms": 2.0}, weights),
    "optimizer.depth_rates": Seen([{"blocks": [1, 1], "factor": 0.1}], weights),
    "optimizer.momentum": Seen(0.5, weights, MUON),
    "optimizer.nesterov": Seen(False, weights, MUON),
    "optimizer.ns_steps": Seen(1, weights, MUON),
    "optimizer.adjust_lr_fn": Seen("original", weights, MUON),
    "schedule.warmup_steps": Seen(20, rates),
    "schedule.decay": Seen("constant", rates),
    "schedule.decay_fraction": Seen(0.9, rates, {"schedule__decay": "wsd"}),
    "schedule.decay_shape": Seen("sqrt", rates, {"schedule__decay": "wsd"}),
    "schedule.min_learning_rate": Seen(1e-3, rates),
    "schedule.rampup_batch_size": Seen({"start": 2, "increment": 2, "samples": 60}, samples),
    "training.steps": Seen(STEPS + 1, rates),
    "training.z_loss": Seen(0.1, weights),
    "training.global_batch_size": Seen(8, samples),
    "training.validate_every": Seen(2, validations),
    "checkpoint.every": Seen(1, kept),
    "checkpoint.keep": Seen(3, kept, EVERY),
    "checkpoint.keep_every": Seen(13, kept, EVERY),
    "checkpoint.on_error": Seen("continue", ended, EVERY, partial(full_at, SAVED + 1)),
    "guard.action": Seen("rollback", findings, {}, partial(poison, [SAVED + 1])),
    "guard.window": Seen(8, window, {"guard__min_steps": 8}),
    "guard.min_steps": Seen(8, findings, {"guard__threshold": 1e-6}),
    "guard.threshold": Seen(1e-6, findings, {"guard__min_steps": 8}),
    "guard.limit": Seen(1, ended, {}, partial(poison, [SAVED + 1, SAVED + 2])),
    "guard.limit_steps": Seen(1, ended, BACK, partial(poison, [SAVED + 1, SAVED + 3])),
}
ALIKE: dict[str, Any] = {  # a tuple holds several changes, a dict one of each engine
    "training.micro_batch_size": 1,
    "training.engine": {"megatron": "deepspeed", "deepspeed": "megatron"},
    "parallel.recompute": ("full", "light"),
    "kernels.logits_mib": 0.05,
    "checkpoint.async_save": False,
    "deepspeed.zero_stage": 3,
    "deepspeed.bucket_size": 20_000,
    "deepspeed.offload_optimizer": True,
}
LAYOUTS = "needs several processes: test_resume.py"
START = "of a start, not of the training: nothing in a checkpoint knows it"
REPORTS = "what is reported, and where: nothing in a checkpoint knows it"
EVALUATES = "of every start anew: tests/evaluation, tests/training/test_loop.py"
OVERLAP = "needs several replicas: tests/engines/megatron/test_overlap.py"
PLACE = "a place: what lies there is fingerprinted (tests/data/test_dataset.py)"
ELSEWHERE = {
    "parallel.tensor": LAYOUTS,
    "parallel.pipeline": LAYOUTS,
    "parallel.virtual_pipeline": LAYOUTS,
    "parallel.sequence": LAYOUTS,
    "parallel.layout": LAYOUTS,
    "parallel.overlap_grad_reduce": OVERLAP,
    "parallel.overlap_param_gather": OVERLAP,
    "parallel.memory_gb": "decides with recompute: auto and layout: null: tests/layout",
    "parallel.timeout_seconds": START,
    "parallel.preflight": START,
    "kernels.backend": "which code computes the same; needs CUDA: tests/model",
    "kernels.attention": "which code computes the same; needs CUDA: tests/model",
    "kernels.triton": "which code computes the same; needs CUDA: tests/kernels",
    "kernels.fp8": "the type of products, of every step anew; needs CUDA: tests/model",
    "kernels.compile": "the same mathematics; takes long to compile: tests/integration",
    "kernels.cuda_graphs": "needs CUDA: tests/kernels",
    "deepspeed.offload_parameters": "the same mathematics: tests/checkpoint/test_deepspeed.py",
    "data.text": PLACE,
    "data.sources": "places, and weights that are part of the data's identity: tests/integration",
    "data.dataset": PLACE,
    "data.build": START,
    "data.tokenizer": PLACE,
    "data.chat_template": PLACE,
    "data.cache_dir": PLACE,
    "data.allow_lossy_tokenizer": "of the building of data: tests/corpus",
    "training.name": PLACE,
    "training.runs_dir": PLACE,
    "training.device": START,
    "training.deterministic": "which CUDA kernels compute the same: tests/runtime",
    "training.threads": START,
    "training.gc_every": "when Python collects garbage: tests/training/test_garbage.py",
    "training.exit_after": START,
    "training.hang_timeout": START,
    "training.initialize_from": START,
    "training.keep_optimizer": START,
    "training.keep_position": START,
    "training.validation_sequences": "of every start anew: tests/data/test_batches.py",
    "evaluation.every": EVALUATES,
    "evaluation.tasks": EVALUATES,
    "evaluation.limit": EVALUATES,
    "evaluation.data": PLACE,
    "tracking.mlflow": REPORTS,
    "tracking.uri": REPORTS,
    "tracking.experiment": REPORTS,
    "tracking.system_metrics_every": REPORTS,
    "tracking.depth_every": REPORTS,
    "tracking.log_every": REPORTS,
    "tracking.sample_prompt": REPORTS,
}


def changeable() -> set[str]:
    """Paths of all settings that a run may change."""
    paths = {
        f"{section}.{name}"
        for section, of in RunConfig.model_fields.items()
        for name in of.annotation.model_fields  # type: ignore[union-attr]
    }
    return {path for path in paths if may_change(path)}


def test_every_changeable_setting_is_looked_at() -> None:
    tables = [set(SEEN), set(ALIKE), set(ELSEWHERE)]
    assert set.union(*tables) == changeable()
    assert sum(map(len, tables)) == len(changeable())


def sections(runs: Path, name: str, engine: str, **overrides: Any) -> dict[str, dict[str, Any]]:
    return settings(
        **{
            "training__runs_dir": str(runs),
            "training__name": name,
            "training__engine": engine,
            "training__steps": STEPS,
            "training__global_batch_size": 4,
            "model__blocks": 2,
            "model__hidden_size": 32,
            "model__ffn_hidden_size": 64,
            **overrides,
        }
    )


@dataclass(frozen=True)
class Resumed:
    """A run that goes on from the common checkpoint."""

    ran: Ran
    run: Path
    config: RunConfig


def plan(engine: str) -> dict[str, tuple[dict[str, Any], Any]]:
    """Name of a run -> its overrides and its fault."""
    found: dict[str, tuple[dict[str, Any], Any]] = {"unchanged": ({}, None)}
    for path, seen in SEEN.items():
        if engine == "deepspeed" and path.startswith(("checkpoint.", "guard.")):
            continue  # of the loop, which is the same
        if engine == "deepspeed" and seen.given == MUON:
            continue  # refused
        override = {path.replace(".", "__"): seen.value}
        if seen.given or seen.fault:
            found[f"without.{path}"] = (seen.given, seen.fault)
        found[path] = ({**seen.given, **override}, seen.fault)
    for path, value in ALIKE.items():
        if engine == "deepspeed" or not path.startswith("deepspeed."):
            chosen = value[engine] if isinstance(value, dict) else value
            for one in chosen if isinstance(chosen, tuple) else (chosen,):
                found[f"{path}.{one}"] = ({path.replace(".", "__"): one}, None)
    return found


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Resumed]]:
    """Of each engine the runs by name, all from copies of one checkpoint an optimizer."""
    runs = tmp_path_factory.mktemp("runs")
    origins = {
        name: sections(runs, f"origin-{name}", "megatron", training__steps=SAVED, **overrides)
        for name, overrides in {"adamw": {}, "muon": MUON}.items()
    }
    planned = [(e, n, *how) for e in ENGINES for n, how in plan(e).items()]
    configs, faults = [], {}
    for engine, name, overrides, fault in planned:
        copy = f"{engine}.{name}"
        origin = f"origin-{overrides.get('optimizer__name', 'adamw')}"
        configs.append(sections(runs, copy, engine, **overrides))
        faults[copy] = partial(copied, runs / origin, runs / copy, fault)
    (adamw,), (muon,), *ran = run_in_turn(1, [*origins.values(), *configs], faults)
    assert adamw.error is muon.error is None
    found: dict[str, dict[str, Resumed]] = {engine: {} for engine in ENGINES}
    for (engine, name, *_), config, (run,) in zip(planned, configs, ran, strict=True):
        parsed = RunConfig.model_validate(config)
        found[engine][name] = Resumed(run, parsed.training.folder, parsed)
    return found


def copied(origin: Path, run: Path, fault: Fault | None, patch: pytest.MonkeyPatch) -> None:
    """The run begins from a copy of another, with a fault if there is one."""
    shutil.copytree(origin, run)
    if fault is not None:
        fault(patch)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_changed_setting_is_in_force(engine: str, resumed: dict[str, dict[str, Resumed]]) -> None:
    runs = resumed[engine]
    for path, seen in SEEN.items():
        if path not in runs:
            continue
        without = runs[f"without.{path}" if f"without.{path}" in runs else "unchanged"]
        changed = runs[path]
        assert changed.ran.resumed == f"step_{SAVED:08d}"
        assert seen.look(changed.ran, changed.run) != seen.look(without.ran, without.run), path


@pytest.mark.parametrize("engine", ENGINES)
def test_the_schedule_is_that_of_the_new_settings(
    engine: str, resumed: dict[str, dict[str, Resumed]]
) -> None:
    """To the last bit, at every step."""
    for path, found in resumed[engine].items():
        if path.startswith(("schedule.", "training.steps", "optimizer.learning_rate")):
            config = found.config
            assert rates(found.ran, found.run) == [
                learning_rate(step, config.training.steps, config.optimizer, config.schedule)
                for step in range(SAVED + 1, config.training.steps + 1)
            ]


@pytest.mark.parametrize("engine", ENGINES)
def test_what_leaves_the_mathematics_alone_goes_on_alike(
    engine: str, resumed: dict[str, dict[str, Resumed]]
) -> None:
    runs = resumed[engine]
    for name in (name for name in runs if name.startswith(tuple(ALIKE))):
        assert runs[name].ran.error is None, name
        assert_alike(runs[name], runs["unchanged"], name)


@needs_deepspeed
def test_both_engines_do_the_same_with_a_changed_optimizer(
    resumed: dict[str, dict[str, Resumed]],
) -> None:
    """Had an engine kept an old setting, it would be alone with that."""
    shared = resumed["megatron"].keys() & resumed["deepspeed"].keys()
    for path in (path for path in SEEN if path.startswith("optimizer.") and path in shared):
        assert_alike(resumed["megatron"][path], resumed["deepspeed"][path], path)


def assert_alike(one: Resumed, other: Resumed, path: str) -> None:
    """Losses and gradient norms but for rounding."""
    for here, there in zip(one.ran.losses, other.ran.losses, strict=True):
        assert here == pytest.approx(there, rel=1e-4), path
