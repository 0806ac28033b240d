"""Doctor: installed packages and devices of this machine, and known problems."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import platform
import socket
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

import keel_megatron
from keel_megatron.config.load import flatten
from keel_megatron.config.run import RunConfig
from keel_megatron.runtime.cores import available_cores
from keel_megatron.runtime.versions import package_versions, version

_EMPTY_TRANSFORMER_ENGINE = (
    "transformer-engine is installed without its core (an empty package), and Megatron-core cannot "
    "be imported beside it: pip uninstall transformer-engine, or pip install "
    "'transformer-engine[pytorch]'"
)
_OTHER_APEX = (
    "the package apex from PyPI is a web toolkit, not NVIDIA's Apex, and is not used: "
    "pip uninstall apex"
)


@dataclass(frozen=True)
class Component:
    """A checked library or device."""

    name: str
    text: str
    """Its version, or "absent" with the consequence."""
    warning: str | None = None
    """What the user should do, or None."""


def installed() -> list[Component]:
    """All libraries that a run can use, installed or not."""
    return [
        Component("torch", f"{torch.__version__}"),
        Component("CUDA", _cuda()),
        Component("cuDNN", _cudnn()),
        Component("NCCL", _nccl()),
        Component("devices", describe_devices()),
        _package("megatron-core", "megatron.core"),
        _package("triton", "triton", absent="the fused norm runs in torch"),
        _apex(),
        _transformer_engine(),
        _package("deepspeed", "deepspeed"),
        _mlflow(),
    ]


def used(config: RunConfig | None) -> list[Component]:
    """The device and the norm implementation of a run on this machine.

    Args:
        config: the run; None: the defaults.
    """
    cuda = device_type(config) == "cuda"
    fused = cuda and importlib.util.find_spec("triton") is not None
    return [
        Component("device", "CUDA, with NCCL" if cuda else "CPU, with gloo"),
        Component("norm", "one Triton kernel with its sum" if fused else "torch"),
    ]


def device_type(config: RunConfig | None) -> str:
    """Device type of a run on this machine, `cuda` or `cpu`; None: the default configuration."""
    wanted = "auto" if config is None else config.training.device
    return "cuda" if torch.cuda.is_available() and wanted != "cpu" else "cpu"


def versions() -> dict[str, str]:
    """Versions of everything that can change results, and a digest of this code."""
    found = package_versions() | {"torch": str(torch.__version__)}
    found["keel-megatron"] += f" (code {_code_digest()})"
    return found | {"CUDA": str(torch.version.cuda), "NCCL": _nccl()}


def facts(config: RunConfig) -> dict[str, Any]:
    """What must be identical on all ranks, by name: versions and the configuration."""
    return versions() | flatten(config)


def config_digest(config: RunConfig) -> str:
    """A short hash of the resolved configuration."""
    return hashlib.sha256(repr(sorted(flatten(config).items())).encode()).hexdigest()[:12]


def device_memory() -> list[float]:
    """Memory of each CUDA device of this node, in GB; of the node itself if it has none."""
    if not torch.cuda.is_available():
        return [psutil.virtual_memory().total / 1e9]
    count = torch.cuda.device_count()
    return [torch.cuda.get_device_properties(n).total_memory / 1e9 for n in range(count)]


def describe_devices() -> str:
    """Description of this node's devices."""
    memory = device_memory()
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(n) for n in range(len(memory))}
        return f"{len(memory)} x {' and '.join(sorted(names))}, {min(memory):.1f} GB each"
    return f"no CUDA device; {available_cores()} CPU cores, {memory[0]:.1f} GB"


def describe_machine() -> str:
    """Host, system and interpreter."""
    return (
        f"keel-megatron {keel_megatron.__version__} on {socket.gethostname()}: "
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    )


def _cuda() -> str:
    if torch.version.cuda is None:
        return "absent: this torch is a CPU build"
    if not torch.cuda.is_available():
        return f"{torch.version.cuda}, but torch sees no device"
    return f"{torch.version.cuda}"


def _cudnn() -> str:
    number = torch.backends.cudnn.version() if torch.version.cuda else None  # type: ignore[no-untyped-call]
    if number is None:
        return "absent"
    return f"{number // 10000}.{number % 10000 // 100}.{number % 100}"  # since cuDNN 9


def _nccl() -> str:
    if torch.version.cuda is None or not torch.distributed.is_nccl_available():
        return "absent"
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


def _package(name: str, module: str, absent: str = "") -> Component:
    found = version(name)
    if found is None or not _there(module.partition(".")[0]):
        return Component(name, f"absent{': ' * bool(absent)}{absent}")
    return Component(name, found)


def _mlflow() -> Component:
    skinny, whole = version("mlflow-skinny"), version("mlflow")
    if skinny is None and whole is None:
        needs = "tracking.mlflow: true needs pip install mlflow-skinny"
        return Component("mlflow", "absent", needs)
    note = "with its server" if whole else "without its server (extra: dashboard)"
    return Component("mlflow", f"{whole or skinny}, {note}")


def _apex() -> Component:
    """NVIDIA's Apex has amp_C and apex.optimizers; the package name is not enough."""
    if _imports("amp_C") and _imports("apex.optimizers"):
        return Component("apex", f"{version('apex') or 'built from source'}, NVIDIA's")
    found = importlib.util.find_spec("apex")
    parts = list(found.submodule_search_locations or []) if found else []
    if found is None:
        return Component("apex", "absent (optional)")
    if any((Path(part) / "optimizers").is_dir() for part in parts):
        return Component(
            "apex",
            f"{version('apex')}, without its extensions: not used",
            "NVIDIA's Apex has no amp_C: build it with APEX_CPP_EXT=1 APEX_CUDA_EXT=1",
        )
    return Component("apex", f"{version('apex')}, not NVIDIA's: not used", _OTHER_APEX)


def _transformer_engine() -> Component:
    name = "transformer-engine"
    found = version(name) or version("transformer_engine")
    if found is None and not _there("transformer_engine"):
        return Component(name, "absent (optional)")
    try:
        _import("transformer_engine.pytorch")
    except RuntimeError as error:  # the error of the empty package
        return Component(name, f"{found}, broken: {_first_line(error)}", _EMPTY_TRANSFORMER_ENGINE)
    except (ImportError, OSError) as error:
        text = f"{found}, cannot be imported: {_first_line(error)}"
        if version("transformer-engine-torch") is None:
            return Component(name, text, _EMPTY_TRANSFORMER_ENGINE)
        return Component(name, text, f"{name} {found} does not fit this torch or this machine")
    return Component(name, f"{found}")


def _there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _imports(module: str) -> bool:
    try:
        _import(module)
    except Exception:  # importing an unrelated package may raise any error
        return False
    return True


def _import(module: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module(module)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@cache
def _code_digest() -> str:
    """Digest of this package's sources, to detect nodes with different checkouts."""
    root = Path(keel_megatron.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]
