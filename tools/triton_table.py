"""Compile the Triton kernels for GPUs that are not there: registers and spills of each.

python tools/triton_table.py                  # all shapes; writes docs/benchmarks/triton.md
python tools/triton_table.py --check          # one shape of every kernel; fails above the bounds
python tools/triton_table.py --check --all    # all shapes

Triton compiles for a compute capability without a device. What is compiled are the launches of the
operations themselves, made on meta tensors. The PTX goes through the assembler that Triton ships
with once more, for its report (ptxas -v).
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if __name__ == "__main__":  # read when Triton and the kernels are imported
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from keel_megatron.kernels import (
    scaled_add_norm,
    triton_cross_entropy,
    triton_norm,
    triton_norm_rotary,
    triton_rotary,
    triton_swiglu,
)
from keel_megatron.kernels.cross_entropy import linear_cross_entropy
from keel_megatron.kernels.swiglu import swiglu
from keel_megatron.model.rotary import split_rotary

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "triton.md"
CAPABILITIES = (80, 90, 100)
REGISTERS = 65536
"""Of a multiprocessor, of every capability above."""
HEAD = """# Compiled Triton kernels

`python tools/triton_table.py` ({date}, Triton {triton}, {machine}): every Triton
kernel, compiled for three compute capabilities without a GPU. The kernels were not run. The `sm`
columns are registers per thread, and bytes spilled to memory if there are any. Programs: how many
programs fit into the registers of a multiprocessor at once, for the capability with the fewest. The
last two columns are the bounds that `tests/kernels/test_compiled.py` checks.

