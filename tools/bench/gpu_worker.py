r"""One variant of `tools/bench/gpu.py` in a separate process: times its steps, prints them as JSON.

echo '{"config": ..., "settings": [...], "warmup": 3, "steps": 8}' | \
    python tools/bench/gpu_worker.py

It has imported everything when it reads its order. Needs torch, megatron-core, pydantic and PyYAML
alone. On a CPU it works too, to see that it does.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from keel_megatron import compat

compat.install()  # before Megatron-core is imported

from keel_megatron.architecture.flops import training_flops_per_token
from keel_megatron.bench.timers import PASSES, PartTimers
from keel_megatron.config.load import load_config
from keel_megatron.data.batches import random_batch
from keel_megatron.engines.build import build_engine
from keel_megatron.errors import UserError
from keel_megatron.layout.stages import own_partition
from keel_megatron.model.language_model import build_model
from keel_megatron.runtime.distributed import Runtime, start


def count_kernels(step: Any) -> int:
    """Kernels, copies left out, that one call launches."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    names = [event.name for event in trace.events() if event.device_type == DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in names)


def measure(order: dict[str, Any], runtime: Runtime, config: Any) -> dict[str, Any]:
    """Medians over the steps, the memory's peak, and what was decided."""
    cuda = runtime.device.type == "cuda"
    partition = own_partition(config, runtime)
    engine = build_engine(config, runtime, build_model(config, runtime, partition))
    timers = PartTimers(runtime.device)
    for chunk in engine.chunks:
        chunk.config.timers = timers  # type: ignore[union-attr]
    count = config.training.global_batch_size // config.training.micro_batch_size
    batches = [random_batch(config, number) for number in range(count)]
    seconds, parts, host, losses = [], [], [], []

    def step() -> None:
        losses.append(engine.train_step(batches, count, config.optimizer.learning_rate).loss)

    first = None
    for number in range(order["warmup"] + order["steps"]):
        timers.take()
        begin = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        spent = time.perf_counter() - begin
        first = spent if first is None else first
        if number >= order["warmup"]:
            seconds.append(spent)
            found = timers.take()
            parts.append(found | {"optimizer": spent - found["passes"]})
            host.append(timers.host_seconds)
    tokens = config.training.global_batch_size * config.data.seq_length
    flops = tokens * training_flops_per_token(
        config.model, config.data.seq_length, config.data.vocab_size
    )
    low, middle, high = statistics.quantiles(seconds, n=4)
    result = {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "torch": torch.__version__,
        "step_seconds": middle,
        "quartiles": [low, high],
        "first_step_seconds": first,
        "host_seconds": statistics.median(host),
        "passes_seconds": statistics.median(one["passes"] for one in parts),
        "tokens_per_second": tokens / middle,
        "tflops": flops / middle / 1e12,
        "parts": {
            name: statistics.median(one[name] for one in parts) for name in (*PASSES, "optimizer")
        },
        "losses": losses,
        "recomputed": sum(sum(stage.recomputed) for stage in partition.stages),
        "planned_memory_gb": partition.worst_memory.memory.total / 1e9,
    }
    if cuda:
        result["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        result["reserved_memory_gb"] = torch.cuda.max_memory_reserved() / 1e9
        if order.get("count_kernels"):
            result["kernels"] = count_kernels(step)
    return result


def main() -> None:
    line = sys.stdin.readline()
    if not line:  # nobody wants it any more
        return
    order = json.loads(line)
    try:
        config = load_config(Path(order["config"]), tuple(order["settings"]), world_size=1)
        with start(config.parallel, config.training) as runtime:
            answer = measure(order, runtime, config)
    except (UserError, torch.OutOfMemoryError) as error:
        answer = {"failed": " ".join(str(error).split())[:300]}
    print("\n" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
