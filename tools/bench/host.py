"""Calibrate the host model of `keel plan`: Python and autograd per block, on a CPU.

python tools/bench/host.py            # writes keel_megatron/layout/host_times.json
python tools/bench/host.py --show     # prints it
python tools/bench/host.py --update peri_ln  # measures some rules, each in turn with keel

The model runs as on CUDA, with Triton's kernels left out, on tensors so small that arithmetic does
not matter. A block's time is the difference between a model of 10 blocks and one of 2. A chunk's is
that of the small model as a middle stage, without its blocks; the ends are the embedding, the head
and the loss. Processor time of the thread is measured, which other load on the machine hardly adds
to; the lowest decile counts. Each rule runs in a separate process.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from keel_megatron import compat

compat.install()  # before Megatron-core is imported

from keel_megatron.architecture.residual import RULES, streams
from keel_megatron.config.run import RunConfig
from keel_megatron.data.batches import random_batch
from keel_megatron.engines.base import mean_loss
from keel_megatron.engines.build import build_engine
from keel_megatron.layout.host_times import FIGURES
from keel_megatron.model.language_model import build_model
from keel_megatron.runtime.cores import available_cores
from keel_megatron.runtime.device import Launch
from keel_megatron.runtime.distributed import start
from keel_megatron.runtime.machines import cpu_name
from keel_megatron.runtime.versions import package_versions

FEW, MANY = 2, 10
Call = Callable[[], tuple[float, float]]
SAMPLES = 100
SECTIONS: dict[str, dict[str, Any]] = {
    "model": {"hidden_size": 64, "ffn_hidden_size": 64, "num_attention_heads": 1},
    "data": {"seq_length": 16, "vocab_size": 320},
    "optimizer": {"learning_rate": 1e-3},
    "training": {
        "name": "host",
        "steps": 1,
        "global_batch_size": 1,
        "micro_batch_size": 1,
        "precision": "fp32",
        "device": "cpu",
        "threads": 1,
    },
    "tracking": {"mlflow": False},
}


def run_of(rule: str, blocks: int, *, compiled: bool, qk_norm: bool = False) -> RunConfig:
    """A tiny run."""
    sections = SECTIONS | {"kernels": {"compile": compiled}}
    sections["model"] = SECTIONS["model"] | {
        "blocks": blocks,
        "residual": rule,
        "qk_norm": qk_norm,
    }
    return RunConfig.model_validate(sections)


def take_for_cuda() -> None:
    """Have this process run CUDA's Python: tensors claim to be CUDA's, Triton launches nothing."""
    from triton.runtime.jit import KernelInterface

    def nothing(*_args: Any, **_options: Any) -> None:
        """In the place of a launch."""

    interface: Any = KernelInterface
    interface.__getitem__ = lambda _kernel, _grid: nothing
    tensor: Any = torch.Tensor
    tensor.is_cuda = property(lambda _self: True)
    processors = types.SimpleNamespace(multi_processor_count=132)
    torch.cuda.get_device_properties = lambda *_: processors  # type: ignore[assignment]


def passes(engine: Any, batch: Any) -> tuple[float, float]:
    """Processor time of a forward and of a backward pass of one micro-batch, seconds."""
    model: Any = engine.model[0]
    begin = time.thread_time()
    losses = model(batch.tokens, batch.position_ids, None, labels=batch.labels)
    loss = mean_loss(losses, batch.loss_mask, None)
    middle = time.thread_time()
    loss.backward()
    return middle - begin, time.thread_time() - middle


def middle_passes(engine: Any, batch: Any) -> tuple[float, float]:
    """The same of the model's blocks as a middle stage has them."""
    model: Any = engine.model[0].module
    ends = [(model, "pre_process"), (model, "post_process"), (model.decoder, "pre_process")]
    s, b = batch.tokens.T.shape
    rows = streams(engine.config.model) * b
    stream = torch.zeros(s, rows, model.config.hidden_size, requires_grad=True)
    for module, name in ends:
        setattr(module, name, False)
    model.decoder.input_tensor = stream
    begin = time.thread_time()
    out = model(batch.tokens, batch.position_ids, None)
    middle = time.thread_time()
    out.backward(torch.zeros_like(out))
    end = time.thread_time()
    for module, name in ends:
        setattr(module, name, True)
    return middle - begin, end - middle


def deciles(calls: list[Call], samples: int) -> list[list[float]]:
    """The lowest decile of both passes of each call, microseconds; the calls take turns."""
    for call in calls * 3:
        call()
    gc.collect()
    gc.freeze()
    gc.disable()
    rows = [[call() for call in calls] for _ in range(samples)]
    return [
        [statistics.quantiles([row[i][way] for row in rows], n=10)[0] * 1e6 for way in (0, 1)]
        for i in range(len(calls))
    ]