| kernel | shape | threads | {capabilities} | programs | programs, at least | spilled, at most |
|---|---|-:|{rules}-:|-:|-:|
"""


@dataclass(frozen=True)
class Case:
    """A forward and backward pass on meta tensors, and the bounds of its kernels."""

    name: str
    shape: str
    run: Callable[[], Any]
    programs: int
    """Programs whose registers a multiprocessor must hold at once."""
    spilled: int = 0
    """Bytes per thread, at most."""
    quick: bool = False


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its arguments and the constants."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


@dataclass(frozen=True)
class Compiled:
    """What the assembler says of a kernel for one compute capability."""

    registers: int
    spilled: int


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def norm(h: int, outer: bool = True, inner: bool = True) -> Callable[[], Any]:
    def run() -> None:
        x = meta(4096, 1, h, dtype=torch.float32).requires_grad_()
        weights = [meta(h, dtype=torch.float32) if given else None for given in (outer, inner)]
        out = scaled_add_norm(
            x, meta(4096, 1, h), 128.0, *weights, 1e-5, torch.bfloat16, backend="triton"
        )
        given = [one for one in out if one is not None]
        if inner:  # of light recomputation
            triton_norm.ScaledAddNorm.recompute(out[0].grad_fn, torch.empty_like(out[1]))
        torch.autograd.backward(given, [torch.empty_like(one) for one in given])

    return run


def rotary(
    head_dim: int, groups: int, shared: int, dtype: torch.dtype, norms: str = ""
) -> Callable[[], Any]:
    def run() -> None:
        mixed = meta(4096, 1, groups * (shared + 2) * head_dim, dtype=dtype).requires_grad_()
        table = meta(2, 4096, 1, 1, head_dim, dtype=dtype)
        gains = [meta(head_dim, dtype=torch.float32) if part in norms else None for part in "qkv"]
        weights: Any = tuple(gains) if norms else None
        out = split_rotary(mixed, table, groups, "triton", norms=weights, eps=1e-5)
        torch.autograd.backward(out, [torch.empty_like(one) for one in out])

    return run


def feed_forward(f: int, dtype: torch.dtype) -> Callable[[], Any]:
    def run() -> None:
        out = swiglu(meta(4096, 1, 2 * f, dtype=dtype).requires_grad_(), "triton")
        out.backward(torch.empty_like(out))

    return run


def loss(v: int, dtype: torch.dtype) -> Callable[[], Any]:
    def run() -> None:
        x = meta(4096, 64, dtype=dtype).requires_grad_()
        labels = meta(4096, dtype=torch.int64)
        weight = meta(v, 64, dtype=dtype)
        losses = linear_cross_entropy(x, weight, labels, rows=4096, backend="triton")
        losses.backward(torch.empty_like(losses))

    return run


BF16, FP32 = torch.bfloat16, torch.float32
NORM, ROTARY, SWIGLU, LOSS = "scaled add + norms", "rotary", "SwiGLU", "cross entropy"
CASES = (
    Case(NORM, "h 64", norm(64), 3),
    Case(NORM, "h 1024", norm(1024), 3, quick=True),
    Case(NORM, "h 1024, outer norm only", norm(1024, inner=False), 3),
    Case(NORM, "h 1024, inner norm only", norm(1024, outer=False), 3),
    Case(NORM, "h 1024, no norm", norm(1024, outer=False, inner=False), 3),
    Case(NORM, "h 2048", norm(2048), 2),
    Case(NORM, "h 4096", norm(4096), 1),
    Case(NORM, "h 8192", norm(8192), 1, spilled=400),
    Case(NORM, "h 16384", norm(16384), 1, spilled=1000),
    Case(ROTARY, "head size 64, bf16", rotary(64, 8, 2, BF16), 8, quick=True),
    Case(ROTARY, "head size 64, fp32", rotary(64, 8, 2, FP32), 8),
    Case(ROTARY, "head size 80, bf16", rotary(80, 3, 3, BF16), 8),
    Case(ROTARY, "head size 128, bf16", rotary(128, 8, 4, BF16), 8),
    Case(ROTARY, "head size 256, bf16", rotary(256, 1, 8, BF16), 8),
    Case(ROTARY, "head size 64, bf16, QK-norm", rotary(64, 8, 2, BF16, "qk"), 6, quick=True),
    Case(ROTARY, "head size 80, fp32, QKV-norm", rotary(80, 3, 3, FP32, "qkv"), 6),
    Case(ROTARY, "head size 128, bf16, QK-norm", rotary(128, 8, 4, BF16, "qk"), 6, spilled=16),
    Case(SWIGLU, "f 3072, bf16", feed_forward(3072, BF16), 8, quick=True),
    Case(SWIGLU, "f 3072, fp32", feed_forward(3072, FP32), 8),
    Case(SWIGLU, "f 2752, bf16", feed_forward(2752, BF16), 8),
    Case(LOSS, "vocabulary 2^17, bf16", loss(2**17, BF16), 4, quick=True),
    Case(LOSS, "vocabulary 2^17, fp32", loss(2**17, FP32), 4),
    Case(LOSS, "vocabulary 50257, bf16", loss(50257, BF16), 4),
)
KERNELS = (
    (triton_norm, ("_forward", "_inner_again", "_backward")),
    (triton_rotary, ("_forward", "_backward")),
    (triton_norm_rotary, ("_forward", "_backward")),
    (triton_swiglu, ("_forward", "_backward")),
    (triton_cross_entropy, ("_row_sums", "_gradient")),
)
"""All kernels by module; each is launched by some case."""


def launches(run: Callable[[], Any]) -> list[Launch]:
    """The launches of a forward and backward pass, which are recorded in place of being made."""
    found: list[Launch] = []

    class Recorded:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, _grid: Any) -> Callable[..., None]:
            return lambda *arguments, **constants: found.append(
                Launch(self.kernel, arguments, constants)
            )

    real = [(module, name, getattr(module, name)) for module, names in KERNELS for name in names]
    for module, name, kernel in real:
        setattr(module, name, Recorded(kernel))
    try:
        run()
    finally:
        for module, name, kernel in real:
            setattr(module, name, kernel)
    return found


def source(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """The kernel, specialised as Triton's launcher does it, and the compiler's options."""
    params = launch.kernel.params
    names = {param.name for param in params}
    options = {key: value for key, value in launch.constants.items() if key not in names}
    given = dict(zip((param.name for param in params), launch.arguments, strict=False))
    given |= {key: value for key, value in launch.constants.items() if key in names}
    signature, constants, attributes = {}, {}, {}
    for at, param in enumerate(params):
        value = given[param.name]
        plain = param.is_constexpr or value is None
        specialised = isinstance(value, int) and not param.do_not_specialize
        if plain or (specialised and value == 1):
            signature[param.name], constants[at,] = "constexpr", value
            continue
        signature[param.name] = type_of(value)
        if isinstance(value, torch.Tensor) or (specialised and value % 16 == 0):
            attributes[at,] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes), options


def type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return {BF16: "*bf16", FP32: "*fp32", torch.int64: "*i64"}[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if value < 2**31 else "i64"


def compiled(launch: Launch, capability: int) -> Compiled:
    """Compile and assemble a launch's kernel for a compute capability."""
    what, options = source(launch)
    result = triton.compile(what, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(result.asm["ptx"], encoding="utf-8")
        target = re.search(r"^\.target (\w+)", result.asm["ptx"], re.MULTILINE)
        assert target is not None
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={target[1]}", str(ptx)]
        done = subprocess.run(
            [*command, "-o", f"{folder}/out"], capture_output=True, text=True, check=True
        )
    registers = re.search(r"Used (\d+) registers", done.stderr)
    stores, loads = (
        re.search(rf"(\d+) bytes spill {way}", done.stderr) for way in ("stores", "loads")
    )
    if registers is None or stores is None or loads is None:
        raise RuntimeError(f"ptxas reported no registers: {done.stderr}")
    return Compiled(int(registers[1]), max(int(stores[1]), int(loads[1])))


@dataclass(frozen=True)
class Row:
    """A kernel of a case, compiled for all capabilities."""

    case: Case
    kernel: str
    threads: int
    found: tuple[Compiled, ...]

    @property
    def programs(self) -> int:
        """Programs whose registers, which come by eight a thread, a multiprocessor holds."""
        each = max(-(-one.registers // 8) * 8 for one in self.found) * self.threads
        return min(REGISTERS // each, 2048 // self.threads)

    def problem(self) -> str | None:
        """What is above a bound, or None."""
        name = f"{self.case.name}, {self.kernel}, {self.case.shape}"
        if self.programs < self.case.programs:
            return f"{name}: registers for {self.programs} programs, not {self.case.programs}"
        spilled = max(one.spilled for one in self.found)
        if spilled > self.case.spilled:
            return f"{name}: {spilled} bytes spilled, above {self.case.spilled}"
        return None

    def text(self) -> str:
        cells = [f"{self.case.name}, {self.kernel}", self.case.shape, str(self.threads)]
        for one in self.found:
            spilled = f" ({one.spilled} B spilled)" if one.spilled else ""
            cells.append(f"{one.registers}{spilled}")
        cells += [str(self.programs), str(self.case.programs), f"{self.case.spilled} B"]
        return "| " + " | ".join(cells) + " |"


def rows(cases: list[Case]) -> Iterator[Row]:
    """Compile the kernels of cases."""
    for case in cases:
        for launch in launches(case.run):
            found = tuple(compiled(launch, capability) for capability in CAPABILITIES)
            name = launch.kernel.__name__.strip("_").replace("_", " ")
            yield Row(case, name, 32 * launch.constants["num_warps"], found)


def machine() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{os.cpu_count()} cores of {line.split(':')[1].strip()}"
    return platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail above a bound")
    parser.add_argument("--all", action="store_true", help="with --check: all shapes")
    order = parser.parse_args()
    every = order.all or not order.check
    found = []
    for row in rows([case for case in CASES if every or case.quick]):
        found.append(row)
        print(row.text(), flush=True)
    problems = [problem for problem in (row.problem() for row in found) if problem]
    if not order.check:
        head = HEAD.format(
            date=datetime.datetime.now(datetime.UTC).date(),
            triton=triton.__version__,
            machine=machine(),
            capabilities=" | ".join(f"sm_{capability}" for capability in CAPABILITIES),
            rules="-:|" * (len(CAPABILITIES) + 1),
        )
        PAGE.write_text(head + "\n".join(row.text() for row in found) + "\n", encoding="utf-8")
    sys.exit("\n".join(problems) or 0)


if __name__ == "__main__":
    main()
