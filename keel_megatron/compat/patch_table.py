"""The table of patches: what each changes, why, for which versions, and which test needs it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Patch:
    """One row of docs/compat.md."""

    name: str
    """Module and function within `keel_megatron.compat`."""
    changes: str
    why: str
    needed_by: str
    """The checked versions of megatron-core, torch or DeepSpeed that need it."""
    test: str
    """`path::function` of a test that fails without it."""


_PATCHES: dict[str, Patch] = {}


def patch(*, changes: str, why: str, needed_by: str, test: str) -> Callable[[F], F]:
    """Register a function in the table; the function itself is not changed."""

    def enter(function: F) -> F:
        name = f"{function.__module__.removeprefix(__package__ + '.')}.{function.__name__}"
        _PATCHES[name] = Patch(name, changes, why, needed_by, test)
        return function

    return enter


@dataclass(frozen=True)
class PrivateName:
    """A private name of a library that is used directly, and so may break with a new version."""

    library: str
    name: str
    file: str
    """In `keel_megatron/`."""
    use: str


PRIVATE_NAMES = (
    PrivateName(
        "megatron-core",
        "_get_model_param_range_map",
        "checkpoint/optimizer_shards.py",
        "find the elements of a parameter that this rank's optimizer owns",
    ),
    PrivateName(
        "torch", "torch._foreach_copy_", "compat/masters.py", "copy lists of tensors in one call"
    ),
    PrivateName(
        "megatron-core",
        "_make_backward_post_hook",
        "engines/megatron/overlap.py",
        "let DDP see gradients that are in `main_grad` already",
    ),
    PrivateName(
        "megatron-core",
        "_postprocess",
        "model/language_model.py",
        "override the method of GPTModel that turns hidden states into losses",
    ),
    PrivateName(
        "torch",
        "torch._C._distributed_c10d",
        "runtime/rendezvous.py",
        "the types of the rendezvous stores",
    ),
    PrivateName(
        "torch",
        "torch._fused_sdp_choice",
        "model/attention_kernel.py",
        "ask which kernel attention takes",
    ),
    PrivateName(
        "torch",
        "_flash_attention_forward",
        "model/attention.py",
        "attention within documents, with dropout and in torch 2.9, which lack `varlen_attn`",
    ),
    PrivateName(
        "torch",
        "_set_sdp_priority_order",
        "model/attention_kernel.py",
        "set the order of attention's kernels once, not with a context manager in every block",
    ),
    PrivateName(
        "torch",
        "_abort_process_group",
        "runtime/distributed.py",
        "leave after an error without waiting for NCCL messages that nobody answers",
    ),
    PrivateName(
        "torch",
        "_dump_nccl_trace_json",
        "cluster/flight_recorder.py",
        "see which messages a hung rank has started and not finished",
    ),
    PrivateName(
        "torch", "torch._dynamo.exc", "model/compiled.py", "recognise a failed compilation"
    ),
    PrivateName(
        "torch",
        "torch._dynamo.mark_dynamic",
        "model/compiled.py",
        "compile one graph for micro-batches of any number of documents",
    ),
    PrivateName(
        "deepspeed",
        "_hp_mapping",
        "engines/deepspeed/zero_shards.py",
        "find a parameter's fp32 fragment under ZeRO 1 and 2",
    ),
    PrivateName(
        "deepspeed",
        "_get_fp32_opt_state_partition",
        "engines/deepspeed/zero_shards.py",
        "find a parameter's fp32 partition under ZeRO 3",
    ),
    PrivateName(
        "deepspeed",
        "_partition_all_parameters",
        "engines/deepspeed/zero_shards.py",
        "rewrite the parameters after masters were loaded under ZeRO 3",
    ),
)


def patches() -> list[Patch]:
    """All rows, by name. Imports every module of the package, and with them torch."""
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{__package__}.{module.name}")
    return [_PATCHES[name] for name in sorted(_PATCHES)]


def markdown() -> str:
    """The two tables of docs/compat.md."""
    lines = ["| patch | changes | why | needed by | fails without it |", "|---|---|---|---|---|"]
    lines += [
        f"| `{row.name}` | {row.changes} | {row.why} | {row.needed_by} | `{row.test}` |"
        for row in patches()
    ]
    lines += ["", "Private names of libraries that are used directly:", ""]
    lines += ["| library | name | file | use |", "|---|---|---|---|"]
    lines += [
        f"| {row.library} | `{row.name}` | `{row.file}` | {row.use} |" for row in PRIVATE_NAMES
    ]
    return "\n".join(lines)