def measure(rule: str, *, compiled: bool, samples: int = SAMPLES) -> dict[str, Any]:
    """Microseconds of both passes per block, per chunk and of the ends. Once a process."""
    runs = [run_of(rule, blocks, compiled=compiled) for blocks in (FEW, MANY)]
    with start(runs[0].parallel, runs[0].training, Launch(0, 1, 0, 1)) as runtime:
        engines = [build_engine(run, runtime, build_model(run, runtime)) for run in runs]
        batch = random_batch(runs[0]).to(runtime.device)
        if not compiled:  # Inductor would compile for a device that is not there
            take_for_cuda()
        calls = [*(partial(passes, one, batch) for one in engines)]
        few, many, middle = deciles([*calls, partial(middle_passes, engines[0], batch)], samples)
    block = [(b - a) / (MANY - FEW) for a, b in zip(few, many, strict=True)]
    chunk = [max(0.0, a - FEW * one) for a, one in zip(middle, block, strict=True)]
    ends = [max(0.0, a - b) for a, b in zip(few, middle, strict=True)]
    return {"block": named(block), "chunk": named(chunk), "ends": named(ends)}


def measure_added(runs: list[RunConfig], samples: int = SAMPLES) -> dict[str, float]:
    """Microseconds of both passes that a block of the second run adds to the first's.

    Both have `MANY` blocks. Once a process.
    """
    with start(runs[0].parallel, runs[0].training, Launch(0, 1, 0, 1)) as runtime:
        engines = [build_engine(run, runtime, build_model(run, runtime)) for run in runs]
        batch = random_batch(runs[0]).to(runtime.device)
        take_for_cuda()
        first, second = deciles([partial(passes, one, batch) for one in engines], samples)
    return named([(b - a) / MANY for a, b in zip(first, second, strict=True)])


def named(pair: list[float]) -> dict[str, float]:
    return {"forward_us": round(pair[0], 1), "backward_us": round(pair[1], 1)}


def in_process(rule: str, *options: str) -> dict[str, Any]:
    """`measure` in a process of its own, which it changes for good."""
    command = [sys.executable, __file__, "--rule", rule, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(rule, *options, found, flush=True)
    return found


def calibrate() -> dict[str, Any]:
    """All figures."""
    found = {rule: in_process(rule) for rule in RULES}
    packages = package_versions()
    return {
        "command": "python tools/bench/host.py",
        "machine": f"one of {available_cores()} cores of {cpu_name()}",
        "date": datetime.date.today().isoformat(),
        "packages": {name: packages[name] for name in ("torch", "megatron-core", "triton")}
        | {"python": platform.python_version()},
        "blocks": {rule: one["block"] for rule, one in found.items()},
        "qk_norm": in_process("keel", "--qk-norm"),
        "compiled_block": in_process("keel", "--compiled")["block"],
        "chunk": found["keel"]["chunk"],
        "ends": found["keel"]["ends"],
    }


def update(rules: list[str]) -> dict[str, Any]:
    """The stored figures with those of some rules: keel's, and what these add in turn with it."""
    figures: dict[str, Any] = json.loads(FIGURES.read_text())
    keel = figures["blocks"]["keel"]
    for rule in rules:
        added = in_process(rule, "--beside-keel")
        figures["blocks"][rule] = {way: round(keel[way] + added[way], 1) for way in keel}
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--show", action="store_true", help="print the stored figures")
    parser.add_argument("--rule", choices=tuple(RULES), help="measure one rule, print it as JSON")
    parser.add_argument("--compiled", action="store_true", help="with kernels.compile")
    parser.add_argument("--qk-norm", action="store_true", help="what model.qk_norm adds")
    parser.add_argument("--beside-keel", action="store_true", help="what it adds to keel")
    parser.add_argument("--update", choices=tuple(RULES), nargs="+", help="measure some rules")
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"passes (default {SAMPLES})")
    chosen = parser.parse_args()
    if chosen.show:
        print(FIGURES.read_text(), end="")
    elif chosen.rule:
        if chosen.qk_norm:
            pair = [run_of(chosen.rule, MANY, compiled=False, qk_norm=n) for n in (False, True)]
            found: Any = measure_added(pair, chosen.samples)
        elif chosen.beside_keel:
            pair = [run_of(rule, MANY, compiled=False) for rule in ("keel", chosen.rule)]
            found = measure_added(pair, chosen.samples)
        else:
            found = measure(chosen.rule, compiled=chosen.compiled, samples=chosen.samples)
        print("\n" + json.dumps(found), flush=True)
    else:
        figures = update(chosen.update) if chosen.update else calibrate()
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
        print(f"wrote {FIGURES}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
