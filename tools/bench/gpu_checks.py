"""What to know about a GPU before anything is measured on it: checks of a few minutes.

python tools/bench/gpu_checks.py                # on the GPU; `make bench-gpu` begins with it
python tools/bench/gpu_checks.py --device cpu   # the same code on a CPU, to see that it works
python tools/bench/gpu_checks.py --out FILE.json # the results as JSON, too

Each is something that no CPU can show: what a device's kernels refuse, which of them torch chooses,
real streams, pinned memory, NCCL, the allocator. A check that fails does not end the others.
Exit codes: 0 = all passed, 1 = some failed, 2 = there is no such device.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from gpu_worker import measure

from keel_megatron import compat

compat.install()  # before Megatron-core is imported

from keel_megatron.checkpoint import folder
from keel_megatron.checkpoint.staging import Staging
from keel_megatron.cluster import flight_recorder
from keel_megatron.config.load import load_config
from keel_megatron.config.run import RunConfig
from keel_megatron.data.batches import random_batch
from keel_megatron.engines.build import build_engine
from keel_megatron.kernels import reference, scaled_add_norm
from keel_megatron.kernels.weight_gradients import add_product, adds_directly
from keel_megatron.layout.devices import this_device
from keel_megatron.model.attention_kernel import attention_choice, attention_order, prefer_attention
from keel_megatron.model.language_model import build_model
from keel_megatron.runtime import cuda_environment
from keel_megatron.runtime.distributed import start
from keel_megatron.tracking.metrics import read_metrics
from keel_megatron.training.run import run_training

ONE = ("parallel.pipeline=1", "parallel.virtual_pipeline=1", "tracking.mlflow=false")
SMALL = (
    *ONE,
    "optimizer.name=adamw",
    "training.micro_batch_size=2",
    "model.blocks=8",
    "data.seq_length=64",
    "data.vocab_size=512",
    "training.steps=6",
    "schedule.warmup_steps=2",
    "training.global_batch_size=4",
    "training.precision=bf16",
)
DEMO, PAPER = ROOT / "yaml/demo.yaml", ROOT / "yaml/paper/keel_128.yaml"
PAPER_RUN = (*ONE, "model.blocks=8", "training.global_batch_size=4", "parallel.recompute=none")
TINY = ("model.hidden_size=64", "model.ffn_hidden_size=96", "model.num_attention_heads=4")
TINY = (*TINY, "model.num_query_groups=2", "data.seq_length=16", "data.vocab_size=320")
"""What makes the paper's model small enough for a CPU."""


@dataclass(frozen=True)
class Result:
    """What a check has found."""

    passed: bool
    text: str


def small_run(device: str, *more: str) -> RunConfig:
    """The demo with 8 blocks in bf16."""
    return load_config(DEMO, (*SMALL, f"training.device={device}", *more), world_size=1)


def paper_run(device: str) -> RunConfig:
    """8 blocks of the paper's shape; on a CPU of a tiny one."""
    more = TINY if device == "cpu" else ()
    return load_config(PAPER, (*PAPER_RUN, f"training.device={device}", *more), world_size=1)


def losses(config: RunConfig, steps: int = 2) -> list[tuple[float, float]]:
    """Loss and gradient norm of steps on random tokens."""
    count = config.training.global_batch_size // config.training.micro_batch_size
    batches = [random_batch(config, number) for number in range(count)]
    found = []
    with start(config.parallel, config.training) as runtime:
        engine = build_engine(config, runtime, build_model(config, runtime))
        for _ in range(steps):
            result = engine.train_step(batches, count, config.optimizer.learning_rate)
            found.append((result.loss, result.grad_norm))
    return found


