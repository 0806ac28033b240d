"""Compares an exported model's logits, computed by transformers, with the run's own.

The models are in memory one after the other, or block by block (block_parity.py). Both have the
exported weights' values and compute in fp32 whatever their type is, so that rounding does not hide
an error. Computing in bf16 is measured beside it (tools/export_table.py).
"""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from keel_megatron.architecture.parameters import parameter_count
from keel_megatron.checkpoint import state
from keel_megatron.config.run import RunConfig
from keel_megatron.errors import UserError
from keel_megatron.huggingface.naming import is_llama
from keel_megatron.inference import block_parity
from keel_megatron.model.language_model import build_model
from keel_megatron.runtime.distributed import Runtime

_ROWS = 4
"""Most sequences that are compared."""
_LOGITS_BYTES = 1 << 28
"""Of the run's own logits, which are kept while the exported model computes its."""
_MISSING = (
    "transformers is needed to check the exported model: pip install 'keel-megatron[huggingface]'; "
    "or export with --no-check"
)


@dataclass(frozen=True)
class Parity:
    """How far two models' logits differ."""

    difference: float
    """Largest ||exported - own|| / ||own|| of any token's logits."""
    bound: float
    tokens: int
    same_choice: float
    """Share of the tokens for which both predict the same next token."""

    @property
    def holds(self) -> bool:
        """Whether the difference is within the bound."""
        return self.difference <= self.bound

    def line(self) -> str:
        """The figures."""
        verdict = "within" if self.holds else "NOT within"
        return (
            f"the logits of {self.tokens:,} tokens differ by at most {self.difference:.2g} "
            f"relative, {verdict} the bound {self.bound:.2g}; the same next token is predicted "
            f"after {self.same_choice:.2%} of them"
        )


def require_transformers() -> None:
    """Import transformers, which takes seconds.

    Raises:
        UserError: it is not installed, or too old.
    """
    # An exported folder is on this machine; nothing may ask a server for it.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    _private_modules()
    try:
        from transformers import AutoModelForCausalLM, PreTrainedConfig  # noqa: F401
        from transformers.utils import logging
    except ImportError as error:
        raise UserError(_MISSING) from error
    logging.disable_progress_bar()


def choose_by_block(config: RunConfig) -> tuple[bool, str]:
    """Whether the models must be compared block by block, and what the check needs, as a message.

    Raises:
        UserError: not even one block at a time fits on the device.
    """
    count, logits = parameter_count(config.model, config.data.vocab_size), 3 * _LOGITS_BYTES
    whole, by_block = 4 * count + logits, block_parity.bytes_held(config, _most(config)) + logits
    if torch.cuda.is_available() and config.training.device != "cpu":
        free, where = torch.cuda.mem_get_info()[0], "the device"
    else:
        free, where = psutil.virtual_memory().available, "this machine"
    if min(whole, by_block) > free:
        raise UserError(
            f"the check of the exported model needs {by_block / 1e9:.3g} GB (one block at a time), "
            f"and {free / 1e9:.3g} GB are free on {where}; export with --no-check"
        )
    needed, what = (whole, "model") if whole <= free else (by_block, "block")
    return whole > free, (
        f"the check of the logits needs {needed / 1e9:.3g} GB (one {what} at a time), and "
        f"{free / 1e9:.3g} GB are free on {where}"
    )


def _most(config: RunConfig) -> int:
    """Most tokens that are compared."""
    budget = max(1, _LOGITS_BYTES // (4 * config.data.vocab_size))
    return min(_ROWS * config.data.seq_length, budget)


def bound(config: RunConfig, context: int) -> float:
    """Largest difference that rounding explains (`Parity.difference`); docs/use.md has measures.

    1e-5, or 4e-8 a sub-layer where that is more. transformers' Llama computes rotary angles in
    fp32, whose error grows with the position: 2^-22 a token.

    Args:
        config: the run.
        context: tokens of a sequence.
    """
    angles = context * 2.0**-22 if is_llama(config.model) else 0.0
    return max(1e-5, 4e-8 * config.model.sub_layers) + angles


def checked_tokens(config: RunConfig, tokens: list[int]) -> Tensor:
    """Rows [batch, tokens] to compare: up to 4 of the context's length, as the memory allows."""
    budget = max(1, _LOGITS_BYTES // (4 * config.data.vocab_size))
    length = min(config.data.seq_length, len(tokens), budget)
    rows = max(1, min(_ROWS, budget // length, len(tokens) // length))
    return torch.tensor(tokens[: rows * length]).view(rows, length)


@torch.inference_mode()
def own_logits(
    checkpoint: Path, config: RunConfig, runtime: Runtime, tokens: Tensor, dtype: torch.dtype
) -> Tensor:
    """Logits [tokens, vocabulary], fp32, of the run's model; the model is freed.

    Args:
        checkpoint: the checkpoint.
        config: the run, for one process and in fp32.
        runtime: a runtime with only this process.
        tokens: rows of tokens.
        dtype: type of the exported matrices, to which the model's are rounded.
    """
    (model,) = build_model(config, runtime)
    state.load_weights(checkpoint, runtime, [model])
    for parameter in model.eval().parameters():
        if parameter.dim() > 1 and dtype != torch.float32:
            parameter.copy_(parameter.to(dtype))
    positions = torch.arange(tokens.shape[1], device=runtime.device)[None]
    found = [
        model(row[None].to(runtime.device), positions, None)[0].float().cpu() for row in tokens
    ]
    del model
    _free(runtime.device)
    return torch.cat(found)


@torch.inference_mode()
def exported_logits(
    folder: Path, device: torch.device, tokens: Tensor, dtype: torch.dtype
) -> Tensor:
    """The same of an exported folder, computed by transformers in `dtype`."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, local_files_only=True, dtype=dtype
    )
    model = model.to(device).eval()
    found = [model(row[None].to(device), use_cache=False).logits[0].float().cpu() for row in tokens]
    del model
    _free(device)
    return torch.cat(found)


def compare(own: Tensor, exported: Tensor, limit: float) -> Parity:
    """Compare logits [tokens, vocabulary]; not finite ones differ by infinity."""
    worst = 0.0
    same = 0
    for mine, other in zip(torch.split(own, 256), torch.split(exported, 256), strict=True):
        relative = (other - mine).norm(dim=-1) / mine.norm(dim=-1).clamp_min(1e-30)
        worst = max(worst, float(relative.nan_to_num(float("inf"), float("inf")).max()))
        same += int((mine.argmax(-1) == other.argmax(-1)).sum())
    return Parity(worst, limit, len(own), same / len(own))


def _private_modules() -> None:
    """Let transformers copy a folder's code into a folder that ends with this process.

    Its usual place is the user's cache. It reads the variable when it is imported.
    """
    if "transformers" not in sys.modules and "HF_MODULES_CACHE" not in os.environ:
        place = tempfile.mkdtemp(prefix="keel-export-")
        atexit.register(shutil.rmtree, place, ignore_errors=True)
        os.environ["HF_MODULES_CACHE"] = place


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
