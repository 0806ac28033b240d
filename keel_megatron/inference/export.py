"""`keel export`: a run's checkpoint as a Hugging Face folder, with a check of its logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from keel_megatron.config.kernels import KernelsConfig
from keel_megatron.config.run import RunConfig
from keel_megatron.data.chat.templates import TemplateFile, template_beside
from keel_megatron.data.chat.tokens import ChatTokenizer
from keel_megatron.data.huggingface import HuggingFaceTokenizer
from keel_megatron.data.tokenizer import Tokenizer, open_tokenizer
from keel_megatron.errors import UserError
from keel_megatron.huggingface.export import DTYPES, DType, Origin, write_folder
from keel_megatron.huggingface.new_folder import check_new
from keel_megatron.huggingface.tokenizer import DIFFICULT, proven_files
from keel_megatron.inference import block_parity, parity
from keel_megatron.inference.sample_text import sample_text
from keel_megatron.inference.source import (
    config_of,
    find_checkpoint,
    is_checkpoint,
    tokenizer_path,
)
from keel_megatron.runtime.device import Launch
from keel_megatron.runtime.distributed import Runtime, start

Say = Callable[[str], None]


def export_run(
    run: Path, out: Path, *, step: int | None, dtype: DType, check: bool, say: Say
) -> bool:
    """Export a run's newest valid checkpoint, or another one.

    Args:
        run: folder of a run, or of a checkpoint.
        out: the folder to write; it must not exist, or be empty.
        step: the checkpoint's step; None: the newest.
        dtype: of the weights.
        check: compare the exported model's logits with the run's own.
        say: called with messages.

    Returns:
        Whether the logits agree; True without the check.

    Raises:
        UserError: there is no such checkpoint, the folder cannot be written, the model cannot be
            exported, a copied tokenizer differs, or transformers is missing.
    """
    check_new(out)
    config, by_block = _plain(config_of(run)), False
    _require_exportable(config)
    if check:
        parity.require_transformers()
        by_block, memory = parity.choose_by_block(config)
        say(memory)
    with start(config.parallel, config.training, Launch(0, 1, 0, 1)) as runtime:
        found = find_checkpoint(run, step, runtime)
        assert found.path is not None
        for remark in found.remarks:
            say(remark)
        place = tokenizer_path(run, found.path, found, config)
        tokenizer, template = open_tokenizer(place), template_beside(place.parent)
        text, what = sample_text(config, found.state, tokenizer)
        chat = None if template is None else template.text
        files = proven_files(tokenizer, config.data.seq_length, [*DIFFICULT, text], chat)
        for remark in files.remarks:
            say(remark)
        home = found.path.parent.parent if is_checkpoint(run) else run
        origin = Origin(config, found.path, found.state, home / "metrics.jsonl")
        write_folder(out, origin, files, _ends(tokenizer, template), dtype, say)
        say(f"exported step {found.state['step']} to {out}")
        if not check:
            return True
        rows = parity.checked_tokens(config, tokenizer.encode(text))
        say(f"comparing the logits on {len(rows)} x {rows.shape[1]} tokens of {what}")
        compared = _compared_by_block if by_block else _compared
        return compared(found.path, out, config, rows, runtime, dtype, say)


def _ends(tokenizer: Tokenizer | HuggingFaceTokenizer, template: TemplateFile | None) -> list[int]:
    """The token that ends a document; then that which ends an answer, if it is another one."""
    if template is None:
        return [tokenizer.eod]
    with ChatTokenizer(tokenizer, template.text, template.origin) as chat:
        return chat.ends()


def _require_exportable(config: RunConfig) -> None:
    """Refuse a model whose stream an exported model has not."""
    if config.model.stream != "fp32":
        raise UserError(
            f"model.stream: the run has {config.model.stream}, and exported models have an fp32 "
            "stream; only runs with model.stream: fp32 can be exported"
        )


def _plain(config: RunConfig) -> RunConfig:
    """The run, computing in fp32 with what is installed here."""
    training = config.training.model_copy(update={"precision": "fp32"})
    return config.model_copy(update={"training": training, "kernels": KernelsConfig()})


def _compared(
    checkpoint: Path,
    out: Path,
    config: RunConfig,
    rows: Tensor,
    runtime: Runtime,
    dtype: DType,
    say: Say,
) -> bool:
    """Compare with the exported model, in fp32; in bf16 for information."""
    limit = parity.bound(config, rows.shape[1])
    own = parity.own_logits(checkpoint, config, runtime, rows, DTYPES[dtype])
    exported = parity.exported_logits(out, runtime.device, rows, torch.float32)
    result = parity.compare(own, exported, limit)
    say(f"parity: {result.line()}")
    if result.holds and dtype == "bf16":
        exported = parity.exported_logits(out, runtime.device, rows, torch.bfloat16)
        rounded = parity.compare(own, exported, float("inf"))
        say(f"computed in bf16, they differ by at most {rounded.difference:.2g} relative")
    return result.holds


def _compared_by_block(
    checkpoint: Path,
    out: Path,
    config: RunConfig,
    rows: Tensor,
    runtime: Runtime,
    dtype: DType,
    say: Say,
) -> bool:
    """The same in fp32, for a model that does not fit in memory."""
    limit = parity.bound(config, rows.shape[1])
    own, streams = block_parity.own_logits(checkpoint, config, runtime, rows, DTYPES[dtype])
    exported, others = block_parity.exported_logits(out, runtime.device, rows)
    result = parity.compare(own, exported, limit)
    say(f"parity: {result.line()}")
    say(block_parity.first_different(streams, others, limit))
    return result.holds