def attention(device: str) -> Result:
    """The attention kernel is the one that `kernels.attention` asks for first."""
    config = paper_run(device)
    with start(config.parallel, config.training) as runtime:
        cuda = runtime.device.type == "cuda"
        prefer_attention(config, runtime.device)
        found = attention_choice(config, runtime.device)
        capability = torch.cuda.get_device_capability() if cuda else (0, 0)
    order = attention_order(config, capability) if cuda else None
    cudnn = torch.backends.cudnn.version() if cuda else None  # type: ignore[no-untyped-call]
    asked = "torch's own order" if order is None else f"asked for {order[0].name} first"
    text = f"torch {torch.__version__} takes {found.name} (cuDNN {cudnn}; {asked})"
    wanted = found.name not in ("MATH", "ERROR") if order is None else found == order[0]
    return Result(wanted, text)


def memory_size(device: str) -> Result:
    """The device's memory is what `keel plan` takes it for."""
    if device == "cpu":
        return Result(True, "a CPU has no limit in a plan")
    planned = this_device(torch.device(device))
    size = torch.cuda.get_device_properties(0).total_memory / 1e9
    text = f"{torch.cuda.get_device_name()}, {size:.1f} GB; planned as {planned.name}, "
    assert planned.memory_gb is not None
    return Result(abs(planned.memory_gb / size - 1) < 0.01, f"{text}{planned.memory_gb:.1f} GB")


def fp64_norm(device: str) -> Result:
    """The join in torch's operators works on the device, in fp64 to rounding."""
    generator = torch.Generator().manual_seed(0)
    x, f = torch.randn(2, 64, 256, generator=generator, dtype=torch.float64).to(device)
    weights = 1 + 0.1 * torch.randn(2, 256, generator=generator, dtype=torch.float64).to(device)
    arguments = (x, f, 16.0, *weights, 1e-5, torch.float64)
    pairs = zip(scaled_add_norm(*arguments), reference.scaled_add_norm(*arguments), strict=True)
    apart = max(float((one - other).abs().max()) for one, other in pairs)  # type: ignore[operator]
    return Result(apart < 1e-12, f"largest difference to the definition {apart:.1e}")


def weight_gradients(device: str) -> Result:
    """bf16 products are added to fp32 sums, exactly to fp32 where one operator does it."""
    a, b = torch.randn(2, 256, 256, device=device).bfloat16()
    sums = torch.full((256, 256), 1000.0, device=device)
    exact = sums.double() + a.double() @ b.double()
    direct = adds_directly(sums, a.dtype)
    add_product(sums, a, b)
    apart = float((sums - exact).abs().max() / 1000)
    how = "in one operator" if direct else "rounded to bf16 and then added"
    return Result(apart < (1e-6 if direct else 1e-3), f"{how}; error {apart:.1e}")


def operators(device: str) -> Result:
    """Triton's kernels and torch's operators train alike."""
    ways = [losses(small_run(device, *more)) for more in ((), ("kernels.triton=[]",))]
    apart = max(
        abs(one / other - 1)
        for here, there in zip(*ways, strict=True)
        for one, other in zip(here, there, strict=True)
    )
    return Result(apart < 1e-2, f"losses and gradient norms differ by at most {apart:.1e}")


def repeats(device: str) -> Result:
    """With `training.deterministic` two runs have the same bits."""
    config = small_run(device, "training.deterministic=true")
    first, second = losses(config, 3), losses(config, 3)
    return Result(first == second, f"losses {[loss for loss, _norm in first]}")


def staging(device: str) -> Result:
    """A save's copies keep what was there when they began; on CUDA they are in pinned memory."""
    place = Staging(torch.device(device))
    tensors = [torch.full((1 << 22,), float(number), device=device) for number in range(8)]
    copies = place.copy(tensors)
    place.wait()
    for tensor in tensors:
        tensor.fill_(-1.0)
    place.ready()
    right = all(bool((copy == number).all()) for number, copy in enumerate(copies))
    pinned = all(copy.is_pinned() for copy in copies) if device != "cpu" else False
    text = f"{'right' if right else 'wrong'} values, {'pinned' if pinned else 'pageable'} memory"
    return Result(right and pinned == (device != "cpu"), text)


def messages(device: str) -> Result:
    """NCCL's flight recorder has messages, and the watchdog can read them."""
    config = small_run(device)
    with start(config.parallel, config.training) as runtime:
        torch.distributed.all_reduce(torch.ones(1, device=runtime.device))
        text = flight_recorder.dump()
        if device == "cpu":
            return Result(True, "gloo has no flight recorder")
        torch.cuda.synchronize()
        found = flight_recorder.read(text or "{}")
    return Result(bool(found.counts), f"collectives by group: {found.counts}")


def training_run(device: str) -> Result:
    """`keel train`: depth profiles, validations and saves; the same losses after a resume."""
    with tempfile.TemporaryDirectory() as home:
        config = [
            *(f"training.device={device}", f"training.runs_dir={home}/runs"),
            *(f"data.cache_dir={home}/data", f"data.text={argparse.__file__}"),
            *("training.deterministic=true", "training.validate_every=3", "checkpoint.every=3"),
            "tracking.depth_every=2",
        ]
        found = []
        for _ in range(2):
            with redirect_stdout(io.StringIO()):
                run = run_training(DEMO, (*SMALL, *config)).folder
            records = [r for r in read_metrics(run / "metrics.jsonl") if "loss" in r]
            found.append([(r["step"], r["loss"], r["grad_norm"]) for r in records])
            for number in folder.steps(run)[1:]:  # leaves that of step 3
                shutil.rmtree(folder.step_folder(run, number))
    reserved = 0 if device == "cpu" else torch.cuda.max_memory_reserved()
    text = f"losses of {len(found[0])} steps, the last {len(found[0]) - 3} again after a resume"
    same = found[0] == found[1] and len(found[0]) == 6
    return Result(same, f"{text}: {'equal' if same else found}; {reserved / 1e9:.2f} GB reserved")


def step(device: str) -> Result:
    """A step of the paper's shape fits its plan; how long the host takes to launch it."""
    config = paper_run(device)
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with start(config.parallel, config.training) as runtime:
        found = measure({"warmup": 2, "steps": 4}, runtime, config)
    host, passes = found["host_seconds"] * 1e3, found["passes_seconds"] * 1e3
    text = f"the host launches the passes in {host:.1f} ms, the device takes {passes:.1f} ms"
    if device == "cpu":
        return Result(host > 0.0 and passes > 0.0, text)
    planned, peak, reserved = (
        found[name] for name in ("planned_memory_gb", "peak_memory_gb", "reserved_memory_gb")
    )
    text += f"; {planned:.2f} GB planned, {peak:.2f} allocated, {reserved:.2f} reserved"
    return Result(abs(planned / peak - 1) < 0.1, text)


CHECKS: dict[str, Callable[[str], Result]] = {
    "attention": attention,
    "memory size": memory_size,
    "fp64 norm": fp64_norm,
    "weight gradients": weight_gradients,
    "operators": operators,
    "repeats": repeats,
    "staging": staging,
    "messages": messages,
    "training run": training_run,
    "step": step,
}
"""By name, the quickest first."""


def run_checks(device: str) -> dict[str, Result]:
    """All checks; prints a line for each as it ends."""
    found: dict[str, Result] = {}
    for name, check in CHECKS.items():
        try:
            result = check(device)
        except Exception as error:  # the next check may work
            traceback.print_exc()
            words = " ".join(str(error).split())[:300]
            result = Result(False, f"{type(error).__name__}: {words}")
        found[name] = result
        gc.collect()  # a check's model is gone before the next one measures memory
        print(f"{'ok' if result.passed else 'FAILED':<7}{name}: {result.text}", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="also write the results there, as JSON")
    chosen = parser.parse_args()
    # CUDA reads its environment once, so what any of the checks needs is set before it starts.
    strictest = small_run(chosen.device, "training.deterministic=true")
    cuda_environment.prepare(strictest.parallel, strictest.training)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device: nothing is checked (--device cpu tries the checks)")
        return 2
    found = run_checks(chosen.device)
    if chosen.out is not None:
        chosen.out.write_text(json.dumps({name: asdict(one) for name, one in found.items()}))
    return 0 if all(result.passed for result in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
